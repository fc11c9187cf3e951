"""Tables as Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..method.progressive import Stage, stage_rows
from ..method.statistics import TokenStatistics
from ..types import TokenLogits

_ROWS = {
    "top-1 probability": ("top_1", "{:.6f}"),
    "top-2 probability": ("top_2", "{:.6f}"),
    "normalised entropy": ("entropy", "{:.6f}"),
    "tail entropy": ("tail_entropy", "{:.6f}"),
    "Otsu threshold": ("otsu_threshold", "{:.3e}"),
    "Otsu rank": ("rank", "{:d}"),
    "head mass": ("head_mass", "{:.6f}"),
}

#: (source, calibrated) -> column name.
_KINDS = {
    ("vlm", False): "sampled",
    ("vlm", True): "sampled, calibrated",
    ("proxy", False): "proxies",
    ("proxy", True): "calibrated",
}


def column_names(columns: Sequence[TokenLogits], given: Sequence[str] = ()) -> list[str]:
    """Names for columns of logits: those given, in order. Columns beyond them, or with an empty name, are named by kind
    of logits, and numbered if that repeats.

    Raises:
        ValueError: if two of the given names are the same.
    """
    names = [*given, *[""] * len(columns)][: len(columns)]
    own = [name for name in names if name]
    if len(set(own)) < len(own):
        raise ValueError(f"two columns have the same name ({', '.join(own)}): give each its own")
    for k, value in enumerate(columns):
        if names[k]:
            continue
        kind, number = _KINDS[value.source, value.calibrated], 1
        while (name := kind if number == 1 else f"{kind} {number}") in names:
            number += 1
        names[k] = name
    return names


def statistics_rows(columns: Mapping[str, TokenStatistics]) -> list[list[str]]:
    """The cells of the paper's Table 1 with headings: one row per statistic, one column per kind of logits."""
    rows = [
        [row, *(form.format(getattr(found, name)) for found in columns.values())] for row, (name, form) in _ROWS.items()
    ]
    return [["", *columns], *rows]


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row of cells is its heading."""
    head, *rows = ("| " + " | ".join(row) + " |" for row in cells)
    return "\n".join([head, "|---" * len(cells[0]) + "|", *rows])


def statistics_table(columns: Mapping[str, TokenStatistics]) -> str:
    """The paper's Table 1 as aligned text: one row per statistic, one column per kind of logits."""
    return _aligned(statistics_rows(columns))


def stages_table(stages: Sequence[Stage]) -> str:
    """What each pass of a progressive sampler (at least one) did, as aligned text: means per image (`stage_rows`)."""
    rows = stage_rows(stages)
    return _aligned([list(rows[0]), *([f"{number:.4g}" for number in row.values()] for row in rows)])


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """The cells as aligned text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        for line in lines
    )
