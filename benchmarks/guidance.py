"""Distribution guidance: a gradient beside a step of the diffusion model, counted at FLUX.1's shape, measured on pico

`python -m benchmarks guidance` prints this table alone. Counted on the meta device, for one image in float32: the TFLOP
of a step of FLUX.1 with 512 text tokens, those of a gradient (forwards and backwards through the latent decoder and
Janus' VQ encoder), and the tensors that exist at once. With tiles, the image is decoded once more. The VQ encoder sees
384 x 384 pixels, whatever the image's size. Not counted: the cosines with 16384 codes, 0.2 GFLOP at 24 x 24 tokens.
Measured: seconds, and the allocator's peak.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flux import TEXT
from benchmarks.peak import Peak, peak
from benchmarks.targets import Target
from benchmarks.timing import alternating
from dcdd_core import registry
from dcdd_core.method.latents import position_ids
from dcdd_core.method.lcdm import map_logits
from dcdd_core.models.backbones.flux_fill.files import FLUX_FILL_CONFIG
from dcdd_core.pipelines.decode import canvas_of, paint
from dcdd_core.pipelines.encode import encode
from dcdd_core.pipelines.guided import GuidanceOptions, token_guide
from dcdd_core.pipelines.load import Models
from dcdd_core.pipelines.tiles import decode_in_tiles, gradient_at_once, gradient_in_tiles
from dcdd_core.protocols import ImageTokenizer, LatentCodec

HEAD = (
    "what",
    "step",
    "gradient",
    "gradient / step",
    "gradient, GB",
    "tiles, latents a side",
    "GB in tiles",
    "tiles / whole",
)
#: Sides of the images in pixels, and side of the tiles in latent positions.
SIZES, TILE = (384, 512, 1024), 32
_PICO = "pico (CPU, float32), seconds"

TARGETS = [
    Target(
        row=(f"FLUX.1's shape, {side} px, TFLOP",),
        column="gradient / step",
        relation="at most",
        bound=0.35,
        source="chosen",
    )
    for side in SIZES
] + [
    Target(
        row=(f"FLUX.1's shape, {SIZES[-1]} px, TFLOP",),
        column="tiles / whole",
        relation="at most",
        bound=0.5,
        source="chosen",
    )
]


def step_flops(config: Mapping[str, Any], side: int, *, factor: int = 8, text: int = TEXT) -> int:
    """FLOPs of one step of a text-to-image FLUX transformer for an image of this side."""
    grid = side // factor
    with torch.device("meta"), torch.no_grad():
        transformer = FluxTransformer2DModel(**{**config, "in_channels": config["out_channels"]})
        length, t, like = (grid // 2) ** 2, torch.ones(1), {"dtype": torch.float32}
        packed = torch.zeros(1, length, transformer.config.in_channels, **like)
        words = torch.zeros(1, text, transformer.config.joint_attention_dim, **like)
        pooled = torch.zeros(1, transformer.config.pooled_projection_dim, **like)
        places = position_ids(grid, grid).to("meta")
        with FlopCounterMode(display=False) as counted:
            transformer(packed, words, pooled, t, places, torch.zeros(text, 3), t, return_dict=False)
    return counted.get_total_flops()


def gradient_cost(
    codec: LatentCodec, tokenizer: ImageTokenizer, side: int, *, tile: int | None = None
) -> tuple[int, int]:
    """FLOPs of one gradient and the most bytes that it holds, for networks on the meta device.

    The steps are those of `TokenGuide.gradient`, which cannot run there since it checks values.
    """
    seen = tuple(n * tokenizer.factor for n in tokenizer.grid)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return codec.model.decode(codec.denormalize(latents)).sample

    z = torch.zeros(1, codec.channels, side // codec.factor, side // codec.factor, device="meta")

    def by_pixels(pixels: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            pixels = pixels.detach().requires_grad_()
            # FlopCounterMode's hooks do not take a leaf as the input of a module.
            read = pixels * 1 if tuple(pixels.shape[2:]) == seen else F.interpolate(pixels, seen, mode="bilinear")
            (gradient,) = torch.autograd.grad(tokenizer.features(read).sum(), pixels)
        return gradient

    with FlopCounterMode(display=False) as counted, Peak() as held:
        if tile is None:
            gradient_at_once(decode, z, by_pixels)
        else:
            gradient_in_tiles(decode, z, by_pixels(decode_in_tiles(decode, z, None)), tile)
    return counted.get_total_flops(), held.peak


def counted(
    config: Mapping[str, Any], codec: LatentCodec, tokenizer: ImageTokenizer, side: int, tile: int, *, name: str
) -> tuple[str, ...]:
    """A row of numbers from shapes alone."""
    step = step_flops(config, side, factor=codec.factor) / 1e12
    flops, whole = gradient_cost(codec, tokenizer, side)
    _, tiled = gradient_cost(codec, tokenizer, side, tile=tile)
    return _row(f"{name}, {side} px, TFLOP", step, flops / 1e12, whole, tile, tiled)


def measured(models: Models, pixels: torch.Tensor, tile: int, *, name: str, steps: int = 4, rounds: int = 5):
    """A row of numbers from a run: seconds of a step without guidance, and what guidance adds to it."""
    calibration = models.decoder.card.calibration
    condition = map_logits(encode(models.tokenizer, pixels), models.tokenizer.codebook, calibration)
    guide = token_guide(
        models.tokenizer,
        models.codec,
        condition,
        scale=calibration.sharpness,
        options=GuidanceOptions(strength=0.2, pull=0),
        size=models.decoder.painted_size(condition.grid),
    )
    canvas = canvas_of(models.codec, models.decoder, condition)

    def painted(guide):
        return lambda: paint(models.decoder, models.codec, condition, canvas, seeds=[0], steps=steps, guide=guide)

    seconds = alternating({"plain": painted(None), "guided": painted(guide)}, rounds)
    plain = statistics.median(seconds["plain"]) / steps
    added = statistics.median(g - p for g, p in zip(seconds["guided"], seconds["plain"])) / steps
    whole, tiled = (peak(lambda g=g: g.gradient(g.soft), False) for g in (guide, replace(guide, tile=tile)))
    return _row(name, plain, added, whole, tile, tiled)


def _row(name: str, step: float, gradient: float, whole: int, tile: int, tiled: int) -> tuple[str, ...]:
    sizes = f"{whole / 1e9:.3g}", str(tile), f"{tiled / 1e9:.3g}", f"{tiled / whole:.2f}"
    return (name, f"{step:.3g}", f"{gradient:.3g}", f"{gradient / step:.2f}", *sizes)


def rows() -> list[tuple[str, ...]]:
    from dcdd_pico.models import load_pico
    from dcdd_pico.scenes import render_scene, scene_pixels

    codec, tokenizer = registry.codecs()[0].published(), registry.samplers()[0].published_tokenizer()
    codec.model.requires_grad_(False)  # As when loaded: activations that only weights' gradients need are not held.
    found = [counted(FLUX_FILL_CONFIG, codec, tokenizer, side, TILE, name="FLUX.1's shape") for side in SIZES]
    pixels = scene_pixels(render_scene("calibration", 0).image[None], "cpu")
    return [*found, measured(load_pico(with_sampler=False), pixels, 12, name=_PICO)]
