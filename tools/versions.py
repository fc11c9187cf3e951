"""Runs the package on the oldest and newest versions that it allows, each row in an environment of its own.

    python tools/versions.py                        every row that was not run for this commit, then docs/versions.md
    python tools/versions.py --row oldest           rows whose name contains the word
    python tools/versions.py --report               docs/versions.md from the last results alone

A row installs packages into out/versions, exports the commit (never the working tree) and runs `CHECKS` on it: the
demo, the tests of the loaders and a short training. Results are kept in out/versions/results.json by commit, row and
lock, so that an interrupted run continues. An environment is deleted once its row is done (`--keep` keeps it).
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "out" / "versions"
RESULTS, REPORT = WORK / "results.json", ROOT / "docs" / "versions.md"
LOCKED_PYTHON = "3.11"
"""The interpreter that constraints.txt was made with."""

OLDEST_TORCH = "2.6.0"
"""Promised in README.md: the first version with FSDPModule. ComfyUI brings its own torch, so pyproject.toml bounds it
for training only."""

SHOWN = ("torch", "transformers", "diffusers", "numpy")
_LIMIT = 1200
"""Seconds for one check."""

_ARRAYS = ("contourpy", "datasets", "imageio", "matplotlib", "numpy", "pandas", "pillow", "pyarrow", "scikit-image")
_HUB = (
    "accelerate",
    "datasets",
    "diffusers",
    "dill",
    "fsspec",
    "huggingface-hub",
    "multiprocess",
    "peft",
    "tokenizers",
)
#: transformers 4 asks for huggingface_hub below 1. Named in full, since pip takes an hour to find them.
_WITH_4 = {
    "huggingface-hub": "0.36.2",
    "diffusers": "0.35.2",
    "accelerate": "1.10.1",
    "peft": "0.17.1",
    "datasets": "4.0.0",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One environment.

    Attributes:
        python: the version of Python.
        pins: versions by package; "oldest" is the floor in pyproject.toml, "newest" whatever the index has.
        base: versions of all other packages: "lock" for constraints.txt, "oldest" or "newest".
        freed: packages of the lock that may differ from it, since the pinned ones need other versions of them.
    """

    name: str
    python: str = LOCKED_PYTHON
    pins: Mapping[str, str]
    base: str = "lock"
    freed: tuple[str, ...] = ()


ROWS = (
    Row(name="Python 3.10, everything oldest", python="3.10", base="oldest", pins={}),
    Row(name="Python 3.13, everything newest", python="3.13", base="newest", pins={}),
    Row(name="transformers 4.57", pins={"transformers": "4.57.6", **_WITH_4}, freed=_HUB),
    Row(name="transformers newest", pins={"transformers": "newest"}, freed=_HUB),
    Row(name="diffusers oldest", pins={"diffusers": "oldest"}, freed=_HUB),
    Row(name="diffusers newest", pins={"diffusers": "newest"}, freed=_HUB),
    Row(name="numpy oldest", pins={"numpy": "oldest"}, freed=(*_ARRAYS, "scipy", "tifffile", "torchmetrics")),
    Row(name="torch oldest", pins={"torch": OLDEST_TORCH}, freed=("setuptools", "sympy", "torchao")),
    Row(name="torch newest", pins={"torch": "newest"}, freed=("setuptools", "torchao")),
)

_IMAGES = """
from dcdd_pico.scenes import render_scene
from PIL import Image
from pathlib import Path
folder = Path("versions-images")
folder.mkdir(exist_ok=True)
for i in range(8):
    Image.fromarray(render_scene("test", i).image).save(folder / f"{i}.png")
"""
_TRAINING = "--vlm pico --cpu --data versions-images --out versions-run --steps 10 --batch 2 --samples 1 --log-every 5"
LOADERS = ("tests/models/test_checkpoints.py", "tests/models/test_decoder.py", "tests/models/test_vq.py")
CHECKS: dict[str, tuple[tuple[str, ...], ...]] = {
    "demo": (("-m", "dcdd_core.cli", "demo", "--out", "versions-demo.png"),),
    "loaders": (("-m", "pytest", "-q", "-p", "no:cacheprovider", *LOADERS, "tests/models/janus/test_sampler.py"),),
    "training": (("-c", _IMAGES), ("train.py", "train", *_TRAINING.split(), "--tracker", "tensorboard")),
}


def main() -> int:
    """Returns 1 if a row failed or could not be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", default="", help="only rows whose name contains this")
    parser.add_argument("--commit", default="HEAD", help="what is run")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    args = parser.parse_args()
    commit = subprocess.check_output(["git", "rev-parse", args.commit], cwd=ROOT, text=True).strip()
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    for row in ROWS:
        key = key_of(row, commit)
        if args.report or args.row not in row.name or results.get(row.name, {}).get("key") == key:
            continue
        print(f"{row.name} ...", flush=True)
        found = run_row(row, commit, keep=args.keep)
        results[row.name] = found | {"key": key, "commit": commit[:12], "date": str(datetime.date.today())}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2), "utf-8")
        print(f"{row.name}: {verdict(found)}", flush=True)
    REPORT.write_text(report(results), "utf-8")
    return int(any(verdict(results.get(row.name, {})) != "ok" for row in ROWS if args.row in row.name))


def key_of(row: Row, commit: str) -> str:
    """Changes with everything that a row's result depends on, except for what is newest on that day."""
    lock = subprocess.check_output(["git", "show", f"{commit}:constraints.txt"], cwd=ROOT)
    return hashlib.sha256(f"{commit} {row} {CHECKS}".encode() + lock).hexdigest()[:12]


def floors() -> dict[str, str]:
    """The oldest version that pyproject.toml allows of each package that running and training need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found = {}
    for text in (*project["dependencies"], *project["optional-dependencies"]["train"]):
        requirement = Requirement(text)
        for bound in requirement.specifier:
            if bound.operator == ">=":
                found[canonicalize_name(requirement.name)] = bound.version
    return found


def requirements(row: Row, lock: str) -> tuple[list[str], str]:
    """What a row asks pip for, and the content of its constraints file."""
    oldest = floors()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    pins = dict(row.pins) | (
        {name: "oldest" for name in oldest if name not in row.pins} if row.base == "oldest" else {}
    )
    wanted = []
    texts = [*project["dependencies"], *extras["train"], *extras["test"]]
    for text in dict.fromkeys(texts):
        name = canonicalize_name(Requirement(text).name)
        pin = pins.get(name)
        version = oldest.get(name) if pin == "oldest" else pin
        wanted.append(f"{name}=={version}" if version not in (None, "newest") else text)
    lines = [line for line in lock.splitlines() if "==" in line] if row.base == "lock" else []
    free = {canonicalize_name(name) for name in (*row.freed, *row.pins)}
    kept = [line for line in lines if canonicalize_name(line.split("==")[0]) not in free]
    return wanted, "\n".join(kept) + "\n"


def interpreter(version: str) -> str | None:
    """The path of a Python of that minor version: pyenv's, or the one on PATH."""
    installed = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    return str(installed[-1]) if installed else shutil.which(f"python{version}")


def run_row(row: Row, commit: str, *, keep: bool) -> dict:
    """Installs one environment and runs the checks in it."""
    python = interpreter(row.python)
    if python is None:
        return {"not_run": f"there is no Python {row.python} on this machine"}
    slug = re.sub(r"[^a-z0-9]+", "-", row.name.lower())
    tree, env = WORK / "tree" / slug, WORK / "env" / slug
    for folder in (tree, env):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive, check=True)
    logs = WORK / "logs" / slug
    logs.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run([python, "-m", "venv", str(env)], check=True)
        own = str(env / "bin" / "python")
        if said := _install(own, row, (tree / "constraints.txt").read_text("utf-8"), logs):
            return {"not_run": f"pip: {said}"}
        found = {"versions": _versions(own), "checks": {}, "seconds": {}}
        for name, commands in CHECKS.items():
            start = time.monotonic()
            found["checks"][name] = _check([[own, *command] for command in commands], tree, logs / f"{name}.log")
            found["seconds"][name] = round(time.monotonic() - start)
        return found
    finally:
        shutil.rmtree(tree, ignore_errors=True)
        if not keep:
            shutil.rmtree(env, ignore_errors=True)


def _install(python: str, row: Row, lock: str, logs: Path) -> str:
    """An empty text, or why pip could not install the row."""
    wanted, constraints = requirements(row, lock)
    path = logs / "constraints.txt"
    path.write_text(constraints, "utf-8")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", str(path)]
    # torch first and alone: what depends on it then keeps this build of it.
    torch = [text for text in wanted if canonicalize_name(Requirement(text).name) == "torch"]
    numpy = [text for text in wanted if text.startswith("numpy==")]
    newest = ["--upgrade"] if row.base == "newest" or "newest" in row.pins.values() else []
    for step in ([*torch, *numpy], [*newest, *wanted, "setuptools"]):
        done = subprocess.run([*install, *step], capture_output=True, text=True)
        (logs / "pip.log").write_text(done.stdout + done.stderr, "utf-8")
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            return errors[0][:300] if errors else "failed"
    return ""


def _versions(python: str) -> dict[str, str]:
    names = ", ".join(repr(name) for name in SHOWN)
    code = f"import json, sys; from importlib.metadata import version; v = {{n: version(n) for n in ({names},)}}"
    code += "; print(json.dumps(v | {'python': sys.version.split()[0]}))"
    return json.loads(subprocess.check_output([python, "-c", code], text=True))


def _check(commands: Sequence[Sequence[str]], tree: Path, log: Path) -> str:
    """ "ok", or the last line of what failed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with log.open("w", encoding="utf-8") as file:
        for command in commands:
            try:
                done = subprocess.run(
                    command, cwd=tree, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=_LIMIT
                )
            except subprocess.TimeoutExpired:
                return f"not done after {_LIMIT} s"
            if done.returncode:
                return _why(log.read_text("utf-8", "replace"), done.returncode)
    return "ok"


def _why(text: str, status: int) -> str:
    """The line of a log that says most: a first error of pytest, or else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E  ", "ERROR ", "FAILED "))]
    return (errors or lines or [""])[0 if errors else -1][:200] + f" (exit status {status})"


def verdict(found: Mapping) -> str:
    """The verdict on one row: "ok", or what is wrong with it."""
    if not found:
        return "not run yet"
    if "not_run" in found:
        return f"not run: {found['not_run']}"
    return "; ".join(f"{name}: {said}" for name, said in found["checks"].items() if said != "ok") or "ok"


def report(results: Mapping[str, Mapping]) -> str:
    """The text of docs/versions.md."""
    lines = [
        "# Versions",
        "",
        "`make versions` runs the package with the oldest and newest versions that `pyproject.toml` allows, each row",
        "in its own environment, all on a CPU: the demo, the loaders' tests and ten training steps. Rows that name",
        "one package pin all others to `constraints.txt` as far as that package allows.",
        "",
        "| row | Python | torch | transformers | diffusers | numpy | demo | loaders | training | commit, date |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for row in ROWS:
        found = results.get(row.name, {})
        versions, checks = found.get("versions", {}), found.get("checks", {})
        cells = [versions.get(name, "") for name in ("python", *SHOWN)]
        cells += [{"ok": "ok", None: ""}.get(checks.get(name), "fails") for name in CHECKS]
        where = f"{found['commit']}, {found['date']}" if found else "not run yet"
        lines.append(f"| {row.name} | " + " | ".join([*cells, where]) + " |")
        if found and (said := verdict(found)) != "ok":
            notes.append(f"- **{row.name}**: {said}")
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
