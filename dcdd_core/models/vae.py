"""The KL autoencoder of FLUX: between pixels and the latents that the decoder paints."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from .checkpoints import load_strictly, read_config, read_tensors


def load_vae(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> AutoencoderKL:
    """An `AutoencoderKL` folder in the diffusers layout.

    Raises:
        ValueError: for a folder of another kind, or tensors that do not fit its configuration.
    """
    config = read_config(folder)
    if config.get("_class_name") != "AutoencoderKL":
        raise ValueError(f"{folder} holds a {config.get('_class_name')!r}; expected an AutoencoderKL")
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
    load_strictly(vae, read_tensors(folder, dtype=dtype, device=device), str(folder))
    return vae.eval().requires_grad_(False)
