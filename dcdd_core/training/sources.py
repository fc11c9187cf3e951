"""Opening the images at a path, whatever kind of files they are in."""

from __future__ import annotations

import glob
import os
import re
import warnings
from pathlib import Path

from ..pipelines.image_files import DEFAULT_POLICY, FolderListing, ReadPolicy, suffix_of, walk
from ..types import DCDDWarning
from .captions import SUFFIX, Captions
from .folders import ImageFolder, ImageSource
from .image_batch import Geometry
from .tabular import SavedDataset, ShardStream

_SHARDS = (".tar", ".parquet")
_MOST_FILES = 100_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def open_images(
    path: str | Path,
    geometry: Geometry,
    *,
    column: str | None = None,
    policy: ReadPolicy = DEFAULT_POLICY,
    captions: Captions | None = None,
) -> ImageSource:
    """Opens the images at a local path; nothing is downloaded. Warns about files in a folder that are not read.

    Args:
        path: a folder of images (at any depth), of parquet files or of webdataset shards; a folder that
            `Dataset.save_to_disk` wrote; or a pattern such as "shards/{000..127}.tar" or "data/train-*.parquet".
        column: the column of images in a dataset or in webdataset shards ("jpg"); None if there is only one.
        policy: which images may be left out.
        captions: how captions are read: from a .txt file beside each image of a folder, a column of a dataset, or a
            field of webdataset samples. Images without one are left out if it is required. None for images alone.

    Raises:
        ValueError: if there are no images, several kinds of files, or no captions where they are wanted.
    """
    text = os.fspath(path)
    if not text.strip():
        raise ValueError("the path of the images is empty: give a folder, file or pattern")
    if "://" in text:
        raise ValueError(f"{text} is not a local path, and nothing is downloaded here: give the path of a copy")
    folder = Path(text)
    options = {"column": column, "policy": policy, "captions": captions}
    if not folder.is_dir():
        return ShardStream(_expand(text), geometry, **options)
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return SavedDataset(folder, geometry, **options)
    listing = FolderListing.of(folder)
    shards = [folder / name for name in listing.others if suffix_of(name) in _SHARDS]
    if not shards:
        if column is not None:
            raise ValueError(f"{folder} is a folder of images, which has no columns: leave out --column {column}")
        source: ImageSource = ImageFolder(folder, geometry, policy=policy, listing=listing, captions=captions)
    elif listing.images:
        raise ValueError(
            f"{folder} holds both images and {shards[0].name}: give the sub-folder of the images, or a pattern such as "
            f"{folder / '**' / ('*' + shards[0].suffix)} for the other files"
        )
    else:
        source = ShardStream(shards, geometry, **options)
    read = _SHARDS if shards else () if captions is None else (SUFFIX,)
    source.passed_over = listing.passed_over(used=read)
    if source.passed_over:
        warnings.warn(f"{folder}: {source.passed_over}", DCDDWarning, stacklevel=2)
    return source


def _expand(pattern: str) -> list[Path]:
    """The files that match a pattern with {000..127} ranges and the usual wildcards, sorted within each range."""
    if os.path.isfile(pattern):
        return [Path(pattern)]
    count = 1
    for first, last in _RANGE.findall(pattern):
        if (own := int(last) - int(first) + 1) < 1:
            raise ValueError(f"{{{first}..{last}}} in {pattern} counts down: write the smaller number first")
        count *= own
    if count > _MOST_FILES:
        raise ValueError(
            f"{pattern} stands for {count:,} files, more than {_MOST_FILES:,}: write the numbers that exist, or use a "
            "wildcard such as *.tar"
        )
    return _expanded(pattern)


def _expanded(pattern: str) -> list[Path]:
    if braces := _RANGE.search(pattern):
        first, last = braces.groups()
        numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
        return [file for n in numbers for file in _expanded(pattern[: braces.start()] + n + pattern[braces.end() :])]
    found = sorted(set(_matching(pattern)))
    if not found and glob.glob(pattern):
        raise ValueError(
            f"{pattern} matches folders alone, and patterns are of .tar shards and .parquet files: give one folder"
        )
    if not found:
        raise ValueError(f"there is no file {pattern}: give an existing folder, file or pattern")
    return [Path(file) for file in found]


def _matching(pattern: str) -> list[str]:
    """The files that match a pattern. For "**", linked folders are followed only once; `glob` would run in circles."""
    before, stars, after = re.match(r"(?:(.*?)(?:^|(?<=/))(\*\*)(?:/|$))?(.*)", pattern, re.DOTALL).groups()
    if stars is None:
        return [file for file in glob.glob(pattern) if not os.path.isdir(file)]
    found = []
    for top in glob.glob(before.rstrip("/") or "/") if before else [""]:
        for folder, _ in walk(top or "."):
            below = os.path.relpath(folder, top or ".")
            if below == "." or not any(part.startswith(".") for part in below.split(os.sep)):
                found += _matching(
                    os.path.join(glob.escape(top if below == "." else os.path.join(top, below)), after or "*")
                )
    return found
