"""Trains the ablation's decoders (the paper's Table 4) for the shipped models: `python -m dcdd_pico.ablation`.

Three kinds of condition, each from several seeds, all equally long (`Recipe.variant_steps`). A training that was
stopped goes on; the bundles are `<work>/variants/<variant>-<seed>.safetensors`. On two CPU cores it takes over an hour.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from dcdd_core.models.bundle import save_bundle
from dcdd_core.models.card import VARIANTS

from .build_context import WORK, Recipe, Workshop
from .embedded import WEIGHTS
from .models import load_pico, load_reader
from .scene_cache import encode_scenes
from .train_decoder import train_pico_decoder


def train_variants(shop: Workshop, weights: Path = WEIGHTS) -> None:
    """Trains (or restores) every variant from every seed, for the tokenizer, autoencoder and calibration in `weights`.

    Raises:
        ValueError: if there are no weights.
    """
    recipe = shop.recipe
    pico = load_pico(device=shop.device, weights=weights, with_sampler=False)
    reader = load_reader(device=shop.device, weights=weights)
    vae, calibration = pico.codec.model, pico.decoder.card.calibration
    encodings = encode_scenes(shop, "train", shop.train_images, pico.tokenizer, vae)
    for seed in range(recipe.variant_seeds):
        one = replace(shop, recipe=replace(recipe, seed=recipe.seed + seed, decoder_steps=recipe.variant_steps))
        for variant in VARIANTS:
            name = f"variants/{variant}-{seed}"
            decoder = train_pico_decoder(one, name, variant, encodings, pico.tokenizer, vae, calibration, reader)
            save_bundle(shop.folder / f"{name}.safetensors", decoder, dtype=torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK, help="of the build; may be empty")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the blocks (needs a C++ compiler)")
    chosen = parser.parse_args()
    recipe = replace(Recipe.load(chosen.weights), compiled=chosen.compile)
    train_variants(Workshop(folder=chosen.work, device=torch.device(chosen.device), recipe=recipe), chosen.weights)


if __name__ == "__main__":
    main()
