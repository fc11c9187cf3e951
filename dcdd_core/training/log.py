"""A training's log: one JSON object a line with the step, the seconds, and means since the last line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ..files import write_text
from .disk import unlogged

_NAME = "log.jsonl"


class Means:
    """Means of numbers by name, each over the times that it was added since they were last taken."""

    def __init__(self):
        self._sums: dict[str, torch.Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, torch.Tensor | float]) -> None:
        """A tensor stays on its device until it is taken."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self, together: Callable[[torch.Tensor | float], torch.Tensor | float] = float) -> dict[str, float]:
        """The means, and starts afresh; `together` makes of this process's sum that of all."""
        means = {name: float(together(total)) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, tuple[float, int]]:
        """What was added since, as JSON; exact for float32."""
        return {name: (float(total), self._counts[name]) for name, total in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, tuple[float, int]]) -> None:
        """Goes on from what `state_dict` gave."""
        self._sums = {name: total for name, (total, _) in state.items()}
        self._counts = {name: count for name, (_, count) in state.items()}


def read_log(folder: Path) -> list[dict[str, float]]:
    """The lines of a training's log; none if it has not begun."""
    path = folder / _NAME
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_to_log(folder: Path, line: Mapping[str, float]) -> None:
    """One more line; the folder is there.

    Raises:
        OSError: if it cannot be written, such as on a full disk; what it left of a line `cut_log` drops.
    """
    path = folder / _NAME
    try:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise unlogged(path, error) from error


def cut_log(folder: Path, step: int) -> None:
    """Drops what a run logged after the step that another run goes on from; also a line that was cut short."""
    path = folder / _NAME
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(path, "".join(kept))
