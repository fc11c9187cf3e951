"""Bounds on the numbers of benchmarks, and whether they are met."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

from dcdd_core.evaluation.tables import markdown_table

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound on a number of a benchmark.

    Attributes:
        row: first cells of the row.
        column: name of the column; if HEAD has it twice, the first.
        baseline: first cells of the row whose value it is divided by; None to compare the value itself.
        relation: "at least" or "at most".
        source: where the bound comes from.
    """

    row: tuple[str, ...]
    column: str
    relation: str
    bound: float
    source: str
    baseline: tuple[str, ...] | None = None

    def measured(self, head: Sequence[str], rows: Rows) -> float | None:
        """The value to compare, or None if the rows have no such number."""
        column = head.index(self.column)
        ours = _cell(rows, self.row, column)
        theirs = 1.0 if self.baseline is None else _cell(rows, self.baseline, column)
        return None if ours is None or theirs is None else ours / theirs

    def kept(self, value: float) -> bool:
        return value <= self.bound if self.relation == "at most" else value >= self.bound


def verdicts(found: Iterable[tuple[ModuleType, Rows]]) -> str:
    """A Markdown table of the benchmarks' targets: met, MISSED or not measured; empty if there are no targets."""
    lines = []
    for benchmark, rows in found:
        for target in getattr(benchmark, "TARGETS", ()):
            value = target.measured(benchmark.HEAD, rows)
            baseline = "" if target.baseline is None else f" / {target.baseline[-1]}"
            lines.append(
                (
                    ", ".join(target.row),
                    target.column + baseline,
                    f"{target.relation} {target.bound:g}",
                    "" if value is None else f"{value:.3g}",
                    "not measured" if value is None else "met" if target.kept(value) else "MISSED",
                    target.source,
                )
            )
    return markdown_table([("row", "column", "target", "measured", "", "source of the bound"), *lines]) if lines else ""


def _cell(rows: Rows, start: tuple[str, ...], column: int) -> float | None:
    for row in rows:
        if tuple(row[: len(start)]) == start:
            try:
                return float(row[column])
            except ValueError:
                return None
    return None
