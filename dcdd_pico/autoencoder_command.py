"""What the two commands that train pico's autoencoder share: options, and writing the result with its card."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from dcdd_core.evaluation.figures import save_image, training_curves
from dcdd_core.files import write_text
from dcdd_core.models.vae import load_vae
from dcdd_core.training.log import read_log

from .build_context import BuildContext, Recipe, stage_context, stage_parser
from .embedded import model_paths
from .export import let_others_read
from .flops import parameters
from .reader import SceneReader
from .train_reader import train_loss_reader
from .training_loop import last_held_out


def run_command(
    description: str | None,
    fields: str,
    train: Callable[[BuildContext, AutoencoderKL, SceneReader], AutoencoderKL],
) -> None:
    """Trains the autoencoder in the weights folder further and replaces it with the result.

    Args:
        fields: prefix of the recipe's fields for this training; `<fields>_steps` are its updates, and `<fields>_before`
            counts the updates of earlier trainings.
        train: (context, existing autoencoder, network of the perceptual loss) -> trained autoencoder.
    """
    steps, before = f"{fields}_steps", f"{fields}_before"
    parser = stage_parser(description)
    parser.add_argument("--steps", type=int, default=getattr(Recipe, steps), help="updates (default %(default)s)")
    parser.add_argument(
        "--layers", type=int, default=Recipe.vae_decoder_layers, help="a block of the autoencoder (default %(default)s)"
    )
    chosen = parser.parse_args()
    older = Recipe.load(chosen.weights)
    told = {steps: chosen.steps, before: getattr(older, before) + getattr(older, steps)}
    context = stage_context(chosen, **told, vae_decoder_layers=chosen.layers)
    folder = model_paths(chosen.weights)["vae"]
    vae = load_vae(folder, device=context.device, dtype=torch.float32)
    trained = train(context, vae, train_loss_reader(context))
    save_vae(folder, trained)
    describe_vae(context, folder, trained, fields.replace("_", "-"))
    context.recipe.save(chosen.weights)
    print(folder)


def save_vae(folder: Path, vae: AutoencoderKL) -> None:
    """Writes an autoencoder in half precision into a folder, over the one there."""
    copy.deepcopy(vae).half().save_pretrained(folder)
    let_others_read(folder, like=folder / "config.json")


def describe_vae(context: BuildContext, folder: Path, vae: AutoencoderKL, training: str) -> None:
    """Writes the card of an autoencoder into its folder, and its training curves into the work folder.

    Args:
        training: the last training, "autoencoder" or "vae-decoder": both its folder in the work folder and its command.
    """
    log = read_log(context.folder / training)
    write_text(folder / "README.md", card(context.recipe, vae, log, training))
    curves = training_curves(
        {"SSIM": log, "tint of greys": log}, {"SSIM": "eval/ssim", "tint of greys": "eval/tint of greys"}
    )
    save_image(curves, context.folder / f"{training}-curves.png")


def card(recipe: Recipe, vae: AutoencoderKL, log: Sequence[Mapping[str, Any]], training: str) -> str:
    """Describes the weights, in Markdown."""
    seconds, table = last_held_out(log)
    both, alone = recipe.autoencoder_before, recipe.vae_decoder_before
    last, of = recipe.autoencoder_steps, "both sides"
    if training == "vae-decoder":
        both, last, of = both + recipe.autoencoder_steps, recipe.vae_decoder_steps, "the decoder alone"
    else:
        alone += recipe.vae_decoder_steps
    layers, extra = vae.config.layers_per_block, ""
    if idle := sum(not block.conv2.weight.any() for block in vae.encoder.down_blocks[0].resnets):
        extra = f"Blocks of the encoder that only pass their input on, at each resolution: {idle} of {layers}.\n"
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
