"""`dcdd`: text to image, reconstruction, calibration, statistics and evaluation, on embedded models or real folders."""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Sequence

import PIL.Image
from transformers.utils import logging as transformers_logging

from ..pipelines.oom import is_out_of_memory
from . import calibrate, demo, evaluate, generate, inspect, reconstruct, sharpen
from .arguments import printable_output
from .common import check_options

COMMANDS = (generate, reconstruct, sharpen, calibrate, inspect, evaluate, demo)
_COMPILER = "install a C++ compiler, and on a GPU Triton as well, or leave out --compile"
_LESS_MEMORY = "use a smaller image, --dtype bfloat16, --janus-int8, --decoder-8bit or --stream"


@printable_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for a failure that is explained, 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["train"]:
        from .train import main as train  # Its imports take seconds, and no other command needs them.

        return train(words[1:], prog="dcdd train")
    args = parser().parse_args(words)
    args.command = shlex.join(["dcdd", *words])
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)  # whatever filters the caller has set
            # Pillow's own limit warns of images that are read here; ours refuses larger ones (`pipelines.images`).
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            warnings.showwarning = lambda message, *_: print(f"dcdd: {message}", file=sys.stderr)
            check_options(args)
            args.run(args)
    except (ValueError, OSError) as error:
        print(f"dcdd: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        from torch._dynamo.exc import TorchDynamoException  # Importing it takes longer than many a command.

        if is_out_of_memory(error):
            print(f"dcdd: out of memory: {_LESS_MEMORY}", file=sys.stderr)
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


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    found = argparse.ArgumentParser(prog="dcdd", description=__doc__)
    commands = found.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        command.add(commands)
    # For the help text: `main` passes its words on.
    commands.add_parser("train", add_help=False, help="train a decoder, encode its images, estimate what it takes")
    return found
