"""A tiny BIGFix in the layout that its authors publish, with weights that are the same on every machine."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from dcdd_core.models.llamagen.tokenizer import llamagen_name
from tests.tiny import WORDS, fill, tiny_vq

Weights = dict[str, torch.Tensor]

NAME = "BigFix_tiny"
HEADS = 2


def released_shapes(
    *, side: int, codes: int, width: int, layers: int, hidden: int, text_width: int, registers: int = 1
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a text-to-image checkpoint: those of the module in github.com/valeoai/BigFix
    (bigfix/network/txt_transformer.py) with proj 1 and extra_cond."""
    square = (width, width)
    shapes: dict[str, tuple[int, ...]] = {
        "tok_emb.weight": (codes + 1, width),
        "pos_emb.weight": (side * side, width),
        "txt_proj.weight": (width, text_width),
        "txt_proj.bias": (width,),
        "reward_proj.0.weight": (width, 3),
        "reward_proj.0.bias": (width,),
        "reward_proj.2.weight": (8 * width, width),
        "reward_proj.2.bias": (8 * width,),
    }
    for i in range(layers):
        block = f"transformer.layers.{i}."
        shapes |= {f"{block}attn.{name}.weight": square for name in ("wq", "wk", "wv", "wo")}
        shapes[f"{block}ln1.weight"] = (width,)
        shapes |= {f"{block}cross_attn.{name}.weight": square for name in ("wq", "wk", "wv", "wo")}
        shapes[f"{block}ln1_bis.weight"] = (width,)
        shapes |= {
            f"{block}ff.w1.weight": (hidden, width),
            f"{block}ff.w2.weight": (width, hidden),
            f"{block}ff.w3.weight": (hidden, width),
            f"{block}ln2.weight": (width,),
        }
    return shapes | {
        "last_norm.weight": (width,),
        "head.weight": (codes + 1, width),
        "head.bias": (codes + 1,),
        "reg_tokens.weight": (registers, width),
    }


#: 4 x 4 tokens of 64 codes for `tiny_vq` and `tiny_text_encoder`; 256 is the released code's least hidden size.
TINY = released_shapes(side=4, codes=64, width=32, layers=2, hidden=256, text_width=16)


def tiny_weights(seed: int = 0) -> Weights:
    """Values of `TINY`: normal at 1/sqrt(fan-in), embeddings at 1, norms near 1, biases small. The head is tied."""
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in TINY.items():
        values = torch.randn(shape, generator=draw)
        if name.endswith("bias"):
            values = 0.1 * values
        elif len(shape) == 1:
            values = 1 + 0.1 * values
        elif "_emb." not in name and "reg_tokens" not in name:
            values = values / shape[-1] ** 0.5
        weights[name] = values
    weights["head.weight"] = weights["tok_emb.weight"]
    return weights


def tiny_text_encoder() -> T5EncoderModel:
    """Two layers of width 16."""
    config = T5Config(
        vocab_size=len(tiny_words()),
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    model = T5EncoderModel(config)
    # A module of its own in transformers 5, the shared one in 4: here the same values are drawn in both.
    model.encoder.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
    fill(model)
    model.shared.weight = model.encoder.embed_tokens.weight
    model.set_input_embeddings(model.shared)
    return model


def tiny_words() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with T5's special tokens, which ends a text with </s>."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def tiny_llamagen() -> Weights:
    """`tiny_vq` under LlamaGen's names, with its training statistics."""
    found = {llamagen_name(name): value for name, value in tiny_vq().state_dict().items()}
    return found | {"quantize.codebook_used": torch.zeros(100)}


def save_checkpoint(folder: Path, weights: Weights) -> Path:
    """As their trainer saves it."""
    file = folder / f"{NAME}.pth"
    held = {"iter": 3, "global_epoch": 1, "model_state_dict": weights, "optimizer_state_dict": None}
    torch.save(held, file)
    return file


def save_bigfix(folder: Path) -> Path:
    """The whole folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder, tiny_weights())
    torch.save({"model": tiny_llamagen()}, folder / "vq_ds16_t2i.pt")
    tiny_text_encoder().save_pretrained(folder / "flan-t5-xl")
    tiny_words().save_pretrained(folder / "flan-t5-xl")
    (folder / "config.json").write_text(json.dumps({"model_type": "bigfix", "heads": HEADS}))
    return folder
