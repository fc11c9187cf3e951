"""Encodings of pictures, as the decoder learns from them: features for its condition, latents to paint.

Shapes: B batch, N tokens, D code dimension, C latent channels, h' w' latent grid, R resolution.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields

import torch
from diffusers import AutoencoderKL

from ..method.latents import scale_latents
from ..models.vae import KLCodec
from ..models.vq import VQTokenizer
from ..pipelines.images import to_pixels
from .image_batch import Geometry, PictureBatch

Autocast = Callable[[], AbstractContextManager]


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedBatch:
    """What the decoder learns from, before the mapping of its condition (`examples.Example`).

    Attributes:
        features: [B, N, D] float32, of the VQ encoder before quantisation (Eq. 9).
        latents: [B, C, h', w'] float32, scaled (Eq. 17).
        pixels: [B, 3, R, R] float32 in -1..1, for the masked pictures of localised training; None if a cache does not
            keep them.
    """

    features: torch.Tensor
    latents: torch.Tensor
    pixels: torch.Tensor | None = None


def geometry_for(vq: VQTokenizer, vae: AutoencoderKL, *, resolution: int, token_resolution: int) -> Geometry:
    """The sizes for these two networks; raises ValueError if they do not fit together, see `Geometry`."""
    return Geometry(
        resolution=resolution,
        token_resolution=token_resolution,
        token_factor=vq.factor,
        vae_factor=2 ** (len(vae.config.block_out_channels) - 1),
    )


def encode(
    batch: PictureBatch | EncodedBatch, vq: VQTokenizer, vae: AutoencoderKL, *, autocast: Autocast = nullcontext
) -> EncodedBatch:
    """A batch's encodings, on the networks' device; those from a cache are only moved there."""
    if isinstance(batch, EncodedBatch):
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        return EncodedBatch(**{name: None if t is None else t.to(vae.device) for name, t in values.items()})
    pixels = to_pixels(batch.pixels, vae.device)
    with autocast():
        features = vq.features(to_pixels(batch.token_pixels, vq.device))
        latents = scaled_latents(vae, pixels)
    return EncodedBatch(features=features.to(vae.device), latents=latents, pixels=pixels)


def scaled_latents(vae: AutoencoderKL, pixels: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Pixels [B, 3, H, W] in -1..1 -> [B, C, h', w'] float32, scaled; the part under the mask is blank.

    Args:
        mask: [B or 1, 1, H, W], 1 where to paint; None for nowhere.
    """
    latents = KLCodec(vae).encode(pixels if mask is None else pixels * (1 - mask))
    return scale_latents(latents, vae.config.shift_factor, vae.config.scaling_factor)
