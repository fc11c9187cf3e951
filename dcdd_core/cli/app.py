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
_LESS_MEMORY = "use a smaller image, --dtype bfloat16, --vlm-int8, --decoder-8bit or --stream"


@printable_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for a failure that is explained, 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["train"]:
        from .train import main as train

        return train(words[1:], prog="dcdd train")
    args = parser(word for word in words if word in COMMANDS).parse_args(words)
    from transformers.utils import logging as transformers_logging

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
