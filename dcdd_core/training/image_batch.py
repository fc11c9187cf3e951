"""Pictures cut to the two sizes that training needs.

Shapes: B batch, R resolution (pixels a side that the decoder paints), T token resolution (pixels a side that the VQ
encoder sees).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The two sizes that a picture is cut to; both show the same square of it.

    Attributes:
        resolution: R, what the decoder learns to paint.
        token_resolution: T, the VLM's own, what the VQ encoder sees.
        token_factor: pixels of T a token side (`VQTokenizer.factor`).
        vae_factor: pixels of R a latent.

    Raises:
        ValueError: unless T divides into whole tokens, and R into whole packed latents.
    """

    resolution: int
    token_resolution: int
    token_factor: int
    vae_factor: int

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of pixels >= 1, got {value!r}")
        if self.token_resolution % self.token_factor:
            raise ValueError(
                f"a token resolution of {self.token_resolution} has no whole number of {self.token_factor}-pixel "
                f"tokens: use {_multiples(self.token_resolution, self.token_factor)}"
            )
        unit = 2 * self.vae_factor  # FLUX packs latents 2 x 2.
        if self.resolution % unit:
            raise ValueError(
                f"a resolution of {self.resolution} has no even number of latents of {self.vae_factor} pixels a side: "
                f"use {_multiples(self.resolution, unit)}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) in tokens."""
        return (self.token_resolution // self.token_factor,) * 2

    @property
    def pixels_per_token(self) -> float:
        """Pixels of R a token side, for the decoder's card; a whole number as an int."""
        side = self.grid[0]
        return self.resolution / side if self.resolution % side else self.resolution // side


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """pixels [3, R, R] and token_pixels [3, T, T], both uint8."""

    key: str
    pixels: torch.Tensor
    token_pixels: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class PictureBatch:
    """pixels [B, 3, R, R] and token_pixels [B, 3, T, T], both uint8, of the pictures called keys."""

    keys: tuple[str, ...]
    pixels: torch.Tensor
    token_pixels: torch.Tensor


def _multiples(value: int, unit: int) -> str:
    below, above = value // unit * unit, -(-value // unit) * unit
    return f"{below} or {above}" if below else str(above)
