"""Tokens many at a time: seconds a pass at Janus-Pro's shapes, random weights, guidance 3, batch 1

Random weights show what a pass costs, but not how many guesses are right. The prediction takes that from pico, whose
images have 144 tokens instead of 576; how far it holds for Janus-Pro was not measured. The passes timed are those at an
image's start, where attention is cheapest. The limit is the time of reading all weights once: on the CPU at the
bandwidth of a sum over a large tensor, on a GPU at an H100's.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise

import torch
from torch import nn
from transformers import JanusForConditionalGeneration

from benchmarks.memory import janus
from benchmarks.parallel import passes_of
from benchmarks.sampler import H100_BYTES, PROMPT, weights_read
from benchmarks.timing import NOT_MEASURED, alternating, clock, is_h100
from dcdd_core.models.autoregressive.sampler import place_weights
from dcdd_core.models.janus.sampler import JanusSampler
from dcdd_core.protocols import Progress, SamplingOptions
from dcdd_pico.models import load_pico
from dcdd_pico.scenes import scene_facts
from dcdd_pico.train_janus import pico_tokenizer

HEAD = ("model", "window", "seconds a pass", "limit", "passes an image, as pico", "seconds an image, predicted")
OPTIONS = SamplingOptions(guidance=3.0)
WINDOWS = (1, 4, 8, 12, 16, 32)
_SMALL, _LARGE = "Janus-Pro-1B", "Janus-Pro-7B"


class Enough(Exception):
    """Ends a sampling once its passes have been timed."""


def with_random_weights(name: str, device: str, dtype: torch.dtype) -> JanusSampler:
    """A sampler of a published shape; what sampling does not use stays on the meta device."""
    model = janus(name).to(dtype).eval()
    inner = model.model
    parts = (inner.language_model, inner.generation_embeddings, inner.generation_aligner, inner.generation_head)
    for part in (*parts, inner.vqmodel.quantize.embedding):
        part.to_empty(device=device)
        for weight in part.parameters():
            nn.init.normal_(weight, std=0.02)
    language = inner.language_model
    language.rotary_emb = type(language.rotary_emb)(language.config).to(device)
    place_weights(nn.ModuleList(parts), language, device=device, dtype=dtype, int8=False, computes_on=None)
    return JanusSampler(model, pico_tokenizer())


def seconds_of_passes(sampler: JanusSampler, window: int, count: int) -> list[float]:
    """Seconds of `count` passes, without those of the prompt and of the next pass, which a GPU records."""
    times: list[float] = []

    def note(now: Progress) -> None:
        times.append(clock())
        if now.passes == count + 2:
            raise Enough

    with suppress(Enough):
        sampler.sample([PROMPT], seeds=[0], options=OPTIONS, parallel=window, on_progress=note)
    return [after - before for before, after in pairwise(times[1:])]


def bandwidth(size: int = 2**28) -> float:
    """Bytes/s of a sum over a tensor of `size` bytes on the CPU."""
    held = torch.ones(size // 4)
    return size / min(alternating({"sum": held.sum}, 3)["sum"])


def tokens_a_pass(windows: Sequence[int], captions: int) -> dict[int, float]:
    """Window -> pico's mean over that many captions."""
    sampler = load_pico().sampler
    prompts = [facts.caption() for facts in scene_facts("calibration", captions)]

    def mean(window: int) -> float:
        counts = [
            passes_of(sampler, prompts=[prompt], seeds=[k], options=OPTIONS, parallel=window)[1]
            for k, prompt in enumerate(prompts)
        ]
        return sampler.grid[0] * sampler.grid[1] / statistics.mean(counts)

    return {window: mean(window) for window in windows}


def measured(
    what: str, sampler: JanusSampler, limit: float | None, pace: dict[int, float], rounds: int
) -> list[tuple[str, ...]]:
    """A row per window; `pace` is tokens per pass by window."""
    seconds: dict[int, list[float]] = {window: [] for window in pace}
    for _ in range(rounds):
        for window, taken in seconds.items():
            taken += seconds_of_passes(sampler, window, count=2)
    count, found = sampler.grid[0] * sampler.grid[1], []
    for window, taken in seconds.items():
        middle, passes = statistics.median(taken), count / pace[window]
        bound = "-" if limit is None else f"{limit:.3g}"
        found.append((what, str(window), f"{middle:.3g}", bound, f"{passes:.0f}", f"{middle * passes:.3g}"))
    return found


def unmeasured(what: str, model: JanusForConditionalGeneration, pace: dict[int, float]) -> list[tuple[str, ...]]:
    """Rows for a GPU that this machine does not have."""
    limit, count = weights_read(model) / H100_BYTES, model.model.vision_model.config.num_image_tokens
    return [
        (what, str(window), NOT_MEASURED, f"{limit:.3g} (H100)", f"{count / pace[window]:.0f}", "-") for window in pace
    ]


def rows(windows: Sequence[int] = WINDOWS, captions: int = 8, rounds: int = 2) -> list[tuple[str, ...]]:
    pace, speed, found = tokens_a_pass(windows, captions), bandwidth(), []
    for dtype in (torch.float32, torch.bfloat16):
        sampler = with_random_weights(_SMALL, "cpu", dtype)
        what = f"{_SMALL}'s shape (CPU, {str(dtype).removeprefix('torch.')})"
        found += measured(what, sampler, weights_read(sampler.model, dtype) / speed, pace, rounds)
        del sampler
        gc.collect()
    for name in (_SMALL, _LARGE):
        what = f"{name}'s shape (GPU, bfloat16)"
        if not torch.cuda.is_available():
            found += unmeasured(what, janus(name), pace)
            continue
        sampler = with_random_weights(name, "cuda", torch.bfloat16)
        limit = weights_read(sampler.model) / H100_BYTES if is_h100() else None
        found += measured(what, sampler, limit, pace, rounds)
        del sampler
        gc.collect()
    return found
