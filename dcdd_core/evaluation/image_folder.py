"""Folders of pictures: ImageNet's validation set, MJHQ-30K with a sub-folder for each category, or any other.

Shapes: B batch, S side in pixels.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from PIL import Image

from ..pipelines.images import SUFFIXES, UnreadablePicture, read_rgb, square, to_pixels
from .figures import to_image

#: Scope of all pictures together, beside the categories.
OVERALL = "overall"


class Categorised(Protocol):
    """What may belong to a category: a picture or a prompt."""

    @property
    def category(self) -> str: ...


T = TypeVar("T", bound=Categorised)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture file of a set.

    Attributes:
        path: where it is.
        name: its path inside the set, "animals/a.jpg", on every machine the same.
        category: empty where there are none.
    """

    path: Path
    name: str
    category: str

    @classmethod
    def at(cls, path: Path, root: Path, category: str = "") -> Picture:
        """The file at `path` in the set at `root`."""
        return cls(path=path, name=path.relative_to(root).as_posix(), category=category)

    @cached_property
    def key(self) -> str:
        """Its name and a hash of its bytes, by which its measurements are kept: a replaced file is measured anew.

        The file is read when this is first asked for.
        """
        return f"{self.name} {hashlib.blake2b(self.path.read_bytes(), digest_size=16).hexdigest()}"


def pictures_in(folder: Path, *, by_category: bool = False, limit: int | None = None) -> list[Picture]:
    """The pictures in a folder and its sub-folders, in the order of their names.

    Args:
        by_category: take the sub-folders as categories.
        limit: see `at_most`.

    Raises:
        ValueError: for a folder that is absent or has no pictures, and for pictures outside of any category.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected one with pictures ({', '.join(SUFFIXES)})")
    found = []
    for path in folder.rglob("*"):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file():
            parts = path.relative_to(folder).parts
            if by_category and len(parts) == 1:
                raise ValueError(
                    f"{path} lies in no sub-folder, and with --by-category each is a category: move it into one"
                )
            found.append(Picture.at(path, folder, parts[0] if by_category else ""))
    if not found:
        raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}), in its sub-folders neither")
    return at_most(sorted(found, key=lambda picture: picture.name), limit, by_category=by_category)


def at_most(items: Sequence[T], limit: int | None, *, by_category: bool) -> list[T]:
    """The first `limit` of each category, or of all; everything for None.

    Raises:
        ValueError: for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}")
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        counted = item.category if by_category else ""
        seen[counted] += 1
        if limit is None or seen[counted] <= limit:
            kept.append(item)
    return kept


def check_categories(categories: Sequence[str]) -> None:
    """Before hours of work: whether a Frechet distance can be taken of every category, given that of each picture.

    Raises:
        ValueError: for a category of a single picture, and for one that is called like all of them together.
    """
    counts = Counter(categories)
    alone = sorted(category for category, count in counts.items() if count < 2)
    if alone:
        where = f" in {', '.join(alone[:5])}" if any(alone) else ""
        raise ValueError(
            f"a Frechet distance needs at least two pictures, got one{where}: give more, or measure without "
            "--by-category"
        )
    if OVERALL in counts:
        raise ValueError(f"a category called {OVERALL} would be taken for all pictures together: rename it")


def open_picture(path: Path) -> Image.Image:
    """A picture file, as `read_rgb` reads it.

    Raises:
        ValueError: naming a file that is no picture, or a damaged one.
    """
    try:
        return read_rgb(path)
    except UnreadablePicture as error:
        raise ValueError(f"{path} cannot be read as a picture ({error})") from error


def read_pixels(pictures: Sequence[Picture], size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The pictures as squares, [B, 3, S, S] in -1..1.

    Raises:
        ValueError: naming a picture that cannot be read.
    """
    return to_pixels(torch.stack([square(open_picture(picture.path), size) for picture in pictures]), device)


def as_measured(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Pixels [B, 3, H, W] in -1..1 as a file would hold them, in 8 bits and as squares: [B, 3, S, S] in -1..1.

    A decoder may paint larger than the tokenizer's pictures; all are measured at one size [choice].
    """
    return to_pixels(torch.stack([square(to_image(picture), size) for picture in pixels]), pixels.device)
