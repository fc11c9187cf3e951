"""What a masked sampler is trained on: images with hidden positions and wrong tokens, and what it is asked for.

Revision is learned: some of the visible tokens are replaced by wrong ones, and the originals are asked for (BIGFix,
Besnier et al. 2025, arXiv 2510.12231). Dynamic importance, of which the progressive paper (arXiv 2210.02291) publishes
no formula, is here what revealing a position takes off the loss of the positions that stay hidden [our choice].

All randomness comes from the CPU generator that is given.

Shapes: B batch, N positions, K codes, D code dim, M neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

_CHUNK = 4096
"""Codes that are compared with all others at a time: a quarter of a GiB for 16,384."""
CORRUPTIONS = ("shuffled", "nearest", "samples")
"""Where wrong tokens come from: the image's other positions, codes next to the right one, and draws of the model."""


HIDDEN_SHARES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "arccos": lambda u: torch.arccos(u) * 2 / math.pi,
    "cosine": lambda u: torch.cos(u * math.pi / 2),
    "linear": lambda u: 1 - u,
}
"""Share of hidden positions of uniform numbers u in [0, 1): what the schedule of this name hides when u of the passes
are done (`progressive.SCHEDULES`, with its sources).

Its mean is .64 by "arccos" and "cosine", and .5 by "linear"; "cosine" has the most images that are nearly all hidden.
"""


def hidden_shares(u: torch.Tensor, schedule: str = "arccos") -> torch.Tensor:
    """Share of hidden positions in training, of uniform numbers u in [0, 1), by one of `HIDDEN_SHARES`.

    Raises:
        ValueError: for an unknown schedule.
    """
    if schedule not in HIDDEN_SHARES:
        raise ValueError(f"the schedule of hidden shares must be one of {', '.join(HIDDEN_SHARES)}, got {schedule!r}")
    return HIDDEN_SHARES[schedule](u)


def pick(shares: torch.Tensor, among: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Of the positions `among` (bool [B, N]), the share of each row (`shares` [B]), to the nearest: bool [B, N]."""
    noise = torch.rand(among.shape, generator=draw).masked_fill(~among, 2.0)
    places = noise.argsort(dim=1).argsort(dim=1)
    counts = (shares * among.sum(1) + 0.5).floor()
    return among & (places < counts[:, None])


def shuffled(tokens: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Tokens [B, N], each image's in an order of its own."""
    return tokens.gather(1, torch.rand(tokens.shape, generator=draw).argsort(dim=1))


def neighbours(vectors: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` codes nearest to each by cosine, itself left out: unit rows [K, D] -> int64 [K, M].

    Raises:
        ValueError: for more neighbours than there are other codes.
    """
    if not 1 <= count < len(vectors):
        raise ValueError(f"count must lie in 1..{len(vectors) - 1} for {len(vectors)} codes, got {count}")
    found = []
    for first in range(0, len(vectors), _CHUNK):
        alike = vectors[first : first + _CHUNK] @ vectors.T
        alike[:, first:].fill_diagonal_(-torch.inf)
        found.append(alike.topk(count, dim=1).indices)
    return torch.cat(found)


def nearest(tokens: torch.Tensor, neighbours: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """For each token [B, N] one of its neighbours [K, M]."""
    which = torch.randint(neighbours.shape[1], tokens.shape, generator=draw)
    return neighbours[tokens].gather(-1, which[..., None])[..., 0]


def position_weights(hidden: torch.Tensor, wrong: torch.Tensor, clean: float = 0.1) -> torch.Tensor:
    """Weight of each position's cross-entropy [B, N]: 1 where it is hidden or wrong, `clean` where the right token is
    visible."""
    return torch.where(hidden | wrong, 1.0, clean)


def token_losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of logits [B, N, K] at tokens [B, N]: [B, N]. No label smoothing: calibration reads these
    logits."""
    return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)


def weighted_mean(losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum w l / sum w over everything; 0 where all weights are 0."""
    return (losses * weights).sum() / weights.sum().clamp(min=1e-6)


def measured_importance(
    before: torch.Tensor, after: torch.Tensor, hidden: torch.Tensor, revealed: torch.Tensor
) -> torch.Tensor:
    """What a revealed position takes off the loss of those that stay hidden, in nats, the mean of an image's: [B].

    Args:
        before, after: losses [B, N] without and with the tokens of `revealed`.
        hidden: bool [B, N], hidden before.
        revealed: bool [B, N], some of them.
    """
    rest = hidden & ~revealed
    return ((before - after) * rest).sum(1) / revealed.sum(1).clamp(min=1)


def importance_loss(
    predicted: torch.Tensor, measured: torch.Tensor, hidden: torch.Tensor, revealed: torch.Tensor
) -> torch.Tensor:
    """Smooth L1 between the mean of the predictions [B, N] over `revealed` and `measured_importance` [B], over the
    images in which something was revealed and something stayed hidden."""
    mean = (predicted * revealed).sum(1) / revealed.sum(1).clamp(min=1)
    counts = revealed.any(1) & (hidden & ~revealed).any(1)
    losses = F.smooth_l1_loss(mean, measured, reduction="none")
    return (losses * counts).sum() / counts.sum().clamp(min=1)
