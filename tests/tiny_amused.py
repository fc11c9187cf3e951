"""A tiny aMUSEd folder as diffusers lays it out, with weights that are the same on every machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import AmusedScheduler, UVit2DModel, VQModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests.tiny import fill

CODES, MASK = 64, 71


def network_config(size: int = 4, *, large: bool = False) -> dict[str, Any]:
    """Of a `UVit2DModel` for `size` x `size` tokens of 64 codes.

    Args:
        large: as amused-512, with a step down before the layers and one up after them; otherwise as amused-256.
    """
    return {
        "hidden_size": 32,
        "cond_embed_dim": 24,
        "micro_cond_encode_dim": 8,
        "micro_cond_embed_dim": 40,
        "encoder_hidden_size": 16,
        "vocab_size": 72,
        "codebook_size": CODES,
        "in_channels": 20,
        "block_out_channels": 28,
        "num_res_blocks": 2,
        "block_num_heads": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "sample_size": size,
        "downsample": large,
        "upsample": large,
    }


def tiny_network(size: int = 4, *, large: bool = False) -> UVit2DModel:
    return fill(UVit2DModel(**network_config(size, large=large)), 1)


def tiny_vq() -> VQModel:
    """16 pixels a token side, 64 codes in 8-D, of lengths that differ."""
    model = VQModel(
        block_out_channels=(8, 8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        layers_per_block=1,
        latent_channels=8,
        num_vq_embeddings=CODES,
        norm_num_groups=4,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
        force_upcast=True,
    )
    return fill(model, 2)


def tiny_text(words: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=0,  # As published: not what the tokenizer says.
        pad_token_id=1,
        eos_token_id=2,
    )
    return fill(CLIPTextModelWithProjection(config), 3)


def save_words(folder: Path) -> int:
    """Writes the files of a CLIP tokenizer that reads any text byte by byte, as they are published; how many words."""
    folder.mkdir(parents=True)
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": words[-2], "eos_token": words[-1], "unk_token": words[-1], "pad_token": "!"}
    config = {**special, "add_prefix_space": False, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return len(words)


def save_tiny_amused(folder: Path, size: int = 4, *, large: bool = False) -> Path:
    """A whole folder."""
    text = tiny_text(save_words(folder / "tokenizer"))
    text.save_pretrained(folder / "text_encoder")
    tiny_network(size, large=large).save_pretrained(folder / "transformer")
    tiny_vq().save_pretrained(folder / "vqvae")
    AmusedScheduler(mask_token_id=MASK).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "AmusedPipeline",
        "scheduler": ["diffusers", "AmusedScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "transformer": ["diffusers", "UVit2DModel"],
        "vqvae": ["diffusers", "VQModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
