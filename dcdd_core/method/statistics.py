"""The statistics by which the paper compares token distributions (Table 1, Figure 6).

Shapes: N tokens, n tokens of one chunk, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from skimage.filters import threshold_otsu

from ..types import Calibration, Codebook
from .calibration import probability_chunks
from .chunks import Grids, chunks
from .lcdm import LogRows, check_probabilities, features_and_entropy

CURVE = 30
"""Number of points of Figure 6's curve."""


@dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """Table 1's rows for one kind of logits, and Figure 6's curve. Means are over all tokens.

    Attributes:
        top_1, top_2: mean p(1) and p(2).
        entropy: mean of -sum p ln p / ln K, 0..1.
        tail_entropy: mean of H_tail (Eq. 8), 0..1.
        otsu_threshold: Otsu's threshold (256 bins) on the mean of the sorted probabilities.
        rank: how many of these K means exceed it; 0 if all are equal.
        head_mass: the sum of those.
        curve: the mean of the sorted probabilities, first 30 (or K).
        tokens: how many tokens were read.
    """

    top_1: float
    top_2: float
    entropy: float
    tail_entropy: float
    otsu_threshold: float
    rank: int
    head_mass: float
    curve: tuple[float, ...]
    tokens: int


def describe(probabilities: torch.Tensor) -> TokenStatistics:
    """Statistics of distributions [..., K], K >= 2, read chunk by chunk.

    Raises:
        ValueError: if there are no rows, K < 2, or a row is not a distribution.
    """
    if probabilities.ndim < 1 or probabilities.shape[-1] < 2 or probabilities.numel() == 0:
        raise ValueError(f"expected distributions [..., K >= 2], at least one; got {list(probabilities.shape)}")
    return _describe((check_probabilities(part), None) for part in chunks(probabilities))


def describe_logits(
    token_logits: Grids, codebook: Codebook | None = None, calibration: Calibration | None = None
) -> TokenStatistics:
    """Statistics of one grid of token logits or an iterable of them, with p from `calibration.to_probabilities`.

    Raises:
        ValueError: if logits, codebook and calibration do not share one codebook, logits would be calibrated twice, or
            there is no grid.
    """
    read = probability_chunks(token_logits, codebook, calibration)
    return _describe((chunk.probabilities, chunk.ln_p) for chunk in read)


def _describe(parts: Iterable[tuple[torch.Tensor, LogRows | None]]) -> TokenStatistics:
    tokens, total = 0, 0.0
    for p, ln_p in parts:
        tokens, total = tokens + len(p), total + _sums(p, ln_p)
    means = (total / tokens).numpy()
    curve, (entropy, tail_entropy) = means[:-2], means[-2:].tolist()
    threshold = float(threshold_otsu(curve))
    head = curve[curve > threshold]
    return TokenStatistics(
        top_1=float(curve[0]),
        top_2=float(curve[1]),
        entropy=entropy,
        tail_entropy=tail_entropy,
        otsu_threshold=threshold,
        rank=len(head),
        head_mass=float(head.sum()),
        curve=tuple(curve[:CURVE].tolist()),
        tokens=tokens,
    )


def _sums(probabilities: torch.Tensor, ln_p: LogRows | None) -> torch.Tensor:
    """Sums over n tokens of the sorted p, of H and of H_tail: [K + 2] float64, on the CPU since MPS has no float64."""
    u, entropy = features_and_entropy(probabilities, ln_p)
    # NumPy sorts a CPU's rows in a quarter of torch's time.
    on_cpu = probabilities.device.type == "cpu"
    rising = torch.from_numpy(np.sort(probabilities.numpy())) if on_cpu else probabilities.sort(-1).values.cpu()
    curve = rising.sum(0, dtype=torch.float64).flip(0)
    entropy, tail_entropy = (values.cpu().double().sum() for values in (entropy, u[:, 3]))
    return torch.cat([curve, torch.stack([entropy / math.log(probabilities.shape[-1]), tail_entropy])])
