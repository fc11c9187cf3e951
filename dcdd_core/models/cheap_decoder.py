"""Small latent decoders that stand in for an autoencoder's own, such as TAESD and TAEF1 (`AutoencoderTiny`).

Distribution guidance decodes with one at a fraction of the cost; the final image still comes from the autoencoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..files import is_finite, reading
from ..protocols import LatentCodec
from ..settings import shown
from .checkpoints import load_strictly, read_config, read_tensors

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny  # takes seconds, which the help texts of commands should not

_KIND = "a small latent decoder (a diffusers AutoencoderTiny folder, such as TAESD for SDXL or TAEF1 for FLUX.1)"


class CheapDecoder:
    """Normalised latents [B, C, h', w'] -> pixels [B, 3, H, W] float32 in -1..1; differentiable, with frozen weights.

    Args:
        model: decodes the latents z0 that the diffusion model paints, in its own scale.

    Attributes:
        channels: C.
    """

    def __init__(self, model: AutoencoderTiny):
        self.model = model.eval().requires_grad_(False)
        self.channels = model.config.latent_channels

    def __call__(self, clean: torch.Tensor) -> torch.Tensor:
        """The pixels [B, 3, H, W] of latents [B, C, h', w'].

        Raises:
            ValueError: for latents with another number of channels, and pixels that are not finite.
        """
        self._require(clean.shape[1])
        config = self.model.config
        scaled = clean / config.scaling_factor + config.shift_factor
        pixels = self.model.decode(scaled.to(self.model.device, self.model.dtype)).sample.float()
        if not is_finite(pixels):
            raise ValueError("the small latent decoder makes NaN or infinity of the latents: load it in float32")
        return pixels.clamp(-1, 1)

    def require_for(self, codec: LatentCodec) -> None:
        """Refuses a codec whose normalised latents it cannot read.

        Raises:
            ValueError: stating both numbers of channels.
        """
        self._require(codec.normalize(torch.zeros(1, codec.channels, 2, 2)).shape[1])

    def _require(self, channels: int) -> None:
        if channels != self.channels:
            raise ValueError(
                f"the small latent decoder reads {self.channels} channels, but the latents have {channels}: use the "
                "one of this autoencoder (TAEF1 for FLUX.1, TAESDXL for SDXL, TAESD for Stable Diffusion 1.x)"
            )


def load_cheap_decoder(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> CheapDecoder:
    """Loads the decoder in a diffusers `AutoencoderTiny` folder.

    Raises:
        ValueError: for a folder of another kind, and weights that are missing, unexpected, of a wrong shape or NaN.
    """
    from diffusers import AutoencoderTiny

    config = read_config(folder)
    if config.get("_class_name") != "AutoencoderTiny":
        raise ValueError(f"{folder} holds a {shown(config.get('_class_name'))}; expected {_KIND}")
    # diffusers writes this entry, but warns about it when reading it.
    config = {name: value for name, value in config.items() if name != "block_out_channels"}
    with reading(folder, _KIND), torch.device("meta"):
        model = AutoencoderTiny.from_config(config)
    load_strictly(model, read_tensors(folder, dtype=dtype, device=device), str(folder))
    return CheapDecoder(model)
