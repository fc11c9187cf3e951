"""A training's log: one JSON object a line with the step, the seconds, and means since the last line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

_NAME = "log.jsonl"


def read_log(folder: Path) -> list[dict[str, float]]:
    """The lines of a training's log; none if it has not begun."""
    path = folder / _NAME
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_to_log(folder: Path, line: Mapping[str, float]) -> None:
    with (folder / _NAME).open("a") as file:
        file.write(json.dumps(line) + "\n")


def cut_log(folder: Path, step: int) -> None:
    """Drops what a run logged after the step that another run goes on from; also a line that was cut short."""
    path = folder / _NAME
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        path.write_text("".join(kept))
