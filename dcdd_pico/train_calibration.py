"""Fits the calibration of pico's proxies to its Janus (Eqs. 11-16), then the anchor."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from dcdd_core.method.anchoring import condition_spread, fit_anchor_and_temperature
from dcdd_core.method.calibration import anchor_statistics, fit_anchor, fit_calibration, proxy_logits, target_statistics
from dcdd_core.models.janus.sampler import JanusSampler
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.protocols import ImageTokenizer, SamplingOptions, TokenSampler
from dcdd_core.types import Calibration, TokenLogits

from .build_context import BuildContext, Recipe, digest
from .embedded import calibration_name
from .models import load_pico
from .scene_cache import Encodings
from .scenes import render_scene, scene_facts, scene_pixels

_BATCH = 25


def fit_pico_calibration(
    context: BuildContext, sampler: JanusSampler, vq: VQTokenizer, encodings: Encodings
) -> Calibration:
    """Fits (or restores) the calibration, from samples for calibration captions and features of training scenes.

    The result is kept in the work folder, under a name that contains a hash of the sampler's weights.

    Args:
        encodings: encodings of the training scenes.
    """
    count, guidance = context.recipe.calibration_images, context.recipe.guidance
    path = context.folder / f"calibration-{digest(sampler.model)}-{guidance:g}-{count}.safetensors"
    if path.exists():
        return Calibration.load(path)
    calibration = fit_sampler(sampler, torch.from_numpy(encodings.features[:count].copy()).float(), guidance)
    calibration.save(path)
    return calibration


def scene_features(recipe: Recipe, tokenizer: ImageTokenizer) -> torch.Tensor:
    """Features [M, N, D] of the training scenes that a recipe calibrates with."""
    images = [render_scene("train", k, size=recipe.size).image for k in range(recipe.calibration_images)]
    return torch.cat([tokenizer.features(scene_pixels(image[None], tokenizer.device)) for image in images])


def fit_sampler(
    sampler: TokenSampler, features: torch.Tensor, guidance: float, *, with_temperature: bool = False
) -> Calibration:
    """Fits the proxies from scenes' features [M, N, D], and the anchor, to samples of as many calibration captions.

    Args:
        with_temperature: fit the anchor and its temperature together (`method.anchoring`).
    """
    codebook = sampler.codebook
    grids = sample_captions(sampler, len(features), guidance)
    target = target_statistics(grids)
    calibration = fit_calibration(features, codebook, target, vlm=sampler.name, guidance=guidance, temperature=1.0)
    logits = proxy_logits(features, codebook)
    side = math.isqrt(features.shape[1])
    proxies = TokenLogits(logits, logits.argmax(-1), (side, side), source="proxy", codebook=codebook.fingerprint)
    if with_temperature:
        return fit_anchor_and_temperature(
            grids, codebook, condition_spread(proxies, codebook, calibration), calibration
        )
    return fit_anchor(grids, codebook, anchor_statistics(proxies, codebook, calibration), calibration)


def fit_own_calibration(weights: Path, vlm: str, guidance: float, *, device: torch.device | str = "cpu") -> Calibration:
    """Fits another embedded VLM's calibration as for Janus, to calibration captions and training scenes; writes it.

    Args:
        weights: folder of the embedded models; their recipe gives the number of captions and scenes.
        vlm: the VLM's folder there.

    Raises:
        ValueError: if a part of the weights is missing.
    """
    pico = load_pico(weights=weights, device=device, vlm=vlm)
    calibration = fit_sampler(pico.sampler, scene_features(Recipe.load(weights), pico.tokenizer), guidance)
    calibration.save(weights / calibration_name(vlm))
    return calibration


def sample_captions(sampler: TokenSampler, count: int, guidance: float) -> list[TokenLogits]:
    """Token logits sampled for the first `count` calibration captions, in batches."""
    captions = [facts.caption() for facts in scene_facts("calibration", count)]
    return [
        sampler.sample(
            captions[k : k + _BATCH],
            seeds=range(k, min(count, k + _BATCH)),
            options=SamplingOptions(guidance=guidance),
        )
        for k in range(0, count, _BATCH)
    ]
