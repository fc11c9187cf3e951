"""Runs every benchmark of this folder and prints Markdown: `make bench`, or `python -m benchmarks lcdm sampler`.

A benchmark is a module with `HEAD`, the names of its columns, and `rows()`, whose items are as long as HEAD. Its
docstring's first line is its title.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.markdown import table

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    names = sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
    for name in names:
        module = importlib.import_module(f"benchmarks.{name}")
        if hasattr(module, "rows"):
            print(f"### {module.__doc__.splitlines()[0]}\n\n{table(module.HEAD, module.rows())}\n", flush=True)


if __name__ == "__main__":
    main()
