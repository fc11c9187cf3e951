"""One picture: how it is read, and cut to the two sizes that training needs.

Shapes: B batch, R resolution (pixels a side that the decoder paints), T token resolution (pixels a side that the VQ
encoder sees).
"""

from __future__ import annotations

import io
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

# What Pillow reads by itself: others, such as EPS, would start programs of this machine.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


class UnreadablePicture(ValueError):
    """A single picture that cannot be used: it is skipped, with a warning that names it."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The two sizes that a picture is cut to; both show the same square of it.

    Attributes:
        resolution: R, what the decoder learns to paint.
        token_resolution: T, the VLM's own, what the VQ encoder sees.
        token_factor: pixels of T a token side (`VQTokenizer.factor`).
        vae_factor: pixels of R a latent.

    Raises:
        ValueError: unless both divide into whole tokens, and a token into whole latents (see `DecoderCard`).
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
        # Whole latents a token, and an even number of latents in all, which FLUX packs 2 x 2.
        unit = math.lcm(self.grid[0] * self.vae_factor, 2 * self.vae_factor)
        if self.resolution % unit:
            raise ValueError(
                f"a resolution of {self.resolution} does not fit {self.grid[0]} x {self.grid[1]} tokens: each has to "
                f"be painted as whole latents of {self.vae_factor} pixels, and their number a side has to be even; "
                f"use {_multiples(self.resolution, unit)}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) in tokens."""
        return (self.token_resolution // self.token_factor,) * 2

    @property
    def pixels_per_token(self) -> int:
        """Pixels of R a token side, for the decoder's card."""
        return self.resolution // self.grid[0]


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


def read_rgb(content: bytes | Path) -> PIL.Image.Image:
    """An image file's first picture as RGB of 8 bits, upright.

    EXIF orientation is obeyed, transparency becomes white [choice], 16 bits are rounded to 8, colour profiles are
    ignored.

    Raises:
        UnreadablePicture: for whatever is wrong with it.
    """
    try:
        with PIL.Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS) as image:
            return _to_rgb(PIL.ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow raises nearly every kind of error for damaged files.
        raise UnreadablePicture(f"{type(error).__name__}: {error}") from error


def square(image: PIL.Image.Image, side: int) -> torch.Tensor:
    """The middle square of an RGB picture at side x side pixels, uint8 [3, side, side].

    Same as resizing the shorter side and then cropping the centre; bicubic, antialiased.
    """
    width, height = image.size
    edge = min(width, height)
    left, top = (width - edge) // 2, (height - edge) // 2
    resized = image.resize((side, side), PIL.Image.Resampling.BICUBIC, box=(left, top, left + edge, top + edge))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def to_pixels(images: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """uint8 [B, 3, H, W] -> float32 in -1..1 on the device."""
    return images.to(device).float() / 127.5 - 1.0


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which older Pillows open as 32
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"whole numbers of {values.min():g}..{values.max():g} are no 16-bit grey levels")
        return PIL.Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point grey levels have no known white")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _multiples(value: int, unit: int) -> str:
    below, above = value // unit * unit, -(-value // unit) * unit
    return f"{below} or {above}" if below else str(above)
