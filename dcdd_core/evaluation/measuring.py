"""Features of folders of pictures, and Frechet distances overall and by category.

Shapes: M pictures, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add

from ..pipelines.distributed import Processes
from .frechet import FrechetStatistics, frechet_distance
from .image_folder import OVERALL, Picture, read_pixels
from .networks import FeatureNetwork
from .results_store import Measurements

_ROWS = 1024


def tensor_name(what: str, path: str) -> str:
    """How measurements of a path are filed: "ssim/vq"."""
    return f"{what}/{path}"


def measure_features(
    pictures: Sequence[Picture],
    name: str,
    kept: Measurements,
    processes: Processes,
    *,
    size: int,
    batch: int,
    network: FeatureNetwork,
    label: str,
) -> None:
    """Measures the features of every picture that `kept` lacks, as squares of `size` pixels.

    Raises:
        ValueError: naming a picture that cannot be read.
    """
    done = kept.done()
    for part in processes.batches(pictures, batch, done=lambda picture: picture.key in done, label=label):
        features = network.features(read_pixels(part, size, processes.device))
        kept.add([picture.key for picture in part], {name: features})


def statistics_of(
    pictures: Sequence[Picture], kept: Measurements, name: str, network: FeatureNetwork
) -> dict[str, FrechetStatistics]:
    """Category -> statistics, added up in the order of the pictures whoever measured them.

    Raises:
        ValueError: if a picture is not measured.
    """
    features = kept.gather([picture.key for picture in pictures], name)
    rows: dict[str, list[int]] = {}
    for i, picture in enumerate(pictures):
        rows.setdefault(picture.category, []).append(i)
    return {
        category: FrechetStatistics.of(features[rows[category]].split(_ROWS), network=network.fingerprint)
        for category in sorted(rows)
    }


def chosen_statistics(
    known: Mapping[str, FrechetStatistics], categories: Sequence[str], what: str
) -> dict[str, FrechetStatistics]:
    """Of the reference statistics, those of the categories in question; without categories, all together.

    Raises:
        ValueError: naming categories that the reference lacks.
    """
    if set(categories) == {""}:
        return {"": reduce(add, known.values())}
    if missing := sorted(set(categories) - set(known)):
        has = ", ".join(name for name in sorted(known) if name) or "no categories"
        raise ValueError(
            f"{what} has no pictures of {', '.join(missing)} (it has {has}): measure without --by-category, or give "
            "references with a sub-folder for each category"
        )
    return {category: known[category] for category in categories}


def distances(real: Mapping[str, FrechetStatistics], made: Mapping[str, FrechetStatistics]) -> dict[str, float]:
    """Scope -> Frechet distance: "overall" of all categories together, then of each."""
    found = {OVERALL: frechet_distance(reduce(add, real.values()), reduce(add, made.values()))}
    return found | {category: frechet_distance(real[category], made[category]) for category in made if category}
