"""Runs the benchmarks of this folder and prints Markdown: `make bench`, or `python -m benchmarks lcdm sampler`.

A benchmark is a module with `HEAD`, the names of its columns, and `rows()`, which returns rows of that length. The
first line of its docstring is its title. `TARGETS`, if it has any, are bounds on its numbers.
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
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the tables there too")
    chosen = parser.parse_args()
    clock = ["DCDD_BENCH_CLOCK=cpu"] if CPU_CLOCK else []
    parts = [f"# Benchmarks\n\n`{' '.join([*clock, 'python -m benchmarks', *chosen.names])}` on {machine()}.\n"]

    def say(title: str, text: str) -> None:
        parts.append(f"### {title}\n\n{text}\n")
        print(parts[-1], flush=True)
        if chosen.out is not None:  # after every benchmark, since the next one may fail
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
