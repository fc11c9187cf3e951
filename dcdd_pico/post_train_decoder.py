"""Post-trains pico's diffusion decoder on conditions like those it is served: `python -m dcdd_pico.post_train_decoder`.

The decoder in the weights folder was trained on proxies alone. Here a share of the examples has Janus' own conditions
instead (`training.vlm_conditions`): teacher-forced on the scene's tokens under its caption, guided and anchored as the
decoder's card says. Some conditions are dropped, so that the decoder can be guided on its condition. Scenes are fresh,
each seen once, so keeping Janus' conditions would save nothing: they are made with each batch. A stopped training
resumes. The result replaces the decoder; `dcdd_pico.serving` should then be run to choose anew how the decoder is
served.

Shapes: B batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dcdd_core.files import write_text
from dcdd_core.method.sampling import keyed_generator
from dcdd_core.models.bundle import save_bundle
from dcdd_core.models.card import DecoderCard
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.pipelines.decode import decode
from dcdd_core.training.batches import DataShard
from dcdd_core.training.config import OptimizationConfig, RunConfig
from dcdd_core.training.decoder_task import DecoderTask
from dcdd_core.training.encoded_batch import EncodedBatch, encode
from dcdd_core.training.examples import Example, ExampleMaker
from dcdd_core.training.held_out import HeldOutLoss, Listed
from dcdd_core.training.image_batch import ImageBatch
from dcdd_core.training.log import read_log
from dcdd_core.training.plan import Encoders, Plan
from dcdd_core.training.trainer import Evaluation, sample_sheet
from dcdd_core.training.vlm_conditions import VLMConditions, with_conditions

from .build_context import BuildContext, Recipe, stage_context, stage_parser
from .embedded import model_paths
from .fresh_scenes import FreshScenes, train_on_fresh_scenes
from .image_losses import fidelity
from .models import load_reader
from .training_loop import last_held_out

#: Names of the training's folder in the work folder, and of the file in `weights` that describes the training.
NAME, CARD = "post-decoder", "decoder.md"
_STAGE = 17
_LEARNING_RATE = 3e-4
_WARMUP = 100
_UPDATES = 3_000
_LOCALISED = 0.2
_DROPPED = 0.1
_EVALUATED = 64
_SHOWN = 8


class HeldOut:
    """How good a decoder is on held-out scenes: its loss (`HeldOutLoss.numbers`), and its images' distances to them.

    "ssim", "psnr" and "perceptual" are for images painted from proxies, "vlm_..." for images painted from Janus' own
    conditions if the training uses them, and "loss_without_condition" is for the null condition.

    Args:
        conditions: makes Janus' own conditions; None for a training on proxies alone.
        make: makes examples without localised decoding.
    """

    def __init__(
        self,
        context: BuildContext,
        weights: Path,
        encoders: Encoders,
        conditions: VLMConditions | None,
        make: ExampleMaker,
        config: OptimizationConfig,
        *,
        vlm_share: float,
    ):
        self.context, self.codec = context, encoders.codec
        self.scenes = context.fresh_pixels("calibration", 0, _EVALUATED)
        self.reader = load_reader(device=context.device, weights=weights)
        source = FreshScenes("calibration", context.recipe.size)

        def encoded(batch: ImageBatch) -> EncodedBatch:
            found = encode(batch, encoders.tokenizer, encoders.codec, autocast=context.autocast)
            return found if conditions is None else with_conditions(found, conditions)

        scenes = Listed(source, list(islice(source.entries(DataShard(), 0), _EVALUATED)))
        single = {"rank": 0, "world": 1, "total": lambda sums: sums}
        self.loss = HeldOutLoss(
            scenes, encoded, make, config, batch=context.recipe.decoder_batch, vlm_share=vlm_share, **single
        )
        held_out = EncodedBatch(**self.loss.tensors)
        shares = {"": 0.0} | ({"vlm_": 1.0} if vlm_share else {})
        self.conditions = {
            name: make.with_share(share)(held_out, keyed_generator(0)).condition for name, share in shares.items()
        }

    def __call__(self, decoder: DistributionConditionedDecoder) -> Evaluation:
        """The numbers, and a sheet: the scene, painted from the proxies, and painted from Janus' conditions."""
        with self.context.autocast():
            numbers = self.loss.numbers(decoder)
            if decoder.card.condition_dropout:
                numbers["loss_without_condition"] = self.loss(decoder, dropped=True)
        shown = [self.scenes]
        for name, condition in self.conditions.items():
            with self.context.autocast():
                painted = decode(decoder, self.codec, condition, seeds=range(_EVALUATED)).pixels
            found = fidelity(self.scenes, painted, self.reader)
            numbers |= {f"{name}{what}": value for what, value in found.items()}
            shown.append(painted)
        return Evaluation(numbers=numbers, sheet=sample_sheet([images[:_SHOWN] for images in shown]))


def post_train_decoder(
    context: BuildContext,
    weights: Path,
    *,
    dropped: float = _DROPPED,
    learning_rate: float = _LEARNING_RATE,
) -> DistributionConditionedDecoder:
    """Trains the decoder in `weights` further, or restores the training's result from the work folder.

    The training has the recipe's `post_updates`, of `decoder_batch` scenes each. `post_vlm_share` of the examples have
    Janus' own conditions, the others proxies; if it is 0, Janus is not loaded.

    Args:
        dropped: share of the examples whose condition is dropped.

    Raises:
        ValueError: for shares out of range, for a decoder that does not read Janus' distributions, and if the work
            folder holds a training with other settings.
    """
    recipe, device, vlm_share = context.recipe, context.device, context.recipe.post_vlm_share
    paths = model_paths(weights)
    plan = Plan(vlm=paths["vlm"], vae=paths["vae"], bundle=paths["decoder"], trained="all", drop_condition=dropped)
    plan.check()
    encoders = plan.encoders(device)
    decoder = plan.decoder(encoders).to(device)
    card, tokenizer, codec, geometry = decoder.card, encoders.tokenizer, encoders.codec, encoders.geometry
    conditions = plan.conditions(card, encoders) if vlm_share else None
    given = {"vlm_share": vlm_share, "conditions": conditions}
    make = ExampleMaker(card, tokenizer, codec, geometry, localised=_LOCALISED, **given)

    def example(batch: ImageBatch, generator: torch.Generator) -> Example:
        return make(encode(batch, tokenizer, codec, autocast=context.autocast), generator)

    config = OptimizationConfig(
        steps=recipe.post_updates,
        learning_rate=learning_rate,
        warmup=_WARMUP,
        optimizer="muon",
        shift=recipe.decoder_shift,
        seed=recipe.seed + _STAGE,
        compile=recipe.compiled,
    )
    whole = ExampleMaker(card, tokenizer, codec, geometry)
    return train_on_fresh_scenes(
        context,
        NAME,
        DecoderTask(decoder, example),
        config,
        encoders,
        conditions,
        vlm_share=vlm_share,
        batch=recipe.decoder_batch,
        run=RunConfig(samples=_SHOWN, sample_every=500, save_every=100, log_every=25),
        evaluate=HeldOut(context, weights, encoders, conditions, whole, config, vlm_share=vlm_share),
        first=recipe.train_scenes,  # after the scenes that the decoder was trained on
    )


def save_post_trained(context: BuildContext, weights: Path, decoder: DistributionConditionedDecoder) -> Path:
    """Replaces the decoder in `weights` and writes a description of the training there; returns the decoder's file."""
    recipe, path = context.recipe, model_paths(weights)["decoder"]
    save_bundle(path, decoder, dtype=torch.float16)
    write_text(weights / CARD, describe(decoder.card, read_log(context.folder / NAME), recipe))
    replace(Recipe.load(weights), post_updates=recipe.post_updates, post_vlm_share=recipe.post_vlm_share).save(weights)
    return path


def describe(card: DecoderCard, log: Sequence[Mapping[str, Any]], recipe: Recipe) -> str:
    """Describes the training, in Markdown."""
    updates, batch, vlm_share = recipe.post_updates, recipe.decoder_batch, recipe.post_vlm_share
    seconds, table = last_held_out(log)
    hours, own = seconds / 3600, "proxies alone"
    if vlm_share:
        calibration = card.calibration
        own = (
            f"proxies, and {vlm_share:.0%} of the examples on Janus' own conditions, teacher-forced, at guidance "
            f"{calibration.guidance:g}, read as {card.reads}"
        )
    dropped = f" The condition was left out of {card.condition_dropout:.0%}." if card.condition_dropout else ""
    told = "; `vlm_` is on Janus' own conditions, painted" if vlm_share else ", painted"
    return f"""# pico's diffusion decoder

After its training on proxies it was trained on for {updates:,} updates of {batch} fresh scenes, {hours:.2f} hours, on
{own}.{dropped}

Command: `python -m dcdd_pico.post_train_decoder`. At the end, of {_EVALUATED} held-out scenes{told}
in {card.steps} steps:

{table}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = stage_parser(__doc__)
    parser.add_argument(
        "--updates", type=int, default=_UPDATES, help="of the recipe's decoder_batch scenes each (default %(default)s)"
    )
    parser.add_argument(
        "--vlm-conditions",
        type=float,
        default=Recipe.post_vlm_share,
        metavar="SHARE",
        help="of the examples, with Janus' own conditions in the place of proxies (default %(default)s)",
    )
    parser.add_argument(
        "--drop-condition",
        type=float,
        default=_DROPPED,
        metavar="SHARE",
        help="of the examples, without their condition, for guidance on it (default %(default)s)",
    )
    parser.add_argument("--learning-rate", type=float, default=_LEARNING_RATE, help="peak (default %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: as the recipe says")
    chosen = parser.parse_args(arguments)
    context = stage_context(
        chosen, compiled=chosen.compile, post_updates=chosen.updates, post_vlm_share=chosen.vlm_conditions
    )
    told = {"dropped": chosen.drop_condition, "learning_rate": chosen.learning_rate}
    decoder = post_train_decoder(context, chosen.weights, **told)
    print(save_post_trained(context, chosen.weights, decoder))


if __name__ == "__main__":
    main()
