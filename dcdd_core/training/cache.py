"""A cache of encoded images: written once (`cache_writer`), used by any number of runs.

Shapes: B batch, N tokens, D code dimension, C latent channels, h' w' latent grid, R resolution, M images in a shard.

A cache is a folder:
    manifest.json          what made it, and for each shard its file, number of images, size and SHA-256
    shards/00000.safetensors, ...   features [M, N, D] and latents [M, C, h', w'], float16; pixels [M, 3, R, R] uint8
                           if they are kept; the names of the images in the header
    shards/00000.json, ... the manifest's line for one shard: so several processes and runs can add to the cache
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..models.checkpoints import fingerprint_of
from ..pipelines.images import to_pixels
from ..protocols import ImageTokenizer, LatentCodec
from ..types import same_codebook
from .batches import DataShard, Entry
from .encoded_batch import EncodedBatch
from .image_batch import Geometry

FORMAT = "dcdd encodings 1"


@dataclass(frozen=True, kw_only=True)
class CacheCard:
    """What made the encodings of a cache.

    Attributes:
        codebook: its fingerprint (`Codebook.fingerprint`).
        tokenizer, autoencoder: fingerprints of the two encoders' weights; a bfloat16 copy has the same.
        vae_shift, vae_scale: of the normalised latents; None for a codec without them.
        code_dim, channels: D and C.
        geometry: the sizes.
        pixels: whether the images' pixels are kept.
    """

    codebook: str
    tokenizer: str
    autoencoder: str
    vae_shift: float | None
    vae_scale: float | None
    code_dim: int
    channels: int
    geometry: Geometry
    pixels: bool

    @classmethod
    def of(
        cls, tokenizer: ImageTokenizer, codec: LatentCodec, geometry: Geometry, *, pixels: bool = False
    ) -> CacheCard:
        """The card of encodings by these networks at these sizes."""
        return cls(
            codebook=tokenizer.codebook.fingerprint,
            tokenizer=_encoder_fingerprint(tokenizer.model),
            autoencoder=_encoder_fingerprint(codec.model),
            vae_shift=codec.shift,
            vae_scale=codec.scale,
            code_dim=tokenizer.codebook.dim,
            channels=codec.channels,
            geometry=geometry,
            pixels=pixels,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CacheCard:
        """The inverse of `asdict`."""
        return cls(**{**values, "geometry": Geometry(**values["geometry"])})

    def misfits(self, wanted: CacheCard) -> list[str]:
        """What differs from the wanted card, in words; pixels that are not needed do no harm."""
        found = []
        if not same_codebook(self.codebook, wanted.codebook):
            found.append(f"its tokenizer has another codebook ({self.codebook}, expected {wanted.codebook})")
        elif self.tokenizer != wanted.tokenizer:
            found.append(f"its tokenizer has another encoder ({self.tokenizer}, expected {wanted.tokenizer})")
        if self.autoencoder != wanted.autoencoder:
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
            found.append("it does not keep the images' pixels, which localised training needs")
        return found


class EncodingCache:
    """A finished cache, with random access: a `Source` of `EncodedBatch`es.

    Args:
        folder: see `write_cache`.

    Attributes:
        card: what made it.

    Raises:
        ValueError: if there is no cache, or it is not complete, or a shard is missing or of another size.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.name = str(folder)
        manifest = read_manifest(self.folder)
        self.card = CacheCard.from_dict(manifest["card"])
        self.geometry = self.card.geometry
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
                raise ValueError(
                    f"{path} {found}: copy it again, or run `train.py cache` again, which makes only that shard"
                )
        self._ends = np.cumsum([shard["items"] for shard in self._shards])
        self._open: dict[int, dict[str, Any]] = {}

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
        return self.__dict__ | {"_open": {}}  # Every process opens the files itself.

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
        if misfits := self.card.misfits(wanted):
            raise ValueError(
                f"the cache {self.folder} does not fit: {'; '.join(misfits)}. Use the networks and sizes that it was "
                "made with, or write another cache into another folder"
            )

    def verify(self, *, rank: int = 0, world: int = 1) -> None:
        """Compares the shards with their checksums; each of several processes checks every `world`-th one.

        Raises:
            ValueError: naming the damaged ones.
        """
        own = self._shards[rank::world]
        bad = [shard["file"] for shard in own if sha256(self.folder / shard["file"]) != shard["sha256"]]
        if bad:
            raise ValueError(
                f"{len(bad)} of {len(own)} shards of the cache {self.folder} are damaged: their checksums "
                f"differ from the manifest ({', '.join(bad)}). Copy them again, or run `train.py cache` again, which "
                "makes only these"
            )

    def entries(self, shard: DataShard, epoch: int, start: int = 0, mark: Any = None) -> Iterator[Entry]:
        """See `batches.Source.entries`."""
        return (Entry(str(i), i) for i in shard.indices(len(self), epoch, start))

    def load(self, entry: Entry) -> dict[str, torch.Tensor]:
        """One image's features [N, D] and latents [C, h', w'] in float16, and pixels [3, R, R] uint8 if kept."""
        number = int(np.searchsorted(self._ends, entry.data, side="right"))
        row = entry.data - (int(self._ends[number - 1]) if number else 0)
        return {name: values[row : row + 1][0] for name, values in self._shard(number).items()}

    def collate(self, items: Sequence[dict[str, torch.Tensor]]) -> EncodedBatch:
        """A batch of items of `load`, in float32."""
        stacked = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        pixels = to_pixels(stacked["pixels"], "cpu") if "pixels" in stacked else None
        return EncodedBatch(features=stacked["features"].float(), latents=stacked["latents"].float(), pixels=pixels)

    def _shard(self, number: int) -> dict[str, Any]:
        """Slices of a shard's memory-mapped tensors."""
        if number not in self._open:
            path = self.folder / self._shards[number]["file"]
            try:
                file = safe_open(path, framework="pt")
                self._open[number] = {name: file.get_slice(name) for name in file.keys()}
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{path} cannot be read ({error}): copy it again, or run `train.py cache` again, which makes only "
                    "that shard"
                ) from error
        return self._open[number]

    def _header(self, number: int) -> dict[str, Any]:
        with safe_open(self.folder / self._shards[number]["file"], framework="pt") as file:
            return json.loads(file.metadata()["dcdd"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache.

    Raises:
        ValueError: for a folder without a cache, and for a manifest that is damaged or of another format.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no cache of encodings (no manifest.json): write one with `train.py cache`")
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}): copy it again, or write the cache again into another folder"
        ) from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} has the format {found!r}, expected {FORMAT!r}: write the cache again into another folder"
        )
    return manifest


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
    """Of the weights that encode; hashed as bfloat16, so that a copy in that type has the same.

    Those of `encoder` and `quant_conv`, as diffusers and transformers name them, or of the whole network.
    """
    parts = [part for name in ("encoder", "quant_conv") if (part := getattr(model, name, None)) is not None]
    weights = nn.ModuleList(parts or [model]).state_dict()
    return fingerprint_of({name: value.bfloat16() for name, value in weights.items()})


def _close(found: float | None, wanted: float | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    return math.isclose(found, wanted, abs_tol=1e-9)
