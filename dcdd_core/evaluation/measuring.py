"""Features of image files, and their Frechet distances overall and by category.

Shapes: M images, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add

from ..pipelines.distributed import Processes
from .frechet import FrechetStatistics, frechet_distance
from .image_folder import OVERALL, ImageFile, read_readable
from .networks import FeatureNetwork
from .results_store import Measurements

_ROWS = 1024


def tensor_name(what: str, path: str) -> str:
    """Name of a stored tensor, such as "ssim/vq" for the SSIM of the decoder path "vq"."""
    return f"{what}/{path}"


def measure_features(
    images: Sequence[ImageFile],
    name: str,
    kept: Measurements,
    processes: Processes,
    *,
    size: int,
    batch: int,
    network: FeatureNetwork,
    label: str,
) -> None:
    """Measures the features of all images that are not in `kept` yet, as squares of `size` pixels.

    Warns about images that cannot be read.
    """
    done = kept.done()
    for part in processes.batches(images, batch, done=lambda image: image.key in done, label=label):
        left = [image for image in part if image.key not in done]
        found, pixels = read_readable(left, size, device=processes.device)
        if found:
            kept.add([image.key for image in found], {name: network.features(pixels[0])})


def statistics_of(
    images: Sequence[ImageFile], kept: Measurements, name: str, network: FeatureNetwork
) -> dict[str, FrechetStatistics]:
    """Category -> statistics. Features are added in the order of `images`, whichever process measured them.

    Raises:
        ValueError: if an image has not been measured.
    """
    features = kept.gather([image.key for image in images], name)
    rows: dict[str, list[int]] = {}
    for i, image in enumerate(images):
        rows.setdefault(image.category, []).append(i)
    return {
        category: FrechetStatistics.of(features[rows[category]].split(_ROWS), network=network.fingerprint)
        for category in sorted(rows)
    }


def chosen_statistics(
    known: Mapping[str, FrechetStatistics], categories: Sequence[str], what: str
) -> dict[str, FrechetStatistics]:
    """The reference statistics of the given categories; of the whole set if there are no categories.

    Args:
        what: the source of the statistics, for error messages.

    Raises:
        ValueError: if the reference lacks a category; the message names it.
    """
    if set(categories) == {""}:
        return {"": reduce(add, known.values())}
    if missing := sorted(set(categories) - set(known)):
        has = ", ".join(name for name in sorted(known) if name) or "no categories"
        raise ValueError(
            f"{what} has no images of {', '.join(missing)} (it has {has}): leave out --by-category, or give references "
            "with a sub-folder for each category"
        )
    return {category: known[category] for category in categories}


def distances(real: Mapping[str, FrechetStatistics], made: Mapping[str, FrechetStatistics]) -> dict[str, float]:
    """Scope -> Frechet distance: "overall" for the whole set, then one for each category."""
    found = {OVERALL: frechet_distance(reduce(add, real.values()), reduce(add, made.values()))}
    return found | {category: frechet_distance(real[category], made[category]) for category in made if category}
