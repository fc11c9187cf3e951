"""The draw's noise: the host's milliseconds per step for 16384 codes, and their share of the shortest step

The shortest possible step is that of Janus-Pro-7B's shape on an H100, limited by memory bandwidth. Noise is drawn while
the GPU computes a step, so a share below 1 costs no time.
"""

from __future__ import annotations

import statistics

from benchmarks.memory import janus
from benchmarks.sampler import step_limit
from benchmarks.timing import alternating
from dcdd_core.method.sampling import gumbel_noise_grid

HEAD = ("images per batch", "ms per step", "share of an H100's step")


def rows(batches: tuple[int, ...] = (1, 16), rounds: int = 100) -> list[tuple[str, str, str]]:
    limit = step_limit(janus("Janus-Pro-7B"))
    seconds = alternating({str(b): lambda b=b: gumbel_noise_grid(range(b), [0], 16384) for b in batches}, rounds)
    medians = {batch: statistics.median(taken) for batch, taken in seconds.items()}
    return [(batch, f"{1e3 * taken:.3g}", f"{taken / limit:.2f}") for batch, taken in medians.items()]
