"""The images at a path, in whatever kind of files."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from ..pipelines.images import SUFFIXES
from .folders import ImageFolder, ImageSource, file_names
from .image_batch import Geometry
from .tabular import SavedDataset, ShardStream


def open_images(path: str | Path, geometry: Geometry, *, column: str | None = None) -> ImageSource:
    """The images at a local path; nothing is downloaded.

    Args:
        path: a folder of images (at any depth), of parquet files or of webdataset shards; a folder that
            `Dataset.save_to_disk` wrote; or a pattern such as "shards/{000..127}.tar" or "data/train-*.parquet".
        column: the column of images in a dataset or in webdataset shards ("jpg"); None if there is only one.

    Raises:
        ValueError: if there are no images, or several kinds of files.
    """
    text = os.fspath(path)
    if "://" in text:
        raise ValueError(f"{text} is not a local path, and nothing is downloaded here: give the path of a copy")
    folder = Path(text)
    if not folder.is_dir():
        return ShardStream(_expand(text), geometry, column=column)
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return SavedDataset(folder, geometry, column=column)
    names = file_names(folder)
    shards = [folder / name for name in names if Path(name).suffix.lower() in (".tar", ".parquet")]
    if not shards:
        return ImageFolder(folder, geometry)
    if any(Path(name).suffix.lower() in SUFFIXES for name in names):
        raise ValueError(
            f"{folder} holds both images and {shards[0].name}: give the sub-folder of the images, or a pattern such as "
            f"{folder / '**' / ('*' + shards[0].suffix)} for the other files"
        )
    return ShardStream(shards, geometry, column=column)


def _expand(pattern: str) -> list[Path]:
    """The files that match a pattern with {000..127} ranges and the usual wildcards, sorted within each range."""
    if os.path.isfile(pattern):
        return [Path(pattern)]
    if braces := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = braces.groups()
        numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        return [file for n in numbers for file in _expand(pattern[: braces.start()] + n + pattern[braces.end() :])]
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise ValueError(f"there is no file {pattern}: give an existing folder, file or pattern")
    return [Path(file) for file in found]
