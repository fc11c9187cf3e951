"""Tables of what distribution guidance scores: `python -m dcdd_pico.guided_table`, with the optional `ruler`.

As `results_table`: a section is measured again only if its code, weights or options have changed. Images and scores are
kept part by part below `<out>/guided`, so that an interrupted run goes on, and a run with more scenes adds to them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from dcdd_core.evaluation.intervals import Interval
from dcdd_core.evaluation.tables import markdown_table
from dcdd_core.files import write_text

from .guided_sections import ABOVE, BOTH, F1, GUIDED, MEANS, SDEDIT, TRAINED, VQ, minus, share_name
from .results_table import put_between, table_cells
from .sections import FURTHER, Measured, Rows, TableOptions, measure, parse

#: Lines of a file between which the tables are written.
MARKS = ("<!-- guidance -->", "<!-- end of guidance -->")
TITLES = {
    "guided-reconstruction": "Distribution guidance: reconstruction of scenes that no choice has seen",
    "guided-text": "Distribution guidance: text to image, all rows from the same sampled tokens and distributions",
    "guided-photographs": "Distribution guidance: tiles of photographs",
    "guided-robustness": "Distribution guidance: token agreement after small changes of the images",
    "guided-ablation": "Distribution guidance: one setting at a time, reconstruction of calibration scenes",
    "guided-choice": "Distribution guidance: settings for text to image, on calibration captions",
    "rulers": "Both metric networks on calibration scenes that are damaged more and more",
}
_LESS = ("frechet", "frechet, text detector", "perceptual", "perceptual, text detector")


def verdicts(results: Mapping[str, Rows]) -> str:
    """A Markdown table of the targets: met or MISSED where the whole 95 % interval says so, else open."""
    lines = [["", "target", "measured (95 % interval)", ""]]

    def add(section: str, row: str, column: str, bound: float, *, most: bool = False) -> None:
        held = results.get(section, {}).get(row, {})
        told, verdict = "", "not measured"
        if column in held:
            found = Interval(held[column], held[f"{column}: lowest"], held[f"{column}: highest"])
            told = f"{found.value:.3g} ({found.low:.3g} to {found.high:.3g})"
            verdict = found.below(bound) if most else found.above(bound)
        lines.append([f"{section}, {row}: {column}", f"{'at most' if most else 'at least'} {bound:g}", told, verdict])

    gain = results.get("guided-reconstruction", {}).get(minus(TRAINED, VQ), {})
    for column in (*_LESS, "ssim"):
        add("guided-reconstruction", share_name(GUIDED), column, 0.85)
        if column in gain and (gain[column] >= 0) == (column in _LESS):
            lines[-1][-1] = "no gain to share"
    for column in F1:
        add("guided-text", minus(GUIDED, VQ), column, 0.0)
    for other in (VQ, SDEDIT):
        for column in _LESS[:2]:
            add("guided-text", minus(GUIDED, other), column, 0.0, most=True)
    for column in (*_LESS, *MEANS[:2], "F1"):
        add("guided-reconstruction", minus(BOTH, TRAINED), column, 0.0, most=column in _LESS)
    for column in (*_LESS[:2], *F1):
        add("guided-text", minus(BOTH, TRAINED), column, 0.0, most=column in _LESS)
    share = results.get("guided-photographs", {}).get(GUIDED, {}).get(ABOVE)
    verdict = "not measured" if share is None else "met" if share >= 0.9 else "MISSED"
    told = "" if share is None else f"{share:.3g}"
    lines.append([f"guided-photographs, {GUIDED}: {ABOVE}", "at least 0.9", told, verdict])
    return f"### Targets of distribution guidance\n\n{markdown_table(lines)}\n"


def tables(results: Measured) -> str:
    """The sections' results as Markdown, each with its provenance: rows, then differences, then shares."""
    texts = []
    for name, rows in results.rows.items():
        kinds: tuple[Rows, ...] = ({}, {}, {})
        for row, values in rows.items():
            kinds[1 if ", minus " in row else 2 if row == share_name(row.split(", share")[0]) else 0][row] = values
        held = "\n\n".join(markdown_table(table_cells(name, kind)) for kind in kinds if kind)
        texts.append(f"### {TITLES[name]}\n\n{held}\n\n{results.provenance[name]}\n")
    return "\n".join([*texts, verdicts(results.rows)])


def guided_markdown(options: TableOptions, sections: Sequence[str]) -> str:
    """Measures what has to be measured; returns the tables, and writes them to `<out>/guided.md`."""
    _, results = measure(options, sections)
    text = tables(results)
    write_text(options.out / "guided.md", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", nargs="+", choices=list(FURTHER), default=list(TITLES))
    parser.add_argument("--into", nargs="+", type=Path, default=(), help="files to write the tables into")
    chosen, options = parse(parser)
    text = guided_markdown(options, chosen.sections)
    for path in chosen.into:
        write_text(path, put_between(MARKS, text, path.read_text("utf-8")))
    print(text)


if __name__ == "__main__":
    main()
