"""Measures the pico Janus and calibrates the proxies to it (Eqs. 11-16), then fits the anchor."""

from __future__ import annotations

import math

import torch

from dcdd_core.method.calibration import anchor_statistics, fit_anchor, fit_calibration, proxy_logits, target_statistics
from dcdd_core.models.janus.sampler import JanusSampler
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import Calibration, TokenLogits

from .build_context import Workshop, digest
from .scene_cache import Encodings
from .scenes import scene_facts

_BATCH = 25


def calibrate(shop: Workshop, sampler: JanusSampler, vq: VQTokenizer, encodings: Encodings) -> Calibration:
    """Calibration for the recipe's guidance, from pictures of calibration captions and features of training scenes.

    `encodings` are of the training scenes. The result is kept in the folder, under a name of what it belongs to, and
    restored from it.
    """
    count, guidance = shop.recipe.calibration_images, shop.recipe.guidance
    path = shop.folder / f"calibration-{digest(sampler.model)}-{guidance:g}-{count}.safetensors"
    if path.exists():
        return Calibration.load(path)
    features = torch.from_numpy(encodings.features[:count].copy()).float()
    grids = sample_captions(sampler, shop, count)
    target = target_statistics(grids)
    calibration = fit_calibration(
        features,
        vq.codebook,
        target,
        vlm=sampler.name,
        guidance=guidance,
        temperature=1.0,
    )
    logits = proxy_logits(features, vq.codebook)
    side = math.isqrt(features.shape[1])
    proxies = TokenLogits(logits, logits.argmax(-1), (side, side), source="proxy", codebook=vq.codebook.fingerprint)
    calibration = fit_anchor(grids, vq.codebook, anchor_statistics(proxies, vq.codebook, calibration), calibration)
    calibration.save(path)
    return calibration


def sample_captions(sampler: JanusSampler, shop: Workshop, count: int) -> list[TokenLogits]:
    """Token logits of the first `count` calibration captions, in batches."""
    captions = [facts.caption() for facts in scene_facts("calibration", count)]
    return [
        sampler.sample(
            captions[k : k + _BATCH],
            seeds=range(k, min(count, k + _BATCH)),
            options=SamplingOptions(guidance=shop.recipe.guidance),
        )
        for k in range(0, count, _BATCH)
    ]
