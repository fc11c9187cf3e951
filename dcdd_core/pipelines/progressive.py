"""Prompts -> token logits and the passes that led to them, for samplers that reveal many positions per pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch

from ..method.progressive import ProgressiveOptions, Revise, Staged
from ..protocols import DEFAULT_SAMPLING, FILTERS, OnProgress, SamplingOptions, TokenSampler
from ..types import TokenLogits
from .host import PLAIN, Host
from .sample import in_batches, recorded_alike


@runtime_checkable
class StagedSampler(TokenSampler, Protocol):
    """A `TokenSampler` that can report what each of its passes did.

    Attributes:
        sampling: its own defaults for what the options leave open: passes, order, revision.
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


def staged_sampler(
    sampler: TokenSampler,
    *,
    remedy: str = "take the folder of a masked sampler, or leave out passes, order and revision",
) -> StagedSampler:
    """The sampler, if it samples in passes.

    Args:
        remedy: what to do instead, in terms the caller's user knows; ends the error message.

    Raises:
        ValueError: for a sampler that does not.
    """
    if not isinstance(sampler, StagedSampler):
        raise ValueError(
            f"{sampler.name or 'this model'} samples one token after the other and has no passes to choose: {remedy}"
        )
    return sampler


def changed_plan(
    own: ProgressiveOptions,
    drawn: SamplingOptions,
    *,
    passes: int | None = None,
    revision_passes: int | None = None,
    order: str | None = None,
    spread: int | None = None,
    revise: Revise | None = None,
    start: int = 0,
) -> ProgressiveOptions:
    """A sampler's own options, overridden by those that are given.

    Args:
        own: `StagedSampler.sampling`.
        drawn: guidance, temperature and filters.
        passes, order, spread, revise: None for the sampler's own.
        revision_passes: None for the sampler's own share of the passes, or for no revision passes if `revise` is 0.
        start: see `ProgressiveOptions`.

    Raises:
        ValueError: for values that are out of range or do not fit each other.
    """
    if revision_passes is None and revise == 0:
        revision_passes = 0
    if passes is not None and revision_passes is None:
        own = own.in_passes(passes)
    staged = {
        "passes": passes,
        "revision_passes": revision_passes,
        "order": order,
        "spread": spread,
        "revise": revise,
        "start": start,
        **{name: getattr(drawn, name) for name in ("guidance", "temperature", *FILTERS)},
    }
    if order not in (None, own.order):
        own = replace(own, order_noise=None)  # It belongs to another order.
    return replace(own, **{name: value for name, value in staged.items() if value is not None})


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
    """`pipelines.sample.sample` that also reports what each pass revealed and rewrote; the stages are on the CPU.

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

    parts = in_batches(draw, sampler, prompts, seeds, options, previous, resample, on_progress, host)
    alike = recorded_alike([part.token_logits for part in parts], previous)
    return Staged.joined([replace(part, token_logits=own) for part, own in zip(parts, alike, strict=True)])
