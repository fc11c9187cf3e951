"""Rows of parquet files and webdataset shards (.tar), read one at a time, with bounds on what a file may declare."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from ..pipelines.images import MOST_BYTES, UnreadableImage, suffixes

_COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
# (key, field) of "folder/name.seg.png": ("folder/name", "seg.png"), as the webdataset library splits it.
_MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_NO_IMAGES = ("cls", "cls2", "id", "index", "inx", "json", "jsn", "jsonl", "npy", "npz", "text", "transcript", "txt")
_SAMPLES = 5  # samples that are inspected for their fields
# A parquet file may unpack to this many times its size, since images hardly compress, or to this many bytes.
_MOST_RATIO, _SMALL = 16, 64 * 2**20
_ROWS = 4  # Only a few rows at a time, since a dictionary may repeat one large value in all of them.


def is_empty(file: Path) -> bool:
    """Whether a file has no bytes, or a tar no members."""
    if file.stat().st_size == 0:
        return True
    if file.suffix.lower() != ".tar":
        return False
    try:
        with _opened(file) as (opened, _):
            return not any(opened.read(512))
    except (OSError, EOFError, lzma.LZMAError):  # Not empty but damaged, as reading it will report.
        return False


def tar_fields(file: Path) -> tuple[list[str], list[str]]:
    """(all fields, those that can be images) in the first samples of a webdataset shard.

    Raises:
        ValueError: if it cannot be read.
    """
    fields: dict[str, None] = {}
    for _, held in islice(_samples(file, (), 0), _SAMPLES):
        fields |= dict.fromkeys(held)
    images = [name for name in fields if f".{name.rsplit('.', 1)[-1].lower()}" in suffixes()]
    return list(fields), images or [name for name in fields if name.rsplit(".", 1)[-1].lower() not in _NO_IMAGES]


def tar_rows(file: Path, fields: Sequence[str], start: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(key, bytes of the fields) of each sample from number `start` on.

    A field that a sample lacks is None, and one that is too large is an UnreadableImage.
    """
    return ((key, tuple(map(held.get, fields))) for key, held in _samples(file, fields, start))


def cut_short(file: Path) -> bool:
    """Whether a tar lacks the empty blocks at its end; tarfile reads such a file without raising an error."""
    with _opened(file) as (opened, compressed):
        if compressed:  # The compression's own checksum detects it.
            return False
        opened.seek(-min(1024, file.stat().st_size), os.SEEK_END)
        return any(opened.read(1024))


def parquet_schema(file: Path) -> Any:
    """The Arrow schema of a parquet file."""
    with _parquet(file) as parquet:
        return parquet.schema_arrow


def parquet_rows(file: Path, columns: Sequence[str], start: int) -> Iterator[tuple[Any, ...]]:
    """The values of some columns, of images or captions, in each row from `start` on.

    Raises:
        ValueError: if the file declares far more than it can hold, or a column cannot hold images.
    """
    import pyarrow.types as types

    with _parquet(file) as parquet:
        for column in columns:
            field = parquet.schema_arrow.field(column)
            parts = list(field.type) if types.is_struct(field.type) else [field]
            if any(types.is_nested(part.type) for part in parts):
                raise ValueError(f"its column {column!r} holds {field.type}, expected images or text")
        tops = {column.split(".")[0] for column in columns}
        meta, size = parquet.metadata, file.stat().st_size
        for group in range(meta.num_row_groups):
            rows = meta.row_group(group)
            leaves = (rows.column(i) for i in range(rows.num_columns))
            own = [leaf for leaf in leaves if leaf.path_in_schema.split(".")[0] in tops]
            # Besides the values, an offset of 4 bytes and a flag for each row.
            declared = sum(leaf.total_uncompressed_size for leaf in own) + 5 * rows.num_rows
            if declared > max(_SMALL, _MOST_RATIO * size):
                raise ValueError(f"it has {size:,} bytes, but declares {declared:,} bytes of images")
            if start >= rows.num_rows:
                start -= rows.num_rows
                continue
            for batch in parquet.iter_batches(
                batch_size=_ROWS, row_groups=[group], columns=list(columns), use_threads=False
            ):
                for values in zip(*(batch.column(column) for column in columns)):
                    if start:
                        start -= 1
                    else:
                        yield tuple(value.as_py() for value in values)


@contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    import pyarrow.parquet

    # As an open file, since pyarrow takes only names in UTF-8.
    with file.open("rb") as opened, pyarrow.parquet.ParquetFile(opened, pre_buffer=False) as parquet:
        yield parquet


def _samples(file: Path, fields: Sequence[str], start: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, its fields) of each sample from number `start` on; the wanted fields hold their content, the others None.

    Consecutive members that differ only in what follows their first dot are one sample.
    """
    with _opened(file) as (opened, compressed), tarfile.TarFile(fileobj=_Bounded(opened)) as tar:
        number, key, held = -1, None, {}
        for member in tar:
            if compressed and member.size > MOST_BYTES:
                raise ValueError(f"{member.name} has {member.size:,} bytes when unpacked, more than {MOST_BYTES:,}")
            name = _MEMBER.fullmatch(member.name)
            if not member.isreg() or name is None or os.path.basename(member.name).startswith((".", "__")):
                continue
            if name[1] != key:
                if key is not None and number >= start:
                    yield key, held
                number, key, held = number + 1, name[1], {}
            if name[2] in held:
                raise ValueError(f"it has {member.name} twice in a row")
            wanted = name[2] in fields and number >= start
            held[name[2]] = _content(tar, member) if wanted else None
        if key is not None and number >= start:
            yield key, held


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | UnreadableImage:
    if member.size > MOST_BYTES:  # This includes sparse members, which may take only a few bytes in the file.
        return UnreadableImage(f"it has {member.size:,} bytes, more than {MOST_BYTES:,}")
    return tar.extractfile(member).read()


@contextmanager
def _opened(file: Path) -> Iterator[tuple[BinaryIO, bool]]:
    """(the tar in a file, unpacked if it is compressed; whether it is compressed)."""
    with file.open("rb") as raw:
        start = raw.read(6)
        raw.seek(0)
        unpack = next((opener for magic, opener in _COMPRESSED.items() if start.startswith(magic)), None)
        if unpack is None:
            yield raw, False
        else:
            with unpack(raw) as unpacked:
                yield unpacked, True


class _Bounded:
    """A file that refuses to read too much at once: tarfile takes the lengths of long names from the file itself."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.seek, self.tell, self.name, self.mode = file.seek, file.tell, None, "rb"

    def read(self, size: int) -> bytes:
        if size > MOST_BYTES:
            raise ValueError(f"it declares {size:,} bytes at once, more than {MOST_BYTES:,}")
        return self.file.read(size)
