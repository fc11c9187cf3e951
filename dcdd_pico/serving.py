"""Chooses how the decoder is served by default: time shift, how the VLM's output is read, guidance on the condition.

`python -m dcdd_pico.serving` does so for existing weights, for example after training a new Janus: it chooses Janus'
guidance, calibrates to samples at that guidance, chooses shift and reading, and writes the card into the decoder's
file. Two networks judge: the second scene reader, which is trained first if the work folder has none, and the text
detector (`ruler`, the extra `ruler`). `--only-calibrate` chooses nothing: it calibrates to the existing Janus, in a few
minutes.

With a time shift mu, the last of n steps begins at t = e^mu / (e^mu + n - 1): for ten steps, .15 at FLUX's mu of .48,
.33 at 1.5, .45 at 2, .58 at 2.5 and .69 at 3, where one step has to add all detail. `--last-step` limits this time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm

from dcdd_core.evaluation.frechet import FrechetStatistics, features_of, frechet_distance
from dcdd_core.files import write_text
from dcdd_core.method.flow import timesteps
from dcdd_core.models.bundle import DecoderOptions, load_decoder, save_bundle
from dcdd_core.models.card import DecoderCard
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.models.vae import KLCodec
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.pipelines.calibrate import verdict
from dcdd_core.pipelines.condition import condition_for, serving
from dcdd_core.pipelines.decode import decode
from dcdd_core.pipelines.load import Models
from dcdd_core.protocols import SamplingOptions, TokenSampler
from dcdd_core.settings import require_number
from dcdd_core.types import Calibration, TokenLogits

from .build_context import BuildContext, digest, stage_context, stage_parser
from .embedded import model_paths
from .models import load_pico
from .reader import FACTS, SceneReader, fact_labels
from .ruler import TextDetectorRuler
from .scene_arrays import scene_images
from .scenes import SceneFacts, scene_facts, scene_pixels
from .train_calibration import fit_sampler, scene_features
from .train_reader import train_loss_reader

#: Time shifts (mu) to try after FLUX's own, until one brings no improvement.
SHIFTS = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
#: Guidances on the condition (w) to try after none, until one brings no improvement.
CONDITION_GUIDANCES = (1.25, 1.5, 2.0, 3.0)
#: Guidances of Janus' sampling to compare.
GUIDANCES = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
_BATCH = 32
_STEPS = 10


def judges(context: BuildContext) -> dict[str, SceneReader | TextDetectorRuler]:
    """The networks that choose: the second scene reader, which measures no table, and the text detector.

    Raises:
        ValueError: if the packages of the text detector are missing.
    """
    detector = TextDetectorRuler(threads=torch.get_num_threads())
    return {"second reader": train_loss_reader(context), "text detector": detector}


@dataclass(frozen=True)
class JointDistance:
    """Frechet joint distances (DeVries et al. 2019, arXiv 1907.08175) of images for calibration captions.

    The features are concatenated with the caption's facts, so that images must also match their captions. Images are
    compared with `Recipe.choice_scenes` calibration scenes, which the tables do not use.

    Attributes:
        networks: name -> network that gives the features.
    """

    context: BuildContext
    networks: Mapping[str, SceneReader | TextDetectorRuler]

    @cached_property
    def facts(self) -> list[SceneFacts]:
        return scene_facts("calibration", self.context.recipe.choice_scenes)

    @cached_property
    def parts(self) -> list[range]:
        """Batches of captions."""
        count = len(self.facts)
        return [range(k, min(count, k + _BATCH)) for k in range(0, count, _BATCH)]

    @cached_property
    def _real(self) -> dict[str, torch.Tensor]:
        size = self.context.recipe.size
        images = scene_images(self.context.folder, "calibration", len(self.facts), size=size)
        return self._features(scene_pixels(images[part.start : part.stop], self.context.device) for part in self.parts)

    @cached_property
    def _encoded_facts(self) -> dict[str, torch.Tensor]:
        return {name: fact_features(real, self.facts) for name, real in self._real.items()}

    def _features(self, batches: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = {name: [] for name in self.networks}
        for pixels in batches:
            for name, network in self.networks.items():
                parts[name].append(features_of(pixels, network.frechet_features))
        return {name: torch.cat(found) for name, found in parts.items()}

    def samples(self, sampler: TokenSampler, options: SamplingOptions) -> list[TokenLogits]:
        """What a sampler gives for the captions, in batches; an image's seed is its caption's number."""
        return [
            sampler.sample([self.facts[k].caption() for k in part], seeds=part, options=options)
            for part in tqdm(self.parts, desc=f"captions, guidance {options.guidance:g}", unit="batch", disable=None)
        ]

    def of(
        self, image: Callable[[range, TokenLogits], torch.Tensor], samples: Sequence[TokenLogits]
    ) -> dict[str, float]:
        """The distances of the images [B, 3, S, S] that `image` makes from samples, by network."""
        made = self._features(image(part, grid) for part, grid in zip(self.parts, samples, strict=True))
        found = {}
        for name, real in self._real.items():
            pairs = ([features, self._encoded_facts[name]] for features in (real, made[name]))
            found[name] = frechet_distance(*(FrechetStatistics.of([torch.cat(pair, dim=1)]) for pair in pairs))
        return found


def overall(distances: Mapping[str, float]) -> float:
    """Geometric mean of the networks' distances, whose scales differ: halving one counts as much as halving another."""
    return math.prod(max(0.0, value) for value in distances.values()) ** (1 / len(distances))


def painter(
    context: BuildContext,
    vq: VQTokenizer,
    vae: AutoencoderKL,
    decoder: DistributionConditionedDecoder,
    card: DecoderCard,
) -> Callable[[range, TokenLogits], torch.Tensor]:
    """A function that paints samples as a card says; an image's seed is its caption's number."""

    def image(part: range, grid: TokenLogits) -> torch.Tensor:
        condition = condition_for(card, grid, vq.codebook)
        # In a card, a shift of None is the backbone's own; passed to `decode`, it would be that of the decoder's card.
        before, decoder.card = decoder.card, card
        try:
            with context.autocast():
                return decode(decoder, KLCodec(vae), condition, seeds=part).pixels
        finally:
            decoder.card = before

    return image


@torch.no_grad()
def choose_serving(
    context: BuildContext,
    sampler: TokenSampler,
    vq: VQTokenizer,
    vae: AutoencoderKL,
    decoder: DistributionConditionedDecoder,
    networks: Mapping[str, SceneReader | TextDetectorRuler],
    *,
    latest: float = 1.0,
) -> DecoderCard:
    """The decoder's card, with the time shift, reading and guidance whose images are closest to held-out scenes.

    All candidates decode with ten steps, which the card then records. First the shift is chosen, with anchored logits;
    then the reading: anchored logits, the VLM's logits (beta = 0, as in the paper), or the sampled tokens alone
    (`search_serving`); then, for a decoder with a null condition, guidance on the condition. The criterion is always
    the `overall` `JointDistance` of both networks. Distances are kept in `serving.json` and reused for the same models.

    Args:
        networks: the networks that judge (`judges`).
        latest: see `search_serving`.
    """
    recipe, path = context.recipe, context.folder / "serving.json"
    card = serving(replace(decoder.card, steps=_STEPS, shift=None, condition_guidance=1.0), reads="anchored")
    inputs = [digest(part) for part in (sampler.model, vq.model, vae, decoder)]
    inputs += [json.loads(json.dumps(asdict(card))), recipe.choice_scenes, recipe.guidance, SHIFTS, latest]
    inputs += sorted(networks)
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]
    if path.exists() and (found := json.loads(path.read_text("utf-8")))["models"] == key:
        chosen = replace(card, shift=found["shift"], condition_guidance=found["condition guidance"])
        return serving(chosen, reads=found["reads"])
    if recipe.compiled:
        decoder.transformer.compile_repeated_blocks(dynamic=False)
    judge = JointDistance(context, networks)
    samples = judge.samples(sampler, SamplingOptions(guidance=recipe.guidance))
    measured = []

    def distance(card: DecoderCard) -> float:
        found = judge.of(painter(context, vq, vae, decoder, card), samples)
        candidate = {"shift": card.shift, "reads": card.reads, "condition guidance": card.condition_guidance}
        measured.append(candidate | found)
        print(", ".join(f"{name} {value}" for name, value in measured[-1].items()), flush=True)
        return overall(found)

    by_shift, by_reading = search_serving(card, distance, latest=latest)
    shift, reads = (min(found, key=found.__getitem__) for found in (by_shift, by_reading))
    card = serving(replace(card, shift=shift), reads=reads)
    by_guidance = {1.0: by_reading[reads]}
    if card.condition_dropout:
        by_guidance = search_condition_guidance(card, distance, by_guidance)
    card = replace(card, condition_guidance=min(by_guidance, key=by_guidance.__getitem__))
    found = {
        "models": key,
        "shift": shift,
        "reads": reads,
        "condition guidance": card.condition_guidance,
        "by shift": list(by_shift.items()),
        "by reading": by_reading,
        "by condition guidance": list(by_guidance.items()),
        "by network": measured,
    }
    write_text(path, json.dumps(found, indent=1) + "\n")
    return card


def search_serving(
    card: DecoderCard, distance: Callable[[DecoderCard], float], *, latest: float = 1.0
) -> tuple[dict[float | None, float], dict[str, float]]:
    """Distances by shift, for a card that reads anchored logits; and by reading, at the best shift.

    The first shift is None, FLUX's own. The search stops at the first of `SHIFTS` that brings no improvement.

    Args:
        latest: latest time at which the last of the card's steps may begin; larger shifts are not tried.
    """
    by_shift: dict[float | None, float] = {None: distance(replace(card, shift=None))}
    for shift in SHIFTS:
        if float(timesteps(card.steps, shift=shift)[-2]) > latest:
            break
        best = min(by_shift.values())
        by_shift[shift] = distance(replace(card, shift=shift))
        if by_shift[shift] >= best:
            break
    best = min(by_shift, key=by_shift.__getitem__)
    card = replace(card, shift=best)
    by_reading = {reads: distance(serving(card, reads=reads)) for reads in ("logits", "tokens")}
    return by_shift, {"anchored": by_shift[best]} | by_reading


def search_condition_guidance(
    card: DecoderCard, distance: Callable[[DecoderCard], float], known: dict[float, float]
) -> dict[float, float]:
    """Distances by guidance on the condition: the known one of w = 1, then up to the first w that is no better."""
    found = dict(known)
    for w in CONDITION_GUIDANCES:
        best = min(found.values())
        found[w] = distance(replace(card, condition_guidance=w))
        if found[w] >= best:
            break
    return found


def fact_features(features: torch.Tensor, facts: list[SceneFacts]) -> torch.Tensor:
    """Captions' facts one-hot [N, answers], scaled to the mean norm of the image features [N, F] they are joined to."""
    answers = [F.one_hot(found, len(FACTS[name])) for name, found in fact_labels(facts).items()]
    encoded = torch.cat(answers, dim=1).to(features)
    return encoded * (features.norm(dim=1).mean() / encoded.norm(dim=1).mean())


@torch.no_grad()
def choose_guidance(
    context: BuildContext,
    models: Models,
    networks: Mapping[str, SceneReader | TextDetectorRuler],
    *,
    with_temperature: bool = False,
) -> dict[float, dict[str, float]]:
    """`overall` distances by guidance, for the VQ decode's images and for those painted as the decoder's card says.

    Each guidance gets its own calibration. The best guidance can differ between the two decoders.

    Args:
        networks: the networks that judge (`judges`).
        with_temperature: see `fit_sampler`.
    """
    judge, vq, decoder = JointDistance(context, networks), models.tokenizer, models.decoder
    features = scene_features(context.recipe, vq)
    found = {}
    for guidance in GUIDANCES:
        samples = judge.samples(models.sampler, SamplingOptions(guidance=guidance))
        fitted = fit_sampler(models.sampler, features, guidance, with_temperature=with_temperature)
        card = serving(decoder.card, calibration=fitted)
        found[guidance] = {
            "VQ-VAE": overall(judge.of(lambda _, grid: vq.decode_tokens(grid.tokens, grid.grid), samples)),
            "decoder": overall(judge.of(painter(context, vq, models.codec.model, decoder, card), samples)),
        }
        print(f"guidance {guidance:g}: " + ", ".join(f"{name} {value:.4f}" for name, value in found[guidance].items()))
    return found


def calibrate(context: BuildContext, models: Models, guidance: float, *, with_temperature: bool = False) -> Calibration:
    """Calibrates to what Janus samples at a guidance; writes the calibration into the card of the decoder in `models`.

    Args:
        with_temperature: see `fit_sampler`.
    """
    features = scene_features(context.recipe, models.tokenizer)
    calibration = fit_sampler(models.sampler, features, guidance, with_temperature=with_temperature)
    models.decoder.card = serving(models.decoder.card, calibration=calibration)
    return calibration


def save_card(context: BuildContext, weights: Path, card: DecoderCard) -> None:
    """Writes a card into the decoder's file in `weights`, and the card's guidance into the recipe beside it."""
    path = model_paths(weights)["decoder"]
    whole = load_decoder(path, options=DecoderOptions(dtype=torch.float32, fold=False))
    whole.card = card
    save_bundle(path, whole, dtype=torch.float16)
    replace(context.recipe, guidance=card.calibration.guidance).save(weights)


def serve(
    context: BuildContext,
    weights: Path,
    *,
    guidance: float | None = None,
    with_temperature: bool = False,
    latest: float = 1.0,
) -> Calibration:
    """Calibrates the models in `weights`, chooses how they are served, and writes the choice into the decoder's card.

    The recipe beside them gets the guidance, and `guidance.json` in the work folder the distances.

    Args:
        guidance: guidance of Janus' sampling; None chooses the best one for the decoder (`choose_guidance`).
        with_temperature: see `fit_sampler`.
        latest: see `search_serving`.

    Raises:
        ValueError: if a part of the weights or the text detector's packages are missing, or `latest` is outside
            0..1.
    """
    require_number("last-step", latest, above=0, most=1, remedy="1 bounds nothing")
    recipe, networks = context.recipe, judges(context)
    models = load_pico(weights=weights, device=context.device, compiled=recipe.compiled)
    if guidance is None:
        by_guidance = choose_guidance(context, models, networks, with_temperature=with_temperature)
        write_text(context.folder / "guidance.json", json.dumps(by_guidance, indent=1) + "\n")
        guidance = min(by_guidance, key=lambda one: by_guidance[one]["decoder"])
    calibration = calibrate(context, models, guidance, with_temperature=with_temperature)
    # At this point the decoder is compiled already, if it is compiled at all.
    choosing = replace(context, recipe=replace(recipe, guidance=guidance, compiled=False))
    parts = (models.sampler, models.tokenizer, models.codec.model, models.decoder)
    save_card(context, weights, choose_serving(choosing, *parts, networks, latest=latest))
    return calibration


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--guidance", type=float, help="that Janus samples with; by default the best for the decoder")
    parser.add_argument(
        "--fit-anchor-temperature",
        action="store_true",
        help="with the anchor, so that all of the condition is as proxies",
    )
    parser.add_argument(
        "--last-step", type=float, default=1.0, metavar="T", help="time at which the last step may begin (default: any)"
    )
    parser.add_argument(
        "--only-calibrate", action="store_true", help="at --guidance or the recipe's; time shift and reading stay"
    )
    chosen = parser.parse_args()
    context = stage_context(chosen)
    if chosen.only_calibrate:
        if chosen.last_step != parser.get_default("last_step"):
            parser.error("--last-step would do nothing with --only-calibrate, which chooses no shift: leave one out")
        models = load_pico(weights=chosen.weights, device=context.device)
        guidance = context.recipe.guidance if chosen.guidance is None else chosen.guidance
        calibration = calibrate(context, models, guidance, with_temperature=chosen.fit_anchor_temperature)
        save_card(context, chosen.weights, models.decoder.card)
    else:
        calibration = serve(
            context,
            chosen.weights,
            guidance=chosen.guidance,
            with_temperature=chosen.fit_anchor_temperature,
            latest=chosen.last_step,
        )
    card = load_decoder(model_paths(chosen.weights)["decoder"]).card
    guided = f", guided on the condition with {card.condition_guidance:g}" if card.condition_guidance != 1 else ""
    print(f"guidance {calibration.guidance:g}, shift {card.shift}, reads {card.reads}{guided}\n{verdict(calibration)}")


if __name__ == "__main__":
    main()
