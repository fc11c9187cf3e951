"""`dcdd generate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..evaluation.stage_sheet import stage_sheet
from ..evaluation.tables import stages_table
from ..method.progressive import Staged
from ..pipelines.decode import decode_tokens
from ..pipelines.load import Models
from ..pipelines.oom import one_by_one
from . import arguments, common


def add(commands: Any, help: str) -> None:
    """Adds the command."""
    groups = (
        common.model_options,
        common.sampling_options,
        common.progressive_options,
        common.decoding_options,
        common.guidance_options,
    )
    command = common.add_command(commands, "generate", run, *groups, help=help)
    command.add_argument("prompt", nargs="+", help="what to draw; an image for each prompt")
    command.add_argument(
        "--out",
        type=arguments.path,
        default=Path("out/generated.png"),
        help="image to write (default: out/generated.png)",
    )
    command.add_argument("--compare", action="store_true", help="write the VQ-VAE's image as well")
    command.add_argument("--logits", type=arguments.path, metavar="FILE", help="save the token logits")
    command.add_argument(
        "--stages",
        type=arguments.path,
        metavar="PNG",
        help="draw what each pass revealed and rewrote, and print how many tokens; for samplers that work in passes",
    )


def run(args: argparse.Namespace) -> None:
    """Generates images from prompts."""
    common.check_png(args.out)
    if args.stages is not None:
        common.check_png(args.stages, "--stages")
    if args.logits is not None:
        arguments.check_out("--logits", args.logits)
    common.check_distinct(_written(args))
    models = common.load(args)
    common.check_painting(models, args, "compare")
    common.sampling_of(models, args)  # Raises its errors before a pipeline is loaded.
    pipeline = common.pipeline_of(args)
    common.warn_of_unknown_words(models, args.prompt)
    seeds = common.seeds_of(args, len(args.prompt))
    if args.stages is None:
        token_logits = common.sample_tokens(models, args.prompt, seeds, args, report=print)
    else:
        staged = common.sample_in_stages(models, args.prompt, seeds, args, report=print)
        token_logits = staged.token_logits
        print(stages_table(staged.stages))
        common.write_sheets(_sheets(models, staged, args.prompt), args.stages)
    if args.logits is not None:
        token_logits.save(args.logits)
        print(f"wrote {args.logits}")
    by_vq = decode_tokens(models.tokenizer, token_logits)
    if models.decoder is None and pipeline is None:
        common.write_images(by_vq, args.out, "")
        return
    if pipeline is not None:
        painted = common.paint_with(pipeline, models, token_logits, args.prompt, seeds, args)
    else:
        painted = common.paint(models, common.condition_of(models, token_logits, args), seeds, args)
    common.write_images(painted, args.out, "")
    if args.compare:
        common.write_images(by_vq, args.out, "-vq")


def _written(args: argparse.Namespace) -> dict[str, list[Path]]:
    """Each option -> the files that it writes."""
    count = len(args.prompt)
    written = {"--out": common.image_paths(count, args.out)}
    if args.compare:
        written["--compare"] = common.image_paths(count, args.out, "-vq")
    if args.stages is not None:
        written["--stages"] = common.image_paths(count, args.stages)
    if args.logits is not None:
        written["--logits"] = [args.logits]
    return written


def _sheets(models: Models, staged: Staged, prompts: Sequence[str]) -> list[Image.Image]:
    """A contact sheet of the passes for each image; one pass is decoded at a time, since there may be many."""
    grid = staged.token_logits.grid

    def decoded(tokens: torch.Tensor) -> torch.Tensor:
        def one(k: int) -> torch.Tensor:
            return models.tokenizer.decode_tokens(tokens[k : k + 1], grid).cpu()

        return torch.cat(list(one_by_one(one, len(tokens))))

    return [stage_sheet(staged.stages, decoded, grid, row=i, title=prompt) for i, prompt in enumerate(prompts)]
