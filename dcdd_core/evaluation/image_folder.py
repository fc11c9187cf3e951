"""Folders of image files, such as ImageNet's validation set or MJHQ-30K with its sub-folder per category.

Shapes: B batch, S side in pixels.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from PIL import Image

from ..pipelines.image_files import FolderListing
from ..pipelines.images import UnreadableImage, read_rgb, square, suffixes, to_pixels
from ..types import DCDDWarning
from .figures import to_image

#: Name of the scope that covers all categories.
OVERALL = "overall"


class Categorised(Protocol):
    """Anything with a category: an image file or a prompt."""

    @property
    def category(self) -> str: ...


T = TypeVar("T", bound=Categorised)


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """An image file in a folder of images.

    Attributes:
        path: where it is.
        name: its path relative to the folder, such as "animals/a.jpg"; the same on every machine.
        category: empty if there are no categories.
    """

    path: Path
    name: str
    category: str

    @classmethod
    def at(cls, path: Path, root: Path, category: str = "") -> ImageFile:
        """The file at `path` in the folder `root`."""
        return cls(path=path, name=path.relative_to(root).as_posix(), category=category)

    @cached_property
    def key(self) -> str:
        """Its name and a hash of its content, under which measurements are stored: a replaced file is measured again.

        Reads the file on first access.
        """
        return f"{self.name} {hashlib.blake2b(self.path.read_bytes(), digest_size=16).hexdigest()}"


def list_images(folder: Path, *, by_category: bool = False, limit: int | None = None) -> list[ImageFile]:
    """The image files in a folder and its sub-folders, sorted by name; warns of files that are passed over.

    Args:
        by_category: treat sub-folders as categories.
        limit: see `at_most`.

    Raises:
        ValueError: if the folder is missing or has no images; with `by_category`, for an image outside any sub-folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected a folder of images ({', '.join(suffixes())})")
    listing = FolderListing.of(folder)
    found = []
    for name in listing.images:
        parts = Path(name).parts
        if by_category and len(parts) == 1:
            raise ValueError(
                f"{folder / name} is not in a sub-folder, but --by-category takes each sub-folder as a category: move "
                "it into one, or leave out --by-category"
            )
        found.append(ImageFile.at(folder / name, folder, parts[0] if by_category else ""))
    if passed_over := listing.passed_over():
        warnings.warn(f"{folder}: {passed_over}", DCDDWarning, stacklevel=2)
    if not found:
        raise ValueError(f"{folder} holds no images ({', '.join(suffixes())}), and neither do its sub-folders")
    return at_most(sorted(found, key=lambda image: image.name), limit, by_category=by_category)


def at_most(items: Sequence[T], limit: int | None, *, by_category: bool) -> list[T]:
    """The first `limit` items, with `by_category` of each category; all items if `limit` is None.

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
    """Checks before hours of work that every category can have a Frechet distance.

    Args:
        categories: the category of each image.

    Raises:
        ValueError: for a category with a single image, and for one with the reserved name "overall".
    """
    counts = Counter(categories)
    alone = sorted(category for category, count in counts.items() if count < 2)
    if alone:
        where = f" in {', '.join(alone[:5])}" if any(alone) else ""
        raise ValueError(
            f"a Frechet distance needs at least two images, got one{where}: add images, or leave out --by-category"
        )
    if OVERALL in counts:
        raise ValueError(f"a category cannot be called {OVERALL!r}, which stands for all images: rename it")


def open_image(path: Path) -> Image.Image:
    """Reads an image file with `read_rgb`.

    Raises:
        ValueError: if the file is not an image or is damaged; the message names it.
    """
    try:
        return read_rgb(path)
    except UnreadableImage as error:
        raise ValueError(f"{path} cannot be read as an image ({error})") from error


def read_pixels(images: Sequence[ImageFile], size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The images cropped and resized to squares, [B, 3, S, S] in -1..1.

    Raises:
        ValueError: for an unreadable image; the message names it.
    """
    return to_pixels(torch.stack([square(open_image(image.path), size) for image in images]), device)


def as_measured(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Pixels [B, 3, H, W] in -1..1 rounded to 8 bits and resized to squares: [B, 3, S, S] in -1..1.

    Files hold 8 bits, so real and decoded images are treated alike. A decoder may paint larger images than the
    tokenizer; all are measured at one size [choice].
    """
    return to_pixels(torch.stack([square(to_image(image), size) for image in pixels]), pixels.device)
