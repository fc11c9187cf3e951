"""Tables of what the embedded models score: `python -m dcdd_pico.results_table`.

Each section is kept in `<out>/<section>.json` and measured again only if its code, weights or options have changed.
The tables are written to `<out>/table.md`, and between the marks of the files given with `--into`. `--stale` measures
nothing: it lists the published sections whose key is no longer today's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dcdd_core.evaluation.tables import markdown_table, statistics_rows
from dcdd_core.files import write_text

from . import (  # noqa: F401  add to FURTHER
    guided_sections,
    llamagen_sections,
    opponents_sections,
    progressive_sections,
)
from .embedded import WEIGHTS
from .flops import flops_of
from .section_keys import NO_KEY, ROOT, Provenance, code_hash, files_hash
from .sections import (
    DCDD,
    FURTHER,
    READ,
    SECTIONS,
    SERVED,
    TITLES,
    VQ,
    Measured,
    Rows,
    TableOptions,
    measure,
    parse,
)
from .sections import token_statistics as statistics_of_row

#: The sections of the tables (the ablation only if its decoders have been trained); the report has more.
TABLE = ("reconstruction", "text", "steps", "ablation", "calibration", "reader")

#: The files that publish sections.
PUBLISHED = (ROOT / "docs" / "results.md", ROOT / "docs" / "report.md", WEIGHTS / "README.md")

#: Lines of a file between which the tables are written.
MARKS = ("<!-- table -->", "<!-- end of the table -->")

BETTER = {
    "frechet": "↓",
    "ssim": "↑",
    "psnr": "↑",
    "perceptual": "↓",
    "text frechet": "↓",
    "frechet, text detector": "↓",
    "perceptual, text detector": "↓",
    "F1": "↑",
    **{f"F1 {name}": "↑" for name in READ},
}
TARGETED = {"reconstruction": "reconstruction", "means": "Table 4", "steps": "Table 6", "text": "text to image"}

#: Section, row, column, the row of the baseline, and the bound on the ratio of the two.
TARGETS = (
    ("reconstruction", DCDD, "frechet", VQ, "at most", 0.40),
    ("reconstruction", DCDD, "ssim", VQ, "at least", 1.03),
    ("reconstruction", DCDD, "perceptual", VQ, "at most", 0.89),
    ("means", "lcdm+lc", "frechet", "discrete", "at most", 1.0),
    ("means", "lcdm+lc", "ssim", "discrete", "at least", 1.0),
    ("means", "lcdm+lc", "perceptual", "discrete", "at most", 1.0),
    ("steps", "DCDD, 10 steps", "frechet", VQ, "at most", 1.0),
    ("steps", "DCDD, 10 steps", "perceptual", VQ, "at most", 1.0),
    ("steps", "DCDD, 10 steps", "ssim", VQ, "at least", 1.0),
    ("text", SERVED, "frechet", VQ, "at most", 0.66),
    *(("text", SERVED, f"F1 {fact}", VQ, "at least", 1.0) for fact in READ),
)


def verdicts(results: Mapping[str, Rows]) -> str:
    """A Markdown table of the targets, with the measured ratio: met, MISSED or not measured."""
    lines = [["", "baseline", "target", "measured", ""]]
    for section, row, column, baseline, relation, bound in TARGETS:
        rows = results.get(section, {})
        ratio, verdict = "", "not measured"
        if row in rows and baseline in rows:
            ours, theirs = rows[row][column], rows[baseline][column]
            kept = ours <= bound * theirs if relation == "at most" else ours >= bound * theirs
            ratio, verdict = f"{ours / theirs:.3f}" if theirs else f"{ours:.3g} to 0", "met" if kept else "MISSED"
        lines.append([f"{TARGETED[section]}, {row}: {column}", baseline, f"{relation} {bound:g}", ratio, verdict])
    columns = results.get("calibration", {})
    if columns:
        gap = abs(columns["Janus"]["entropy"] - columns["calibrated proxies"]["entropy"])
        verdict = "met" if gap <= 0.02 else "MISSED"
        lines.append(["calibrated proxies: mean entropy", "Janus", "within 0.02", f"{gap:.4f}", verdict])
    return f"### Targets (ratios to the baseline, from the tables above)\n\n{markdown_table(lines)}\n"


def section_tables(results: Measured) -> str:
    """The sections' results as Markdown tables, each with its provenance."""
    tables = (
        f"### {TITLES[name]}\n\n{markdown_table(table_cells(name, rows))}\n\n{results.provenance[name]}"
        for name, rows in results.rows.items()
        if name != "ablation"  # whose means are shown
    )
    return "\n\n".join(tables) + "\n"


def table_cells(section: str, rows: Rows) -> list[list[str]]:
    """The cells of a section's table, with its heads."""
    if section == "calibration":
        return statistics_rows({name: statistics_of_row(row) for name, row in rows.items()})
    if SERVED in rows:  # equal to one of the other rows, which is marked instead
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
    """Replaces what is between two lines of a text.

    Raises:
        ValueError: if the lines are missing.
    """
    before, first, rest = into.partition(marks[0] + "\n")
    _, second, after = rest.partition(marks[1])
    if not first or not second:
        raise ValueError(f"the file lacks the lines {marks[0]} and {marks[1]} between which the tables go: add them")
    return f"{before}{first}\n{text.strip()}\n\n{second}{after}"


def flops_key(weights: Path) -> str:
    """The key of the table of training FLOPs."""
    names = ("janus", "vae", "decoder.safetensors", "recipe.json")
    return f"{code_hash(flops_of)}-{files_hash(weights / name for name in names)}"


def results_markdown(options: TableOptions, sections: Sequence[str] | None = None) -> str:
    """Measures what has to be measured; returns all tables as Markdown, and writes them to `<out>/table.md`.

    Args:
        sections: of `SECTIONS`; by default those of docs/results.md.
    """
    _, results = measure(options, sections or [name for name in TABLE if name != "ablation" or options.ablation])
    flops = Provenance("flops", options.commit, flops_key(options.weights))
    text = all_tables(results, flops_of(options.weights), flops)
    write_text(options.out / "table.md", text)
    return text


def all_tables(results: Measured, flops: str, flops_provenance: Provenance) -> str:
    """The sections' tables, the targets and the training FLOPs."""
    return f"{section_tables(results)}\n{verdicts(results.rows)}\n### Training FLOPs\n\n{flops}\n{flops_provenance}\n"


def stale(options: TableOptions, published: Mapping[Path, str]) -> list[str]:
    """The published sections that were measured with other code or weights than today's, one line each.

    Args:
        options: with the weights, and the decoders of the work folder if they are on this machine. Without these,
            what they were measured in is compared by code and shipped weights only.
        published: file -> its text.
    """
    keys = {name: options.key(name) for name in (*SECTIONS, *FURTHER)} | {"flops": flops_key(options.weights)}
    lines = []
    for path, text in published.items():
        for found in Provenance.all_in(text):
            today = keys.get(found.section)
            # A third part is of decoders in the work folder.
            more = today is not None and found.key.count("-") > today.count("-")
            compared = found.key.rsplit("-", 1)[0] if more else found.key
            if today is None:
                lines.append(f"{path}: {found.section}: there is no such section any more")
            elif compared != today:
                of = "before keys were recorded" if found.key == NO_KEY else f"with key {found.key}, today {today}"
                lines.append(f"{path}: {found.section}: measured at {found.commit} {of}")
    return list(dict.fromkeys(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS))
    parser.add_argument("--into", nargs="+", type=Path, default=(), help="files to write the tables into")
    parser.add_argument("--stale", action="store_true", help="list the published sections to measure again; 1 if any")
    chosen, options = parse(parser)
    if chosen.stale:
        lines = stale(options, {path.relative_to(ROOT): path.read_text("utf-8") for path in PUBLISHED})
        print("\n".join(lines) or "every published section was measured with today's code and weights")
        sys.exit(1 if lines else 0)
    if "ablation" in (chosen.sections or ()) and not options.ablation:
        parser.error(f"{chosen.work} holds no decoders of the ablation: `python -m dcdd_pico.ablation` trains them")
    text = results_markdown(options, chosen.sections)
    for path in chosen.into:
        write_text(path, put_between(MARKS, text, path.read_text("utf-8")))
    print(text)


if __name__ == "__main__":
    main()
