"""A cache of encoded images: written once (`cache_writer`), used by any number of runs.

Shapes: B batch, N tokens, D code dimension, C latent channels, h' w' latent grid, R resolution, M images in a shard.

A cache is a folder:
    manifest.json          what made it, and for each shard its file, number of images, size and SHA-256
    shards/00000.safetensors, ...   features [M, N, D] and latents [M, C, h', w'], float16; pixels [M, 3, R, R] uint8
                           if they are kept; a VLM's conditions, vlm_vectors [M, N, D] and vlm_uncertainty [M, N, 4]
                           float16, and vlm_known [M] bool; the names of the images in the header, and their captions if
                           they are kept
    shards/00000.json, ... the manifest's line for one shard, so that several processes and runs can add to the cache
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..files import in_file, json_object, open_tensors, read_json, reading
from ..models.checkpoints import fingerprint_of
from ..pipelines.image_files import DEFAULT_POLICY
from ..pipelines.images import to_pixels
from ..pipelines.progress import ProgressBar
from ..protocols import ImageTokenizer, LatentCodec
from ..settings import require_number, require_text, shown
from ..types import same_codebook
from .batches import DataShard, Entry
from .encoded_batch import VLM_TENSORS, EncodedBatch
from .image_batch import Geometry
from .vlm_conditions import Served

FORMAT = "dcdd encodings 1"

_MANIFEST, _LINE, _SHARD = "the manifest of a cache", "the line of a cache's shard", "a shard of a cache"
_ANOTHER = "copy it again, or write the cache again into another folder"
_SHARD_AGAIN = "copy it again, or run `train.py cache` again, which makes only that shard"
_SHARD_FILE = re.compile(r"shards/\d{5,}\.safetensors")


@dataclass(frozen=True, kw_only=True)
class CacheCard:
    """What the encodings of a cache were made with.

    Attributes:
        codebook: its fingerprint (`Codebook.fingerprint`).
        tokenizer, autoencoder: fingerprints of the two encoders' weights; a bfloat16 copy has the same ones.
            The autoencoder is None for a cache without latents, whose C is 0.
        vae_shift, vae_scale: of the normalised latents; None without a codec, or for a codec without them.
        code_dim, channels: D and C.
        geometry: the sizes.
        pixels: whether the images' pixels are kept.
        vlm: how the VLM's conditions of captioned images are made; None for a cache without them.
    """

    codebook: str
    tokenizer: str
    autoencoder: str | None
    vae_shift: float | None
    vae_scale: float | None
    code_dim: int
    channels: int
    geometry: Geometry
    pixels: bool
    vlm: Served | None = None

    @classmethod
    def of(
        cls,
        tokenizer: ImageTokenizer,
        codec: LatentCodec | None,
        geometry: Geometry,
        *,
        pixels: bool = False,
        vlm: Served | None = None,
    ) -> CacheCard:
        """The card of encodings by these networks at these sizes."""
        return cls(
            codebook=tokenizer.codebook.fingerprint,
            tokenizer=_encoder_fingerprint(tokenizer.model),
            autoencoder=None if codec is None else _encoder_fingerprint(codec.model),
            vae_shift=None if codec is None else codec.shift,
            vae_scale=None if codec is None else codec.scale,
            code_dim=tokenizer.codebook.dim,
            channels=0 if codec is None else codec.channels,
            geometry=geometry,
            pixels=pixels,
            vlm=vlm,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; without `vlm` if there is none, as in older cards."""
        values = asdict(self)
        if self.vlm is None:
            del values["vlm"]
            return values
        return values | {"vlm": self.vlm.to_dict()}

    @classmethod
    def from_dict(cls, values: Any) -> CacheCard:
        """The inverse of `to_dict`.

        Raises:
            ValueError: naming the field that is missing, unknown, or of another type.
        """
        if isinstance(values, dict):
            values = {"vlm": None} | values
        _require_fields("card", values, [field.name for field in fields(cls)])
        _require_fields("card.geometry", values["geometry"], [field.name for field in fields(Geometry)])
        for name in ("codebook", "tokenizer", "autoencoder"):
            require_text(f"card.{name}", values[name], optional=name == "autoencoder")
        for name in ("vae_shift", "vae_scale"):
            require_number(f"card.{name}", values[name], optional=True)
        for name, least in (("code_dim", 1), ("channels", 0 if values["autoencoder"] is None else 1)):
            require_number(f"card.{name}", values[name], whole=True, least=least)
        if not isinstance(values["pixels"], bool):
            raise ValueError(f"card.pixels must be true or false, got {shown(values['pixels'])}")
        try:
            vlm = None if values["vlm"] is None else Served.from_dict(values["vlm"])
        except ValueError as error:
            raise ValueError(f"card.vlm: {error}: {_ANOTHER}") from error
        return cls(**{**values, "geometry": Geometry(**values["geometry"]), "vlm": vlm})

    def layout(self, items: int) -> dict[str, tuple[str, list[int]]]:
        """Tensor's name -> (safetensors' name of its dtype, shape), for a shard with this many images."""
        if items == 0:
            return {}
        (h, w), size = self.geometry.grid, self.geometry.resolution
        latents = size // self.geometry.vae_factor
        held = {"features": ("F16", [items, h * w, self.code_dim])}
        if self.autoencoder is not None:
            held["latents"] = ("F16", [items, self.channels, latents, latents])
        if self.pixels:
            held["pixels"] = ("U8", [items, 3, size, size])
        if self.vlm is not None:
            sizes = {"vlm_vectors": [items, h * w, self.code_dim], "vlm_uncertainty": [items, h * w, 4]}
            held |= {name: ("F16", shape) for name, shape in sizes.items()} | {"vlm_known": ("BOOL", [items])}
        return held

    def misfits(self, wanted: CacheCard) -> list[str]:
        """Describes what differs from the wanted card; pixels and VLM conditions that are not needed do no harm."""
        found = self._token_misfits(wanted)
        if self.autoencoder is None and wanted.autoencoder is not None:
            found.append("it holds no latents, as it was written without an autoencoder")
        elif self.autoencoder != wanted.autoencoder:
            found.append(f"it was made with another autoencoder ({self.autoencoder}, expected {wanted.autoencoder})")
        elif not (_close(self.vae_shift, wanted.vae_shift) and _close(self.vae_scale, wanted.vae_scale)):
            found.append(
                f"its latents are normalised with another shift and scale ({self.vae_shift}, {self.vae_scale}, "
                f"expected {wanted.vae_shift}, {wanted.vae_scale})"
            )
        for name, value in asdict(wanted.geometry).items():
            if getattr(self.geometry, name) != value:
                found.append(f"its {name.replace('_', ' ')} is {getattr(self.geometry, name)}, expected {value}")
        if wanted.pixels and not self.pixels:
            found.append(
                "it does not keep the images' pixels, which localised training needs (train with --localised 0, or "
                "write a cache with --keep-pixels)"
            )
        if wanted.vlm is not None:
            bare = "it holds no conditions of a VLM, as it was written without --vlm-conditions"
            found += [bare] if self.vlm is None else self.vlm.misfits(wanted.vlm)
        return found

    def _token_misfits(self, wanted: CacheCard) -> list[str]:
        if not same_codebook(self.codebook, wanted.codebook):
            return [f"its tokenizer has another codebook ({self.codebook}, expected {wanted.codebook})"]
        if self.tokenizer != wanted.tokenizer:
            return [f"its tokenizer has another encoder ({self.tokenizer}, expected {wanted.tokenizer})"]
        return []

    def misfits_of_tokens(self, wanted: CacheCard) -> list[str]:
        """Like `misfits`, for the features and their size only."""
        found = self._token_misfits(wanted)
        for name in ("token_resolution", "token_factor"):
            own, expected = getattr(self.geometry, name), getattr(wanted.geometry, name)
            if own != expected:
                found.append(f"its {name.replace('_', ' ')} is {own}, expected {expected}")
        return found


class EncodingCache:
    """A finished cache, with random access: a `Source` of `EncodedBatch`es.

    Args:
        folder: see `write_cache`.

    Attributes:
        card: what it was made with.
        captioned: whether the captions of its images are kept.
        policy: has no effect, since unreadable images were left out when the cache was written.

    Raises:
        ValueError: if there is no cache, it is incomplete or empty, or a shard is missing or has another size.
    """

    policy = DEFAULT_POLICY

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.name = str(folder)
        manifest = read_manifest(self.folder)
        self.card = CacheCard.from_dict(manifest["card"])
        self.geometry = self.card.geometry
        self.captioned: bool = manifest.get("captions", False)
        self._shards: list[dict[str, Any]] = manifest["shards"]
        if not manifest["complete"]:
            raise ValueError(
                f"the cache {folder} is not finished, it has {len(self._shards)} shards so far: run `train.py cache` "
                "again, which continues from there"
            )
        for shard in self._shards:
            path = self.folder / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes, expected {shard['bytes']}"
                raise ValueError(f"{path} {found}: {_SHARD_AGAIN}")
        self._ends = np.cumsum([shard["items"] for shard in self._shards])
        if not self._shards or not len(self):
            raise ValueError(f"the cache {folder} holds no images: write it again from others into another folder")
        self._open: dict[int, dict[str, Any]] = {}
        self._captions: dict[int, list[str]] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def batch(self, indices: Sequence[int]) -> EncodedBatch:
        """The encodings of these images, in this order; nothing else is read.

        Raises:
            ValueError: for no index, or one out of range.
        """
        if not len(indices) or min(indices) < 0 or max(indices) >= len(self):
            raise ValueError(f"expected indices in 0..{len(self) - 1}, at least one, got {list(indices)[:8]}")
        return self.collate([self.load(Entry(str(i), int(i))) for i in indices])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}, "_captions": {}}  # Every process opens the files for itself.

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the shards' checksums."""
        return hashlib.sha256(json.dumps([shard["sha256"] for shard in self._shards]).encode()).hexdigest()[:16]

    @cached_property
    def keys(self) -> list[str]:
        """The names of the images, by index."""
        return [key for number in range(len(self._shards)) for key in self._header(number)["keys"]]

    def require(self, wanted: CacheCard) -> None:
        """Refuses a cache that was made with other networks or sizes.

        Raises:
            ValueError: naming each difference.
        """
        self._refuse(self.card.misfits(wanted))

    def require_captions(self, wanted: CacheCard) -> None:
        """Refuses a cache that is unsuitable for learning tokens from captions.

        Args:
            wanted: its latents and pixels do not matter.

        Raises:
            ValueError: naming each difference.
        """
        bare = [] if self.captioned else ["it has no captions, as it was written without --captions"]
        self._refuse([*self.card.misfits_of_tokens(wanted), *bare])

    def _refuse(self, misfits: Sequence[str]) -> None:
        if misfits:
            raise ValueError(
                f"the cache {self.folder} does not fit: {'; '.join(misfits)}. Use the networks and sizes that it was "
                "made with, or write another cache into another folder"
            )

    def verify(self, *, rank: int = 0, world: int = 1) -> None:
        """Compares the shards with their checksums; each of several processes checks every `world`-th one.

        Raises:
            ValueError: naming the damaged shards.
        """
        own = self._shards[rank::world]
        bar = ProgressBar(own, label="checksums of the cache", unit="shard", shown=rank == 0)
        bad = [shard["file"] for shard in bar if sha256(self.folder / shard["file"]) != shard["sha256"]]
        if bad:
            raise ValueError(
                f"{len(bad)} of {len(own)} shards of the cache {self.folder} are damaged: their checksums "
                f"differ from the manifest ({', '.join(bad)}). Copy them again, or run `train.py cache` again, which "
                "makes only these"
            )

    def entries(self, shard: DataShard, epoch: int, start: int = 0, mark: Any = None) -> Iterator[Entry]:
        """See `batches.Source.entries`."""
        return (Entry(str(i), i) for i in shard.indices(len(self), epoch, start))

    def load(self, entry: Entry) -> dict[str, Any]:
        """What the cache keeps of one image.

        Features [N, D] and latents [C, h', w'] in float16, pixels [3, R, R] uint8, the VLM's conditions, and the
        caption: each if it is kept.
        """
        number = int(np.searchsorted(self._ends, entry.data, side="right"))
        row = entry.data - (int(self._ends[number - 1]) if number else 0)
        found = {name: values[row : row + 1][0] for name, values in self._shard(number).items()}
        return found | ({"caption": self._captions_of(number)[row]} if self.captioned else {})

    def collate(self, items: Sequence[dict[str, Any]]) -> EncodedBatch:
        """Combines items that `load` returned into a batch, in float32."""
        stacked = {name: torch.stack([item[name] for item in items]) for name in items[0] if name != "caption"}
        pixels = to_pixels(stacked["pixels"], "cpu") if "pixels" in stacked else None
        latents = stacked["latents"].float() if "latents" in stacked else None
        captions = tuple(item["caption"] for item in items) if self.captioned else None
        vlm = {name: stacked[name] for name in VLM_TENSORS if name in stacked}
        vlm = {name: value if value.dtype == torch.bool else value.float() for name, value in vlm.items()}
        return EncodedBatch(
            features=stacked["features"].float(), latents=latents, pixels=pixels, captions=captions, **vlm
        )

    @property
    def known(self) -> int:
        """The number of images with conditions of a VLM; 0 for a cache without them."""
        if self.card.vlm is None:
            return 0
        numbers = (number for number, shard in enumerate(self._shards) if shard["items"])
        return sum(int(self._shard(number)["vlm_known"][:].sum()) for number in numbers)

    def _captions_of(self, number: int) -> list[str]:
        """The captions of a shard's images."""
        if number not in self._captions:
            found, path = self._header(number).get("captions"), self.folder / self._shards[number]["file"]
            items = self._shards[number]["items"]
            if not isinstance(found, list) or len(found) != items or not all(isinstance(one, str) for one in found):
                raise ValueError(f"{path} has the captions {shown(found)}, expected {items} texts: {_SHARD_AGAIN}")
            self._captions[number] = found
        return self._captions[number]

    def _shard(self, number: int) -> dict[str, Any]:
        """Slices of a shard's tensors, which are read from the file on demand."""
        if number not in self._open:
            path, items = self.folder / self._shards[number]["file"], self._shards[number]["items"]
            with open_tensors(path, _SHARD, _SHARD_AGAIN) as file, reading(path, _SHARD, _SHARD_AGAIN):
                slices = {name: file.get_slice(name) for name in file.keys()}
                found = {name: (values.get_dtype(), values.get_shape()) for name, values in slices.items()}
            if found != (wanted := self.card.layout(items)):
                raise ValueError(f"{path} holds {shown(found, 300)}, expected {wanted}: {_SHARD_AGAIN}")
            self._open[number] = slices
        return self._open[number]

    def _header(self, number: int) -> dict[str, Any]:
        path = self.folder / self._shards[number]["file"]
        with open_tensors(path, _SHARD, _SHARD_AGAIN) as file:
            header = json_object((file.metadata() or {}).get("dcdd", ""), path, "the header of a shard", _SHARD_AGAIN)
        keys = header.get("keys")
        if not isinstance(keys, list) or len(keys) != self._shards[number]["items"]:
            raise ValueError(
                f"{path} names {shown(keys)}, expected {self._shards[number]['items']} images: {_SHARD_AGAIN}"
            )
        return header


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache.

    Raises:
        ValueError: for a folder without a cache, and for a manifest that is damaged or of another format.
    """
    path = folder / "manifest.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no cache of encodings (no manifest.json): write one with `train.py cache`")
    manifest = read_json(path, _MANIFEST, _ANOTHER)
    if (found := manifest.get("format")) != FORMAT:
        raise ValueError(
            f"{path} has the format {shown(found)}, expected {FORMAT!r}: write the cache again into another folder"
        )
    with in_file(path):
        for name in ("card", "source", "shard_size", "complete", "shards"):
            if name not in manifest:
                raise ValueError(f"it has no {name!r}: {_ANOTHER}")
        CacheCard.from_dict(manifest["card"])
        _require_fields("source", manifest["source"], ("name", "fingerprint"))
        for name, value in manifest["source"].items():
            require_text(f"source.{name}", value, remedy=_ANOTHER)
        require_number("shard_size", manifest["shard_size"], whole=True, least=1, remedy=_ANOTHER)
        require_number("min_side", manifest.get("min_side"), whole=True, least=1, optional=True, remedy=_ANOTHER)
        if not isinstance(manifest.get("captions", False), bool):
            raise ValueError(f"captions must be true or false, got {shown(manifest['captions'])}: {_ANOTHER}")
        if not isinstance(manifest["complete"], bool) or not isinstance(manifest["shards"], list):
            raise ValueError(
                f"expected complete to be true or false and shards a list, got {shown(manifest['complete'])} and "
                f"{shown(manifest['shards'])}: {_ANOTHER}"
            )
        for number, shard in enumerate(manifest["shards"]):
            _check_shard(f"shards[{number}]", shard)
    return manifest


def read_line(path: Path) -> dict[str, Any]:
    """The line of one shard: its entry in the manifest and further counts, from the shard's own JSON file.

    Raises:
        ValueError: naming a file that is damaged.
    """
    again = "delete it, and run `train.py cache` again, which makes only that shard"
    line = read_json(path, _LINE, again)
    with in_file(path):
        _check_shard("the line", line, more=("read", "unreadable", "mark"), remedy=again)
        require_number("read", line["read"], whole=True, least=0, remedy=again)
        for name in ("unreadable", "small", "uncaptioned", "without_caption"):
            names = line.get(name, [])
            if not isinstance(names, list) or not all(isinstance(key, str) for key in names):
                raise ValueError(f"{name} must be a list of names, got {shown(names)}: {again}")
        mark = line["mark"]
        if mark is not None and not (isinstance(mark, list) and len(mark) == 3 and all(type(n) is int for n in mark)):
            raise ValueError(f"mark must be three whole numbers or null, got {shown(mark)}: {again}")
    return line


def read_end(path: Path) -> int:
    """The number of images in a source, as the writer recorded it on reaching the end.

    Raises:
        ValueError: naming a file that is damaged.
    """
    again = "delete it, and run `train.py cache` again"
    positions = read_json(path, "the end of a cache", again).get("positions")
    with in_file(path):
        require_number("positions", positions, whole=True, least=0, remedy=again)
    return positions


def _check_shard(where: str, shard: Any, more: Sequence[str] = (), remedy: str = _ANOTHER) -> None:
    _require_fields(where, shard, ("file", "items", "bytes", "sha256", *more), remedy, exactly=False)
    for name in ("items", "bytes"):
        require_number(f"{where}.{name}", shard[name], whole=True, least=0, most=2**50, remedy=remedy)
    for name in ("file", "sha256"):
        require_text(f"{where}.{name}", shard[name], remedy=remedy)
    if not _SHARD_FILE.fullmatch(shard["file"]):
        raise ValueError(
            f"{where}.file must be of the form shards/00000.safetensors, got {shown(shard['file'])}: {remedy}"
        )


def _require_fields(
    where: str, value: Any, names: Sequence[str], remedy: str = _ANOTHER, *, exactly: bool = True
) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object with {', '.join(names)}, got {shown(value)}: {remedy}")
    if absent := [name for name in names if name not in value]:
        raise ValueError(f"{where} has no {', '.join(absent)}: {remedy}")
    if exactly and (others := [name for name in value if name not in names]):
        raise ValueError(f"{where} has the unknown fields {shown(others)}: {remedy}")


def sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal digits; the file is read in blocks.

    Raises:
        OSError: if it cannot be read.
    """
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _encoder_fingerprint(model: nn.Module) -> str:
    """A fingerprint of the encoder's weights, hashed as bfloat16 so that a copy in that dtype has the same one.

    They are those of `encoder` and `quant_conv`, as diffusers and transformers name them, or else the whole network's.
    """
    parts = [part for name in ("encoder", "quant_conv") if (part := getattr(model, name, None)) is not None]
    weights = nn.ModuleList(parts or [model]).state_dict()
    return fingerprint_of({name: value.bfloat16() for name, value in weights.items()})


def _close(found: float | None, wanted: float | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    return math.isclose(found, wanted, abs_tol=1e-9)
