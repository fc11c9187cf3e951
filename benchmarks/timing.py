"""Times things against each other, in turn, so that what else a machine does meets all of them alike."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping

import torch

NOT_MEASURED = "not measured (no GPU here)"

#: DCDD_BENCH_CLOCK=cpu counts one thread's processor time: for a machine that is busy otherwise.
CPU_CLOCK = os.environ.get("DCDD_BENCH_CLOCK") == "cpu"
if CPU_CLOCK:
    torch.set_num_threads(1)


def clock() -> float:
    """Seconds, when all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.thread_time() if CPU_CLOCK else time.perf_counter()


def alternating(functions: Mapping[str, Callable[[], object]], rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of each function in each round, after one round that is not counted."""
    seconds = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            start = clock()
            function()
            if i > 0:
                seconds[name].append(clock() - start)
    return seconds


def compared(
    what: str, functions: Mapping[str, Callable[[], object]], rounds: int = 5
) -> list[tuple[str, str, str, str]]:
    """Rows (what, who, seconds, how many times ours) of several ways, the first being ours; medians over the rounds."""
    seconds = alternating(functions, rounds)
    ours = next(iter(seconds.values()))
    return [
        (what, name, f"{statistics.median(taken):.3g}", f"{statistics.median(t / o for t, o in zip(taken, ours)):.2f}")
        for name, taken in seconds.items()
    ]
