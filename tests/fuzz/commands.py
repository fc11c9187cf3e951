"""Every option of `dcdd` and `train.py`, each with values that it cannot use."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from dcdd_core.cli import train
from dcdd_core.cli.app import main, parser
from dcdd_pico.embedded import WEIGHTS
from tests.training.runs import png_folder

from .harness import DIFFERS, OK, REFUSED, SILENT, TRACEBACK, UNCLEAR, Outcome, call

PROMPT = "a small plain purple star at the top on a dotted mint ground"
NUMBERS = (
    "",
    " ",
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e400",
    str(10**30),
    "nonsense",
    "1_0",
    "٣",
    "0x10",
    "\udcff",
    "-0.0",
)
WORDS = ("", " ", "nonsense", "\udcff", "\N{PILE OF POO}", "x" * 5000)
PATHS = ("", " ", "absent", "absent/below", "folder", "fifo", "device", "empty", "text", "\udcff", "x" * 300, "loop")

MODELS = {
    "embedded": {},
    "guidance": {"--decoder": "guidance"},
    "real": {
        "--janus": str(WEIGHTS / "janus"),
        "--decoder": str(WEIGHTS / "decoder.safetensors"),
        "--vae": str(WEIGHTS / "vae"),
    },
}
"""Options that choose the models of a command. The real ones are the embedded ones, read as anybody's are."""


@dataclass(frozen=True)
class Option:
    """An option of a command.

    Attributes:
        command: the words before it, such as ("evaluate", "reconstruction").
        flag: as it is typed; None for a positional argument.
        action: argparse's.
        models: of `MODELS`, which of them the command runs with.
    """

    command: tuple[str, ...]
    flag: str | None
    action: argparse.Action
    models: str = "embedded"

    @property
    def values(self) -> tuple[str, ...]:
        if self.action.nargs == 0:
            return () if self.flag == "--compile" else ("surplus",)  # A compiler takes minutes by its nature.
        if self.action.type in (int, float) or self.action.default.__class__ in (int, float):
            return NUMBERS
        if self.action.choices is not None:
            return WORDS
        return tuple(dict.fromkeys((*PATHS, *WORDS)))


@cache
def options() -> list[Option]:
    """All options of all commands, as their parsers have them; those of `dcdd generate` and `reconstruct` with each of
    `MODELS`."""
    tops = {("dcdd",): parser(), ("train.py",): train.parser("train.py")}
    found = [option for words, top in tops.items() for option in _of(top, words)]
    others = [name for name in MODELS if name != "embedded"]
    painting = [option for option in found if option.command in (("dcdd", "generate"), ("dcdd", "reconstruct"))]
    return found + [replace(option, models=name) for name in others for option in painting]


@cache
def inputs() -> list[tuple[Option, str]]:
    """Each option with each of its values."""
    return [(option, value) for option in options() for value in option.values]


def _of(top: argparse.ArgumentParser, words: tuple[str, ...]) -> list[Option]:
    found = []
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                if below.add_help:  # `dcdd train` passes its words on
                    found += _of(below, (*words, name))
        elif not isinstance(action, argparse._HelpAction):
            found.append(Option(words, max(action.option_strings, key=len, default=None), action))
    return found


def _base(command: tuple[str, ...], models: str, out: Path) -> dict[str | None, str]:
    """The shortest sound work of a command, by option."""
    images = str(out / "images")
    training = {"--vlm": "pico", "--data": images, "--out": "run", "--steps": "1", "--batch": "1", "--samples": "0"}
    known = {
        ("dcdd", "generate"): {None: PROMPT, "--steps": "1", "--out": "out.png"},
        ("dcdd", "reconstruct"): {None: f"{images}/00.png", "--steps": "1", "--out": "out"},
        ("dcdd", "sharpen"): {None: f"{images}/00.png", "--steps": "1", "--out": "out"},
        ("dcdd", "calibrate"): {"--count": "1", "--out": "out.safetensors"},
        ("dcdd", "inspect"): {"--count": "2", "--out": "out.png"},
        ("dcdd", "demo"): {"--out": "out.png"},
        ("dcdd", "captions"): {"--vlm": str(WEIGHTS / "llamagen"), "--prompts": str(out / "prompts.txt")}
        | {"--out": "captions.safetensors"},
        ("dcdd", "evaluate", "text"): {"--prompts": str(out / "prompts.txt"), "--references": images}
        | {"--out": "out", "--steps": "1"},
        ("train.py", "train"): training | {"--precision": "no", "--warmup": "0"},
        ("train.py", "distill"): training | {"--precision": "no", "--warmup": "0", "--student-steps": "1"},
        ("train.py", "progressive"): training
        | {"--precision": "no", "--warmup": "0"}
        | {"--janus": "pico", "--width": "32", "--layers": "1", "--heads": "1"},
        ("train.py", "cache"): {"--vlm": "pico", "--data": images, "--out": "cache"},
        ("train.py", "estimate"): {},
    }
    return known.get(command, {"--out": "out", "--images": images, "--limit": "2"}) | MODELS[models]


class Commands:
    """Runs commands on the embedded models with one bad value each."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seconds: dict[tuple[tuple[str, ...], str], float] = {}
        png_folder(folder / "given" / "images", count=2, side=96)
        for k in range(2):
            (folder / "given" / "images" / f"{k:02d}.txt").write_text(PROMPT)
        (folder / "given" / "prompts.txt").write_text(f"{PROMPT}\na blue star\n")

    def run(self, number: int) -> Outcome:
        """The input of that number, of `inputs`."""
        option, bad = inputs()[number]
        allowed = self._sound(option.command, option.models)
        argv = self._argv(option, bad)
        found = self._call(argv, allowed)
        output = (self.folder / "command" / "output.txt").read_text("utf-8", "replace")
        name = " ".join(option.command)
        if option.models != "embedded":
            name += f" ({option.models})"
        verdict, said = self._judged(option, bad, found, output)
        shown = " ".join(word if len(word) < 50 else word[:20] + "..." for word in argv)
        return Outcome(
            subject=name,
            kind=f"{option.flag or option.action.dest}={bad[:20]!a}",
            seed=number,
            verdict=verdict,
            what=shown.encode("ascii", "backslashreplace").decode(),
            owner=f"cli/{option.command[1] if option.command[0] == 'dcdd' else 'train'}.py",
            said=said.encode("ascii", "backslashreplace").decode(),
        )

    def _call(self, argv: Sequence[str], more: float) -> dict:
        top = self.folder / "command" / "files"
        shutil.rmtree(top.parent, ignore_errors=True)
        top.mkdir(parents=True)
        _things(top)
        run: Callable[[list[str]], int] = main if argv[0] == "dcdd" else train.main

        def target() -> str:
            try:
                return str(run(list(argv[1:])))
            except SystemExit as error:
                return str(error.code)

        return call(target, top, more=more)

    def _sound(self, command: tuple[str, ...], models: str) -> float:
        """Seconds of processor time that the command takes without a bad value.

        Raises:
            RuntimeError: if it fails: what its bad values end in would say nothing.
        """
        if (command, models) not in self.seconds:
            option = next(found for found in options() if (found.command, found.models) == (command, models))
            argv = self._argv(option, None)
            found = self._call(argv, 60)
            if found.get("digest") != "0":
                output = (self.folder / "command" / "output.txt").read_text("utf-8", "replace")
                raise RuntimeError(f"the sound command {argv} fails: {found} {output[-2000:]}")
            self.seconds[command, models] = found["seconds"]
        return self.seconds[command, models]

    def _argv(self, option: Option, bad: str | None) -> list[str]:
        """The words of the command; without a bad value, for None, its sound work."""
        base = _base(option.command, option.models, self.folder / "given")
        given = {flag: value for flag, value in base.items() if flag is None or self._has(option.command, flag)}
        words = list(option.command)
        if bad is None:
            option = replace(option, flag="")
        else:
            given[option.flag] = bad
        if bad is not None and option.action.nargs == 0:
            given.pop(option.flag)
            words += [option.flag]
        for flag, value in given.items():
            if flag is not None:
                words += [f"{flag}={value}"] if option.flag == flag else [flag, value]
        if None in given:
            words += ["--", given[None]]
        return words

    @staticmethod
    def _has(command: tuple[str, ...], flag: str) -> bool:
        return any(found.flag == flag for found in options() if found.command == command)

    def _judged(self, option: Option, bad: str, found: dict, output: str) -> tuple[str, str]:
        if "verdict" in found:
            return found["verdict"], found["said"]
        tail = " | ".join(output.strip().splitlines()[-2:])[-400:]
        if "digest" not in found:
            return TRACEBACK, f"{found['error']}: {found['said'][:300]} ({found['trace']})"
        if "Traceback (most recent call last)" in output:
            return TRACEBACK, tail
        if found["digest"] in ("1", "2"):
            flag = option.flag or option.action.dest
            named = [flag, flag.lstrip("-"), flag.lstrip("-").replace("-", "_"), flag.lstrip("-").replace("-", " ")]
            last = output.strip().splitlines()[-1] if output.strip() else ""
            typed = bad[:40].encode("utf-8", "backslashreplace").decode()
            clear = any(name in last for name in named) or (bad.strip() and typed in last)
            return (REFUSED if clear else UNCLEAR), tail
        if found["digest"] != "0":
            return TRACEBACK, f"ended with {found['digest']}: {tail}"
        if option.action.nargs == 0:
            return OK, ""
        numeric = option.values is NUMBERS
        unlimited = option.flag == "--clip" and bad in ("inf", "1e400")
        if numeric and not unlimited and not _is_number(bad):
            return SILENT, f"{bad!r} is accepted"
        return DIFFERS, ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _things(top: Path) -> None:
    """What a path may lead to that is no file; of the case's own, so that nothing else can be harmed."""
    (top / "folder").mkdir()
    os.mkfifo(top / "fifo")
    try:
        os.mknod(top / "device", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except OSError:  # Only root makes devices.
        os.mkfifo(top / "device")
    (top / "empty").write_bytes(b"")
    (top / "text").write_text("no model\n")
    (top / "loop").symlink_to("loop")
