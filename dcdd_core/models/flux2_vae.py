"""FLUX.2's autoencoder (`AutoencoderKLFlux2`), whose latents are normalised in patches, channel by channel.

Shapes: B batch, C = 32 channels of raw latents on an h' x w' grid, 4 C of normalised latents on an h'/2 x w'/2 grid.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange

from ..files import is_finite


class Flux2Codec:
    """See `protocols.LatentCodec`; images are encoded to the mode of their latent distribution.

    Args:
        model: a diffusers `AutoencoderKLFlux2`; its batch norm's statistics normalise patches of 2 x 2 latents.
    """

    comfy_format = ""
    shift, scale = None, None

    def __init__(self, model: Any):
        self.model = model
        self.factor = 2 ** (len(model.config.block_out_channels) - 1)
        self.channels = model.config.latent_channels
        mean, variance = model.bn.running_mean.float(), model.bn.running_var.float()
        self._mean = rearrange(mean, "f -> 1 f 1 1")
        self._std = rearrange((variance + model.config.batch_norm_eps).sqrt(), "f -> 1 f 1 1")

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `LatentCodec.encode`."""
        return self.model.encode(pixels.to(self.model.device, self.model.dtype)).latent_dist.mode().float()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See `LatentCodec.decode`.

        Raises:
            ValueError: if the pixels are NaN or infinite, as can happen in float16.
        """
        pixels = self.model.decode(latents.to(self.model.device, self.model.dtype)).sample.float()
        if not is_finite(pixels):
            raise ValueError("FLUX.2's autoencoder decodes the latents to NaN or infinity: load it in float32")
        return pixels.clamp(-1, 1)

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        """Raw latents [B, C, h', w'] -> z0 [B, 4 C, h'/2, w'/2]."""
        patches = rearrange(latents, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)
        return (patches - self._mean.to(latents)) / self._std.to(latents)

    def denormalize(self, z: torch.Tensor) -> torch.Tensor:
        """The inverse of `normalize`."""
        patches = z * self._std.to(z) + self._mean.to(z)
        return rearrange(patches, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)

    def preview(self, latents: torch.Tensor) -> torch.Tensor | None:
        """None: there is no cheap preview."""
        return None

    def working_memory(self, height: int, width: int) -> int:
        """Bytes for one image in float32, estimated as for FLUX.1's (`models.vae`)."""
        return round(4 * 2178 * height * width * self.model.config.block_out_channels[0] / 128)
