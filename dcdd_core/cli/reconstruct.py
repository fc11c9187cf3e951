"""`dcdd reconstruct`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..evaluation.figures import save_image, to_image
from ..evaluation.image_folder import open_image
from ..pipelines.decode import decode_tokens
from ..pipelines.encode import encode
from ..pipelines.images import to_pixels, to_tensor
from ..protocols import ImageTokenizer
from . import arguments, common

_MOST_TOKENS = 64 * 64


def add(commands: Any, help: str) -> None:
    """Adds the command."""
    groups = common.model_options, common.decoding_options, common.guidance_options
    command = common.add_command(commands, "reconstruct", run, *groups, help=help)
    command.add_argument("image", nargs="+", type=arguments.path, help="image files to encode")
    command.add_argument(
        "--prompt", dest="prompt_of_base", default="", metavar="TEXT", help="what the pipeline in --base is told"
    )
    command.add_argument("--side", type=int, metavar="PIXELS", help="shrink images whose longer side is more than this")
    command.add_argument(
        "--out", type=arguments.path, default=Path("out"), metavar="FOLDER", help="of the images (default: out)"
    )


def run(args: argparse.Namespace) -> None:
    """Encodes images with the tokenizer and decodes them with both decoders."""
    arguments.check_out("--out", args.out, folder=True)
    names = names_of(args.image, args.side)
    written = [args.out / f"{name}-{suffix}.png" for name in names for suffix in ("vq", "dcdd")]
    common.check_not_read(written, args.image)
    models = common.load(args, with_sampler=False)
    common.check_painting(models, args)
    pipeline = common.pipeline_of(args)
    if pipeline is None and args.prompt_of_base:
        raise ValueError("--prompt is what the pipeline in --base is told, and there is none: leave it out")
    for path, name in zip(args.image, names):
        proxies = encode(models.tokenizer, read_image(path, models.tokenizer, args.side))
        results = {"vq": decode_tokens(models.tokenizer, proxies)}
        if pipeline is not None:
            prompts, seeds = [args.prompt_of_base], common.seeds_of(args, 1)
            results["dcdd"] = common.paint_with(pipeline, models, proxies, prompts, seeds, args)
        elif models.decoder is not None:
            condition = common.condition_of(models, proxies, args)
            results["dcdd"] = common.paint(models, condition, common.seeds_of(args, 1), args)
        for suffix, pixels in results.items():
            print(f"wrote {save_image(to_image(pixels[0]), args.out / f'{name}-{suffix}.png')}")


def names_of(images: list[Path], side: int | None) -> list[str]:
    """The names of the results, once all images are known to be readable.

    Raises:
        ValueError: for two images of the same name, one that cannot be read, and a side below 1 pixel.
    """
    names = [path.stem for path in images]
    if len(set(names)) < len(names):
        raise ValueError("two of the images have the same name: their results would overwrite each other; run one each")
    if side is not None and side < 1:
        raise ValueError(f"--side must be at least 1 pixel, best the VLM's own size; got {side}")
    for path in images:
        open_image(path)  # Names an image that cannot be read before minutes of work.
    return names


def read_image(path: Path, tokenizer: ImageTokenizer, side: int | None = None) -> torch.Tensor:
    """An image file as pixels [1, 3, H, W], centre-cropped to a multiple of the tokenizer's factor.

    Args:
        side: larger images are shrunk until their longer side has this many pixels.

    Raises:
        ValueError: for an image that cannot be read, is smaller than one token, or has more than 64 x 64 tokens.
    """
    image = open_image(path)
    if side is not None:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    f = tokenizer.factor
    h, w = image.height // f, image.width // f
    if h == 0 or w == 0:
        raise ValueError(f"{path} is {image.width} x {image.height}, smaller than one {f}-pixel token: enlarge it")
    if h * w > _MOST_TOKENS:
        raise ValueError(f"{path} would be {h} x {w} tokens, more than {_MOST_TOKENS}: shrink it with --side PIXELS")
    left, top = (image.width - w * f) // 2, (image.height - h * f) // 2
    cropped = image.crop((left, top, left + w * f, top + h * f))
    return to_pixels(to_tensor(cropped)[None], tokenizer.device)
