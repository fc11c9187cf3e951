"""`dcdd captions`."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from dcdd_pico.embedded import VLMS

from ..evaluation.prompts import read_prompts
from ..pipelines.captions import caption_family
from . import arguments, common


def add(commands: Any, help: str) -> None:
    """Adds the command."""
    command = commands.add_parser("captions", help=help, description=run.__doc__)
    command.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: cpu)")
    command.add_argument(
        "--vlm", type=arguments.path, required=True, metavar="FOLDER", help="LlamaGen, with its text encoder"
    )
    command.add_argument(
        "--prompts", type=arguments.path, required=True, metavar="FILE", help="a prompt a line, or JSON"
    )
    command.add_argument(
        "--out",
        type=arguments.path,
        metavar="FILE",
        help="(default: captions.safetensors in the folder of --vlm, where it is read)",
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the text encoder (default: float32)",
    )
    command.add_argument("--vlm-int8", action="store_true", help="hold the text encoder's layers in 8 bits (torchao)")
    command.set_defaults(run=run, seed=0, default_of=command.get_default)


def run(args: argparse.Namespace) -> None:
    """Computes the text features of prompts once. A model folder with captions.safetensors then samples these prompts
    without its text encoder, which for LlamaGen is larger than the rest of the model. Features that are already in
    --out stay. Run the same command again to resume a stopped run."""
    if str(args.vlm) in VLMS:
        raise ValueError(f"{args.vlm} is embedded and needs no saved captions: give the folder of another LlamaGen")
    device, family = common.device_of(args), caption_family(args.vlm)
    out = args.out or family.captions_file(str(args.vlm))
    arguments.check_out("--out", out)
    prompts = [prompt.text for prompt in read_prompts(args.prompts)]
    with common.bar("captions") as step:
        new, total = family.encode_captions(
            str(args.vlm),
            prompts,
            out,
            device=device,
            dtype=getattr(torch, args.dtype),
            int8=args.vlm_int8,
            on_progress=step,
        )
    print(f"wrote {out}: {total:,} captions, {new:,} of them new" if new else f"{out} has all of these captions")
