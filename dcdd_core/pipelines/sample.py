"""Prompts -> token logits, for new images or for edits of earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from ..models.edits import check_request
from ..protocols import DEFAULT_SAMPLING, OnProgress, SamplingOptions, TokenSampler
from ..types import TokenLogits
from .host import PLAIN, Host
from .oom import in_parts, is_out_of_memory

T = TypeVar("T")
#: Prompts and one seed for each -> their tokens and logits.
Sample = Callable[[Sequence[str], Sequence[int]], TokenLogits]


@runtime_checkable
class ReadsText(Protocol):
    """A `TokenSampler` whose text encoder is kept elsewhere and moves to the device only to read prompts."""

    def text_memory(self, prompts: Sequence[str]) -> int:
        """Bytes that reading these prompts takes on the device besides `model`; 0 if all are read or nothing moves."""
        ...

    def read(self, prompts: Sequence[str], *, moved: bool = True) -> None:
        """Reads prompts, so that `sample` needs no text encoder for them.

        Args:
            moved: False to read them on the device where the text encoder is kept.
        """
        ...


def sample(
    sampler: TokenSampler,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    options: SamplingOptions = DEFAULT_SAMPLING,
    previous: TokenLogits | None = None,
    resample: torch.Tensor | None = None,
    on_progress: OnProgress | None = None,
    parallel: int | None = None,
    host: Host = PLAIN,
) -> TokenLogits:
    """`TokenSampler.sample`; if a batch runs out of memory, in smaller parts.

    The result is the same but for rounding, which in half precision can change a token and so the rest of its image.

    If the device has no room for a text encoder, prompts are read on the CPU.

    Args:
        resample: bool [N] or [B, N].
        on_progress: as the sampler's; with several parts, each starts from the beginning, and `Progress.first` tells
            them apart.
        parallel: as the sampler's.

    Raises:
        ValueError: as the sampler.
        RuntimeError: if a single image does not fit into memory.
    """

    def draw(part: Sequence[str], **given: Any) -> TokenLogits:
        how = {"options": options, "parallel": parallel, "weights_resident": host.weights_resident}
        return host.keep(sampler.sample(part, **how, **given))

    if isinstance(sampler, ReadsText) and (resample is None or bool(resample.any())):
        _read(sampler, prompts, host)
    parts = in_batches(draw, sampler, prompts, seeds, options, previous, resample, on_progress, host)
    return TokenLogits.joined(recorded_alike(parts, previous))


def _read(sampler: ReadsText, prompts: Sequence[str], host: Host) -> None:
    """Reads prompts before logits are allocated, so that the two never need memory at the same time."""
    if not (memory := sampler.text_memory(prompts)):
        return
    host.bring(memory)
    try:
        return sampler.read(prompts)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    host.on_fallback("the text encoder reads the prompt on the CPU")
    sampler.read(prompts, moved=False)


def in_batches(
    draw: Callable[..., T],
    sampler: TokenSampler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    options: SamplingOptions,
    previous: TokenLogits | None,
    resample: torch.Tensor | None,
    on_progress: OnProgress | None,
    host: Host,
) -> list[T]:
    """The results of `draw` for all prompts at once, or for smaller parts of them if that runs out of memory.

    Args:
        draw: called with prompts, and the seeds, previous, resample and on_progress of `TokenSampler.sample`.
        sampler: estimates the memory.

    Raises:
        ValueError: if there are no prompts, or not as many seeds as prompts; as `TokenSampler.working_memory`.
        RuntimeError: if a single image does not fit into memory.
    """
    check_request(prompts, seeds)

    def run(first: int, last: int) -> T:
        whole = (first, last) == (0, len(prompts))
        part = None if resample is None else resample if resample.ndim == 1 else resample[first:last]
        nothing = part is not None and not bool(part.any())
        host.bring(0 if nothing else sampler.working_memory(prompts[first:last], options=options))
        return draw(
            prompts[first:last],
            seeds=seeds[first:last],
            previous=previous if previous is None or whole else previous.part(first, last),
            resample=part,
            on_progress=None if on_progress is None else lambda now: on_progress(replace(now, first=first)),
        )

    return in_parts(run, len(prompts), host)


def recorded_alike(parts: Sequence[TokenLogits], previous: TokenLogits | None) -> Sequence[TokenLogits]:
    """Parts of an edit with the record of those that were sampled.

    A part with nothing to sample comes back with the record of `previous`, and could not be joined with the others.
    """
    if previous is None:
        return parts
    sampled = next((part.record for part in parts if part.record != previous.record), None)
    if sampled is None:
        return parts
    return [replace(part, **sampled, calibrated_at=part.is_calibrated) for part in parts]


def edit_prompts(prompts: Sequence[str], count: int) -> list[str]:
    """One prompt for each of `count` images to edit: each prompt is repeated for equally many images.

    Raises:
        ValueError: if they do not divide evenly.
    """
    if not prompts or count % len(prompts):
        raise ValueError(
            f"{len(prompts)} lines of prompts do not divide the {count} images of token_logits evenly: write one line, "
            "or as many as there are images"
        )
    return [prompt for prompt in prompts for _ in range(count // len(prompts))]


def partial_tokens(tokens: torch.Tensor, known: torch.Tensor, previous: TokenLogits) -> torch.Tensor:
    """Tokens [B, N] to preview while an edit is sampled: the known ones, and those of `previous` elsewhere."""
    return torch.where(known.to(tokens.device), tokens, previous.tokens.to(tokens))
