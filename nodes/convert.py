"""ComfyUI's IMAGE, MASK and numbers to the library's tensors, and back.

Shapes: B batch, H W pixels, C channels. IMAGE is [B, H, W, C] in 0..1, MASK [B, H, W] in 0..1.
"""

from __future__ import annotations

import math

import comfy.model_management
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

from ..dcdd_core.method.uncertainty import crop_to_aspect


def pixels_of(image: torch.Tensor) -> torch.Tensor:
    """IMAGE -> pixels [B, 3, H, W] float32 in -1..1; an alpha channel is dropped, a single channel is repeated.

    Raises:
        ValueError: for anything that is not an IMAGE, and for NaN or infinity.
    """
    if not isinstance(image, torch.Tensor) or image.ndim != 4 or image.shape[3] not in (1, 3, 4) or image.numel() == 0:
        raise ValueError(f"expected an image, got {_described(image)}: connect an IMAGE of 1, 3 or 4 channels")
    if not bool(torch.isfinite(image).all()):
        raise ValueError("the image contains NaN or infinity: an earlier node failed, check its output")
    return unchecked_pixels_of(image)


def unchecked_pixels_of(image: torch.Tensor) -> torch.Tensor:
    """`pixels_of` for an image that is checked later, where the cause of NaN is known."""
    colours = image[..., :3].expand(-1, -1, -1, 3)
    return rearrange(colours.float().clamp(0, 1), "b h w c -> b c h w") * 2 - 1


def image_of(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [B, 3, H, W] in -1..1 -> IMAGE, on ComfyUI's intermediate device."""
    image = rearrange((pixels.float().clamp(-1, 1) + 1) / 2, "b c h w -> b h w c")
    return image.contiguous().to(comfy.model_management.intermediate_device())


def check_finite(**values: float) -> None:
    """Refuses NaN and infinity, which ComfyUI's own limits let through.

    Raises:
        ValueError: naming the input.
    """
    for name, value in values.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")


def from_pil(image: Image.Image) -> torch.Tensor:
    """A PIL image -> IMAGE, a batch of one."""
    raw = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return rearrange(raw.float() / 255, "(h w c) -> 1 h w c", h=image.height, c=3)


def mask_of(mask: torch.Tensor) -> torch.Tensor:
    """MASK, [H, W], [B, H, W] or [B, 1, H, W] -> [B, 1, H, W] float32 in 0..1.

    Raises:
        ValueError: for anything that is not a MASK, and for NaN or infinity.
    """
    if (
        not isinstance(mask, torch.Tensor)
        or mask.numel() == 0
        or not (mask.ndim in (2, 3) or (mask.ndim == 4 and mask.shape[1] == 1))
    ):
        raise ValueError(f"expected a mask, got {_described(mask)}: connect a MASK")
    if not bool(torch.isfinite(mask).all()):
        raise ValueError("the mask contains NaN or infinity: an earlier node failed, check its output")
    return mask.float().clamp(0, 1).reshape(-1, 1, *mask.shape[-2:])


def in_words(height: int, width: int) -> str:
    """A size in pixels as ComfyUI's nodes give it: "width x height"."""
    return f"{width} x {height}"


def _described(value: object) -> str:
    """Describes a value that was given in place of an image or a mask."""
    if not isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {str(value)[:60]!r}"
    if value.numel() == 0:
        return "an empty batch"
    if value.ndim == 4:
        return f"{in_words(*value.shape[1:3])} pixels of {value.shape[3]} channels"
    return f"a tensor of {value.ndim} dimensions"


def resized(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[B, C, H, W] -> [B, C, height, width], cropped at the centre to that aspect ratio; bicubic, may exceed the range.

    Unlike ComfyUI's own bicubic, it is antialiased, as on the command line: without that, fine detail of an image that
    is shrunk turns into false patterns, and so into other tokens.
    """
    if pixels.shape[2:] == (height, width):
        return pixels
    middle = crop_to_aspect(pixels, height, width)
    return F.interpolate(middle, (height, width), mode="bicubic", antialias=True)
