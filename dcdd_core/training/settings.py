"""What a training is told: numbers that make sense, and the refusal to go on under anything else than before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def require_at_least(least: int, **numbers: int) -> None:
    """Refuses numbers below `least`, by the names of the options.

    Raises:
        ValueError: naming the first.
    """
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")


def require_same_settings(checkpoint: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses a checkpoint that was made under other settings; those are plain JSON values by name.

    Raises:
        ValueError: naming each that differs.
    """
    before, now = flat(before), flat(json.loads(json.dumps(now)))
    if differ := sorted(name for name in {*before, *now} if before.get(name) != now.get(name)):
        changes = ", ".join(f"{name} {before.get(name)!r} -> {now.get(name)!r}" for name in differ)
        raise ValueError(
            f"{checkpoint} was made under other settings ({changes}): move {checkpoint.parent} away to start afresh, "
            "or go back to those settings to go on"
        )


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings under dotted names: {"a": {"b": 1}} -> {"a.b": 1}."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {above + name: value}
    return found
