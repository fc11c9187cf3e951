"""Trains the decoders of the ablation over conditions (the paper's Table 4): `python -m dcdd_pico.ablation`.

Three kinds of condition (`VARIANTS`), several seeds each, all trained for `Recipe.variant_steps` steps. A stopped run
can be resumed. The bundles are `<work>/variants/<variant>-<seed>.safetensors`. Takes over an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from dcdd_core.models.bundle import save_bundle
from dcdd_core.models.card import VARIANTS

from .build_context import WORK, BuildContext, Recipe
from .embedded import WEIGHTS
from .models import load_pico, load_reader
from .scene_cache import encode_scenes
from .train_decoder import train_pico_decoder


def train_ablation(context: BuildContext, weights: Path = WEIGHTS) -> None:
    """Trains (or restores) a decoder per variant and seed, for the tokenizer, autoencoder and calibration in `weights`.

    Raises:
        ValueError: if the weights are missing.
    """
    recipe = context.recipe
    pico = load_pico(device=context.device, weights=weights, with_sampler=False)
    reader = load_reader(device=context.device, weights=weights)
    vae, calibration = pico.codec.model, pico.decoder.card.calibration
    encodings = encode_scenes(context, "train", context.train_images, pico.tokenizer, vae)
    for seed in range(recipe.variant_seeds):
        one = replace(context, recipe=replace(recipe, seed=recipe.seed + seed, decoder_steps=recipe.variant_steps))
        for variant in VARIANTS:
            name = f"variants/{variant}-{seed}"
            decoder = train_pico_decoder(one, name, variant, encodings, pico.tokenizer, vae, calibration, reader)
            save_bundle(context.folder / f"{name}.safetensors", decoder, dtype=torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK, help="work folder of the build; may be empty")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the blocks (needs a C++ compiler)")
    chosen = parser.parse_args()
    recipe = replace(Recipe.load(chosen.weights), compiled=chosen.compile)
    train_ablation(BuildContext(folder=chosen.work, device=torch.device(chosen.device), recipe=recipe), chosen.weights)


if __name__ == "__main__":
    main()
