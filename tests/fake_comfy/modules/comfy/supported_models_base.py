"""What is said of a kind of model."""

from __future__ import annotations

from . import latent_formats


class BASE:
    latent_format = latent_formats.LatentFormat
    sampling_settings = {}  # noqa: RUF012 (as in ComfyUI, which copies it)

    def __init__(self, unet_config: dict):
        self.unet_config = unet_config.copy()
        self.sampling_settings = self.sampling_settings.copy()
        self.latent_format = self.latent_format()
