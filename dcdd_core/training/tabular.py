"""Images in tables: saved datasets, parquet files, webdataset shards."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from ..files import reading, regular_file
from ..pipelines.image_files import DEFAULT_POLICY, ReadPolicy
from ..types import DCDDWarning
from .batches import DataShard, Entry, Mark
from .captions import COLUMNS, FIELDS, Captions
from .folders import ImageSource, digest
from .image_batch import Geometry
from .shards import cut_short, is_empty, parquet_rows, parquet_schema, tar_fields, tar_rows

_SPLIT = r"(train|validation|valid|val|dev|test)(?![a-z])"


class SavedDataset(ImageSource):
    """A dataset that `datasets.Dataset.save_to_disk` wrote, memory-mapped. If it has several splits, "train" is used.

    Raises:
        ValueError: if it cannot be read, or if it is unclear which column holds the images.
    """

    def __init__(
        self,
        folder: str | Path,
        geometry: Geometry,
        *,
        column: str | None = None,
        policy: ReadPolicy = DEFAULT_POLICY,
        captions: Captions | None = None,
    ):
        datasets = _datasets()
        _check_files(Path(folder))
        # An IndexError, for example, for one without rows.
        with reading(folder, "a saved dataset", "give a folder that Dataset.save_to_disk wrote, with rows in it"):
            found = datasets.load_from_disk(os.fspath(folder))
        if isinstance(found, datasets.DatasetDict):
            if "train" not in found:
                raise ValueError(
                    f"{folder} holds the splits {sorted(found)}, but no 'train': give the folder of one split"
                )
            found = found["train"]
        self.column = _chosen(list(found.features), lambda: _image_columns(found.features), column, str(folder))
        self.caption_column = None if captions is None else captions.choose(list(found.features), COLUMNS, str(folder))
        columns = [self.column, *([] if self.caption_column is None else [self.caption_column])]
        found = found.with_format(None).select_columns(columns)
        if isinstance(found.features[self.column], datasets.Image):
            found = found.cast_column(self.column, datasets.Image(decode=False))
        self.data = found
        super().__init__(str(folder), geometry, policy, captions=captions)

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.data)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the number of rows, the columns, and the files' names and sizes."""
        files = [Path(file["filename"]) for file in self.data.cache_files]
        columns = _joined(self.column, self.caption_column)
        return digest([f"{len(self.data)} {columns}", *(f"{file.name} {file.stat().st_size}" for file in files)])

    def entries(self, shard: DataShard, epoch: int, start: int = 0, mark: Mark | None = None) -> Iterator[Entry]:
        """See `Source.entries`."""
        return (Entry(f"row {i}", i) for i in shard.indices(len(self.data), epoch, start))

    def content(self, entry: Entry) -> Any:
        """See `ImageSource.content`."""
        return self.data[entry.data][self.column]

    def caption(self, entry: Entry) -> Any:
        """See `ImageSource.caption`."""
        return self.data[entry.data][self.caption_column]


class ShardStream(ImageSource):
    """Parquet files or webdataset shards (.tar), read one after the other; empty ones are skipped.

    Every epoch has its own order of the files, and shuffles the images within windows: `DataShard.window` images are
    read, undecoded, and handed out in random order. If the number of files is a multiple of the world size, each
    process reads its own files; otherwise all processes read everything and take turns, as with
    `split_dataset_by_node`.

    The readers and shuffle buffers of `datasets` are not used: the readers trust whatever size a file declares, and the
    buffers lose their content when a run is resumed.

    Args:
        files: all .parquet or all .tar.
        column, captions: as for `open_images`.

    Raises:
        ValueError: for files of another kind or of several splits, for a missing file, and for a missing column.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        geometry: Geometry,
        *,
        column: str | None = None,
        policy: ReadPolicy = DEFAULT_POLICY,
        captions: Captions | None = None,
    ):
        self.files = [Path(file) for file in files]
        kinds = {file.suffix.lower() for file in self.files}
        if kinds not in ({".tar"}, {".parquet"}):
            more = f" and {len(self.files) - 3} more" if len(self.files) > 3 else ""
            got = ", ".join(str(file) for file in self.files[:3]) or "none"
            raise ValueError(
                f"expected .tar shards or .parquet files, got {got}{more}: give files of one of the two kinds, or a "
                "folder of images"
            )
        if missing := [str(file) for file in self.files if not file.is_file()]:
            raise ValueError(f"{missing[0]} does not exist ({len(missing)} of {len(self.files)} files are missing)")
        splits = {match[1] for file in self.files if (match := re.match(_SPLIT, file.name))}
        if len(splits) > 1:
            raise ValueError(
                f"these files belong to several splits ({', '.join(sorted(splits))}): choose one with a pattern, such "
                f"as {self.files[0].parent / ('train*' + self.files[0].suffix)}"
            )
        if empty := [file for file in self.files if is_empty(file)]:
            if len(empty) == len(self.files):
                raise ValueError(f"{empty[0]} is empty, and so are all {len(empty)} files: download or make them again")
            self.files = [file for file in self.files if file not in set(empty)]
            for file in empty:
                warnings.warn(f"{file} is empty and passed over", DCDDWarning, stacklevel=2)
        self.tar = kinds == {".tar"}
        self.column, self.caption_column = self._chosen_columns(self.files[0], column, captions)
        self._columns = (self.column, *([] if self.caption_column is None else [self.caption_column]))
        super().__init__(str(self.files[0].parent), geometry, policy, captions=captions)

    @property
    def stream_files(self) -> int:
        """The number of files."""
        return len(self.files)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the columns, and the files' names and sizes."""
        columns = _joined(self.column, self.caption_column)
        return digest([columns, *(f"{file.name} {file.stat().st_size}" for file in self.files)])

    def content(self, entry: Entry) -> Any:
        """See `ImageSource.content`."""
        return entry.data[0]

    def caption(self, entry: Entry) -> Any:
        """See `ImageSource.caption`."""
        return entry.data[1]

    def entries(self, shard: DataShard, epoch: int, start: int = 0, mark: Mark | None = None) -> Iterator[Entry]:
        """See `Source.entries`. Without a mark, everything before `start` is read again, but not decoded."""
        files = [self.files[i] for i in shard.permutation(len(self.files), epoch)]
        by_file = len(files) % shard.world == 0
        if by_file:
            files = files[shard.rank :: shard.world]
        turn, step = (0, 1) if by_file else (shard.rank, shard.world)
        position, number, row = mark or (0, 0, 0)
        if position > start:
            raise ValueError(f"a mark at {position} lies after the start at {start}: it belongs to another position")
        rows = islice(self._rows(files, number, row), 0 if mark else turn, None, step)
        # In the stored order a window is one image, so that the stream can be entered at any image.
        size = 1 if shard.seed is None else shard.window
        while window := list(islice(rows, size)):
            here = [position, window[0][0], window[0][1]]
            for i in shard.permutation(len(window), epoch, position):
                if position >= start:
                    yield Entry(window[i][2], window[i][3], here)
                position += 1

    def _rows(self, files: Sequence[Path], number: int, row: int) -> Iterator[tuple[int, int, str, Any]]:
        """(file's number, row in it, key, undecoded values) of each row from the given one on."""
        for j in range(number, len(files)):
            k = row if j == number else 0
            try:
                if self.tar and cut_short(files[j]):
                    problem = f"{files[j]} has no end marker: images may be missing from it; make it again"
                    warnings.warn(problem, DCDDWarning, stacklevel=2)
                for name, values in self._open(files[j], k):
                    yield j, k, f"{files[j].name}:{k if name is None else f'{name}.{self.column}'}", values
                    k += 1
                if k == 0:
                    warnings.warn(f"{files[j]} has no rows and is passed over", DCDDWarning, stacklevel=2)
            except Exception as error:
                said = " ".join(str(error).split())  # Some libraries' messages have several lines.
                raise ValueError(
                    f"{files[j]} cannot be read beyond row {k} ({type(error).__name__}: {said}): it is damaged or has "
                    "other columns; make it again, or leave it out"
                ) from error

    def _open(self, file: Path, start: int) -> Iterator[tuple[str | None, Any]]:
        """(key in a tar, undecoded values) of each row of a file from row `start` on."""
        if self.tar:
            return tar_rows(file, self._columns, start)
        return ((None, values) for values in parquet_rows(file, self._columns, start))

    def _chosen_columns(self, file: Path, wanted: str | None, captions: Captions | None) -> tuple[str, str | None]:
        """The columns of images and of captions, found in one file and taken to be the same in all."""
        try:
            names, images = tar_fields(file) if self.tar else ((), ())
            schema = None if self.tar else parquet_schema(file)
        except Exception as error:
            kind, said = "a webdataset shard" if self.tar else "a parquet file", " ".join(str(error).split())
            raise ValueError(f"{file} cannot be read as {kind} ({type(error).__name__}: {said})") from error
        if schema is not None:
            features = _datasets().Features.from_arrow_schema(schema)
            names, images = list(features), [] if wanted is not None else _image_columns(features)
        column = _chosen(names, lambda: images, wanted, str(file))
        if captions is None:
            return column, None
        return column, captions.choose(names, FIELDS if self.tar else COLUMNS, str(file))


def _check_files(folder: Path) -> None:
    """Refuses files on which the libraries that read a saved dataset would hang, and folder names they cannot handle.

    Raises:
        ValueError: naming the file.
    """
    try:
        os.fspath(folder.resolve()).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{folder}: the name of a saved dataset's folder must be UTF-8; rename it") from error
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".arrow", ".json"):
            regular_file(path, "a part of a saved dataset")


def _joined(column: str, caption_column: str | None) -> str:
    """Both columns as one text, for a fingerprint."""
    return column if caption_column is None else f"{column} {caption_column}"


def _datasets():
    try:
        import datasets
    except ImportError as error:
        raise ValueError("this needs the datasets library: install the pack's 'train' extra, or datasets") from error
    return datasets


def _chosen(names: Sequence[str], images: Callable[[], Sequence[str]], wanted: str | None, where: str) -> str:
    """The wanted column, or the only one that can hold images.

    Raises:
        ValueError: naming the existing columns.
    """
    if wanted is not None:
        if wanted not in names:
            raise ValueError(f"{where} has no column {wanted!r}; it has {', '.join(names)}")
        return wanted
    found = images()
    if len(found) != 1:
        problem = f"has several columns of images ({', '.join(found)})" if found else "has no column of images"
        raise ValueError(f"{where} {problem}; name the one to use, of {', '.join(names)}")
    return found[0]


def _image_columns(features: Mapping[str, Any]) -> list[str]:
    """The columns that can hold images; image columns come before columns of bytes."""
    datasets = _datasets()
    binary = {"binary", "large_binary"}
    kinds = (
        [name for name, feature in features.items() if isinstance(feature, datasets.Image)],
        [name for name, feature in features.items() if isinstance(feature, Mapping) and "bytes" in feature],
        [name for name, feature in features.items() if getattr(feature, "dtype", None) in binary],
    )
    return next((names for names in kinds if names), [])
