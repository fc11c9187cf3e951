"""Prompts -> token logits: a sampler, with as many pictures at once as memory has room for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..models.janus.sampler import ImageTokenSampler
from ..types import TokenLogits
from .oom import in_parts


def sample(
    sampler: ImageTokenSampler,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    on_step: Callable[[int, int, torch.Tensor], None] | None = None,
    **options: Any,
) -> TokenLogits:
    """`sampler.sample` of new pictures; where a batch runs out of memory, in smaller parts, with the same result.

    Args:
        on_step: as the sampler's; where there are parts, it is called for each from the first position on.
        options: `guidance`, `temperature`, `top_k`, `top_p`.

    Raises:
        ValueError: as the sampler.
        RuntimeError: if a single picture does not fit into memory.
    """
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts came with {len(seeds)} seeds: give one seed for each prompt")

    def run(first: int, last: int) -> TokenLogits:
        return sampler.sample(prompts[first:last], seeds=seeds[first:last], on_step=on_step, **options)

    return TokenLogits.joined(in_parts(run, len(prompts)))
