"""Encodings of pictures: made on the fly, or computed once, kept in a folder and reused across runs.

Shapes: B batch, N tokens, D code dimension, C latent channels, h' w' latent grid, R resolution, M pictures of a shard.

A cache is a folder:
    manifest.json          what made it, and for each shard its file, number of pictures, size and SHA-256
    shards/00000.safetensors, ...   features [M, N, D] and latents [M, C, h', w'], float16; pixels [M, 3, R, R] uint8
                           where they are kept; the names of the pictures in the header
    shards/00000.json, ... the manifest's line of one shard, by which several processes and runs add to it
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch import nn

from ..method.latents import scale_latents
from ..models.vae import KLAutoencoder
from ..models.vq import VQTokenizer
from ..types import same_codebook
from .data import (
    Entry,
    Geometry,
    Mark,
    Picture,
    PictureBatch,
    Pictures,
    Share,
    Tally,
    load_in_order,
    to_pixels,
)

_FORMAT = "dcdd encodings 1"
_SHARDS = "shards"
_END = "end.json"

Autocast = Callable[[], AbstractContextManager]


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedBatch:
    """What the decoder learns from, before the mapping of its condition (`training.decoder.Example`).

    Attributes:
        features: [B, N, D] float32, of the VQ encoder before quantisation (Eq. 9).
        latents: [B, C, h', w'] float32, scaled (Eq. 17).
        pixels: [B, 3, R, R] float32 in -1..1, for the masked pictures of localised training; None if a cache does not
            keep them.
    """

    features: torch.Tensor
    latents: torch.Tensor
    pixels: torch.Tensor | None = None


def geometry_for(vq: VQTokenizer, vae: AutoencoderKL, *, resolution: int, token_resolution: int) -> Geometry:
    """The sizes for these two networks; raises ValueError if they do not fit together, see `Geometry`."""
    return Geometry(
        resolution=resolution,
        token_resolution=token_resolution,
        token_factor=vq.factor,
        vae_factor=2 ** (len(vae.config.block_out_channels) - 1),
    )


def encode(
    batch: PictureBatch | EncodedBatch, vq: VQTokenizer, vae: AutoencoderKL, *, autocast: Autocast = nullcontext
) -> EncodedBatch:
    """A batch's encodings, on the networks' device; those from a cache are only moved there."""
    if isinstance(batch, EncodedBatch):
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        return EncodedBatch(**{name: None if t is None else t.to(vae.device) for name, t in values.items()})
    pixels = to_pixels(batch.pixels, vae.device)
    with autocast():
        features = vq.features(to_pixels(batch.token_pixels, vq.device))
        latents = scaled_latents(vae, pixels)
    return EncodedBatch(features=features.to(vae.device), latents=latents, pixels=pixels)


def scaled_latents(vae: AutoencoderKL, pixels: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Pixels [B, 3, H, W] in -1..1 -> [B, C, h', w'] float32, scaled; the part under the mask is blank.

    Args:
        mask: [B or 1, 1, H, W], 1 where to paint; None for nowhere.
    """
    latents = KLAutoencoder(vae).encode(pixels if mask is None else pixels * (1 - mask))
    return scale_latents(latents, vae.config.shift_factor, vae.config.scaling_factor)


@dataclass(frozen=True, kw_only=True)
class CacheCard:
    """What made the encodings of a cache.

    Attributes:
        codebook: its fingerprint (`Codebook.fingerprint`).
        tokenizer, autoencoder: digests of the two encoders' weights; bfloat16 copies have the same.
        vae_shift, vae_scale: of the scaled latents.
        code_dim, channels: D and C.
        geometry: the sizes.
        pixels: whether the pictures themselves are kept.
    """

    codebook: str
    tokenizer: str
    autoencoder: str
    vae_shift: float
    vae_scale: float
    code_dim: int
    channels: int
    geometry: Geometry
    pixels: bool

    @classmethod
    def of(cls, vq: VQTokenizer, vae: AutoencoderKL, geometry: Geometry, *, pixels: bool = False) -> CacheCard:
        """Of what these networks make of pictures at these sizes."""
        return cls(
            codebook=vq.codebook.fingerprint,
            tokenizer=_weights_digest(vq.model.encoder, vq.model.quant_conv),
            autoencoder=_weights_digest(vae.encoder, *([] if vae.quant_conv is None else [vae.quant_conv])),
            vae_shift=vae.config.shift_factor,
            vae_scale=vae.config.scaling_factor,
            code_dim=vq.codebook.dim,
            channels=vae.config.latent_channels,
            geometry=geometry,
            pixels=pixels,
        )

    def misfits(self, wanted: CacheCard) -> list[str]:
        """What is not as wanted, in words; pixels that are not needed are no misfit."""
        found = []
        if not same_codebook(self.codebook, wanted.codebook):
            found.append(f"its tokenizer has another codebook ({self.codebook}, expected {wanted.codebook})")
        elif self.tokenizer != wanted.tokenizer:
            found.append(f"its tokenizer has another encoder ({self.tokenizer}, expected {wanted.tokenizer})")
        if self.autoencoder != wanted.autoencoder:
            found.append(f"its autoencoder is another one ({self.autoencoder}, expected {wanted.autoencoder})")
        elif not (
            math.isclose(self.vae_shift, wanted.vae_shift, abs_tol=1e-9)
            and math.isclose(self.vae_scale, wanted.vae_scale)
        ):
            found.append(
                f"its latents are scaled by another shift and scale ({self.vae_shift}, {self.vae_scale}, expected "
                f"{wanted.vae_shift}, {wanted.vae_scale})"
            )
        for name, value in asdict(wanted.geometry).items():
            if getattr(self.geometry, name) != value:
                found.append(f"its {name.replace('_', ' ')} is {getattr(self.geometry, name)}, expected {value}")
        if wanted.pixels and not self.pixels:
            found.append("it does not keep the pictures' pixels, which localised training needs")
        return found


def write_cache(
    folder: str | Path,
    source: Pictures,
    vq: VQTokenizer,
    vae: AutoencoderKL,
    *,
    shard_size: int = 1024,
    batch_size: int = 16,
    keep_pixels: bool = False,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    autocast: Autocast = nullcontext,
    report: Callable[[str], None] = print,
) -> None:
    """Encodes all pictures of a source into a cache, going on with what the folder already holds.

    Shard s is made of the pictures s * shard_size and following in the stored order, whoever writes it: a run may be
    killed at any point and gone on with, by any number of processes, and on the same device with deterministic kernels
    the files come out the same to the byte. Shards that are there are compared with their checksums first.

    Args:
        source: pictures, with the geometry that they are cut to; see `data.open_pictures`.
        shard_size: pictures of a shard, before unreadable ones are skipped.
        keep_pixels: for localised training, which encodes masked pictures; a multiple of the space.
        rank, world: this process writes every `world`-th shard, from `rank` on; the cache is complete when all are
            done.
        workers: processes that decode the pictures.

    Raises:
        ValueError: if the folder holds a cache of other networks, sizes or pictures; if too many pictures are
            unreadable, or none is readable; if an encoding is not finite.
        OSError: if the disk is full; what is finished is kept.
    """
    if shard_size < 1 or batch_size < 1:
        raise ValueError(f"shard_size and batch_size must be at least 1, got {shard_size} and {batch_size}")
    card = CacheCard.of(vq, vae, source.geometry, pixels=keep_pixels)
    writer = _Writer(Path(folder), card, source, shard_size, Share(seed=None, rank=rank, world=world))
    finished = writer.begin()
    own = [line for number, line in finished.items() if number % world == rank]
    if own:
        report(f"{folder}: {len(own)} finished shards are kept")
    tally = Tally(sum(line["read"] for line in own), sum(len(line["unreadable"]) for line in own))
    marks: dict[int, Mark | None] = {}
    position = 0

    def missing() -> Iterator[tuple[tuple[int, str], Entry]]:
        nonlocal position
        position, mark = writer.entrance(finished)
        for entry in source.entries(Share(seed=None), 0, position, mark):
            number = position // shard_size
            if number % world == rank and number not in finished:
                marks.setdefault(number, entry.mark)
                yield (number, entry.key), entry
            position += 1

    def readable(loaded: Iterator, keys: list[str], unreadable: list[str]) -> Iterator[Picture]:
        for (_, key), item in loaded:
            admitted = tally.admit(item, source.name)
            (keys if admitted else unreadable).append(key)
            if admitted:
                yield item

    shards = groupby(load_in_order(source, missing(), workers=workers), key=lambda loaded: loaded[0][0])
    for number, loaded in shards:
        keys: list[str] = []
        unreadable: list[str] = []
        pictures = readable(loaded, keys, unreadable)
        parts = []
        while batch := list(islice(pictures, batch_size)):
            parts.append(_stored(batch, encode(source.collate(batch), vq, vae, autocast=autocast), keep_pixels))
        writer.write(number, parts, keys=keys, unreadable=unreadable, mark=marks.pop(number))
        report(f"{folder}: shard {number} with {len(keys)} pictures")
    writer.finish(position)


class EncodingCache:
    """A finished cache, to be read at any place: a `Source` of `EncodedBatch`es.

    Args:
        folder: see `write_cache`.
        verify: compares each shard with its checksum when it is first used; `verify()` compares all at once.

    Attributes:
        card: what made it.

    Raises:
        ValueError: if there is no cache, it is not complete, or a shard is missing or of another size.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False):
        self.folder = Path(folder)
        self.name = str(folder)
        manifest = _read_manifest(self.folder)
        self.card = _card(manifest["card"])
        self.geometry = self.card.geometry
        self._shards: list[dict[str, Any]] = manifest["shards"]
        if not manifest["complete"]:
            raise ValueError(
                f"the cache {folder} is not finished, it has {len(self._shards)} shards so far: write it to the end, "
                "which goes on from there"
            )
        for shard in self._shards:
            path = self.folder / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes, expected {shard['bytes']}"
                raise ValueError(
                    f"{path} {found}: copy it again, or write the cache again, which makes only that shard"
                )
        self._ends = np.cumsum([shard["items"] for shard in self._shards])
        self._unverified = set(range(len(self._shards))) if verify else set()
        self._open: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def batch(self, indices: Sequence[int]) -> EncodedBatch:
        """The encodings of these pictures, in this order; only they are read.

        Raises:
            ValueError: for no index, or one out of range.
        """
        if not len(indices) or min(indices) < 0 or max(indices) >= len(self):
            raise ValueError(f"expected indices in 0..{len(self) - 1}, at least one, got {list(indices)[:8]}")
        return self.collate([self.load(Entry(str(i), int(i))) for i in indices])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # Every process opens the files for itself.

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([shard["sha256"] for shard in self._shards]).encode()).hexdigest()[:16]

    @cached_property
    def keys(self) -> list[str]:
        """Names of the pictures, by index."""
        return [key for number in range(len(self._shards)) for key in self._header(number)["keys"]]

    def require(self, wanted: CacheCard) -> None:
        """Refuses a cache that other networks or sizes made.

        Raises:
            ValueError: with each misfit.
        """
        if misfits := self.card.misfits(wanted):
            raise ValueError(
                f"the cache {self.folder} does not fit: {'; '.join(misfits)}. Give the networks and sizes that made "
                "it, or write another cache into another folder"
            )

    def verify(self) -> None:
        """Compares all shards with their checksums.

        Raises:
            ValueError: naming those that are damaged.
        """
        bad = [shard["file"] for shard in self._shards if _sha256(self.folder / shard["file"]) != shard["sha256"]]
        if bad:
            raise ValueError(
                f"{len(bad)} of {len(self._shards)} shards of the cache {self.folder} are damaged, their checksums are "
                f"not those of the manifest: {', '.join(bad)}. Copy them again, or write the cache again, which makes "
                "only these"
            )
        self._unverified.clear()

    def entries(self, share: Share, epoch: int, start: int = 0, mark: Any = None) -> Iterator[Entry]:
        """See `data.Source.entries`."""
        order = share.permutation(len(self), epoch)[share.rank :: share.world]
        return (Entry(str(i), i) for i in order[start:])

    def load(self, entry: Entry) -> dict[str, torch.Tensor]:
        """One picture's features [N, D] and latents [C, h', w'] in float16, and pixels [3, R, R] uint8 if kept."""
        number = int(np.searchsorted(self._ends, entry.data, side="right"))
        row = entry.data - (int(self._ends[number - 1]) if number else 0)
        return {name: values[row : row + 1][0] for name, values in self._shard(number).items()}

    def collate(self, items: Sequence[dict[str, torch.Tensor]]) -> EncodedBatch:
        """Items of `load` as a batch, in float32."""
        stacked = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        pixels = to_pixels(stacked["pixels"], "cpu") if "pixels" in stacked else None
        return EncodedBatch(features=stacked["features"].float(), latents=stacked["latents"].float(), pixels=pixels)

    def _shard(self, number: int) -> dict[str, Any]:
        """Slices of a shard's memory-mapped tensors."""
        if number not in self._open:
            shard = self._shards[number]
            path = self.folder / shard["file"]
            if number in self._unverified:
                if (found := _sha256(path)) != shard["sha256"]:
                    raise ValueError(
                        f"{path} is damaged: its SHA-256 is {found}, expected {shard['sha256']}; copy it again, or "
                        "write the cache again, which makes only that shard"
                    )
                self._unverified.discard(number)
            try:
                file = safe_open(path, framework="pt")
                self._open[number] = {name: file.get_slice(name) for name in file.keys()}
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{path} cannot be read ({error}): copy it again, or write the cache again, which makes only that "
                    "shard"
                ) from error
        return self._open[number]

    def _header(self, number: int) -> dict[str, Any]:
        with safe_open(self.folder / self._shards[number]["file"], framework="pt") as file:
            return json.loads(file.metadata()["dcdd"])


class _Writer:
    """The files of a cache that is being written."""

    def __init__(self, folder: Path, card: CacheCard, source: Pictures, shard_size: int, mine: Share):
        self.folder = folder
        self.card = card
        self.source = source
        self.mine = mine
        self.shard_size = shard_size
        self._lines: dict[str, tuple[int, dict[str, Any]]] = {}  # file -> when it was written, what it says

    def begin(self) -> dict[int, dict[str, Any]]:
        """Makes the folder, or compares what is there; returns the lines of the finished shards by number.

        This process's own shards are compared with their checksums, and damaged ones are given up.
        """
        begun = bool(self._read_lines())  # Before the manifest, which other processes write first.
        if (self.folder / "manifest.json").exists():
            self._compare(_read_manifest(self.folder))
        elif self.folder.is_dir():
            ours = ("manifest.json", _SHARDS)  # Another process may be just as far.
            if begun:
                raise ValueError(
                    f"{self.folder} holds shards without their manifest.json, so that nothing says what made them: put "
                    "it back, or choose a new folder"
                )
            if others := [path.name for path in self.folder.iterdir() if not path.name.startswith(ours)]:
                raise ValueError(f"{self.folder} is no cache and not empty (it holds {others[0]}): choose a new folder")
        (self.folder / _SHARDS).mkdir(parents=True, exist_ok=True)
        for number, line in self._read_lines().items():
            path = self.folder / line["file"]
            if number % self.mine.world == self.mine.rank and not (path.is_file() and _sha256(path) == line["sha256"]):
                warnings.warn(f"{path} is missing or damaged, and is made again", stacklevel=3)
                (self.folder / _SHARDS / f"{number:05}.json").unlink()
        self._write_manifest()
        return self._read_lines()

    def entrance(self, finished: Mapping[int, Mapping[str, Any]]) -> tuple[int, Mark | None]:
        """Position and mark from which the source has to be read: the last finished shard before a missing one."""
        number = self.mine.rank
        while number in finished:
            number += self.mine.world
        before = max((n for n in finished if n < number), default=None)
        return (0, None) if before is None else (before * self.shard_size, finished[before]["mark"])

    def write(
        self, number: int, parts: list[dict], *, keys: list[str], unreadable: list[str], mark: Mark | None
    ) -> None:
        """A shard, then its line, then the manifest: what is killed in between is made again, the same."""
        tensors = {name: torch.cat([part[name] for part in parts]).contiguous() for name in (parts[0] if parts else ())}
        # One entry: safetensors keeps several in no fixed order.
        header = {"dcdd": json.dumps({"format": _FORMAT, "card": asdict(self.card), "keys": keys})}
        data = safetensors.torch.save(tensors, metadata=header)
        name = f"{_SHARDS}/{number:05}.safetensors"
        line = {
            "file": name,
            "items": len(keys),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "read": len(keys) + len(unreadable),
            "unreadable": unreadable,
            "mark": None if mark is None else list(mark),
        }
        self._put(name, data)
        self._put(f"{_SHARDS}/{number:05}.json", _json(line))
        self._write_manifest()

    def finish(self, positions: int) -> None:
        """Notes the end of the source.

        Raises:
            ValueError: if it has no picture that could be read.
        """
        if positions == 0:
            raise ValueError(f"{self.source.name} has no picture to encode: give one that has")
        self._put(f"{_SHARDS}/{_END}", _json({"positions": positions}))
        manifest = self._write_manifest()
        if manifest["complete"]:
            # What killed runs left; other processes may still be writing files that are no shards.
            for left in self.folder.rglob("*.tmp" if self.mine.world == 1 else "[0-9]*.tmp"):
                left.unlink(missing_ok=True)
            if manifest["items"] == 0:
                raise ValueError(f"none of the {positions} pictures of {self.source.name} could be read")

    def _compare(self, manifest: Mapping[str, Any]) -> None:
        card = _card(manifest["card"])
        misfits = card.misfits(self.card) + (["it keeps the pixels"] if card.pixels and not self.card.pixels else [])
        if manifest["source"]["fingerprint"] != self.source.fingerprint:
            misfits.append(f"it is of other pictures, those of {manifest['source']['name']} at the time")
        if manifest["shard_size"] != self.shard_size:
            misfits.append(f"its shard size is {manifest['shard_size']}, expected {self.shard_size}")
        if misfits:
            raise ValueError(
                f"{self.folder} holds another cache: {'; '.join(misfits)}. Choose another folder, or delete this "
                "one to start afresh"
            )

    def _read_lines(self) -> dict[int, dict[str, Any]]:
        """Lines of the finished shards, by number and in its order."""
        found = {}
        for path in (self.folder / _SHARDS).glob("[0-9]*.json"):
            with suppress(FileNotFoundError):  # Its process may give it up just now.
                changed = path.stat().st_mtime_ns
                if path.name not in self._lines or self._lines[path.name][0] != changed:
                    self._lines[path.name] = changed, json.loads(path.read_text("utf-8"))
                found[int(path.stem)] = self._lines[path.name][1]
        return dict(sorted(found.items()))

    def _read_end(self) -> int | None:
        """How many pictures the source has, readable or not, if a process has come to its end."""
        path = self.folder / _SHARDS / _END
        return json.loads(path.read_text("utf-8"))["positions"] if path.is_file() else None

    def _write_manifest(self) -> dict[str, Any]:
        """Writes the manifest from the lines that are there, until no other process has added one meanwhile.

        Whoever replaces it last looks again afterwards, so that no line stays out of it, without a lock.
        """
        while True:
            lines, end = self._read_lines(), self._read_end()
            needed = None if end is None else range(-(-end // self.shard_size))
            manifest = {
                "format": _FORMAT,
                "card": asdict(self.card),
                "source": {"name": self.source.name, "fingerprint": self.source.fingerprint},
                "shard_size": self.shard_size,
                "complete": needed is not None and set(lines) == set(needed),
                "items": sum(line["items"] for line in lines.values()),
                "unreadable": sum(len(line["unreadable"]) for line in lines.values()),
                "shards": [{k: line[k] for k in ("file", "items", "bytes", "sha256")} for line in lines.values()],
            }
            self._put("manifest.json", _json(manifest))
            if self._read_lines() == lines and self._read_end() == end:
                return manifest

    def _put(self, name: str, data: bytes) -> None:
        """Writes a file so that it is there whole or not at all."""
        path = self.folder / name
        temporary = path.with_name(f"{path.name}.{self.mine.rank}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                error.errno,
                f"the disk is full: {len(data) / 1e6:.0f} MB more are needed for {name}. The {len(self._read_lines())} "
                "shards that are finished are kept; make room and run the same again to go on",
                str(self.folder),
            ) from error


def _stored(pictures: Sequence[Picture], batch: EncodedBatch, keep_pixels: bool) -> dict[str, torch.Tensor]:
    """What a shard keeps of a batch: float16 encodings, and the uint8 pixels if wanted."""
    stored = {name: getattr(batch, name).half().cpu() for name in ("features", "latents")}
    for name, values in stored.items():
        finite = values.flatten(1).isfinite().all(dim=1)
        if not bool(finite.all()):
            raise ValueError(
                f"the {name} of {pictures[int(finite.int().argmin())].key} hold NaN or numbers beyond float16: run the "
                "networks in float32 or bfloat16"
            )
    return stored | ({"pixels": torch.stack([picture.pixels for picture in pictures])} if keep_pixels else {})


def _weights_digest(*modules: nn.Module) -> str:
    """Of the weights as bfloat16, so that a copy in that type has the same."""
    found = hashlib.sha256()
    for name, value in nn.ModuleList(modules).state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().bfloat16().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no cache of encodings (no manifest.json): write one into it first")
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}): copy it again, or write the cache anew in another folder"
        ) from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != _FORMAT:
        raise ValueError(f"{path} is of the format {found!r}, expected {_FORMAT!r}: write the cache again, elsewhere")
    return manifest


def _card(values: dict[str, Any]) -> CacheCard:
    return CacheCard(**{**values, "geometry": Geometry(**values["geometry"])})
