"""Training images, cropped and resized to the two sizes that training needs.

Shapes: B batch, R resolution (pixels per side that the decoder paints), T token resolution (pixels per side that the
tokenizer's encoder sees).
"""

from __future__ import annotations

from dataclasses import InitVar, asdict, dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The two sizes of a training image; both show the same square of it.

    Attributes:
        resolution: R, at which the decoder learns to paint.
        token_resolution: T, the VLM's own, at which the tokenizer's encoder sees the image.
        token_factor: pixels of T per token side (`ImageTokenizer.factor`).
        vae_factor: pixels of R per latent side (`LatentCodec.factor`).
        patch: latents per side of one of the backbone's tokens (`Backbone.patch`); checked, not stored.

    Raises:
        ValueError: unless T is a whole number of tokens, and R a whole number of the backbone's tokens.
    """

    resolution: int
    token_resolution: int
    token_factor: int
    vae_factor: int
    patch: InitVar[int] = 1

    def __post_init__(self, patch: int):
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of pixels >= 1, got {value!r}")
        if self.token_resolution % self.token_factor:
            raise ValueError(
                f"a token resolution of {self.token_resolution} has no whole number of {self.token_factor}-pixel "
                f"tokens: use {_multiples(self.token_resolution, self.token_factor)}"
            )
        unit = patch * self.vae_factor
        if self.resolution % unit:
            raise ValueError(
                f"a resolution of {self.resolution} is not a multiple of {unit} pixels, the size of one of the "
                f"diffusion transformer's tokens: use {_multiples(self.resolution, unit)}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) in tokens."""
        return (self.token_resolution // self.token_factor,) * 2

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h', w') in latents."""
        return (self.resolution // self.vae_factor,) * 2

    @property
    def pixels_per_token(self) -> float:
        """Pixels of R per token side, for the decoder's card; an int if it is a whole number."""
        side = self.grid[0]
        return self.resolution / side if self.resolution % side else self.resolution // side


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingImage:
    """One image with its name: pixels [3, R, R] and token_pixels [3, T, T], both uint8; the caption, if it is read.

    `uncaptioned` is True if captions are read and this image has none.
    """

    key: str
    pixels: torch.Tensor
    token_pixels: torch.Tensor
    caption: str | None = None
    uncaptioned: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageBatch:
    """A batch of images: pixels [B, 3, R, R] and token_pixels [B, 3, T, T], both uint8; `keys` name them.

    `captions` is None unless they are read; a single caption is None if that image has none and none is required.
    """

    keys: tuple[str, ...]
    pixels: torch.Tensor
    token_pixels: torch.Tensor
    captions: tuple[str | None, ...] | None = None


def _multiples(value: int, unit: int) -> str:
    below, above = value // unit * unit, -(-value // unit) * unit
    return f"{below} or {above}" if below else str(above)
