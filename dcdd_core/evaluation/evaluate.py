"""`dcdd evaluate`: evaluates both decoders on a folder of images or a file of prompts, as in the paper's tables.

The output folder holds the results (results.json, report.md, plots), the settings (settings.json), generated images
(`pictures/`, `geneval/`) and measurements of single images (`measured/`). Starting a stopped run again resumes it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import remove_leftovers
from ..pipelines.distributed import Processes
from ..pipelines.image_files import DEFAULT_POLICY, ReadPolicy
from ..types import DCDDWarning
from .decoding import PATHS, Decoders
from .frechet import FrechetSet, load_statistics, save_statistics
from .generation import (
    GENEVAL,
    Sample,
    check_geneval,
    finish_geneval,
    generate_all,
    generated_images,
    geneval_jobs,
    prompt_jobs,
)
from .image_folder import NOTHING_LEFT_OUT, ImageFile, LeftOut, check_categories, large_enough, list_images, readable
from .measuring import chosen_statistics, distances, measure_features, statistics_of
from .networks import FeatureNetwork, PerceptualNetwork
from .prompts import Prompt
from .reconstruction import SCORES, needed, real_statistics, reconstruct_all, reconstruction_scopes
from .report import results_of, write_report
from .results_store import Measurements, hold_to

_SMALLEST = 32
"""Pixels per side. LPIPS' AlexNet needs at least 31: below that its last pooling layer has no output."""
_LARGEST = 4096
"""Pixels per side; larger than any image that is decoded."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRun:
    """Options that both evaluations share.

    Attributes:
        out: output folder.
        seed: combined with an image's name into the seed of that image.
        batch: images per batch; it changes results by rounding only.
        statistics: file with the reference images' Frechet statistics: read if it exists, written otherwise.
        command: the command line, for the report.
        policy: which images may be left out.
    """

    out: Path
    processes: Processes
    seed: int = 0
    batch: int = 16
    statistics: Path | None = None
    command: str = ""
    policy: ReadPolicy = DEFAULT_POLICY

    def hold_to(self, settings: Mapping[str, Any]) -> None:
        """`results_store.hold_to` for all processes; returns once the first process has written the settings."""
        hold_to(settings, self.out, write=self.processes.first)
        self.processes.wait()

    def known_statistics(self, network: FeatureNetwork, size: int) -> dict[str, FrechetSet] | None:
        """The statistics in the file, if it exists; every process gets the same answer."""
        there = self.statistics is not None and self.statistics.exists()
        known = load_statistics(self.statistics, network=network.fingerprint, size=size) if there else None
        self.processes.wait()
        return known

    def measurements(self, fingerprint: str, what: str, names: Sequence[str]) -> Measurements:
        """The stored measurements of one kind, made by the networks with this fingerprint."""
        return Measurements(self.out / "measured" / fingerprint / what, names)


def evaluate_reconstruction(
    run: EvaluationRun,
    images: Sequence[ImageFile],
    decoders: Decoders,
    *,
    features: FeatureNetwork,
    perceptual: PerceptualNetwork,
    size: int | None = None,
    keep_images: bool = False,
) -> str | None:
    """rFID (or the Frechet distance of another network), SSIM, PSNR and LPIPS of both decoders.

    Args:
        size: side in pixels at which images are compared; `Decoders.measured` by default.
        keep_images: write the decoded images as well.

    Returns:
        The report on the first process; None on the others.

    Raises:
        ValueError: if `run.out` holds results made with other settings; for a category with a single image, more
            unreadable images than the policy allows, a size out of range, and statistics of another network, size or
            set of categories.
    """
    size = decoders.measured if size is None else size
    if not _SMALLEST <= size <= _LARGEST:
        raise ValueError(
            f"--size must lie in {_SMALLEST}..{_LARGEST} pixels, of which LPIPS needs the first; got {size}"
        )
    images, small = large_enough(images, run.policy, size, shown=run.processes.first)
    check_categories([image.category for image in images])
    settings = {"evaluation": "reconstruction", "seed": run.seed, "size": size, **decoders.settings()}
    known = run.known_statistics(features, size)
    if known is not None:
        categories = sorted({image.category for image in images})
        known = chosen_statistics(known, categories, f"--statistics {run.statistics}")
    run.hold_to(settings)
    network = f"{features.fingerprint}+{perceptual.fingerprint}"
    kept = run.measurements(network, "reconstruction", needed(decoders.paths, with_real=known is None))
    reconstruct_all(
        images,
        decoders,
        kept,
        run.processes,
        size=size,
        seed=run.seed,
        batch=run.batch,
        features=features,
        perceptual=perceptual,
        folder=run.out / "pictures" if keep_images else None,
    )
    if not run.processes.first:
        return None
    images, unreadable = readable(images, kept.done(), run.policy, "the evaluation")
    check_categories([image.category for image in images])
    if known is not None and (count := sum(part.count for part in known.values())) != len(images):
        warnings.warn(
            f"{run.statistics} holds the statistics of {count} images, expected those of the {len(images)} that are "
            f"decoded: r{features.measure} compares with other images; delete the file, or leave --statistics out, to "
            "compare with these",
            DCDDWarning,
            stacklevel=2,
        )
    real = real_statistics(images, kept, features) if known is None else known
    if known is None and run.statistics is not None:
        save_statistics(run.statistics, real, size=size)
    scopes, singles = reconstruction_scopes(images, decoders.paths, kept, features, real, size=size)
    names = {
        "frechet": f"{features.name}, {features.fingerprint}",
        "ssim": "scikit-image, 7-pixel window, intensities 0..1",
        "perceptual": f"{perceptual.name}, {perceptual.fingerprint}",
    }
    results = results_of(
        scopes,
        images=images,
        real=real,
        settings=settings,
        networks=names,
        size=size,
        painted=_painted(decoders),
        exact={row: int(values.isinf().sum()) for row, values in singles["psnr"].items()},
        left_out=LeftOut(unreadable=unreadable, small=small),
    )
    heads = dict(zip(SCORES, ("SSIM", "PSNR", perceptual.measure))) | {"frechet": f"r{features.measure}"}
    return write_report(run.out, results, title="Reconstruction", heads=heads, command=run.command, singles=singles)


def evaluate_text(
    run: EvaluationRun,
    prompts: Sequence[Prompt],
    decoders: Decoders,
    sample: Sample,
    *,
    sampling: Mapping[str, Any],
    features: FeatureNetwork,
    references: Path | None,
    by_category: bool = False,
) -> str | None:
    """gFID (or the Frechet distance of another network) of both decoders, from the same tokens and logits.

    Images are compared at `Decoders.measured` pixels.

    Args:
        sampling: what `sample` depends on besides prompts and seeds, as plain JSON values.
        references: folder of real images, all of which are used; not needed if `run.statistics` exists.
        by_category: report each category too; the references need one sub-folder per category.

    Returns:
        The report on the first process; None on the others.

    Raises:
        ValueError: as `evaluate_reconstruction`; also if there are neither references nor statistics.
    """
    categories = [prompt.category if by_category else "" for prompt in prompts]
    if by_category and "" in categories:
        raise ValueError("some prompts have no category: leave out --by-category")
    check_categories(categories)
    size = decoders.measured
    settings = _text_settings(run, decoders, sampling)
    known = run.known_statistics(features, size)
    if known is not None:
        known = chosen_statistics(known, categories, f"--statistics {run.statistics}")
        if references is not None and run.processes.first:
            warnings.warn(
                f"{run.statistics} exists, so the images in {references} are not read: delete the file, or leave "
                "--statistics out, to compare with them",
                DCDDWarning,
                stacklevel=2,
            )
    else:
        real_images, small = _references(run, references, categories, size, by_category=by_category)
    run.hold_to(settings)

    folder = run.out / "pictures"
    jobs = prompt_jobs(prompts, folder, decoders.paths)
    generate_all(jobs, sample, decoders, run.processes, seed=run.seed, batch=run.batch, label="images")
    made = {path: generated_images(prompts, folder, path, by_category=by_category) for path in decoders.paths}
    todo = {path: (made[path], run.measurements(features.fingerprint, path, ["features"])) for path in made}
    if known is None:
        todo["references"] = (real_images, run.measurements(features.fingerprint, "references", ["features"]))
    for label, (images, kept) in todo.items():
        measure_features(
            images,
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
    left_out = NOTHING_LEFT_OUT
    if known is None:
        real_images, kept = todo["references"]
        real_images, unreadable = readable(real_images, kept.done(), run.policy, f"--references {references}")
        check_categories([image.category for image in real_images])
        todo["references"] = real_images, kept
        left_out = LeftOut(unreadable=unreadable, small=small)
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
        images=made["vq"],
        real=known,
        settings=settings,
        networks={"frechet": f"{features.name}, {features.fingerprint}"},
        size=size,
        painted=_painted(decoders),
        exact={},
        left_out=left_out,
    )
    heads = {"frechet": f"g{features.measure}"}
    return write_report(run.out, results, title="Text to image", heads=heads, command=run.command)


def generate_geneval(
    run: EvaluationRun, prompts: Sequence[Prompt], decoders: Decoders, sample: Sample, *, sampling: Mapping[str, Any]
) -> list[Path]:
    """Writes GenEval's folders, four images per prompt, one folder per decoder path; returns the folders.

    Raises:
        ValueError: if `run.out` holds images made with other settings.
    """
    folder = run.out / GENEVAL
    check_geneval(prompts, folder, decoders.paths)
    run.hold_to(_text_settings(run, decoders, sampling))
    jobs = geneval_jobs(prompts, folder, decoders.paths)
    if run.processes.first:
        for job in jobs:
            for file in job.files.values():
                remove_leftovers(file)  # GenEval's scorer would take them for images
    run.processes.wait()
    generate_all(jobs, sample, decoders, run.processes, seed=run.seed, batch=run.batch, label="GenEval")
    finish_geneval(prompts, folder, decoders.paths, run.processes)
    return [folder / path for path in decoders.paths]


def _references(
    run: EvaluationRun, folder: Path | None, categories: Sequence[str], size: int, *, by_category: bool
) -> tuple[list[ImageFile], tuple[str, ...]]:
    """The reference images, checked to cover every requested category, and the names of those that are too small."""
    if folder is None:
        where = f": {run.statistics} does not exist yet" if run.statistics is not None else ""
        raise ValueError(f"there is nothing to compare with{where}; give --references FOLDER, or existing --statistics")
    images = list_images(folder, by_category=by_category)
    images, small = large_enough(images, run.policy, size, shown=run.processes.first)
    check_categories([image.category for image in images])
    if absent := sorted(set(categories) - {image.category for image in images}):
        raise ValueError(f"--references {folder} has no sub-folder with images for {', '.join(absent[:5])}: add it")
    return images, small


def _painted(decoders: Decoders) -> dict[str, int]:
    return {PATHS[path]: side for path, side in decoders.painted.items()}


def _text_settings(run: EvaluationRun, decoders: Decoders, sampling: Mapping[str, Any]) -> dict[str, Any]:
    return {"evaluation": "text", "seed": run.seed, **sampling, **decoders.settings()}
