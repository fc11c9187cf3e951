"""Fits the anchor and its temperature so that a VLM's conditions are distributed like the proxies' (our choice).

The anchor alone (`calibration.fit_anchor`) matches the mean length and alignment of the code vectors c to the proxies',
but leaves the uncertainty features u more confident than the proxies', since the anchor sharpens. A temperature tau
therefore softens the VLM's logits first: q = softmax(l / tau + beta cos(e_k, e_t)). Beta and tau are chosen together,
by comparing the distributions over tokens of everything in c and u that does not depend on the image.

Shapes: n tokens of one chunk, K codes, D code dimension.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from ..types import Calibration, Codebook, DCDDWarning
from .calibration import Chunk, probability_chunk, probability_chunks
from .chunks import Grids, float32_maths, logit_chunks
from .lcdm import uncertainty_features

QUANTITIES = ("|c|", "cos(c, e_t)", "p(1)", "p(1) - p(2)", "head mass", "H_tail")
"""What is compared: two numbers of the code vector, then the features of Eq. 8; each on 0..1, in its own units."""
_BINS = 1024
_MOST_ANCHOR, _MOST_TEMPERATURE = 64.0, 4.0
#: Steps of the coarse grid: uniform in ln(1 + 4 beta), with beta from 0 to the largest, and in ln tau, with tau from
#: 1 / 4 to the largest.
_COARSE = (8, 6)
#: A coarse step divided by this is the finest step: 1.1 % of 1 / 4 + beta, and 0.7 % of tau.
_FINE = 64

POINT_PASSES = 10
"""About the number of passes over the logits that `fit_anchor_and_temperature` makes."""

Point = tuple[int, int]


def condition_spread(token_logits: Grids, codebook: Codebook, calibration: Calibration | None = None) -> torch.Tensor:
    """Cumulative histograms of `QUANTITIES` over all tokens, in 1024 even bins on 0..1.

    Each entry is the share of tokens in that bin or a lower one; values outside 0..1 are clamped.

    Returns:
        [6, 1024] float64, on the CPU.

    Raises:
        ValueError: as `probability_chunks`.
    """
    counts = sum(_counts(chunk, codebook) for chunk in probability_chunks(token_logits, codebook, calibration))
    return _cumulative(counts)


def spread_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Wasserstein-1 distance between two spreads [6, 1024], summed over `QUANTITIES`, each in its own units."""
    return float((one - other).abs().mean(dim=1).sum())


def fit_anchor_and_temperature(
    token_logits: Grids,
    codebook: Codebook,
    target: torch.Tensor,
    calibration: Calibration,
    *,
    on_chunk: Callable[[int], None] | None = None,
) -> Calibration:
    """Finds the beta in 0..64 and tau in 1/4..4 whose conditions are distributed most like the proxies'.

    Minimises `spread_distance`: first on a coarse grid over both, then among the best point's neighbours at ever
    smaller steps. About 140 points are measured on all tokens, in about `POINT_PASSES` passes over the logits.

    Args:
        token_logits: the VLM's logits, one grid or several; read more than once.
        target: `condition_spread` of proxy logits under `calibration`.
        on_chunk: called after each chunk with the number of completed passes over the logits; may raise to stop.

    Returns:
        The calibration with this anchor and anchor temperature. If the best point has the largest beta, or the smallest
        or largest tau, it is kept with a warning.

    Raises:
        ValueError: for proxy logits, for an iterator, which can be read only once, and as `probability_chunks`.
    """
    if isinstance(token_logits, Iterator):
        raise ValueError("these logits are read several times, got an iterator: give them as a list")
    found: dict[Point, float] = {}
    passes = 0
    most = tuple(_FINE * steps for steps in _COARSE)

    def measure(points: Collection[Point]) -> Point:
        """Measures those of the points that are new; returns the best of all points so far."""
        nonlocal passes
        new = {
            point: replace(calibration, **_parameters(point))
            for point in points
            if point not in found and all(0 <= place <= last for place, last in zip(point, most))
        }
        if new:
            told = None if on_chunk is None else partial(on_chunk, passes)
            found.update(_distances(token_logits, codebook, target, new, told))
            passes += 1
        return min(found, key=found.__getitem__)

    best = measure([(i, j) for i in range(0, most[0] + 1, _FINE) for j in range(0, most[1] + 1, _FINE)])
    step = _FINE // 2
    while step:
        here, (i, j) = best, best
        best = measure([(i + di, j + dj) for di in (-step, 0, step) for dj in (-step, 0, step)])
        if best == here:
            step //= 2
    chosen = _parameters(best)
    if best[0] == most[0] or best[1] in (0, most[1]):
        warnings.warn(
            "the proxies' conditions are out of reach; anchor and temperature stay at "
            f"{chosen['anchor']:g} and {chosen['anchor_temperature']:g}",
            DCDDWarning,
            stacklevel=2,
        )
    return replace(calibration, **chosen)


def _parameters(point: Point) -> dict[str, float]:
    (i, j), (anchors, temperatures) = point, _COARSE
    share = i / (anchors * _FINE)
    exponent = 2 * j / (temperatures * _FINE) - 1
    return {
        "anchor": math.expm1(share * math.log1p(4 * _MOST_ANCHOR)) / 4,
        "anchor_temperature": _MOST_TEMPERATURE**exponent,
    }


def _distances(
    token_logits: Grids,
    codebook: Codebook,
    target: torch.Tensor,
    trials: dict[Point, Calibration],
    on_chunk: Callable[[], None] | None,
) -> dict[Point, float]:
    """Distance of each trial's conditions from the target, in one pass over the logits."""
    counts = {point: torch.zeros(len(QUANTITIES), _BINS, dtype=torch.float64) for point in trials}
    for _, part, tokens, _ in logit_chunks(token_logits, codebook, next(iter(trials.values())), needs="vlm"):
        for point, trial in trials.items():
            chunk = probability_chunk(part, tokens, trial, source="vlm", codebook=codebook)
            counts[point] += _counts(chunk, codebook)
        if on_chunk is not None:
            on_chunk()
    return {point: spread_distance(_cumulative(found), target) for point, found in counts.items()}


def _counts(chunk: Chunk, codebook: Codebook) -> torch.Tensor:
    """Number of tokens in each bin, [6, 1024] float64 on the CPU."""
    values = _quantities(chunk.probabilities, chunk, codebook).cpu()
    return torch.stack([torch.histc(one.clamp(0, 1), bins=_BINS, min=0, max=1) for one in values]).double()


@float32_maths
def _quantities(probabilities: torch.Tensor, chunk: Chunk, codebook: Codebook) -> torch.Tensor:
    """`QUANTITIES` of a chunk's tokens, [6, n]."""
    vectors = codebook.vectors.to(probabilities.device)
    c = probabilities @ vectors
    cosine = F.cosine_similarity(c, vectors[chunk.tokens.to(c.device)], dim=-1)
    u = uncertainty_features(probabilities, chunk.ln_p)
    return torch.stack([c.norm(dim=-1), cosine, *u.unbind(-1)])


def _cumulative(counts: torch.Tensor) -> torch.Tensor:
    return counts.cumsum(dim=1) / counts[0].sum()
