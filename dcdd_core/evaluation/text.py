"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from ..method.statistics import TokenStatistics

_ROWS = {
    "top-1 probability": ("top_1", "{:.6f}"),
    "top-2 probability": ("top_2", "{:.6f}"),
    "normalised entropy": ("entropy", "{:.6f}"),
    "tail entropy": ("tail_entropy", "{:.6f}"),
    "Otsu threshold": ("otsu_threshold", "{:.3e}"),
    "Otsu rank": ("rank", "{:d}"),
    "head mass": ("head_mass", "{:.6f}"),
}


def statistics_rows(columns: Mapping[str, TokenStatistics]) -> list[list[str]]:
    """The cells of the paper's Table 1, names and heads included: a row a statistic, a column each kind of logits."""
    rows = [
        [row, *(form.format(getattr(found, name)) for found in columns.values())] for row, (name, form) in _ROWS.items()
    ]
    return [["", *columns], *rows]


def statistics_table(columns: Mapping[str, TokenStatistics]) -> str:
    """The paper's Table 1: a row for each statistic, a column for each kind of logits."""
    lines = statistics_rows(columns)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        for line in lines
    )
