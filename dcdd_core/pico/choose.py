"""How the decoder is served by default: the schedule, and the reading of the VLM's output, that measure best."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from diffusers import AutoencoderKL

from ..evaluation.frechet import FrechetStatistics, features_of, frechet_distance
from ..evaluation.kept import write_text
from ..models.flux import DecoderCard, DistributionConditionedDecoder
from ..models.janus import JanusSampler
from ..models.vae import KLAutoencoder
from ..models.vq import VQTokenizer
from ..pipelines.condition import condition_for, serving
from ..pipelines.decode import decode
from ..types import TokenLogits
from .data import scene_images, to_pixels
from .reader import SceneReader
from .scenes import scene_facts
from .workshop import Workshop, digest

#: Mu of the time shifts that are tried; None is FLUX's own.
SHIFTS = (None, 1.0, 1.5, 2.0, 2.5, 3.0)
READINGS: tuple[str, ...] = ("logits", "anchored", "tokens")
_BATCH = 32
_STEPS = 10
K = TypeVar("K")


@torch.no_grad()
def choose_serving(
    shop: Workshop,
    sampler: JanusSampler,
    vq: VQTokenizer,
    vae: AutoencoderKL,
    decoder: DistributionConditionedDecoder,
    loss_reader: SceneReader,
) -> DecoderCard:
    """The decoder's card, with the time shift and the reading whose pictures come closest to held-out scenes.

    All are painted with ten steps, and ten is what the card then says. First the shift, by reconstructions of the
    held-out scenes; then, with it, the VLM's logits as they are (beta = 0, the paper), the same with the fitted anchor,
    and the sampled tokens alone, by the pictures of `Recipe.choice_scenes` captions. Both by Frechet distance on the
    loss reader's features, on calibration scenes: neither the network nor the scenes that the tables are made with. The
    distances go into `serving.json`, which is read where the models are those that wrote it.
    """
    recipe, path = shop.recipe, shop.folder / "serving.json"
    of = "-".join(digest(part) for part in (sampler.model, vq.model, vae, decoder)) + f"-{recipe.choice_scenes}"
    if path.exists() and (found := json.loads(path.read_text("utf-8")))["models"] == of:
        return serving(replace(decoder.card, steps=_STEPS, shift=found["shift"]), reads=found["reads"])

    def closest(ways: Mapping[K, DecoderCard], grids: Iterator[TokenLogits], scenes: torch.Tensor) -> tuple[K, dict]:
        features: dict[K, list[torch.Tensor]] = {way: [] for way in ways}
        first = 0
        for grid in grids:
            seeds = range(first, first := first + len(grid.tokens))
            for way, card in ways.items():
                condition = condition_for(card, grid, vq.codebook)
                with shop.autocast():
                    painted = decode(
                        decoder, KLAutoencoder(vae), condition, seeds=seeds, steps=card.steps, shift=card.shift
                    ).pixels
                features[way].append(features_of(painted, loss_reader.frechet_features))
        real = FrechetStatistics.of([features_of(part, loss_reader.frechet_features) for part in scenes.split(_BATCH)])
        distances = {way: frechet_distance(real, FrechetStatistics.of(found)) for way, found in features.items()}
        return min(distances, key=distances.__getitem__), distances

    card = replace(decoder.card, steps=_STEPS)
    pictures = to_pixels(shop.held_out_images, shop.device)
    proxies = (vq.encode(part) for part in pictures.split(_BATCH))
    shift, by_shift = closest({mu: replace(card, shift=mu) for mu in SHIFTS}, proxies, pictures)
    card = replace(card, shift=shift)

    count = recipe.choice_scenes
    captions = [facts.caption() for facts in scene_facts("calibration", count)]
    sampled = (
        sampler.sample(captions[k : k + _BATCH], seeds=range(k, min(count, k + _BATCH)), guidance=recipe.guidance)
        for k in range(0, count, _BATCH)
    )
    pictures = to_pixels(scene_images(shop.folder, "calibration", count, size=recipe.size), shop.device)
    reads, by_reading = closest({way: serving(card, reads=way) for way in READINGS}, sampled, pictures)
    found = {"models": of, "shift": shift, "reads": reads, "by shift": list(by_shift.items()), "by reading": by_reading}
    write_text(path, json.dumps(found, indent=1) + "\n")
    return serving(card, reads=reads)
