"""Prompts -> token logits with the passes that led to them, of samplers that reveal many positions a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch

from ..method.progressive import ProgressiveOptions, Staged
from ..protocols import DEFAULT_SAMPLING, OnProgress, SamplingOptions, TokenSampler
from ..types import TokenLogits
from .host import PLAIN, Host
from .sample import in_batches, logits_memory


@runtime_checkable
class StagedSampler(TokenSampler, Protocol):
    """A `TokenSampler` that can tell what each of its passes did.

    Attributes:
        sampling: how it samples where options do not say it: passes, order, revision.
    """

    sampling: ProgressiveOptions

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

    def draw(part: Sequence[str], **given: Any) -> Staged:
        staged = sampler.sample_stages(part, options=options, **given)
        return replace(staged, token_logits=host.keep(staged.token_logits))

    memory = 3 * logits_memory(sampler)  # the result, the noise of all draws, and one pass
    return Staged.joined(in_batches(draw, prompts, seeds, previous, resample, on_progress, memory, host))
