"""FLUX.1's transformer and autoencoder as they lie on disks: diffusers folders and Black Forest Labs' single files.

Nothing is fetched: the configurations are here or in a decoder's card. Every tensor is found under its diffusers name,
as rows of a file's tensor, so that a stacked projection is cut on the way and never held twice.

BFL's names are those of the modules in github.com/black-forest-labs/flux (`model.py`, `modules/layers.py`,
`modules/autoencoder.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors import SafetensorError, safe_open
from torch import nn

from ...checkpoints import Place, StoredTensors, misfits, read_config

#: FLUX.1-Fill-dev's transformer; a decoder card takes it as dict(FLUX_FILL_CONFIG).
FLUX_FILL_CONFIG: Mapping[str, Any] = MappingProxyType(
    {
        "patch_size": 1,
        "in_channels": 384,
        "out_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    }
)

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

# BFL's modules, each with the diffusers modules whose rows it stacks, in this order.
_ENDS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
_DOUBLE_BLOCK = {
    "img_mod.lin": ("norm1.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE_BLOCK = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
    "linear2": ("proj_out",),
}
# BFL's last modulation says shift, then scale; diffusers' says scale, then shift.
_HALVES_SWAPPED = "final_layer.adaLN_modulation.1."

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

# Channels a token that the published models with another input have; FLUX.1-Fill has 384.
_OTHER_INPUTS = {
    64: "FLUX.1-dev, or a model with the same input (Kontext, Krea, schnell)",
    128: "FLUX.1-Canny-dev, FLUX.1-Depth-dev or FLUX.2",
}
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_SIGN_OF_QUANTISATION = re.compile(r"scaled_fp8|scale_weight|weight_scale|absmax|quant|qweight")
_OTHER_FORMATS = (
    (b"GGUF", "a GGUF file"),
    (b"PK\x03\x04", "a PyTorch checkpoint (.pt, .ckpt, .bin)"),
    (b"\x80", "a pickled PyTorch checkpoint (.pt, .ckpt, .bin)"),
    (b"version https://git-lfs", "a git-lfs pointer instead of the file it stands for"),
    (b"<", "a web page instead of the file"),
)


def transformer_layout(model: FluxTransformer2DModel) -> dict[str, tuple[str, ...]]:
    """The tensor names of a BFL file for `model`, each with the diffusers names whose rows it stacks, in order."""
    expected = model.state_dict()
    rooms = [
        ("", "", _ENDS),
        *((f"double_blocks.{i}.", f"transformer_blocks.{i}.", _DOUBLE_BLOCK) for i in range(model.config.num_layers)),
        *(
            (f"single_blocks.{i}.", f"single_transformer_blocks.{i}.", _SINGLE_BLOCK)
            for i in range(model.config.num_single_layers)
        ),
    ]
    layout = {}
    for theirs, ours, table in rooms:
        for module, parts in table.items():
            for leaf in ("weight", "bias"):
                names = tuple(f"{ours}{part}.{leaf}" for part in parts)
                # Norms have no bias, and models without distilled guidance no embedder for it.
                if names[0] in expected:
                    layout[f"{theirs}{module}.{'scale' if module.endswith('_norm') else leaf}"] = names
    return layout


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


def find_transformer(
    path: str | Path,
    model: FluxTransformer2DModel,
    *,
    needs: str = "black-forest-labs/FLUX.1-Fill-dev",
    without: Collection[str] = (),
) -> StoredTensors:
    """The tensors of a FLUX transformer in diffusers' names, checked, and none of them read.

    Args:
        path: a diffusers transformer folder, sharded or not, or the pipeline folder around it; or a single file in the
            diffusers or the BFL layout (`flux1-fill-dev.safetensors`, or a whole ComfyUI checkpoint, of which only
            `model.diffusion_model.*` is read), in any floating type, float8 included.
        model: says which names and shapes are expected; may be on "meta".
        needs: what to call the model in errors.
        without: diffusers names to leave out; they need not be in the file.

    Raises:
        ValueError: for a file that is missing, cut short, of another format or quantised, another FLUX model, and
            tensors that are missing, unexpected or of a wrong shape, in the file's own names.
    """
    path = component(path, "transformer")
    with _opened(path, needs) as found:
        found, is_bfl = _within(found, ("", "model.diffusion_model."), ("double_blocks.", "transformer_blocks."))
        layout = transformer_layout(model) if is_bfl else _as_named(model)
        entry = "img_in.weight" if is_bfl else "x_embedder.weight"
        channels = found[entry].part.get_shape()[-1:] if entry in found else []
        other = _OTHER_INPUTS.get(*channels) if channels not in ([], [model.config.in_channels]) else None
        if other is not None:
            raise ValueError(
                f"{path}: this is {other}, with {channels[0]} input channels; the decoder needs {needs}, with "
                f"{model.config.in_channels}: {_remedy(needs)}"
            )
        return _find(path, found, layout, model, needs, without=without)


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
        ValueError: as `find_transformer`.
    """
    path = component(path, "vae")
    needs = "the decoder's autoencoder (for FLUX.1, ae.safetensors)"
    with _opened(path, needs) as found:
        found, is_bfl = _within(found, ("", "first_stage_model.", "vae."), ("decoder.mid.", "decoder.mid_block."))
        layout = autoencoder_layout(model) if is_bfl else _as_named(model)
        return _find(path, found, layout, model, needs).read(dtype=dtype, device=device)


def fill_config(path: str | Path | None = None) -> dict[str, Any]:
    """FLUX.1-Fill's configuration, and in its place what the config.json of a transformer's folder says.

    Args:
        path: what `find_transformer` reads; a single file says nothing of its configuration. None for FLUX.1-Fill's.

    Raises:
        ValueError: if nothing is there, or a folder without a configuration.
    """
    published = {**FLUX_FILL_CONFIG, "axes_dims_rope": list(FLUX_FILL_CONFIG["axes_dims_rope"])}
    if path is None:
        return published
    path = component(path, "transformer")
    if path.is_file():
        return published
    read = read_config(path)
    return {name: read.get(name, value) for name, value in published.items()}


def component(path: str | Path, name: str) -> Path:
    """`path`, or the folder `name` inside it, where `path` is the folder of a whole diffusers pipeline."""
    path = Path(path)
    return path / name if (path / name).is_dir() else path


def _as_named(model: nn.Module) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in model.state_dict()}


def _remedy(needs: str) -> str:
    return f"give the diffusers folder or the .safetensors file of {needs}"


def _files(path: Path, needs: str) -> list[Path]:
    """The one safetensors file that `path` is or holds, or the shards that the one index in it names."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: {_remedy(needs)}")
    files, indexes = sorted(path.glob("*.safetensors")), sorted(path.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        shards = read_config(path, indexes[0].name).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{indexes[0]} names no shards: download it again")
        files = [path / name for name in sorted(set(map(str, shards.values())))]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise ValueError(
                f"{path} lacks {', '.join(absent)}, which {indexes[0].name} names: its download has not finished, "
                "start it again"
            )
        return files
    if len(files) != 1:
        held = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{path} holds {held}; expected one .safetensors file, or shards with one index: "
            + (f"name one of its {len(files)} files" if files else _remedy(needs))
        )
    return files


class _Found(NamedTuple):
    """A tensor of a file, by the name that it has there, as a safetensors slice, which reads when it is indexed."""

    file: Path
    name: str
    part: Any


@contextmanager
def _opened(path: Path, needs: str) -> Iterator[dict[str, _Found]]:
    """Every tensor of `path` by its name."""
    with ExitStack() as stack:
        found = {}
        for file in _files(path, needs):
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                with file.open("rb") as raw:
                    start = raw.read(32)
                for sign, kind in _OTHER_FORMATS:
                    if start.startswith(sign):
                        raise ValueError(
                            f"{file} is {kind}; only safetensors files are read: {_remedy(needs)}"
                        ) from error
                raise ValueError(
                    f"{file} cannot be read ({error}): it is cut short or damaged, download it again"
                ) from error
            found |= {name: _Found(file, name, opened.get_slice(name)) for name in opened.keys()}
        yield found


def _within(
    found: Mapping[str, _Found], prefixes: Sequence[str], signs: tuple[str, str]
) -> tuple[dict[str, _Found], bool]:
    """What lies under the first prefix that holds a model, and whether it is in the BFL layout; all, if none does.

    Args:
        signs: beginnings of names that only the BFL and only the diffusers layout has.
    """
    for prefix in prefixes:
        for is_bfl, sign in zip((True, False), signs):
            if any(name.startswith(prefix + sign) for name in found):
                return {n.removeprefix(prefix): entry for n, entry in found.items() if n.startswith(prefix)}, is_bfl
    return dict(found), False


def _find(
    path: Path,
    found: Mapping[str, _Found],
    layout: Mapping[str, tuple[str, ...]],
    model: nn.Module,
    needs: str,
    *,
    without: Collection[str] = (),
) -> StoredTensors:
    """Checks every name and shape of `found`, and says where the parts of `layout` lie that are not in `without`."""
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    wanted = {source: names for source, names in layout.items() if not set(names) <= set(without)}
    unexpected = sorted(set(found) - set(layout))
    scales = [name for name in unexpected if _SIGN_OF_QUANTISATION.search(name)]
    scales += [name for name in wanted if name in found and found[name].part.get_dtype() not in _FLOATS]
    if scales:
        raise ValueError(
            f"{path} is quantised (it has {scales[0]}), which is not read; plain bfloat16, float16 and float8 are: "
            + _remedy(needs)
        )
    wrong = []
    for source, names in wanted.items():
        whole = [sum(shapes[name][0] for name in names), *shapes[names[0]][1:]]
        if source in found and not _same_but_for_ones(given := found[source].part.get_shape(), whole):
            wrong.append(f"{source} is {given}, expected {whole}")
    if misfit := misfits(missing=sorted(set(wanted) - set(found)), unexpected=unexpected, wrong=wrong):
        raise ValueError(f"{path} does not fit {needs}; {misfit}: {_remedy(needs)}")

    places = {}
    for source, names in wanted.items():
        stop = 0
        for name in names:
            start, stop = stop, stop + shapes[name][0]
            if name in without:
                continue
            places[name] = Place(
                file=found[source].file,
                source=found[source].name,
                rows=(start, stop),
                shape=tuple(shapes[name]),
                roll=shapes[name][0] // 2 if source.startswith(_HALVES_SWAPPED) else 0,
            )
    return StoredTensors(places)


def _same_but_for_ones(given: Sequence[int], expected: Sequence[int]) -> bool:
    """BFL's attention projections are convolutions: [C, C, 1, 1] for [C, C]."""
    return list(given[: len(expected)]) == list(expected) and math.prod(given) == math.prod(expected)
