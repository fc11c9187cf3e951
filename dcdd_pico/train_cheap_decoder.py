"""Trains a small decoder of pico's latents, for distribution guidance: `python -m dcdd_pico.train_cheap_decoder`.

It is to pico's autoencoder what TAESD and TAEF1 are to those of Stable Diffusion and FLUX.1: an `AutoencoderTiny` that
learns what pico's autoencoder decodes from the latents of fresh training scenes. The class also has an encoder, which
is saved but not trained.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import nn

from dcdd_core.method.sampling import keyed_generator
from dcdd_core.training.ema import EMA
from dcdd_core.training.schedules import set_learning_rate, warmup_cosine

from .build_context import BuildContext, digest, stage_context, stage_parser
from .embedded import CHEAP
from .export import let_others_read
from .models import load_pico
from .scenes import Split
from .training_loop import train

_STAGE = 11
_BATCH = 8
_RATE = 2e-3
_NOISE = 0.3
_HELD_OUT = 32


def cheap_config(channels: int) -> dict[str, object]:
    """f = 4 like pico's autoencoder, for normalised latents; decoder of width 16, encoder as small as possible."""
    return {
        "latent_channels": channels,
        "encoder_block_out_channels": (8, 8, 8),
        "decoder_block_out_channels": (16, 16, 16),
        "num_encoder_blocks": (1, 1, 1),
        "num_decoder_blocks": (3, 1, 1),
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }


def train_cheap_decoder(context: BuildContext, weights: Path) -> AutoencoderTiny:
    """Trains (or restores) the decoder for the autoencoder in `weights`.

    Latents get a little noise, since the predictions that guidance sees are not yet latents of an image.
    """
    recipe, device = context.recipe, context.device
    codec = load_pico(device=device, weights=weights, with_sampler=False).codec
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed + _STAGE)
        model = AutoencoderTiny(**cheap_config(codec.channels)).to(device).train()
    trained = dict(model.decoder.named_parameters())
    optimizer = torch.optim.AdamW(trained.values(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
    ema = EMA(trained, 0.995)

    @torch.no_grad()
    def pairs(split: Split, first: int, count: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised latents [B, C, h', w'], and the pixels [B, 3, S, S] that the autoencoder decodes from them."""
        clean = codec.normalize(codec.encode(context.fresh_pixels(split, first, count)))
        drawn = torch.randn(clean.shape, generator=keyed_generator(recipe.seed, _STAGE, first))
        clean = clean + noise * torch.rand(count, 1, 1, 1, generator=keyed_generator(first, _STAGE)) * drawn
        return clean, codec.decode(codec.denormalize(clean))

    def step(i: int) -> dict[str, torch.Tensor]:
        set_learning_rate(optimizer, warmup_cosine(i, recipe.cheap_steps, peak=_RATE, warmup=50))
        latents, pixels = pairs("train", i * _BATCH, _BATCH, _NOISE)
        loss = F.l1_loss(model.decode(latents).sample, pixels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        ema.update()
        return {"loss": loss.detach()}

    held_out = pairs("calibration", 0, _HELD_OUT, 0.0)

    @torch.no_grad()
    def evaluate(_: int) -> dict[str, float]:
        with ema.swapped_in():
            return {"loss": float(F.l1_loss(model.decode(held_out[0]).sample.clamp(-1, 1), held_out[1]))}

    train(
        context.folder / "cheap-decoder",
        settings=context.settings(
            "cheap_steps", batch=_BATCH, rate=_RATE, noise=_NOISE, autoencoder=digest(codec.model)
        ),
        steps=recipe.cheap_steps,
        step=step,
        state={"model": model, "ema": ema, "optimizer": optimizer},
        evaluate=evaluate,
        evaluate_every=250,
        save_every=250,
        log_every=25,
    )
    ema.apply()
    return model.eval().requires_grad_(False)


def save_cheap_decoder(weights: Path, model: AutoencoderTiny) -> Path:
    """Writes the decoder beside the models in `weights`, in half precision; returns its folder."""
    folder = weights / CHEAP
    model.half().save_pretrained(folder)
    let_others_read(folder, like=folder / "config.json")
    return folder


def main() -> None:
    chosen = stage_parser(__doc__).parse_args()
    print(save_cheap_decoder(chosen.weights, train_cheap_decoder(stage_context(chosen), chosen.weights)))


if __name__ == "__main__":
    main()
