"""Writing a cache of encodings, with any number of processes and runs; `cache` describes its files."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ..files import whole_file
from ..pipelines.progress import ProgressBar
from ..protocols import ImageTokenizer, LatentCodec
from ..settings import require_at_least
from ..types import DCDDWarning
from .batches import DataShard, Entry, Mark, ReadCounter, load_in_order
from .cache import FORMAT, CacheCard, read_end, read_line, read_manifest, sha256
from .encoded_batch import VLM_TENSORS, Autocast, EncodedBatch, encode
from .folders import ImageSource
from .image_batch import TrainingImage
from .left_out import LeftOut
from .vlm_conditions import VLMConditions, with_conditions

_SHARDS = "shards"
_END = "end.json"


def write_cache(
    folder: str | Path,
    source: ImageSource,
    tokenizer: ImageTokenizer,
    codec: LatentCodec | None,
    *,
    shard_size: int = 1024,
    batch_size: int = 16,
    keep_pixels: bool = False,
    conditions: VLMConditions | None = None,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    autocast: Autocast = nullcontext,
    report: Callable[[str], None] = print,
) -> None:
    """Encodes all images of a source into a cache, continuing from what the folder already holds.

    Shard s holds the images from s * shard_size on, in the stored order, whichever process writes it. A run may be
    killed at any point and continued with any number of processes; on the same device, with deterministic kernels, the
    files are byte-identical. Existing shards are first compared with their checksums. A shard is rewritten if an image
    that was unreadable or had no caption has changed since.

    All images are encoded even if more are unreadable than the source's policy allows; the error then names them.

    Args:
        source: the images, with their sizes; see `sources.open_images`. Required captions are kept in the cache.
        codec: None for a cache without latents, which only masked samplers can use.
        shard_size: images per shard, before unreadable ones are skipped.
        keep_pixels: for localised training, which encodes masked images; takes several times the space.
        conditions: makes the VLM's conditions of images that have a caption, which the source must read; None for a
            cache without them.
        rank, world: this process writes every `world`-th shard, starting with shard `rank`; the cache is complete when
            all processes are done.
        workers: processes that decode images.
        report: called with each line to print.

    Raises:
        ValueError: if the folder holds a cache of other networks, sizes or images; if too many images are
            unreadable, or none can be used; if an encoding is not finite.
        OSError: if a file cannot be written, such as on a full disk; finished shards are kept.
    """
    require_at_least(1, shard_size=shard_size, batch_size=batch_size)
    if conditions is not None and source.captions is None:
        raise ValueError("the VLM's conditions need captions: open the images with them")
    served = None if conditions is None else conditions.served
    card = CacheCard.of(tokenizer, codec, source.geometry, pixels=keep_pixels, vlm=served)
    writer = _Writer(Path(folder), card, source, shard_size, DataShard(seed=None, rank=rank, world=world))
    finished = writer.begin()
    own = [line for number, line in finished.items() if number % world == rank]
    if own:
        report(f"{folder}: keeping {len(own)} finished shards")
    counter = _counted(own)
    marks: dict[int, Mark | None] = {}
    position = 0

    def missing() -> Iterator[tuple[tuple[int, str], Entry]]:
        nonlocal position
        position, mark = writer.entry_point(finished)
        for entry in source.entries(DataShard(seed=None), 0, position, mark):
            number = position // shard_size
            if number % world == rank and number not in finished:
                marks.setdefault(number, entry.mark)
                yield (number, entry.key), entry
            position += 1

    def usable(loaded: Iterator, kept: dict[str, list[str]]) -> Iterator[TrainingImage]:
        for (_, key), item in loaded:
            if counter.admit(item, source.name):
                kept["keys"].append(key)
                if item.uncaptioned:
                    kept["without_caption"].append(key)
                yield item
            else:
                kept["small" if item.small else "uncaptioned" if item.uncaptioned else "unreadable"].append(key)
            bar.update()

    total = None if (count := source.count) is None or world > 1 else count - sum(map(_positions, own))
    with ProgressBar(label="cache", total=total, unit="image", shown=rank == 0) as bar:
        shards = groupby(load_in_order(source, missing(), workers=workers), key=lambda loaded: loaded[0][0])
        for number, loaded in shards:
            kept: dict[str, list[str]] = {"keys": [], "unreadable": [], "small": []}
            kept |= {"uncaptioned": [], "without_caption": []}
            images = usable(loaded, kept)
            parts, captions = [], []
            while batch := list(islice(images, batch_size)):
                captions += [image.caption for image in batch]
                encoded = encode(source.collate(batch), tokenizer, codec, autocast=autocast)
                if conditions is not None:
                    encoded = with_conditions(encoded, conditions)
                parts.append(_stored(batch, encoded, keep_pixels))
            writer.write(number, parts, **kept, captions=captions, mark=marks.pop(number))
            report(f"{folder}: shard {number} with {len(kept['keys'])} images")
    writer.finish(position)
    for line in LeftOut.of(source, counter).lines():
        report(f"{folder}: {line}")
    if counter.read + counter.small + counter.bare:  # With few shards, a process may have none.
        counter.check(source)


def _counted(lines: Sequence[Mapping[str, Any]]) -> ReadCounter:
    """The counts of finished shards, which do not record why an image was unreadable."""
    bad = [key for line in lines for key in line["unreadable"]]
    small = sum(len(line.get("small", ())) for line in lines)
    counter = ReadCounter(sum(line["read"] for line in lines), len(bad), small)
    counter.reasons = dict.fromkeys(bad, "")
    counter.too_small = {key: None for line in lines for key in line.get("small", ())}
    counter.uncaptioned = {key: None for line in lines for key in line.get("uncaptioned", ())}
    counter.bare = len(counter.uncaptioned)
    counter.without_caption = {key: None for line in lines for key in line.get("without_caption", ())}
    return counter


def _positions(line: Mapping[str, Any]) -> int:
    """How many images of the source a shard accounts for."""
    return line["read"] + len(line.get("small", ())) + len(line.get("uncaptioned", ()))


class _Writer:
    """Writes the files of a cache.

    A shard's line is its entry in the manifest, with further counts, in a file of its own.
    """

    def __init__(self, folder: Path, card: CacheCard, source: ImageSource, shard_size: int, shard: DataShard):
        self.folder = folder
        self.card = card
        self.source = source
        self.shard = shard
        self.shard_size = shard_size
        self._lines: dict[str, tuple[int, dict[str, Any]]] = {}  # file -> (modification time, content)
        self._all_sizes = False  # whether the cache was begun by a version without a smallest size

    def begin(self) -> dict[int, dict[str, Any]]:
        """Creates the folder, or checks what it holds; returns the lines of the finished shards by number.

        Discards those of this process's shards that do not match their checksums, or lack images that have changed.
        """
        begun = bool(self._read_lines())  # Before the manifest is read: other processes write that first.
        if (self.folder / "manifest.json").exists():
            manifest = read_manifest(self.folder)
            self._compare(manifest)
            self._all_sizes = "min_side" not in manifest
        elif self.folder.is_dir():
            ours = ("manifest.json", _SHARDS)  # Another process may have created these just now.
            if begun:
                raise ValueError(
                    f"{self.folder} holds shards without their manifest.json, which says how they were made: put it "
                    "back, or choose a new folder"
                )
            if others := [path.name for path in self.folder.iterdir() if not path.name.startswith(ours)]:
                raise ValueError(
                    f"{self.folder} is not empty and not a cache (it holds {others[0]}): choose a new folder"
                )
        (self.folder / _SHARDS).mkdir(parents=True, exist_ok=True)
        for number, line in self._read_lines().items():
            path, own = self.folder / line["file"], self.folder / _SHARDS / f"{number:05}.json"
            if number % self.shard.world != self.shard.rank:
                continue
            written = own.stat().st_mtime_ns
            changed = {
                kind
                for kind in ("unreadable", "uncaptioned", "without_caption")
                if any((self.source.changed(key) or 0) > written for key in line.get(kind, ()))
            }
            if not (path.is_file() and sha256(path) == line["sha256"]):
                reason = "is missing or damaged"
            elif "unreadable" in changed:
                reason = "lacks images that were unreadable and have changed"
            elif changed:
                reason = "lacks images that had no caption and have changed"
            else:
                continue
            warnings.warn(f"{path} {reason}; it is made again", DCDDWarning, stacklevel=3)
            own.unlink()
        self._write_manifest()
        return self._read_lines()

    def entry_point(self, finished: Mapping[int, Mapping[str, Any]]) -> tuple[int, Mark | None]:
        """Position and mark from which to read the source: the last finished shard before the first missing one."""
        number = self.shard.rank
        while number in finished:
            number += self.shard.world
        before = max((n for n in finished if n < number), default=None)
        return (0, None) if before is None else (before * self.shard_size, finished[before]["mark"])

    def write(
        self,
        number: int,
        parts: list[dict],
        *,
        keys: list[str],
        unreadable: list[str],
        small: list[str],
        uncaptioned: list[str],
        without_caption: list[str],
        captions: list[str],
        mark: Mark | None,
    ) -> None:
        """Writes a shard, then its line, then the manifest; if killed in between, the shard is written again."""
        tensors = {name: torch.cat([part[name] for part in parts]).contiguous() for name in (parts[0] if parts else ())}
        # A single entry, since safetensors writes several in no fixed order.
        told = {"format": FORMAT, "card": self.card.to_dict(), "keys": keys}
        if self.source.captioned:
            told["captions"] = captions
        header = {"dcdd": json.dumps(told)}
        data = safetensors.torch.save(tensors, metadata=header)
        name = f"{_SHARDS}/{number:05}.safetensors"
        line = {
            "file": name,
            "items": len(keys),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "read": len(keys) + len(unreadable),
            "unreadable": unreadable,
            **({"small": small} if small else {}),
            **({"uncaptioned": uncaptioned} if uncaptioned else {}),
            **({"without_caption": without_caption} if without_caption else {}),
            "mark": None if mark is None else list(mark),
        }
        self._put(name, data)
        self._put(f"{_SHARDS}/{number:05}.json", _json(line))
        self._write_manifest()

    def finish(self, positions: int) -> None:
        """Records the end of the source.

        Raises:
            ValueError: if it has no images.
        """
        if positions == 0:
            raise ValueError(f"{self.source.name} has no images to encode")
        self._put(f"{_SHARDS}/{_END}", _json({"positions": positions}))
        manifest = self._write_manifest()
        if manifest["complete"]:
            # Leftovers of killed runs; other processes may still be writing files other than shards.
            for left in self.folder.rglob("*.tmp" if self.shard.world == 1 else "[0-9]*.tmp"):
                left.unlink(missing_ok=True)

    def _compare(self, manifest: Mapping[str, Any]) -> None:
        card = CacheCard.from_dict(manifest["card"])
        misfits = card.misfits(self.card) + (["it keeps the pixels"] if card.pixels and not self.card.pixels else [])
        misfits += ["it holds a VLM's conditions"] if card.vlm is not None and self.card.vlm is None else []
        if manifest.get("captions", False) != self.source.captioned:
            misfits.append(f"it {'keeps' if manifest.get('captions') else 'does not keep'} the images' captions")
        if manifest["source"]["fingerprint"] != self.source.fingerprint:
            misfits.append(f"it is of other images: those of {manifest['source']['name']} when it was written")
        if manifest["shard_size"] != self.shard_size:
            misfits.append(f"its shard size is {manifest['shard_size']}, expected {self.shard_size}")
        least = manifest.get("min_side")  # None in the oldest caches, which have images of all sizes.
        if least is not None and least != self.source.min_side:
            misfits.append(f"its images have sides of at least {least} pixels, expected {self.source.min_side}")
        if misfits:
            raise ValueError(
                f"{self.folder} holds another cache: {'; '.join(misfits)}. Choose another folder, or delete this "
                "one to start afresh"
            )

    def _read_lines(self) -> dict[int, dict[str, Any]]:
        """The lines of the finished shards, by number, in increasing order."""
        found = {}
        for path in (self.folder / _SHARDS).glob("[0-9]*.json"):
            with suppress(FileNotFoundError):  # The process that owns it may be discarding it just now.
                changed = path.stat().st_mtime_ns
                if path.name not in self._lines or self._lines[path.name][0] != changed:
                    self._lines[path.name] = changed, read_line(path)
                found[int(path.stem)] = self._lines[path.name][1]
        return dict(sorted(found.items()))

    def _read_end(self) -> int | None:
        """The number of images in the source, readable or not; None until a process has reached its end."""
        path = self.folder / _SHARDS / _END
        return read_end(path) if path.is_file() else None

    def _write_manifest(self) -> dict[str, Any]:
        """Writes the manifest from the existing lines, repeatedly until no other process has added one meanwhile.

        Whichever process writes it last checks the lines once more afterwards, so none is missed even without a lock.
        """
        while True:
            lines, end = self._read_lines(), self._read_end()
            needed = None if end is None else range(-(-end // self.shard_size))
            manifest = {
                "format": FORMAT,
                "card": self.card.to_dict(),
                "source": {"name": self.source.name, "fingerprint": self.source.fingerprint},
                "shard_size": self.shard_size,
                **({} if self._all_sizes else {"min_side": self.source.min_side}),
                **({"captions": True} if self.source.captioned else {}),
                "complete": needed is not None and set(lines) == set(needed),
                "items": sum(line["items"] for line in lines.values()),
                "unreadable": sum(len(line["unreadable"]) for line in lines.values()),
                "shards": [{k: line[k] for k in ("file", "items", "bytes", "sha256")} for line in lines.values()],
            }
            self._put("manifest.json", _json(manifest))
            if self._read_lines() == lines and self._read_end() == end:
                return manifest

    def _put(self, name: str, data: bytes) -> None:
        """Writes a file completely or not at all."""
        try:
            with whole_file(self.folder / name) as temporary, temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(
                f"{error}. The {len(self._read_lines())} finished shards are kept: the same command continues"
            ) from error


def _stored(images: Sequence[TrainingImage], batch: EncodedBatch, keep_pixels: bool) -> dict[str, torch.Tensor]:
    """What a shard stores of a batch: float16 encodings, and uint8 pixels if wanted."""
    found = {name: getattr(batch, name) for name in ("features", "latents", *VLM_TENSORS)}
    held = {name: value.cpu() for name, value in found.items() if value is not None}
    stored = {name: value if value.dtype == torch.bool else value.half() for name, value in held.items()}
    for name, values in stored.items():
        finite = values.reshape(len(values), -1).isfinite().all(dim=1)
        if not bool(finite.all()):
            raise ValueError(
                f"the {name} of {images[int(finite.int().argmin())].key} hold NaN or numbers beyond float16's range: "
                "run the networks in float32 or bfloat16"
            )
    return stored | ({"pixels": torch.stack([image.pixels for image in images])} if keep_pixels else {})


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
