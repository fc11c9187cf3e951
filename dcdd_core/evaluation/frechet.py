"""Frechet distance between two sets of images, on the features of one fixed network.

A set is represented by the sums of its features and of their outer products in float64. Sets are merged by adding these
sums, so several processes get the same distance as one. A set of few images is kept as its features until its sums are
needed, which take 34 MB with 2048 features, however few the images are.

Shapes: B batch, M images of a set, F features, S sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files import in_file, read_record, write_record
from ..settings import shown

_KIND = "Frechet statistics"
_SUMS, _FEATURES = ("total", "products"), "features"
_WHOLE = "whole"
"""Names the categories of a file that are kept as features; absent if none is."""
_ROWS = 1024
"""Features that are summed at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FrechetStatistics:
    """Sufficient statistics of a set of images for a Frechet distance.

    Attributes:
        count: number of images.
        total: [F] float64, sum of their features.
        products: [F, F] float64, sum of the outer products of their features.
        network: fingerprint of the feature network; empty if it is not checked.

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
        """The statistics of features [B, F], given in any number of parts, which are added in order.

        Raises:
            ValueError: if there are no parts, or parts with different F.
        """
        count, total, products = 0, None, None
        for part in parts:
            features = part.detach().cpu().double()
            if total is None:
                total = features.new_zeros(features.shape[1])
                products = features.new_zeros(features.shape[1], features.shape[1])
            if features.ndim != 2 or features.shape[1] != len(total):
                raise ValueError(f"features must be [B, {len(total)}] like the first ones, got {list(features.shape)}")
            count += len(features)
            total += features.sum(dim=0)
            products += features.T @ features
        if total is None:
            raise ValueError("got no images; a Frechet distance needs at least two")
        return cls(count=count, total=total, products=products, network=network)

    def __add__(self, other: FrechetStatistics) -> FrechetStatistics:
        """The statistics of the union of both sets.

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

    def statistics(self) -> FrechetStatistics:
        """These; see `FeatureSet.statistics`."""
        return self

    @property
    def mean(self) -> torch.Tensor:
        """Mean feature, [F] float64."""
        return self.total / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased covariance, [F, F] float64."""
        return (self.products - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureSet:
    """A set of images by its features, from which its sums are made when they are needed.

    Attributes:
        features: [M, F].
        network: see `FrechetStatistics`.
    """

    features: torch.Tensor
    network: str = ""

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.features)

    def statistics(self) -> FrechetStatistics:
        """The sums, made anew at each call."""
        return FrechetStatistics.of(self.features.split(_ROWS), network=self.network)


#: A set of images, in either of its forms.
FrechetSet = FrechetStatistics | FeatureSet


def smallest_set(features: torch.Tensor, *, network: str = "") -> FrechetSet:
    """A set of images with the features [M, F], in the form that takes less memory."""
    found, size = FeatureSet(features=features, network=network), features.shape[1]
    return found if features.nbytes < torch.float64.itemsize * size * (size + 1) else found.statistics()


def frechet_distance(real: FrechetStatistics, made: FrechetStatistics) -> float:
    """|m_r - m_m|^2 + tr(S_r + S_m - 2 (S_r S_m)^(1/2)) (Heusel et al. 2017), in float64.

    The trace of the matrix square root is computed as the sum of the square roots of the eigenvalues of
    S_r^(1/2) S_m S_r^(1/2). That matrix is symmetric, so the result stays real even if S_r S_m is singular, as it is
    with fewer images than features.

    Raises:
        ValueError: for fewer than two images in a set, and for statistics of different networks.
    """
    _check_same(real, made)
    if real.count < 2 or made.count < 2:
        raise ValueError(f"a Frechet distance needs at least two images in each set, got {real.count} and {made.count}")
    values, vectors = torch.linalg.eigh(real.covariance)
    root = vectors * _roots(values) @ vectors.T
    shared = _roots(torch.linalg.eigvalsh(root @ made.covariance @ root)).sum()
    apart = (real.mean - made.mean).square().sum()
    return float(apart + real.covariance.trace() + made.covariance.trace() - 2 * shared)


def _roots(eigenvalues: torch.Tensor) -> torch.Tensor:
    """Square roots of the eigenvalues [F] of a positive semi-definite matrix; those within rounding error become 0."""
    noise = len(eigenvalues) * torch.finfo(torch.float64).eps * eigenvalues.abs().max()
    return torch.where(eigenvalues > noise, eigenvalues, 0).sqrt()


def _check_same(first: FrechetStatistics, second: FrechetStatistics) -> None:
    if first.network != second.network or first.total.shape != second.total.shape:
        raise ValueError(
            f"the first set was measured by network {first.network or 'unknown'} ({len(first.total)} features), the "
            f"second by {second.network or 'unknown'} ({len(second.total)}): measure both with the same network"
        )


def save_statistics(path: str | Path, sets: Mapping[str, FrechetSet], *, size: int) -> None:
    """Writes the images of one or more categories, measured by one network, for later runs.

    Each set is kept in its form: its sums in total [S, F] and products [S, F, F], or its features behind those of
    others.

    Args:
        sets: category -> its images; the empty name for images without categories.
        size: side in pixels at which the images were measured.
    """
    summed = [part for part in sets.values() if isinstance(part, FrechetStatistics)]
    whole = {name: part.features for name, part in sets.items() if isinstance(part, FeatureSet)}
    none = torch.empty(0, dtype=torch.float64)
    tensors = {name: torch.stack([getattr(part, name) for part in summed]) if summed else none for name in _SUMS}
    meta = {
        "categories": list(sets),
        "counts": [part.count for part in sets.values()],
        "network": next(iter(sets.values())).network,
        "size": size,
    }
    if whole:
        tensors[_FEATURES], meta[_WHOLE] = torch.cat(list(whole.values())), list(whole)
    write_record(path, _KIND, tensors, meta)


def load_statistics(path: str | Path, *, network: str, size: int) -> dict[str, FrechetSet]:
    """Reads a file that `save_statistics` wrote: category -> its images.

    Raises:
        ValueError: for a file of another kind, another network or another image size.
    """
    names, fields = (*_SUMS, _FEATURES), ("categories", "counts", "network", "size", _WHOLE)
    tensors, meta = read_record(path, _KIND, names, fields, later=(_FEATURES, _WHOLE))
    if meta["network"] != network or meta["size"] != size:
        raise ValueError(
            f"{path} was measured by {meta['network']} at {meta['size']} pixels, this run measures with {network} at "
            f"{size}: they cannot be compared; give another --statistics file"
        )
    categories, counts, whole = meta["categories"], meta["counts"], meta.get(_WHOLE, [])
    with in_file(path):
        if not isinstance(whole, list):
            raise ValueError(f"{_WHOLE} must be a list of categories, got {shown(whole)}: make it again")
        total, products = (tensors[name] for name in _SUMS)
        sets = (len(total) if total.ndim else 0) + len(whole)
        for name, values, kind in (("categories", categories, str), ("counts", counts, int)):
            if not isinstance(values, list) or len(values) != sets or not all(type(value) is kind for value in values):
                raise ValueError(f"{name} must be a list of {sets} like its sums, got {shown(values)}: make it again")
        if not sets or len(set(categories)) < sets or min(counts) < 1:
            raise ValueError(f"expected categories with images, got {shown(meta)}: make it again")
        if total.shape[:1] != products.shape[:1]:
            raise ValueError(
                f"expected total and products of the same sets, got {list(total.shape)} and {list(products.shape)}: "
                "make it again"
            )
        if len([name for name in categories if name in whole]) < len(whole):
            raise ValueError(f"{_WHOLE} must be some of its categories, got {shown(whole)}: make it again")
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ValueError("its sums hold NaN or infinity: make it again")
        return _sets(dict(zip(categories, counts)), whole, tensors, network)


def _sets(
    counts: Mapping[str, int], whole: Sequence[str], tensors: Mapping[str, torch.Tensor], network: str
) -> dict[str, FrechetSet]:
    """Category -> its images, in the order of `counts`; those named in `whole` as features.

    Raises:
        ValueError: for another number of features.
    """
    features, rows = tensors.get(_FEATURES, torch.empty(0, 0)), [counts[name] for name in whole]
    if features.ndim != 2 or len(features) != sum(rows):
        raise ValueError(f"{_FEATURES} must be [{sum(rows)}, F], got {list(features.shape)}: make it again")
    parts = dict(zip(whole, features.split(rows)))
    sums = zip(tensors["total"], tensors["products"])
    found: dict[str, FrechetSet] = {}
    for name, count in counts.items():
        if name in parts:
            found[name] = FeatureSet(features=parts[name], network=network)
        else:
            total, products = next(sums)
            found[name] = FrechetStatistics(count=count, total=total, products=products, network=network)
    return found


@torch.no_grad()
def features_of(images: torch.Tensor, network: Callable[[torch.Tensor], torch.Tensor], batch: int = 64) -> torch.Tensor:
    """Features [M, F] of images [M, 3, H, W], computed in batches."""
    return torch.cat([network(part) for part in images.split(batch)])
