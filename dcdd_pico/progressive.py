"""Pico's masked sampler: its sizes, its start from pico's Janus, and where its files lie."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import JanusForConditionalGeneration

from dcdd_core.method.progressive import ProgressiveOptions
from dcdd_core.models.masked.network import MaskedConfig, MaskedTransformer

FOLDER = "progressive"
"""Below the embedded weights."""
TOKENIZER = "../janus"
"""Its image tokenizer, Janus' own, as seen from there."""
TEMPLATE = "<|User|>: {prompt}\n\n<|Assistant|>:<begin_of_image>"
"""Janus' own, so that its weights find the text as they know it."""
SAMPLING = ProgressiveOptions(guidance=3.0)
_PARTS = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def network_config(janus: JanusForConditionalGeneration) -> MaskedConfig:
    """The sizes of a Janus, for a network that starts from it.

    Raises:
        ValueError: if heads share their keys, which the network's do not.
    """
    text, codes = janus.config.text_config, janus.config.vq_config
    if text.num_key_value_heads != text.num_attention_heads:
        raise ValueError(
            f"this Janus has {text.num_key_value_heads} key heads for {text.num_attention_heads} heads: start from one "
            "with as many of each"
        )
    return MaskedConfig(
        grid=(codes.num_patches, codes.num_patches),
        codes=codes.num_embeddings,
        code_dim=codes.embed_dim,
        words=text.vocab_size,
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        hidden=text.intermediate_size,
        norm_eps=text.rms_norm_eps,
    )


@torch.no_grad()
def start_from_janus(janus: JanusForConditionalGeneration, seed: int) -> MaskedTransformer:
    """A network with Janus' blocks, embeddings and head, in float32; a hidden position starts as the mean code.

    Only what Janus has no counterpart of is new: the scores start at 0 for every position.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = MaskedTransformer(network_config(janus))
    model = janus.model
    llama = model.language_model.state_dict()
    found = {
        f"layers.{i}.{own}.weight": llama[f"layers.{i}.{theirs}.weight"]
        for i in range(network.config.layers)
        for own, theirs in _PARTS.items()
    }
    parts = {
        "words": model.language_model.embed_tokens,
        "norm": model.language_model.norm,
        "codes": model.generation_embeddings,
        "align_in": model.generation_aligner.fc1,
        "align_out": model.generation_aligner.hidden_layers[0],
        "head_in": model.generation_head.proj_out,
        "head_out": model.generation_head.vision_head,
    }
    for own, part in parts.items():
        found |= {f"{own}.{name}": value for name, value in part.state_dict().items()}
    network.load_state_dict(network.state_dict() | {name: value.float() for name, value in found.items()})
    aligned = model.generation_aligner.float()(model.generation_embeddings.weight.float())
    network.mask.copy_(aligned.mean(0))
    network.scores_out.weight.zero_()
    network.scores_out.bias.zero_()
    return network


def progressive_folder(weights: Path) -> Path:
    """Where the masked sampler lies among the embedded weights."""
    return weights / FOLDER
