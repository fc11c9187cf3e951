"""How the decoder is served by default: the schedule, and the reading of the VLM's output, that measure best."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm

from dcdd_core.evaluation.frechet import FrechetStatistics, features_of, frechet_distance
from dcdd_core.files import write_text
from dcdd_core.models.card import DecoderCard
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.models.janus.sampler import JanusSampler
from dcdd_core.models.vae import KLCodec
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.pipelines.condition import condition_for, serving
from dcdd_core.pipelines.decode import decode
from dcdd_core.protocols import SamplingOptions

from .build_context import Workshop, digest
from .reader import FACTS, SceneReader, fact_labels
from .scene_arrays import scene_images
from .scenes import SceneFacts, scene_facts, scene_pixels

#: Mu of the time shifts that are tried after FLUX's own, as long as that is better than all before.
SHIFTS = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
_BATCH = 32
_STEPS = 10


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

    All are painted with ten steps, and ten is what the card then says. First the shift, with anchored logits (`climb`);
    then, with it, the VLM's logits as they are (beta = 0, the paper) and the sampled tokens alone besides. What is
    painted are `Recipe.choice_scenes` captions of calibration scenes, and it has to show what they say too: so the
    measure is the Frechet joint distance (DeVries et al. 2019, arXiv 1907.08175), each picture's features continued by
    its caption's facts. It sees with the loss reader: neither the network nor the scenes that the tables are made with.
    The distances go into `serving.json`, which is read where the models are those that wrote it.
    """
    recipe, path = shop.recipe, shop.folder / "serving.json"
    card = serving(replace(decoder.card, steps=_STEPS, shift=None), reads="anchored")
    of = [digest(part) for part in (sampler.model, vq.model, vae, decoder)]
    of += [json.loads(json.dumps(asdict(card))), recipe.choice_scenes, recipe.guidance, SHIFTS]
    of = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]
    if path.exists() and (found := json.loads(path.read_text("utf-8")))["models"] == of:
        return serving(replace(card, shift=found["shift"]), reads=found["reads"])
    if recipe.compiled:
        decoder.transformer.compile_repeated_blocks(dynamic=False)

    count = recipe.choice_scenes
    facts = scene_facts("calibration", count)
    parts = [range(k, min(count, k + _BATCH)) for k in range(0, count, _BATCH)]
    grids = [
        sampler.sample(
            [facts[k].caption() for k in part], seeds=part, options=SamplingOptions(guidance=recipe.guidance)
        )
        for part in tqdm(parts, desc="captions", unit="batch", disable=None)
    ]
    scenes = scene_pixels(scene_images(shop.folder, "calibration", count, size=recipe.size), shop.device)
    real = torch.cat([features_of(scenes[part.start : part.stop], loss_reader.frechet_features) for part in parts])
    said = said_beside(real, facts)
    statistics = FrechetStatistics.of([torch.cat([real, said], dim=1)])

    def distance(card: DecoderCard) -> float:
        made = []
        for part, grid in zip(parts, grids, strict=True):
            condition = condition_for(card, grid, vq.codebook)
            with shop.autocast():
                painted = decode(decoder, KLCodec(vae), condition, seeds=part, steps=card.steps, shift=card.shift)
            made.append(features_of(painted.pixels, loss_reader.frechet_features))
        return frechet_distance(statistics, FrechetStatistics.of([torch.cat([torch.cat(made), said], dim=1)]))

    by_shift, by_reading = climb(card, distance)
    shift, reads = (min(found, key=found.__getitem__) for found in (by_shift, by_reading))
    found = {"models": of, "shift": shift, "reads": reads, "by shift": list(by_shift.items()), "by reading": by_reading}
    write_text(path, json.dumps(found, indent=1) + "\n")
    return serving(replace(card, shift=shift), reads=reads)


def climb(
    card: DecoderCard, distance: Callable[[DecoderCard], float]
) -> tuple[dict[float | None, float], dict[str, float]]:
    """Distances by shift, of a card that reads anchored logits, and by reading, with the best shift.

    The first shift is None, FLUX's own; after it they grow until one is no better than the best before it.
    """
    by_shift: dict[float | None, float] = {None: distance(replace(card, shift=None))}
    for shift in SHIFTS:
        best = min(by_shift.values())
        by_shift[shift] = distance(replace(card, shift=shift))
        if by_shift[shift] >= best:
            break
    best = min(by_shift, key=by_shift.__getitem__)
    card = replace(card, shift=best)
    by_reading = {reads: distance(serving(card, reads=reads)) for reads in ("logits", "tokens")}
    return by_shift, {"anchored": by_shift[best]} | by_reading


def said_beside(features: torch.Tensor, facts: list[SceneFacts]) -> torch.Tensor:
    """What captions say, to continue their pictures' features [N, F]: [N, answers], one-hot, of the same mean norm."""
    answers = [F.one_hot(found, len(FACTS[name])) for name, found in fact_labels(facts).items()]
    said = torch.cat(answers, dim=1).to(features)
    return said * (features.norm(dim=1).mean() / said.norm(dim=1).mean())
