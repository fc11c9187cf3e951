"""95 % intervals of scores: bootstrap over images, and the block jackknife for statistics that resampling would bias.

A bootstrap resample draws images with replacement, so some occur more than once. That raises a Frechet distance, since
repeated images lower the rank of the covariance; the jackknife only leaves images out.

Shapes: M images, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

#: Standard errors on either side of a normal 95 % interval.
_NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Interval:
    """A score with its 95 % interval."""

    value: float
    low: float
    high: float

    def above(self, bound: float) -> str:
        """Whether the score is at least a bound: "met" or "MISSED" if the whole interval agrees, else "open"."""
        if self.low >= bound:
            return "met"
        return "MISSED" if self.high < bound else "open"

    def below(self, bound: float) -> str:
        """Whether the score is at most a bound, as `above`."""
        return Interval(-self.value, -self.high, -self.low).above(-bound)


def bootstrap(
    statistic: Callable[[np.ndarray], float], images: int, *, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Percentile bootstrap (Efron 1979) over images.

    Args:
        statistic: indices [M] of images -> score. Paired data are to be indexed alike.
        images: M.

    Raises:
        ValueError: for fewer than two images.
    """
    _check(images)
    drawn = np.random.default_rng(seed).integers(images, size=(resamples, images))
    found = np.array([statistic(indices) for indices in drawn])
    low, high = np.percentile(found, (2.5, 97.5))
    return Interval(float(statistic(np.arange(images))), float(low), float(high))


def block_jackknife(statistic: Callable[[np.ndarray], float], images: int, *, blocks: int = 20) -> Interval:
    """The score of all images, with 1.96 jackknife standard errors on either side.

    SE^2 = (g - 1) / g sum_b (s_b - mean s)^2, where s_b is the score without block b of g (Kunsch 1989, for blocks that
    do not overlap). Blocks are consecutive images, of sizes that differ by one at most.

    Args:
        statistic: indices of images -> score; it must not depend on how often an image occurs.
        images: M.
        blocks: g, or M if that is less.

    Raises:
        ValueError: for fewer than two images or blocks.
    """
    _check(images)
    if blocks < 2:
        raise ValueError(f"a jackknife needs at least two blocks, got {blocks}")
    parts = np.array_split(np.arange(images), min(blocks, images))
    without = np.array([statistic(np.delete(np.arange(images), part)) for part in parts])
    error = np.sqrt((len(parts) - 1) / len(parts) * np.square(without - without.mean()).sum())
    value = float(statistic(np.arange(images)))
    return Interval(value, float(value - _NORMAL_95 * error), float(value + _NORMAL_95 * error))


def _check(images: int) -> None:
    if images < 2:
        raise ValueError(f"an interval needs at least two images, got {images}")
