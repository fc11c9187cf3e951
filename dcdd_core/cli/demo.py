"""`dcdd demo`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from einops import rearrange

from dcdd_pico.models import load_pico
from dcdd_pico.scenes import render_scene, scene_pixels

from ..evaluation.decoding import guidance_told
from ..evaluation.figures import beside, heat_map, labelled_grid, save_image
from ..models.card import DecoderCard
from ..pipelines.decode import decode_tokens
from . import arguments, common

PROMPTS = (
    "a large striped red heart in the centre on a wavy sky ground",
    "a large checked blue diamond in the centre on a dotted cream ground",
    "a large barred purple ring on the left on a plain mint ground with writing at the top",
    "a large plain green cross at the bottom left on a wavy slate ground with a small yellow circle at the top right",
)
SCENES = (4, 12, 25, 44)


def add(commands: Any, help: str) -> None:
    """Adds the command."""
    groups = common.sampling_options, common.decoding_options, common.strength_option
    command = common.add_command(commands, "demo", run, *groups, help=help)
    command.add_argument("prompt", nargs="*", help="in place of the four built-in prompts")
    command.add_argument(
        "--out", type=arguments.path, default=Path("out/demo.png"), help="sheet to write (default: out/demo.png)"
    )


def run(args: argparse.Namespace) -> None:
    """Paints four prompts and four scenes with both decoders on one sheet, with the embedded models."""
    common.check_png(args.out)
    clock = _Clock()
    models = load_pico(device=common.device_of(args))
    common.check_painting(models, args)
    clock.lap("load the embedded models")
    prompts = list(args.prompt or PROMPTS)
    common.warn_of_unknown_words(models, prompts)
    seeds = common.seeds_of(args, len(prompts))
    sampled = common.sample_tokens(models, prompts, seeds, args)
    clock.lap(f"Janus samples {len(prompts)} x {sampled.tokens.shape[1]} tokens")
    by_vq = decode_tokens(models.tokenizer, sampled)
    clock.lap("VQ-VAE decode")
    condition = common.condition_of(models, sampled, args)
    painted = common.paint(models, condition, seeds, args)
    clock.lap(f"LCDM + DCDD, {_painting(models.decoder.card, args)}")
    doubt = rearrange(1 - condition.uncertainty[..., 0], "b (h w) -> b h w", h=sampled.grid[0])
    rows = [[vq, ours, heat_map(map_, (vq.shape[1], vq.shape[2]))] for vq, ours, map_ in zip(by_vq, painted, doubt)]
    text_sheet = labelled_grid(
        rows, columns=("VQ-VAE decode", "DCDD decode", "uncertainty, 1 - p(1)"), captions=prompts, title="Text to image"
    )

    scenes = [render_scene("test", index) for index in SCENES]
    pixels = torch.cat([scene_pixels(scene.image[None], models.tokenizer.device) for scene in scenes])
    proxies = models.tokenizer.encode(pixels)
    by_vq = decode_tokens(models.tokenizer, proxies)
    condition = common.condition_of(models, proxies, args)
    painted = common.paint(models, condition, common.seeds_of(args, len(scenes)), args)
    clock.lap(f"reconstruct {len(scenes)} held-out scenes by both decoders")
    scene_sheet = labelled_grid(
        list(zip(pixels, by_vq, painted)),
        columns=("ground truth", "VQ-VAE decode", "DCDD decode"),
        captions=[scene.caption for scene in scenes],
        title="Reconstruction of held-out scenes",
    )
    save_image(beside(text_sheet, scene_sheet), args.out)
    clock.lap(f"write {args.out}")


def _painting(card: DecoderCard, args: argparse.Namespace) -> str:
    """How the diffusion decoder paints, in words."""
    options, _ = common.guidance_of(args, card)
    told = guidance_told(options.strength, card.shift if (shift := common.shift_of(args, card)) is None else shift)
    return f"{args.steps or card.steps} steps" + (f", {told}" if told else "")


class _Clock:
    """Prints how long each stage took."""

    def __init__(self):
        self.last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        print(f"{now - self.last:7.2f} s  {stage}")
        self.last = now
