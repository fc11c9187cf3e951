"""Chooses how the decoder is served by default: the time shift, and how the VLM's output is read."""

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

from .build_context import BuildContext, digest
from .reader import FACTS, SceneReader, fact_labels
from .scene_arrays import scene_images
from .scenes import SceneFacts, scene_facts, scene_pixels

#: Time shifts (mu) to try after FLUX's own, until one is no improvement.
SHIFTS = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
_BATCH = 32
_STEPS = 10


@torch.no_grad()
def choose_serving(
    context: BuildContext,
    sampler: JanusSampler,
    vq: VQTokenizer,
    vae: AutoencoderKL,
    decoder: DistributionConditionedDecoder,
    loss_reader: SceneReader,
) -> DecoderCard:
    """The decoder's card, with the time shift and reading whose images are closest to held-out scenes.

    All candidates decode with ten steps, which the card then records. The shift is chosen first, with anchored logits;
    then the reading: anchored logits, the VLM's logits (beta = 0, as in the paper), or the sampled tokens alone
    (`search_serving`). The images are generated for `Recipe.choice_scenes` captions of calibration scenes and compared
    by the Frechet joint distance (DeVries et al. 2019, arXiv 1907.08175), on features concatenated with the caption's
    facts, so that images must also match their captions. Features are those of the loss reader. Neither that network
    nor these scenes are used for the tables. The distances are kept in `serving.json`, and reused for the same models.
    """
    recipe, path = context.recipe, context.folder / "serving.json"
    card = serving(replace(decoder.card, steps=_STEPS, shift=None), reads="anchored")
    inputs = [digest(part) for part in (sampler.model, vq.model, vae, decoder)]
    inputs += [json.loads(json.dumps(asdict(card))), recipe.choice_scenes, recipe.guidance, SHIFTS]
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]
    if path.exists() and (found := json.loads(path.read_text("utf-8")))["models"] == key:
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
    scenes = scene_pixels(scene_images(context.folder, "calibration", count, size=recipe.size), context.device)
    real = torch.cat([features_of(scenes[part.start : part.stop], loss_reader.frechet_features) for part in parts])
    encoded_facts = fact_features(real, facts)
    statistics = FrechetStatistics.of([torch.cat([real, encoded_facts], dim=1)])

    def distance(card: DecoderCard) -> float:
        made = []
        for part, grid in zip(parts, grids, strict=True):
            condition = condition_for(card, grid, vq.codebook)
            with context.autocast():
                painted = decode(decoder, KLCodec(vae), condition, seeds=part, steps=card.steps, shift=card.shift)
            made.append(features_of(painted.pixels, loss_reader.frechet_features))
        return frechet_distance(statistics, FrechetStatistics.of([torch.cat([torch.cat(made), encoded_facts], dim=1)]))

    by_shift, by_reading = search_serving(card, distance)
    shift, reads = (min(found, key=found.__getitem__) for found in (by_shift, by_reading))
    found = {
        "models": key,
        "shift": shift,
        "reads": reads,
        "by shift": list(by_shift.items()),
        "by reading": by_reading,
    }
    write_text(path, json.dumps(found, indent=1) + "\n")
    return serving(replace(card, shift=shift), reads=reads)


def search_serving(
    card: DecoderCard, distance: Callable[[DecoderCard], float]
) -> tuple[dict[float | None, float], dict[str, float]]:
    """Distances by shift, for a card that reads anchored logits, and by reading, with the best shift.

    The first shift is None, FLUX's own. The search stops at the first of `SHIFTS` that is no improvement.
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


def fact_features(features: torch.Tensor, facts: list[SceneFacts]) -> torch.Tensor:
    """Captions' facts one-hot [N, answers], scaled to the mean norm of the image features [N, F] they are joined to."""
    answers = [F.one_hot(found, len(FACTS[name])) for name, found in fact_labels(facts).items()]
    encoded = torch.cat(answers, dim=1).to(features)
    return encoded * (features.norm(dim=1).mean() / encoded.norm(dim=1).mean())
