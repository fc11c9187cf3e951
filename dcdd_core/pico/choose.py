"""Which reading of the VLM's output the decoder is served by default: the one that measures best."""

from __future__ import annotations

import json
from dataclasses import replace

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
from .data import to_pixels
from .reader import SceneReader
from .workshop import Workshop, digest

_BATCH = 32
_STEPS = 10


@torch.no_grad()
def choose_reading(
    shop: Workshop,
    sampler: JanusSampler,
    vq: VQTokenizer,
    vae: AutoencoderKL,
    decoder: DistributionConditionedDecoder,
    loss_reader: SceneReader,
) -> DecoderCard:
    """The decoder's card, with the reading whose pictures of held-out captions come closest to the held-out scenes.

    All are painted with ten steps, and ten is what the card then says. Compared are the VLM's logits as they are
    (beta = 0, the paper), the same with the fitted anchor, and the sampled tokens alone; by Frechet distance on the
    loss reader's features, on calibration scenes: neither the network nor the scenes that the tables are made with. The
    distances go into `reading.json`, which is read where the models are those that wrote it.
    """
    card, count = decoder.card, shop.recipe.held_out_scenes
    path, of = shop.folder / "reading.json", "-".join(digest(part) for part in (sampler.model, vq.model, vae, decoder))
    if path.exists() and (found := json.loads(path.read_text("utf-8")))["models"] == of:
        return replace(serving(card, reads=found["best"]), steps=_STEPS)
    ways = {reads: serving(card, reads=reads) for reads in ("logits", "anchored", "tokens")}
    captions = [facts.caption() for facts in shop.held_out_facts]
    features: dict[str, list[torch.Tensor]] = {name: [] for name in ways}
    for k in range(0, count, _BATCH):
        seeds = range(k, min(count, k + _BATCH))
        grid = sampler.sample(captions[k : k + _BATCH], seeds=seeds, guidance=shop.recipe.guidance)
        for name, way in ways.items():
            condition = condition_for(way, grid, vq.codebook)
            painted = decode(decoder, KLAutoencoder(vae), condition, seeds=seeds, steps=_STEPS).pixels
            features[name].append(features_of(painted, loss_reader.frechet_features))
    scenes = to_pixels(shop.held_out_images, shop.device)
    real = FrechetStatistics.of([features_of(scenes, loss_reader.frechet_features)])
    distances = {name: frechet_distance(real, FrechetStatistics.of(found)) for name, found in features.items()}
    best = min(distances, key=lambda name: distances[name])
    write_text(path, json.dumps({"models": of, "frechet": distances, "best": best}, indent=1) + "\n")
    return replace(ways[best], steps=_STEPS)
