"""Encoded images for training the decoder: features for its condition, and latents to paint.

Shapes: B batch, N tokens, D code dimension, C latent channels, h' w' latent grid, H W pixels, R resolution.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from ..pipelines.images import to_pixels
from ..protocols import ImageTokenizer, LatentCodec
from .image_batch import Geometry, ImageBatch

Autocast = Callable[[], AbstractContextManager]


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedBatch:
    """The encodings that a decoder or masked sampler learns from, before the condition is made (`examples.Example`).

    Attributes:
        features: [B, N, D] float32, of the tokenizer's encoder before quantisation (Eq. 9).
        latents: [B, C, h', w'] float32, normalised (Eq. 17); None from a cache that was written without a codec.
        pixels: [B, 3, R, R] float32 in -1..1, for the masked images of localised training; None from a cache without
            them.
        captions: of the images; None if they were not read, and a single one is None if that image has none.
        vlm_vectors, vlm_uncertainty: [B, N, D] and [B, N, 4] float32, the conditions from the VLM's own distributions
            (`vlm_conditions`); zeros for an image without them, and None for a batch without them.
        vlm_known: bool [B], which images have these conditions.
    """

    features: torch.Tensor
    latents: torch.Tensor | None
    pixels: torch.Tensor | None = None
    captions: tuple[str | None, ...] | None = None
    vlm_vectors: torch.Tensor | None = None
    vlm_uncertainty: torch.Tensor | None = None
    vlm_known: torch.Tensor | None = None


#: Names of the tensors of a VLM's conditions, in batches and in caches.
VLM_TENSORS = ("vlm_vectors", "vlm_uncertainty", "vlm_known")
TENSORS = ("features", "latents", "pixels", *VLM_TENSORS)


def geometry_for(
    tokenizer: ImageTokenizer, codec: LatentCodec, *, patch: int, resolution: int, token_resolution: int
) -> Geometry:
    """The sizes of training images for these networks; `patch` is the backbone's.

    Raises:
        ValueError: if the sizes do not fit the networks; see `Geometry`.
    """
    return Geometry(
        resolution=resolution,
        token_resolution=token_resolution,
        token_factor=tokenizer.factor,
        vae_factor=codec.factor,
        patch=patch,
    )


def encode(
    batch: ImageBatch | EncodedBatch,
    tokenizer: ImageTokenizer,
    codec: LatentCodec | None,
    *,
    autocast: Autocast = nullcontext,
) -> EncodedBatch:
    """The encodings of a batch, on the codec's device; those from a cache are only moved there.

    Args:
        codec: None for no latents; the encodings are then on the tokenizer's device.
    """
    device = tokenizer.device if codec is None else device_of(codec)
    if isinstance(batch, EncodedBatch):
        tensors = {name: value for name in TENSORS if (value := getattr(batch, name)) is not None}
        return replace(batch, **{name: tensor.to(device) for name, tensor in tensors.items()})
    pixels = to_pixels(batch.pixels, device)
    with autocast():
        features = tokenizer.features(to_pixels(batch.token_pixels, tokenizer.device))
        latents = None if codec is None else normalized_latents(codec, pixels)
    return EncodedBatch(features=features.to(device), latents=latents, pixels=pixels, captions=batch.captions)


def normalized_latents(codec: LatentCodec, pixels: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Pixels [B, 3, H, W] in -1..1 -> [B, C, h', w'] float32, normalised; the image is blank where the mask is 1.

    Args:
        mask: [B or 1, 1, H, W], 1 where the decoder will paint; None for no mask.
    """
    return codec.normalize(codec.encode(pixels if mask is None else pixels * (1 - mask)))


def device_of(codec: LatentCodec) -> torch.device:
    """The device of a codec's weights; the CPU if it has none."""
    weight = next(codec.model.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device
