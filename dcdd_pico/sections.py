"""What is measured of the embedded models on held-out scenes: the sections of the README's table and of the report.

What measures is the scene reader that took no part in any training.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_f1_score
from tqdm import tqdm

from dcdd_core.evaluation.frechet import FrechetStatistics, features_of, frechet_distance
from dcdd_core.evaluation.metrics import psnr, ssim
from dcdd_core.files import write_text
from dcdd_core.method.statistics import TokenStatistics, describe_logits
from dcdd_core.models.bundle import DecoderOptions, load_decoder
from dcdd_core.models.card import VARIANTS
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.pipelines.condition import condition_for, serving
from dcdd_core.pipelines.decode import decode
from dcdd_core.pipelines.load import Models
from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import Condition, DCDDWarning, TokenLogits

from .build_context import WORK
from .embedded import WEIGHTS
from .models import load_pico, load_reader
from .reader import FACTS, SceneReader, fact_labels
from .scene_arrays import scene_images
from .scenes import draw, scene_facts, scene_pixels

#: Row -> column -> value. A column with a colon ("frechet: heart") is a detail of the column before the colon.
Rows = dict[str, dict[str, float]]

SERVED = "DCDD as served"
BY_LOGITS = "DCDD, the VLM's logits (beta = 0)"
SCORES = ("frechet", "ssim", "perceptual")
#: Those of the ablation.
ABLATION = (*SCORES, "text frechet")
READ = ("shape", "colour", "texture", "place")
#: Of the jitter of scenes that are drawn a second time.
_ANEW = 1
STEP_COUNTS = (5, 10, 15, 20, 25, 30, 35)
T = TypeVar("T")


@dataclass
class Tally:
    """What is kept of one row's pictures."""

    features: list[torch.Tensor] = field(default_factory=list)
    answers: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {name: [] for name in FACTS})
    scores: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {"ssim": [], "psnr": [], "perceptual": []})

    def add(self, reader: SceneReader, pictures: torch.Tensor, truth: torch.Tensor | None) -> None:
        """Pictures [B, 3, S, S] in -1..1, with the pictures they reconstruct, or None."""
        self.features.append(features_of(pictures, reader.frechet_features))
        for name, logits in reader(pictures).items():
            self.answers[name].append(logits.argmax(1).cpu())
        if truth is not None:
            self.scores["ssim"].append(ssim(truth, pictures))
            self.scores["psnr"].append(psnr(truth, pictures).cpu())
            self.scores["perceptual"].append(reader.perceptual_distance(truth, pictures).cpu())

    def row(self, real: torch.Tensor, labels: dict[str, torch.Tensor], *, by: str | None = None) -> dict[str, float]:
        """Frechet distance to features `real` [M, F], mean scores, and the macro F1 of the facts read off the pictures.

        Args:
            by: a fact, to have the Frechet distances of its answers too, where there are two pictures to measure.
        """
        made = torch.cat(self.features)
        row = {"frechet": _distance(real, made)}
        for k, answer in enumerate(FACTS[by] if by else ()):
            some = labels[by] == k
            if some.sum() > 1:
                row[f"frechet: {answer}"] = _distance(real[some], made[some])
        row |= {name: float(torch.cat(parts).double().mean()) for name, parts in self.scores.items() if parts}
        for name in READ:
            read = torch.cat(self.answers[name])
            row[f"F1 {name}"] = float(
                multiclass_f1_score(read, labels[name][: len(read)], len(FACTS[name]), average="macro")
            )
        return row


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The models, the held-out scenes, and how to run.

    Attributes:
        variants: name -> bundle of the ablation's decoders.
    """

    pico: Models
    reader: SceneReader
    variants: Mapping[str, Path] = field(default_factory=dict)
    compiled: bool = False
    images: np.ndarray
    batch: int
    steps: int
    guidance: float

    def parts(self, what: str, count: int | None = None) -> Iterator[slice]:
        """The batches of the scenes, or of the first of them, with a progress bar that says what is done."""
        total = len(self.images) if count is None else min(count, len(self.images))
        for start in tqdm(range(0, total, self.batch), desc=what, unit="batch", disable=None):
            yield slice(start, min(total, start + self.batch))

    def scenes(self, what: str, count: int | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
        """Slices of the scenes and their pixels."""
        for part in self.parts(what, count):
            yield part, scene_pixels(self.images[part], self.pico.tokenizer.device)

    def sampled(self, what: str, count: int | None = None) -> Iterator[tuple[slice, TokenLogits]]:
        """Slices of the scenes and what the VLM gives of their captions."""
        captions = [facts.caption() for facts in scene_facts("test", len(self.images))]
        for part in self.parts(what, count):
            seeds = range(part.start, part.stop)
            yield (
                part,
                self.pico.sampler.sample(captions[part], seeds=seeds, options=SamplingOptions(guidance=self.guidance)),
            )

    def paint(
        self, decoder: DistributionConditionedDecoder, condition: Condition, part: slice, steps: int | None = None
    ) -> torch.Tensor:
        """Pixels [B, 3, S, S] in -1..1, by any decoder with the schedule of the shipped one."""
        seeds, shift = range(part.start, part.stop), self.pico.decoder.card.shift
        return decode(decoder, self.pico.codec, condition, seeds=seeds, steps=steps or self.steps, shift=shift).pixels

    def real_features(self, count: int | None = None) -> torch.Tensor:
        found = [features_of(pixels, self.reader.frechet_features) for _, pixels in self.scenes("real scenes", count)]
        return torch.cat(found)

    def labels(self, count: int | None = None) -> dict[str, torch.Tensor]:
        return fact_labels(scene_facts("test", count or len(self.images)))


def measure_reader(bench: Bench) -> Rows:
    """How well the measuring network reads real scenes; its distances mean little below F1 .9.

    And how far from them it sees other drawings of the same facts: so much of text to image's distances is chance.
    """
    facts, size = scene_facts("test", len(bench.images)), bench.images.shape[1]
    scenes, anew = Tally(), Tally()
    for part, pixels in bench.scenes("reader"):
        scenes.add(bench.reader, pixels, None)
        drawn = [draw(facts[k], np.random.default_rng([_ANEW, k]), size=size) for k in range(part.start, part.stop)]
        anew.add(bench.reader, scene_pixels(np.stack(drawn), pixels.device), None)
    real, labels = torch.cat(scenes.features), bench.labels()
    read = {name: value for name, value in scenes.row(real, labels).items() if name != "frechet"}
    return {"real scenes": read, "the same facts, drawn anew": anew.row(real, labels, by="shape")}


def measure_reconstruction(bench: Bench) -> Rows:
    """The paper's Table 2."""
    pico, tallies = bench.pico, {}
    for part, pixels in bench.scenes("reconstruction"):
        grid = pico.tokenizer.encode(pixels)
        condition = condition_for(pico.decoder.card, grid, pico.tokenizer.codebook)
        pictures = {
            "VQ-VAE decode": pico.tokenizer.decode_tokens(grid.tokens, grid.grid),
            "VQ-VAE decode of expected codes": pico.tokenizer.decode_vectors(condition.code_vectors, grid.grid),
            "DCDD (LCDM + LC)": bench.paint(pico.decoder, condition, part),
        }
        for name, made in pictures.items():
            tallies.setdefault(name, Tally()).add(bench.reader, made, pixels)
    return _rows(bench, tallies)


def measure_text(bench: Bench) -> Rows:
    """The paper's Table 3: captions of the scenes to pictures, all rows from the same sampled tokens and logits."""
    pico, tallies = bench.pico, {}
    for part, grid in bench.sampled("text to image"):
        card, codebook = pico.decoder.card, pico.tokenizer.codebook
        pictures = {"VQ-VAE decode": pico.tokenizer.decode_tokens(grid.tokens, grid.grid)}
        ways = {
            BY_LOGITS: "logits",
            f"DCDD, anchored logits (beta = {card.calibration.anchor:.3g})": "anchored",
            "DCDD, the sampled tokens alone": "tokens",
        }
        for name, reads in ways.items():
            condition = condition_for(serving(card, reads=reads), grid, codebook)
            pictures[name] = bench.paint(pico.decoder, condition, part)
            if reads == card.reads:
                pictures[SERVED] = pictures[name]
        for name, made in pictures.items():
            tallies.setdefault(name, Tally()).add(bench.reader, made, None)
    return _rows(bench, tallies, by="shape")


def measure_steps(bench: Bench, count: int = 512) -> Rows:
    """The paper's Table 6, on the first scenes: the number of Euler steps."""
    pico, tallies = bench.pico, {}
    for part, pixels in bench.scenes("steps", count):
        grid = pico.tokenizer.encode(pixels)
        condition = condition_for(pico.decoder.card, grid, pico.tokenizer.codebook)
        tallies.setdefault("VQ-VAE decode", Tally()).add(
            bench.reader, pico.tokenizer.decode_tokens(grid.tokens, grid.grid), pixels
        )
        for steps in STEP_COUNTS:
            made = bench.paint(pico.decoder, condition, part, steps)
            tallies.setdefault(f"DCDD, {steps} steps", Tally()).add(bench.reader, made, pixels)
    return _rows(bench, tallies, count)


def measure_variants(bench: Bench) -> Rows:
    """The paper's Table 4: what a decoder is conditioned on, a row each of `bench.variants`.

    Reconstruction, and as "text frechet" what it paints of captions: from the same tokens and logits for all, the
    logits as the VLM gave them (beta = 0).
    """
    pico, rows = bench.pico, {}
    real, labels = bench.real_features(), bench.labels()
    grids = [grid for _, grid in bench.sampled("captions")]
    for name, path in bench.variants.items():
        decoder = load_decoder(
            path,
            options=DecoderOptions(device=pico.tokenizer.device, dtype=pico.decoder.dtype, compiled=bench.compiled),
        )
        scenes, texts = Tally(), Tally()
        for (part, pixels), grid in zip(bench.scenes(name), grids, strict=True):
            for tally, given, truth in ((scenes, pico.tokenizer.encode(pixels), pixels), (texts, grid, None)):
                condition = condition_for(decoder.card, given, pico.tokenizer.codebook)
                tally.add(bench.reader, bench.paint(decoder, condition, part), truth)
        rows[name] = scenes.row(real, labels) | {"text frechet": texts.row(real, labels)["frechet"]}
    return rows


def measure_latency(bench: Bench, rounds: int = 7) -> Rows:
    """The paper's Table 5, one picture at a time: the median seconds of each stage, after one that is not counted."""
    pico, card = bench.pico, bench.pico.decoder.card
    captions = [facts.caption() for facts in scene_facts("test", rounds + 1)]
    seconds: dict[str, list[float]] = {}

    def timed(stage: str, work: Callable[[], T]) -> T:
        start = time.perf_counter()
        made = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.setdefault(stage, []).append(time.perf_counter() - start)
        return made

    for k, caption in enumerate(captions):
        grid = timed(
            "Janus", lambda: pico.sampler.sample([caption], seeds=[k], options=SamplingOptions(guidance=bench.guidance))
        )  # noqa: B023
        timed("VQ-VAE decode", lambda: pico.tokenizer.decode_tokens(grid.tokens, grid.grid))  # noqa: B023
        condition = timed("LCDM", lambda: condition_for(card, grid, pico.tokenizer.codebook))  # noqa: B023
        timed(f"DCDD, {bench.steps} steps", lambda: bench.paint(pico.decoder, condition, slice(k, k + 1)))  # noqa: B023
    return {stage: {"seconds": statistics.median(times[1:])} for stage, times in seconds.items()}


def measure_calibration(bench: Bench, count: int = 100) -> Rows:
    """The paper's Table 1: the VLM beside raw and calibrated proxies, on captions it was not fitted on."""
    pico = bench.pico
    sampled = [grid for _, grid in bench.sampled("captions", count)]
    proxies = [pico.tokenizer.encode(pixels) for _, pixels in bench.scenes("calibration", count)]
    columns = {
        "Janus": describe_logits(sampled, pico.tokenizer.codebook),
        "raw proxies": describe_logits(proxies, pico.tokenizer.codebook),
        "calibrated proxies": describe_logits(proxies, pico.tokenizer.codebook, pico.decoder.card.calibration),
    }
    return {column: _statistics_row(found) for column, found in columns.items()}


_SINGLE = ("top_1", "top_2", "entropy", "tail_entropy", "otsu_threshold", "rank", "head_mass")


def _statistics_row(found: TokenStatistics) -> dict[str, float]:
    row = {name: float(getattr(found, name)) for name in _SINGLE}
    return row | {f"curve: {k}": value for k, value in enumerate(found.curve)}


def token_statistics(row: Mapping[str, float]) -> TokenStatistics:
    """What `measure_calibration` wrote of one column, to be drawn; how many tokens were read it does not say."""
    curve = tuple(value for name, value in row.items() if name.startswith("curve: "))
    single = {name: row[name] for name in _SINGLE} | {"rank": round(row["rank"])}
    return TokenStatistics(**single, curve=curve, tokens=0)


def _rows(bench: Bench, tallies: dict[str, Tally], count: int | None = None, *, by: str | None = None) -> Rows:
    real, labels = bench.real_features(count), bench.labels(count)
    return {name: tally.row(real, labels, by=by) for name, tally in tallies.items()}


def _distance(real: torch.Tensor, made: torch.Tensor) -> float:
    return frechet_distance(FrechetStatistics.of([real]), FrechetStatistics.of([made]))


SECTIONS: dict[str, Callable[[Bench], Rows]] = {
    "reader": measure_reader,
    "calibration": measure_calibration,
    "reconstruction": measure_reconstruction,
    "text": measure_text,
    "steps": measure_steps,
    "variants": measure_variants,
    "latency": measure_latency,
}
TITLES = {
    "reader": "What the measuring network sees in real held-out scenes, and in others with the same facts",
    "calibration": "Distributions, of the first 100 captions and scenes (the paper's Table 1)",
    "reconstruction": "Reconstruction of held-out scenes (the paper's Table 2)",
    "text": "Text to image, all rows from the same sampled tokens and logits (the paper's Table 3)",
    "steps": "Number of Euler steps, on the first 512 scenes (the paper's Table 6)",
    "means": "What the decoder is conditioned on: means of the seeds (the paper's Table 4)",
    "latency": "Where the time goes (the paper's Table 5)",
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is measured, how, and where the results are kept."""

    out: Path
    weights: Path = WEIGHTS
    scenes: int = 2048
    steps: int = 10
    batch: int = 64
    bf16: bool = False
    compiled: bool = False
    device: str = "cpu"
    variants: Mapping[str, Path] = field(default_factory=dict)

    def bench(self) -> Bench:
        """The models and scenes, loaded.

        Raises:
            ValueError: as the loaders.
        """
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        pico = load_pico(device=self.device, weights=self.weights, compiled=self.compiled)
        pico.decoder.to(dtype)
        return Bench(
            pico=pico,
            reader=load_reader(device=self.device, weights=self.weights),
            variants=self.variants,
            compiled=self.compiled,
            images=scene_images(self.out, "test", self.scenes),
            batch=self.batch,
            steps=self.steps,
            guidance=pico.decoder.card.calibration.guidance,
        )

    def fingerprint(self, section: str) -> str:
        """Of what a section's numbers depend on: how it measures, the weights, the settings, for times the machine."""
        digest = hashlib.sha256(inspect.getsource(SECTIONS[section]).encode())
        bundles = self.variants.values() if section == "variants" else ()
        for path in [*sorted(self.weights.rglob("*.safetensors")), *bundles]:
            digest.update(path.read_bytes())
        machine = (platform.node(), torch.get_num_threads()) if section == "latency" else ()
        settings = (self.scenes, self.steps, self.bf16, self.compiled, self.device)
        digest.update(repr((*settings, machine)).encode())
        return digest.hexdigest()

    def command(self, *sections: str) -> str:
        """What measures sections as this does."""
        words = {
            name: getattr(self, name)
            for name in ("scenes", "steps", "weights")
            if getattr(self, name) != getattr(Choice, name)
        }
        words["device"] = self.device
        words |= {flag: "" for flag, chosen in (("bf16", self.bf16), ("compile", self.compiled)) if chosen}
        options = "".join(f" --{name} {value}".rstrip() for name, value in words.items())
        return f"python -m dcdd_pico.results_table --sections {' '.join(sections)}{options}"


def measured(choice: Choice, sections: Sequence[str]) -> tuple[Bench, dict[str, Rows]]:
    """The sections' rows, measured now or, while `Choice.fingerprint` stays the same, read from `<out>/<section>.json`.

    "variants" brings "means" with it, of its seeds.
    """
    bench, results = choice.bench(), {}
    for section in sections:
        path, key = choice.out / f"{section}.json", choice.fingerprint(section)
        stored = json.loads(path.read_text("utf-8")) if path.exists() else {}
        if stored.get("key") != key:
            with torch.no_grad():
                stored = {"key": key, "rows": SECTIONS[section](bench)}
            write_text(path, json.dumps(stored, indent=1) + "\n")
        results[section] = stored["rows"]
    if "variants" in results:
        results["means"] = variant_means(results["variants"])
    return bench, results


def variant_means(rows: Rows) -> Rows:
    """Of the seeds' rows: variant -> mean of each score, and the lowest and highest as its details."""
    means: Rows = {}
    for variant in VARIANTS:
        of = [row for name, row in rows.items() if name.startswith(f"{variant}, ")]
        means[variant] = {}
        for column in ABLATION:
            values = [row[column] for row in of]
            spread = {f"{column}: lowest": min(values), f"{column}: highest": max(values)}
            means[variant] |= {column: sum(values) / len(values)} | spread
    return means


def variant_files(folder: Path) -> dict[str, Path]:
    """The ablation's bundles in a folder, "<variant>-<seed>.safetensors", by the name of their row: seed by seed.

    Warns of seeds that not all variants have; these are left out.
    """
    seeds = {
        name: {int(path.stem.rpartition("-")[2]): path for path in folder.glob(f"{name}-*.safetensors")}
        for name in VARIANTS
    }
    whole = sorted(set.intersection(*(set(found) for found in seeds.values())))
    if any(len(found) != len(whole) for found in seeds.values()):
        held = {name: sorted(found) for name, found in seeds.items()}
        warnings.warn(
            f"{folder} holds the seeds {held}: those that not all variants have are left out. "
            "`python -m dcdd_pico.ablation` trains the others",
            DCDDWarning,
            stacklevel=2,
        )
    return {f"{name}, seed {seed}": seeds[name][seed] for seed in whole for name in VARIANTS}


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Choice]:
    """Adds to a command's options those that say what is measured, and reads them: first the command's own."""
    parser.add_argument("--out", type=Path, default=Path("out/table"), help="where the measurements are kept")
    parser.add_argument("--scenes", type=int, default=Choice.scenes)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument(
        "--work", type=Path, default=WORK, help="of the build, with the decoders that are measured but not shipped"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=Choice.steps)
    parser.add_argument("--batch", type=int, default=Choice.batch)
    parser.add_argument("--bf16", action="store_true", help="run the diffusion transformers in bfloat16")
    parser.add_argument("--compile", dest="compiled", action="store_true", help="compile their blocks")
    chosen = parser.parse_args()
    own = {one.name: getattr(chosen, one.name) for one in fields(Choice) if hasattr(chosen, one.name)}
    return chosen, Choice(**own, variants=variant_files(chosen.work / "variants"))
