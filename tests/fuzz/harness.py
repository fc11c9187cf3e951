"""Runs one input in a process of its own, within limits, and says what came of it."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import mutations
from .subjects import SUBJECTS, Subject

SECONDS, WALL, LONGEST, MEMORY = 10, 10, 200, 2 * 2**30
"""Seconds of processor time beyond what sound work takes, of waiting without any, and of both on a busy machine; bytes
beyond what the process began with."""

OK, DIFFERS, REFUSED, UNCLEAR = "ok", "other data", "clear error", "unclear error"
TRACEBACK, SILENT, HANG, GREEDY = "traceback", "silent wrong result", "over 10 s", "over 2 GB"
FAILURES = (TRACEBACK, SILENT, HANG, GREEDY)
CLASSES = (OK, DIFFERS, REFUSED, UNCLEAR, *FAILURES)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of an input.

    Attributes:
        subject, kind, seed: which input; `python -m tests.fuzz --replay SUBJECT KIND SEED` runs it again.
        verdict: one of `CLASSES`.
        what: the damage, or the command.
        said: the error's words, or the end of its traceback.
    """

    subject: str
    kind: str
    seed: int
    verdict: str
    what: str
    owner: str
    said: str = ""


class Failure(Exception):
    """Raised by a call's target for an outcome that is no exception of the code under test."""


def call(target: Callable[[], str], folder: Path, *, more: float = 0.0) -> dict:
    """The result of `target()` in a forked process whose working directory is `folder`.

    Args:
        more: seconds of processor time that sound work takes, beside `SECONDS`.

    Returns:
        "digest" of a target that returned, or "error", "said", "own" (raised by this repository's code) and "trace" of
        one that raised; or "verdict", if a limit ended it. "seconds" of processor time.
    """
    result = folder.parent / "result.json"
    result.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _child(target, folder, result, SECONDS + more)
    began = moved = time.monotonic()
    status, spent = None, 0
    while status is None:
        done, code, used = os.wait4(child, os.WNOHANG)
        now = time.monotonic()
        if done:
            status = code
        elif now - moved > WALL or now - began > LONGEST:
            os.killpg(child, signal.SIGKILL)
            os.wait4(child, 0)
            return {"verdict": HANG, "said": f"not done after {now - began:.0f} s"}
        else:
            # On a busy machine a process that works may take long; one that waits does no work.
            if (ticks := _ticks(child)) > spent:
                spent, moved = ticks, now
            time.sleep(0.005)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it may have left running
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return {"verdict": HANG, "said": f"more than {SECONDS + more:.0f} s of processor time"}
    if not result.exists():
        return {"error": "died", "said": f"ended with status {status}", "own": False, "trace": ""}
    found = json.loads(result.read_text("utf-8"))
    if found.pop("peak") > MEMORY:
        return {"verdict": GREEDY, "said": found.get("said", "accepted")}
    return found | {"seconds": used.ru_utime + used.ru_stime}


def _ticks(process: int) -> int:
    """Processor time of a process that has not been waited for."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _child(target: Callable[[], str], folder: Path, result: Path, seconds: float) -> None:
    """Never returns."""
    os.setsid()
    os.chdir(folder)
    out = os.open(folder.parent / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    before = _resident()
    sizes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (sizes + 3 * 2**30,) * 2)
    used = resource.getrusage(resource.RUSAGE_SELF)
    allowed = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (allowed, allowed + 2))  # At the second, SIGKILL, which says nothing.
    try:
        found = {"digest": target()}
    except Failure as error:
        found = {"verdict": error.args[0], "said": error.args[1]}
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        deepest = frames[-1].filename if frames else ""
        own = f"{os.sep}dcdd_core{os.sep}" in deepest or f"{os.sep}dcdd_pico{os.sep}" in deepest
        greedy = isinstance(error, MemoryError) or "allocate memory" in str(error)
        where = next((f"{f.filename}:{f.lineno}" for f in reversed(frames) if "dcdd_" in f.filename), deepest)
        found = {
            "error": type(error).__name__,
            # OSErrors of this repository say what to do about a file that could not be written.
            "explained": isinstance(error, (ValueError, OSError)) and not isinstance(error, UnicodeError),
            "said": str(error),
            "own": own,
            "trace": where,
        }
        if greedy:
            found = {"verdict": GREEDY, "said": f"{type(error).__name__} at {where}"}
    found["peak"] = _resident("VmHWM") - before
    try:
        result.write_text(json.dumps(found), "utf-8")
    finally:
        os._exit(0)


def _resident(name: str = "VmRSS") -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


class Loaders:
    """The sound files of all loaders, in a folder, and what is made of them."""

    def __init__(self, folder: Path, names: Sequence[str] = tuple(SUBJECTS)):
        torch.set_num_threads(1)  # other threads are not forked
        self.folder = folder
        self.sound: dict[str, str] = {}
        for name in names:
            subject, top = SUBJECTS[name], folder / "sound" / name
            shutil.rmtree(top, ignore_errors=True)
            top.mkdir(parents=True)
            subject.build(top)
            found = self._load(subject, "sound", lambda path: "")
            if "digest" not in found:
                raise RuntimeError(f"the sound {name} does not load: {found}")
            self.sound[name] = found["digest"]

    def _load(self, subject: Subject, case: str, damage: Callable[[Path], str]) -> dict:
        top = self.folder / "case" / case / "files"
        shutil.rmtree(top.parent, ignore_errors=True)
        shutil.copytree(self.folder / "sound" / subject.name, top)
        what = damage(top)
        if what == "nothing":
            return {"what": what}
        return call(lambda: subject.load(top), top) | {"what": what, "top": str(top)}

    def run(self, name: str, kind: str, seed: int) -> Outcome | None:
        """Damages a copy and loads it; None where the damage does not apply."""
        subject = SUBJECTS[name]
        found = self._load(subject, "one", lambda top: mutations.mutate(top, kind, random.Random(seed)))
        if found["what"] == "nothing":
            return None
        verdict, said = self._judged(subject, kind, found)
        return Outcome(
            subject=name, kind=kind, seed=seed, verdict=verdict, what=found["what"], owner=subject.owner, said=said
        )

    def _judged(self, subject: Subject, kind: str, found: Mapping) -> tuple[str, str]:
        if "verdict" in found:
            return found["verdict"], found["said"]
        if "digest" in found:
            if kind == "index" and "outside.safetensors" in found["what"] and _uses_outside(subject, found):
                return SILENT, "a file outside the folder is accepted"
            if found["digest"] == self.sound[subject.name]:
                return OK, ""
            unguarded = kind == "flip" and not subject.sealed  # bits of weights without checksums are weights
            return (DIFFERS if subject.free or unguarded else SILENT), "accepted, with another result"
        said = f"{found['error']}: {found['said'][:300]} ({found['trace']})"
        if not found.get("explained") or not found["own"]:
            return TRACEBACK, said
        names = {path.name for path in (self.folder / "sound" / subject.name).rglob("*")}
        named = found["top"] in found["said"] or any(name in found["said"] for name in names)
        return (REFUSED if named and "\n" not in found["said"].strip() else UNCLEAR), said


def _uses_outside(subject: Subject, found: Mapping) -> bool:
    """Whether the file that the index names is what is read: without it, the folder is another."""
    outside = [path for path in Path(found["top"]).parent.rglob("outside.safetensors")]
    for path in outside:
        path.unlink()
    return call(lambda: subject.load(Path(found["top"])), Path(found["top"])).get("digest") != found["digest"]


def table(outcomes: Sequence[Outcome]) -> str:
    """How many inputs of each loader and command ended in which way."""
    rows = Counter((outcome.subject, outcome.verdict) for outcome in outcomes)
    names = list(dict.fromkeys(outcome.subject for outcome in sorted(outcomes, key=lambda o: o.subject)))
    width = max(map(len, names), default=0)
    lines = [" " * width + "".join(f"{name:>20}" for name in CLASSES)]
    lines += [f"{name:<{width}}" + "".join(f"{rows[name, verdict]:>20}" for verdict in CLASSES) for name in names]
    totals = Counter(outcome.verdict for outcome in outcomes)
    lines.append(f"{'all ' + str(len(outcomes)):<{width}}" + "".join(f"{totals[verdict]:>20}" for verdict in CLASSES))
    return "\n".join(lines)


def write_failures(outcomes: Sequence[Outcome], folder: Path) -> list[Outcome]:
    """Writes what failed, with the words that run it again, to failures.json."""
    bad = [outcome for outcome in outcomes if outcome.verdict in FAILURES]
    folder.mkdir(parents=True, exist_ok=True)
    unclear = [outcome for outcome in outcomes if outcome.verdict == UNCLEAR]
    for name, held in (("failures.json", bad), ("unclear.json", unclear)):
        (folder / name).write_text(json.dumps([asdict(outcome) for outcome in held], indent=1), "utf-8")
    return bad
