"""Times functions in alternation, so that other load on the machine affects all of them alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

NOT_MEASURED = "not measured (no GPU here)"
NO_TORCHAO = "not measured (torchao is not installed)"

#: DCDD_BENCH_CLOCK=cpu measures the CPU time of a single thread, for machines with other load.
CPU_CLOCK = os.environ.get("DCDD_BENCH_CLOCK") == "cpu"
if CPU_CLOCK:
    torch.set_num_threads(1)


def machine() -> str:
    """Processor, GPU, number of threads and torch version of this machine."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text("utf-8").splitlines() if about.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    parts = [models[0] if models else platform.processor() or platform.machine()]
    parts += [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return ", ".join([*parts, f"{torch.get_num_threads()} threads", f"torch {torch.__version__}"])


def is_h100() -> bool:
    """Whether the GPU is an H100 SXM, which the benchmarks' limits are computed for."""
    return torch.cuda.is_available() and torch.cuda.get_device_name() == "NVIDIA H100 80GB HBM3"


def clock() -> float:
    """Current time in seconds, after the GPU has finished all pending work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.thread_time() if CPU_CLOCK else time.perf_counter()


def alternating(functions: Mapping[str, Callable[[], object]], rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of each function in each round, after a warm-up round."""
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
    """Rows (what, who, median seconds, median ratio to ours) of several functions, of which the first is ours."""
    seconds = alternating(functions, rounds)
    ours = next(iter(seconds.values()))
    return [
        (what, name, f"{statistics.median(taken):.3g}", f"{statistics.median(t / o for t, o in zip(taken, ours)):.2f}")
        for name, taken in seconds.items()
    ]
