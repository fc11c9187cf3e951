"""Image files: how one is read and cropped to a square. Training and evaluation see the same pixels.

Shapes: B batch, H W pixels.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

SUFFIXES = (".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# What Pillow decodes itself; others, such as EPS, would start programs.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


class UnreadableImage(ValueError):
    """An image that cannot be used: it is skipped, with a warning that names it."""


def read_rgb(content: bytes | Path) -> PIL.Image.Image:
    """The first frame of an image file as upright 8-bit RGB.

    EXIF orientation is applied, transparency becomes white [choice], 16 bits are rounded to 8, colour profiles are
    ignored.

    Raises:
        UnreadableImage: if it cannot be read.
    """
    try:
        with PIL.Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS) as image:
            return _to_rgb(PIL.ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow raises nearly every kind of error for damaged files.
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def square(image: PIL.Image.Image, side: int) -> torch.Tensor:
    """The central square of an RGB image at side x side pixels, uint8 [3, side, side].

    The same as resizing the shorter side and then cropping the centre; bicubic, antialiased.
    """
    width, height = image.size
    edge = min(width, height)
    left, top = (width - edge) // 2, (height - edge) // 2
    resized = image.resize((side, side), PIL.Image.Resampling.BICUBIC, box=(left, top, left + edge, top + edge))
    return to_tensor(resized)


def to_tensor(image: PIL.Image.Image) -> torch.Tensor:
    """An RGB image as it is, uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_pixels(images: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """uint8 [B, 3, H, W] -> float32 in -1..1 on the device."""
    return images.to(device).float() / 127.5 - 1.0


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which older Pillows open as 32
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"whole numbers of {values.min():g}..{values.max():g} are not 16-bit grey levels")
        return PIL.Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point grey levels have no known white")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
