"""KL autoencoders (`AutoencoderKL`), which map between pixels and the latents that a decoder paints.

They are read as diffusers folders, or as Black Forest Labs' single file `ae.safetensors`, whose tensors are named after
the modules in github.com/black-forest-labs/flux (`modules/autoencoder.py`).
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKL

from ..files import is_finite, json_object, open_tensors, reading
from ..method.latents import scale_latents, unscale_latents
from ..settings import require_number, require_text, shown
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

# Parts of tensor names in diffusers' autoencoder, and in BFL's.
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

#: An autoencoder of at most this many weights decodes previews itself.
_SMALL = 5_000_000
_NEEDS = "the decoder's autoencoder (for FLUX.1, ae.safetensors)"
_REFUSED = "use the autoencoder that the decoder was trained with (for FLUX.1, ae.safetensors)"
_BELONG = "download the whole autoencoder again"
#: Prefixes under which a whole checkpoint keeps its autoencoder; then a name prefix found only in the BFL layout, and
#: one found only in the diffusers layout.
_PREFIXES = ("", "first_stage_model.", "vae.")
_SIGNS = ("decoder.mid.", "decoder.mid_block.")
#: The values of entries that a configuration leaves out.
_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {name: field.default for name, field in inspect.signature(AutoencoderKL.__init__).parameters.items()}
)


class KLCodec:
    """See `protocols.LatentCodec`; images are encoded to the mode of their latent distribution.

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
        """The device it computes on."""
        return self.model.device

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `LatentCodec.encode`."""
        return self.model.encode(pixels.to(self.model.device, self.model.dtype)).latent_dist.mode().float()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See `LatentCodec.decode`.

        Raises:
            ValueError: if the pixels are NaN or infinite, as can happen in float16.
        """
        pixels = self._decode(latents)
        # Checked before clamping, which would turn infinity into white.
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
        """The decoded images [B, 3, H, W] in -1..1 if the network is small; otherwise None."""
        if not self._small:
            return None
        with torch.no_grad():
            return torch.cat([self._decode(one).clamp(-1, 1) for one in latents.split(1)])

    def working_memory(self, height: int, width: int) -> int:
        """Bytes for one image in float32: ComfyUI's estimate for decoding with FLUX's (width 128), scaled by width."""
        return round(4 * 2178 * height * width * self._widest / 128)


class KLFamily:
    """See `protocols.CodecFamily`."""

    name = "kl"
    expected = "a diffusers AutoencoderKL folder, or a single file in safetensors format such as ae.safetensors"

    def reads(self, path: str) -> bool:
        """True for any file, which the loader then checks, and for a folder whose configuration is of this class."""
        found = layouts.component(path, "vae")
        if not found.is_dir():
            return found.exists()
        return (found / "config.json").exists() and read_config(found).get("_class_name") == "AutoencoderKL"

    def load(self, path: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> KLCodec:
        """See `load_vae`."""
        return KLCodec(load_vae(path, device=device, dtype=dtype))

    def published(self) -> KLCodec:
        """FLUX.1's autoencoder, on "meta"."""
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
    """Loads an autoencoder's network from any of the layouts that `read_autoencoder` reads.

    Args:
        path: a diffusers `AutoencoderKL` folder, the pipeline folder around it, or a single file (`ae.safetensors`).
        config: configuration of a single file, which does not state its own; a folder's `config.json` takes precedence.

    Raises:
        ValueError: for a model of another kind, a configuration that is invalid or contradicts the file's tensors or
            header, and tensors that are missing, unexpected, or NaN.
    """
    path = layouts.component(path, "vae")
    config, where = _config_of(path, config)
    require_config(config, where)
    with layouts.opened(path, _NEEDS) as found:
        tensors, is_bfl = layouts.within(found, _PREFIXES, _SIGNS)
        sizes = _sizes({name: tuple(entry.part.get_shape()) for name, entry in tensors.items()}, is_bfl)
    _require_same(path, "the weights have", sizes, config, where)
    if path.is_file():
        _require_same(path, "its header says", _stated(path), config, where)
    with reading(where, "the configuration of an AutoencoderKL", _BELONG), torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(config))
    load_strictly(vae, read_autoencoder(path, vae, dtype=dtype, device=device), str(path))
    return vae.eval().requires_grad_(False)


def _config_of(path: Path, assumed: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """A folder's configuration, or the one assumed for a single file; and what to call it in errors.

    A weights file inside a diffusers folder has its configuration beside it and is treated as the folder.
    """
    if path.is_dir():
        folder = path
    elif path.name.startswith("diffusion_pytorch_model.") and (path.parent / "config.json").exists():
        folder = path.parent
    else:
        return assumed, "FLUX.1, as which a single file is read"
    config = read_config(folder)
    if config.get("_class_name") != "AutoencoderKL":
        raise ValueError(f"{folder} holds a {shown(config.get('_class_name'))}; expected an AutoencoderKL")
    return config, str(folder / "config.json")


def require_config(config: Mapping[str, Any], where: str) -> None:
    """Refuses a configuration that no KL autoencoder has, before one is built; absent entries have diffusers' defaults.

    Args:
        where: prefix of the fields' names in errors.

    Raises:
        ValueError: naming the field.
    """

    def named(name: str) -> str:
        return f"{where}: {name}"

    for name in ("in_channels", "out_channels", "latent_channels"):
        require_number(named(name), config.get(name, 3), whole=True, least=1, most=1024)
    require_number(named("layers_per_block"), config.get("layers_per_block", 1), whole=True, least=1, most=32)
    require_number(named("norm_num_groups"), config.get("norm_num_groups", 32), whole=True, least=1, most=1024)
    channels = config.get("block_out_channels", (64,))
    if not isinstance(channels, (list, tuple)) or not 1 <= len(channels) <= 8:
        raise ValueError(f"{named('block_out_channels')} must be one to eight numbers, got {shown(channels)}")
    for each in channels:
        require_number(named("block_out_channels"), each, whole=True, least=1, most=2**14)
    for name in ("down_block_types", "up_block_types"):
        blocks = config.get(name, ("",))
        if not isinstance(blocks, (list, tuple)) or not all(isinstance(block, str) for block in blocks):
            raise ValueError(f"{named(name)} must be a list of names, got {shown(blocks)}: {_BELONG}")
        if len(blocks) != len(channels):
            raise ValueError(
                f"{named(name)} must be as many as block_out_channels, {len(channels)}, got {len(blocks)}: {_BELONG}"
            )
    for name in ("force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
        if not isinstance(config.get(name, True), bool):
            raise ValueError(f"{named(name)} must be true or false, got {shown(config[name])}: {_BELONG}")
    require_text(named("act_fn"), config.get("act_fn", "silu"), remedy=_BELONG)
    require_number(named("scaling_factor"), config.get("scaling_factor", 1.0), above=0, most=1e6)
    require_number(named("shift_factor"), config.get("shift_factor"), least=-1e6, most=1e6, optional=True)
    for name in ("latents_mean", "latents_std"):
        if config.get(name) is not None:
            raise ValueError(
                f"{named(name)} is given: these latents are normalised for each channel, expected one shift_factor and "
                f"scaling_factor: {_REFUSED}"
            )


def _sizes(shapes: Mapping[str, tuple[int, ...]], is_bfl: bool) -> dict[str, Any]:
    """The entries of an autoencoder's configuration that can be read off its tensors."""
    block, layer = (r"encoder\.down", r"block") if is_bfl else (r"encoder\.down_blocks", r"resnets")
    pattern = re.compile(rf"{block}\.(\d+)\.{layer}\.(\d+)\.conv2\.weight")
    places = {name: found for name in shapes if (found := pattern.fullmatch(name))}
    widths = {int(found[1]): shapes[name][0] for name, found in places.items() if shapes[name]}
    sizes: dict[str, Any] = {}
    if places:
        sizes["block_out_channels"] = [widths[i] for i in sorted(widths)]
        sizes["layers_per_block"] = len({found[2] for found in places.values()})
    for name, tensor, axis in (
        ("in_channels", "encoder.conv_in.weight", 1),
        ("out_channels", "decoder.conv_out.weight", 0),
        ("latent_channels", "decoder.conv_in.weight", 1),
    ):
        if len(shapes.get(tensor, ())) == 4:
            sizes[name] = shapes[tensor][axis]
    return sizes


def _stated(path: Path) -> dict[str, Any]:
    """What the header of a single file says about its latents: by name, or as JSON under "config"."""
    with open_tensors(path, _NEEDS) as file, reading(path, _NEEDS):
        metadata = file.metadata() or {}
    stated = dict(metadata)
    if "config" in metadata:
        inner = json_object(metadata["config"], path, "a header with the configuration as JSON", _BELONG)
        stated |= inner.get("vae") if isinstance(inner.get("vae"), dict) else inner
    found: dict[str, Any] = {}
    for name in ("scaling_factor", "shift_factor", "latent_channels"):
        if stated.get(name) is not None:
            try:
                found[name] = float(stated[name])
            except (TypeError, ValueError, OverflowError):
                found[name] = stated[name]
    return found


def _require_same(path: Path, whose: str, found: Mapping[str, Any], config: Mapping[str, Any], where: str) -> None:
    """Refuses an autoencoder that is not the one the configuration describes, stating the values of both."""
    differ = []
    for name, value in found.items():
        expected = config.get(name, _DEFAULTS[name])
        if name == "shift_factor":
            expected = expected or 0.0  # None means no shift.
        expected = list(expected) if isinstance(expected, tuple) else expected
        same = value == expected or (
            isinstance(value, float)
            and isinstance(expected, (int, float))
            and math.isclose(value, expected, rel_tol=1e-4)
        )
        if not same:
            differ.append(f"{name} {shown(value)}, expected {shown(expected)}")
    if differ:
        raise ValueError(f"{path} is not the autoencoder of {where}: {whose} {'; '.join(differ)}: {_REFUSED}")


def autoencoder_layout(model: AutoencoderKL) -> dict[str, tuple[str, ...]]:
    """The tensor names of BFL's autoencoder file for `model`, each with its diffusers name."""
    last = len(model.config.up_block_types) - 1
    layout = {}
    for name in model.state_dict():
        theirs = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        # BFL numbers resolutions from the finest up, diffusers in the order of use.
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
        found, is_bfl = layouts.within(found, _PREFIXES, _SIGNS)
        layout = autoencoder_layout(model) if is_bfl else layouts.as_named(model)
        return layouts.find(path, found, layout, model, _NEEDS).read(dtype=dtype, device=device)
