"""Frechet distance between two sets of pictures, on the features of one fixed network.

Shapes: B batch, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance


class _AsGiven(nn.Module):
    """Stands in the place of torchmetrics' Inception network: the features come ready."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(real: Iterable[torch.Tensor], made: Iterable[torch.Tensor]) -> float:
    """Frechet distance (Heusel et al. 2017) between two streams of features [B, F]; sums and roots in float64.

    Raises:
        ValueError: for fewer than two pictures on a side.
    """
    metric: FrechetInceptionDistance | None = None
    for features, is_real in _labelled(real, made):
        if metric is None:
            metric = FrechetInceptionDistance(feature=_AsGiven(features.shape[1]), normalize=True).set_dtype(
                torch.float64
            )
        metric.update(features.cpu().double(), real=is_real)
    if metric is None or metric.real_features_num_samples < 2 or metric.fake_features_num_samples < 2:
        raise ValueError("a Frechet distance needs at least two pictures on either side")
    return float(metric.compute())


def _labelled(real: Iterable[torch.Tensor], made: Iterable[torch.Tensor]):
    yield from ((features, True) for features in real)
    yield from ((features, False) for features in made)


@torch.no_grad()
def features_of(
    pictures: torch.Tensor, network: Callable[[torch.Tensor], torch.Tensor], batch: int = 64
) -> torch.Tensor:
    """Features [M, F] of pictures [M, 3, H, W], a batch at a time."""
    return torch.cat([network(part) for part in pictures.split(batch)])
