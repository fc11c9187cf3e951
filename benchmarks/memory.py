"""Memory: GB of the published models, computed from their shapes, and measured where there is a GPU

`python benchmarks/memory.py` prints this table alone. Nothing is loaded: networks are built on the meta device. Not
included are memory of the driver, activations except in the rows of a step (ComfyUI keeps about 1 GB free for them),
and the 6 MB of int8's row scales. Measurements use random weights of the published shape.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import JanusForConditionalGeneration, T5Config, T5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.flux import GRID, IMAGE, SIZE, card_of, published_steps, random_decoder
from benchmarks.timing import NO_TORCHAO, NOT_MEASURED
from dcdd_core.evaluation.tables import markdown_table
from dcdd_core.models.autoregressive.token_loop import cache_shape
from dcdd_core.models.backbones.flux_fill.files import FLUX_FILL_CONFIG
from dcdd_core.models.backbones.flux_fill.inference import drop_text, fold_modulations
from dcdd_core.models.checkpoints import StoredTensors
from dcdd_core.models.janus.deepseek import janus_config
from dcdd_core.models.llamagen.network import LlamaGenConfig, LlamaGenTransformer
from dcdd_core.models.vae import FLUX_VAE_CONFIG
from dcdd_core.training.vlm_cost import PUBLISHED, JanusShape
from dcdd_core.types import Condition

HEAD = ("model", "weights", "GB, computed", "GB, measured")
#: Width, MLP width, layers and heads of Janus-Pro's language models.
JANUS_PRO = {
    name: (shape.width, shape.inner, shape.layers, shape.heads)
    for name, shape in PUBLISHED.items()
    if isinstance(shape, JanusShape)
}
#: The shape of both published checkpoints, except that the grid of the second is 32 x 32.
LLAMAGEN_XL = LlamaGenConfig(
    grid=(16, 16), codes=16384, text_width=2048, text_slots=120, width=1280, layers=36, heads=20, hidden=3584
)
#: As google/flan-t5-xl's config.json has them.
FLAN_T5_XL = {
    "d_model": 2048,
    "d_kv": 64,
    "d_ff": 5120,
    "num_layers": 24,
    "num_heads": 32,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
_NOT_LOADED = ("lm_head", "model.vision_model", "model.aligner", "model.vqmodel")
_PROMPT, _CODES, _STEPS = 64, 16384, 30
#: Name prefix of a joint block: these are all alike, and larger than the single ones.
_LARGEST = "transformer_blocks.0."
_MODULATIONS = ("norm1.linear.bias", ".norm.linear.bias", "norm_out.linear.bias")
_WAYS = {"bfloat16": {}, "8-bit": {"eight_bit": True}, "streamed": {"streamed": True}}
_WAYS["8-bit, streamed"] = _WAYS["8-bit"] | _WAYS["streamed"]


def size(module: nn.Module, bytes_of: Callable[[str], int]) -> int:
    """Bytes of a module's weights; `bytes_of` gives the bytes per element of a weight by its name."""
    return sum(bytes_of(name) * weight.numel() for name, weight in module.state_dict().items())


def janus(name: str) -> JanusForConditionalGeneration:
    """A Janus-Pro of the published shape, on the meta device."""
    width, inner, layers, heads = JANUS_PRO[name]
    params = {
        "cls": "vision_head",
        "params": {"image_token_embed": width, "image_token_size": _CODES, "n_embed": width},
    }
    mlp = {"depth": 2, "n_embed": width, "projector_type": "mlp_gelu"}
    config = {
        "model_type": "multi_modality",
        "language_config": {
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "vocab_size": 102400,
        },
        "vision_config": {"cls": "CLIPVisionTower", "params": {"image_size": 384}},
        "aligner_config": {"cls": "MlpProjector", "params": mlp},
        "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": _CODES, "n_embed": 8}},
        "gen_aligner_config": {"cls": "MlpProjector", "params": mlp},
        "gen_head_config": params,
    }
    with torch.device("meta"):
        return JanusForConditionalGeneration(janus_config(config, name))


def llamagen_rows() -> list[tuple[str, str, str, str]]:
    """Rows for LlamaGen-XL, which is published for two image sizes, and for the T5 encoder that reads its captions."""
    with torch.device("meta"):
        model = LlamaGenTransformer(LLAMAGEN_XL)
        text = T5EncoderModel(T5Config(**FLAN_T5_XL))
    rows = [
        ("LlamaGen-XL, sampling, without its text encoder", "bfloat16", size(model, lambda _: 2)),
        # Counted by parameter, since its embedding has two names.
        ("flan-t5-xl's encoder, for LlamaGen and BIGFix", "bfloat16", 2 * sum(p.numel() for p in text.parameters())),
    ]
    for side in (256, 512):
        tokens, config = (side // 16) ** 2, LLAMAGEN_XL
        cache = _cache(model.language, tokens + config.text_slots)
        name = f"LlamaGen-XL, plus per image of {side} pixels: KV cache and logits"
        rows.append((name, "", cache + 4 * tokens * config.codes))
    return [(name, weights, _gigabytes(found), "-") for name, weights, found in rows]


def flux_sizes() -> dict[str, int]:
    """Bytes of FLUX.1-Fill's transformer in each way of storing it, and of parts of it."""
    with torch.device("meta"):
        flux = FluxTransformer2DModel(**FLUX_FILL_CONFIG)
    found = {"as published": size(flux, lambda _: 2)}
    drop_text(flux)
    found["without text"] = size(flux, lambda _: 2)
    modulations = sum(p.numel() for n, p in flux.named_parameters() if n.endswith(_MODULATIONS))
    found["modulations"] = 2 * _STEPS * modulations
    fold_modulations(flux, StoredTensors({}))
    inside = {f"{name}.weight" for name, part in flux.named_modules() if isinstance(part, nn.Linear)}
    eight_bit = {name for name in inside if "_blocks." in name}
    layers = [weight.numel() for name, weight in flux.state_dict().items() if name in eight_bit]
    for weights, width, bytes_of in (
        ("bfloat16", 2, lambda _: 2),
        ("8-bit", 1, lambda name: 1 if name in eight_bit else 2),
    ):
        found[f"for inference, {weights}"] = size(flux, bytes_of)
        found[f"largest block, {weights}"] = size(flux, lambda name, of=bytes_of: name.startswith(_LARGEST) * of(name))
        found[f"largest layer, {weights}"] = width * max(layers)
        found[f"ends, {weights}"] = size(flux, lambda name, of=bytes_of: 0 if "_blocks." in name else of(name))
    return found


def flux_rows() -> list[tuple[str, str, str, str]]:
    sizes = flux_sizes()
    rows = [
        ("FLUX.1-Fill transformer, as published", "bfloat16", sizes["as published"]),
        ("FLUX.1-Fill transformer without text, for training", "bfloat16", sizes["without text"]),
    ]
    for weights in ("bfloat16", "8-bit"):
        rows += [
            ("FLUX.1-Fill transformer, for inference", weights, sizes[f"for inference, {weights}"]),
            ("the same streamed block by block: its largest block", weights, sizes[f"largest block, {weights}"]),
            ("the same with placement 'low VRAM': its largest layer", weights, sizes[f"largest layer, {weights}"]),
        ]
    rows.append((f"modulations of {_STEPS} steps, in RAM", "bfloat16", sizes["modulations"]))
    return [(name, weights, _gigabytes(size), "-") for name, weights, size in rows]


def step_rows() -> list[tuple[str, str, str, str]]:
    """Peak GPU memory of one step for one image of 24 x 24 tokens, for each way of storing the weights.

    Measured with random weights that are created on the device, where the modulations are computed too.
    """
    sizes, activations = flux_sizes(), published_steps()["ours"].activations
    # A layer stored in 8 bits is cast to bfloat16 while it runs.
    lifted = 2 * sizes["largest layer, 8-bit"]
    computed = {
        "bfloat16": sizes["for inference, bfloat16"],
        "8-bit": sizes["for inference, 8-bit"] + lifted,
        "streamed": sizes["ends, bfloat16"] + sizes["largest block, bfloat16"],
        "8-bit, streamed": sizes["ends, 8-bit"] + sizes["largest block, 8-bit"] + lifted,
    }
    return [
        (
            "FLUX.1-Fill's shape, one step for one image: peak",
            way,
            _gigabytes(weights + activations),
            measured(_WAYS[way]),
        )
        for way, weights in computed.items()
    ]


@torch.no_grad()
def measured(ways: dict[str, bool]) -> str:
    if not torch.cuda.is_available():
        return NOT_MEASURED
    if ways.get("eight_bit") and not find_spec("torchao"):
        return NO_TORCHAO
    gc.collect()  # models with hooks and compiled models are reference cycles, so the last one may still be alive
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    decoder = random_decoder(card_of(dict(FLUX_FILL_CONFIG)), device="cuda", dtype=torch.bfloat16, **ways)
    step(decoder)
    return _gigabytes(torch.cuda.max_memory_allocated() - before)


@torch.no_grad()
def step(decoder: nn.Module) -> torch.Tensor:
    """One step on random noise and a random condition."""
    like = {"device": decoder.device, "dtype": decoder.dtype}
    codes, doubt = torch.randn(1, IMAGE, decoder.card.code_dim, **like), torch.rand(1, IMAGE, 4, **like)
    packed = torch.randn(1, IMAGE, decoder.transformer.config.in_channels, **like)
    decoder.prepare([1.0])
    fused = decoder.condition_tokens(Condition(codes, doubt, GRID), SIZE)
    return decoder(packed[..., :64], packed[..., 64:], fused, torch.ones(1), SIZE)


def rows() -> list[tuple[str, str, str, str]]:
    found = []
    for name in JANUS_PRO:
        model = janus(name)
        weights = size(model, lambda key: 0 if key.startswith(_NOT_LOADED) else 2)
        cache = _cache(model.model.language_model, IMAGE + _PROMPT)
        found.append((f"{name}, sampling", "bfloat16", _gigabytes(weights), "-"))
        found.append((f"{name}, plus per image: KV cache and logits", "", _gigabytes(cache + 4 * IMAGE * _CODES), "-"))
    found.append(("Janus-Pro's VQ-VAE", "float32", _gigabytes(size(model.model.vqmodel, lambda _: 4)), "-"))
    found += llamagen_rows()
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(FLUX_VAE_CONFIG))
    found += flux_rows()
    found.append(("FLUX autoencoder", "float32", _gigabytes(size(vae, lambda _: 4)), "-"))
    return [*found, *step_rows()]


def _cache(language: nn.Module, length: int) -> int:
    """Bytes of the KV cache of an image with guidance: two rows in bfloat16."""
    return 2 * math.prod(cache_shape(language, 2, length))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.{1 if size > 1e9 else 2}f}"


if __name__ == "__main__":
    print(markdown_table([HEAD, *rows()]))
