"""A VAE socket's value."""

from __future__ import annotations

import torch

from .ldm.models.autoencoder import AutoencoderKL


class VAE:
    def __init__(self, sd: dict, config: dict, dtype: torch.dtype = torch.float32):
        params = config["params"]
        self.latent_channels, self.latent_dim = params["ddconfig"]["z_channels"], 2
        self.downscale_ratio = self.upscale_ratio = 2 ** (len(params["ddconfig"]["ch_mult"]) - 1)
        self.first_stage_model = AutoencoderKL(**params).to(dtype)
        self.first_stage_model.load_state_dict(sd, strict=False)
        self.vae_dtype, self.device = dtype, torch.device("cpu")

    def throw_exception_if_invalid(self) -> None:
        if self.first_stage_model is None:
            raise RuntimeError("ERROR: VAE is invalid: None")

    def process_input(self, image: torch.Tensor) -> torch.Tensor:
        return image * 2 - 1

    def process_output(self, image: torch.Tensor) -> torch.Tensor:
        return image.add_(1).div_(2).clamp_(0, 1)

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        """IMAGE -> latents [B, C, h', w']."""
        return self.first_stage_model.encode(self.process_input(pixel_samples.movedim(-1, 1)))

    def decode(self, samples_in: torch.Tensor) -> torch.Tensor:
        """Latents -> IMAGE."""
        return self.process_output(self.first_stage_model.decode(samples_in).clone()).movedim(1, -1).contiguous()
