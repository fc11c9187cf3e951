"""A tiny LlamaGen in the layout that its authors publish, with weights that are the same on every machine."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.tiny_bigfix import Weights, tiny_llamagen, tiny_text_encoder, tiny_words

NAME = "t2i_tiny"
SLOTS, SIDE, HEADS = 120, 4, 2


def released_shapes(
    *, codes: int, width: int, layers: int, hidden: int, text_width: int, slots: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a text-to-image checkpoint: those of the module in github.com/FoundationVision/LlamaGen
    (autoregressive/models/gpt.py)."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_embedding.uncond_embedding": (slots, text_width),
        "cls_embedding.cap_proj.fc1.weight": (width, text_width),
        "cls_embedding.cap_proj.fc2.weight": (width, width),
        "tok_embeddings.weight": (codes, width),
    }
    for i in range(layers):
        shapes |= {
            f"layers.{i}.attention.wqkv.weight": (3 * width, width),
            f"layers.{i}.attention.wo.weight": (width, width),
            f"layers.{i}.feed_forward.w1.weight": (hidden, width),
            f"layers.{i}.feed_forward.w3.weight": (hidden, width),
            f"layers.{i}.feed_forward.w2.weight": (width, hidden),
            f"layers.{i}.attention_norm.weight": (width,),
            f"layers.{i}.ffn_norm.weight": (width,),
        }
    return shapes | {"norm.weight": (width,), "output.weight": (codes, width)}


#: 4 x 4 tokens of 64 codes for `tiny_vq` and `tiny_text_encoder`; two heads of 16.
TINY = released_shapes(codes=64, width=32, layers=2, hidden=64, text_width=16, slots=SLOTS)


def tiny_weights(seed: int = 0) -> Weights:
    """Values of `TINY`: normal at 1/sqrt(fan-in), embeddings at 1, norms near 1."""
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in TINY.items():
        values = torch.randn(shape, generator=draw)
        if len(shape) == 1:
            values = 1 + 0.1 * values
        elif "embedding" not in name or "cap_proj" in name:
            values = values / shape[-1] ** 0.5
        weights[name] = values
    return weights


def save_llamagen(folder: Path) -> Path:
    """The whole folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": tiny_weights(), "steps": 3}, folder / f"{NAME}.pt")
    torch.save({"model": tiny_llamagen()}, folder / "vq_ds16_t2i.pt")
    tiny_text_encoder().save_pretrained(folder / "flan-t5-xl")
    tiny_words().save_pretrained(folder / "flan-t5-xl")
    config = {"model_type": "llamagen", "num_attention_heads": HEADS, "block_size": SIDE**2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
