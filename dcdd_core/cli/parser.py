"""What can be said to `dcdd`: its commands and their options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

#: Options that choose real models, and those that say how they are held, with their names in `load_models`.
OF_REAL = ("decoder", "vae", "base", "dtype")
HELD = {"janus_int8": "int8", "decoder_8bit": "eight_bit", "stream": "streamed", "compile": "compiled"}
#: Options that say how the diffusion decoder paints.
PAINTING = ("steps", "shift", "calibration", "anchor", "reads")
#: Options that say what is sampled, and how.
SAMPLING = ("calibration", "prompts", "images", "count", "batch", "guidance", "temperature", "top_k", "top_p", "seed")


def given(chosen: argparse.Namespace, *options: str) -> str:
    """Those of the options that differ from their defaults, as they are typed: "--top-k, --seed"."""
    differ = [name for name in options if getattr(chosen, name) != chosen.default_of(name)]
    return ", ".join(f"--{name.replace('_', '-')}" for name in differ)


def command_parser(description: str, *runs: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    """The parser of `dcdd`.

    Args:
        description: of the whole.
        runs: the functions of the commands, by whose names they are called; what was parsed has one as `run`, and as
            `default_of` what an option is without being given.
    """
    functions = {run.__name__: run for run in runs}
    parser = argparse.ArgumentParser(prog="dcdd", description=description)
    commands = parser.add_subparsers(required=True, metavar="command")

    models = argparse.ArgumentParser(add_help=False)
    group = models.add_argument_group("models (the embedded ones without --janus)")
    group.add_argument(
        "--janus", type=Path, metavar="FOLDER", help="Janus or Janus-Pro, transformers' or DeepSeek's layout"
    )
    group.add_argument("--decoder", type=Path, metavar="BUNDLE", help="decoder bundle; without it, only the VQ path")
    group.add_argument("--vae", type=Path, metavar="PATH", help="the decoder's autoencoder, file or folder")
    group.add_argument("--base", type=Path, metavar="PATH", help="FLUX.1-Fill, if the bundle needs it, file or folder")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32")
    group.add_argument("--janus-int8", action="store_true", help="hold the language model's layers in 8 bits (torchao)")
    group.add_argument(
        "--decoder-8bit", action="store_true", help="hold the diffusion decoder's layers in 8 bits (torchao)"
    )
    group.add_argument("--stream", action="store_true", help="keep the diffusion decoder in RAM, a block on the device")
    group.add_argument("--compile", action="store_true", help="compile the diffusion decoder's blocks")

    running = argparse.ArgumentParser(add_help=False)
    running.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: cpu)")
    running.add_argument("--seed", type=int, default=0, help="what the pictures' own seeds follow from (default: 0)")

    sampling = argparse.ArgumentParser(add_help=False)
    group = sampling.add_argument_group("sampling")
    group.add_argument("--guidance", type=float, help="classifier-free guidance (default: the decoder's, or 5)")
    group.add_argument("--temperature", type=float, default=1.0)
    group.add_argument("--top-k", type=int)
    group.add_argument("--top-p", type=float)

    decoding = argparse.ArgumentParser(add_help=False)
    decoding.add_argument("--steps", type=int, help="Euler steps of the decoder (default: the bundle's)")
    decoding.add_argument(
        "--shift", type=float, metavar="MU", help="the higher, the nearer the noise (default: the bundle's)"
    )
    decoding.add_argument("--calibration", type=Path, metavar="FILE", help="in place of the bundle's own")
    decoding.add_argument("--anchor", type=float, metavar="BETA", help="read logits anchored by this much")
    decoding.add_argument("--reads", choices=("logits", "anchored", "tokens"), help="what of the VLM to serve")

    measuring = argparse.ArgumentParser(add_help=False)
    measuring.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of results, and to go on from")
    measuring.add_argument("--by-category", action="store_true", help="by sub-folder as well, as in MJHQ-30K")
    measuring.add_argument("--limit", type=int, help="only the first, of each category with --by-category")
    measuring.add_argument("--batch", type=int, default=16, help="pictures at once (default: 16)")
    measuring.add_argument(
        "--inception", type=Path, metavar="FILE", help="weights of the FID's network (default: pico's scene reader)"
    )
    measuring.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="of the real pictures: read if it exists, else written from those that were measured",
    )

    def add(name: str, *parents, help: str, to=commands) -> argparse.ArgumentParser:
        run = functions[name]
        command = to.add_parser(name, parents=[running, *parents], help=help, description=run.__doc__)
        command.set_defaults(run=run, default_of=command.get_default)
        return command

    command = add("generate", models, sampling, decoding, help="prompts to pictures")
    command.add_argument("prompt", nargs="+")
    command.add_argument("--out", type=Path, default=Path("out/generated.png"))
    command.add_argument("--compare", action="store_true", help="write the VQ-VAE's picture as well")
    command.add_argument("--logits", type=Path, metavar="FILE", help="keep the token logits")

    command = add("reconstruct", models, decoding, help="pictures through the tokenizer and back")
    command.add_argument("image", nargs="+", type=Path)
    command.add_argument(
        "--side", type=int, metavar="PIXELS", help="shrink pictures whose longer side is more than this"
    )
    command.add_argument("--out", type=Path, default=Path("out"), metavar="FOLDER")

    command = add("calibrate", models, sampling, _material(count=100), help="fit a calibration to a VLM")
    command.add_argument("--out", type=Path, default=Path("out/calibration.safetensors"))
    command.add_argument("--fit-anchor", action="store_true", help="fit the anchor too (beyond the paper)")
    command.add_argument(
        "--samples",
        type=Path,
        metavar="FOLDER",
        help="what the VLM samples, kept to go on from: 38 MB a picture of Janus-Pro (default: beside --out)",
    )

    command = add("inspect", models, sampling, _material(count=25), help="Table 1 and Figure 6 for a VLM")
    command.add_argument("--logits", nargs="+", type=Path, metavar="FILE", help="saved token logits to look at instead")
    command.add_argument("--calibration", type=Path, metavar="FILE", help="in place of the bundle's own")
    command.add_argument("--out", type=Path, default=Path("out/top-30.png"))

    what = commands.add_parser(
        "evaluate",
        help="both decoders in numbers: tables, plots, GenEval's folders",
        description="Both decoders in numbers.",
    ).add_subparsers(required=True, metavar="what")
    command = add("reconstruction", models, decoding, measuring, help="rFID, SSIM, PSNR and LPIPS of a folder", to=what)
    command.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="pictures, in sub-folders or not")
    command.add_argument("--size", type=int, metavar="PIXELS", help="of the squares to compare (default: as painted)")
    command.add_argument("--lpips", type=Path, metavar="FILE", help="weights of LPIPS' backbone")
    command.add_argument("--keep-pictures", action="store_true", help="write the decoded pictures as well")
    command = add("text", models, sampling, decoding, measuring, help="gFID of a file of prompts, GenEval", to=what)
    command.add_argument(
        "--prompts", type=Path, metavar="FILE", help="MJHQ-30K's meta_data.json, JSON lines, or a prompt a line"
    )
    command.add_argument("--references", type=Path, metavar="FOLDER", help="the pictures to be like")
    command.add_argument(
        "--geneval", type=Path, metavar="FILE", help="evaluation_metadata.jsonl: four pictures of each of its prompts"
    )

    command = add("demo", sampling, decoding, help="both decoders side by side on one sheet")
    command.add_argument("prompt", nargs="*", help="in place of the four built-in sentences")
    command.add_argument("--out", type=Path, default=Path("out/demo.png"))
    return parser


def _material(*, count: int) -> argparse.ArgumentParser:
    """Options of what is measured; every command has its own, since parsers share the options of a parent."""
    material = argparse.ArgumentParser(add_help=False)
    material.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a prompt a line, or JSON (default: 300 that come with this; for the embedded models captions of scenes)",
    )
    material.add_argument(
        "--images", type=Path, metavar="FOLDER", help="pictures for the proxies, in sub-folders or not"
    )
    material.add_argument("--count", type=int, default=count, help=f"how many of each at most (default: {count})")
    material.add_argument("--batch", type=int, default=8, help="prompts sampled at once (default: 8)")
    return material
