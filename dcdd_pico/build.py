"""Builds the embedded world from nothing: `python -m dcdd_pico.build`.

Every stage goes on from its own checkpoint, logs to its own folder, and draws all its randomness from the seed (on a
GPU some sums still depend on their order); a finished stage is only restored. The weights are written at the end, by
`export`, and the table of what they show is measured (`table`; `variants` trains the decoders of its ablation).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from dcdd_core.evaluation.figures import save_image, training_curves
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.training.log import read_log

from .build_context import WORK, Recipe, Workshop
from .embedded import WEIGHTS
from .export import export
from .results_table import table
from .scene_cache import encode_scenes
from .sections import Choice
from .serving import choose_serving
from .train_autoencoder import train_autoencoder, train_vae_decoder
from .train_calibration import calibrate
from .train_decoder import train_pico_decoder
from .train_janus import save_janus, train_janus
from .train_reader import train_reader
from .train_tokenizer import train_tokenizer, train_vq_decoder

#: The trainings whose held-out curves are drawn, and the quantity.
HELD_OUT = {
    "tokenizer": "eval/ssim",
    "vq-decoder": "eval/perceptual",
    "autoencoder": "eval/psnr",
    "vae-decoder": "eval/perceptual",
    "janus": "eval/loss",
    "decoder": "eval/ssim",
}
STAGES = (
    "readers",
    "tokenizer",
    "autoencoder",
    "janus",
    "calibration",
    "decoder",
    "vq-decoder",
    "vae-decoder",
    "export",
)


def build(shop: Workshop, *, until: str = "export", weights: Path = WEIGHTS) -> None:
    """Runs the stages up to and including `until`.

    Raises:
        ValueError: for an unknown stage.
    """
    if until not in STAGES:
        raise ValueError(f"unknown stage {until!r}: expected one of {', '.join(STAGES)}")
    last = STAGES.index(until)

    def reached(stage: str) -> bool:
        return last >= STAGES.index(stage)

    reader = train_reader(shop, "reader", shop.recipe.seed + 101)
    loss_reader = train_reader(shop, "loss-reader", shop.recipe.seed + 102)
    if not reached("tokenizer"):
        return
    network = train_tokenizer(shop, loss_reader)
    vq = VQTokenizer(network, name="pico")
    if not reached("autoencoder"):
        return
    vae = train_autoencoder(shop, loss_reader)
    encodings = encode_scenes(shop, "train", shop.train_images, vq, vae)
    held_out = encode_scenes(shop, "held-out", shop.held_out_images, vq, vae)
    if not reached("janus"):
        return
    janus, words = train_janus(shop, network, encodings.tokens(vq), held_out.tokens(vq))
    sampler = save_janus(shop.folder / "model" / "janus", janus, words, device=shop.device)
    if not reached("calibration"):
        return
    calibration = calibrate(shop, sampler, vq, encodings)
    if not reached("decoder"):
        return
    decoder = train_pico_decoder(shop, "decoder", "lcdm+lc", encodings, vq, vae, calibration, loss_reader)
    if not reached("vq-decoder"):
        return
    train_vq_decoder(shop, network, loss_reader)
    if not reached("vae-decoder"):
        return
    polished = train_vae_decoder(shop, vae, loss_reader)
    if not reached("export"):
        return
    logs = {stage: read_log(shop.folder / stage) for stage in HELD_OUT}
    save_image(training_curves(logs, HELD_OUT), shop.folder / "curves.png")
    decoder.card = choose_serving(shop, sampler, vq, polished, decoder, loss_reader)
    export(
        weights, janus=janus, words=words, vq=network, vae=polished, decoder=decoder, reader=reader, recipe=shop.recipe
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=WORK, help="work folder")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the shipped weights are written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--until", default="export", choices=STAGES, help="stop after this stage")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--compile", action="store_true", help="train the decoder with torch.compile")
    parser.add_argument("--no-table", action="store_true", help="do not measure the weights afterwards")
    chosen = parser.parse_args()
    recipe = replace(Recipe(), seed=chosen.seed, compiled=chosen.compile)
    shop = Workshop(folder=chosen.folder, device=torch.device(chosen.device), recipe=recipe)
    build(shop, until=chosen.until, weights=chosen.weights)
    if chosen.until == "export" and not chosen.no_table:
        of = {"weights": chosen.weights, "out": shop.folder / "table", "device": chosen.device}
        print(table(Choice(**of, bf16=True, compiled=chosen.compile)))


if __name__ == "__main__":
    main()
