"""Training inputs and losses of a masked sampler: images with hidden positions and wrong tokens, and their targets.

Revision is learned: some visible tokens are replaced by wrong ones, and the model has to predict the originals (BIGFix,
Besnier et al. 2025, arXiv 2510.12231). The progressive paper (arXiv 2210.02291) publishes no formula for dynamic
importance; here it is how much revealing a position lowers the loss of the positions that stay hidden [our choice].

All randomness comes from the given CPU generator.

Shapes: B batch, N positions, K codes, D code dim, M neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

_CHUNK = 4096
"""How many codes are compared with all others at a time: this takes a quarter of a GiB for 16,384 codes."""
CORRUPTIONS = ("shuffled", "nearest", "samples")
"""Where wrong tokens come from: the image's other positions, codes near the right one, or the model's own samples."""


HIDDEN_SHARES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "arccos": lambda u: torch.arccos(u) * 2 / math.pi,
    "cosine": lambda u: torch.cos(u * math.pi / 2),
    "linear": lambda u: 1 - u,
}
"""Share of hidden positions from uniform numbers u in [0, 1): what the schedule of this name still hides when a share u
of the passes is done (`progressive.SCHEDULES`, with its sources).

Its mean is .64 for "arccos" and "cosine", and .5 for "linear"; "cosine" has the most images that are nearly all hidden.
"""


def hidden_shares(u: torch.Tensor, schedule: str = "arccos") -> torch.Tensor:
    """Shares of hidden positions in training, in the shape of uniform numbers u in [0, 1), by one of `HIDDEN_SHARES`.

    Raises:
        ValueError: for an unknown schedule.
    """
    if schedule not in HIDDEN_SHARES:
        raise ValueError(f"the schedule of hidden shares must be one of {', '.join(HIDDEN_SHARES)}, got {schedule!r}")
    return HIDDEN_SHARES[schedule](u)


def pick(shares: torch.Tensor, among: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """A random share (`shares` [B], rounded) of the positions `among` (bool [B, N]) in each row: bool [B, N]."""
    noise = torch.rand(among.shape, generator=draw).masked_fill(~among, 2.0)
    places = noise.argsort(dim=1).argsort(dim=1)
    counts = (shares * among.sum(1) + 0.5).floor()
    return among & (places < counts[:, None])


def shuffled(tokens: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Tokens [B, N], each image's in a random order of its own."""
    return tokens.gather(1, torch.rand(tokens.shape, generator=draw).argsort(dim=1))


def neighbours(vectors: torch.Tensor, count: int) -> torch.Tensor:
    """The M = `count` codes nearest to each code by cosine, except itself: unit rows [K, D] -> int64 [K, M].

    Raises:
        ValueError: for a count outside 1..K - 1.
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
    """A random neighbour of each token [B, N], from the neighbours [K, M] of all codes: int64 [B, N]."""
    which = torch.randint(neighbours.shape[1], tokens.shape, generator=draw)
    return neighbours[tokens].gather(-1, which[..., None])[..., 0]


def position_weights(hidden: torch.Tensor, wrong: torch.Tensor, clean: float = 0.1) -> torch.Tensor:
    """Cross-entropy weight of each position [B, N]: 1 if hidden or wrong, `clean` if the right token is visible."""
    return torch.where(hidden | wrong, 1.0, clean)


def token_losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of logits [B, N, K] with tokens [B, N]: [B, N] float32.

    There is no label smoothing, since calibration reads these logits.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)


def weighted_mean(losses: torch.Tensor, weights: torch.Tensor, total: float | None = None) -> torch.Tensor:
    """sum w l / sum w over everything; 0 where all weights are 0.

    Args:
        total: divides in place of sum w, for a part of what the mean is over.
    """
    return (losses * weights).sum() / (weights.sum().clamp(min=1e-6) if total is None else total)


def measured_importance(
    before: torch.Tensor, after: torch.Tensor, hidden: torch.Tensor, revealed: torch.Tensor
) -> torch.Tensor:
    """How much a revealed position lowers the total loss of those that stay hidden, in nats: mean per image, [B].

    Args:
        before, after: losses [B, N] without and with the tokens of `revealed`.
        hidden: bool [B, N], positions that were hidden before.
        revealed: bool [B, N], those of them that were revealed.
    """
    rest = hidden & ~revealed
    return ((before - after) * rest).sum(1) / revealed.sum(1).clamp(min=1)


def is_measured(hidden: torch.Tensor, revealed: torch.Tensor) -> torch.Tensor:
    """bool [B], the images in which something was revealed and something stayed hidden (of bool [B, N])."""
    return revealed.any(1) & (hidden & ~revealed).any(1)


def importance_loss(
    predicted: torch.Tensor,
    measured: torch.Tensor,
    hidden: torch.Tensor,
    revealed: torch.Tensor,
    total: float | None = None,
) -> torch.Tensor:
    """Smooth L1 between the mean prediction over `revealed` (of [B, N]) and `measured_importance` [B], a scalar.

    Averaged over the images that `is_measured` names.

    Args:
        total: as for `weighted_mean`.
    """
    mean = (predicted * revealed).sum(1) / revealed.sum(1).clamp(min=1)
    losses = F.smooth_l1_loss(mean, measured, reduction="none")
    return weighted_mean(losses, is_measured(hidden, revealed).float(), total)
