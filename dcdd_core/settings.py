"""Checks of settings: numbers in range, and the same settings as an earlier run that is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def require_at_least(least: int, **numbers: int) -> None:
    """Refuses numbers below `least`; the keywords are the names of the options.

    Raises:
        ValueError: naming the first.
    """
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")


def require_same_settings(what: str, before: Mapping[str, Any], now: Mapping[str, Any], *, remedy: str) -> None:
    """Refuses to continue earlier work under other settings.

    Args:
        what: the start of the message: what was made earlier, such as "runs/a holds results".
        before, now: plain JSON values by name, nested or not; `before` as it was read from a file.
        remedy: what to do about a difference.

    Raises:
        ValueError: naming each setting that differs.
    """
    before, now = flatten(before), flatten(json.loads(json.dumps(now)))
    if differ := sorted(name for name in {*before, *now} if before.get(name) != now.get(name)):
        changes = ", ".join(f"{name} {before.get(name)!r} -> {now.get(name)!r}" for name in differ)
        raise ValueError(f"{what} made with other settings ({changes}): {remedy}")


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
