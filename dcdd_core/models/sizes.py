"""The sizes that all transformers over a grid of image tokens have."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..settings import require_number


def square_grid(tokens: int, what: str, remedy: str) -> tuple[int, int]:
    """The grid of a square image of N = `tokens` tokens.

    Args:
        what: what has so many tokens; begins the error message.

    Raises:
        ValueError: if N is not a square.
    """
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise ValueError(f"{what} has {tokens:,} tokens an image, expected a square of them: {remedy}")
    return side, side


@dataclass(frozen=True, kw_only=True)
class GridTransformerConfig:
    """The sizes of a network.

    Attributes:
        remedy: what to do about wrong sizes; ends the error messages.
        grid: (h, w) of its images, each 1..1024.
        codes: K, at least 2.
        width, layers, heads, hidden: C, number of blocks, number of heads, inner width of a feed-forward.

    Raises:
        ValueError: for values out of range.
    """

    remedy: ClassVar[str]

    grid: tuple[int, int]
    codes: int
    width: int
    layers: int
    heads: int
    hidden: int

    def __post_init__(self):
        if not isinstance(self.grid, tuple) or len(self.grid) != 2:
            raise ValueError(f"grid must be two whole numbers (h, w), got {self.grid!r}: {self.remedy}")
        for name, side in zip(("rows of the grid", "columns of the grid"), self.grid):
            require_number(name, side, whole=True, least=1, most=1024, remedy=self.remedy)
        require_number("codes", self.codes, whole=True, least=2, remedy=self.remedy)
        self._require_counts("width", "layers", "heads", "hidden")

    @property
    def tokens(self) -> int:
        """N, the number of tokens of an image."""
        return self.grid[0] * self.grid[1]

    def _require_counts(self, *names: str) -> None:
        for name in names:
            require_number(name, getattr(self, name), whole=True, least=1, remedy=self.remedy)
