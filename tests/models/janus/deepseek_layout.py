"""`tiny_janus` in DeepSeek's layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from dcdd_core.models.janus.deepseek import deepseek_name
from tests.tiny import tiny_janus, tiny_tokenizer

Weights = dict[str, torch.Tensor]

PAD = "<｜▁pad▁｜>"
#: In place of `deepseek._VQ_16`.
TINY_VQ = {"base_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 1, "latent_channels": 16}
#: The language_config of `tiny_janus`.
TINY_LANGUAGE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 21,
}
UNREAD = ("model.vision_model.", "model.aligner.", "lm_head.")


def published_config(hidden: int, language: dict, side: int = 384, codes: int = 16384) -> dict:
    """config.json in DeepSeek's form; that of Janus-Pro-7B stands in github.com/sgl-project/sglang/issues/4534."""
    mlp = {"depth": 2, "n_embed": hidden, "projector_type": "mlp_gelu"}
    return {
        "aligner_config": {"cls": "MlpProjector", "model_type": "aligner", "params": {"input_dim": 1024, **mlp}},
        "gen_aligner_config": {"cls": "MlpProjector", "model_type": "gen_aligner", "params": {"input_dim": 8, **mlp}},
        "gen_head_config": {
            "cls": "vision_head",
            "model_type": "gen_head",
            "params": {"image_token_embed": hidden, "image_token_size": codes, "n_embed": hidden},
        },
        "gen_vision_config": {
            "cls": "VQ-16",
            "model_type": "gen_vision",
            "params": {"image_token_size": codes, "n_embed": 8},
        },
        "language_config": {"model_type": "llama", "torch_dtype": "bfloat16", **language},
        "model_type": "multi_modality",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
        "vision_config": {
            "cls": "CLIPVisionTower",
            "model_type": "vision",
            "params": {"image_size": side, "model_name": "siglip_large_patch16_384", "select_layer": -1},
        },
    }


def tiny_weights() -> Weights:
    """The weights under DeepSeek's names, with parts that neither sampling nor the tokenizer reads."""
    found = tiny_janus()[0].state_dict()
    drawn = {deepseek_name(name): tensor for name, tensor in found.items() if not name.startswith(UNREAD)}
    return drawn | {
        "language_model.lm_head.weight": torch.ones(21, 32),
        "vision_model.vision_tower.pos_embed": torch.ones(1, 16, 16),
        "vision_model.vision_tower.blocks.0.attn.qkv.weight": torch.ones(48, 16),
        "vision_model.vision_tower.attn_pool.latent": torch.ones(1, 1, 16),
        "aligner.layers.0.weight": torch.ones(32, 16),
        "gen_vision_model.quantize.codebook_used": torch.zeros(100),
    }


def write_all_but_weights(folder: Path) -> Path:
    """DeepSeek's folder without weights; its pad token is among the words, and no configuration says what it is for."""
    tiny_tokenizer().save_pretrained(folder)
    words = (folder / "tokenizer.json").read_text("utf-8")
    (folder / "tokenizer.json").write_text(words.replace('"<pad>"', f'"{PAD}"'), "utf-8")
    token = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {"bos_token": {"content": "<|begin_of_sentence|>", **token}, "unk_token": {"content": "<unk>", **token}}
    write_json(folder / "special_tokens_map.json", {**special, "additional_special_tokens": ["<begin_of_image>"]})
    of_type = {name: {"__type": "AddedToken", **values} for name, values in special.items()}
    write_json(
        folder / "tokenizer_config.json",
        {"add_bos_token": True, "legacy": True, "tokenizer_class": "LlamaTokenizerFast", **of_type},
    )
    write_json(folder / "config.json", published_config(32, TINY_LANGUAGE, side=16, codes=64))
    return folder


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), "utf-8")


def write_weights(folder: Path, weights: Weights, kind: str = ".bin", shards: int = 1) -> list[Path]:
    """One file or several with an index, named as on the hub; neighbours go to different shards."""
    stem = "pytorch_model" if kind == ".bin" else "model"
    save = torch.save if kind == ".bin" else save_file
    if shards == 1:
        files, placed = [folder / f"{stem}{kind}"], {name: 0 for name in weights}
    else:
        files = [folder / f"{stem}-{i + 1:05}-of-{shards:05}{kind}" for i in range(shards)]
        placed = {name: i % shards for i, name in enumerate(sorted(weights))}
        weight_map = {name: files[i].name for name, i in placed.items()}
        write_json(folder / f"{stem}{kind}.index.json", {"metadata": {}, "weight_map": weight_map})
    for i, file in enumerate(files):
        save({name: weights[name].contiguous() for name in weights if placed[name] == i}, file)
    return files
