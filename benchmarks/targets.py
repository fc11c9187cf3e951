"""What the benchmarks are held to, and whether their rows keep it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

from dcdd_core.evaluation.tables import markdown_table

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound on what a benchmark measures.

    Attributes:
        row: its first cells.
        column: the first of this name in HEAD.
        rival: the first cells of the row that it is divided by; None for the cell as it is.
        relation: "at least" or "at most".
        source: where the bound is from.
    """

    row: tuple[str, ...]
    column: str
    relation: str
    bound: float
    source: str
    rival: tuple[str, ...] | None = None

    def measured(self, head: Sequence[str], rows: Rows) -> float | None:
        """None for what the rows do not hold as a number."""
        column = head.index(self.column)
        ours = _cell(rows, self.row, column)
        theirs = 1.0 if self.rival is None else _cell(rows, self.rival, column)
        return None if ours is None or theirs is None else ours / theirs

    def kept(self, value: float) -> bool:
        return value <= self.bound if self.relation == "at most" else value >= self.bound


def verdicts(found: Iterable[tuple[ModuleType, Rows]]) -> str:
    """A Markdown table of the targets of benchmarks, given with their rows; empty where these have none."""
    lines = []
    for benchmark, rows in found:
        for target in getattr(benchmark, "TARGETS", ()):
            value = target.measured(benchmark.HEAD, rows)
            rival = "" if target.rival is None else f" / {target.rival[-1]}"
            lines.append(
                (
                    ", ".join(target.row),
                    target.column + rival,
                    f"{target.relation} {target.bound:g}",
                    "" if value is None else f"{value:.3g}",
                    "not measured" if value is None else "met" if target.kept(value) else "MISSED",
                    target.source,
                )
            )
    return markdown_table([("of", "what", "target", "measured", "", "the bound is"), *lines]) if lines else ""


def _cell(rows: Rows, start: tuple[str, ...], column: int) -> float | None:
    for row in rows:
        if tuple(row[: len(start)]) == start:
            try:
                return float(row[column])
            except ValueError:
                return None
    return None
