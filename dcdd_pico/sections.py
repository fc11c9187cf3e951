"""Measures the embedded models on held-out scenes, in sections: one for each table of docs/results.md and the report.

This module has what all sections share, and the two that compare no images; other modules add theirs to `SECTIONS`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from dcdd_core.files import write_text
from dcdd_core.method.statistics import TokenStatistics, describe_logits
from dcdd_core.models.card import VARIANTS
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.pipelines.condition import condition_for
from dcdd_core.pipelines.decode import decode
from dcdd_core.pipelines.load import Models
from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import Condition, DCDDWarning, TokenLogits

from .build_context import WORK
from .embedded import WEIGHTS
from .models import load_pico, load_reader
from .reader import SceneReader
from .scene_arrays import scene_images
from .scenes import scene_facts, scene_pixels
from .section_keys import Provenance, code_hash, files_hash

#: Row -> column -> value. A column with a colon ("frechet: heart") is a detail of the column before the colon.
Rows = dict[str, dict[str, float]]

SERVED = "DCDD as served"
BY_LOGITS = "DCDD, the VLM's logits (beta = 0)"
VQ = "VQ-VAE decode"
DCDD = "DCDD (LCDM + LC)"
RERENDERED = "the same facts, rendered again"
#: Occurs in the names of rows of ratios, and of no others.
RATIO = "ratio of"
#: Scores of the ablation.
ABLATION_SCORES = (
    "frechet",
    "frechet, text detector",
    "ssim",
    "perceptual",
    "perceptual, text detector",
    "text frechet",
    "text frechet, text detector",
)
#: Pairs of the ablation's variants that are compared.
COMPARED = (("lcdm", "discrete"), ("lcdm+lc", "lcdm"), ("lcdm+lc", "discrete"))
#: Facts whose F1 is reported.
READ = ("shape", "colour", "texture", "place")
STEP_COUNTS = (5, 10, 15, 20, 25, 30, 35)
T = TypeVar("T")


def ratio_name(name: str, baseline: str) -> str:
    """Name of the row with a row's scores divided by those of a baseline."""
    return f"{RATIO} {name} to {baseline}"


def steps_name(steps: int) -> str:
    """Name of the row of a number of Euler steps."""
    return f"DCDD, {steps} step{'s' * (steps != 1)}"


@dataclass(frozen=True, kw_only=True)
class EvalSetup:
    """Models, metric network, held-out scenes and options of a measurement.

    Attributes:
        ablation: name -> bundle of one of the ablation's decoders.
        images: [M, S, S, 3] uint8, the test scenes.
        steps: Euler steps.
        out: folder of measurements.
        weights: folder of the models' weights.
        work: work folder of the build.
    """

    pico: Models
    reader: SceneReader
    ablation: Mapping[str, Path] = field(default_factory=dict)
    compiled: bool = False
    out: Path = Path("out/table")
    weights: Path = WEIGHTS
    work: Path = WORK
    images: np.ndarray
    batch: int
    steps: int
    guidance: float

    def parts(self, what: str, count: int | None = None) -> Iterator[slice]:
        """Batches of all scenes, or of the first `count`, under a progress bar called `what`."""
        total = len(self.images) if count is None else min(count, len(self.images))
        for start in tqdm(range(0, total, self.batch), desc=what, unit="batch", disable=None):
            yield slice(start, min(total, start + self.batch))

    def scenes(self, what: str, count: int | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
        """Batches of scenes with their pixels."""
        for part in self.parts(what, count):
            yield part, scene_pixels(self.images[part], self.pico.tokenizer.device)

    def sampled(self, what: str, count: int | None = None) -> Iterator[tuple[slice, TokenLogits]]:
        """Batches of scenes with what the VLM samples for their captions."""
        captions = [facts.caption() for facts in scene_facts("test", len(self.images))]
        for part in self.parts(what, count):
            seeds = range(part.start, part.stop)
            yield (
                part,
                self.pico.sampler.sample(captions[part], seeds=seeds, options=SamplingOptions(guidance=self.guidance)),
            )

    def paint(self, decoder: DistributionConditionedDecoder, condition: Condition, part: slice) -> torch.Tensor:
        """Decodes a condition: pixels [B, 3, S, S] in -1..1. All decoders use the shipped decoder's time shift."""
        seeds, shift = range(part.start, part.stop), self.pico.decoder.card.shift
        return decode(decoder, self.pico.codec, condition, seeds=seeds, steps=self.steps, shift=shift).pixels


def load_setup(
    *,
    out: Path,
    weights: Path,
    work: Path,
    scenes: int,
    steps: int,
    batch: int,
    bf16: bool,
    compiled: bool,
    device: str,
    ablation: Mapping[str, Path],
) -> EvalSetup:
    """Loads models and test scenes; the scenes are rendered into `out`.

    Raises:
        ValueError: as the loaders.
    """
    pico = load_pico(device=device, weights=weights, compiled=compiled)
    pico.decoder.to(torch.bfloat16 if bf16 else torch.float32)
    return EvalSetup(
        pico=pico,
        reader=load_reader(device=device, weights=weights),
        ablation=ablation,
        compiled=compiled,
        out=out,
        weights=weights,
        work=work,
        images=scene_images(out, "test", scenes),
        batch=batch,
        steps=steps,
        guidance=pico.decoder.card.calibration.guidance,
    )


def measure_latency(setup: EvalSetup, rounds: int = 7) -> Rows:
    """The paper's Table 5: median seconds of each stage for a single image, over `rounds` images after a warm-up."""
    pico, card = setup.pico, setup.pico.decoder.card
    captions = [facts.caption() for facts in scene_facts("test", rounds + 1)]
    options = SamplingOptions(guidance=setup.guidance)
    seconds: dict[str, list[float]] = {}

    def timed(stage: str, work: Callable[[], T]) -> T:
        start = time.perf_counter()
        made = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.setdefault(stage, []).append(time.perf_counter() - start)
        return made

    for k, caption in enumerate(captions):
        grid = timed("Janus", partial(pico.sampler.sample, [caption], seeds=[k], options=options))
        timed(VQ, partial(pico.tokenizer.decode_tokens, grid.tokens, grid.grid))
        condition = timed("LCDM", partial(condition_for, card, grid, pico.tokenizer.codebook))
        timed(steps_name(setup.steps), partial(setup.paint, pico.decoder, condition, slice(k, k + 1)))
    return {stage: {"seconds": statistics.median(times[1:])} for stage, times in seconds.items()}


def measure_calibration(setup: EvalSetup, count: int = 100) -> Rows:
    """The paper's Table 1: statistics of the VLM's logits, raw and calibrated proxies; none were used in the fit."""
    pico = setup.pico
    sampled = [grid for _, grid in setup.sampled("captions", count)]
    proxies = [pico.tokenizer.encode(pixels) for _, pixels in setup.scenes("calibration", count)]
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
    """Statistics from a row of `measure_calibration`, for tables and plots; their number of tokens is unknown (0)."""
    curve = tuple(value for name, value in row.items() if name.startswith("curve: "))
    single = {name: row[name] for name in _SINGLE} | {"rank": round(row["rank"])}
    return TokenStatistics(**single, curve=curve, tokens=0)


@dataclass(frozen=True)
class Section:
    """How a section is measured, and what it reads from the weights folder and the work folder.

    Anything that the work folder lacks is not measured.
    """

    measure: Callable[[EvalSetup], Rows]
    weights: tuple[str, ...]
    work: tuple[str, ...] = ()


SECTIONS: dict[str, Section] = {
    "calibration": Section(measure_calibration, ("janus", "decoder.safetensors")),
    "latency": Section(measure_latency, ("janus", "vae", "decoder.safetensors")),
}
#: Section -> title, in the order of the page.
TITLES = {
    "reconstruction": "Reconstruction of held-out scenes (the paper's Table 2)",
    "text": "Text to image, both rows from the same sampled tokens (the paper's Table 3)",
    "readings": "How the decoder reads the VLM's output: text to image, all rows from the same tokens and logits",
    "steps": "Number of Euler steps, on the first 512 scenes (the paper's Table 6)",
    "few": "The same decoder in few steps, without distillation: reconstruction",
    "few-text": "The same decoder in few steps, without distillation: text to image",
    "calibration": "Distributions, for the first 100 captions and scenes (the paper's Table 1)",
    "reader": "The metric network on real held-out scenes, and on other renderings of the same facts",
    "means": "What the decoder is conditioned on, mean over seeds (the paper's Table 4)",
    "latency": "Latency by stage (the paper's Table 5)",
}


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """What is measured, how, and where the results are kept.

    Attributes:
        commit: name of the code's commit, recorded with the measurements.
    """

    out: Path
    weights: Path = WEIGHTS
    work: Path = WORK
    scenes: int = 2048
    steps: int = 10
    batch: int = 64
    bf16: bool = False
    compiled: bool = False
    device: str = "cpu"
    ablation: Mapping[str, Path] = field(default_factory=dict)
    commit: str = "unknown"

    def setup(self) -> EvalSetup:
        """`load_setup` with these options."""
        chosen = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "commit"}
        return load_setup(**chosen)

    def key(self, section: str) -> str:
        """The current key of a section: hashes of code, of shipped weights and, if the section reads any, of decoders
        in the work folder."""
        own = SECTIONS[section]
        # Sections of other modules import this one as a whole.
        here = (load_setup,) if own.measure.__module__ == __name__ else ()
        key = f"{code_hash(own.measure, *here)}-{files_hash([self.weights / name for name in own.weights])}"
        trained = list(self.ablation.values()) if section == "ablation" else []
        trained += [path for name in own.work if (path := self.work / name).exists()]
        if trained:
            key += f"-{files_hash(trained)}"
        return key

    def settings(self, section: str) -> list[Any]:
        """The options that a section's numbers depend on besides its key; for latency, the machine too."""
        machine = [platform.node(), torch.get_num_threads()] if section.endswith("latency") else []
        return [self.scenes, self.steps, self.bf16, self.compiled, self.device, *machine]

    def command(self, *sections: str) -> str:
        """The command line that measures sections with these options."""
        words = {
            name: getattr(self, name)
            for name in ("scenes", "steps", "weights")
            if getattr(self, name) != getattr(TableOptions, name)
        }
        words["device"] = self.device
        words |= {flag: "" for flag, chosen in (("bf16", self.bf16), ("compile", self.compiled)) if chosen}
        options = "".join(f" --{name} {value}".rstrip() for name, value in words.items())
        return f"python -m dcdd_pico.results_table --sections {' '.join(sections)}{options}"


@dataclass(frozen=True)
class Measured:
    """Results of sections.

    Attributes:
        rows: section -> rows; with "ablation" there is also "means" over its seeds.
        provenance: section -> where its numbers come from.
    """

    rows: dict[str, Rows] = field(default_factory=dict)
    provenance: dict[str, Provenance] = field(default_factory=dict)


def measure(options: TableOptions, sections: Sequence[str]) -> tuple[EvalSetup, Measured]:
    """Measures sections, or reads them from `<out>/<section>.json` if neither key nor settings have changed."""
    setup, results = options.setup(), Measured()
    for section in sections:
        path, key = options.out / f"{section}.json", options.key(section)
        stored = json.loads(path.read_text("utf-8")) if path.exists() else {}
        if (stored.get("key"), stored.get("settings")) != (key, options.settings(section)):
            with torch.no_grad():
                rows = SECTIONS[section].measure(setup)
            stored = {"key": key, "settings": options.settings(section), "commit": options.commit, "rows": rows}
            write_text(path, json.dumps(stored, indent=1) + "\n")
        results.rows[section] = stored["rows"]
        results.provenance[section] = Provenance(section, stored["commit"], stored["key"])
    if "ablation" in results.rows:
        results.rows["means"] = ablation_means(results.rows["ablation"])
        results.provenance["means"] = results.provenance["ablation"]
    return setup, results


def ablation_means(rows: Rows) -> Rows:
    """Statistics over seeds: variant -> mean of each score, with its lowest and highest value as details.

    Variants that are compared also get the ratio of their means, with the lowest and highest ratio of a seed.
    """
    seeds = {name: [row for one, row in rows.items() if one.startswith(f"{name}, ")] for name in VARIANTS}

    def spread(column: str, value: float, values: Sequence[float]) -> dict[str, float]:
        return {column: value, f"{column}: lowest": min(values), f"{column}: highest": max(values)}

    means: Rows = {}
    for variant, of in seeds.items():
        means[variant] = {}
        for column in ABLATION_SCORES:
            values = [row[column] for row in of]
            means[variant] |= spread(column, statistics.fmean(values), values)
    for variant, baseline in COMPARED:
        row = means.setdefault(ratio_name(variant, baseline), {})
        for column in ABLATION_SCORES:
            values = [own[column] / other[column] for own, other in zip(seeds[variant], seeds[baseline], strict=True)]
            row |= spread(column, means[variant][column] / means[baseline][column], values)
    return means


def ablation_files(folder: Path) -> dict[str, Path]:
    """The ablation's bundles in a folder, "<variant>-<seed>.safetensors", by row name, ordered by seed.

    Seeds that are missing for some variant are left out, with a warning.
    """
    seeds = {
        name: {int(path.stem.rpartition("-")[2]): path for path in folder.glob(f"{name}-*.safetensors")}
        for name in VARIANTS
    }
    whole = sorted(set.intersection(*(set(found) for found in seeds.values())))
    if any(len(found) != len(whole) for found in seeds.values()):
        held = {name: sorted(found) for name, found in seeds.items()}
        warnings.warn(
            f"{folder} holds the seeds {held}: seeds that some variant lacks are left out. "
            "`python -m dcdd_pico.ablation` trains the missing ones",
            DCDDWarning,
            stacklevel=2,
        )
    return {f"{name}, seed {seed}": seeds[name][seed] for seed in whole for name in VARIANTS}


def parse(parser: argparse.ArgumentParser, *, steps: bool = True) -> tuple[argparse.Namespace, TableOptions]:
    """Adds the options of `TableOptions` to a command's own and parses them; returns the namespace and the options.

    Args:
        steps: False if the rows themselves define the number of Euler steps.
    """
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/table"),
        help="folder for measurements, reused while code and weights stay the same",
    )
    parser.add_argument("--scenes", type=int, default=TableOptions.scenes, help="test scenes, and captions")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the models that are measured")
    parser.add_argument(
        "--work", type=Path, default=WORK, help="work folder of the build, with the ablation's decoders"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the models compute"
    )
    if steps:
        parser.add_argument("--steps", type=int, default=TableOptions.steps, help="Euler steps")
    parser.add_argument("--batch", type=int, default=TableOptions.batch, help="images at once")
    parser.add_argument("--commit", default=TableOptions.commit, help="commit to record with what is measured")
    parser.add_argument(
        "--bf16", action="store_true", help="run the diffusion transformers and the masked sampler in bfloat16"
    )
    parser.add_argument(
        "--compile", dest="compiled", action="store_true", help="compile their blocks (needs a C++ compiler)"
    )
    chosen = parser.parse_args()
    own = {one.name: getattr(chosen, one.name) for one in fields(TableOptions) if hasattr(chosen, one.name)}
    return chosen, TableOptions(**own, ablation=ablation_files(chosen.work / "variants"))
