"""What a masked sampler is made from: the image tokenizer, the text's words, and the network to train."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import registry
from ..method.progressive import ProgressiveOptions
from ..models.masked.files import save_masked
from ..models.masked.network import MaskedConfig, MaskedTransformer
from ..models.masked.sampler import MaskedSampler
from ..models.masked.words import Words
from ..models.text_tokenizer import save_tokenizer
from ..protocols import ImageTokenizer
from ..settings import require_at_least, require_at_most
from ..types import same_codebook
from .image_batch import Geometry
from .plan import Encoders

WIDTH, LAYERS, HEADS = 512, 12, 8
"""Of a new network, about 40 M weights besides the words and the codes [choice]."""
TEMPLATE = "{prompt}"
"""Around the captions of a new network."""
GUIDANCE = 3.0
"""That a new network is sampled with [choice]."""
_MULTIPLE = 64
_MOST = 2**16
_MOST_GRID = 1024
"""That `MaskedConfig` takes."""


@dataclass(frozen=True, kw_only=True)
class MaskedPlan:
    """What a masked sampler is made from.

    Attributes:
        vlm: files of a VLM or of an image tokenizer alone (`registry.sampler_family`); only the tokenizer is read.
        start: files of a masked sampler, or of a Janus model, to start from; None for a new network.
        text: folder of the text tokenizer of a new network; None for the one in `vlm`.
        template: text around the captions of a new network, with "{prompt}" in it once; None for `TEMPLATE`.
        side: of the images in pixels; None for the VLM's own.
        width, layers, heads: of a new network; None for `WIDTH`, `LAYERS`, `HEADS`.
        seed: for what starts at random.

    Raises:
        ValueError: for sizes out of range or that do not fit together, and for options without effect given `start`.
    """

    vlm: Path
    start: Path | None = None
    text: Path | None = None
    template: str | None = None
    side: int | None = None
    width: int | None = None
    layers: int | None = None
    heads: int | None = None
    seed: int = 0

    def __post_init__(self):
        named = {name: getattr(self, name) for name in ("side", "width", "layers", "heads")}
        given = {name: value for name, value in named.items() if value is not None}
        require_at_least(1, **given)
        require_at_most(_MOST, **given)
        own = {"--text-tokenizer": self.text, "--template": self.template}
        own |= {f"--{name}": named[name] for name in ("width", "layers", "heads")}
        idle = [option for option, value in own.items() if value is not None]
        if self.start is not None and idle:
            raise ValueError(
                f"{', '.join(idle)} would do nothing: the network of --start-from has its own; leave it out"
            )
        width, heads = self.width or WIDTH, self.heads or HEADS
        if width % (2 * heads):
            raise ValueError(
                f"a width of {width} is no even multiple of {heads} heads: use {_nearest(width, 2 * heads)}, or other "
                "--heads"
            )

    def check(self) -> None:
        """Checks what can be known before any weights are read: that the files exist and are of the right kind.

        Raises:
            ValueError: for a missing file, files of another kind, and words that cannot be read.
        """
        for path, expected in (
            (self.vlm, "a VLM"),
            (self.start, "a masked sampler or a Janus"),
            (self.text, "the folder of a text tokenizer"),
        ):
            if path is not None and not Path(path).exists():
                raise ValueError(f"{path} does not exist; expected {expected}")
        registry.sampler_family(self.vlm)
        if self.start is None:
            if self.text is None and not (Path(self.vlm) / "tokenizer.json").exists():
                raise ValueError(
                    f"{self.vlm} has no text tokenizer (tokenizer.json): give the folder of one with --text-tokenizer"
                )
            self._words()
            return
        family = registry.sampler_family(self.start)
        if not (_is_masked(family) or hasattr(family, "start_masked")):
            raise ValueError(
                f"--start-from {self.start} is of the kind {family.name!r}, whose weights start no masked sampler: "
                "give the folder of a masked sampler that this training wrote, or of a Janus"
            )

    def tokenizer(self, device: torch.device | str) -> ImageTokenizer:
        """Loads the image tokenizer, in float32.

        Raises:
            ValueError: as the family's loader.
        """
        return registry.sampler_family(self.vlm).load_tokenizer(str(self.vlm), device=device, dtype=torch.float32)

    def encoders(self, device: torch.device | str) -> Encoders:
        """The image tokenizer with the sizes of the images, for a cache.

        Raises:
            ValueError: as `tokenizer` and `geometry`.
        """
        tokenizer = self.tokenizer(device)
        return Encoders(tokenizer=tokenizer, codec=None, geometry=self.geometry(tokenizer))

    def geometry(self, tokenizer: ImageTokenizer) -> Geometry:
        """The sizes of the training images.

        Raises:
            ValueError: for a side that is not a whole number of tokens or has too many of them, and for a token grid
                that is not square if no side is given.
        """
        rows, columns = tokenizer.grid
        if self.side is None and rows != columns:
            raise ValueError(f"{self.vlm} paints {rows} x {columns} tokens; training needs a square grid: give --side")
        side = self.side or rows * tokenizer.factor
        geometry = Geometry(resolution=side, token_resolution=side, token_factor=tokenizer.factor, vae_factor=1)
        if geometry.grid[0] > _MOST_GRID:
            raise ValueError(
                f"images of {side} pixels have {_times(geometry.grid)} tokens, at most {_MOST_GRID} x {_MOST_GRID} can "
                "be painted: take smaller ones (--side)"
            )
        return geometry

    def sampler(self, tokenizer: ImageTokenizer, geometry: Geometry) -> MaskedSampler:
        """The sampler to train, on the CPU in float32; all its weights require a gradient.

        Raises:
            ValueError: for a start with other codes or another grid, and as the loaders.
        """
        sampler = self._new(tokenizer, geometry) if self.start is None else self._started(tokenizer, geometry)
        for weight in sampler.model.parameters():
            # A copy: the weight may be a memory map of the file that it was read from.
            weight.data = weight.data.to(torch.float32, copy=True)
        sampler.model.requires_grad_(True)
        return sampler

    def config(self, tokenizer: ImageTokenizer, geometry: Geometry) -> MaskedConfig:
        """The sizes of a new network."""
        width = self.width or WIDTH
        return MaskedConfig(
            grid=geometry.grid,
            codes=tokenizer.codebook.size,
            code_dim=tokenizer.codebook.dim,
            words=self._words().size,
            width=width,
            layers=self.layers or LAYERS,
            heads=self.heads or HEADS,
            hidden=-(-8 * width // (3 * _MULTIPLE)) * _MULTIPLE,
        )

    def save(
        self, folder: Path, sampler: MaskedSampler, tokenizer: ImageTokenizer, *, sampling: ProgressiveOptions
    ) -> None:
        """Writes a folder that the registry's masked family loads, including the image tokenizer where possible.

        Raises:
            ValueError: for an image tokenizer that can neither be written nor referred to by a relative path.
            OSError: if a file cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        where = self._save_tokenizer(folder, tokenizer)
        save_tokenizer(sampler.words.tokenizer, folder)
        save_masked(
            folder,
            sampler.model,
            sampler.codebook,
            name=sampler.name,
            template=sampler.words.template,
            tokenizer=where,
            sampling=sampling,
        )

    def _words(self) -> Words:
        return Words.load(Path(self.text or self.vlm), self.template or TEMPLATE)

    def _new(self, tokenizer: ImageTokenizer, geometry: Geometry) -> MaskedSampler:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = MaskedTransformer(self.config(tokenizer, geometry))
            with torch.no_grad():
                for weight in (network.words.weight, network.positions, network.mask):
                    weight.normal_(std=0.02)
                # Similar codes have similar embeddings from the start.
                network.codes.weight.copy_(tokenizer.codebook.vectors)
                network.scores_out.weight.zero_()
                network.scores_out.bias.zero_()
        sampling = ProgressiveOptions(guidance=GUIDANCE)
        return MaskedSampler(network, self._words(), tokenizer.codebook, sampling=sampling)

    def _started(self, tokenizer: ImageTokenizer, geometry: Geometry) -> MaskedSampler:
        family, path = registry.sampler_family(self.start), str(self.start)
        if _is_masked(family):
            sampler = family.load_sampler(path)
            if sampler.grid != geometry.grid:
                side = sampler.grid[0] * tokenizer.factor
                raise ValueError(
                    f"{self.start} paints {_times(sampler.grid)} tokens, and images of {geometry.resolution} pixels "
                    f"have {_times(geometry.grid)}: give --side {side}"
                )
        else:
            sampler = family.start_masked(path, grid=geometry.grid, seed=self.seed)
            sampler.sampling = ProgressiveOptions(guidance=GUIDANCE)
        if not same_codebook(sampler.codebook.fingerprint, tokenizer.codebook.fingerprint):
            raise ValueError(
                f"{self.start} has the codes of another image tokenizer ({sampler.codebook.fingerprint}, expected "
                f"{tokenizer.codebook.fingerprint} as in {self.vlm}): give the image tokenizer that it was trained for"
            )
        return sampler

    def _save_tokenizer(self, folder: Path, tokenizer: ImageTokenizer) -> str:
        """Writes the image tokenizer below the folder if possible; returns its path relative to the folder."""
        name = "tokenizer"
        stored = registry.sampler_family(self.vlm).load_tokenizer(str(self.vlm))  # In its stored dtype, perhaps half.
        if hasattr(stored.model, "save_pretrained"):
            stored.model.save_pretrained(folder / name)
            if any(family.reads(str(folder / name)) for family in registry.samplers()):
                return name
        try:
            return Path(os.path.relpath(self.vlm, folder)).as_posix()
        except ValueError as error:  # A different drive on Windows.
            raise ValueError(
                f"{folder} cannot name the image tokenizer in {self.vlm} by a relative path ({error}): give an --out "
                "on the same drive"
            ) from error


def _is_masked(family: object) -> bool:
    return family.name == "masked"


def _times(grid: Sequence[int]) -> str:
    return f"{grid[0]} x {grid[1]}"


def _nearest(value: int, unit: int) -> int:
    return max(unit, round(value / unit) * unit)
