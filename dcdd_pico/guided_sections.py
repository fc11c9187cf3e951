"""What distribution guidance scores: sections of docs/results.md, beside those of `sections`.

Two metric networks measure: the scene reader, and a text detector that others trained on real images (`ruler`). Every
score has a 95 % interval. Rows are compared image by image, starting from the same tokens and distributions.

Shapes: B images of a part, M images, F features, N tokens, S image side in pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from dcdd_core.evaluation.frechet import FrechetStatistics, frechet_distance
from dcdd_core.evaluation.intervals import Interval, block_jackknife, bootstrap
from dcdd_core.evaluation.metrics import psnr, ssim
from dcdd_core.pipelines.guided import GuidanceOptions

from .embedded import CHEAP
from .guided_images import PART, PHOTOGRAPHS, TILES, Painters, Source, Task, Way, kept, originals, scenes_of
from .prior import PRIOR
from .reader import FACTS, SceneReader, fact_labels
from .ruler import TextDetectorRuler
from .scenes import Split, scene_pixels
from .section_keys import code_hash, files_hash
from .sections import READ, SECTIONS, EvalSetup, Rows, Section

#: Names of rows.
VQ, SOFT, SDEDIT = "VQ-VAE decode", "VQ-VAE decode of expected codes", "SDEdit of the soft decode"
CODEC = "expected codes through the autoencoder"
LOSS_8, LOSS_24 = "the loss alone, 8 steps", "the loss alone, 24 steps"
GUIDED, TRAINED, BOTH = "SDEdit + guidance", "trained DCDD", "trained DCDD + guidance"
STRONGER = "SDEdit + stronger guidance"

#: Time at which painting without a trained decoder starts, and the strength of guidance. Chosen, like those below, on
#: calibration scenes and captions (sections `guided-ablation` and `guided-choice`).
START, STRENGTH = 0.6, 0.4
#: The strength chosen later on 128 calibration scenes and as many captions; the default was left as it was.
STRONGER_STRENGTH = 0.6
#: Strength of guidance for the trained decoder, and for the loss alone.
TRAINED_STRENGTH, LOSS_STRENGTH = 0.05, 0.1


def _prior(name: str, start: float = START, **options: object) -> Way:
    return Way(name=name, paints="prior", guidance=GuidanceOptions(**options), start=start)


def _trained(name: str, strength: float) -> Way:
    guidance = GuidanceOptions(strength=strength, pull=0.0) if strength else None
    return Way(name=name, paints="trained", guidance=guidance)


def _loss(name: str, steps: int, strength: float = LOSS_STRENGTH) -> Way:
    return Way(name=name, paints="sharpen", guidance=GuidanceOptions(strength=strength), steps=steps)


#: The rows of the reconstruction and text tables.
WAYS = (
    Way(name=VQ, paints="vq"),
    Way(name=SOFT, paints="soft"),
    Way(name=CODEC, paints="codec"),
    _prior(SDEDIT, strength=0.0, pull=0.0),
    _loss(LOSS_8, 8),
    _prior(GUIDED, strength=STRENGTH),
    _prior(STRONGER, strength=STRONGER_STRENGTH),
    _trained(TRAINED, 0.0),
    _trained(BOTH, TRAINED_STRENGTH),
)
#: The rows of the ablation, on calibration scenes: each differs from `GUIDED` in one setting.
VARIED = (
    WAYS[0],
    _prior(GUIDED, strength=STRENGTH),
    replace(_prior("p: the tokens alone", strength=STRENGTH), tokens_alone=True),
    _prior("weight: uniform", strength=STRENGTH, weight="uniform"),
    _prior("pull 0", strength=STRENGTH, pull=0.0),
    _prior("start 0.4", start=0.4, strength=STRENGTH),
    _prior("start 0.8", start=0.8, strength=STRENGTH),
    _prior("strength 0.2", strength=0.2),
    _prior("strength 0.6", strength=0.6),
    _prior("2 gradients a step", strength=STRENGTH, gradients=2),
    _prior("every second step", strength=STRENGTH, every=2),
    replace(_prior("through the small latent decoder", strength=STRENGTH), cheap=True),
    _loss("the loss alone, 4 steps", 4),
    _loss(LOSS_8, 8),
    _loss("the loss alone, 8 steps, strength 0.2", 8, 0.2),
    _loss("the loss alone, 8 steps, strength 0.3", 8, 0.3),
    _loss(LOSS_24, 24),
    _trained(TRAINED, 0.0),
    _trained("trained, strength 0.05", 0.05),
    _trained("trained, strength 0.1", 0.1),
    _trained("trained, strength 0.2", 0.2),
)
#: The rows compared on calibration captions.
CHOICE = (
    WAYS[0],
    WAYS[1],
    _prior(GUIDED, strength=STRENGTH),
    _prior("start 0.8", start=0.8, strength=STRENGTH),
    _prior("strength 0.2", strength=0.2),
    _prior("strength 0.6", strength=0.6),
    _trained(TRAINED, 0.0),
    _trained("trained, strength 0.05", 0.05),
    _trained("trained, strength 0.1", 0.1),
    _trained("trained, strength 0.2", 0.2),
)
#: Column: share of photographs with a better SSIM than the VQ decode's.
ABOVE = "photographs above the VQ decode"
#: Upper limit on the images of the smaller sections.
FEW = 64

FRECHET = {"frechet": "reader features", "frechet, text detector": "detector features"}
MEANS = ("ssim", "psnr", "perceptual", "perceptual, text detector", "token agreement")
#: Columns for which shares of a gain are given.
SHARED = (*FRECHET, "ssim", "psnr", "perceptual", "perceptual, text detector")
F1 = ("F1", *(f"F1 {name}" for name in READ))


@dataclass(frozen=True, kw_only=True)
class Rulers:
    """What measures images, and where the scores are kept.

    Attributes:
        painters: the painters, whose tokenizer reads tokens from images.
    """

    painters: Painters
    reader: SceneReader
    detector: TextDetectorRuler

    @classmethod
    def of(cls, setup: EvalSetup) -> Rulers:
        """Makes the rulers for the models of a measurement.

        Raises:
            ValueError: as `TextDetectorRuler`.
        """
        own = {"folder": setup.out / "guided", "weights": setup.weights, "name": "compiled-" * setup.compiled}
        painters = Painters(pico=setup.pico, **own)
        return cls(painters=painters, reader=setup.reader, detector=TextDetectorRuler(threads=torch.get_num_threads()))

    @cached_property
    def _version(self) -> str:
        return f"{code_hash(scores_of, _pixels)}-{files_hash([self.painters.weights / 'reader.safetensors'])}"

    def real(self, source: Source, part: slice) -> dict[str, torch.Tensor]:
        """`scores_of` a part's originals, which are the same for all painters."""
        folder = self.painters.folder / f"originals-{self._version}/{source}"
        return _kept(folder, part, lambda: scores_of(self, _pixels(self, source, part), None, None))

    def of_images(
        self, name: str, part: slice, make: Callable[[], torch.Tensor], *, original: bool = False
    ) -> dict[str, torch.Tensor]:
        """`scores_of` the images that `make` returns for a part's test scenes.

        Args:
            name: name of the folder that the scores are kept in.
            original: whether the images should resemble their originals, rather than only show the same facts.
        """
        folder = self.painters.own_folder / f"scores-{self._version}/{name}"
        truth = partial(_pixels, self, "test", part)
        return _kept(folder, part, lambda: scores_of(self, make(), truth() if original else None, None))

    def made(self, way: Way, task: Task, source: Source, part: slice) -> dict[str, torch.Tensor]:
        """`scores_of` a part's images painted in one way, with the seconds per image."""

        def make() -> dict[str, torch.Tensor]:
            images, seconds = self.painters.images(way, task, source, part)
            truth = None if task == "text" else _pixels(self, source, part)
            scores = scores_of(self, images, truth, self.painters.given(task, source, part).tokens)
            return scores | {"seconds": torch.full((len(images),), seconds)}

        return _kept(self.painters.own_folder / f"scores-{self._version}/{task}-{source}/{way.file}", part, make)


def _kept(folder: Path, part: slice, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return kept(folder / f"{part.start:06d}-{part.stop:06d}.npz", make)


def _pixels(rulers: Rulers, source: Source, part: slice) -> torch.Tensor:
    return scene_pixels(originals(source, part), rulers.painters.pico.tokenizer.device)


@torch.no_grad()
def scores_of(
    rulers: Rulers, images: torch.Tensor, truth: torch.Tensor | None, tokens: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Features, facts read and scores of images [B, 3, S, S] in -1..1, each [B, ...].

    Args:
        truth: the originals, for reconstruction scores.
        tokens: [B, N], the tokens the images were made from, for the share that the VQ encoder reads back.
    """
    reader, detector = rulers.reader, rulers.detector
    found = {"reader features": reader.frechet_features(images), "detector features": detector.frechet_features(images)}
    found |= {f"read {name}": logits.argmax(1) for name, logits in reader(images).items()}
    if truth is not None:
        found |= {
            "ssim": ssim(truth, images),
            "psnr": psnr(truth, images),
            "perceptual": reader.perceptual_distance(truth, images),
            "perceptual, text detector": detector.perceptual_distance(truth, images),
        }
    if tokens is not None:
        found["token agreement"] = agreement(rulers, images, tokens)
    return found


def agreement(rulers: Rulers, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Share of positions at which the VQ encoder reads the given tokens [B, N]: [B]."""
    tokenizer = rulers.painters.pico.tokenizer
    read = tokenizer.tokens(tokenizer.features(images))
    return (read == tokens.to(read.device)).float().mean(1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """The scores of M images of one way.

    Attributes:
        held: name -> [M, ...].
        real: name -> [M, ...] for the originals.
        labels: fact -> [M].
    """

    held: dict[str, np.ndarray]
    real: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    _known: dict[tuple[str, bytes], float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.held["reader features"])

    def columns(self) -> list[str]:
        """The columns that can be computed from these scores."""
        means = [name for name in MEANS if name in self.held]
        return [*FRECHET, *means, *(F1 if self.labels else ())]

    def score(self, column: str, images: np.ndarray) -> float:
        """The score of one column for some of the images, given by index."""
        key = column, images.tobytes()
        if column in FRECHET:  # rows share resamples, and a distance is slow to compute
            if key not in self._known:
                self._known[key] = self._frechet(FRECHET[column], images)
            return self._known[key]
        if column == "F1":
            return float(np.mean([self.score(f"F1 {name}", images) for name in READ]))
        if column in F1:
            name = column.removeprefix("F1 ")
            return macro_f1(self.held[f"read {name}"][images], self.labels[name][images], len(FACTS[name]))
        return float(self.held[column][images].mean())

    def _frechet(self, features: str, images: np.ndarray) -> float:
        sets = (FrechetStatistics.of([torch.from_numpy(held[features][images])]) for held in (self.real, self.held))
        return frechet_distance(*sets)


def macro_f1(read: np.ndarray, truth: np.ndarray, classes: int) -> float:
    """Mean over the classes that occur of 2 TP / (2 TP + FP + FN), for read and true labels [M] in 0..classes - 1."""
    table = np.bincount(truth * classes + read, minlength=classes * classes).reshape(classes, classes)
    hits, seen = np.diag(table), table.sum(0) + table.sum(1)
    return float((2 * hits[seen > 0] / seen[seen > 0]).mean())


def interval(column: str, score: Callable[[np.ndarray], float], images: int) -> Interval:
    """95 % interval of a function of a column's scores: the jackknife for Frechet distances, else the bootstrap."""
    return (block_jackknife if column in FRECHET else bootstrap)(score, images)


def cells(column: str, found: Interval) -> dict[str, float]:
    """A table cell, with its interval as details."""
    return {column: found.value, f"{column}: lowest": found.low, f"{column}: highest": found.high}


def parts_of(count: int, what: str) -> Iterator[slice]:
    """Slices of up to `PART` images each, under a progress bar."""
    for start in tqdm(range(0, count, PART), desc=what, unit="part", disable=None):
        yield slice(start, min(count, start + PART))


def collect(rulers: Rulers, ways: Sequence[Way], task: Task, source: Source, count: int) -> dict[str, Scores]:
    """The scores of each way, by row name; measured part by part, so that finished parts stay finished."""
    made: dict[str, list[dict[str, torch.Tensor]]] = {way.name: [] for way in ways}
    real: list[dict[str, torch.Tensor]] = []
    for part in parts_of(count, f"{task}, {source}"):
        real.append(rulers.real(source, part))
        for way in ways:
            made[way.name].append(rulers.made(way, task, source, part))
    labels = {} if source == "photographs" else labels_of(source, count)
    truth = joined(real)
    return {name: Scores(held=joined(parts), real=truth, labels=labels) for name, parts in made.items()}


def labels_of(source: Split, count: int) -> dict[str, np.ndarray]:
    """The facts of the first `count` scenes of a split: fact -> [M]."""
    facts = [scene.facts for scene in scenes_of(source, slice(0, count))]
    return {name: found.numpy() for name, found in fact_labels(facts).items()}


def joined(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    """Joins the scores of consecutive parts: name -> [M, ...]."""
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


def rows_of(scores: dict[str, Scores], columns: Sequence[str], *, trained: str | None = None) -> Rows:
    """A row for each way, and its difference from the first; with `trained`, also its share of that way's difference.

    A share of 1 means as far from the first way as `trained` is.
    """
    base_name, base = next(iter(scores.items()))
    images, rows = len(base), {}
    for name, own in scores.items():
        rows[name] = row_of(columns, own.score, images)
    others = [(name, own) for name, own in scores.items() if name != base_name]
    for name, own in others:
        rows[minus(name, base_name)] = row_of(columns, partial(difference, own, base), images)
    if trained is not None:
        for name, own in others:
            if name != trained:
                share = partial(_share, own, base, scores[trained])
                rows[share_name(name)] = row_of([column for column in columns if column in SHARED], share, images)
    return rows


def minus(name: str, other: str) -> str:
    """Name of the row with the difference of two ways."""
    return f"{name}, minus {other}"


def share_name(name: str) -> str:
    """Name of the row with a way's share of the trained decoder's difference from the VQ decode."""
    return f"{name}, share of the trained decoder's gain"


def row_of(columns: Sequence[str], score: Callable[[str, np.ndarray], float], images: int) -> dict[str, float]:
    """A row of scores with intervals, and the number of images; `score` takes a column and the indices of images."""
    row: dict[str, float] = {}
    for column in columns:
        row |= cells(column, interval(column, partial(score, column), images))
    return row | {"images": float(images)}


def difference(own: Scores, other: Scores, column: str, k: np.ndarray) -> float:
    """A column's score for some of the images, given by index, minus that of another way."""
    return own.score(column, k) - other.score(column, k)


def ratio(own: Scores, other: Scores, column: str, k: np.ndarray) -> float:
    """A column's score for some of the images, divided by that of another way; NaN if the other is 0."""
    below = other.score(column, k)
    return own.score(column, k) / below if below else float("nan")


def _share(own: Scores, base: Scores, trained: Scores, column: str, k: np.ndarray) -> float:
    own_score, start, end = (scores.score(column, k) for scores in (own, base, trained))
    return (own_score - start) / (end - start) if end != start else float("nan")


RECONSTRUCTION = ("frechet", "frechet, text detector", *MEANS, "F1")
TEXT = ("frechet", "frechet, text detector", "token agreement", *F1)


def measure_guided_reconstruction(setup: EvalSetup) -> Rows:
    """Test scenes that no choice was made on, encoded and then painted in every way."""
    scores = collect(Rulers.of(setup), WAYS, "reconstruction", "test", len(setup.images))
    return _sdedit_too(scores, RECONSTRUCTION, trained=TRAINED)


def measure_guided_text(setup: EvalSetup) -> Rows:
    """Captions that no choice was made on; all rows start from the same sampled tokens and distributions."""
    scores = collect(Rulers.of(setup), WAYS, "text", "test", len(setup.images))
    return _sdedit_too(scores, TEXT)


def _sdedit_too(scores: dict[str, Scores], columns: Sequence[str], *, trained: str | None = None) -> Rows:
    """`rows_of`, with what guidance adds to SDEdit and to the trained decoder.

    Also each decoder's difference from the expected codes through the autoencoder, which both of them paint with.
    """
    rows, images = rows_of(scores, columns, trained=trained), len(scores[VQ])
    pairs = (
        (GUIDED, SDEDIT),
        (STRONGER, SDEDIT),
        (STRONGER, GUIDED),
        (BOTH, TRAINED),
        (GUIDED, CODEC),
        (TRAINED, CODEC),
    )
    for name, without in pairs:
        rows[minus(name, without)] = row_of(columns, partial(difference, scores[name], scores[without]), images)
    return rows


def measure_guided_ablation(setup: EvalSetup) -> Rows:
    """One setting varied at a time, on calibration scenes; also CPU seconds per image."""
    scores = collect(Rulers.of(setup), VARIED, "reconstruction", "calibration", min(FEW, len(setup.images)))
    columns = ("ssim", "perceptual", "perceptual, text detector", "token agreement", "frechet")
    rows = {name: row_of(columns, own.score, len(own)) for name, own in scores.items()}
    return {name: row | {"seconds": float(np.median(scores[name].held["seconds"]))} for name, row in rows.items()}


def measure_guided_choice(setup: EvalSetup) -> Rows:
    """Settings compared on calibration captions."""
    scores = collect(Rulers.of(setup), CHOICE, "text", "calibration", min(FEW, len(setup.images)))
    columns = ("frechet", "F1", "token agreement")  # the text detector has no part in this choice
    return {name: row_of(columns, own.score, len(own)) for name, own in scores.items()}


def measure_guided_photographs(setup: EvalSetup) -> Rows:
    """Tiles of photographs, which pico has never seen: scores, and the share of photographs with a better SSIM.

    The last column is the share of photographs on which the tiles' mean SSIM is above the VQ decode's.
    """
    count = len(PHOTOGRAPHS) * TILES[0] * TILES[1]
    scores = collect(Rulers.of(setup), WAYS, "reconstruction", "photographs", count)
    rows = rows_of(scores, ("ssim", "psnr", "perceptual, text detector", "token agreement"))
    by_photograph = {name: own.held["ssim"].reshape(len(PHOTOGRAPHS), -1).mean(1) for name, own in scores.items()}
    for name, own in by_photograph.items():
        if name != VQ:
            rows[name][ABOVE] = float((own > by_photograph[VQ]).mean())
    return rows


def measure_guided_robustness(setup: EvalSetup) -> Rows:
    """Whether the VQ encoder reads back the given tokens for good reasons: token agreement after small image changes.

    An image that fools the encoder loses agreement under changes that a real image withstands. "high frequencies" is
    the energy above a quarter cycle per pixel, divided by the original's.
    """
    rulers, count = Rulers.of(setup), min(FEW, len(setup.images))
    codec = setup.pico.codec
    found: dict[str, list[dict[str, torch.Tensor]]] = {}
    for part in parts_of(count, "robustness"):
        truth = _pixels(rulers, "test", part)
        tokens = rulers.painters.given("reconstruction", "test", part).tokens
        images = {"original": truth, "original through the autoencoder": codec.decode(codec.encode(truth))}
        ways = [way for way in WAYS if way.name not in (SOFT, CODEC, SDEDIT)]
        images |= {way.name: rulers.painters.images(way, "reconstruction", "test", part)[0] for way in ways}
        for name, made in images.items():
            scores = {what: agreement(rulers, change(made), tokens) for what, change in CHANGES.items()}
            scores["high frequencies"] = high_frequencies(made) / high_frequencies(truth)
            found.setdefault(name, []).append(scores)
    columns = (*CHANGES, "high frequencies")
    whole = {name: joined(parts) for name, parts in found.items()}
    return {
        name: row_of(columns, lambda column, k, held=held: float(held[column][k].mean()), count)
        for name, held in whole.items()
    }


def measure_rulers(setup: EvalSetup) -> Rows:
    """What both metric networks say of calibration scenes that are damaged more and more."""
    rulers, count = Rulers.of(setup), min(FEW, len(setup.images))
    truth = _pixels(rulers, "calibration", slice(0, count))
    networks = {"": rulers.reader, ", text detector": rulers.detector}
    real = {name: FrechetStatistics.of([network.frechet_features(truth)]) for name, network in networks.items()}
    rows: Rows = {}
    for damage, levels in DAMAGES.items():
        for level in levels:
            made, row = DAMAGE[damage](truth, level), {}
            for name, network in networks.items():
                statistics = FrechetStatistics.of([network.frechet_features(made)])
                row[f"frechet{name}"] = frechet_distance(real[name], statistics)
                row[f"perceptual{name}"] = float(network.perceptual_distance(truth, made).mean())
            rows[f"{damage} {level:g}"] = row | {"images": float(count)}
    return rows


def noised(images: torch.Tensor, deviation: float) -> torch.Tensor:
    """Adds Gaussian noise that depends only on the place in the batch; deviation on the scale of -1..1."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images.device)
    return (images + deviation * noise).clamp(-1, 1)


def blurred(images: torch.Tensor, deviation: float) -> torch.Tensor:
    """Blurs with a Gaussian whose standard deviation is this many pixels."""
    reach = max(1, round(3 * deviation))
    weights = torch.exp(-(torch.arange(-reach, reach + 1).double() ** 2) / (2 * deviation**2))
    kernel = (weights / weights.sum()).to(images).repeat(3, 1)
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    rows = F.conv2d(padded, kernel[:, None, :, None], groups=3)
    return F.conv2d(rows, kernel[:, None, None, :], groups=3)


def resized(images: torch.Tensor, share: float) -> torch.Tensor:
    """Shrinks images to a share of their side and enlarges them again."""
    side = images.shape[-1]
    small = F.interpolate(images, (round(share * side),) * 2, mode="bicubic", antialias=True)
    return F.interpolate(small, (side, side), mode="bicubic").clamp(-1, 1)


def compressed(images: torch.Tensor, loss: float) -> torch.Tensor:
    """Compresses as JPEG of quality 100 - loss."""
    found = []
    for image in ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=round(100 - loss))
        found.append(np.asarray(Image.open(file)))
    return scene_pixels(np.stack(found), images.device)


def tinted(images: torch.Tensor, shift: float) -> torch.Tensor:
    """Makes images redder and less green."""
    return (images + shift * torch.tensor([1.0, -1.0, 0.5]).to(images)[:, None, None]).clamp(-1, 1)


def emptied(images: torch.Tensor, share: float) -> torch.Tensor:
    """Replaces the middle, of this share of the side, by the image's mean colour."""
    side, made = images.shape[-1], images.clone()
    half = round(share * side / 2)
    inner = slice(side // 2 - half, side // 2 + half)
    made[:, :, inner, inner] = images.mean((2, 3), keepdim=True)
    return made


def high_frequencies(images: torch.Tensor) -> torch.Tensor:
    """Energy above a quarter cycle per pixel in either direction, for each image [B]."""
    spectrum = torch.fft.fft2(images.double()).abs().square()
    frequencies = torch.fft.fftfreq(images.shape[-1]).abs().to(images.device)
    high = (frequencies[:, None] > 0.25) | (frequencies[None] > 0.25)
    return spectrum[..., high].sum((1, 2))


DAMAGE = {
    "noise": noised,
    "blur": blurred,
    "JPEG loss": compressed,
    "tint": tinted,
    "empty middle": emptied,
}
DAMAGES = {
    "noise": (0.05, 0.1, 0.2, 0.4),
    "blur": (0.5, 0.8, 1.2, 2.0),
    "JPEG loss": (10, 40, 70, 90),
    "tint": (0.05, 0.1, 0.2, 0.4),
    "empty middle": (0.1, 0.2, 0.35, 0.5),
}
#: Small changes under which token agreement is measured.
CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda images: images,
    "noise 0.03": partial(noised, deviation=0.03),
    "noise 0.06": partial(noised, deviation=0.06),
    "blur 0.5": partial(blurred, deviation=0.5),
    "blur 0.8": partial(blurred, deviation=0.8),
    "resize 0.75": partial(resized, share=0.75),
    "JPEG 80": partial(compressed, loss=20),
}

_READ = ("janus", "vae", "decoder.safetensors", PRIOR, "reader.safetensors")
SECTIONS.update(
    {
        "guided-reconstruction": Section(measure_guided_reconstruction, _READ),
        "guided-text": Section(measure_guided_text, _READ),
        "guided-photographs": Section(measure_guided_photographs, _READ),
        "guided-robustness": Section(measure_guided_robustness, _READ),
        "guided-ablation": Section(measure_guided_ablation, (*_READ, CHEAP)),
        "guided-choice": Section(measure_guided_choice, _READ),
        "rulers": Section(measure_rulers, ("reader.safetensors",)),
    }
)
