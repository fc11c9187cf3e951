"""Measures the embedded models on held-out scenes: `python -m dcdd_core.evaluation.pico_table`.

Every section is written to `<out>/<section>.json` when it is done and not measured again while the weights stay the
same; `<out>/table.md` holds them all. What measures is the scene reader that took no part in any training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_f1_score
from tqdm import tqdm

from ..method.statistics import describe_logits
from ..models.flux import DistributionConditionedDecoder, load_decoder
from ..pico.data import scene_images, to_pixels
from ..pico.reader import FACTS, SceneReader, fact_labels
from ..pico.scenes import scene_facts
from ..pico.weights import load_reader
from ..pipelines.condition import condition_for, serving
from ..pipelines.decode import decode
from ..pipelines.models import PICO_WEIGHTS, Models, load_pico
from ..types import Condition
from .frechet import FrechetStatistics, features_of, frechet_distance
from .quality import psnr, ssim

SERVED = "DCDD as served"
READ = ("shape", "colour", "texture", "place")
STEP_COUNTS = (5, 10, 15, 20, 25, 30, 35)


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

    def row(self, real: FrechetStatistics, labels: dict[str, torch.Tensor]) -> dict[str, float]:
        """Frechet distance to `real`, mean scores, and the macro F1 of the facts read off the pictures."""
        row = {"frechet": frechet_distance(real, FrechetStatistics.of(self.features))}
        row |= {name: float(torch.cat(parts).double().mean()) for name, parts in self.scores.items() if parts}
        for name in READ:
            read = torch.cat(self.answers[name])
            row[f"F1 {name}"] = float(
                multiclass_f1_score(read, labels[name][: len(read)], len(FACTS[name]), average="macro")
            )
        return row


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The models, the held-out scenes, and how to run."""

    pico: Models
    reader: SceneReader
    discrete: DistributionConditionedDecoder | None
    images: np.ndarray
    batch: int
    steps: int
    guidance: float

    def scenes(self, what: str, count: int | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
        """Slices of the scenes and their pixels."""
        total = len(self.images) if count is None else min(count, len(self.images))
        for start in tqdm(range(0, total, self.batch), desc=what, unit="batch", disable=None):
            part = slice(start, min(total, start + self.batch))
            yield part, to_pixels(self.images[part], self.pico.vq.device)

    def paint(
        self, decoder: DistributionConditionedDecoder, condition: Condition, part: slice, steps: int | None = None
    ) -> torch.Tensor:
        seeds = range(part.start, part.stop)
        return decode(decoder, self.pico.vae, condition, seeds=seeds, steps=steps or self.steps).pixels

    def real_statistics(self) -> FrechetStatistics:
        return FrechetStatistics.of(
            features_of(pixels, self.reader.frechet_features) for _, pixels in self.scenes("real scenes")
        )

    def labels(self, count: int | None = None) -> dict[str, torch.Tensor]:
        return fact_labels(scene_facts("test", count or len(self.images)))


def measure_reader(bench: Bench) -> dict[str, dict[str, float]]:
    """How well the measuring network reads real scenes; its distances mean little below F1 .9."""
    tally = Tally()
    for _, pixels in bench.scenes("reader"):
        tally.add(bench.reader, pixels, None)
    row = tally.row(FrechetStatistics.of(tally.features), bench.labels())
    return {"real scenes": {name: value for name, value in row.items() if name != "frechet"}}


def measure_reconstruction(bench: Bench) -> dict[str, dict[str, float]]:
    """The paper's Table 2, with the decoder on discrete codes beside it."""
    pico, tallies = bench.pico, {}
    for part, pixels in bench.scenes("reconstruction"):
        grid = pico.vq.encode(pixels)
        condition = condition_for(pico.decoder.card, grid, pico.vq.codebook)
        pictures = {
            "VQ-VAE decode": pico.vq.decode_tokens(grid.tokens, grid.grid),
            "VQ-VAE decode of expected codes": pico.vq.decode_vectors(condition.code_vectors, grid.grid),
            "DCDD (LCDM + LC)": bench.paint(pico.decoder, condition, part),
        }
        if bench.discrete is not None:
            of_tokens = condition_for(bench.discrete.card, grid, pico.vq.codebook)
            pictures["diffusion decoder on discrete codes"] = bench.paint(bench.discrete, of_tokens, part)
        for name, made in pictures.items():
            tallies.setdefault(name, Tally()).add(bench.reader, made, pixels)
    return _rows(bench, tallies)


def measure_text(bench: Bench) -> dict[str, dict[str, float]]:
    """The paper's Table 3: captions of the scenes to pictures, all rows from the same sampled tokens and logits."""
    pico, tallies = bench.pico, {}
    captions = [facts.caption() for facts in scene_facts("test", len(bench.images))]
    for part, _ in bench.scenes("text to image"):
        seeds = range(part.start, part.stop)
        grid = pico.sampler.sample(captions[part], seeds=seeds, guidance=bench.guidance)
        card, codebook = pico.decoder.card, pico.vq.codebook
        pictures = {"VQ-VAE decode": pico.vq.decode_tokens(grid.tokens, grid.grid)}
        ways = {
            "DCDD, the VLM's logits (beta = 0)": "logits",
            f"DCDD, anchored logits (beta = {card.calibration.anchor:.3g})": "anchored",
            "DCDD, the sampled tokens alone": "tokens",
        }
        for name, reads in ways.items():
            condition = condition_for(serving(card, reads=reads), grid, codebook)
            pictures[name] = bench.paint(pico.decoder, condition, part)
            if reads == card.reads:
                pictures[SERVED] = pictures[name]
        if bench.discrete is not None:
            of_tokens = condition_for(bench.discrete.card, grid, codebook)
            pictures["diffusion decoder on discrete codes"] = bench.paint(bench.discrete, of_tokens, part)
        for name, made in pictures.items():
            tallies.setdefault(name, Tally()).add(bench.reader, made, None)
    return _rows(bench, tallies)


def measure_steps(bench: Bench, count: int = 512) -> dict[str, dict[str, float]]:
    """The paper's Table 6, on the first scenes: the number of Euler steps."""
    pico, tallies = bench.pico, {}
    for part, pixels in bench.scenes("steps", count):
        grid = pico.vq.encode(pixels)
        condition = condition_for(pico.decoder.card, grid, pico.vq.codebook)
        tallies.setdefault("VQ-VAE decode", Tally()).add(
            bench.reader, pico.vq.decode_tokens(grid.tokens, grid.grid), pixels
        )
        for steps in STEP_COUNTS:
            made = bench.paint(pico.decoder, condition, part, steps)
            tallies.setdefault(f"DCDD, {steps} steps", Tally()).add(bench.reader, made, pixels)
    return _rows(bench, tallies)


def measure_calibration(bench: Bench, count: int = 100) -> dict[str, dict[str, float]]:
    """The paper's Table 1: the VLM beside raw and calibrated proxies, on captions it was not fitted on."""
    pico = bench.pico
    captions = [facts.caption() for facts in scene_facts("test", count)]
    chunk = min(bench.batch, 25)
    sampled = [
        pico.sampler.sample(captions[k : k + chunk], seeds=range(k, min(count, k + chunk)), guidance=bench.guidance)
        for k in range(0, count, chunk)
    ]
    proxies = [pico.vq.encode(pixels) for _, pixels in bench.scenes("calibration", count)]
    columns = {
        "Janus": describe_logits(sampled, pico.vq.codebook),
        "raw proxies": describe_logits(proxies, pico.vq.codebook),
        "calibrated proxies": describe_logits(proxies, pico.vq.codebook, pico.decoder.card.calibration),
    }
    names = ("top_1", "top_2", "entropy", "tail_entropy", "otsu_threshold", "rank", "head_mass")
    return {column: {name: float(getattr(found, name)) for name in names} for column, found in columns.items()}


def _rows(bench: Bench, tallies: dict[str, Tally]) -> dict[str, dict[str, float]]:
    real, labels = bench.real_statistics(), bench.labels()
    return {name: tally.row(real, labels) for name, tally in tallies.items()}


SECTIONS: dict[str, Callable[[Bench], dict[str, dict[str, float]]]] = {
    "reader": measure_reader,
    "calibration": measure_calibration,
    "reconstruction": measure_reconstruction,
    "text": measure_text,
    "steps": measure_steps,
}
TITLES = {
    "reader": "Scene facts read off real held-out scenes by the measuring network (macro F1)",
    "calibration": "Distributions (the paper's Table 1)",
    "reconstruction": "Reconstruction of held-out scenes (the paper's Tables 2 and 4)",
    "text": "Text to image, all rows from the same sampled tokens and logits (the paper's Table 3)",
    "steps": "Number of Euler steps (the paper's Table 6)",
}


#: Section, row, column, what the row is held against, and what must hold of their ratio or value.
TARGETS = (
    ("reconstruction", "DCDD (LCDM + LC)", "frechet", "VQ-VAE decode", "at most", 0.40),
    ("reconstruction", "DCDD (LCDM + LC)", "ssim", "VQ-VAE decode", "at least", 1.03),
    ("reconstruction", "DCDD (LCDM + LC)", "perceptual", "VQ-VAE decode", "at most", 0.89),
    ("reconstruction", "DCDD (LCDM + LC)", "frechet", "diffusion decoder on discrete codes", "at most", 1.0),
    ("steps", "DCDD, 10 steps", "frechet", "VQ-VAE decode", "at most", 1.0),
    ("steps", "DCDD, 10 steps", "perceptual", "VQ-VAE decode", "at most", 1.0),
    ("steps", "DCDD, 10 steps", "ssim", "VQ-VAE decode", "at least", 1.0),
    ("text", SERVED, "frechet", "VQ-VAE decode", "at most", 0.66),
    *(("text", SERVED, f"F1 {fact}", "VQ-VAE decode", "at least", 1.0) for fact in READ),
)


def verdicts(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """A Markdown table of the targets: the ratio that was measured, and whether it is met, missed or not measured."""
    lines = ["### Targets (ratios)", "", "| | of | target | measured | |", "|---|---|---|---|---|"]
    for section, row, column, rival, relation, bound in TARGETS:
        rows = results.get(section, {})
        ratio, verdict = "", "not measured"
        if row in rows and rival in rows:
            ours, theirs = rows[row][column], rows[rival][column]
            kept = ours <= bound * theirs if relation == "at most" else ours >= bound * theirs
            ratio, verdict = f"{ours / theirs:.3f}" if theirs else f"{ours:.3g} to 0", "met" if kept else "MISSED"
        lines.append(f"| {row}: {column} | {rival} | {relation} {bound:g} | {ratio} | {verdict} |")
    columns = results.get("calibration", {})
    if columns:
        gap = abs(columns["Janus"]["entropy"] - columns["calibrated proxies"]["entropy"])
        verdict = "met" if gap <= 0.02 else "MISSED"
        lines.append(f"| calibrated proxies: mean entropy | Janus | within 0.02 | {gap:.4f} | {verdict} |")
    return "\n".join(lines) + "\n"


def markdown(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """The sections' results as Markdown tables."""
    blocks = []
    for section, rows in results.items():
        columns = list(next(iter(rows.values())))
        lines = [f"### {TITLES[section]}", "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name, row in rows.items():
            lines.append(f"| {name} | " + " | ".join(f"{row[column]:.4g}" for column in columns) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/table"))
    parser.add_argument("--scenes", type=int, default=2048)
    parser.add_argument("--weights", type=Path, default=PICO_WEIGHTS)
    parser.add_argument("--discrete", type=Path, help="bundle of the decoder trained on discrete codes (not shipped)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--bf16", action="store_true", help="run the diffusion transformers in bfloat16")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    chosen = parser.parse_args()
    pico = load_pico(device=chosen.device, weights=chosen.weights)
    dtype = torch.bfloat16 if chosen.bf16 else torch.float32
    pico.decoder.to(dtype)
    bench = Bench(
        pico=pico,
        reader=load_reader(device=chosen.device, weights=chosen.weights),
        discrete=load_decoder(chosen.discrete, device=chosen.device, dtype=dtype) if chosen.discrete else None,
        images=scene_images(chosen.out, "test", chosen.scenes),
        batch=chosen.batch,
        steps=chosen.steps,
        guidance=pico.decoder.card.calibration.guidance,
    )
    key = _fingerprint(chosen)
    results = {}
    for section in chosen.sections:
        path = chosen.out / f"{section}.json"
        stored = json.loads(path.read_text()) if path.exists() else {}
        if stored.get("key") != key:
            with torch.no_grad():
                stored = {"key": key, "rows": SECTIONS[section](bench)}
            path.write_text(json.dumps(stored, indent=1))
        results[section] = stored["rows"]
    text = markdown(results) + "\n" + verdicts(results)
    (chosen.out / "table.md").write_text(text)
    print(text)


def _fingerprint(chosen: argparse.Namespace) -> str:
    """Of all that the numbers depend on: the weights' bytes and the settings."""
    digest = hashlib.sha256()
    for path in sorted(chosen.weights.rglob("*.safetensors")) + ([chosen.discrete] if chosen.discrete else []):
        digest.update(path.read_bytes())
    digest.update(repr((chosen.scenes, chosen.steps, chosen.bf16)).encode())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
