"""Input and output of all commands: paths that are not usable, and text that a terminal cannot show."""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dcdd_pico.embedded import VLMS


def path(text: str) -> Path:
    """An argument that is a path.

    Raises:
        argparse.ArgumentTypeError: for an empty one, which would be the working directory, and one with a null byte.
    """
    return Path(path_text(text))


def path_text(text: str) -> str:
    """Like `path`, for an argument that may also be something else, such as a pattern."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a path, got {text!r}")
    return text


class VLMOption(argparse.Action):
    """An option that takes a VLM's folder, or the name of an embedded one.

    A folder is stored as `janus`, a name as `embedded`; the other of them is None. The option may be given only once,
    under any of its names.
    """

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, dest, **options, type=path)

    def __call__(self, parser, namespace, values: Any, option_string=None):
        if namespace.janus is not None or getattr(namespace, "embedded", None) is not None:
            raise argparse.ArgumentError(self, "given twice: leave one of them out")
        name = str(values)
        namespace.janus, namespace.embedded = (None, name) if name in VLMS else (values, None)


def add_vlm_option(parser: Any, help: str) -> None:
    """Adds --vlm, which used to be called --janus.

    Args:
        parser: a parser, or a group of its options.
        help: which VLMs it takes.
    """
    parser.add_argument(
        "--vlm", "--janus", dest="janus", action=VLMOption, metavar="FOLDER", help=f"{help}; or {', '.join(VLMS)}"
    )
    parser.set_defaults(embedded=None)


def embedded_vlm(args: argparse.Namespace, default: str) -> str:
    """The folder, among the embedded models, of the embedded VLM that was named; `default` if none was."""
    return default if args.embedded is None else VLMS[args.embedded]


@contextmanager
def printable_output() -> Iterator[None]:
    """Makes sure that printing never fails while the context lasts.

    Characters that the output's encoding lacks, and bytes of file names that are not text, are escaped.
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before):
            if not stream.closed:
                stream.reconfigure(errors=errors)


def check_out(option: str, out: Path, *, folder: bool = False) -> None:
    """Refuses an output that cannot be written, before any work is done for it. Nothing is created.

    Args:
        option: as it is typed, for the message.
        folder: whether the output is a folder to write files to.

    Raises:
        ValueError: saying what is in the way.
    """
    try:
        os.lstat(out)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise ValueError(
            f"{option} {out} cannot be written ({error.strerror}): choose another name or place"
        ) from error
    if out.is_dir() and not folder:
        raise ValueError(f"{option} {out} is a folder: give the name of a file")
    if os.path.lexists(out) and folder and not out.is_dir():
        raise ValueError(f"{option} {out} is a file: give the name of a folder")
    there = out if folder else out.parent
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"{option} {out} cannot be written: {there} is not a folder")
    try:
        # Permissions alone do not tell: /proc seems to let root write.
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"{option} {out} cannot be written: you may not write to {there} ({error.strerror}); choose another place"
        ) from error
