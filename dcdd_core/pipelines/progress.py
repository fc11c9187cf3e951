"""Progress bars with rate, time left and memory; shown only in a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tqdm import tqdm


class ProgressBar(tqdm):
    """tqdm's bar, with the memory in use behind it.

    Args:
        work: what to iterate over; None for a bar that is updated by hand.
        label: what is being done.
        total: number of items, if it is known and `work` has no length.
        unit: name of one item.
        shown: False for no bar, as in all processes but the first.
    """

    def __init__(
        self, work: Iterable[Any] | None = None, *, label: str, unit: str, total: int | None = None, shown: bool = True
    ):
        # None: no bar unless the standard error output is a terminal.
        super().__init__(work, desc=label, total=total, unit=unit, dynamic_ncols=True, disable=None if shown else True)

    def reach(self, done: int, total: int) -> None:
        """Shows that so many of `total` items are done."""
        self.total = total
        self.update(done - self.n)

    def display(self, *args: Any, **options: Any) -> None:
        """Draws the bar."""
        self.set_postfix_str(memory(), refresh=False)
        super().display(*args, **options)


def memory() -> str:
    """The memory in use, as text: the peak on the GPU, or this process's; "" if it is unknown."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB of GPU memory"
    try:
        import psutil
    except ImportError:  # accelerate brings it; without it, only this number is missing
        return ""
    return f"{psutil.Process().memory_info().rss / 1e9:.1f} GB of memory"
