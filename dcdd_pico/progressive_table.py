"""Tables of what the masked sampler scores: `python -m dcdd_pico.progressive_table`, with the optional `ruler`.

As `guided_table`: a section is measured again only if its code, weights or options have changed, and an interrupted run
goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from dcdd_core.evaluation.intervals import Interval
from dcdd_core.evaluation.tables import markdown_table
from dcdd_core.files import write_text

from .guided_sections import F1, minus
from .progressive_sections import AR, DCDD, TARGET, VQ, passes_name
from .results_table import put_between, table_cells
from .sections import Measured, Rows, TableOptions, measure, parse

#: Lines of a file between which the tables are written.
MARKS = ("<!-- progressive -->", "<!-- end of progressive -->")
TITLES = {
    "progressive-passes": "Progressive sampling: the number of passes, against the autoregressive sampler",
    "progressive-orders": f"Progressive sampling: order and revision at {TARGET} passes, mean over three seeds",
    "progressive-seconds": "Progressive sampling: wall time an image; passes are not seconds",
}


def verdicts(results: Mapping[str, Rows]) -> str:
    """A Markdown table of the targets: met or MISSED where the whole 95 % interval says so, else open."""
    lines = [["", "target", "measured (95 % interval)", ""]]
    section = "progressive-passes"
    for decoder in (VQ, DCDD):
        row = minus(f"{passes_name(TARGET)}, {decoder}", f"{AR}, {decoder}")
        held = results.get(section, {}).get(row, {})
        for column in ("frechet", "frechet, text detector", *F1):
            most = column not in F1
            told, verdict = "", "not measured"
            if column in held:
                found = Interval(held[column], held[f"{column}: lowest"], held[f"{column}: highest"])
                told = f"{found.value:.3g} ({found.low:.3g} to {found.high:.3g})"
                verdict = found.below(0.0) if most else found.above(0.0)
            lines.append([f"{row}: {column}", f"{'at most' if most else 'at least'} 0", told, verdict])
    return f"### Targets of progressive sampling\n\n{markdown_table(lines)}\n"


def tables(results: Measured) -> str:
    """The sections' results as Markdown, each with its provenance: rows, then differences."""
    texts = []
    for name, rows in results.rows.items():
        kinds = [{row: rows[row] for row in rows if (", minus " in row) == apart} for apart in (False, True)]
        held = "\n\n".join(markdown_table(table_cells(name, kind)) for kind in kinds if kind)
        texts.append(f"### {TITLES[name]}\n\n{held}\n\n{results.provenance[name]}\n")
    return "\n".join([*texts, verdicts(results.rows)])


def progressive_markdown(options: TableOptions, sections: Sequence[str]) -> str:
    """Measures what has to be measured; returns the tables, and writes them to `<out>/progressive.md`."""
    _, results = measure(options, sections)
    text = tables(results)
    write_text(options.out / "progressive.md", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--into", nargs="+", type=Path, default=(), help="files to write the tables into")
    chosen, options = parse(parser)
    text = progressive_markdown(options, chosen.sections)
    for path in chosen.into:
        write_text(path, put_between(MARKS, text, path.read_text("utf-8")))
    print(text)


if __name__ == "__main__":
    main()
