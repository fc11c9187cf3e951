"""Tokens many at a time: the same for pico's LlamaGen

As `parallel`, at this model's own guidance.
"""

from __future__ import annotations

from benchmarks import parallel
from dcdd_pico.embedded import LLAMAGEN
from dcdd_pico.models import load_pico

HEAD = parallel.HEAD
WINDOWS = (1, 4, 8, 12, 16)


def rows(captions: int = 8, rounds: int = 3) -> list[tuple[str, ...]]:
    sampler = load_pico(vlm=LLAMAGEN).sampler
    return parallel.rows_of(sampler, (sampler.default_guidance,), WINDOWS, captions, rounds)
