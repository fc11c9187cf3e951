"""A quick estimate of an image from its latents."""

from __future__ import annotations

import torch
from comfy.cli_args import LatentPreviewMethod, args
from PIL import Image

#: --preview-size.
MAX_PREVIEW_RESOLUTION = 512


class Latent2RGBPreviewer:
    def __init__(self, latent_rgb_factors: list, latent_rgb_factors_bias: list | None = None):
        self._factors = torch.tensor(latent_rgb_factors)
        self._bias = torch.tensor(latent_rgb_factors_bias or [0.0] * 3)

    def decode_latent_to_preview(self, x0: torch.Tensor) -> Image.Image:
        """The first of latents [B, C, h', w'], a pixel each."""
        colours = x0[0].movedim(0, -1).float() @ self._factors + self._bias
        return Image.fromarray(((colours.clamp(-1, 1) + 1) * 127.5).byte().numpy())


class TAESDPreviewer:
    """In the place of a network: larger than the latents, so that the two can be told apart."""

    def decode_latent_to_preview(self, x0: torch.Tensor) -> Image.Image:
        height, width = x0.shape[2:]
        return Image.new("RGB", (8 * width, 8 * height))


def get_previewer(device: torch.device, latent_format):
    """What --preview-method shows latents of this format with, or None."""
    if args.preview_method == LatentPreviewMethod.NoPreviews:
        return None
    if args.preview_method == LatentPreviewMethod.TAESD:
        return TAESDPreviewer()
    return Latent2RGBPreviewer(latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias)
