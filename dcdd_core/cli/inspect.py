"""`dcdd inspect`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import registry
from ..evaluation.decoding import guidance_told
from ..evaluation.figures import save_image, top_curve
from ..evaluation.tables import statistics_table
from ..method.statistics import describe_logits
from ..models.card import DecoderCard
from ..pipelines.calibrate import Proxies, compared
from ..pipelines.load import Models
from ..types import Calibration, TokenLogits
from . import arguments, common


def add(commands: Any, help: str) -> None:
    """Adds the command."""
    groups = common.model_options, common.sampling_options, common.material_options(count=25)
    command = common.add_command(commands, "inspect", run, *groups, help=help)
    command.add_argument(
        "--logits", nargs="+", type=arguments.path, metavar="FILE", help="saved token logits to describe instead"
    )
    command.add_argument("--calibration", type=arguments.path, metavar="FILE", help="in place of the bundle's own")
    command.add_argument(
        "--out", type=arguments.path, default=Path("out/top-30.png"), help="plot to write (default: out/top-30.png)"
    )


def run(args: argparse.Namespace) -> None:
    """Prints the paper's Table 1 and draws its Figure 6."""
    common.check_png(args.out)
    if args.logits:
        idle = common.given(args, *common.OF_REAL, *common.HELD, *common.SAMPLING)
        if idle:
            raise ValueError(f"{idle} would do nothing: --logits are described as they were saved; leave it out")
        codebook = common.load(args, with_sampler=False).tokenizer.codebook
        columns = {str(path): describe_logits(TokenLogits.load(path), codebook) for path in args.logits}
    else:
        calibration = None if args.calibration is None else Calibration.load(args.calibration)
        if args.janus is not None:
            registry.sampler_family(args.janus)
        prompts, files = common.calibration_material(args)
        models = common.load(args)
        if calibration is None and models.decoder is not None:
            calibration = models.decoder.card.calibration
        proxies = Proxies(models.tokenizer, common.material_pixels(models, files, args))
        if models.decoder is not None:
            print(served_as(models.decoder.card))
        columns = compared(models.sampler.name, _sampled(models, prompts, args), proxies, calibration)
    print(statistics_table(columns))
    print(f"wrote {save_image(top_curve(columns), args.out)}")


def served_as(card: DecoderCard) -> str:
    """One line of text that says how a decoder paints by default."""
    guidance = card.distribution_guidance
    told = "" if guidance is None else guidance_told(guidance.strength, guidance.shift)
    guided = told or "no distribution guidance"
    shift = "the backbone's shift" if card.shift is None else f"shift {card.shift:g}"
    if card.condition_guidance != 1:
        guided = f"condition guidance of {card.condition_guidance:g}, {guided}"
    taught = "" if card.distilled is None else f" (a student of {card.distilled.teacher_steps})"
    return f"decoder: {card.variant}, {card.resolution} px, {card.steps} steps{taught}, {shift}, {guided}"


def _sampled(models: Models, prompts: Sequence[str], args: argparse.Namespace) -> Iterator[TokenLogits]:
    """Token logits of many prompts, a batch at a time."""
    seeds = common.seeds_of(args, len(prompts))
    for k in range(0, len(prompts), args.batch):
        yield common.sample_tokens(models, prompts[k : k + args.batch], seeds[k : k + args.batch], args)
