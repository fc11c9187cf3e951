"""Features of image files, and their Frechet distances overall and by category.

Shapes: M images, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add

from ..pipelines.distributed import Processes
from .frechet import FrechetSet, FrechetStatistics, frechet_distance, smallest_set
from .image_folder import OVERALL, ImageFile, read_readable
from .networks import FeatureNetwork
from .results_store import Measurements


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
) -> dict[str, FrechetSet]:
    """Category -> its images. Features are added in the order of `images`, whichever process measured them.

    Raises:
        ValueError: if an image has not been measured.
    """
    features = kept.gather([image.key for image in images], name)
    rows: dict[str, list[int]] = {}
    for i, image in enumerate(images):
        rows.setdefault(image.category, []).append(i)
    return {category: smallest_set(features[rows[category]], network=network.fingerprint) for category in sorted(rows)}


def chosen_statistics(known: Mapping[str, FrechetSet], categories: Sequence[str], what: str) -> dict[str, FrechetSet]:
    """The reference statistics of the given categories; of the whole set if there are no categories.

    Args:
        what: the source of the statistics, for error messages.

    Raises:
        ValueError: if the reference lacks a category; the message names it.
    """
    if set(categories) == {""}:
        return {"": _union(known)}
    if missing := sorted(set(categories) - set(known)):
        has = ", ".join(name for name in sorted(known) if name) or "no categories"
        raise ValueError(
            f"{what} has no images of {', '.join(missing)} (it has {has}): leave out --by-category, or give references "
            "with a sub-folder for each category"
        )
    return {category: known[category] for category in categories}


def distances(real: Mapping[str, FrechetSet], made: Mapping[str, FrechetSet]) -> dict[str, float]:
    """Scope -> Frechet distance: "overall" for the whole set, then one for each category, one after the other."""
    found = {OVERALL: frechet_distance(_union(real), _union(made))}
    return found | {
        category: frechet_distance(real[category].statistics(), made[category].statistics())
        for category in made
        if category
    }


def _union(sets: Mapping[str, FrechetSet]) -> FrechetStatistics:
    return reduce(add, (part.statistics() for part in sets.values()))
