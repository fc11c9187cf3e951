"""Files of FLUX.1's transformer: diffusers folders and Black Forest Labs' single files.

Nothing is downloaded: the configuration is here or in a decoder's card.

BFL's tensors are named after the modules in github.com/black-forest-labs/flux (`model.py`, `modules/layers.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffusers import FluxTransformer2DModel

from ....settings import require_number, shown
from ... import layouts
from ...checkpoints import StoredTensors, check_count, read_config, read_headers

#: The configuration of FLUX.1-Fill-dev's transformer; a decoder card takes it as dict(FLUX_FILL_CONFIG).
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

#: The most that a configuration may declare, at least three times FLUX.1's: anything above is a mistake, and building a
#: network of a million blocks would take hours before it was compared with its file.
_MOST = {
    "patch_size": 16,
    "in_channels": 2**14,
    "out_channels": 2**12,
    "num_layers": 64,
    "num_single_layers": 128,
    "attention_head_dim": 2**10,
    "num_attention_heads": 2**8,
    "joint_attention_dim": 2**16,
    "pooled_projection_dim": 2**16,
}


# BFL's modules, each with the diffusers modules whose rows it stacks, in order.
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
# BFL's last modulation has shift, then scale; diffusers' has scale, then shift.
_HALVES_SWAPPED = "final_layer.adaLN_modulation.1."

# Input channels per token of published models other than FLUX.1-Fill, which has 384.
_OTHER_INPUTS = {
    64: "FLUX.1-dev, or a model with the same input (Kontext, Krea, schnell)",
    128: "FLUX.1-Canny-dev, FLUX.1-Depth-dev or FLUX.2",
}


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
                # Norms have no bias, and models without distilled guidance have no embedder for it.
                if names[0] in expected:
                    layout[f"{theirs}{module}.{'scale' if module.endswith('_norm') else leaf}"] = names
    return layout


def find_transformer(
    path: str | Path,
    model: FluxTransformer2DModel,
    *,
    needs: str = "black-forest-labs/FLUX.1-Fill-dev",
    without: Collection[str] = (),
) -> StoredTensors:
    """Locates the tensors of a FLUX transformer by diffusers' names and checks them, without reading any.

    Args:
        path: a diffusers transformer folder, sharded or not, or the pipeline folder around it; or a single file in the
            diffusers or the BFL layout (`flux1-fill-dev.safetensors`, or a whole ComfyUI checkpoint, of which only
            `model.diffusion_model.*` is read), in any floating type, float8 included.
        model: says which names and shapes are expected; may be on "meta".
        needs: what to call the model in errors.
        without: diffusers names to leave out; they need not be in the file.

    Raises:
        ValueError: for a file that is missing, cut short, of another format or quantised, for another FLUX model, and
            for tensors that are missing, unexpected or of a wrong shape, by their names in the file.
    """
    path = layouts.component(path, "transformer")
    with layouts.opened(path, needs) as found:
        found, is_bfl = layouts.within(found, ("", "model.diffusion_model."), ("double_blocks.", "transformer_blocks."))
        layout = transformer_layout(model) if is_bfl else layouts.as_named(model)
        entry = "img_in.weight" if is_bfl else "x_embedder.weight"
        channels = found[entry].part.get_shape()[-1:] if entry in found else []
        other = _OTHER_INPUTS.get(*channels) if channels not in ([], [model.config.in_channels]) else None
        if other is not None:
            raise ValueError(
                f"{path}: this is {other}, with {channels[0]} input channels; the decoder needs {needs}, with "
                f"{model.config.in_channels}: {layouts.remedy(needs)}"
            )
        return layouts.find(path, found, layout, model, needs, without=without, rolled=_HALVES_SWAPPED)


def require_config(config: Mapping[str, Any], where: str) -> None:
    """Refuses a configuration that no FLUX transformer has, before one is built.

    Args:
        config: must have exactly the names of `FLUX_FILL_CONFIG`; names that begin with "_" are ignored.
        where: prefix of the fields' names in errors.

    Raises:
        ValueError: naming the field.
    """
    given = {name for name in config if not name.startswith("_")}
    if given != set(FLUX_FILL_CONFIG):
        absent = ", ".join(sorted(set(FLUX_FILL_CONFIG) - given)) or "nothing"
        raise ValueError(
            f"{where} is not a FLUX transformer's: it lacks {absent} and has "
            f"{shown(sorted(given - set(FLUX_FILL_CONFIG)))} more"
        )
    for name, most in _MOST.items():
        least = 0 if name in ("num_layers", "num_single_layers") else 1
        require_number(f"{where}.{name}", config[name], whole=True, least=least, most=most)
    if not isinstance(config["guidance_embeds"], bool):
        raise ValueError(f"{where}.guidance_embeds must be true or false, got {shown(config['guidance_embeds'])}")
    axes, head = config["axes_dims_rope"], config["attention_head_dim"]
    whole = isinstance(axes, (list, tuple)) and all(type(side) is int and 0 < side <= head for side in axes)
    if not whole or len(axes) != 3 or sum(axes) != head or any(side % 2 for side in axes):
        raise ValueError(
            f"{where}.axes_dims_rope must be three even numbers whose sum is attention_head_dim, {head}, got "
            f"{shown(axes)}"
        )
    if config["out_channels"] % 4:
        raise ValueError(f"{where}.out_channels must be a multiple of 4, got {config['out_channels']}")


def fill_config(path: str | Path | None = None) -> dict[str, Any]:
    """FLUX.1-Fill's configuration, overridden by the config.json of a transformer's folder.

    Args:
        path: as for `find_transformer`; a single file does not state its configuration. None for FLUX.1-Fill's.

    Raises:
        ValueError: if the path does not exist or the folder has no configuration; for a configuration that is not
            FLUX's, or that declares more blocks than the folder's weights have, if it has any.
    """
    published = {**FLUX_FILL_CONFIG, "axes_dims_rope": list(FLUX_FILL_CONFIG["axes_dims_rope"])}
    if path is None:
        return published
    path = layouts.component(path, "transformer")
    if path.is_file():
        return published
    read = read_config(path)
    config = {name: read.get(name, value) for name, value in published.items()}
    if config["out_channels"] is None:  # in diffusers: as many as input channels
        config["out_channels"] = config["in_channels"]
    file = path / "config.json"
    require_config(config, str(file))
    if not (any(path.glob("*.safetensors*")) or any(path.glob("*.bin*"))):
        return config  # An estimate needs no weights.
    names = read_headers(path)
    for setting, blocks in (("num_layers", "transformer_blocks."), ("num_single_layers", "single_transformer_blocks.")):
        check_count(file, setting, config[setting], names, blocks)
    return config
