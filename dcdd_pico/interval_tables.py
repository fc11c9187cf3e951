"""Sections as Markdown tables: rows, differences, shares of a gain and ratios with 95 % intervals, and targets."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from dcdd_core.evaluation.intervals import Interval
from dcdd_core.evaluation.tables import markdown_table, statistics_rows
from dcdd_core.files import write_text
from dcdd_core.types import DCDDWarning

from .guided_sections import share_name
from .sections import RATIO, READ, SECTIONS, Measured, Rows, measure, parse
from .sections import token_statistics as statistics_of_row

#: Column -> arrow for the direction that is better.
BETTER = {
    "frechet": "↓",
    "ssim": "↑",
    "psnr": "↑",
    "perceptual": "↓",
    "text frechet": "↓",
    "text frechet, text detector": "↓",
    "frechet, text detector": "↓",
    "perceptual, text detector": "↓",
    "F1": "↑",
    **{f"F1 {name}": "↑" for name in READ},
}
#: Verdict of a target without numbers, and how the title of a table of targets begins.
_NOT_MEASURED, _TARGETS = "not measured", "Targets"
#: Header of a table of targets.
TARGET_HEADS = ("", "target", "measured (95 % interval)", "")


def target(what: str, held: Mapping[str, float], column: str, bound: float, *, most: bool = False) -> list[str]:
    """A line of a table of targets: met or MISSED if the whole interval says so, otherwise open.

    Args:
        what: section and row, as shown to the reader.
        held: the row's numbers; if the column is missing, it was not measured.
        most: whether the bound is an upper bound.
    """
    told, verdict = "", _NOT_MEASURED
    if column in held:
        found = Interval(held[column], held[f"{column}: lowest"], held[f"{column}: highest"])
        told = f"{found.value:.3g} ({found.low:.3g} to {found.high:.3g})"
        verdict = found.below(bound) if most else found.above(bound)
    return [f"{what}: {column}", f"{'at most' if most else 'at least'} {bound:g}", told, verdict]


def section_texts(results: Measured, titles: Mapping[str, str]) -> list[str]:
    """Each measured section as Markdown, in the order of the titles: rows, differences, shares, ratios, and where the
    numbers come from."""
    texts = []
    for name, title in titles.items():
        if name not in results.rows:
            continue
        kinds: tuple[Rows, ...] = ({}, {}, {}, {})
        for row, values in results.rows[name].items():
            kinds[_kind(row)][row] = values
        held = "\n\n".join(markdown_table(table_cells(name, kind)) for kind in kinds if kind)
        texts.append(f"### {title}\n\n{held}\n\n{results.provenance[name]}\n")
    return texts


def table_cells(section: str, rows: Rows) -> list[list[str]]:
    """The cells of a section's table, header included."""
    if section == "calibration":
        return statistics_rows({name: statistics_of_row(row) for name, row in rows.items()})
    columns = [column for column in max(rows.values(), key=len) if ":" not in column]
    heads = [f"{column} {BETTER[column]}" if column in BETTER else column for column in columns]
    return [["", *heads], *([name, *(cell(row, column) for column in columns)] for name, row in rows.items())]


def cell(row: Mapping[str, float], column: str) -> str:
    """A score with its interval or spread, if it has one; empty if the row lacks the column."""
    if column not in row:
        return ""
    low, high = f"{column}: lowest", f"{column}: highest"
    return f"{row[column]:.4g}" + (f" ({row[low]:.4g} to {row[high]:.4g})" if low in row else "")


def put_between(marks: tuple[str, str], text: str, into: str) -> str:
    """Replaces the text between two marker lines.

    Raises:
        ValueError: if the lines are missing.
    """
    before, _, after = _parted(marks, into)
    return f"{before}{marks[0]}\n\n{text.strip()}\n\n{marks[1]}{after}"


def put_among(marks: tuple[str, str], text: str, into: str, titles: Iterable[str]) -> str:
    """`put_between`, but keeps existing tables that the text lacks and existing targets that it has not measured.

    Args:
        titles: titles of all tables, in order; other existing tables are dropped.

    Raises:
        ValueError: as `put_between`.
    """
    old, new = (_by_title(part) for part in (_parted(marks, into)[1], text))
    found = old | new
    tables = {title: found[title] for title in titles if title in found} | new
    for title in [title for title in tables if title.startswith(_TARGETS)]:
        tables[title] = _with_targets_of(tables.pop(title), old.get(title, ""))  # to the end
    return put_between(marks, "\n\n".join(f"### {title}\n\n{body}" for title, body in tables.items()), into)


def write_into(files: Iterable[Path], marks: tuple[str, str], text: str, titles: Iterable[str] | None) -> None:
    """Writes tables between the marks of files.

    Args:
        titles: titles of all tables, if tables that the text lacks should stay; None to replace everything.

    Raises:
        ValueError: as `put_between`.
    """
    for path in files:
        held = path.read_text("utf-8")
        whole = titles is None
        write_text(path, put_between(marks, text, held) if whole else put_among(marks, text, held, titles))


def _parted(marks: tuple[str, str], text: str) -> tuple[str, str, str]:
    before, first, rest = text.partition(marks[0] + "\n")
    inside, second, after = rest.partition(marks[1])
    if not first or not second:
        raise ValueError(f"the file lacks the lines {marks[0]} and {marks[1]} between which the tables go: add them")
    return before, inside, after


def _by_title(text: str) -> dict[str, str]:
    parts = (part.partition("\n") for part in f"\n{text}".split("\n### ")[1:])
    return {title: body.strip() for title, _, body in parts}


def _with_targets_of(table: str, old: str) -> str:
    def words(line: str) -> list[str]:
        return [word.strip() for word in line.split("|")]

    # By name and bound: with another bound, a verdict would be another.
    published = {tuple(words(line)[1:3]): line for line in old.splitlines() if line.startswith("|")}
    return "\n".join(
        published.get(tuple(words(line)[1:3]), line)
        if line.startswith("|") and words(line)[-2] == _NOT_MEASURED
        else line
        for line in table.splitlines()
    )


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
    """The command: measures what needs to be measured, and writes tables to `<out>/<file>` and between the marks.

    Args:
        doc: description shown by --help.
        titles: section -> title. All are measured unless some are asked for. A section whose trained files are all
            missing from the work folder is left out with a warning if other sections remain; it stays as published.
        tables: makes Markdown of what was measured.
        steps: see `parse`.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--sections", nargs="+", choices=list(titles), help="only these; others stay as published")
    parser.add_argument("--into", nargs="+", type=Path, default=(), help="files to write the tables into")
    chosen, options = parse(parser, steps=steps)
    sections = chosen.sections or [name for name in titles if _trained(name, options.work)] or list(titles)
    if chosen.sections is None and len(sections) < len(titles):
        missing = ", ".join(name for name in titles if name not in sections)
        warnings.warn(f"{options.work} holds nothing trained for {missing}: not measured", DCDDWarning, stacklevel=2)
    _, results = measure(options, sections)
    text = tables(results)
    write_text(options.out / file, text)
    whole = chosen.sections is None and len(sections) == len(titles)
    write_into(chosen.into, marks, text, None if whole else titles.values())
    print(text)


def _trained(section: str, work: Path) -> bool:
    """Whether a section reads nothing from the work folder, or at least one of its files is there."""
    files = SECTIONS[section].work
    return not files or any((work / file).exists() for file in files)
