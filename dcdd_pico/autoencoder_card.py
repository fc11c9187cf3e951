"""Writes pico's autoencoder into the folder of the weights, with a card that says how it was trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL

from dcdd_core.evaluation.figures import save_image, training_curves
from dcdd_core.files import write_text
from dcdd_core.training.log import read_log

from .build_context import BuildContext, Recipe
from .export import let_others_read
from .flops import parameters
from .training_loop import last_held_out


def save_vae(folder: Path, vae: AutoencoderKL) -> None:
    """Writes an autoencoder in half precision over that in a folder."""
    copy.deepcopy(vae).half().save_pretrained(folder)
    let_others_read(folder, like=folder / "config.json")


def describe_vae(context: BuildContext, folder: Path, vae: AutoencoderKL, training: str) -> None:
    """Writes the card of an autoencoder into its folder, and its training's curves into the work folder.

    Args:
        training: the last one, "autoencoder" or "vae-decoder": its folder in the work folder, and its command's name.
    """
    log = read_log(context.folder / training)
    write_text(folder / "README.md", card(context.recipe, vae, log, training))
    curves = training_curves(
        {"SSIM": log, "tint of greys": log}, {"SSIM": "eval/ssim", "tint of greys": "eval/tint of greys"}
    )
    save_image(curves, context.folder / f"{training}-curves.png")


def card(recipe: Recipe, vae: AutoencoderKL, log: Sequence[Mapping[str, Any]], training: str) -> str:
    """What the weights are, in Markdown."""
    seconds, table = last_held_out(log)
    both, alone = recipe.autoencoder_before, recipe.vae_decoder_before
    last, of = recipe.autoencoder_steps, "both sides"
    if training == "vae-decoder":
        both, last, of = both + recipe.autoencoder_steps, recipe.vae_decoder_steps, "the decoder alone"
    else:
        alone += recipe.vae_decoder_steps
    layers, extra = vae.config.layers_per_block, ""
    if not any(block.resnets[-1].conv2.weight.any() for block in vae.encoder.down_blocks):
        extra = "The encoder's last block at each resolution passes its input on: both sides have one configuration.\n"
    return f"""# pico's autoencoder

`AutoencoderKL`, {vae.config.latent_channels} channels, {layers} layers a block; {parameters(vae.encoder) / 1e6:.2f} M
parameters in its encoder, {parameters(vae.decoder) / 1e6:.2f} M in its decoder.
{extra}
Before its last training both sides had {both:,} updates of {recipe.autoencoder_batch} scenes, and the decoder alone
{alone:,}. The last one trained {of} for {last:,} updates of as many fresh scenes ({last * recipe.autoencoder_batch:,}
in all), {seconds / 3600:.2f} hours.

Command: `python -m dcdd_pico.train_{training.replace("-", "_")}`. Round trip of held-out scenes at the end
("perceptual" by the network that was its loss; errors and tint of pixels in -1..1):

{table}
"""
