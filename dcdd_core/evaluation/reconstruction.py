"""Reconstruction: images encoded by the tokenizer and decoded by both decoders (the paper's Tables 2, 4 and 6).

Shapes: B batch, M images, F features, S side in pixels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..pipelines.distributed import Processes
from ..pipelines.progress import ProgressBar
from ..types import DCDDWarning
from .decoding import PATHS, Decoders, seed_of
from .figures import save_image, to_image
from .frechet import FrechetSet
from .image_folder import OVERALL, ImageFile, as_measured, read_readable
from .measuring import distances, statistics_of, tensor_name
from .metrics import psnr, ssim
from .networks import FeatureNetwork, PerceptualNetwork
from .results_store import Measurements

#: Per-image scores of a reconstruction against its original.
SCORES = ("ssim", "psnr", "perceptual")
_REAL = "real"


def needed(paths: Sequence[str], *, with_real: bool) -> list[str]:
    """Names of the tensors stored for a measured image; with `with_real`, the original image's features too."""
    names = [tensor_name("features", path) for path in (*paths, *([_REAL] if with_real else []))]
    return names + [_score_name(score, path) for path in paths for score in SCORES]


def _score_name(score: str, path: str) -> str:
    """Under "ssim" alone, older versions kept SSIM of intensities around 0, which is another number."""
    return tensor_name("ssim of 0..1" if score == "ssim" else score, path)


def reconstruct_all(
    images: Sequence[ImageFile],
    decoders: Decoders,
    kept: Measurements,
    processes: Processes,
    *,
    size: int,
    seed: int,
    batch: int,
    features: FeatureNetwork,
    perceptual: PerceptualNetwork,
    folder: Path | None = None,
) -> None:
    """Measures all images that are not in `kept` yet; warns about those that cannot be read.

    Args:
        size: S, the side of the squares that are compared. Originals and reconstructions are resized by their shorter
            side and cropped. The tokenizer sees the images at its own size.
        seed: combined with an image's name into the seed of its noise.
        folder: where to write the decoded images as "<folder>/<path>/<name>.png"; None to keep only the scores.
    """
    vq = decoders.models.tokenizer
    done = kept.done()
    if folder is not None and processes.first:
        bar = ProgressBar(images, label="pictures, done before", unit="image")
        measured = [image.name for image in bar if image.key in done]
        files = [folder / path / f"{name}.png" for name in measured for path in decoders.paths]
        if absent := sum(not file.exists() for file in files):
            warnings.warn(
                f"{absent} pictures are not written, since their images have been measured without them: give another "
                "--out to get all",
                DCDDWarning,
                stacklevel=3,
            )
    for batched in processes.batches(images, batch, done=lambda image: image.key in done, label="reconstruction"):
        # The other images in the batch of an unreadable one may be done already.
        left = [image for image in batched if image.key not in done]
        part, pixels = read_readable(left, size, decoders.size, device=vq.device)
        if not part:
            continue
        truth, seen = pixels
        painted = decoders.paint(vq.encode(seen), [seed_of(seed, image.name) for image in part])
        values = {}
        if tensor_name("features", _REAL) in kept.needed:
            values[tensor_name("features", _REAL)] = features.features(truth)
        for path, decoded in painted.items():
            made = as_measured(decoded, size)
            values |= {
                tensor_name("features", path): features.features(made),
                _score_name("ssim", path): ssim(truth, made),
                _score_name("psnr", path): psnr(truth, made),
                _score_name("perceptual", path): perceptual.distance(truth, made),
            }
            if folder is not None:
                for image, pixels in zip(part, decoded):
                    save_image(to_image(pixels), folder / path / f"{image.name}.png")
        kept.add([image.key for image in part], values)


def real_statistics(images: Sequence[ImageFile], kept: Measurements, features: FeatureNetwork) -> dict[str, FrechetSet]:
    """Category -> statistics of the original images."""
    return statistics_of(images, kept, tensor_name("features", _REAL), features)


def reconstruction_scopes(
    images: Sequence[ImageFile],
    paths: Sequence[str],
    kept: Measurements,
    features: FeatureNetwork,
    real: Mapping[str, FrechetSet],
    *,
    size: int,
) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, dict[str, torch.Tensor]]]:
    """The values of the tables: scope ("overall" or a category) -> row -> column -> value.

    The PSNR of an exact reconstruction is infinite, and so would be every mean with it. In means it counts as the best
    that two different images of 8 bits can have, which differ by one level in one channel of one pixel.

    Args:
        size: S, at which the images were compared.

    Returns:
        The scopes; and for plots, score -> row -> values [M], one per image; PSNR is infinite for exact ones.
    """
    best_psnr = 10 * math.log10(4 * 3 * size**2 / (2 / 255) ** 2)
    categories = sorted({image.category for image in images if image.category})
    keys = [image.key for image in images]
    scopes: dict[str, dict[str, dict[str, float]]] = {scope: {} for scope in (OVERALL, *categories)}
    singles: dict[str, dict[str, torch.Tensor]] = {score: {} for score in SCORES}
    for path in paths:
        made = statistics_of(images, kept, tensor_name("features", path), features)
        frechet = distances(real, made)
        for score in SCORES:
            singles[score][PATHS[path]] = kept.gather(keys, _score_name(score, path)).double()
        for scope, rows in scopes.items():
            chosen = torch.tensor([scope in (OVERALL, image.category) for image in images])
            values = {score: singles[score][PATHS[path]][chosen] for score in SCORES}
            values["psnr"] = values["psnr"].clamp(max=best_psnr)
            means = {score: float(found.mean()) for score, found in values.items()}
            rows[PATHS[path]] = {"frechet": frechet[scope], **means}
    return scopes, singles
