"""Reads [..., K] tensors and grids of token logits in chunks of bounded size, in float32.

Shapes: n tokens of one chunk, K codes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import NamedTuple

import numpy as np
import torch

from ..types import Calibration, Codebook, DCDDWarning, Source, TokenLogits, same_codebook

CHUNK_BYTES = 4 * 2**20
"""Size of one float32 work array [n, K]; the functions that use chunks hold at most four of them at once. On a CPU they
stay in its caches, which makes them faster than larger ones (docs/performance.md)."""

Grids = TokenLogits | Iterable[TokenLogits]


def chunk_rows(codes: int) -> int:
    """Tokens per chunk: the largest n with 4 n K <= CHUNK_BYTES, but at least 1."""
    return max(1, CHUNK_BYTES // (4 * codes))


def chunks(values: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views [n, K] of `values` [..., K] in row-major order, n <= chunk_rows(K); nothing is copied."""
    if values.ndim == 1:
        values = values[None]
    # Flattening would copy a non-contiguous tensor, so its leading dimensions are iterated instead.
    blocks = (
        [values.flatten(0, -2)] if values.is_contiguous() else map(values.__getitem__, np.ndindex(values.shape[:-2]))
    )
    for block in blocks:
        yield from block.split(chunk_rows(values.shape[-1]))


def float32_maths(function: Callable) -> Callable:
    """Decorator: runs a function of a tensor without gradients and autocast, whatever the caller has enabled."""

    @wraps(function)
    def exact(tensor: torch.Tensor, *args, **kwargs):
        with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *args, **kwargs)

    return exact


def neg_p_ln_p(probabilities: torch.Tensor) -> torch.Tensor:
    """-p ln p of float32 p >= 0, and 0 where p is 0: `torch.special.entr` in two thirds of the time."""
    # The smallest float32 has ln p = -103.3: the clamp turns 0 ln 0 into 0 and changes no other p.
    return probabilities.log().clamp_min_(-104).mul_(probabilities).neg_()


def underflows(probabilities: torch.Tensor) -> torch.Tensor:
    """True where a float32 probability >= 0 is subnormal, so that it has lost precision, or is 0."""
    return probabilities < torch.finfo(torch.float32).tiny


class LogitChunk(NamedTuple):
    """n tokens of a grid: logits [n, K], tokens [n], and bool [n] where a calibration has been applied already, which
    is None for nowhere."""

    grid: TokenLogits
    logits: torch.Tensor
    tokens: torch.Tensor
    calibrated: torch.Tensor | None


def logit_chunks(
    token_logits: Grids,
    codebook: Codebook | None = None,
    calibration: Calibration | None = None,
    needs: Source | None = None,
) -> Iterator[LogitChunk]:
    """The logits of one grid or many, chunk by chunk in row-major order.

    Raises:
        ValueError: if logits, codebook and calibration do not share one codebook, a grid is not from the source in
            `needs`, a grid is calibrated already though `calibration` or `needs` is given, a grid is calibrated in part
            though `needs` is given, or there is no grid at all.

    Warns, once for each difference, if a VLM's logits were not sampled the way the calibration was measured.
    """
    warned, grid = set(), None
    for grid in [token_logits] if isinstance(token_logits, TokenLogits) else token_logits:
        if needs not in (None, grid.source):
            remedy = "what the VLM sampled" if needs == "vlm" else "what the tokenizer encoded"
            raise ValueError(f"this is measured on {needs} logits, got {grid.source} logits: give {remedy}")
        if grid.calibrated and (calibration is not None or needs is not None):
            raise ValueError("these logits are calibrated already: give them as they were sampled or encoded")
        if grid.calibrated_at is not None and needs is not None:
            kept = int(grid.calibrated_at.sum())
            raise ValueError(
                f"the logits of {kept} of {grid.tokens.numel()} positions were kept from an image, calibrated already: "
                "give some that were sampled whole"
            )
        check_codebooks(grid, codebook, calibration)
        doubt = _sampling_mismatch(grid, calibration)
        if doubt and doubt not in warned:
            warned.add(doubt)
            warnings.warn(doubt, DCDDWarning, stacklevel=3)
        parts = list(chunks(grid.logits))
        lengths, at = [len(part) for part in parts], grid.calibrated_at
        calibrated = [None] * len(parts) if at is None else at.reshape(-1).split(lengths)
        yield from map(LogitChunk, [grid] * len(parts), parts, grid.tokens.reshape(-1).split(lengths), calibrated)
    if grid is None:
        raise ValueError("got no token logits at all; expected one TokenLogits or an iterable of some")


def check_codebooks(grid: TokenLogits, codebook: Codebook | None, calibration: Calibration | None) -> None:
    """Checks that logits, codebook and calibration belong to one tokenizer; None fits any.

    Raises:
        ValueError: if two of them do not; the message names both codebooks or their sizes.
    """
    if codebook is not None and grid.logits.shape[-1] != codebook.size:
        raise ValueError(
            f"logits over {grid.logits.shape[-1]} codes do not fit a codebook of {codebook.size}: "
            "load the codebook of the tokenizer that the logits belong to"
        )
    owners = {"logits": grid.codebook, "codebook": codebook and codebook.fingerprint}
    owners["calibration"] = calibration and calibration.codebook
    (first, mark), *others = [(name, mark) for name, mark in owners.items() if mark] or [("", None)]
    for name, other in others:
        if not same_codebook(mark, other):
            raise ValueError(
                f"{first} and {name} do not belong together: the one is of codebook {mark}, the other of {other}; "
                "take logits, codebook and calibration of one tokenizer"
            )


def _sampling_mismatch(grid: TokenLogits, calibration: Calibration | None) -> str | None:
    if calibration is None or grid.source != "vlm":
        return None
    pairs = {
        "VLM": (grid.model or None, calibration.vlm or None),
        "guidance": (grid.guidance, calibration.guidance),
        "temperature": (grid.temperature, calibration.temperature),
    }
    differ = [
        f"{name} {came!r} (calibrated for {own!r})"
        for name, (came, own) in pairs.items()
        if came is not None and own is not None and came != own
    ]
    # A VLM is mostly named after its folder, so two names may mean the same VLM.
    unless = ", unless both names are of one VLM" if any(text.startswith("VLM ") for text in differ) else ""
    return f"the logits were sampled with {', '.join(differ)}: calibrate again for these{unless}" if differ else None
