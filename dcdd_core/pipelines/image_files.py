"""Which images are used: the files in a folder and its sub-folders, and which of them may be left out.

What is left out is counted and named.
"""

from __future__ import annotations

import math
import os
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..settings import require_at_most
from .images import MOST_PIXELS, missing_readers, suffixes

#: In pixels; the shorter side of an image that can be read is never longer.
MOST_MIN_SIDE = math.isqrt(MOST_PIXELS)

_NAMED = 8
_LISTED = 1000


@dataclass(frozen=True, kw_only=True)
class ReadPolicy:
    """Which images may be left out: one policy for training, caches and evaluation.

    Attributes:
        min_side: in pixels; images with a shorter side than this are left out instead of enlarged, however many there
            are. None for half the side at which the images are used.
        skip_unreadable: the largest share of the images, 0..1, that may be unreadable and left out.

    Raises:
        ValueError: for numbers out of range.
    """

    min_side: int | None = None
    skip_unreadable: float = 0.01

    def __post_init__(self):
        if self.min_side is not None and self.min_side < 1:
            raise ValueError(f"--min-side must be at least 1 pixel, got {self.min_side}; 1 keeps all images")
        if self.min_side is not None:
            require_at_most(MOST_MIN_SIDE, **{"--min-side": self.min_side})
        if not 0 <= self.skip_unreadable <= 1:
            raise ValueError(f"--skip-unreadable must lie in 0..1, got {self.skip_unreadable!r}; 0.05 allows 5 %")

    def least(self, side: int) -> int:
        """The smallest shorter side, in pixels, that an image may have to be used at `side` pixels."""
        return max(1, side // 2) if self.min_side is None else self.min_side

    def allows(self, unreadable: int, read: int) -> bool:
        """Whether `unreadable` of `read` images may be left out; `read` counts the unreadable ones too."""
        return unreadable <= self.skip_unreadable * read

    def check(self, read: int, unreadable: int, reasons: Mapping[str, str], source: str) -> None:
        """Refuses a source with more unreadable images than may be left out.

        Args:
            read, unreadable: numbers of images.
            reasons: name of an unreadable image -> what is wrong with it.

        Raises:
            ValueError: naming them.
        """
        if self.allows(unreadable, read):
            return
        known = [f"{name} ({reason})" if reason else name for name, reason in list(reasons.items())[:_LISTED]]
        more = f" and {unreadable - len(known)} more" if unreadable > len(known) else ""
        enough = -(-1000 * unreadable // read) / 1000
        raise ValueError(
            f"{unreadable} of {read} images of {source} could not be read, more than the {self.skip_unreadable:.2%} "
            f"that may be skipped: {', '.join(known)}{more}. Check the disk, repair or remove these files, or allow "
            f"them with --skip-unreadable {enough:g}"
        )


@dataclass(frozen=True, kw_only=True)
class FolderListing:
    """The files in a folder, at any depth, without hidden ones and those in hidden folders, such as the copies in
    .ipynb_checkpoints; names are relative to it, and sorted.

    Attributes:
        images: those that can be read here (`images.suffixes`).
        others: all other files.
        closed: sub-folders that cannot be opened.
    """

    images: tuple[str, ...]
    others: tuple[str, ...]
    closed: tuple[str, ...]

    @classmethod
    def of(cls, folder: str | Path) -> FolderListing:
        """Lists a folder. Linked folders are followed, each folder once."""
        closed: list[str] = []
        found = sorted(
            os.path.relpath(os.path.join(where, name), folder)
            for where, names in walk(folder, closed)
            for name in names
            if not name.startswith(".")
        )
        images = tuple(name for name in found if suffix_of(name) in suffixes())
        kept = set(images)
        return cls(
            images=images,
            others=tuple(name for name in found if name not in kept),
            closed=tuple(sorted(os.path.relpath(path, folder) for path in closed)),
        )

    def passed_over(self, used: Collection[str] = ()) -> str:
        """What is not read, in words: "2 files are passed over: 1 .txt, 1 .heic (pillow_heif reads them)", or "".

        Args:
            used: suffixes of other files that are read.
        """
        counts = Counter(suffix for name in self.others if (suffix := suffix_of(name)) not in used)
        parts = []
        if counts:
            kinds = [
                f"{count} {suffix or 'without a suffix'}{_reader(suffix)}" for suffix, count in counts.most_common()
            ]
            parts.append(f"{_files(counts.total())} passed over: {first_of(kinds)}")
        if self.closed:
            parts.append(f"{len(self.closed)} folders cannot be opened: {first_of(self.closed)}")
        return "; ".join(parts)


DEFAULT_POLICY = ReadPolicy()


def walk(folder: str | Path, closed: list[str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yields (path, names of its files) for a folder and its sub-folders, but for hidden ones.

    Linked folders come after the others. Each folder comes once, under the first path found for it, so links that lead
    back up cause no loop.

    Args:
        closed: receives the paths of folders that cannot be opened.
    """
    seen: set[tuple[int, int]] = set()
    waiting = deque([os.fspath(folder)])

    def on_error(error: OSError) -> None:
        if closed is not None:
            closed.append(os.fspath(error.filename))

    while waiting:
        for where, folders, names in os.walk(waiting.popleft(), onerror=on_error):
            status = os.stat(where)
            if (identity := (status.st_dev, status.st_ino)) in seen:
                folders.clear()
                continue
            seen.add(identity)
            # Not gone into at all: a visible link to what lies in a hidden folder must not come too late.
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            waiting.extend(path for name in folders if os.path.islink(path := os.path.join(where, name)))
            yield where, names


def suffix_of(name: str) -> str:
    """The suffix of a file name, in lower case: ".png"."""
    return os.path.splitext(name)[1].lower()


def _reader(suffix: str) -> str:
    reader = missing_readers().get(suffix)
    return f" ({reader} reads them)" if reader else ""


def _files(count: int) -> str:
    return "1 file is" if count == 1 else f"{count} files are"


def first_of(words: Collection[str]) -> str:
    """The first of some words, and how many more there are: "a, b and 7 more"."""
    listed = list(words)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return ", ".join(listed[:_NAMED]) + more
