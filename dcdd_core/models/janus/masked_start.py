"""A masked sampler initialised from a Janus model: the same blocks, which then attend in both directions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import JanusForConditionalGeneration

from ..masked.network import MaskedConfig, MaskedTransformer
from ..masked.sampler import MaskedSampler
from ..masked.words import Words
from .sampler import JanusSampler, unconditional_ids

TEMPLATE = "<|User|>: {prompt}\n\n<|Assistant|>:<begin_of_image>"
"""Janus' own prompt format, so that its weights see text in the form that they were trained on."""
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


def network_config(
    janus: JanusForConditionalGeneration, grid: tuple[int, int] | None = None, layers: int | None = None
) -> MaskedConfig:
    """The sizes of a Janus model, for a network that starts from it.

    Args:
        grid: (h, w) of the network's images; None for Janus' own.
        layers: how many of Janus' layers to take, from the first on; None for all.

    Raises:
        ValueError: for more layers than Janus has (or none), and if its blocks differ from the network's: heads that
            share their keys or are not as wide as their share of the width, scaled rotary embeddings, biases, and
            another depth of aligner.
    """
    text, codes = janus.config.text_config, janus.config.vq_config
    if layers is not None and not 1 <= layers <= text.num_hidden_layers:
        raise ValueError(f"this Janus has {text.num_hidden_layers} layers, got {layers}: take 1 or more of these")
    if text.num_key_value_heads != text.num_attention_heads:
        raise ValueError(
            f"this Janus has {text.num_key_value_heads} key heads for {text.num_attention_heads} heads: start from one "
            "with as many of each"
        )
    if (depth := len(janus.model.generation_aligner.hidden_layers)) != 1:
        raise ValueError(f"this Janus aligns codes in {depth + 1} layers, expected 2: start from another one")
    rope = getattr(text, "rope_parameters", None) or {"rope_theta": getattr(text, "rope_theta", 10_000.0)}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"this Janus scales its rotary embeddings ({rope}): start from one that does not")
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if head_dim * text.num_attention_heads != text.hidden_size or text.attention_bias or text.mlp_bias:
        raise ValueError(
            f"this Janus has heads of {head_dim} in a width of {text.hidden_size}, or biases: start from one without"
        )
    return MaskedConfig(
        grid=grid or (codes.num_patches, codes.num_patches),
        codes=codes.num_embeddings,
        code_dim=codes.embed_dim,
        words=text.vocab_size,
        width=text.hidden_size,
        layers=layers or text.num_hidden_layers,
        heads=text.num_attention_heads,
        hidden=text.intermediate_size,
        rope_theta=float(rope["rope_theta"]),
        norm_eps=text.rms_norm_eps,
    )


@torch.no_grad()
def start_from_janus(
    janus: JanusForConditionalGeneration, seed: int, *, grid: tuple[int, int] | None = None, layers: int | None = None
) -> MaskedTransformer:
    """A network with Janus' blocks, embeddings and head, in float32; a hidden position starts as the mean code.

    Only parts without a counterpart in Janus are new: the scores start at 0 for every position.

    Args:
        grid, layers: see `network_config`.

    Raises:
        ValueError: as `network_config`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = MaskedTransformer(network_config(janus, grid, layers))
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
    aligned = network.align_out(F.gelu(network.align_in(network.codes.weight)))
    network.mask.copy_(aligned.mean(0))
    network.scores_out.weight.zero_()
    network.scores_out.bias.zero_()
    return network


def masked_start(sampler: JanusSampler, seed: int, *, grid: tuple[int, int] | None = None) -> MaskedSampler:
    """A masked sampler with `start_from_janus`' network, and Janus' tokenizer and template.

    Raises:
        ValueError: as `network_config`, and for a tokenizer without a pad token.
    """
    words = sampler.tokenizer
    words.pad_token = words.convert_ids_to_tokens(unconditional_ids([0, 0, 0], words)[1])  # DeepSeek's file names none.
    network = start_from_janus(sampler.model, seed, grid=grid)
    return MaskedSampler(network, Words(words, TEMPLATE), sampler.codebook, name=sampler.name)
