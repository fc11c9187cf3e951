"""A diffusion model with its way of adding noise."""

from __future__ import annotations

from enum import Enum
from math import prod

import torch
from torch import nn

from . import model_sampling


class ModelType(Enum):
    FLUX = 8


class BaseModel(nn.Module):
    def __init__(self, model_config, model_type: ModelType):
        super().__init__()
        assert model_type is ModelType.FLUX and model_config.unet_config["disable_unet_model_creation"]
        kind = type("ModelSampling", (model_sampling.ModelSamplingFlux, model_sampling.CONST), {})
        self.latent_format, self.model_sampling = model_config.latent_format, kind(model_config)
        self.diffusion_model: nn.Module

    def apply_model(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """The denoised latents."""
        times = torch.full((len(x),), sigma)
        output = self.diffusion_model(x.to(self.diffusion_model.dtype), times, context=None, control=None)
        return self.model_sampling.calculate_denoised(sigma, output.float(), x)

    def process_latent_in(self, latent: torch.Tensor) -> torch.Tensor:
        return self.latent_format.process_in(latent)

    def process_latent_out(self, latent: torch.Tensor) -> torch.Tensor:
        return self.latent_format.process_out(latent)

    def memory_required(self, input_shape: list[int]) -> float:
        return 0.3 * input_shape[0] * prod(input_shape[2:]) * 2**20
