"""How the decoder is served by default: the schedule, and the reading of the VLM's output, that measure best."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
import torch.nn.functional as F
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
from .reader import FACTS, SceneReader, fact_labels
from .scenes import SceneFacts, scene_facts
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

    All are painted with ten steps, and ten is what the card then says. First the shift: the Frechet distance of
    reconstructions to the held-out scenes. Then, with it, the VLM's logits as they are (beta = 0, the paper), the same
    with the fitted anchor, and the sampled tokens alone. `Recipe.choice_scenes` captions are painted, and have to show
    what they say too: so it is the Frechet joint distance (DeVries et al. 2019, arXiv 1907.08175), each picture's
    features continued by its caption's facts. Both on the loss reader's features and calibration scenes: neither the
    network nor the scenes that the tables are made with. The distances go into `serving.json`, which is read where the
    models are those that wrote it.
    """
    recipe, path = shop.recipe, shop.folder / "serving.json"
    of = "-".join(digest(part) for part in (sampler.model, vq.model, vae, decoder)) + f"-{recipe.choice_scenes}"
    if path.exists() and (found := json.loads(path.read_text("utf-8")))["models"] == of:
        return serving(replace(decoder.card, steps=_STEPS, shift=found["shift"]), reads=found["reads"])

    def closest(
        ways: Mapping[K, DecoderCard],
        grids: Iterator[TokenLogits],
        scenes: torch.Tensor,
        facts: list[SceneFacts] | None = None,
    ) -> tuple[K, dict[K, float]]:
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
        real = torch.cat([features_of(part, loss_reader.frechet_features) for part in scenes.split(_BATCH)])
        said = real[:, :0] if facts is None else said_beside(real, facts)
        statistics = FrechetStatistics.of([torch.cat([real, said], dim=1)])
        distances = {
            way: frechet_distance(statistics, FrechetStatistics.of([torch.cat([torch.cat(found), said], dim=1)]))
            for way, found in features.items()
        }
        return min(distances, key=distances.__getitem__), distances

    card = replace(decoder.card, steps=_STEPS)
    pictures = to_pixels(shop.held_out_images, shop.device)
    proxies = (vq.encode(part) for part in pictures.split(_BATCH))
    shift, by_shift = closest({mu: replace(card, shift=mu) for mu in SHIFTS}, proxies, pictures)
    card = replace(card, shift=shift)

    count = recipe.choice_scenes
    facts = scene_facts("calibration", count)
    captions = [one.caption() for one in facts]
    sampled = (
        sampler.sample(captions[k : k + _BATCH], seeds=range(k, min(count, k + _BATCH)), guidance=recipe.guidance)
        for k in range(0, count, _BATCH)
    )
    pictures = to_pixels(scene_images(shop.folder, "calibration", count, size=recipe.size), shop.device)
    reads, by_reading = closest({way: serving(card, reads=way) for way in READINGS}, sampled, pictures, facts)
    found = {"models": of, "shift": shift, "reads": reads, "by shift": list(by_shift.items()), "by reading": by_reading}
    write_text(path, json.dumps(found, indent=1) + "\n")
    return serving(card, reads=reads)


def said_beside(features: torch.Tensor, facts: list[SceneFacts]) -> torch.Tensor:
    """What captions say, to continue their pictures' features [N, F]: [N, answers], one-hot, of the same mean norm."""
    answers = [F.one_hot(found, len(FACTS[name])) for name, found in fact_labels(facts).items()]
    said = torch.cat(answers, dim=1).to(features)
    return said * (features.norm(dim=1).mean() / said.norm(dim=1).mean())
