"""Splits a list of work between processes, through accelerate.

Every process has the whole list, takes its share of the batches and writes into one folder; the first process reports.
Batches depend on the list alone, so results do not depend on the number of processes or on interruptions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from .progress import ProgressBar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process's place among those that share a list of work; by default it is the only one.

    Attributes:
        index: rank of this process.
        count: world size.
        device: device of this process.
        wait: barrier: returns when every process has called it.
    """

    index: int = 0
    count: int = 1
    device: str = "cpu"
    wait: Callable[[], None] = lambda: None

    @property
    def first(self) -> bool:
        """Whether this process reports, and writes what must be written once."""
        return self.index == 0

    def batches(self, work: Sequence[T], batch: int, *, done: Callable[[T], bool], label: str) -> Iterator[Sequence[T]]:
        """This process's share of the batches that still have work to do; the first process shows progress bars.

        All processes check what is already done before any of them starts, and all finish together.

        Raises:
            ValueError: for a batch size below 1.
        """
        if batch < 1:
            raise ValueError(f"--batch must be at least 1, got {batch}")
        batches = [work[k : k + batch] for k in range(0, len(work), batch)]
        bar = ProgressBar(batches, label=f"{label}, done before", unit="batch", shown=self.first)
        left = [part for part in bar if not all(done(item) for item in part)]
        self.wait()
        own = left[self.index :: self.count]
        yield from ProgressBar(own, label=label, unit="batch", shown=self.first)
        self.wait()


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Connects the processes that `accelerate launch` or `torchrun` started; otherwise there is one process.

    Args:
        device: the requested device; "cuda" becomes the GPU of this process.

    Raises:
        ValueError: if there are several processes and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Processes(device=device)
        return
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ValueError("several processes need accelerate: install it, or start a single process") from error
    # The first to finish waits for the others, days for a long list, but torch's default timeout is 30 minutes.
    state = PartialState(cpu=device == "cpu", timeout=timedelta(days=30))
    own = f"{device}:{state.local_process_index}" if device == "cuda" else device
    yield Processes(index=state.process_index, count=state.num_processes, device=own, wait=state.wait_for_everyone)
    state.destroy_process_group()  # not after an error: the launcher then ends the processes that still wait
