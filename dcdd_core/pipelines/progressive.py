"""Prompts -> token logits with the passes that led to them, of samplers that reveal many positions a pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch

from ..method.progressive import Staged
from ..protocols import DEFAULT_SAMPLING, OnProgress, SamplingOptions, TokenSampler
from ..types import TokenLogits
from .host import PLAIN, Host
from .oom import in_parts


@runtime_checkable
class StagedSampler(TokenSampler, Protocol):
    """A `TokenSampler` that can tell what each of its passes did."""

    def sample_stages(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        options: SamplingOptions = DEFAULT_SAMPLING,
        previous: TokenLogits | None = None,
        resample: torch.Tensor | None = None,
        on_progress: OnProgress | None = None,
    ) -> Staged:
        """`TokenSampler.sample`, with its passes."""
        ...


def staged_sampler(sampler: TokenSampler) -> StagedSampler:
    """The sampler, if it samples in passes.

    Raises:
        ValueError: for one that does not.
    """
    if not isinstance(sampler, StagedSampler):
        raise ValueError(
            f"{sampler.name or 'this model'} samples one token after the other and has no passes to choose: take the "
            "folder of a masked sampler, or leave out passes, order and revision"
        )
    return sampler


def sample_stages(
    sampler: StagedSampler,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    options: SamplingOptions = DEFAULT_SAMPLING,
    previous: TokenLogits | None = None,
    resample: torch.Tensor | None = None,
    on_progress: OnProgress | None = None,
    host: Host = PLAIN,
) -> Staged:
    """`pipelines.sample.sample`, with what each pass revealed and rewrote; the stages are on the CPU.

    Args:
        resample: bool [N] or [B, N].
        on_progress: as `pipelines.sample.sample`.

    Raises:
        ValueError: as the sampler.
        RuntimeError: if a single image does not fit into memory.
    """
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts came with {len(seeds)} seeds: give one seed for each prompt")
    logits = math.prod(sampler.grid) * sampler.codebook.size * 4

    def run(first: int, last: int) -> Staged:
        host.bring(3 * (last - first) * logits)  # the result, the noise of all draws, and one pass
        staged = sampler.sample_stages(
            prompts[first:last],
            seeds=seeds[first:last],
            options=options,
            previous=None if previous is None else previous.part(first, last),
            resample=resample if resample is None or resample.ndim == 1 else resample[first:last],
            on_progress=None if on_progress is None else lambda now: on_progress(replace(now, first=first)),
        )
        return replace(staged, token_logits=host.keep(staged.token_logits))

    return Staged.joined(in_parts(run, len(prompts), host))
