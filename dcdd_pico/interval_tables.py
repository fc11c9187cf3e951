"""Tables whose numbers have 95 % intervals: rows, their differences, shares of a gain, and targets."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from dcdd_core.evaluation.intervals import Interval
from dcdd_core.evaluation.tables import markdown_table
from dcdd_core.files import write_text

from .guided_sections import RATIO, share_name
from .results_table import put_between, table_cells
from .sections import Measured, Rows, measure, parse

#: Heads of a table of targets.
TARGET_HEADS = ("", "target", "measured (95 % interval)", "")


def target(what: str, held: Mapping[str, float], column: str, bound: float, *, most: bool = False) -> list[str]:
    """A line of a table of targets: met or MISSED where the whole interval says so, else open.

    Args:
        what: section and row, for the reader.
        held: the row's numbers; without the column it was not measured.
        most: whether the bound is an upper one.
    """
    told, verdict = "", "not measured"
    if column in held:
        found = Interval(held[column], held[f"{column}: lowest"], held[f"{column}: highest"])
        told = f"{found.value:.3g} ({found.low:.3g} to {found.high:.3g})"
        verdict = found.below(bound) if most else found.above(bound)
    return [f"{what}: {column}", f"{'at most' if most else 'at least'} {bound:g}", told, verdict]


def section_texts(results: Measured, titles: Mapping[str, str]) -> list[str]:
    """Each section as Markdown with its provenance: rows, then differences, then shares, then ratios."""
    texts = []
    for name, rows in results.rows.items():
        kinds: tuple[Rows, ...] = ({}, {}, {}, {})
        for row, values in rows.items():
            kinds[_kind(row)][row] = values
        held = "\n\n".join(markdown_table(table_cells(name, kind)) for kind in kinds if kind)
        texts.append(f"### {titles[name]}\n\n{held}\n\n{results.provenance[name]}\n")
    return texts


def _kind(row: str) -> int:
    if RATIO in row:
        return 3
    return 1 if ", minus " in row else 2 if row == share_name(row.split(", share")[0]) else 0


def run(
    doc: str | None,
    titles: Mapping[str, str],
    marks: tuple[str, str],
    file: str,
    tables: Callable[[Measured], str],
    *,
    steps: bool = True,
) -> None:
    """The command: measures what has to be measured, and writes the tables to `<out>/<file>` and between the marks.

    Args:
        doc: what --help says.
        titles: of the sections, which are all measured unless some are asked for.
        tables: of what was measured, as Markdown.
        steps: see `parse`.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--sections", nargs="+", choices=list(titles), default=list(titles))
    parser.add_argument("--into", nargs="+", type=Path, default=(), help="files to write the tables into")
    chosen, options = parse(parser, steps=steps)
    _, results = measure(options, chosen.sections)
    text = tables(results)
    write_text(options.out / file, text)
    for path in chosen.into:
        write_text(path, put_between(marks, text, path.read_text("utf-8")))
    print(text)
