"""Which images a training or a cache left out, as text and as a record in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_text
from ..pipelines.image_files import first_of
from .batches import MOST_NAMED, ReadCounter, Source
from .folders import ImageSource

#: Name of the record in a run's folder.
RECORD = "left_out.json"


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """The images and files of a source that were not used.

    Attributes:
        unreadable: name of an image -> what is wrong with it; the first `MOST_NAMED` of each process.
        small: names of images below `min_side`; up to as many.
        uncaptioned: names of images without a caption, where captions are required; up to as many.
        without_caption: names of images that are used although they lack one, where that is allowed; up to as many.
        min_side: in pixels; None for a cache, whose images were chosen when it was written.
        passed_over: a description of the files that are not read; "" if there are none.
    """

    unreadable: Mapping[str, str] = field(default_factory=dict)
    small: tuple[str, ...] = ()
    uncaptioned: tuple[str, ...] = ()
    without_caption: tuple[str, ...] = ()
    min_side: int | None = None
    passed_over: str = ""

    @classmethod
    def of(cls, source: Source, *counters: ReadCounter) -> LeftOut:
        """The images that these counters have recorded."""
        unreadable = {name: reason for counter in counters for name, reason in counter.reasons.items()}
        images = source if isinstance(source, ImageSource) else None
        return cls(
            unreadable=dict(sorted(unreadable.items())),
            small=tuple(sorted({name for counter in counters for name in counter.too_small})),
            uncaptioned=tuple(sorted({name for counter in counters for name in counter.uncaptioned})),
            without_caption=tuple(sorted({name for counter in counters for name in counter.without_caption})),
            min_side=None if images is None else images.min_side,
            passed_over="" if images is None else images.passed_over,
        )

    def lines(self) -> Iterator[str]:
        """Lines of text that say what was left out, with the first names."""
        if self.unreadable:
            yield f"{_count(self.unreadable)} are unreadable and left out: {first_of(self.unreadable)}"
        if self.small:
            yield (
                f"{_count(self.small)} have a side below {self.min_side} pixels (--min-side) and are left out: "
                f"{first_of(self.small)}"
            )
        if self.uncaptioned:
            yield f"{_count(self.uncaptioned)} have no caption and are left out: {first_of(self.uncaptioned)}"
        if self.without_caption:
            yield f"{_count(self.without_caption)} have no caption and keep proxies: {first_of(self.without_caption)}"
        if self.passed_over:
            yield self.passed_over

    def write(self, folder: Path) -> None:
        """Writes the record, `RECORD`, with all names.

        Raises:
            OSError: if it cannot be written.
        """
        values: dict[str, Any] = {"unreadable": dict(self.unreadable), "small": list(self.small)}
        if self.uncaptioned:
            values["uncaptioned"] = list(self.uncaptioned)
        if self.without_caption:
            values["without_caption"] = list(self.without_caption)
        values["passed_over"] = self.passed_over
        write_text(folder / RECORD, json.dumps(values, indent=1) + "\n")


def _count(names: Mapping[str, str] | tuple[str, ...]) -> str:
    return f"{'at least ' if len(names) >= MOST_NAMED else ''}{len(names)} images"
