"""Images in tables: saved datasets, parquet files, webdataset shards."""

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
from .batches import DataShard, Entry, Mark
from .folders import ImageSource, digest
from .image_batch import Geometry

_SPLIT = r"(train|validation|valid|val|dev|test)(?![a-z])"


class SavedDataset(ImageSource):
    """A dataset that `datasets.Dataset.save_to_disk` wrote, memory-mapped. If it has several splits, "train" is used.

    Raises:
        ValueError: if it cannot be read, or if it is unclear which column holds the images.
    """

    def __init__(self, folder: str | Path, geometry: Geometry, *, column: str | None = None):
        datasets = _datasets()
        try:
            found = datasets.load_from_disk(os.fspath(folder))
        except Exception as error:  # An IndexError, for example, for one without rows.
            raise ValueError(
                f"{folder} cannot be read as a saved dataset ({type(error).__name__}: {error}): give a folder that "
                "Dataset.save_to_disk wrote, with rows in it"
            ) from error
        if isinstance(found, datasets.DatasetDict):
            if "train" not in found:
                raise ValueError(
                    f"{folder} holds the splits {sorted(found)}, but no 'train': give the folder of one split"
                )
            found = found["train"]
        self.column = _image_column(found.features, column, str(folder))
        found = found.with_format(None).select_columns([self.column])
        if isinstance(found.features[self.column], datasets.Image):
            found = found.cast_column(self.column, datasets.Image(decode=False))
        self.data = found
        super().__init__(str(folder), geometry)

    @cached_property
    def fingerprint(self) -> str:
        """Of the number of rows, the column, and the files' names and sizes."""
        files = [Path(file["filename"]) for file in self.data.cache_files]
        return digest([f"{len(self.data)} {self.column}", *(f"{file.name} {file.stat().st_size}" for file in files)])

    def entries(self, shard: DataShard, epoch: int, start: int = 0, mark: Mark | None = None) -> Iterator[Entry]:
        """See `Source.entries`."""
        return (Entry(f"row {i}", i) for i in shard.indices(len(self.data), epoch, start))

    def content(self, entry: Entry) -> Any:
        """See `ImageSource.content`."""
        return self.data[entry.data][self.column]


class ShardStream(ImageSource):
    """Parquet files or webdataset shards (.tar), read one after the other through `datasets`' own readers.

    Every epoch has its own order of the files, and shuffles the images within windows: `DataShard.window` images are
    read, undecoded, and handed out in random order. If the number of files is a multiple of the world size, each
    process reads its own files; otherwise all processes read everything and take turns, as with
    `split_dataset_by_node`.

    The shuffle buffers of `datasets` are not used: their content is lost when a run is resumed. Nor is `load_dataset`:
    it reports every use to a server.

    Args:
        files: all .parquet or all .tar.
        column: as for `open_images`.

    Raises:
        ValueError: for files of another kind or of several splits, for a missing file, and for a missing column.
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
                f"these files belong to several splits ({', '.join(sorted(splits))}): choose one with a pattern, such "
                f"as {self.files[0].parent / ('train*' + self.files[0].suffix)}"
            )
        self.tar = suffixes == {".tar"}
        self.column = None  # All columns, to find the one with the images.
        self.column = _image_column(self._open(self.files[0]).features, column, str(self.files[0]))
        super().__init__(str(self.files[0].parent), geometry)

    @cached_property
    def fingerprint(self) -> str:
        """Of the column, and the files' names and sizes."""
        return digest([self.column, *(f"{file.name} {file.stat().st_size}" for file in self.files)])

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
        # In the stored order a window is one image: the stream can then be entered at any image.
        size = 1 if shard.seed is None else shard.window
        while window := list(islice(rows, size)):
            here = [position, window[0][0], window[0][1]]
            for i in shard.permutation(len(window), epoch, position):
                if position >= start:
                    yield Entry(window[i][2], window[i][3], here)
                position += 1

    def _rows(self, files: Sequence[Path], number: int, row: int) -> Iterator[tuple[int, int, str, Any]]:
        """(number of the file, row in it, key, undecoded value) of each row from the given one on."""
        for j in range(number, len(files)):
            k = row if j == number else 0
            rows = self._open(files[j])
            if self.tar and _cut_short(files[j]):
                problem = f"{files[j]} has no end marker: images may be missing from it; make it again"
                warnings.warn(problem, DCDDWarning, stacklevel=2)
            try:
                for value in rows.skip(k) if k else rows:
                    name = f"{value['__key__']}.{self.column}" if self.tar else k
                    yield j, k, f"{files[j].name}:{name}", value[self.column]
                    k += 1
            except Exception as error:
                raise ValueError(
                    f"{files[j]} cannot be read beyond row {k} ({type(error).__name__}: {error}): it is damaged or has "
                    "other columns; make it again, or leave it out"
                ) from error

    def _open(self, file: Path):
        """One file as a `datasets.IterableDataset`, its images as they are stored, bytes and path."""
        datasets = _datasets()
        from datasets.data_files import DataFilesDict, DataFilesList
        from datasets.packaged_modules.parquet.parquet import Parquet
        from datasets.packaged_modules.webdataset.webdataset import WebDataset

        # Not as a pattern: a file's name may contain brackets.
        files = DataFilesDict({"train": DataFilesList([str(file.absolute())], origin_metadata=[()])})
        options = {} if self.tar or self.column is None else {"columns": [self.column]}
        reader = WebDataset if self.tar else Parquet
        # The reader requires a cache folder, but does not use it when it streams.
        with tempfile.TemporaryDirectory() as unused:
            try:
                rows = reader(data_files=files, cache_dir=unused, **options).as_streaming_dataset(split="train")
            except Exception as error:
                kind = "a webdataset shard" if self.tar else "a parquet file"
                raise ValueError(f"{file} cannot be read as {kind} ({type(error).__name__}: {error})") from error
        # Not Image(decode=False): if the working directory holds a file of the image's name, the image's bytes would be
        # replaced by that file's (Image.encode_example).
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
    """The wanted column, or the only one that can hold images; image columns come before columns of bytes.

    Raises:
        ValueError: naming the existing columns.
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
        problem = f"has several columns of images ({', '.join(found)})" if found else "has no column of images"
        raise ValueError(f"{where} {problem}; name the one to use, of {', '.join(features)}")
    return found[0]


def _cut_short(tar: Path) -> bool:
    """Whether a tar lacks the empty blocks at its end; tarfile reads such a file without an error."""
    with tar.open("rb") as file:
        file.seek(-min(1024, tar.stat().st_size), os.SEEK_END)
        return any(file.read())
