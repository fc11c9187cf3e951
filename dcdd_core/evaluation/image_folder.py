"""Folders of image files, such as ImageNet's validation set or MJHQ-30K with its sub-folder per category.

Shapes: B batch, S side in pixels.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from PIL import Image

from ..files import regular_file
from ..pipelines.image_files import FolderListing, ReadPolicy
from ..pipelines.images import UnreadableImage, read_rgb, size_of, square, suffixes, to_pixels
from ..pipelines.progress import ProgressBar
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

        Reads the file on first access; if it cannot be opened or is not a regular file, the key is the name alone.
        """
        try:
            content = regular_file(self.path, "an image").read_bytes()
        except (OSError, ValueError):
            return self.name
        return f"{self.name} {hashlib.blake2b(content, digest_size=16).hexdigest()}"


def list_images(folder: Path, *, by_category: bool = False, limit: int | None = None) -> list[ImageFile]:
    """The image files in a folder and its sub-folders, sorted by name; warns about files that are passed over.

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
    """The first `limit` items, or with `by_category` those of each category; all items if `limit` is None.

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


def read_readable(
    images: Sequence[ImageFile], *sizes: int, device: torch.device | str = "cpu"
) -> tuple[list[ImageFile], list[torch.Tensor]]:
    """The images that can be read, and at each size their pixels, as `read_pixels`; warns about the others."""
    found, squares = [], []
    for image in images:
        try:
            opened = read_rgb(image.path)
        except UnreadableImage as error:
            warnings.warn(f"{image.path} is skipped: {error}", DCDDWarning, stacklevel=2)
        else:
            found.append(image)
            squares.append([square(opened, size) for size in sizes])
    return found, [to_pixels(torch.stack(column), device) for column in zip(*squares)]


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """The images that an evaluation does not use, by name."""

    unreadable: tuple[str, ...] = ()
    small: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = []
        for names, why in ((self.unreadable, "cannot be read"), (self.small, "are too small")):
            if names:
                parts.append(f"{len(names)} images {why} and are left out: {', '.join(names)}")
        return ". ".join(parts)


NOTHING_LEFT_OUT = LeftOut()


def large_enough(
    images: Sequence[ImageFile], policy: ReadPolicy, side: int, *, shown: bool = True
) -> tuple[list[ImageFile], tuple[str, ...]]:
    """The images that are not enlarged beyond what the policy allows, and the names of the others.

    Only headers are read; what cannot be read is kept, for `read_readable` to find.

    Args:
        side: S, at which the images are used.
        shown: whether to show a progress bar; False for all processes but the first.

    Raises:
        ValueError: if all are too small.
    """
    least = policy.least(side)
    bar = ProgressBar(images, label="sizes of images", unit="image", shown=shown)
    sizes = ((image, size_of(image.path)) for image in bar)
    small = {image: size for image, size in sizes if size is not None and min(size) < least}
    if len(small) == len(images):
        image, (width, height) = next(iter(small.items()))
        raise ValueError(
            f"all {len(small)} images have a side below {least} pixels and would be enlarged to {side}, such as "
            f"{image.path} of {width} x {height}: give larger ones, or allow them with --min-side"
        )
    return [image for image in images if image not in small], tuple(image.name for image in small)


def readable(
    images: Sequence[ImageFile], measured: Collection[str], policy: ReadPolicy, source: str
) -> tuple[list[ImageFile], tuple[str, ...]]:
    """The images that were measured, and the names of those that cannot be read.

    Args:
        measured: keys of the measured images.
        source: where the images are from, for the message.

    Raises:
        ValueError: if more are unreadable than the policy allows; the message names all of them.
    """
    reasons: dict[str, str] = {}
    for image in images:
        if image.key not in measured:
            try:
                read_rgb(image.path)
            except UnreadableImage as error:
                reasons[image.name] = str(error)
    policy.check(len(images), len(reasons), reasons, source)
    return [image for image in images if image.name not in reasons], tuple(reasons)


def as_measured(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Pixels [B, 3, H, W] in -1..1 rounded to 8 bits and resized to squares: [B, 3, S, S] in -1..1.

    Files hold 8 bits, so real and decoded images are treated alike. A decoder may paint larger images than the
    tokenizer; all are measured at one size [choice].
    """
    return to_pixels(torch.stack([square(to_image(image), size) for image in pixels]), pixels.device)
