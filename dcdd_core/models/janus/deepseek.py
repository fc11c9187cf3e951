"""Janus and Janus-Pro as published by DeepSeek: their config.json and tensor names, mapped to transformers' classes.

DeepSeek's tensors are named after the modules in github.com/deepseek-ai/Janus (`modeling_vlm.py`, `vq_model.py` and
`projector.py` in janus/models). Values that their config.json leaves to their code are constants here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from ...files import reading
from ..checkpoints import whole_number

#: The model_type in their config.json. JanusFlow and DeepSeek-VL share it, and are refused because they lack parts.
MODEL_TYPE = "multi_modality"

_REMEDY = "choose a folder with a Janus or Janus-Pro model, or fetch its config.json again"

# transformers 4.33's LlamaConfig, which these models were written with: language_config states only what differs.
_LLAMA: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    }
)

# "VQ-16" in vq_model.py. Its codebook's size is in config.json.
_VQ_16: Mapping[str, Any] = MappingProxyType(
    {
        "in_channels": 3,
        "out_channels": 3,
        "base_channels": 128,
        "channel_multiplier": [1, 1, 2, 2, 4],
        "num_res_blocks": 2,
        "latent_channels": 256,
        "double_latent": False,
        "dropout": 0.0,
    }
)

# Side in pixels in generation_inference.py, for a vision_config without one.
_SIDE = 384

# Modules outside the VQ model, by transformers' names and DeepSeek's.
_MODULES: Mapping[str, str] = MappingProxyType(
    {
        "model.language_model.": "language_model.model.",
        "model.generation_embeddings.": "gen_embed.",
        "model.generation_aligner.fc1.": "gen_aligner.layers.0.",
        "model.generation_head.proj_out.": "gen_head.output_mlp_projector.",
        "model.generation_head.vision_head.": "gen_head.vision_head.",
    }
)
_DEEPER_ALIGNER = re.compile(r"model\.generation_aligner\.hidden_layers\.(\d+)\.")

# Parts of names within the VQ model. Both number the decoder's levels in order of use, from the lowest resolution.
_VQ_STEPS: Mapping[str, str] = MappingProxyType(
    {"down": "conv_blocks", "up": "conv_blocks", "block": "res", "block_1": "0", "attn_1": "1", "block_2": "2"}
)

#: DeepSeek's name prefix of each part, by transformers' prefix.
PARTS: Mapping[str, str] = MappingProxyType(
    {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_model.": "vision_model.",
        "model.aligner.": "aligner.",
        "model.generation_embeddings.": "gen_embed.",
        "model.generation_aligner.": "gen_aligner.",
        "model.generation_head.": "gen_head.",
        "model.vqmodel.encoder.": "gen_vision_model.encoder.",
        "model.vqmodel.quant_conv.": "gen_vision_model.quant_conv.",
        "model.vqmodel.quantize.": "gen_vision_model.quantize.",
        "model.vqmodel.post_quant_conv.": "gen_vision_model.post_quant_conv.",
        "model.vqmodel.decoder.": "gen_vision_model.decoder.",
    }
)

#: Training statistics: how often codes were used.
BOOKKEEPING = "gen_vision_model.quantize.codebook_used"


def janus_config(config: Mapping[str, Any], what: str) -> JanusConfig:
    """Converts DeepSeek's config.json to transformers' configuration.

    The side of the token grid is the vision tower's image size divided by the VQ model's factor: 384 / 16 in every
    published model. Nothing else of the vision tower is used here.

    Args:
        what: names the folder in errors.

    Raises:
        ValueError: for a model that is not Janus or Janus-Pro, naming the entry.
    """
    language = _section(config, "language_config", what)
    if language.get("model_type", "llama") != "llama":
        raise ValueError(f"{what} has a language model of type {language['model_type']!r}, expected 'llama': {_REMEDY}")
    language = {**_LLAMA, **language}
    for name, usual in _LLAMA.items():
        value = language[name]
        if isinstance(usual, int):
            whole_number(language, name, what, remedy=_REMEDY)
        elif not (
            isinstance(value, str) if isinstance(usual, str) else type(value) in (int, float) and math.isfinite(value)
        ):
            raise ValueError(
                f"{what} has {name} {value!r} in its language_config, expected one like {usual!r}: {_REMEDY}"
            )
    for name in ("num_key_value_heads", "head_dim"):
        if language.get(name) is not None:
            whole_number(language, name, what, remedy=_REMEDY)
    vision = _params(config, "vision_config", "CLIPVisionTower", what)
    codes = _params(config, "gen_vision_config", "VQ-16", what)
    aligner = _params(config, "gen_aligner_config", "MlpProjector", what)
    head = _params(config, "gen_head_config", "vision_head", what)
    if aligner.get("projector_type") != "mlp_gelu":
        raise ValueError(
            f"{what} has projector_type {aligner.get('projector_type')!r} in its gen_aligner_config, expected "
            f"'mlp_gelu': {_REMEDY}"
        )
    factor = 2 ** (len(_VQ_16["channel_multiplier"]) - 1)
    side = whole_number(vision, "image_size", what, usual=_SIDE, least=factor, remedy=_REMEDY)
    codes_of_image = {
        "embed_dim": whole_number(codes, "n_embed", what, remedy=_REMEDY),
        "num_embeddings": whole_number(codes, "image_token_size", what, remedy=_REMEDY),
        "projection_dim": whole_number(aligner, "n_embed", what, remedy=_REMEDY),
        # Linear layers of the aligner, including the first; projector.py has one by default.
        "num_hidden_layers": whole_number(aligner, "depth", what, usual=1, remedy=_REMEDY),
        "image_token_embed_dim": whole_number(head, "n_embed", what, remedy=_REMEDY),
    }
    with reading(Path(what) / "config.json", "the configuration of a Janus model", _REMEDY):
        return JanusConfig(
            text_config=LlamaConfig.from_dict(language),
            vision_config=JanusVisionConfig(image_size=side, patch_size=factor, num_hidden_layers=1),
            vq_config=JanusVQVAEConfig(**_VQ_16, **codes_of_image),
            attn_implementation="sdpa",
        )


def deepseek_name(name: str) -> str:
    """DeepSeek's name of a tensor in transformers' `JanusForConditionalGeneration`, if image generation uses it.

    Raises:
        ValueError: for the vision tower, its aligner and the text head.
    """
    if name.startswith("model.vqmodel."):
        steps = name.removeprefix("model.vqmodel.").split(".")
        return ".".join(["gen_vision_model", *(_VQ_STEPS.get(step, step) for step in steps)])
    if deeper := _DEEPER_ALIGNER.match(name):
        # Every second of DeepSeek's layers is an activation.
        return f"gen_aligner.layers.{2 * int(deeper[1]) + 2}.{name[deeper.end() :]}"
    for ours, theirs in _MODULES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ValueError(f"{name} has no DeepSeek name here, expected a part of what samples or tokenises images")


def _section(config: Mapping[str, Any], name: str, what: str) -> Mapping[str, Any]:
    section = config.get(name)
    if not isinstance(section, dict):
        raise ValueError(f"{what} has no {name} in its config.json, as every Janus has: {_REMEDY}")
    return section


def _params(config: Mapping[str, Any], name: str, kind: str, what: str) -> Mapping[str, Any]:
    """The parameters of a section, which must be of one class."""
    section = _section(config, name, what)
    if section.get("cls") != kind:
        raise ValueError(f"{what} has a {name} of class {section.get('cls')!r}, expected {kind!r}: {_REMEDY}")
    return _section(section, "params", what)
