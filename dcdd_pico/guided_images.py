"""Images that distribution guidance is measured on, kept on disk part by part so that an interrupted run can resume.

Every row of a table starts from the same tokens and distributions, which are sampled once. Files lie in folders named
by a hash of the code and weights they were made with.

Shapes: B images of a part, N tokens, D code dimension, S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from time import process_time
from typing import Literal

import numpy as np
import skimage
import torch
from PIL import Image

from dcdd_core.files import whole_file
from dcdd_core.models.cheap_decoder import CheapDecoder, load_cheap_decoder
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.pipelines.condition import condition_for
from dcdd_core.pipelines.decode import decode
from dcdd_core.pipelines.guided import GuidanceOptions, TokenGuide, sharpen, token_guide
from dcdd_core.pipelines.load import Models
from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import Condition

from .embedded import CHEAP, JANUS, WEIGHTS
from .prior import PRIOR, load_prior
from .scenes import Scene, Split, render_scene, scene_pixels
from .section_keys import code_hash, files_hash

#: Images painted at once and kept in one file.
PART = 16
#: First scene and caption of the range used, by split. Settings were chosen on calibration scenes only. The other
#: tables use test scenes from 0 on.
FIRST: Mapping[Split, int] = {"test": 100_000, "calibration": 100_000}
#: What images are made from: "reconstruction" encodes scenes or tiles of photographs, "text" samples tokens with the
#: VLM for captions.
Task = Literal["reconstruction", "text"]
Source = Literal["test", "calibration", "photographs"]
#: Photographs in scikit-image's wheel. Drawings, documents and silhouettes are left out.
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
#: Tiles per photograph: rows and columns of a grid, with a tile at the centre of each cell.
TILES = (2, 2)
_SIDE = 96


def scenes_of(split: Split, part: slice) -> list[Scene]:
    """The scenes of a part, including their captions."""
    return [render_scene(split, FIRST[split] + k, size=_SIDE) for k in range(part.start, part.stop)]


def originals(source: Source, part: slice) -> np.ndarray:
    """The scenes or tiles of a part, [B, S, S, 3] uint8."""
    if source == "photographs":
        return tiles()[part]
    return np.stack([scene.image for scene in scenes_of(source, part)])


@cache
def tiles() -> np.ndarray:
    """Tiles of the photographs at their own resolution, photograph by photograph: [M, S, S, 3] uint8."""
    folder, rows, columns = Path(skimage.__file__).parent / "data", *TILES
    found = []
    for name in PHOTOGRAPHS:
        with Image.open(folder / name) as image:
            pixels = np.asarray(image.convert("RGB"))
        for place in range(rows * columns):
            centre = (place // columns + 0.5) / rows, (place % columns + 0.5) / columns
            y, x = (int(c * length) - _SIDE // 2 for c, length in zip(centre, pixels.shape))
            found.append(pixels[y : y + _SIDE, x : x + _SIDE])
    return np.stack(found)


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way of making images from tokens and distributions: one row of a table.

    Attributes:
        name: name of the row.
        paints: what makes the image. "vq": the VQ decoder, from the tokens; "soft": the VQ decoder, from the expected
            code vectors; "codec": as "soft", then through the autoencoder; "sharpen": the loss alone; "prior" and
            "trained": diffusion with pico's unconditional prior or its trained decoder.
        guidance: options of distribution guidance; None for none.
        start: time at which diffusion starts; below 1 it starts from the noised soft VQ decode.
        steps: gradient steps for "sharpen", else Euler steps.
        shift: mu of the time shift; None for the decoder's own.
        tokens_alone: in the loss, each position's token replaces its distribution.
        cheap: guidance looks through the small latent decoder.
    """

    name: str
    paints: Literal["vq", "soft", "codec", "sharpen", "prior", "trained"]
    guidance: GuidanceOptions | None = None
    start: float = 1.0
    steps: int = 10
    shift: float | None = None
    tokens_alone: bool = False
    cheap: bool = False

    @property
    def file(self) -> str:
        """Name of the way's folder: every field except the row's name."""
        g = self.guidance
        words = [self.paints, f"{self.start:g}", str(self.steps), f"{self.shift}", "tokens" * self.tokens_alone]
        if g is not None:
            words += [f"{g.strength:g}", f"{g.pull:g}", f"{g.first:g}", f"{g.last:g}", str(g.every), str(g.gradients)]
            words += [g.weight, "cheap" * self.cheap]
        return "-".join(word for word in words if word)


@dataclass(frozen=True, kw_only=True)
class Given:
    """What all rows start from.

    Attributes:
        tokens: [B, N] int64, encoded or sampled.
        condition: the distributions as read by the trained decoder.
    """

    tokens: torch.Tensor
    condition: Condition


@dataclass(frozen=True, kw_only=True)
class Painters:
    """The models that paint, and where their images are kept.

    Attributes:
        pico: tokenizer, codec, sampler, and the trained decoder.
        folder: folder of all kept images.
        weights: folder of the weights.
        read: the files and folders in `weights` that images depend on.
        name: prefix of the name of `own_folder`, if its hashes alone do not say everything.
    """

    pico: Models
    folder: Path
    weights: Path = WEIGHTS
    read: tuple[str, ...] = (JANUS, "vae", "decoder.safetensors", PRIOR, CHEAP)
    name: str = ""

    @cached_property
    def prior(self) -> DistributionConditionedDecoder:
        """Pico's unconditional prior, in the decoder's precision."""
        pico = self.pico
        return load_prior(device=pico.tokenizer.device, weights=self.weights, dtype=pico.decoder.dtype)

    @cached_property
    def cheap(self) -> CheapDecoder:
        """Pico's small latent decoder."""
        return load_cheap_decoder(self.weights / CHEAP, device=self.pico.tokenizer.device)

    @cached_property
    def own_folder(self) -> Path:
        """The folder for the current code, weights and precision."""
        weights = [self.weights / name for name in self.read]
        precision = str(self.pico.decoder.dtype).removeprefix("torch.")
        return self.folder / f"{self.name}{code_hash(paint, given_of)}-{files_hash(weights)}-{precision}"

    def given(self, task: Task, source: Source, part: slice) -> Given:
        """Tokens and distributions of a part, sampled or encoded once."""
        made = self._kept(f"{task}-{source}/given", part, lambda: given_of(self.pico, task, source, part))
        tokenizer = self.pico.tokenizer
        grid = tokenizer.grid_of(_SIDE, _SIDE)
        fingerprint = tokenizer.codebook.fingerprint
        condition = Condition(made["code_vectors"], made["uncertainty"], grid, codebook=fingerprint)
        return Given(tokens=made["tokens"], condition=condition.to(tokenizer.device, torch.float32))

    def images(self, way: Way, task: Task, source: Source, part: slice) -> tuple[torch.Tensor, float]:
        """Images [B, 3, S, S] in -1..1, quantised to 8 bits, and the CPU seconds per image, summed over threads."""

        def make() -> dict[str, torch.Tensor]:
            given, start = self.given(task, source, part), process_time()
            pixels = self.paint(way, given, range(part.start, part.stop))
            seconds = torch.tensor((process_time() - start) / len(pixels))
            return {
                "images": ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1),
                "seconds": seconds,
            }

        made = self._kept(f"{task}-{source}/{way.file}", part, make)
        return scene_pixels(made["images"].numpy(), self.pico.tokenizer.device), float(made["seconds"])

    def paint(self, way: Way, given: Given, seeds: range) -> torch.Tensor:
        """Paints one way: pixels [B, 3, S, S] in -1..1."""
        return paint(self, way, given, seeds)

    def _kept(self, name: str, part: slice, make: Callable[[], Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return kept(self.own_folder / name / f"{part.start:06d}-{part.stop:06d}.npz", make)


def kept(path: Path, make: Callable[[], Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Reads tensors by name from a file, which is made first if it is missing."""
    if not path.exists():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **{name: value.cpu().numpy() for name, value in made.items()})
    with np.load(path) as held:
        return {name: torch.from_numpy(held[name]) for name in held.files}


@torch.no_grad()
def given_of(pico: Models, task: Task, source: Source, part: slice) -> dict[str, torch.Tensor]:
    """The tensors of `Given` for a part, by name: encoded images, or what the VLM samples for the scenes' captions."""
    if task == "text":
        options = SamplingOptions(guidance=pico.decoder.card.calibration.guidance)
        captions = [scene.caption for scene in scenes_of(source, part)]
        found = pico.sampler.sample(captions, seeds=range(part.start, part.stop), options=options)
    else:
        found = pico.tokenizer.encode(scene_pixels(originals(source, part), pico.tokenizer.device))
    condition = condition_for(pico.decoder.card, found, pico.tokenizer.codebook)
    return {"tokens": found.tokens, "code_vectors": condition.code_vectors, "uncertainty": condition.uncertainty}


@torch.no_grad()
def paint(painters: Painters, way: Way, given: Given, seeds: range) -> torch.Tensor:
    """Paints one way: pixels [B, 3, S, S] in -1..1."""
    pico, condition = painters.pico, given.condition
    if way.paints == "vq":
        return pico.tokenizer.decode_tokens(given.tokens, condition.grid)
    if way.paints in ("soft", "codec"):
        pixels = pico.tokenizer.decode_vectors(condition.code_vectors, condition.grid)
        return pixels if way.paints == "soft" else pico.codec.decode(pico.codec.encode(pixels))
    guide = None if way.guidance is None else guide_of(painters, way, given)
    if way.paints == "sharpen":
        latents = sharpen(guide, guide.soft, steps=way.steps)
        return pico.codec.decode(pico.codec.denormalize(latents))
    decoder = painters.prior if way.paints == "prior" else pico.decoder
    options = {"seeds": seeds, "steps": way.steps, "shift": way.shift, "guide": guide, "start": way.start}
    return decode(decoder, pico.codec, condition, **options).pixels


def guide_of(painters: Painters, way: Way, given: Given) -> TokenGuide:
    """The guide of a way. Its soft VQ decode is that of the distributions, even if the loss uses the tokens."""
    pico = painters.pico
    guide = token_guide(
        pico.tokenizer,
        pico.codec,
        given.condition,
        scale=pico.decoder.card.calibration.sharpness,
        options=way.guidance,
        decode=painters.cheap if way.cheap else None,
    )
    if not way.tokens_alone:
        return guide
    vectors = pico.tokenizer.codebook.of(given.tokens)
    return replace(guide, condition=replace(given.condition, code_vectors=vectors))
