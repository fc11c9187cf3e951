"""A quick estimate of an image from its latents."""

from __future__ import annotations

import torch
from PIL import Image


class Latent2RGBPreviewer:
    def __init__(self, latent_rgb_factors: list, latent_rgb_factors_bias: list | None = None):
        self._factors = torch.tensor(latent_rgb_factors)
        self._bias = torch.tensor(latent_rgb_factors_bias or [0.0] * 3)

    def decode_latent_to_preview(self, x0: torch.Tensor) -> Image.Image:
        """The first of latents [B, C, h', w'], a pixel each."""
        colours = x0[0].movedim(0, -1).float() @ self._factors + self._bias
        return Image.fromarray(((colours.clamp(-1, 1) + 1) * 127.5).byte().numpy())
