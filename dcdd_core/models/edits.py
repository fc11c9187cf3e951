"""The checks that every token sampler makes on a request before it samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..protocols import TokenSampler
from ..types import TokenLogits, same_codebook


def check_request(prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """Checks that there are prompts, and one seed for each.

    Raises:
        ValueError: saying what is expected.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is one text, expected a list of them: write [prompt]")
    if len(prompts) == 0:
        raise ValueError("prompts is empty: give at least one")
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts came with {len(seeds)} seeds: give one seed for each prompt")


def check_edit(
    sampler: TokenSampler, previous: TokenLogits | None, resample: torch.Tensor | None, batch: int
) -> torch.Tensor:
    """Where an edit resamples: bool [B, N] on the CPU.

    Raises:
        ValueError: if only one of `previous` and `resample` is given, if the kept tokens cannot share a grid with this
            sampler's, and for a wrong number of prompts, shape or dtype.
    """
    if previous is None or resample is None:
        absent = "previous" if previous is None else "resample"
        raise ValueError(f"an edit needs both `previous` and `resample`, {absent} is missing: give both or none")
    if previous.grid != sampler.grid:
        raise ValueError(
            f"the kept tokens are a grid of {_by(previous.grid)}, {sampler.name or 'this model'} makes "
            f"{_by(sampler.grid)}: edit with the model that sampled them"
        )
    if previous.logits.shape[2] != sampler.codebook.size or not same_codebook(
        previous.codebook, sampler.codebook.fingerprint
    ):
        raise ValueError(
            f"the kept tokens are of another codebook ({previous.logits.shape[2]} codes, made by "
            f"{previous.model or 'an unnamed model'}) than this model's ({sampler.codebook.size} codes): "
            "edit with the model that sampled them"
        )
    if previous.source == "proxy" and not previous.calibrated:
        raise ValueError(
            "the kept logits are cosine similarities, which cannot share a grid with a language model's: "
            "calibrate them first, so that they look like this model's"
        )
    if previous.source == "vlm" and previous.calibrated:
        raise ValueError("the kept logits are calibrated already: give them as they were sampled")
    if previous.logits.shape[0] != batch:
        raise ValueError(f"{batch} prompts cannot edit {previous.logits.shape[0]} samples: give one prompt a sample")
    shape = tuple(previous.tokens.shape)
    if (
        not isinstance(resample, torch.Tensor)
        or resample.dtype != torch.bool
        or tuple(resample.shape) not in (shape, shape[1:])
    ):
        got = f"{resample.dtype} {list(resample.shape)}" if isinstance(resample, torch.Tensor) else repr(resample)
        raise ValueError(
            f"resample must be a bool tensor {list(shape[1:])} or {list(shape)}, got {got}: "
            "one value for each token of the grid, row by row"
        )
    return resample.cpu().expand(shape)


def kept_calibrated(previous: TokenLogits | None, drawn: torch.Tensor) -> torch.Tensor | None:
    """Where an edit keeps logits that are calibrated already, for `TokenLogits.calibrated_at`.

    Args:
        drawn: bool [B, N], True where logits were drawn anew.
    """
    return None if previous is None else previous.is_calibrated.to(drawn.device) & ~drawn


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"
