"""Checks of settings: types, numbers in range, and the same settings as an earlier run that is resumed."""

from __future__ import annotations

import json
import sys
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


def require_at_most(most: int, **numbers: int) -> None:
    """Refuses numbers above `most`; the keywords are the names of the options.

    Raises:
        ValueError: naming the first.
    """
    for name, number in numbers.items():
        if number > most:
            raise ValueError(f"{name} must be at most {most:,}, got {number:,}")


def require_number(
    name: str,
    value: Any,
    *,
    whole: bool = False,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    optional: bool = False,
    remedy: str = "",
) -> None:
    """Refuses anything but a finite number within these limits; True and False are not numbers.

    Args:
        name: of the field, for the message.
        whole: only integers are allowed.
        least, most: inclusive limits.
        above, below: exclusive limits.
        optional: None is allowed.
        remedy: what to do about it.

    Raises:
        ValueError: saying what was given and what was expected.
    """
    if optional and value is None:
        return
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    # False for NaN and infinity, and for an int that is too large for a float.
    fits = number and abs(value) <= sys.float_info.max
    fits = fits and (least is None or value >= least) and (most is None or value <= most)
    if fits and (above is None or value > above) and (below is None or value < below):
        return
    if least is not None and most is not None:
        words = f" in {least:,}..{most:,}"
    else:
        limits = {"of at least": least, "above": above, "of at most": most, "below": below}
        stated = [f"{word} {limit:,}" for word, limit in limits.items() if limit is not None]
        words = f" {' and '.join(stated)}" if stated else ""
    kind = "a whole number" if whole else "a finite number"
    raise ValueError(
        f"{name} must be {kind}{words}{' or None' if optional else ''}, got {shown(value)}"
        + (f": {remedy}" if remedy else "")
    )


def require_text(name: str, value: Any, *, optional: bool = False, remedy: str = "") -> None:
    """Refuses anything but text; arguments as for `require_number`.

    Raises:
        ValueError: saying what was given and what was expected.
    """
    if not isinstance(value, str) and not (optional and value is None):
        raise ValueError(
            f"{name} must be a text{' or None' if optional else ''}, got {shown(value)}"
            + (f": {remedy}" if remedy else "")
        )


def shown(value: Any, most: int = 80) -> str:
    """An unexpected value, for an error message: its first `most` characters, if it is longer."""
    try:
        text = repr(value)
    except ValueError:  # an int with more digits than Python writes
        text = f"a {type(value).__name__} too long to write"
    return text if len(text) <= most else text[:most] + "..."


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
