"""The KL autoencoder of FLUX: between pixels and the latents that the decoder paints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL

from .backbones.flux_fill.files import FLUX_VAE_CONFIG, component, read_autoencoder
from .checkpoints import load_strictly, read_config


class Autoencoder(Protocol):
    """Anything that turns pixels into the latents that a decoder paints, and back, on whatever device it has."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, H, W] in -1..1 -> raw latents [B, C, h', w'] float32 (before shift and scale)."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Raw latents [B, C, h', w'] -> pixels [B, 3, H, W] float32 in -1..1."""


class KLAutoencoder:
    """An `Autoencoder` of diffusers' network; pictures become the mode of their latents."""

    def __init__(self, model: AutoencoderKL):
        self.model = model

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `Autoencoder.encode`."""
        return self.model.encode(pixels.to(self.model.device, self.model.dtype)).latent_dist.mode().float()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See `Autoencoder.decode`."""
        return self.model.decode(latents.to(self.model.device, self.model.dtype)).sample.float().clamp(-1, 1)


def load_vae(
    path: str | Path,
    *,
    config: Mapping[str, Any] = FLUX_VAE_CONFIG,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> AutoencoderKL:
    """An autoencoder from what artists have: see `flux_files.read_autoencoder`.

    Args:
        path: a diffusers `AutoencoderKL` folder, the pipeline folder around it, or a single file (`ae.safetensors`).
        config: of a single file, which does not say its own; a folder's `config.json` counts instead.

    Raises:
        ValueError: for a model of another kind, and tensors that do not fit the configuration.
    """
    path = component(path, "vae")
    if path.is_dir():
        config = read_config(path)
        if config.get("_class_name") != "AutoencoderKL":
            raise ValueError(f"{path} holds a {config.get('_class_name')!r}; expected an AutoencoderKL")
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(config))
    load_strictly(vae, read_autoencoder(path, vae, dtype=dtype, device=device), str(path))
    return vae.eval().requires_grad_(False)
