"""The draw's noise: the host's milliseconds for 16384 codes, and their share of the shortest pass

Ours is drawn on the CPU. A counter-based generator, Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3"), would give the same numbers on any device; here it is torch's integer operations. The shortest pass
is that of Janus-Pro-7B's shape on an H100, limited by memory bandwidth. Noise is drawn while the GPU computes a pass,
so a share below 1 costs no time.

Shapes: B samples, P positions, K codes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from benchmarks.memory import janus
from benchmarks.sampler import step_limit
from benchmarks.timing import alternating
from dcdd_core.method.sampling import gumbel_noise_grid

HEAD = ("images, positions", "generator", "ms", "times ours", "share of an H100's pass")
SIZES = ((1, 1), (1, 12), (1, 32), (16, 1))
_WORD = 2**32 - 1
_MULTIPLIERS, _KEY_STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def philox(counter: Sequence[torch.Tensor], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Philox 4x32-10: four words of a counter, int64 below 2**32, and two of a key -> four random words."""
    a, b, c, d = counter
    for _ in range(10):
        # A product of two words fills all 64 bits. As a signed number it wraps, but both of its halves are right.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> 32 & _WORD) ^ b ^ key[0],
            second & _WORD,
            (first >> 32 & _WORD) ^ d ^ key[1],
            first & _WORD,
        )
        key = tuple((word + step) & _WORD for word, step in zip(key, _KEY_STEPS))
    return a, b, c, d


def philox_noise(seeds: Sequence[int], positions: Sequence[int], codes: int) -> torch.Tensor:
    """Standard Gumbel noise [B, P, K] float32 from one word per code; K is a multiple of 4."""
    code, position = torch.meshgrid(torch.arange(codes // 4), torch.tensor(positions), indexing="xy")
    nothing = torch.zeros_like(code)
    words = [torch.cat(philox((code, position, nothing, nothing), (s & _WORD, s >> 32 & _WORD)), -1) for s in seeds]
    return torch.stack(words).double().add_(0.5).mul_(2.0**-32).log_().neg_().log_().neg_().float()


GENERATORS = {
    "ours: torch's, seeded by sample and position": gumbel_noise_grid,
    "Philox, keyed by sample, counting positions and codes": philox_noise,
}


def rows(sizes: Sequence[tuple[int, int]] = SIZES, codes: int = 16384, rounds: int = 20) -> list[tuple[str, ...]]:
    limit, found = step_limit(janus("Janus-Pro-7B")), []
    for images, positions in sizes:
        draws = {
            name: lambda draw=draw, i=images, p=positions: draw(range(i), range(p), codes)
            for name, draw in GENERATORS.items()
        }
        medians = {name: statistics.median(taken) for name, taken in alternating(draws, rounds).items()}
        ours = next(iter(medians.values()))
        for name, taken in medians.items():
            cells = f"{1e3 * taken:.3g}", f"{taken / ours:.2f}", f"{taken / limit:.2f}"
            found.append((f"{images}, {positions}", name, *cells))
    return found
