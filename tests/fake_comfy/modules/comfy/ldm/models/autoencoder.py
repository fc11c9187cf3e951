"""The network behind a VAE: one convolution each way."""

from __future__ import annotations

import torch
from torch import nn


class AutoencoderKL(nn.Module):
    def __init__(self, ddconfig: dict, embed_dim: int):
        """Takes of the configuration how many latent channels there are, and how many pixels a latent."""
        super().__init__()
        factor = 2 ** (len(ddconfig["ch_mult"]) - 1)
        way = {"kernel_size": factor, "stride": factor, "bias": False}
        self.encoder = nn.Conv2d(3, ddconfig["z_channels"], **way)
        self.decoder = nn.ConvTranspose2d(ddconfig["z_channels"], 3, **way)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] in -1..1 -> latents [B, C, h', w']."""
        return self.encoder(x)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents -> [B, 3, H, W] in -1..1."""
        return self.decoder(z)
