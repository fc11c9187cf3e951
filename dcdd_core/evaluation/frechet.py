"""Frechet distance between two sets of pictures, on the features of one fixed network.

What is kept of a set is the sum of its features and of their products, in float64: sets are merged by adding, so a set
that several processes measured gives the number that one process gives.

Shapes: B batch, F features, C categories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files import read_record, write_record

_KIND = "Frechet statistics"


@dataclass(frozen=True, kw_only=True, eq=False)
class FrechetStatistics:
    """What a Frechet distance needs to know of a set of pictures.

    Attributes:
        count: of the pictures.
        total: [F] float64, the sum of their features.
        products: [F, F] float64, the sum of their features' outer products.
        network: fingerprint of the network that gave the features; empty if it does not matter.

    Raises:
        ValueError: for tensors of another shape or dtype.
    """

    count: int
    total: torch.Tensor
    products: torch.Tensor
    network: str = ""

    def __post_init__(self):
        size = self.total.shape[-1]
        if self.total.shape != (size,) or self.products.shape != (size, size):
            raise ValueError(
                f"expected a sum [F] and products [F, F], got {list(self.total.shape)} and {list(self.products.shape)}"
            )
        if self.total.dtype != torch.float64 or self.products.dtype != torch.float64:
            raise ValueError(f"sums must be float64, got {self.total.dtype} and {self.products.dtype}")

    @classmethod
    def of(cls, parts: Iterable[torch.Tensor], *, network: str = "") -> FrechetStatistics:
        """Of features [B, F] in any number of parts, added in the order they come in.

        Raises:
            ValueError: if there are none, or parts of different F.
        """
        count, total, products = 0, None, None
        for part in parts:
            features = part.detach().cpu().double()
            if total is None:
                total = features.new_zeros(features.shape[1])
                products = features.new_zeros(features.shape[1], features.shape[1])
            if features.ndim != 2 or features.shape[1] != len(total):
                raise ValueError(f"features must be [B, {len(total)}] like those before, got {list(features.shape)}")
            count += len(features)
            total += features.sum(dim=0)
            products += features.T @ features
        if total is None:
            raise ValueError("there are no pictures to take statistics of: a Frechet distance needs at least two")
        return cls(count=count, total=total, products=products, network=network)

    def __add__(self, other: FrechetStatistics) -> FrechetStatistics:
        """Of both sets together.

        Raises:
            ValueError: for statistics of another network.
        """
        _check_same(self, other)
        return FrechetStatistics(
            count=self.count + other.count,
            total=self.total + other.total,
            products=self.products + other.products,
            network=self.network,
        )

    @property
    def mean(self) -> torch.Tensor:
        """[F]"""
        return self.total / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """[F, F], unbiased."""
        return (self.products - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(real: FrechetStatistics, made: FrechetStatistics) -> float:
    """|m_r - m_m|^2 + tr(S_r + S_m - 2 (S_r S_m)^(1/2)) (Heusel et al. 2017), in float64.

    The trace of the root is the sum of the roots of the eigenvalues of S_r^(1/2) S_m S_r^(1/2), which is symmetric:
    with fewer pictures than features, where the product S_r S_m is singular, rounding makes no complex numbers of them.

    Raises:
        ValueError: for fewer than two pictures on a side, and for statistics of different networks.
    """
    _check_same(real, made)
    if real.count < 2 or made.count < 2:
        raise ValueError(
            f"a Frechet distance needs at least two pictures on either side, got {real.count} and {made.count}"
        )
    values, vectors = torch.linalg.eigh(real.covariance)
    root = vectors * _roots(values) @ vectors.T
    shared = _roots(torch.linalg.eigvalsh(root @ made.covariance @ root)).sum()
    apart = (real.mean - made.mean).square().sum()
    return float(apart + real.covariance.trace() + made.covariance.trace() - 2 * shared)


def _roots(eigenvalues: torch.Tensor) -> torch.Tensor:
    """Of [F] eigenvalues that are >= 0 but for rounding; what is rounding alone counts as 0."""
    noise = len(eigenvalues) * torch.finfo(torch.float64).eps * eigenvalues.abs().max()
    return torch.where(eigenvalues > noise, eigenvalues, 0).sqrt()


def _check_same(first: FrechetStatistics, second: FrechetStatistics) -> None:
    if first.network != second.network or first.total.shape != second.total.shape:
        raise ValueError(
            f"one side was measured by network {first.network or 'unknown'} ({len(first.total)} features), the other "
            f"by {second.network or 'unknown'} ({len(second.total)}): measure both with one network"
        )


def save_statistics(path: str | Path, sets: Mapping[str, FrechetStatistics], *, size: int) -> None:
    """Writes the statistics of one or more categories that one network measured, for later runs.

    Args:
        sets: category -> its statistics; the empty name for pictures without categories.
        size: side in pixels of the pictures that were measured.
    """
    parts = list(sets.values())
    tensors = {
        "total": torch.stack([part.total for part in parts]),
        "products": torch.stack([part.products for part in parts]),
    }
    meta = {
        "categories": list(sets),
        "counts": [part.count for part in parts],
        "network": parts[0].network,
        "size": size,
    }
    write_record(path, _KIND, tensors, meta)


def load_statistics(path: str | Path, *, network: str, size: int) -> dict[str, FrechetStatistics]:
    """What `save_statistics` wrote: category -> statistics.

    Raises:
        ValueError: for a file of another kind, another network or another size of pictures.
    """
    tensors, meta = read_record(path, _KIND, ("total", "products"), ("categories", "counts", "network", "size"))
    if meta["network"] != network or meta["size"] != size:
        raise ValueError(
            f"{path} was measured by {meta['network']} on pictures of {meta['size']} pixels, here it is {network} on "
            f"{size}: the numbers cannot be compared; name another --statistics file"
        )
    return {
        name: FrechetStatistics(count=count, total=total, products=products, network=network)
        for name, count, total, products in zip(
            meta["categories"], meta["counts"], tensors["total"], tensors["products"]
        )
    }


@torch.no_grad()
def features_of(
    pictures: torch.Tensor, network: Callable[[torch.Tensor], torch.Tensor], batch: int = 64
) -> torch.Tensor:
    """Features [M, F] of pictures [M, 3, H, W], a batch at a time."""
    return torch.cat([network(part) for part in pictures.split(batch)])
