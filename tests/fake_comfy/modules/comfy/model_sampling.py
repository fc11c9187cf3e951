"""How noise is added, and what a model's output means."""

from __future__ import annotations

import math

import torch


class CONST:
    """The flow's path: z_t = (1 - t) z0 + t n, and the output is n - z0."""

    def calculate_denoised(self, sigma: float, model_output: torch.Tensor, model_input: torch.Tensor) -> torch.Tensor:
        return model_input - model_output * sigma

    def noise_scaling(self, sigma: float, noise: torch.Tensor, latent_image: torch.Tensor) -> torch.Tensor:
        return sigma * noise + (1 - sigma) * latent_image


class ModelSamplingFlux:
    def __init__(self, model_config):
        self.shift = model_config.sampling_settings.get("shift", 1.15)
        self.sigmas = self.sigma(torch.arange(1, 10001) / 10000)

    def sigma(self, timestep):
        return math.exp(self.shift) / (math.exp(self.shift) + (1 / timestep - 1))

    def percent_to_sigma(self, percent: float) -> float:
        if percent <= 0:
            return 1.0
        return 0.0 if percent >= 1 else self.sigma(1 - percent)
