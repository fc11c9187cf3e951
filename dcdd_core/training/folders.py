"""Images in folders, and the base class of all image sources."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..pipelines.image_files import DEFAULT_POLICY, FolderListing, ReadPolicy
from ..pipelines.images import UnreadableImage, read_rgb, square, suffixes
from .batches import DataShard, Entry, Mark
from .captions import SUFFIX, Captions, MissingCaption, caption_file, caption_of, read_caption
from .image_batch import Geometry, ImageBatch, TrainingImage


class ImageSource:
    """Base class of image sources: a `Source` of `TrainingImage`s in the sizes of `geometry`.

    Attributes:
        min_side: in pixels; images whose shorter side is smaller are left out.
        passed_over: a description of the files that are not read; "" if there are none.
        captions: how the images' captions are read; None if they are not.
        captioned: whether captions are required; images without one are then left out.
    """

    def __init__(self, name: str, geometry: Geometry, policy: ReadPolicy, *, captions: Captions | None = None):
        self.name = name
        self.geometry = geometry
        self.policy = policy
        self.min_side = policy.least(geometry.resolution)
        self.passed_over = ""
        self.captions = captions
        self.captioned = captions is not None and captions.required

    @property
    def count(self) -> int | None:
        """The number of images; None for a stream, where it is not known."""
        return None

    def changed(self, key: str) -> int | None:
        """When an image's file or its caption's was last changed, in ns since the epoch; None if that is unknown."""
        return None

    def content(self, entry: Entry) -> Any:
        """The image as it is stored: bytes, a path, or a mapping with either."""
        return entry.data

    def caption(self, entry: Entry) -> Any:
        """An image's caption as it is stored: bytes, text, or None."""
        return None

    def load(self, entry: Entry) -> TrainingImage:
        """Decodes an image, crops it to a square and resizes it.

        Raises:
            UnreadableImage: if it cannot be decoded, for whatever reason, is too small, or lacks a required caption.
        """
        caption = None if self.captions is None else self._caption_of(entry, self.captions)
        image = read_rgb(_encoded(self.content(entry)), min_side=self.min_side)
        pixels = square(image, self.geometry.resolution)
        same = self.geometry.token_resolution == self.geometry.resolution
        token_pixels = pixels if same else square(image, self.geometry.token_resolution)
        bare = self.captions is not None and caption is None
        return TrainingImage(key=entry.key, pixels=pixels, token_pixels=token_pixels, caption=caption, uncaptioned=bare)

    def _caption_of(self, entry: Entry, captions: Captions) -> str | None:
        """An image's caption; None if it has none and captions are not required."""
        try:
            return caption_of(self.caption(entry))
        except MissingCaption:
            if captions.required:
                raise
            return None

    def collate(self, items: Sequence[TrainingImage]) -> ImageBatch:
        """Combines items that `load` returned into a batch."""
        pixels = torch.stack([item.pixels for item in items])
        same = self.geometry.token_resolution == self.geometry.resolution
        return ImageBatch(
            keys=tuple(item.key for item in items),
            pixels=pixels,
            token_pixels=pixels if same else torch.stack([item.token_pixels for item in items]),
            captions=None if self.captions is None else tuple(item.caption for item in items),
        )


class ImageFolder(ImageSource):
    """The images in a folder and its sub-folders, whatever their names; hidden files are left out.

    `load_dataset("imagefolder")` is not used: it treats sub-folders called "test" or "dev" as separate splits, and
    writes its list to a cache.

    Args:
        listing: the folder's listing, if it has already been made.
        captions: the caption of "a.jpg" is in "a.txt", beside it; None for images without captions.

    Attributes:
        names: relative paths, sorted.

    Raises:
        ValueError: if there is no such folder, it has no images, or captions are wanted and no image has one.
    """

    def __init__(
        self,
        folder: str | Path,
        geometry: Geometry,
        *,
        policy: ReadPolicy = DEFAULT_POLICY,
        listing: FolderListing | None = None,
        captions: Captions | None = None,
    ):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give one with images in it")
        listing = listing or FolderListing.of(folder)
        self.names = list(listing.images)
        if not self.names:
            found = f"({listing.passed_over()})" if listing.passed_over() else "and no other files"
            raise ValueError(
                f"{folder} holds no images {found}; give a folder with {', '.join(suffixes())} in it or in "
                "its sub-folders"
            )
        if captions is not None:
            _check_captions(self.folder, self.names, set(listing.others), captions)
        super().__init__(str(folder), geometry, policy, captions=captions)

    def caption(self, entry: Entry) -> bytes | None:
        """See `ImageSource.caption`."""
        return read_caption(entry.data)

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self.names)

    def changed(self, key: str) -> int | None:
        """See `ImageSource.changed`."""
        path, times = self.folder / key, []
        for file in (path, caption_file(path)) if self.captions is not None else (path,):
            with suppress(OSError):
                status = file.stat()
                times += [status.st_mtime_ns, status.st_ctime_ns]
        return max(times, default=None)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the names."""
        return digest(self.names)

    def entries(self, shard: DataShard, epoch: int, start: int = 0, mark: Mark | None = None) -> Iterator[Entry]:
        """See `Source.entries`."""
        return (Entry(self.names[i], self.folder / self.names[i]) for i in shard.indices(len(self.names), epoch, start))


def _check_captions(folder: Path, images: Sequence[str], others: Set[str], captions: Captions) -> None:
    """Refuses a folder in which no image has a caption, and a caption column, which folders do not have."""
    if captions.column is not None:
        raise ValueError(
            f"{folder} is a folder of images, whose captions are in {SUFFIX} files beside them: leave --caption-column "
            "out"
        )
    if not any(os.fspath(caption_file(Path(name))) in others for name in images):
        raise ValueError(
            f"{folder} has no captions, which this training needs: no image has a text file of its own name beside it, "
            f"such as {caption_file(Path(images[0]))} for {images[0]}"
        )


def digest(lines: Iterable[str]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the lines."""
    found = hashlib.sha256()
    for line in lines:
        found.update(os.fsencode(line) + b"\n")
    return found.hexdigest()[:16]


def _encoded(value: Any) -> bytes | Path:
    """An image file's bytes or path, from the forms in which datasets store them."""
    if isinstance(value, UnreadableImage):  # found while the file around it was read
        raise value
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str):
        if "://" in value:
            raise UnreadableImage(f"it is at {value}, and nothing is downloaded")
        return Path(value)
    if not isinstance(value, bytes | Path):
        raise UnreadableImage(f"expected an image, got {type(value).__name__}")
    return value
