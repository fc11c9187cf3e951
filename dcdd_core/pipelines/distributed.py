"""Several processes over one list of work, through accelerate.

Every process sees the whole list, takes its share of batches and writes into one folder; the first sums up. Which
pictures share a batch depends on the list alone, so any number of processes, and a run that was stopped and started
again, computes the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those that do one list of work; alone unless told otherwise.

    Attributes:
        index, count: which of how many.
        device: the one that this process works on.
        wait: returns when every process has come to it.
    """

    index: int = 0
    count: int = 1
    device: str = "cpu"
    wait: Callable[[], None] = lambda: None

    @property
    def first(self) -> bool:
        """Whether this is the one that reports and writes what is written once."""
        return self.index == 0

    def batches(self, work: Sequence[T], batch: int, *, done: Callable[[T], bool], label: str) -> Iterator[Sequence[T]]:
        """This process's share of the batches in which anything is left to do, under a progress bar of the first.

        All processes look at what is done before any of them changes it, and leave together.

        Raises:
            ValueError: for a batch below 1.
        """
        if batch < 1:
            raise ValueError(f"--batch must be at least 1, got {batch}")
        batches = [work[k : k + batch] for k in range(0, len(work), batch)]
        left = [part for part in batches if not all(done(item) for item in part)]
        self.wait()
        own = left[self.index :: self.count]
        yield from tqdm(own, desc=label, unit="batch", disable=None if self.first else True)
        self.wait()


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """The processes that `accelerate launch` or `torchrun` started, connected; without these, one.

    Args:
        device: as asked for; "cuda" becomes this process's own.

    Raises:
        ValueError: if there are several and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Processes(device=device)
        return
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ValueError("several processes work together through accelerate: install it, or start one") from error
    # Whoever is done first waits for the others, for days where the list is long; torch's own limit is half an hour.
    state = PartialState(cpu=device == "cpu", timeout=timedelta(days=30))
    own = f"{device}:{state.local_process_index}" if device == "cuda" else device
    yield Processes(index=state.process_index, count=state.num_processes, device=own, wait=state.wait_for_everyone)
    state.destroy_process_group()  # not after an error: the others, who still wait, are ended by whoever started them
