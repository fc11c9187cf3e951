"""`dcdd evaluate`: a folder of pictures, or a file of prompts, to a report in the shape of the paper's tables.

`--out` holds the results (results.json, report.md, plots), the settings they were made under, what was generated
(`pictures/`, `geneval/`) and what was measured (`measured/`). A stopped run that is started again goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..pipelines.distributed import Processes
from .decoding import PATHS, Decoders
from .frechet import FrechetStatistics, load_statistics, save_statistics
from .generation import Sample, finish_geneval, generate_all, geneval_jobs, made_pictures, prompt_jobs
from .image_folder import Picture, check_categories, pictures_in
from .measuring import chosen_statistics, distances, measure_features, statistics_of
from .networks import FeatureNetwork, PerceptualNetwork
from .prompts import Prompt
from .reconstruction import SCORES, needed, real_statistics, reconstruct_all, reconstruction_scopes
from .report import results_of, write_report
from .results_store import Measurements, hold_to

_SMALLEST = 32
"""Pixels a side; of less than 31 LPIPS' AlexNet pools nothing."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What both evaluations are told.

    Attributes:
        out: folder of everything.
        seed: with a picture's name, of its randomness.
        batch: pictures at once; results depend on it by rounding alone.
        statistics: file of the reference's Frechet statistics: read if it is there, else written.
        command: as typed, for the report.
    """

    out: Path
    processes: Processes
    seed: int = 0
    batch: int = 16
    statistics: Path | None = None
    command: str = ""

    def hold_to(self, settings: Mapping[str, Any]) -> None:
        """See `kept.hold_to`; returns when the first process has written them."""
        hold_to(settings, self.out, write=self.processes.first)
        self.processes.wait()

    def known_statistics(self, network: FeatureNetwork, size: int) -> dict[str, FrechetStatistics] | None:
        """Those of the file, if it is there: the same answer for every process."""
        there = self.statistics is not None and self.statistics.exists()
        known = load_statistics(self.statistics, network=network.fingerprint, size=size) if there else None
        self.processes.wait()
        return known

    def measurements(self, fingerprint: str, what: str, names: Sequence[str]) -> Measurements:
        """Those kept of one kind, of the networks of this fingerprint."""
        return Measurements(self.out / "measured" / fingerprint / what, names)


def evaluate_reconstruction(
    run: Run,
    pictures: Sequence[Picture],
    decoders: Decoders,
    *,
    features: FeatureNetwork,
    perceptual: PerceptualNetwork,
    size: int | None = None,
    keep_pictures: bool = False,
) -> str | None:
    """rFID (or the Frechet distance of another network), SSIM, PSNR and LPIPS of both decoders.

    Args:
        size: side in pixels of the squares that are compared; `Decoders.measured` by default.
        keep_pictures: write the decoded pictures as well.

    Returns:
        The report, for the first process; None for the others.

    Raises:
        ValueError: for settings other than those of the results in `run.out`, a category of one picture, a picture that
            cannot be read, a size that is too small to be measured, and statistics of another network, size or set of
            categories.
    """
    check_categories([picture.category for picture in pictures])
    size = decoders.measured if size is None else size
    if size < _SMALLEST:
        raise ValueError(f"pictures are measured at {_SMALLEST} pixels a side or more, got --size {size}")
    settings = {"evaluation": "reconstruction", "seed": run.seed, "size": size, **decoders.settings()}
    known = run.known_statistics(features, size)
    if known is not None:
        categories = sorted({picture.category for picture in pictures})
        known = chosen_statistics(known, categories, f"--statistics {run.statistics}")
    run.hold_to(settings)
    network = f"{features.fingerprint}+{perceptual.fingerprint}"
    kept = run.measurements(network, "reconstruction", needed(decoders.paths, with_real=known is None))
    reconstruct_all(
        pictures,
        decoders,
        kept,
        run.processes,
        size=size,
        seed=run.seed,
        batch=run.batch,
        features=features,
        perceptual=perceptual,
        folder=run.out / "pictures" if keep_pictures else None,
    )
    if not run.processes.first:
        return None
    real = real_statistics(pictures, kept, features) if known is None else known
    if known is None and run.statistics is not None:
        save_statistics(run.statistics, real, size=size)
    scopes, singles = reconstruction_scopes(pictures, decoders.paths, kept, features, real)
    names = {
        "frechet": f"{features.name}, {features.fingerprint}",
        "ssim": "scikit-image, 7-pixel window",
        "perceptual": f"{perceptual.name}, {perceptual.fingerprint}",
    }
    results = results_of(
        scopes,
        pictures=pictures,
        real=real,
        settings=settings,
        networks=names,
        size=size,
        painted=_painted(decoders),
    )
    heads = dict(zip(SCORES, ("SSIM", "PSNR", perceptual.measure))) | {"frechet": f"r{features.measure}"}
    return write_report(run.out, results, title="Reconstruction", heads=heads, command=run.command, singles=singles)


def evaluate_text(
    run: Run,
    prompts: Sequence[Prompt],
    decoders: Decoders,
    sample: Sample,
    *,
    sampling: Mapping[str, Any],
    features: FeatureNetwork,
    references: Path | None,
    by_category: bool = False,
) -> str | None:
    """gFID (or the Frechet distance of another network) of both decoders, from the same tokens and logits, at
    `Decoders.measured`.

    Args:
        sampling: what `sample` depends on besides prompts and seeds, as plain JSON values.
        references: folder of the pictures to be like, all of which count; not needed where statistics are known.
        by_category: also by the prompts' categories, which are the references' sub-folders.

    Returns:
        See `evaluate_reconstruction`.

    Raises:
        ValueError: as `evaluate_reconstruction`, and without references.
    """
    categories = [prompt.category if by_category else "" for prompt in prompts]
    if by_category and "" in categories:
        raise ValueError("the prompts name no categories to measure by: leave --by-category out")
    check_categories(categories)
    size = decoders.measured
    settings = _text_settings(run, decoders, sampling)
    known = run.known_statistics(features, size)
    if known is not None:
        known = chosen_statistics(known, categories, f"--statistics {run.statistics}")
    else:
        real_pictures = _references(run, references, categories, by_category=by_category)
    run.hold_to(settings)

    folder = run.out / "pictures"
    jobs = prompt_jobs(prompts, folder, decoders.paths)
    generate_all(jobs, sample, decoders, run.processes, seed=run.seed, batch=run.batch, label="pictures")
    made = {path: made_pictures(prompts, folder, path, by_category=by_category) for path in decoders.paths}
    todo = {path: (made[path], run.measurements(features.fingerprint, path, ["features"])) for path in made}
    if known is None:
        todo["references"] = (real_pictures, run.measurements(features.fingerprint, "references", ["features"]))
    for label, (pictures, kept) in todo.items():
        measure_features(
            pictures,
            "features",
            kept,
            run.processes,
            size=size,
            batch=run.batch,
            network=features,
            label=f"features of {label}",
        )
    if not run.processes.first:
        return None
    statistics = {label: statistics_of(*work, "features", features) for label, work in todo.items()}
    if known is None:
        real = statistics["references"]
        if run.statistics is not None:
            save_statistics(run.statistics, real, size=size)
        known = chosen_statistics(real, categories, f"--references {references}")
    found = {path: distances(known, statistics[path]) for path in decoders.paths}
    scopes = {scope: {PATHS[path]: {"frechet": found[path][scope]} for path in decoders.paths} for scope in found["vq"]}
    results = results_of(
        scopes,
        pictures=made["vq"],
        real=known,
        settings=settings,
        networks={"frechet": f"{features.name}, {features.fingerprint}"},
        size=size,
        painted=_painted(decoders),
    )
    heads = {"frechet": f"g{features.measure}"}
    return write_report(run.out, results, title="Text to image", heads=heads, command=run.command)


def generate_geneval(
    run: Run, prompts: Sequence[Prompt], decoders: Decoders, sample: Sample, *, sampling: Mapping[str, Any]
) -> list[Path]:
    """GenEval's folders of four pictures a prompt, one for each path; returns them.

    Raises:
        ValueError: for settings other than those of what is in `run.out`.
    """
    run.hold_to(_text_settings(run, decoders, sampling))
    folder = run.out / "geneval"
    jobs = geneval_jobs(prompts, folder, decoders.paths)
    generate_all(jobs, sample, decoders, run.processes, seed=run.seed, batch=run.batch, label="GenEval")
    finish_geneval(prompts, folder, decoders.paths, run.processes)
    return [folder / path for path in decoders.paths]


def _references(run: Run, folder: Path | None, categories: Sequence[str], *, by_category: bool) -> list[Picture]:
    """The pictures to be like, of which there must be enough in every category that is asked for."""
    if folder is None:
        where = f": {run.statistics} does not exist yet" if run.statistics is not None else ""
        raise ValueError(f"nothing to compare with{where}; give --references FOLDER, or statistics made of one")
    pictures = pictures_in(folder, by_category=by_category)
    check_categories([picture.category for picture in pictures])
    if absent := sorted(set(categories) - {picture.category for picture in pictures}):
        raise ValueError(f"--references {folder} has no sub-folder {', '.join(absent[:5])} with pictures: add it")
    return pictures


def _painted(decoders: Decoders) -> dict[str, int]:
    return {PATHS[path]: side for path, side in decoders.painted.items()}


def _text_settings(run: Run, decoders: Decoders, sampling: Mapping[str, Any]) -> dict[str, Any]:
    return {"evaluation": "text", "seed": run.seed, **sampling, **decoders.settings()}
