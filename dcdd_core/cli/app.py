"""`dcdd`: text to image, reconstruction, calibration, statistics and evaluation, on embedded models or real folders."""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType

import PIL.Image

from .arguments import printable_output

#: What `--help` says about each command, by name. A command's module, of the same name, is imported when it is needed:
#: torch, transformers and diffusers take seconds, which neither a help text nor another command should spend.
COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "generate": "generate images from prompts",
        "reconstruct": "encode images and decode them with both decoders",
        "sharpen": "encode images and sharpen their VQ-VAE decode, without a diffusion model",
        "calibrate": "fit a calibration to a VLM",
        "inspect": "print the paper's Table 1 and draw its Figure 6 for a VLM",
        "captions": "compute text features of prompts, which replace LlamaGen's text encoder",
        "evaluate": "measure both decoders: tables, plots, GenEval's folders",
        "demo": "compare both decoders side by side on one sheet",
    }
)
_COMPILER = "install a C++ compiler, and on a GPU Triton as well, or leave out --compile"


@printable_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for a failure that is explained, 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["train"]:
        from .train import main as train

        return train(words[1:], prog="dcdd train")
    args = parser(word for word in words if word in COMMANDS).parse_args(words)
    from transformers.utils import logging as transformers_logging

    from ..models.int8 import NeedsTorchao
    from ..pipelines.oom import is_out_of_memory
    from .common import check_options

    args.command = shlex.join(["dcdd", *words])
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)  # whatever filters the caller has set
            # Pillow's own limit warns about images that are read here; ours refuses larger ones (`pipelines.images`).
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            warnings.showwarning = lambda message, *_: print(f"dcdd: {message}", file=sys.stderr)
            check_options(args)
            args.run(args)
    except NeedsTorchao as error:
        needs = f"{' and '.join(_eight_bits(args))} needs torchao ({error.__cause__})"
        print(f"dcdd: {needs}: pip install torchao, or leave it out", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"dcdd: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        from torch._dynamo.exc import TorchDynamoException  # Importing it takes longer than many a command.

        if is_out_of_memory(error):
            print(f"dcdd: out of memory: {_less_memory(args)}", file=sys.stderr)
        elif isinstance(error, TorchDynamoException):
            reason = str(error).splitlines()[0][:200]
            print(f"dcdd: --compile failed ({reason}): {_COMPILER}", file=sys.stderr)
        else:
            raise
        return 1
    except KeyboardInterrupt:
        print("dcdd: stopped", file=sys.stderr)
        return 130
    return 0


def _eight_bits(args: argparse.Namespace) -> list[str]:
    """The options that hold weights in 8 bits and were given."""
    held = vars(args)
    options = {"janus_int8": "--vlm-int8", "vlm_int8": "--vlm-int8", "decoder_8bit": "--decoder-8bit"}
    return [option for name, option in options.items() if held.get(name)]


def _less_memory(args: argparse.Namespace) -> str:
    """What takes less memory: those of the command's options that have an effect with these arguments."""
    from .common import guided

    held, ways = vars(args), []
    pipeline = guided(args) and held.get("base") is not None
    # The embedded models are used as they are.
    real = held.get("janus") is not None
    samples, paints = real and "temperature" in held, real and held.get("decoder") is not None and not guided(args)
    encodes = "vlm_int8" in held
    if "side" in held:
        ways.append("a smaller --side")
    if pipeline:
        ways.append("a smaller --paint-side")
    if (samples or paints or pipeline or encodes) and held.get("dtype") in (None, "float32"):
        ways.append("--dtype bfloat16")
    if (samples and not args.janus_int8) or (encodes and not args.vlm_int8):
        ways.append("--vlm-int8")
    if paints and not args.decoder_8bit:
        ways.append("--decoder-8bit")
    if paints and not args.stream and not args.compile:
        ways.append("--stream")
    if not args.device.startswith("cpu"):
        ways.append("--device cpu")
    return "close other programs" + (f", or use {' or '.join(ways)}" if ways else "")


def parser(whole: Iterable[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """The parser of all commands; only those in `whole` get their options."""
    found = argparse.ArgumentParser(prog="dcdd", description=__doc__)
    commands = found.add_subparsers(required=True, metavar="command")
    whole = set(whole)
    for name, help in COMMANDS.items():
        if name in whole:
            import_module(f".{name}", __package__).add(commands, help)
        else:
            commands.add_parser(name, help=help)
    # Only for the help text: `main` passes the words of this command on.
    commands.add_parser("train", add_help=False, help="train a decoder, encode its images, estimate what it takes")
    return found
