"""Reconstruction: pictures through the tokenizer and back by both decoders (the paper's Tables 2, 4 and 6).

Shapes: B batch, M pictures, F features, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..pipelines.distributed import Processes
from .decoding import PATHS, Decoders, seed_of
from .figures import save_image, to_image
from .frechet import FrechetStatistics
from .image_folder import OVERALL, Picture, as_measured, read_pixels
from .measuring import distances, statistics_of, tensor_name
from .metrics import psnr, ssim
from .networks import FeatureNetwork, PerceptualNetwork
from .results_store import Measurements

#: Scores of each picture against the one that it reconstructs.
SCORES = ("ssim", "psnr", "perceptual")
_REAL = "real"


def needed(paths: Sequence[str], *, with_real: bool) -> list[str]:
    """Names of the tensors that a measured picture has; `with_real` for the features of the picture itself too."""
    names = [tensor_name("features", path) for path in (*paths, *([_REAL] if with_real else []))]
    return names + [tensor_name(score, path) for path in paths for score in SCORES]


def reconstruct_all(
    pictures: Sequence[Picture],
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
    """Measures every picture that `kept` lacks.

    Args:
        size: S, of the squares that are compared: pictures are resized to it by their shorter side and cut, decoded
            ones as well. The tokenizer sees them at its own size.
        seed: with a picture's name, of its noise.
        folder: for the decoded pictures, "<folder>/<path>/<name>.png"; None to keep only the numbers.

    Raises:
        ValueError: naming a picture that cannot be read.
    """
    vq = decoders.models.tokenizer
    done = kept.done()
    for part in processes.batches(pictures, batch, done=lambda picture: picture.key in done, label="reconstruction"):
        truth = read_pixels(part, size, vq.device)
        seen = truth if size == decoders.size else read_pixels(part, decoders.size, vq.device)
        painted = decoders.paint(vq.encode(seen), [seed_of(seed, picture.name) for picture in part])
        values = {}
        if tensor_name("features", _REAL) in kept.needed:
            values[tensor_name("features", _REAL)] = features.features(truth)
        for path, decoded in painted.items():
            made = as_measured(decoded, size)
            values |= {
                tensor_name("features", path): features.features(made),
                tensor_name("ssim", path): ssim(truth, made),
                tensor_name("psnr", path): psnr(truth, made),
                tensor_name("perceptual", path): perceptual.distance(truth, made),
            }
            if folder is not None:
                for picture, pixels in zip(part, decoded):
                    save_image(to_image(pixels), folder / path / f"{picture.name}.png")
        kept.add([picture.key for picture in part], values)


def real_statistics(
    pictures: Sequence[Picture], kept: Measurements, features: FeatureNetwork
) -> dict[str, FrechetStatistics]:
    """Category -> statistics of the pictures as they are."""
    return statistics_of(pictures, kept, tensor_name("features", _REAL), features)


def reconstruction_scopes(
    pictures: Sequence[Picture],
    paths: Sequence[str],
    kept: Measurements,
    features: FeatureNetwork,
    real: Mapping[str, FrechetStatistics],
) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, dict[str, torch.Tensor]]]:
    """The numbers of the tables: scope (overall or a category) -> row -> column -> value; and for plots, score ->
    row -> values [M] of the single pictures."""
    categories = sorted({picture.category for picture in pictures if picture.category})
    keys = [picture.key for picture in pictures]
    scopes: dict[str, dict[str, dict[str, float]]] = {scope: {} for scope in (OVERALL, *categories)}
    singles: dict[str, dict[str, torch.Tensor]] = {score: {} for score in SCORES}
    for path in paths:
        made = statistics_of(pictures, kept, tensor_name("features", path), features)
        frechet = distances(real, made)
        for score in SCORES:
            singles[score][PATHS[path]] = kept.gather(keys, tensor_name(score, path)).double()
        for scope, rows in scopes.items():
            chosen = torch.tensor([scope in (OVERALL, picture.category) for picture in pictures])
            means = {score: float(singles[score][PATHS[path]][chosen].mean()) for score in SCORES}
            rows[PATHS[path]] = {"frechet": frechet[scope], **means}
    return scopes, singles
