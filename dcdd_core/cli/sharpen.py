"""`dcdd sharpen`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dcdd_pico.embedded import JANUS

from .. import registry
from ..evaluation.figures import save_image, to_image
from ..method.lcdm import map_logits
from ..pipelines.encode import encode
from ..pipelines.guided import GuidanceOptions, sharpen, token_guide
from ..types import Calibration
from . import arguments, common
from .reconstruct import names_of, read_image

_STRENGTH, _STEPS = 0.1, 8


def add(commands: Any, help: str) -> None:
    """Adds the command."""
    command = common.add_command(commands, "sharpen", run, help=help, seeded=False)
    command.add_argument("image", nargs="+", type=arguments.path, help="image files to sharpen")
    arguments.add_vlm_option(command, "a VLM (default: the embedded one)")
    command.add_argument(
        "--vae", type=arguments.path, metavar="PATH", help="an autoencoder, file or folder; with a folder in --vlm"
    )
    command.add_argument(
        "--calibration", type=arguments.path, metavar="FILE", help="of the VLM; needed with a folder in --vlm"
    )
    command.add_argument("--steps", type=int, default=_STEPS, help=f"steps of the gradient (default: {_STEPS})")
    command.add_argument(
        "--strength",
        type=float,
        default=_STRENGTH,
        metavar="ETA",
        help=f"size of the first step (default: {_STRENGTH})",
    )
    common.guide_decoder_option(command)
    command.add_argument("--side", type=int, metavar="PIXELS", help="shrink images whose longer side is more than this")
    command.add_argument(
        "--out", type=arguments.path, default=Path("out"), metavar="FOLDER", help="of the images (default: out)"
    )


def run(args: argparse.Namespace) -> None:
    """Encodes images with the VLM's tokenizer, then changes their soft VQ decode until the VLM's encoder reads the
    tokens' distributions from it again. Needs no diffusion model."""
    arguments.check_out("--out", args.out, folder=True)
    names = names_of(args.image, args.side)
    common.check_not_read([args.out / f"{name}-sharp.png" for name in names], args.image)
    options = GuidanceOptions(strength=args.strength)
    device = common.device_of(args)
    if args.janus is None:
        if args.vae is not None:
            raise ValueError("--vae goes with the folder of a VLM in --vlm; the embedded ones are used as they are")
        models = common.load_pico(device=device, with_sampler=False, vlm=arguments.embedded_vlm(args, JANUS))
        tokenizer, codec, calibration = models.tokenizer, models.codec, models.decoder.card.calibration
    else:
        if args.vae is None or args.calibration is None:
            raise ValueError(
                "with a folder in --vlm, sharpening needs --vae (such as FLUX.1's ae.safetensors) and --calibration"
            )
        tokenizer = registry.sampler_family(args.janus).load_tokenizer(str(args.janus), device=device)
        codec, calibration = registry.load_codec(args.vae, device=device), None
    if args.calibration is not None:
        calibration = Calibration.load(args.calibration)
    small = common.guide_decoder_of(args, codec)
    for path, name in zip(args.image, names):
        proxies = encode(tokenizer, read_image(path, tokenizer, args.side))
        condition = map_logits(proxies, tokenizer.codebook, calibration)
        guide = token_guide(tokenizer, codec, condition, scale=calibration.sharpness, options=options, decode=small)
        with common.bar("sharpen") as step:
            made = sharpen(guide, guide.soft, steps=args.steps, on_step=lambda done, total, _: step(done, total))
        pixels = codec.decode(codec.denormalize(made))
        before, after = (
            float(guide.agreement(one)[0]) for one in (codec.decode(codec.denormalize(guide.soft)), pixels)
        )
        print(
            f"wrote {save_image(to_image(pixels[0]), args.out / f'{name}-sharp.png')}: the encoder reads {after:.0%} "
            f"of the tokens in it, and {before:.0%} in the soft VQ decode"
        )
        if after < before:
            print("dcdd: that is less than before: choose a lower --strength", file=sys.stderr)
