"""Trains the embedded models from scratch: `python -m dcdd_pico.build`.

Each stage has its own folder with a log and a checkpoint, from which it resumes; a finished stage is only restored. All
random numbers come from the seed (on a GPU some sums still depend on their order). `export` writes the weights, which
the later stages start from. `results_table` measures them, and `ablation` trains the decoders of Table 4.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from pathlib import Path

import torch

from dcdd_core.evaluation.figures import save_image, training_curves
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.pipelines.condition import serving
from dcdd_core.training.log import read_log

from .autoencoder_command import describe_vae
from .build_context import WORK, BuildContext, Recipe
from .embedded import JANUS, PRIOR, WEIGHTS
from .export import export
from .llamagen_calibration import fit_llamagen_calibration
from .post_train_decoder import post_train_decoder, save_post_trained
from .progressive_serving import choose_sampling
from .results_table import results_markdown
from .ruler import bundled_model
from .scene_cache import encode_scenes
from .sections import TableOptions
from .serving import judges, serve
from .train_autoencoder import normalise, train_autoencoder, untrained
from .train_calibration import fit_pico_calibration
from .train_cheap_decoder import save_cheap_decoder, train_cheap_decoder
from .train_decoder import train_pico_decoder
from .train_janus import describe_janus, save_janus, train_janus
from .train_llamagen import save_llamagen, train_llamagen
from .train_prior import train_prior
from .train_progressive import save_progressive, train_progressive
from .train_reader import train_loss_reader, train_reader
from .train_tokenizer import train_tokenizer, train_vq_decoder
from .train_vae_decoder import FOLDER as VAE_DECODER
from .train_vae_decoder import train_vae_decoder

#: Training -> the held-out metric that is plotted for it.
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
    "post-training",
    "serving",
    "prior",
    "cheap-decoder",
    "progressive",
    "llamagen",
)


def build(context: BuildContext, *, until: str = STAGES[-1], weights: Path = WEIGHTS) -> None:
    """Runs the stages up to and including `until`.

    Raises:
        ValueError: for an unknown stage, or if the package of the text detector (`ruler`), which `serving` needs, is
            missing.
    """
    if until not in STAGES:
        raise ValueError(f"unknown stage {until!r}: expected one of {', '.join(STAGES)}")
    last = STAGES.index(until)

    def reached(stage: str) -> bool:
        return last >= STAGES.index(stage)

    if reached("serving"):
        bundled_model()  # the text detector, which `serving` needs: if it is missing, fail now and not hours later
    reader = train_reader(context, "reader", context.recipe.seed + 101)
    loss_reader = train_loss_reader(context)
    if not reached("tokenizer"):
        return
    network = train_tokenizer(context, loss_reader)
    vq = VQTokenizer(network, name="pico")
    if not reached("autoencoder"):
        return
    vae = train_autoencoder(context, untrained(context.recipe), loss_reader)
    normalise(context, vae)
    encodings = encode_scenes(context, "train", context.train_images, vq, vae)
    if not reached("janus"):
        return
    tokenizer = context.folder / "tokenizer-model"
    copy.deepcopy(network).half().save_pretrained(tokenizer / JANUS)
    janus, words = train_janus(context, tokenizer)
    sampler = save_janus(context.folder / "model" / JANUS, janus, words, device=context.device)
    if not reached("calibration"):
        return
    calibration = fit_pico_calibration(context, sampler, vq, encodings)
    if not reached("decoder"):
        return
    decoder = train_pico_decoder(context, "decoder", "lcdm+lc", encodings, vq, vae, calibration, loss_reader)
    if not reached("vq-decoder"):
        return
    train_vq_decoder(context, network, loss_reader)
    if not reached("vae-decoder"):
        return
    finetuned = train_vae_decoder(context, vae, loss_reader)
    if not reached("export"):
        return
    logs = {stage: read_log(context.folder / stage) for stage in HELD_OUT}
    save_image(training_curves(logs, HELD_OUT), context.folder / "curves.png")
    decoder.card = serving(decoder.card, reads="anchored")  # how post-training uses Janus' conditions
    export(
        weights,
        janus=janus,
        words=words,
        vq=network,
        vae=finetuned,
        decoder=decoder,
        reader=reader,
        recipe=replace(context.recipe, post_updates=0, post_vlm_share=0.0),
    )
    describe_janus(context, weights / JANUS, janus)
    describe_vae(context, weights / "vae", finetuned, VAE_DECODER)
    if not reached("post-training"):
        return
    if context.recipe.post_updates:
        save_post_trained(context, weights, post_train_decoder(context, weights))
    if not reached("serving"):
        return
    serve(context, weights, guidance=context.recipe.guidance)
    if not reached("prior"):
        return
    train_prior(context, weights).save(weights / PRIOR)
    if not reached("cheap-decoder"):
        return
    save_cheap_decoder(weights, train_cheap_decoder(context, weights))
    if not reached("progressive"):
        return
    save_progressive(context, weights, *train_progressive(context, weights))
    choose_sampling(context, weights, judges(context))
    if not reached("llamagen"):
        return
    save_llamagen(context, weights, train_llamagen(context, weights))
    fit_llamagen_calibration(weights, context.recipe.llamagen_guidance, device=context.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=WORK, help="work folder")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the shipped weights are written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--until", default=STAGES[-1], choices=STAGES, help="stop after this stage")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--compile", action="store_true", help="train the decoder with torch.compile")
    parser.add_argument("--no-table", action="store_true", help="do not measure the weights afterwards")
    chosen = parser.parse_args()
    recipe = replace(Recipe(), seed=chosen.seed, compiled=chosen.compile)
    context = BuildContext(folder=chosen.folder, device=torch.device(chosen.device), recipe=recipe)
    build(context, until=chosen.until, weights=chosen.weights)
    if chosen.until == STAGES[-1] and not chosen.no_table:
        where = {"weights": chosen.weights, "out": context.folder / "table", "device": chosen.device}
        print(results_markdown(TableOptions(**where, bf16=True, compiled=chosen.compile)))


if __name__ == "__main__":
    main()
