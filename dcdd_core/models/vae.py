"""KL autoencoders (`AutoencoderKL`): between pixels and the latents that a decoder paints.

They are read as diffusers folders, or as Black Forest Labs' single file `ae.safetensors`, whose names are those of the
modules in github.com/black-forest-labs/flux (`modules/autoencoder.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKL

from ..files import is_finite
from ..method.latents import scale_latents, unscale_latents
from . import layouts
from .checkpoints import load_strictly, read_config

#: The autoencoder of every FLUX.1 model, `ae.safetensors`.
FLUX_VAE_CONFIG: Mapping[str, Any] = MappingProxyType(
    {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "force_upcast": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
)

# diffusers' spellings within the autoencoder, and BFL's.
_AUTOENCODER_WORDS = (
    ("mid_block.attentions.0.", "mid.attn_1."),
    (".group_norm.", ".norm."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".proj_out."),
    (".conv_shortcut.", ".nin_shortcut."),
    (".conv_norm_out.", ".norm_out."),
    (".resnets.", ".block."),
    (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."),
    (".down_blocks.", ".down."),
)

#: Up to this many weights, an autoencoder draws previews itself.
_SMALL = 5_000_000
_NEEDS = "the decoder's autoencoder (for FLUX.1, ae.safetensors)"


class KLCodec:
    """See `protocols.LatentCodec`; images become the mode of their latents.

    Args:
        model: the network; its configuration says how its latents are normalised.
    """

    def __init__(self, model: AutoencoderKL):
        self.model = model
        channels = model.config.block_out_channels
        self.factor = 2 ** (len(channels) - 1)
        self.channels = model.config.latent_channels
        self.shift = model.config.shift_factor or 0.0
        self.scale = model.config.scaling_factor
        self.comfy_format = "Flux" if (self.factor, self.channels) == (8, 16) else ""
        self._widest = channels[0]
        self._small = sum(weight.numel() for weight in model.parameters()) <= _SMALL

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.device

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `LatentCodec.encode`."""
        return self.model.encode(pixels.to(self.model.device, self.model.dtype)).latent_dist.mode().float()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See `LatentCodec.decode`.

        Raises:
            ValueError: if the pixels are NaN or infinite, such as in float16.
        """
        pixels = self._decode(latents)
        # Before they are clamped: infinity would become white.
        if not is_finite(pixels):
            raise ValueError(
                f"the autoencoder decodes the latents to NaN or infinity; it computes in "
                f"{str(self.model.dtype).removeprefix('torch.')}: load it in float32, or use another one"
            )
        return pixels.clamp(-1, 1)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.model.decode(latents.to(self.model.device, self.model.dtype)).sample.float()

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        """z0 = (z - shift) scale (Eq. 17)."""
        return scale_latents(latents, self.shift, self.scale)

    def denormalize(self, z: torch.Tensor) -> torch.Tensor:
        """z / scale + shift."""
        return unscale_latents(z, self.shift, self.scale)

    def preview(self, latents: torch.Tensor) -> torch.Tensor | None:
        """The images themselves, of a small network; None of a large one."""
        if not self._small:
            return None
        with torch.no_grad():
            return torch.cat([self._decode(one).clamp(-1, 1) for one in latents.split(1)])

    def working_memory(self, height: int, width: int) -> int:
        """Bytes for one image in float32, from what ComfyUI assumes of decoding with FLUX's, of 128 channels."""
        return round(4 * 2178 * height * width * self._widest / 128)


class KLFamily:
    """See `protocols.CodecFamily`."""

    name = "kl"
    expected = "a diffusers AutoencoderKL folder, or a single file in safetensors format such as ae.safetensors"

    def reads(self, path: str) -> bool:
        """Any file, and a folder whose configuration is of this class."""
        found = layouts.component(path, "vae")
        return found.is_file() or (
            (found / "config.json").is_file() and read_config(found).get("_class_name") == "AutoencoderKL"
        )

    def load(self, path: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> KLCodec:
        """See `load_vae`."""
        return KLCodec(load_vae(path, device=device, dtype=dtype))

    def published(self) -> KLCodec:
        """FLUX.1's."""
        with torch.device("meta"):
            return KLCodec(AutoencoderKL.from_config(dict(FLUX_VAE_CONFIG)).eval())


FAMILY = KLFamily()


def load_vae(
    path: str | Path,
    *,
    config: Mapping[str, Any] = FLUX_VAE_CONFIG,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> AutoencoderKL:
    """An autoencoder's network from what artists have: see `read_autoencoder`.

    Args:
        path: a diffusers `AutoencoderKL` folder, the pipeline folder around it, or a single file (`ae.safetensors`).
        config: of a single file, which does not say its own; a folder's `config.json` counts instead.

    Raises:
        ValueError: for a model of another kind, and tensors that do not fit the configuration.
    """
    path = layouts.component(path, "vae")
    if path.is_dir():
        config = read_config(path)
        if config.get("_class_name") != "AutoencoderKL":
            raise ValueError(f"{path} holds a {config.get('_class_name')!r}; expected an AutoencoderKL")
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(config))
    load_strictly(vae, read_autoencoder(path, vae, dtype=dtype, device=device), str(path))
    return vae.eval().requires_grad_(False)


def autoencoder_layout(model: AutoencoderKL) -> dict[str, tuple[str, ...]]:
    """The tensor names of BFL's autoencoder file for `model`, each with its diffusers name."""
    last = len(model.config.up_block_types) - 1
    layout = {}
    for name in model.state_dict():
        theirs = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        # BFL counts resolutions from the finest up, diffusers in the order of use.
        theirs = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", theirs)
        for ours, word in _AUTOENCODER_WORDS:
            theirs = theirs.replace(ours, word)
        layout[theirs] = (name,)
    return layout


def read_autoencoder(
    path: str | Path,
    model: AutoencoderKL,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """The tensors of an autoencoder in diffusers' names; peak memory and `dtype` as in `StoredTensors.read`.

    Args:
        path: a diffusers `AutoencoderKL` folder, sharded or not; or a single file in the diffusers or the BFL layout
            (`ae.safetensors`, or a whole checkpoint, of which only `first_stage_model.*` or `vae.*` is read).
        model: says which names and shapes are expected; may be on "meta".

    Raises:
        ValueError: for files that are missing, damaged, quantised or of another model.
    """
    path = layouts.component(path, "vae")
    with layouts.opened(path, _NEEDS) as found:
        found, is_bfl = layouts.within(
            found, ("", "first_stage_model.", "vae."), ("decoder.mid.", "decoder.mid_block.")
        )
        layout = autoencoder_layout(model) if is_bfl else layouts.as_named(model)
        return layouts.find(path, found, layout, model, _NEEDS).read(dtype=dtype, device=device)
