"""Our decoding against diffusers' loop with 512 text tokens, 576 image tokens each: `python benchmarks/decoder.py`.

The weights are random and the same for both, the shape is FLUX.1-Fill's in small: one joint block to two single ones,
heads of 128 channels. Theirs is what `FluxFillPipeline` does a step: the whole transformer, and its scheduler. Ours is
`pipelines.decode`: the adapter, then the folded decoder and Euler's steps, without an autoencoder; the schedule's table
is there from the first, uncounted picture. Both take turns in one run. At the published shape only the arithmetic is
compared, counted on the meta device. In small attention is a larger part of it, which favours the shorter sequence.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dcdd_core.method.flow import timesteps
from dcdd_core.method.latents import position_ids
from dcdd_core.models.flux import DecoderCard, DistributionConditionedDecoder, load_decoder, save_bundle
from dcdd_core.models.flux_files import FLUX_FILL_CONFIG
from dcdd_core.models.flux_inference import drop_text
from dcdd_core.pipelines.decode import decode
from dcdd_core.types import Condition

TEXT, GRID, SIZE = 512, (24, 24), (48, 48)
IMAGE = GRID[0] * GRID[1]


class NoAutoencoder:
    """Latents of zeros, and latents for pixels: what is timed is the transformer."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.new_zeros(len(pixels), 16, *SIZE)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def card_of(config: dict) -> DecoderCard:
    return DecoderCard(base="random", base_config=config, tokenizer="", codebook="", code_dim=8, width=128)


def step_by_diffusers(model: FluxTransformer2DModel, x: torch.Tensor, given: torch.Tensor, t: torch.Tensor):
    """Velocity of x [B, N, 64] at the times t [B], as the pipeline asks for it."""
    return model(
        hidden_states=torch.cat([x, given], dim=2),
        timestep=t,
        guidance=torch.full_like(t, 30.0),
        pooled_projections=x.new_zeros(len(x), model.config.pooled_projection_dim),
        encoder_hidden_states=x.new_zeros(len(x), TEXT, model.config.joint_attention_dim),
        txt_ids=x.new_zeros(TEXT, 3),
        img_ids=position_ids(*SIZE).to(x),
        return_dict=False,
    )[0]


def by_diffusers(model: FluxTransformer2DModel, steps: int) -> Callable[[], torch.Tensor]:
    scheduler = FlowMatchEulerDiscreteScheduler()
    sigmas = timesteps(steps, image_tokens=IMAGE)[:-1].tolist()
    given = torch.zeros(1, IMAGE, model.config.in_channels - 64, device=model.device, dtype=model.dtype)

    @torch.no_grad()
    def run() -> torch.Tensor:
        scheduler.set_timesteps(sigmas=sigmas, device=model.device)
        x = torch.randn(1, IMAGE, 64).to(given)
        for t in scheduler.timesteps:
            x = scheduler.step(step_by_diffusers(model, x, given, t[None] / 1000), t, x, return_dict=False)[0]
        return x

    return run


def published_arithmetic() -> tuple[float, float]:
    """Tera floating-point operations of a step at FLUX.1-Fill's shape: diffusers', ours."""
    with torch.device("meta"), torch.no_grad():
        transformer = FluxTransformer2DModel(**FLUX_FILL_CONFIG)
        decoder = DistributionConditionedDecoder(transformer, card_of(dict(FLUX_FILL_CONFIG)))
        x, given, t = torch.zeros(1, IMAGE, 64), torch.zeros(1, IMAGE, 320), torch.ones(1)
        with FlopCounterMode(display=False) as theirs:
            step_by_diffusers(transformer, x, given, t)
        drop_text(transformer)
        with FlopCounterMode(display=False) as ours:
            decoder(torch.cat([x, given], 2), torch.zeros(1, IMAGE, transformer.inner_dim), t, SIZE)
    return theirs.get_total_flops() / 1e12, ours.get_total_flops() / 1e12


def alternating(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` times in turn after one that does not count, so that all meet the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--heads", type=int, default=8, help="of 128 channels (default: 8; FLUX.1: 24)")
    parser.add_argument("--joint", type=int, default=1, help="joint blocks, and half the single ones (default: 1)")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compiled", action="store_true", help="both run their blocks compiled")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    blocks = {"num_layers": chosen.joint, "num_single_layers": 2 * chosen.joint, "num_attention_heads": chosen.heads}
    card = card_of({**FLUX_FILL_CONFIG, **blocks})
    kind = {"device": chosen.device, "dtype": getattr(torch, chosen.dtype)}
    transformer = FluxTransformer2DModel(**card.base_config).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "decoder.safetensors"
        save_bundle(path, DistributionConditionedDecoder(transformer, card).to(**kind), dtype=kind["dtype"])
        decoder = load_decoder(path, compiled=chosen.compiled, **kind)
        if chosen.compiled:
            transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
        condition = Condition(torch.randn(1, IMAGE, 8), torch.rand(1, IMAGE, 4), GRID)
        runs = {
            "diffusers": by_diffusers(transformer, chosen.steps),
            "ours": lambda: decode(decoder, NoAutoencoder(), condition, seeds=[0], steps=chosen.steps),
        }
        seconds = alternating(runs, chosen.repeats)
    print(
        f"random weights, {chosen.joint} + {2 * chosen.joint} blocks of width {128 * chosen.heads}, {chosen.dtype} on "
        f"{chosen.device}, {torch.get_num_threads()} threads, {chosen.steps} steps, median of {chosen.repeats}"
    )
    for name, tokens in (("diffusers", f"{IMAGE} + {TEXT}"), ("ours", f"{IMAGE}")):
        held = sum(p.numel() for p in (transformer if name == "diffusers" else decoder).parameters())
        print(f"  {name:<10} {median(seconds[name]):8.3f} s a picture, {tokens} tokens, {held / 1e6:.1f} M parameters")
    ratios = [theirs / ours for theirs, ours in zip(seconds["diffusers"], seconds["ours"])]
    print(f"  ratio {median(ratios):.2f} (of each turn: {', '.join(f'{ratio:.2f}' for ratio in ratios)})")
    theirs, ours = published_arithmetic()
    print(f"FLUX.1-Fill's shape, counted: {theirs:.2f} and {ours:.2f} TFLOP a step, ratio {theirs / ours:.2f}")


if __name__ == "__main__":
    main()
