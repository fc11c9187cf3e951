"""A training's log, `log.jsonl`: one JSON object per line with step, seconds, and means since the last line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ..files import regular_file, write_text
from .write_errors import log_error

_NAME = "log.jsonl"
_LOG = "the log of a training; move it away, the checkpoints do not need it"


class RunningMeans:
    """Means of numbers by name, over the steps since they were last taken."""

    def __init__(self):
        self._sums: dict[str, torch.Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, torch.Tensor | float]) -> None:
        """Adds one step's numbers; tensors stay on their device until the means are taken."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self, reduce: Callable[[torch.Tensor | float], torch.Tensor | float] = float) -> dict[str, float]:
        """Returns the means and resets the sums.

        Args:
            reduce: this process's sum -> the mean of all processes' sums.
        """
        means = {name: float(reduce(total)) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, tuple[float, int]]:
        """(sum, count) by name, as JSON values; exact for float32."""
        return {name: (float(total), self._counts[name]) for name, total in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, tuple[float, int]]) -> None:
        """Continues from what `state_dict` returned."""
        self._sums = {name: total for name, (total, _) in state.items()}
        self._counts = {name: count for name, (_, count) in state.items()}


def read_log(folder: Path) -> list[dict[str, float]]:
    """The lines of a training's log; empty if there is no log yet."""
    path = folder / _NAME
    if not os.path.lexists(path):
        return []
    return [_parsed(path, line) for line in regular_file(path, _LOG).read_text("utf-8").splitlines()]


def append_to_log(folder: Path, line: Mapping[str, float]) -> None:
    """Appends a line to the log; the folder must exist.

    Raises:
        OSError: if it cannot be written, such as on a full disk; `truncate_log` drops a partial line.
    """
    path = folder / _NAME
    try:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise log_error(path, error) from error


def truncate_log(folder: Path, step: int) -> None:
    """Drops the lines after the step that a run resumes from, and a partial last line."""
    path = folder / _NAME
    if os.path.lexists(path):
        lines = regular_file(path, _LOG).read_text("utf-8", "replace").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and _parsed(path, line)["step"] <= step]
        write_text(path, "".join(kept))


def _parsed(path: Path, line: str) -> dict[str, float]:
    """A line's values.

    Raises:
        ValueError: naming the file, if the line is damaged.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        raise ValueError(
            f"{path} has a damaged line ({line.strip()[:60]!r}), expected an object with a step: take the line out, "
            "or move the file away; the checkpoints do not need it"
        )
    return values
