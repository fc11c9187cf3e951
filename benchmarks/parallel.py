"""Tokens many at a time: passes, and seconds per call, of pico with its trained weights

Passes do not depend on the machine. All rows use the same captions and seeds, and give the same tokens: `TokenLoop`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmarks.targets import Target
from benchmarks.timing import compared
from dcdd_core.models.autoregressive.sampler import AutoregressiveSampler
from dcdd_core.protocols import SamplingOptions
from dcdd_pico.models import load_pico
from dcdd_pico.scenes import scene_facts

HEAD = ("guidance, batch", "window", "passes", "fewer", "seconds", "of one by one", "tokens that differ")
WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
GUIDANCES, BATCHES = (1.0, 3.0, 5.0), (1, 4)
TARGETS = tuple(
    Target(
        row=(f"3, {batch}", "chosen by rows and device"),
        column="of one by one",
        relation="at most",
        bound=1.0,
        source="chosen: never slower than one by one",
    )
    for batch in BATCHES
)


def passes_of(sampler: AutoregressiveSampler, **given: object) -> tuple[torch.Tensor, int]:
    """The tokens, and the number of passes of the network."""
    seen: list[int] = []
    found = sampler.sample(on_progress=lambda now: seen.append(now.passes), **given)
    return found.tokens, seen[-1]


def rows(captions: int = 8, rounds: int = 3) -> list[tuple[str, ...]]:
    return rows_of(load_pico().sampler, GUIDANCES, WINDOWS, captions, rounds)


def rows_of(
    sampler: AutoregressiveSampler, guidances: Sequence[float], windows: Sequence[int], captions: int, rounds: int
) -> list[tuple[str, ...]]:
    """Rows for each guidance, batch and window, and for the window chosen automatically; the first window is 1."""
    found = []
    prompts = [facts.caption() for facts in scene_facts("calibration", captions)]
    for guidance in guidances:
        for batch in BATCHES:
            parts = [range(k, k + batch) for k in range(0, captions, batch)]
            names = {str(window): window for window in windows} | {"chosen by rows and device": None}

            def run(window: int | None, part: range, guidance: float = guidance) -> tuple[torch.Tensor, int]:
                options = SamplingOptions(guidance=guidance)
                texts = [prompts[k] for k in part]
                return passes_of(sampler, prompts=texts, seeds=part, options=options, parallel=window)

            def timed(window: int | None, parts: list[range] = parts) -> Callable[[], object]:
                return lambda: run(window, parts[0])

            what = f"{guidance:g}, {batch}"
            timings = compared(what, {name: timed(window) for name, window in names.items()}, rounds)
            drawn = {name: [run(window, part) for part in parts] for name, window in names.items()}
            alone = drawn["1"]
            means = {name: sum(count for _, count in held) / len(held) for name, held in drawn.items()}
            for _, name, seconds, ratio in timings:
                differ = sum(int((ours != theirs).sum()) for (ours, _), (theirs, _) in zip(drawn[name], alone))
                passes = f"{means[name]:.1f}", f"{means['1'] / means[name]:.2f}"
                found.append((what, name, *passes, seconds, ratio, str(differ)))
    return found
