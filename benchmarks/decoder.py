"""Decoding: seconds a picture of 576 image tokens, against diffusers' loop with 512 text tokens more

`python benchmarks/decoder.py` takes options of the shape and the device.

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
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.markdown import table
from benchmarks.timing import compared
from dcdd_core.method.flow import resolution_shift, timesteps
from dcdd_core.method.latents import position_ids
from dcdd_core.models.flux import DecoderCard, DistributionConditionedDecoder, load_decoder, save_bundle
from dcdd_core.models.flux_files import FLUX_FILL_CONFIG
from dcdd_core.models.flux_inference import drop_text
from dcdd_core.pipelines.decode import decode
from dcdd_core.types import Condition

HEAD = ("what", "who", "seconds", "times ours", "million parameters")
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
    sigmas = timesteps(steps, shift=resolution_shift(IMAGE))[:-1].tolist()
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


def contest(
    *,
    heads: int = 8,
    joint: int = 1,
    steps: int = 2,
    rounds: int = 5,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> list[tuple[str, ...]]:
    """Rows of a small FLUX.1-Fill, with half as many joint blocks as single ones."""
    torch.manual_seed(0)
    card = card_of(
        {**FLUX_FILL_CONFIG, "num_layers": joint, "num_single_layers": 2 * joint, "num_attention_heads": heads}
    )
    kind = {"device": device, "dtype": dtype}
    transformer = FluxTransformer2DModel(**card.base_config).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "decoder.safetensors"
        save_bundle(path, DistributionConditionedDecoder(transformer, card).to(**kind), dtype=dtype)
        decoder = load_decoder(path, compiled=compiled, **kind)
        if compiled:
            transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
        condition = Condition(torch.randn(1, IMAGE, 8), torch.rand(1, IMAGE, 4), GRID)
        functions = {
            "ours": lambda: decode(decoder, NoAutoencoder(), condition, seeds=[0], steps=steps),
            "diffusers": by_diffusers(transformer, steps),
        }
        how = f"{steps} steps of {joint} + {2 * joint} blocks of width {128 * heads}, {dtype} on {device}"
        found = compared(how + (", compiled" if compiled else ""), functions, rounds)
    held = {"ours": decoder, "diffusers": transformer}
    return [(*row, f"{sum(p.numel() for p in held[row[1]].parameters()) / 1e6:.1f}") for row in found]


def counted() -> list[tuple[str, ...]]:
    theirs, ours = published_arithmetic()
    what = "a step of FLUX.1-Fill's shape, counted"
    return [
        (what, "ours", f"{ours:.2f} TFLOP", "1.00", "-"),
        (what, "diffusers", f"{theirs:.2f} TFLOP", f"{theirs / ours:.2f}", "-"),
    ]


def rows() -> list[tuple[str, ...]]:
    return [*contest(), *counted()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--heads", type=int, default=8, help="of 128 channels (default: 8; FLUX.1: 24)")
    parser.add_argument("--joint", type=int, default=1, help="joint blocks, and half the single ones (default: 1)")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compiled", action="store_true", help="both run their blocks compiled")
    chosen = parser.parse_args()
    found = contest(**{**vars(chosen), "dtype": getattr(torch, chosen.dtype)})
    print(table(HEAD, [*found, *counted()]))


if __name__ == "__main__":
    main()
