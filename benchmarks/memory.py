"""Memory that the published models' weights take, computed from their shapes: `python benchmarks/memory.py`.

Nothing is loaded: the networks are built on the meta device. Computed, not measured: activations and what the driver
takes come on top (ComfyUI keeps about 1 GB free for them).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import JanusForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dcdd_core.models.deepseek import janus_config
from dcdd_core.models.flux_files import FLUX_FILL_CONFIG, FLUX_VAE_CONFIG

#: Of Janus-Pro's language models: width, inner width, layers, heads.
JANUS_PRO = {"Janus-Pro-1B": (2048, 5632, 24, 16), "Janus-Pro-7B": (4096, 11008, 30, 32)}
_NOT_LOADED = ("lm_head", "model.vision_model", "model.aligner", "model.vqmodel")
_TOKENS, _PROMPT, _CODES = 576, 64, 16384


def size(module: nn.Module, bytes_of: Callable[[str], int]) -> float:
    """Gigabytes (10^9) of a module's weights, `bytes_of` a weight by name."""
    return sum(bytes_of(name) * weight.numel() for name, weight in module.state_dict().items()) / 1e9


def janus(name: str) -> JanusForConditionalGeneration:
    """The published shape."""
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


def main() -> None:
    rows = [("model", "weights", "GB")]
    for name, (width, _, layers, _) in JANUS_PRO.items():
        model = janus(name)
        weights = size(model, lambda key: 0 if key.startswith(_NOT_LOADED) else 2)
        # Keys and values of a guided picture: two rows, all layers, bfloat16.
        cache = 2 * 2 * 2 * layers * width * (_TOKENS + _PROMPT) / 1e9
        rows.append((f"{name}, sampling", "bfloat16", f"{weights:.1f}"))
        rows.append(
            (f"{name}, a picture on top: keys and values, logits", "", f"{cache + 4 * _TOKENS * _CODES / 1e9:.2f}")
        )
    rows.append(("Janus-Pro's VQ-VAE", "float32", f"{size(model.model.vqmodel, lambda _: 4):.2f}"))
    with torch.device("meta"):
        flux, vae = FluxTransformer2DModel(**FLUX_FILL_CONFIG), AutoencoderKL.from_config(dict(FLUX_VAE_CONFIG))
    linears = {f"{name}.weight" for name, part in flux.named_modules() if isinstance(part, nn.Linear)}
    eight_bit = {name for name in linears if name.split(".")[0].endswith("transformer_blocks")}
    rows.append(("FLUX.1-Fill transformer", "bfloat16", f"{size(flux, lambda _: 2):.1f}"))
    rows.append(("FLUX.1-Fill transformer", "8-bit", f"{size(flux, lambda key: 1 if key in eight_bit else 2):.1f}"))
    largest = max(weight.numel() for weight in flux.state_dict().values()) * 2 / 1e9
    rows.append(("FLUX.1-Fill transformer, 'low VRAM': its largest layer", "bfloat16", f"{largest:.2f}"))
    rows.append(("FLUX autoencoder", "float32", f"{size(vae, lambda _: 4):.2f}"))
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    print("\n".join([head, "|---|---|---|", *body]))


if __name__ == "__main__":
    main()
