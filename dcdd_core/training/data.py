"""Pictures to train on: where they come from, in which order, and how they are cut to size.

Shapes: B batch, R resolution (pixels a side that the decoder paints), T token resolution (pixels a side that the VQ
encoder sees).

A source tells the order of an epoch without decoding anything; loading a picture is a function of its entry alone. So
the order does not depend on the number of workers, and a position is resumed without decoding what went before it.
"""

from __future__ import annotations

import glob
import hashlib
import io
import math
import os
import re
import tempfile
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch.utils.data import DataLoader, Dataset

from ..method.sampling import keyed_generator

# What Pillow reads by itself: others, such as EPS, would start programs of this machine.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
UNREADABLE_SHARE, UNREADABLE_FROM = 0.01, 100

_ORDER = 41  # sets the draws of an order apart from others with the same seed
_SPLIT = r"(train|validation|valid|val|dev|test)(?![a-z])"
_CHUNK = 8  # entries that a worker is given at a time

# Where a stream can be entered: [position in the epoch, number of the file in the epoch's order, row in the file].
Mark = Sequence[int]
Item = TypeVar("Item")
Batch = TypeVar("Batch")


class UnreadablePicture(ValueError):
    """A single picture that cannot be used: it is skipped, with a warning that names it."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The two sizes that a picture is cut to; both show the same square of it.

    Attributes:
        resolution: R, what the decoder learns to paint.
        token_resolution: T, the VLM's own, what the VQ encoder sees.
        token_factor: pixels of T a token side (`VQTokenizer.factor`).
        vae_factor: pixels of R a latent.

    Raises:
        ValueError: unless both divide into whole tokens, and a token into whole latents (see `DecoderCard`).
    """

    resolution: int
    token_resolution: int
    token_factor: int
    vae_factor: int

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of pixels >= 1, got {value!r}")
        if self.token_resolution % self.token_factor:
            raise ValueError(
                f"a token resolution of {self.token_resolution} has no whole number of {self.token_factor}-pixel "
                f"tokens: use {_multiples(self.token_resolution, self.token_factor)}"
            )
        # Whole latents a token, and an even number of latents in all, which FLUX packs 2 x 2.
        unit = math.lcm(self.grid[0] * self.vae_factor, 2 * self.vae_factor)
        if self.resolution % unit:
            raise ValueError(
                f"a resolution of {self.resolution} does not fit {self.grid[0]} x {self.grid[1]} tokens: each has to "
                f"be painted as whole latents of {self.vae_factor} pixels, and their number a side has to be even; "
                f"use {_multiples(self.resolution, unit)}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) in tokens."""
        return (self.token_resolution // self.token_factor,) * 2

    @property
    def pixels_per_token(self) -> int:
        """Pixels of R a token side, for the decoder's card."""
        return self.resolution // self.grid[0]


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which pictures a process gets, and in which order.

    Attributes:
        seed: of the order, new in every epoch; None for the order in which the pictures are stored.
        rank, world: this is process `rank` of `world`; no picture goes to two of them, and none is left out.
        window: of streams, which cannot be read anywhere: so many pictures at a time are read, undecoded, and shuffled.
    """

    seed: int | None = 0
    rank: int = 0
    world: int = 1
    window: int = 1000

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if self.world < 1 or not 0 <= self.rank < self.world:
            raise ValueError(f"rank must lie in 0..{self.world - 1} of {self.world} processes, got {self.rank}")

    def permutation(self, count: int, *key: int) -> list[int]:
        """A permutation of range(count), the same in all processes, a function of the seed and the key."""
        if self.seed is None:
            return list(range(count))
        return torch.randperm(count, generator=keyed_generator(self.seed, _ORDER, *key)).tolist()


@dataclass(frozen=True)
class Entry:
    """A picture that was not read yet: its name, what its source needs to load it, and where to enter a stream."""

    key: str
    data: Any
    mark: Mark | None = None


class Source(Protocol[Item, Batch]):
    """Where training examples come from: pictures, or a cache of their encodings."""

    name: str
    fingerprint: str  # changes when entries are added, taken away or renamed

    def entries(self, share: Share, epoch: int, start: int = 0, mark: Mark | None = None) -> Iterator[Entry]:
        """The share's entries of an epoch from position `start` on; `mark`, of an entry near there, saves reading."""

    def load(self, entry: Entry) -> Item:
        """Raises UnreadablePicture."""

    def collate(self, items: Sequence[Item]) -> Batch: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """pixels [3, R, R] and token_pixels [3, T, T], both uint8."""

    key: str
    pixels: torch.Tensor
    token_pixels: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class PictureBatch:
    """pixels [B, 3, R, R] and token_pixels [B, 3, T, T], both uint8, of the pictures called keys."""

    keys: tuple[str, ...]
    pixels: torch.Tensor
    token_pixels: torch.Tensor


def read_rgb(content: bytes | Path) -> PIL.Image.Image:
    """An image file's first picture as RGB of 8 bits, upright.

    EXIF orientation is obeyed, transparency becomes white [choice], 16 bits are rounded to 8, colour profiles are
    ignored.

    Raises:
        UnreadablePicture: for whatever is wrong with it.
    """
    try:
        with PIL.Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS) as image:
            return _to_rgb(PIL.ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow raises nearly every kind of error for damaged files.
        raise UnreadablePicture(f"{type(error).__name__}: {error}") from error


def square(image: PIL.Image.Image, side: int) -> torch.Tensor:
    """The middle square of an RGB picture at side x side pixels, uint8 [3, side, side].

    Same as resizing the shorter side and then cropping the centre; bicubic, antialiased.
    """
    width, height = image.size
    edge = min(width, height)
    left, top = (width - edge) // 2, (height - edge) // 2
    resized = image.resize((side, side), PIL.Image.Resampling.BICUBIC, box=(left, top, left + edge, top + edge))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def to_pixels(images: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """uint8 [B, 3, H, W] -> float32 in -1..1 on the device."""
    return images.to(device).float() / 127.5 - 1.0


def open_pictures(path: str | Path, geometry: Geometry, *, column: str | None = None) -> Pictures:
    """The pictures at a path of this machine; nothing is downloaded.

    Args:
        path: a folder of images (at any depth), of parquet files or of webdataset shards; a folder that
            `Dataset.save_to_disk` wrote; or a pattern such as "shards/{000..127}.tar" or "data/train-*.parquet".
        column: of a dataset or of webdataset shards ("jpg"); None for the one column of pictures.

    Raises:
        ValueError: if there are no pictures, or several kinds of files.
    """
    text = os.fspath(path)
    if "://" in text:
        raise ValueError(f"{text} is not on this machine, and nothing is downloaded here: give the path of a copy")
    folder = Path(text)
    if not folder.is_dir():
        return ShardStream(_expand(text), geometry, column=column)
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return SavedDataset(folder, geometry, column=column)
    names = _file_names(folder)
    shards = [folder / name for name in names if Path(name).suffix.lower() in (".tar", ".parquet")]
    if not shards:
        return ImageFolder(folder, geometry)
    if any(Path(name).suffix.lower() in SUFFIXES for name in names):
        raise ValueError(
            f"{folder} holds pictures and {shards[0].name}: give the sub-folder of the pictures, or a pattern such as "
            f"{folder / '**' / ('*' + shards[0].suffix)} for the others"
        )
    return ShardStream(shards, geometry, column=column)


class Pictures:
    """What sources of pictures have in common: a `Source` of `Picture`s cut to `geometry`."""

    def __init__(self, name: str, geometry: Geometry):
        self.name = name
        self.geometry = geometry

    def content(self, entry: Entry) -> Any:
        """The picture as it is stored: bytes, a path, or a mapping with either."""
        return entry.data

    def load(self, entry: Entry) -> Picture:
        """Decodes a picture and cuts it to size.

        Raises:
            UnreadablePicture: for whatever is wrong with it.
        """
        image = read_rgb(_encoded(self.content(entry)))
        pixels = square(image, self.geometry.resolution)
        same = self.geometry.token_resolution == self.geometry.resolution
        token_pixels = pixels if same else square(image, self.geometry.token_resolution)
        return Picture(key=entry.key, pixels=pixels, token_pixels=token_pixels)

    def collate(self, items: Sequence[Picture]) -> PictureBatch:
        pixels = torch.stack([item.pixels for item in items])
        same = self.geometry.token_resolution == self.geometry.resolution
        return PictureBatch(
            keys=tuple(item.key for item in items),
            pixels=pixels,
            token_pixels=pixels if same else torch.stack([item.token_pixels for item in items]),
        )


class ImageFolder(Pictures):
    """The images in a folder and its sub-folders, whatever these are called; hidden files are left out.

    `load_dataset("imagefolder")` is not used: it takes sub-folders called "test" or "dev" away as splits, and copies
    its list into a cache.

    Attributes:
        names: relative paths, sorted.

    Raises:
        ValueError: if there is no image.
    """

    def __init__(self, folder: str | Path, geometry: Geometry):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give one with images in it")
        files = _file_names(self.folder)
        self.names = [name for name in files if Path(name).suffix.lower() in SUFFIXES]
        if not self.names:
            found = f"{len(files)} other files, such as {files[0]}" if files else "no file at all"
            raise ValueError(
                f"{folder} holds no image, but {found}; give a folder with {', '.join(SUFFIXES)} in it or in "
                "its sub-folders"
            )
        super().__init__(str(folder), geometry)

    @cached_property
    def fingerprint(self) -> str:
        return _digest(self.names)

    def entries(self, share: Share, epoch: int, start: int = 0, mark: Mark | None = None) -> Iterator[Entry]:
        """See `Source.entries`."""
        return (
            Entry(self.names[i], self.folder / self.names[i]) for i in _indices(len(self.names), share, epoch, start)
        )


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
        files = [Path(file["filename"]) for file in self.data.cache_files]
        return _digest([f"{len(self.data)} {self.column}", *(f"{file.name} {file.stat().st_size}" for file in files)])

    def entries(self, share: Share, epoch: int, start: int = 0, mark: Mark | None = None) -> Iterator[Entry]:
        """See `Source.entries`."""
        return (Entry(f"row {i}", i) for i in _indices(len(self.data), share, epoch, start))

    def content(self, entry: Entry) -> Any:
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
        return _digest([self.column, *(f"{file.name} {file.stat().st_size}" for file in self.files)])

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
                warnings.warn(f"{files[j]} has no end: pictures may be missing from it, make it again", stacklevel=2)
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


class Tally:
    """Counts what was read; warns of each unreadable picture, and stops when they are too many.

    Attributes:
        read, unreadable: so far; the second is part of the first.
    """

    def __init__(self, read: int = 0, unreadable: int = 0):
        self.read = read
        self.unreadable = unreadable

    def admit(self, item: Any, source: str) -> bool:
        """Whether the item was read.

        Raises:
            ValueError: at an unreadable item, if more than 1 % of at least 100 were unreadable.
        """
        self.read += 1
        if not isinstance(item, Unreadable):
            return True
        self.unreadable += 1
        warnings.warn(f"{item.key} of {source} is skipped: {item.reason}", stacklevel=2)
        if self.read >= UNREADABLE_FROM and self.unreadable > UNREADABLE_SHARE * self.read:
            raise ValueError(
                f"{self.unreadable} of {self.read} pictures of {source} could not be read, the last one {item.key} "
                f"({item.reason}); more than {UNREADABLE_SHARE:.0%} is more than chance: check the disk and the files, "
                "or take the bad ones out"
            )
        return False


@dataclass(frozen=True)
class Unreadable:
    """Stands for an item that could not be loaded."""

    key: str
    reason: str


def load_in_order(
    source: Source[Item, Any], entries: Iterable[tuple[Any, Entry]], *, workers: int = 0
) -> Iterator[tuple[Any, Item | Unreadable]]:
    """(tag, item) for each (tag, entry), in their order whatever the number of worker processes."""
    tags: deque[Any] = deque()

    def chunks() -> Iterator[list[Entry]]:
        # Runs in this process: a stream is read once, and its bytes are sent to the workers, which decode them.
        remaining = iter(entries)
        while chunk := list(islice(remaining, _CHUNK)):
            tags.extend(tag for tag, _ in chunk)
            yield [entry for _, entry in chunk]

    loader = DataLoader(
        _Loading(source),
        batch_sampler=chunks(),
        collate_fn=_as_they_are,
        num_workers=workers,
        generator=torch.Generator(),  # or it would draw from the global one
    )
    for items in loader:
        for item in items:
            yield tags.popleft(), item


class Batches(Generic[Batch]):
    """Endless batches of one process's share, epoch after epoch, from a position that can be saved and resumed.

    Every batch is full: an unreadable picture's place is taken by the one after it, and a batch may span two epochs.
    What comes does not depend on `workers`.

    The state says how far the batches that were handed out reach, not what was read ahead. It is JSON and belongs to
    one process: with several, each needs its own back (accelerate's `register_for_checkpointing` keeps only that of
    the main process).

    Args:
        source: see `Source`.
        size: B.
        share: seed, and the process's place among the others.
        workers: processes that decode; 0 for this one.

    Raises:
        ValueError: while iterating, if the share is empty or too much is unreadable.
    """

    def __init__(self, source: Source[Any, Batch], *, size: int, share: Share | None = None, workers: int = 0):
        if size < 1:
            raise ValueError(f"a batch needs a size of at least 1, got {size}")
        self.source = source
        self.size = size
        self.share = share or Share()
        self.workers = workers
        self.tally = Tally()
        self._at: tuple[int, int, Mark | None] = (0, 0, None)

    @property
    def epoch(self) -> int:
        """Of the last picture that was handed out."""
        return self._at[0]

    def __iter__(self) -> Iterator[Batch]:
        items = []
        for at, item in load_in_order(self.source, self._entries(), workers=self.workers):
            if self.tally.admit(item, self.source.name):
                items.append(item)
            if len(items) == self.size:
                self._at = at
                yield self.source.collate(items)
                items = []

    def _entries(self) -> Iterator[tuple[tuple[int, int, Mark | None], Entry]]:
        epoch, start, mark = self._at
        while True:
            end = start
            for end, entry in enumerate(self.source.entries(self.share, epoch, start, mark), start + 1):
                yield (epoch, end, entry.mark), entry
            if end == 0:
                raise ValueError(
                    f"{self.source.name} has no picture for process {self.share.rank} of {self.share.world}: use fewer "
                    "processes, or more pictures"
                )
            epoch, start, mark = epoch + 1, 0, None

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch, as JSON."""
        epoch, consumed, mark = self._at
        return {
            "source": self.source.fingerprint,
            **asdict(self.share),
            "epoch": epoch,
            "consumed": consumed,
            "mark": None if mark is None else list(mark),
            "read": self.tally.read,
            "unreadable": self.tally.unreadable,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a position; an iterator that runs already does not notice.

        Raises:
            ValueError: if it is of another source, seed, or number of processes.
        """
        own = {"source": self.source.fingerprint, **asdict(self.share)}
        differ = [f"{name} {state.get(name)!r} -> {value!r}" for name, value in own.items() if state.get(name) != value]
        if differ:
            raise ValueError(
                f"this position was saved from other data ({', '.join(differ)}): resume with the same pictures, seed "
                "and number of processes, or start afresh"
            )
        mark = state["mark"]
        self._at = (state["epoch"], state["consumed"], mark if mark is None else tuple(mark))
        self.tally = Tally(state["read"], state["unreadable"])


class _Loading(Dataset):
    """What a worker does with an entry."""

    def __init__(self, source: Source):
        self.source = source

    def __getitem__(self, entry: Entry) -> Any:
        try:
            return self.source.load(entry)
        except UnreadablePicture as error:
            return Unreadable(entry.key, str(error))


def _as_they_are(items: list[Any]) -> list[Any]:
    return items


def _indices(count: int, share: Share, epoch: int, start: int) -> list[int]:
    """The share's indices of an epoch from position `start` on, for a source that can be read anywhere."""
    return share.permutation(count, epoch)[share.rank :: share.world][start:]


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which older Pillows open as 32
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"whole numbers of {values.min():g}..{values.max():g} are no 16-bit grey levels")
        return PIL.Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point grey levels have no known white")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _encoded(value: Any) -> bytes | Path:
    """An image file's bytes or path, of the forms in which datasets store them."""
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str):
        if "://" in value:
            raise UnreadablePicture(f"it is at {value}, and nothing is downloaded")
        return Path(value)
    if not isinstance(value, bytes | Path):
        raise UnreadablePicture(f"there is no picture, but {type(value).__name__}")
    return value


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


def _file_names(folder: Path) -> list[str]:
    """Relative paths of all files but hidden ones, sorted; links to folders are not followed."""
    return sorted(
        os.path.relpath(os.path.join(where, name), folder)
        for where, _, names in os.walk(folder)
        for name in names
        if not name.startswith(".")
    )


def _expand(pattern: str) -> list[Path]:
    """Files of a pattern with {000..127} ranges and the usual wildcards, sorted within each range."""
    if os.path.isfile(pattern):
        return [Path(pattern)]
    if braces := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = braces.groups()
        numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        return [file for n in numbers for file in _expand(pattern[: braces.start()] + n + pattern[braces.end() :])]
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise ValueError(f"there is no file {pattern}: give a folder, a file or a pattern that exists on this machine")
    return [Path(file) for file in found]


def _cut_short(tar: Path) -> bool:
    """Whether the empty blocks are missing that end a tar; without them, tarfile stops in silence where it can."""
    with tar.open("rb") as file:
        file.seek(-min(1024, tar.stat().st_size), os.SEEK_END)
        return any(file.read())


def _digest(lines: Iterable[str]) -> str:
    found = hashlib.sha256()
    for line in lines:
        found.update(os.fsencode(line) + b"\n")
    return found.hexdigest()[:16]


def _multiples(value: int, unit: int) -> str:
    below, above = value // unit * unit, -(-value // unit) * unit
    return f"{below} or {above}" if below else str(above)
