"""Runs every benchmark of this folder and prints Markdown: `make bench`, or `python -m benchmarks lcdm sampler`.

A benchmark is a module with `HEAD`, the names of its columns, and `rows()`, whose items are as long as HEAD. Its
docstring's first line is its title. What it is held to stands in `TARGETS`, if anything.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.targets import verdicts
from benchmarks.timing import CPU_CLOCK, machine
from dcdd_core.evaluation.tables import markdown_table
from dcdd_core.files import write_text

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a benchmark; all of them by default")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write it there too, with what measured it")
    chosen = parser.parse_args()
    clock = ["DCDD_BENCH_CLOCK=cpu"] if CPU_CLOCK else []
    parts = [f"# Benchmarks\n\n`{' '.join([*clock, 'python -m benchmarks', *chosen.names])}` on {machine()}.\n"]

    def say(title: str, text: str) -> None:
        parts.append(f"### {title}\n\n{text}\n")
        print(parts[-1], flush=True)
        if chosen.out is not None:  # After every part: what comes next may fail.
            write_text(chosen.out, "\n".join(parts))

    found = []
    for name in chosen.names or sorted(path.stem for path in FOLDER.glob("[!_]*.py")):
        module = importlib.import_module(f"benchmarks.{name}")
        if hasattr(module, "rows"):
            found.append((module, module.rows()))
            say(module.__doc__.splitlines()[0], markdown_table([module.HEAD, *found[-1][1]]))
    if targets := verdicts(found):
        say("Targets", targets)


if __name__ == "__main__":
    main()
