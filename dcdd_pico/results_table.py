"""The table of the embedded models: `python -m dcdd_pico.results_table`.

Every section is written to `<out>/<section>.json` when it is done and not measured again while the weights and the way
to measure stay the same; `<out>/table.md` holds them all, and so do the texts named by `--into`, between the marks that
they have.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from dcdd_core.evaluation.tables import markdown_table, statistics_rows
from dcdd_core.files import write_text

from .flops import operations_of
from .sections import READ, SECTIONS, SERVED, TITLES, Choice, Rows, measured, parse, token_statistics

#: The sections of the table ("variants" where these were trained); the report has more.
TABLE = ("reconstruction", "text", "steps", "variants", "calibration", "reader")

#: What is between them in a text is the table's.
MARKS = ("<!-- table -->", "<!-- end of the table -->")

BETTER = {
    "frechet": "↓",
    "ssim": "↑",
    "psnr": "↑",
    "perceptual": "↓",
    "text frechet": "↓",
    **{f"F1 {name}": "↑" for name in READ},
}
TARGETED = {"reconstruction": "reconstruction", "means": "Table 4", "steps": "Table 6", "text": "text to image"}

#: Section, row, column, what the row is held against, and what must hold of their ratio or value.
TARGETS = (
    ("reconstruction", "DCDD (LCDM + LC)", "frechet", "VQ-VAE decode", "at most", 0.40),
    ("reconstruction", "DCDD (LCDM + LC)", "ssim", "VQ-VAE decode", "at least", 1.03),
    ("reconstruction", "DCDD (LCDM + LC)", "perceptual", "VQ-VAE decode", "at most", 0.89),
    ("means", "lcdm+lc", "frechet", "discrete", "at most", 1.0),
    ("means", "lcdm+lc", "ssim", "discrete", "at least", 1.0),
    ("means", "lcdm+lc", "perceptual", "discrete", "at most", 1.0),
    ("steps", "DCDD, 10 steps", "frechet", "VQ-VAE decode", "at most", 1.0),
    ("steps", "DCDD, 10 steps", "perceptual", "VQ-VAE decode", "at most", 1.0),
    ("steps", "DCDD, 10 steps", "ssim", "VQ-VAE decode", "at least", 1.0),
    ("text", SERVED, "frechet", "VQ-VAE decode", "at most", 0.66),
    *(("text", SERVED, f"F1 {fact}", "VQ-VAE decode", "at least", 1.0) for fact in READ),
)


def verdicts(results: Mapping[str, Rows]) -> str:
    """A Markdown table of the targets: the ratio that was measured, and whether it is met, missed or not measured."""
    lines = [["", "of", "target", "measured", ""]]
    for section, row, column, rival, relation, bound in TARGETS:
        rows = results.get(section, {})
        ratio, verdict = "", "not measured"
        if row in rows and rival in rows:
            ours, theirs = rows[row][column], rows[rival][column]
            kept = ours <= bound * theirs if relation == "at most" else ours >= bound * theirs
            ratio, verdict = f"{ours / theirs:.3f}" if theirs else f"{ours:.3g} to 0", "met" if kept else "MISSED"
        lines.append([f"{TARGETED[section]}, {row}: {column}", rival, f"{relation} {bound:g}", ratio, verdict])
    columns = results.get("calibration", {})
    if columns:
        gap = abs(columns["Janus"]["entropy"] - columns["calibrated proxies"]["entropy"])
        verdict = "met" if gap <= 0.02 else "MISSED"
        lines.append(["calibrated proxies: mean entropy", "Janus", "within 0.02", f"{gap:.4f}", verdict])
    return "### Targets (ratios)\n\n" + markdown_table(lines) + "\n"


def markdown(results: Mapping[str, Rows]) -> str:
    """The sections' results as Markdown tables."""
    tables = (f"### {TITLES[name]}\n\n{markdown_table(_cells(name, rows))}" for name, rows in results.items())
    return "\n\n".join(tables) + "\n"


def _cells(section: str, rows: Rows) -> list[list[str]]:
    if section == "calibration":
        return statistics_rows({name: token_statistics(row) for name, row in rows.items()})
    if SERVED in rows:  # one of the ways to read, once more
        served = rows[SERVED]
        rows = {f"{name} (served)" if row == served else name: row for name, row in rows.items() if name != SERVED}
    columns = [column for column in max(rows.values(), key=len) if ":" not in column]

    def cell(row: Mapping[str, float], column: str) -> str:
        if column not in row:
            return ""
        low, high = f"{column}: lowest", f"{column}: highest"
        return f"{row[column]:.4g}" + (f" ({row[low]:.4g} to {row[high]:.4g})" if low in row else "")

    heads = [f"{column} {BETTER[column]}" if column in BETTER else column for column in columns]
    return [["", *heads], *([name, *(cell(row, column) for column in columns)] for name, row in rows.items())]


def put_between(marks: tuple[str, str], text: str, into: str) -> str:
    """A text with what stands between two marks, each on a line of its own, replaced.

    Raises:
        ValueError: if the marks are not there.
    """
    before, first, rest = into.partition(marks[0] + "\n")
    _, second, after = rest.partition(marks[1])
    if not first or not second:
        raise ValueError(f"the text has no lines {marks[0]} and {marks[1]} to put the table between: add them")
    return f"{before}{first}\n{text.strip()}\n\n{second}{after}"


def table(choice: Choice, sections: Sequence[str] | None = None) -> str:
    """Measures what is not measured yet, and returns the Markdown, which is also written to `<out>/table.md`.

    Args:
        sections: of `SECTIONS`; by default those of the README.
    """
    _, results = measured(choice, sections or [name for name in TABLE if name != "variants" or choice.variants])
    shown = {name: rows for name, rows in results.items() if name != "variants"}  # whose means are shown
    operations = "### Operations of the trainings\n\n" + operations_of(choice.weights)
    text = markdown(shown) + "\n" + verdicts(results) + "\n" + operations
    write_text(choice.out / "table.md", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS))
    parser.add_argument("--into", nargs="+", type=Path, default=(), help="texts to write the table into")
    chosen, choice = parse(parser)
    if "variants" in (chosen.sections or ()) and not choice.variants:
        parser.error(f"{chosen.work} holds no ablation: `python -m dcdd_pico.ablation` trains its decoders")
    text = table(choice, chosen.sections)
    for path in chosen.into:
        write_text(path, put_between(MARKS, text, path.read_text("utf-8")))
    print(text)


if __name__ == "__main__":
    main()
