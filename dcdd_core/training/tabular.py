"""Pictures in columns: saved datasets, parquet files, webdataset shards."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from ..types import DCDDWarning
from .batches import Entry, Mark, Share
from .folders import Pictures, digest
from .image_batch import Geometry

_SPLIT = r"(train|validation|valid|val|dev|test)(?![a-z])"


class SavedDataset(Pictures):
    """A dataset that `datasets.Dataset.save_to_disk` wrote, memory-mapped; of several splits, "train".

    Raises:
        ValueError: if it cannot be read, or has no one column of pictures.
    """

    def __init__(self, folder: str | Path, geometry: Geometry, *, column: str | None = None):
        datasets = _datasets()
        try:
            found = datasets.load_from_disk(os.fspath(folder))
        except Exception as error:  # such as an IndexError for one without rows
            raise ValueError(
                f"{folder} cannot be read as a saved dataset ({type(error).__name__}: {error}): give a folder that "
                "Dataset.save_to_disk wrote, with rows in it"
            ) from error
        if isinstance(found, datasets.DatasetDict):
            if "train" not in found:
                raise ValueError(f"{folder} holds the splits {sorted(found)} and no 'train': give the folder of one")
            found = found["train"]
        self.column = _image_column(found.features, column, str(folder))
        found = found.with_format(None).select_columns([self.column])
        if isinstance(found.features[self.column], datasets.Image):
            found = found.cast_column(self.column, datasets.Image(decode=False))
        self.data = found
        super().__init__(str(folder), geometry)

    @cached_property
    def fingerprint(self) -> str:
        """Of the rows' number, the column, and the files' names and sizes."""
        files = [Path(file["filename"]) for file in self.data.cache_files]
        return digest([f"{len(self.data)} {self.column}", *(f"{file.name} {file.stat().st_size}" for file in files)])

    def entries(self, share: Share, epoch: int, start: int = 0, mark: Mark | None = None) -> Iterator[Entry]:
        """See `Source.entries`."""
        return (Entry(f"row {i}", i) for i in share.indices(len(self.data), epoch, start))

    def content(self, entry: Entry) -> Any:
        """See `Pictures.content`."""
        return self.data[entry.data][self.column]


class ShardStream(Pictures):
    """Parquet files or webdataset shards (.tar), read one after the other through `datasets`' own readers.

    An epoch takes the files in an order of its own, and the pictures within windows: so many of them (`Share.window`)
    are read, undecoded, and given out in an order of their own. Where the number of files is a multiple of the number
    of processes each gets files of its own; otherwise all read everything and take turns (as `split_dataset_by_node`
    does).

    The shuffle buffers of `datasets` are not used: what they hold is lost when a run is resumed. Nor is
    `load_dataset`: it reports every use to a server.

    Args:
        files: all .parquet or all .tar.
        column: as for `open_pictures`.

    Raises:
        ValueError: for files of another kind or of several splits, and for a missing column.
    """

    def __init__(self, files: Sequence[str | Path], geometry: Geometry, *, column: str | None = None):
        self.files = [Path(file) for file in files]
        suffixes = {file.suffix.lower() for file in self.files}
        if suffixes not in ({".tar"}, {".parquet"}):
            raise ValueError(
                f"expected .tar shards or .parquet files, got {len(self.files)} files ending in "
                f"{sorted(suffixes) or 'nothing'}: give files of one of the two kinds, or a folder of images"
            )
        if missing := [str(file) for file in self.files if not file.is_file()]:
            raise ValueError(f"{missing[0]} does not exist ({len(missing)} of {len(self.files)} files are missing)")
        splits = {match[1] for file in self.files if (match := re.match(_SPLIT, file.name))}
        if len(splits) > 1:
            raise ValueError(
                f"these files are of several splits ({', '.join(sorted(splits))}): choose one by a pattern, such as "
                f"{self.files[0].parent / ('train*' + self.files[0].suffix)}"
            )
        self.tar = suffixes == {".tar"}
        self.column = None  # all of them
        self.column = _image_column(self._open(self.files[0]).features, column, str(self.files[0]))
        super().__init__(str(self.files[0].parent), geometry)

    @cached_property
    def fingerprint(self) -> str:
        """Of the column, and the files' names and sizes."""
        return digest([self.column, *(f"{file.name} {file.stat().st_size}" for file in self.files)])

    def entries(self, share: Share, epoch: int, start: int = 0, mark: Mark | None = None) -> Iterator[Entry]:
        """See `Source.entries`. Without a mark, everything before `start` is read, but not decoded."""
        files = [self.files[i] for i in share.permutation(len(self.files), epoch)]
        by_file = len(files) % share.world == 0
        if by_file:
            files = files[share.rank :: share.world]
        turn, step = (0, 1) if by_file else (share.rank, share.world)
        position, number, row = mark or (0, 0, 0)
        if position > start:
            raise ValueError(f"a mark at {position} is behind the start at {start}: it is of another position")
        rows = islice(self._rows(files, number, row), 0 if mark else turn, None, step)
        # In the stored order a window is one picture, which can then be entered anywhere.
        size = 1 if share.seed is None else share.window
        while window := list(islice(rows, size)):
            here = [position, window[0][0], window[0][1]]
            for i in share.permutation(len(window), epoch, position):
                if position >= start:
                    yield Entry(window[i][2], window[i][3], here)
                position += 1

    def _rows(self, files: Sequence[Path], number: int, row: int) -> Iterator[tuple[int, int, str, Any]]:
        """(number of the file, row in it, key, undecoded value) of each row from the given one on."""
        for j in range(number, len(files)):
            k = row if j == number else 0
            rows = self._open(files[j])
            if self.tar and _cut_short(files[j]):
                doubt = f"{files[j]} has no end: pictures may be missing from it, make it again"
                warnings.warn(doubt, DCDDWarning, stacklevel=2)
            try:
                for value in rows.skip(k) if k else rows:
                    name = f"{value['__key__']}.{self.column}" if self.tar else k
                    yield j, k, f"{files[j].name}:{name}", value[self.column]
                    k += 1
            except Exception as error:
                raise ValueError(
                    f"{files[j]} cannot be read beyond its row {k} ({type(error).__name__}: {error}): it is damaged or "
                    "has other columns; make it again, or leave it out"
                ) from error

    def _open(self, file: Path):
        """One file as a `datasets.IterableDataset`, its pictures as they are stored, bytes and path."""
        datasets = _datasets()
        from datasets.data_files import DataFilesDict, DataFilesList
        from datasets.packaged_modules.parquet.parquet import Parquet
        from datasets.packaged_modules.webdataset.webdataset import WebDataset

        # Not as a pattern: a name may hold brackets.
        files = DataFilesDict({"train": DataFilesList([str(file.absolute())], origin_metadata=[()])})
        options = {} if self.tar or self.column is None else {"columns": [self.column]}
        reader = WebDataset if self.tar else Parquet
        # The reader wants a folder for its cache, and puts nothing there when it streams.
        with tempfile.TemporaryDirectory() as unused:
            try:
                rows = reader(data_files=files, cache_dir=unused, **options).as_streaming_dataset(split="train")
            except Exception as error:
                kind = "a webdataset shard" if self.tar else "a parquet file"
                raise ValueError(f"{file} cannot be read as {kind} ({type(error).__name__}: {error})") from error
        # Not Image(decode=False): where a file of the picture's name lies in the working directory, the picture's bytes
        # would give way to that file (Image.encode_example).
        if isinstance(rows.features.get(self.column), datasets.Image):
            rows = rows.cast_column(self.column, {"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
        return rows


def _datasets():
    try:
        import datasets
    except ImportError as error:
        raise ValueError("this needs the datasets library: install the pack's 'train' extra, or datasets") from error
    return datasets


def _image_column(features: Mapping[str, Any], wanted: str | None, where: str) -> str:
    """The wanted column, or the only one that can hold pictures, the likeliest kind first.

    Raises:
        ValueError: naming the columns that there are.
    """
    datasets = _datasets()
    if wanted is not None:
        if wanted not in features:
            raise ValueError(f"{where} has no column {wanted!r}; it has {', '.join(features)}")
        return wanted
    binary = {"binary", "large_binary"}
    kinds = (
        [name for name, feature in features.items() if isinstance(feature, datasets.Image)],
        [name for name, feature in features.items() if isinstance(feature, Mapping) and "bytes" in feature],
        [name for name, feature in features.items() if getattr(feature, "dtype", None) in binary],
    )
    found = next((names for names in kinds if names), [])
    if len(found) != 1:
        problem = f"has several columns of pictures ({', '.join(found)})" if found else "has no column of pictures"
        raise ValueError(f"{where} {problem}; name the one to use, of {', '.join(features)}")
    return found[0]


def _cut_short(tar: Path) -> bool:
    """Whether the empty blocks are missing that end a tar; without them, tarfile stops in silence where it can."""
    with tar.open("rb") as file:
        file.seek(-min(1024, tar.stat().st_size), os.SEEK_END)
        return any(file.read())
