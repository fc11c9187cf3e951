"""A VAE socket's value: one convolution each way in the place of a network."""

from __future__ import annotations

import torch
from torch import nn


class VAE:
    def __init__(self, sd: dict, config: dict):
        """Takes of the configuration how many latent channels there are, and how many pixels a latent."""
        shape = config["params"]["ddconfig"]
        self.latent_channels = shape["z_channels"]
        self.downscale_ratio = self.upscale_ratio = 2 ** (len(shape["ch_mult"]) - 1)
        way = {"kernel_size": self.downscale_ratio, "stride": self.downscale_ratio, "bias": False}
        self._encoder = nn.Conv2d(3, self.latent_channels, **way)
        self._decoder = nn.ConvTranspose2d(self.latent_channels, 3, **way)
        self.first_stage_model = nn.ModuleList([self._encoder, self._decoder])

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        """IMAGE -> latents [B, C, h', w']."""
        return self._encoder(pixel_samples.movedim(-1, 1) * 2 - 1)

    def decode(self, samples_in: torch.Tensor) -> torch.Tensor:
        """Latents -> IMAGE."""
        return ((self._decoder(samples_in) + 1) / 2).clamp(0, 1).movedim(1, -1)
