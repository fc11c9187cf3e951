"""The image tokenizer in a Janus folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from ..checkpoints import load_strictly, read_config, read_tensors
from ..vq import VQTokenizer
from . import deepseek


def load_tokenizer(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> VQTokenizer:
    """The VQ part of a Janus folder, transformers' or DeepSeek's, or of a folder that holds only a `JanusVQVAE`.

    Only its tensors are read: from a checkpoint of 7B weights 0.3 GB, not 14.

    Raises:
        ValueError: for a folder of another kind, naming what is missing.
    """
    config = read_config(folder)
    kind = config.get("model_type")
    if kind == "janus":
        values, prefix = config.get("vq_config"), "model.vqmodel."
        if not isinstance(values, dict):
            raise ValueError(f"{folder}'s config.json has no vq_config: download it again")
        vq_config = JanusVQVAEConfig(**values)
    elif kind == deepseek.MODEL_TYPE:
        vq_config, prefix = deepseek.janus_config(config, str(folder)).vq_config, "model.vqmodel."
    elif kind == "janus_vqgan":
        vq_config, prefix = JanusVQVAEConfig(**config), ""
    else:
        raise ValueError(
            f"{folder} holds a {kind!r} model; expected 'janus', 'janus_vqgan' or {deepseek.MODEL_TYPE!r}: choose "
            "the folder of a Janus model or of its tokenizer"
        )
    with torch.device("meta"):
        model = JanusVQVAE(vq_config)
    if kind == deepseek.MODEL_TYPE:
        deepseek.load(model, folder, prefix=prefix, dtype=dtype, device=device)
    else:
        tensors = read_tensors(folder, prefix=prefix, dtype=dtype, device=device)
        load_strictly(model, tensors, f"{folder} ({prefix}*)")
    return VQTokenizer(model, name=Path(folder).name)
