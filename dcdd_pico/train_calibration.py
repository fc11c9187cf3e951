"""Fits the calibration of pico's proxies to its Janus (Eqs. 11-16), then the anchor."""

from __future__ import annotations

import math

import torch

from dcdd_core.method.calibration import anchor_statistics, fit_anchor, fit_calibration, proxy_logits, target_statistics
from dcdd_core.models.janus.sampler import JanusSampler
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import Calibration, TokenLogits

from .build_context import BuildContext, digest
from .scene_cache import Encodings
from .scenes import scene_facts

_BATCH = 25


def fit_pico_calibration(
    context: BuildContext, sampler: JanusSampler, vq: VQTokenizer, encodings: Encodings
) -> Calibration:
    """Fits (or restores) the calibration, from samples of calibration captions and features of training scenes.

    The result is kept in the work folder, under a name with the hash of the sampler's weights.

    Args:
        encodings: of the training scenes.
    """
    count, guidance = context.recipe.calibration_images, context.recipe.guidance
    path = context.folder / f"calibration-{digest(sampler.model)}-{guidance:g}-{count}.safetensors"
    if path.exists():
        return Calibration.load(path)
    features = torch.from_numpy(encodings.features[:count].copy()).float()
    grids = sample_captions(sampler, context, count)
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


def sample_captions(sampler: JanusSampler, context: BuildContext, count: int) -> list[TokenLogits]:
    """Token logits sampled for the first `count` calibration captions, in batches."""
    captions = [facts.caption() for facts in scene_facts("calibration", count)]
    return [
        sampler.sample(
            captions[k : k + _BATCH],
            seeds=range(k, min(count, k + _BATCH)),
            options=SamplingOptions(guidance=context.recipe.guidance),
        )
        for k in range(0, count, _BATCH)
    ]
