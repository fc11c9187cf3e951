"""Memory: GB that the published models' weights take, computed from their shapes

`python benchmarks/memory.py` prints it alone. Nothing is loaded: the networks are built on the meta device. Computed,
not measured: activations and what the driver takes come on top (ComfyUI keeps about 1 GB free for them). What the
decoder really takes for a step is measured where there is a GPU and its files are given: `--bundle FILE --base PATH`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import JanusForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.markdown import table
from dcdd_core.models.checkpoints import StoredTensors
from dcdd_core.models.deepseek import janus_config
from dcdd_core.models.flux import load_decoder
from dcdd_core.models.flux_files import FLUX_FILL_CONFIG, FLUX_VAE_CONFIG
from dcdd_core.models.flux_inference import drop_text, fold_modulations
from dcdd_core.types import Condition

HEAD = ("model", "weights", "GB")
#: Of Janus-Pro's language models: width, inner width, layers, heads.
JANUS_PRO = {"Janus-Pro-1B": (2048, 5632, 24, 16), "Janus-Pro-7B": (4096, 11008, 30, 32)}
_NOT_LOADED = ("lm_head", "model.vision_model", "model.aligner", "model.vqmodel")
_TOKENS, _PROMPT, _CODES, _STEPS = 576, 64, 16384, 30
_MODULATIONS = ("norm1.linear.bias", ".norm.linear.bias", "norm_out.linear.bias")
_LEAVES = ("weight", "bias")
_WAYS = {"bfloat16": {}, "8-bit": {"eight_bit": True}, "streamed": {"streamed": True}}
_WAYS["8-bit, streamed"] = _WAYS["8-bit"] | _WAYS["streamed"]


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


def flux_rows() -> list[tuple[str, str, str]]:
    """FLUX.1-Fill's transformer in every way that it can be held."""
    with torch.device("meta"):
        flux = FluxTransformer2DModel(**FLUX_FILL_CONFIG)
    rows = [("FLUX.1-Fill transformer, as published", "bfloat16", f"{size(flux, lambda _: 2):.1f}")]
    drop_text(flux)
    rows.append(("FLUX.1-Fill transformer without text, to be trained", "bfloat16", f"{size(flux, lambda _: 2):.1f}"))
    row_of_table = sum(p.numel() for n, p in flux.named_parameters() if n.endswith(_MODULATIONS))
    fold_modulations(flux, StoredTensors({}))
    inside = {
        f"{name}.{leaf}" for name, part in flux.named_modules() if isinstance(part, nn.Linear) for leaf in _LEAVES
    }
    eight_bit = {name for name in inside if "_blocks." in name}
    layers = [weight.numel() for name, weight in flux.state_dict().items() if name in eight_bit]
    for weights, width, bytes_of in (
        ("bfloat16", 2, lambda _: 2),
        ("8-bit", 1, lambda name: 1 if name in eight_bit else 2),
    ):
        blocks = [size(block, lambda _, width=width: width) for block in flux.transformer_blocks]
        rows += [
            ("FLUX.1-Fill transformer, to paint", weights, f"{size(flux, bytes_of):.1f}"),
            ("the same streamed block by block: its largest block", weights, f"{max(blocks):.2f}"),
            ("the same with placement 'low VRAM': its largest layer", weights, f"{width * max(layers) / 1e9:.2f}"),
        ]
    return [
        *rows,
        (f"modulations of {_STEPS} steps, in RAM", "bfloat16", f"{2 * _STEPS * row_of_table / 1e9:.2f}"),
    ]


def measured_rows(bundle: Path | None, base: Path | None) -> list[tuple[str, str, str]]:
    """The most that one step of one 24 x 24 picture takes on the GPU, modulations and activations included."""
    rows = []
    for name, ways in _WAYS.items():
        if bundle is None or not torch.cuda.is_available():
            rows.append((f"a step, {name}: peak", "", "not measured"))
            continue
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        decoder = load_decoder(bundle, base, device="cuda", dtype=torch.bfloat16, **ways)
        step(decoder)
        rows.append((f"a step, {name}: peak", "", f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"))
        del decoder
    return rows


@torch.no_grad()
def step(decoder: nn.Module) -> torch.Tensor:
    """Of noise, for a condition of noise."""
    like = {"device": decoder.device, "dtype": decoder.dtype}
    grid = (24, 24)
    height, width = (side // decoder.card.vae_factor for side in decoder.card.painted_size(grid))
    latents = (height, width)
    codes, doubt = torch.randn(1, 576, decoder.card.code_dim, **like), torch.rand(1, 576, 4, **like)
    packed = torch.randn(1, latents[0] ** 2 // 4, decoder.transformer.config.in_channels, **like)
    decoder.prepare([1.0])
    return decoder(packed, decoder.condition_tokens(Condition(codes, doubt, grid), latents), torch.ones(1), latents)


def rows(bundle: Path | None = None, base: Path | None = None) -> list[tuple[str, str, str]]:
    found = []
    for name, (width, _, layers, _) in JANUS_PRO.items():
        model = janus(name)
        weights = size(model, lambda key: 0 if key.startswith(_NOT_LOADED) else 2)
        # Keys and values of a guided picture: two rows, all layers, bfloat16.
        cache = 2 * 2 * 2 * layers * width * (_TOKENS + _PROMPT) / 1e9
        found.append((f"{name}, sampling", "bfloat16", f"{weights:.1f}"))
        found.append(
            (f"{name}, a picture on top: keys and values, logits", "", f"{cache + 4 * _TOKENS * _CODES / 1e9:.2f}")
        )
    found.append(("Janus-Pro's VQ-VAE", "float32", f"{size(model.model.vqmodel, lambda _: 4):.2f}"))
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(FLUX_VAE_CONFIG))
    found += flux_rows()
    found.append(("FLUX autoencoder", "float32", f"{size(vae, lambda _: 4):.2f}"))
    return [*found, *measured_rows(bundle, base)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", type=Path, metavar="FILE", help="a decoder bundle, to measure with")
    parser.add_argument("--base", type=Path, metavar="PATH", help="FLUX.1-Fill, if the bundle needs it")
    chosen = parser.parse_args()
    print(table(HEAD, rows(chosen.bundle, chosen.base)))


if __name__ == "__main__":
    main()
