"""Trains the unconditional prior: pico's decoder without its condition, as a low-rank difference of its weights.

This is the last stage of the build; `python -m dcdd_pico.train_prior` runs it alone, for existing weights. The prior
paints scenes of no caption in particular; distribution guidance then decides which (`dcdd_core.method.guidance`).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dcdd_core.method.flow import sample_times
from dcdd_core.method.sampling import keyed_generator
from dcdd_core.models.bundle import DecoderOptions, load_decoder
from dcdd_core.models.prior import PriorDifference
from dcdd_core.training.ema import EMA
from dcdd_core.training.examples import Example
from dcdd_core.training.loss import velocity_losses
from dcdd_core.training.schedules import set_learning_rate, warmup_cosine
from dcdd_core.training.trainable import trained_weights
from dcdd_core.types import Condition

from .build_context import BuildContext, digest, stage_context, stage_parser
from .embedded import PRIOR, model_paths
from .models import load_pico
from .scenes import Split
from .training_loop import train

_STAGE = 8
_RANK = 48
_BATCH = 16
_LEARNING_RATE = 1e-3
_EVALUATED = 64


def train_prior(context: BuildContext, weights: Path) -> PriorDifference:
    """Trains (or restores) the difference to the decoder in `weights`, on fresh training scenes, each seen once."""
    device, steps = context.device, context.recipe.prior_steps
    models = load_pico(device=device, weights=weights, with_sampler=False)
    codec = models.codec
    options = DecoderOptions(device=device, dtype=torch.float32, fold=False)
    decoder = load_decoder(model_paths(weights)["decoder"], options=options).requires_grad_(False)
    of_decoder = digest(decoder)
    difference = PriorDifference(decoder, _RANK).to(device)
    difference.start(_STAGE)
    difference.attach(decoder, merge=False)
    optimizer = torch.optim.AdamW(difference.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
    ema = EMA(trained_weights(difference), 0.998)

    def latents_of(split: Split, first: int, count: int) -> torch.Tensor:
        return codec.normalize(codec.encode(context.fresh_pixels(split, first, count)))

    def loss_of(z0: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        t = sample_times(len(z0), generator=draw)
        noise = torch.randn(z0.shape, generator=draw)
        # The prior reads no condition, and no part of the image is given: it is blank, and all of it is to be painted.
        nothing = Condition(z0.new_zeros(len(z0), 1, 1), z0.new_zeros(len(z0), 1, 4), (1, 1))
        example = Example(latents=z0, condition=nothing, masked_latents=blank, mask=all_of_it)
        with context.autocast():
            return velocity_losses(decoder, example, t, noise, "uniform").mean()

    side = context.recipe.size
    blank = codec.normalize(codec.encode(torch.zeros(1, 3, side, side, device=device)))
    all_of_it = torch.ones(1, 1, side, side, device=device)
    held_out = latents_of("calibration", 0, _EVALUATED)

    def step(i: int) -> dict[str, torch.Tensor]:
        set_learning_rate(optimizer, warmup_cosine(i, steps, peak=_LEARNING_RATE, warmup=100))
        loss = loss_of(latents_of("train", i * _BATCH, _BATCH), keyed_generator(context.recipe.seed, _STAGE, i))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(difference.parameters(), 1.0)
        optimizer.step()
        ema.update()
        return {"loss": loss.detach()}

    def evaluate(_: int) -> dict[str, float]:
        with ema.swapped_in(), torch.no_grad():
            return {"loss": float(loss_of(held_out, keyed_generator(context.recipe.seed, _STAGE)))}

    train(
        context.folder / "prior",
        settings={
            "rank": _RANK,
            "batch": _BATCH,
            "learning_rate": _LEARNING_RATE,
            "seed": context.recipe.seed,
            "decoder": of_decoder,
        },
        steps=steps,
        step=step,
        state={"model": difference, "ema": ema, "optimizer": optimizer},
        evaluate=evaluate,
        evaluate_every=250,
        save_every=100,
        log_every=25,
    )
    ema.apply()
    return difference


def main() -> None:
    chosen = stage_parser(__doc__).parse_args()
    train_prior(stage_context(chosen), chosen.weights).save(chosen.weights / PRIOR)


if __name__ == "__main__":
    main()
