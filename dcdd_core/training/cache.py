"""A cache of encodings: computed once (`cache_writer`), kept in a folder and reused across runs.

Shapes: B batch, N tokens, D code dimension, C latent channels, h' w' latent grid, R resolution, M pictures of a shard.

A cache is a folder:
    manifest.json          what made it, and for each shard its file, number of pictures, size and SHA-256
    shards/00000.safetensors, ...   features [M, N, D] and latents [M, C, h', w'], float16; pixels [M, 3, R, R] uint8
                           where they are kept; the names of the pictures in the header
    shards/00000.json, ... the manifest's line of one shard, by which several processes and runs add to it
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
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch import nn

from ..models.checkpoints import fingerprint_of
from ..models.vq import VQTokenizer
from ..pipelines.images import to_pixels
from ..types import same_codebook
from .batches import Entry, Share
from .encoded_batch import EncodedBatch
from .image_batch import Geometry

FORMAT = "dcdd encodings 1"


@dataclass(frozen=True, kw_only=True)
class CacheCard:
    """What made the encodings of a cache.

    Attributes:
        codebook: its fingerprint (`Codebook.fingerprint`).
        tokenizer, autoencoder: fingerprints of the two encoders' weights; bfloat16 copies have the same.
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
            tokenizer=_encoder(vq.model.encoder, vq.model.quant_conv),
            autoencoder=_encoder(vae.encoder, vae.quant_conv),
            vae_shift=vae.config.shift_factor,
            vae_scale=vae.config.scaling_factor,
            code_dim=vq.codebook.dim,
            channels=vae.config.latent_channels,
            geometry=geometry,
            pixels=pixels,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CacheCard:
        """Takes back what `asdict` made."""
        return cls(**{**values, "geometry": Geometry(**values["geometry"])})

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


class EncodingCache:
    """A finished cache, to be read at any place: a `Source` of `EncodedBatch`es.

    Args:
        folder: see `write_cache`.

    Attributes:
        card: what made it.

    Raises:
        ValueError: if there is no cache, it is not complete, or a shard is missing or of another size.
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
        """Of the shards' checksums."""
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

    def verify(self, *, rank: int = 0, world: int = 1) -> None:
        """Compares the shards with their checksums, of several processes each its share.

        Raises:
            ValueError: naming those that are damaged.
        """
        own = self._shards[rank::world]
        bad = [shard["file"] for shard in own if sha256(self.folder / shard["file"]) != shard["sha256"]]
        if bad:
            raise ValueError(
                f"{len(bad)} of {len(own)} shards of the cache {self.folder} are damaged, their checksums are "
                f"not those of the manifest: {', '.join(bad)}. Copy them again, or write the cache again, which makes "
                "only these"
            )

    def entries(self, share: Share, epoch: int, start: int = 0, mark: Any = None) -> Iterator[Entry]:
        """See `batches.Source.entries`."""
        return (Entry(str(i), i) for i in share.indices(len(self), epoch, start))

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
            path = self.folder / self._shards[number]["file"]
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


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a cache says of itself.

    Raises:
        ValueError: for a folder without a cache, and for a manifest that is damaged or of another format.
    """
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
    if found != FORMAT:
        raise ValueError(f"{path} is of the format {found!r}, expected {FORMAT!r}: write the cache again, elsewhere")
    return manifest


def sha256(path: Path) -> str:
    """A file's checksum in hexadecimal digits, read a piece at a time.

    Raises:
        OSError: if it cannot be read.
    """
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _encoder(*modules: nn.Module | None) -> str:
    """Of the weights as bfloat16, so that a copy in that type has the same."""
    weights = nn.ModuleList(module for module in modules if module is not None).state_dict()
    return fingerprint_of({name: value.bfloat16() for name, value in weights.items()})
