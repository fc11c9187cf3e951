"""Trains the opponents of the diffusion decoder: `python -m dcdd_pico.train_opponents`.

Feed-forward decoders (`feed_forward`) are trained with the losses of the VQ-VAE's decoder: reconstruction and
perceptual distance, in the last quarter of the updates also an adversarial loss. Each gets at least the training FLOPs
of the diffusion decoder (`flops`), which determines the number of updates; those of the autoencoder's decoder are not
included. Two have the size of both together; two have a finer trunk, so that an image takes as long as with the
diffusion decoder. One of each pair reads the tokens, the other the condition; both see the same scenes in the same
order. The last opponent is the diffusion decoder itself, trained on tokens for as many updates.

A stopped training resumes. Decoders and logs are in `<work folder>/opponents`; they are not shipped.
`python -m dcdd_pico.opponents_table` measures them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dcdd_core.evaluation.figures import save_image, training_curves
from dcdd_core.evaluation.tables import markdown_table
from dcdd_core.method.sampling import keyed_generator
from dcdd_core.models.bundle import save_bundle
from dcdd_core.models.card import DecoderCard
from dcdd_core.pipelines.load import Models
from dcdd_core.settings import require_number
from dcdd_core.training.batches import Entry
from dcdd_core.training.encoded_batch import geometry_for
from dcdd_core.training.examples import ExampleMaker, proxy_condition
from dcdd_core.training.log import read_log
from dcdd_core.training.optimizers import adamw_with_muon
from dcdd_core.training.vlm_conditions import VLMConditions
from dcdd_core.types import Condition, DCDDWarning

from .build_context import BuildContext, digest, stage_context, stage_parser
from .embedded import model_paths
from .feed_forward import (
    DIFFUSION,
    FEED_FORWARD,
    SHAPES,
    FeedForwardCard,
    FeedForwardDecoder,
    opponent_file,
    save_feed_forward,
)
from .flops import dcdd_flops, decoder_images, feed_forward_flops, load_dcdd, loss_flops, parameters
from .gan_finetune import train_with_gan
from .image_losses import fidelity
from .models import load_pico, load_reader
from .scene_cache import SceneEncodings, encode_scenes
from .scenes import scene_pixels
from .train_decoder import train_pico_decoder
from .train_reader import train_loss_reader
from .train_tokenizer import tokens_digest

_STAGE = 14
_RATE = 1e-3
#: Share of the updates before the discriminator joins. The learning rate is low by then, so that an adversary that
#: cannot yet tell images apart does little harm.
_ALONE = 0.75
#: Fall of PSNR on held-out scenes, in dB, from which a training is said to have suffered from its discriminator.
_FALL = 0.1
_EVALUATED = 64
NAMES = (*FEED_FORWARD, DIFFUSION)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training whose FLOPs are at least a given share of the diffusion decoder's.

    Attributes:
        each: training FLOPs for one image.
        batch, steps: images per update, and number of updates.
        share: training FLOPs divided by the diffusion decoder's.
    """

    each: int
    batch: int
    steps: int
    share: float

    @classmethod
    def of(cls, decoder: FeedForwardDecoder, budget: float, batch: int, operations: float) -> Plan:
        """A plan for `operations` times a budget in FLOPs, rounded up to a whole update."""
        each = feed_forward_flops(decoder)
        steps = math.ceil(operations * budget / (each * batch))
        return cls(each=each, batch=batch, steps=steps, share=steps * batch * each / budget)

    @property
    def images(self) -> int:
        """Number of training images, counting repeated ones each time."""
        return self.steps * self.batch


def dcdd_budget(context: BuildContext, weights: Path) -> int:
    """Training FLOPs of the diffusion decoder in `weights`."""
    return dcdd_flops(load_dcdd(model_paths(weights)["decoder"])) * decoder_images(context.recipe)


def start(name: str, models: Models, seed: int) -> FeedForwardDecoder:
    """An untrained decoder of `FEED_FORWARD` for these models."""
    kind, reads = FEED_FORWARD[name]
    card, codebook = models.decoder.card, models.tokenizer.codebook
    calibration = None if reads == "tokens" else card.calibration
    grid = models.tokenizer.grid_of(card.resolution, card.resolution)
    shape = {"codebook": codebook.fingerprint, "code_dim": codebook.dim, "grid": grid, **SHAPES[kind]}
    with torch.random.fork_rng():
        torch.manual_seed(seed + _STAGE)
        return FeedForwardDecoder(FeedForwardCard(reads=reads, calibration=calibration, **shape))


def read_card(reads: str, card: DecoderCard) -> DecoderCard:
    """The diffusion decoder's card, with the condition changed to what an opponent reads."""
    return replace(card, variant="discrete", calibration=None) if reads == "tokens" else card


def train_feed_forward(
    context: BuildContext, weights: Path, name: str, *, operations: float = 1.0, vlm_share: float = 0.0
) -> FeedForwardDecoder:
    """Trains (or restores) a decoder of `FEED_FORWARD` for the models in `weights`, and saves it.

    Args:
        operations: training FLOPs, as a multiple of the diffusion decoder's.
        vlm_share: for a decoder that reads the condition, share of the VLM's own conditions (`ExampleMaker`).

    Raises:
        ValueError: for numbers out of range, and as `load_pico`.
    """
    require_number("operations", operations, above=0, most=1000)
    recipe, device = context.recipe, context.device
    models = load_pico(device=device, weights=weights, with_sampler=vlm_share > 0)
    decoder = start(name, models, recipe.seed)
    plan = Plan.of(decoder, dcdd_budget(context, weights), recipe.decoder_batch, operations)
    decoder.card = replace(decoder.card, images=plan.images)
    decoder.to(device)
    loss_reader = train_loss_reader(context)
    data = _Data(context, models, decoder.card.reads, plan.batch, vlm_share)
    alone = round(_ALONE * plan.steps)
    held_out = scene_pixels(context.held_out_images[:_EVALUATED], device)
    held_out_condition = data.proxies(held_out)

    @torch.no_grad()
    def evaluate(current: FeedForwardDecoder) -> dict[str, float]:
        with context.autocast():
            decoded = current(held_out_condition)
        return fidelity(held_out, decoded.float().clamp(-1, 1), loss_reader)

    if recipe.compiled:
        for block in decoder.blocks:
            block.compile(dynamic=False)
    folder = opponent_file(name).removesuffix(".safetensors")
    train_with_gan(
        context,
        folder,
        _STAGE,
        decoder,
        last=decoder.last.weight,
        examples=data.examples,
        decode=lambda network, condition: network(condition),
        optimizers=adamw_with_muon(
            dict(decoder.named_parameters()), decoder.matrices(), betas=(0.9, 0.99), weight_decay=0.01
        ),
        peak=_RATE,
        alone=alone,
        steps=plan.steps,
        settings=context.settings(
            "decoder_batch",
            card=decoder.card.to_dict(),
            vlm_share=data.vlm_share,
            rate=_RATE,
            alone=alone,
            loss_reader=digest(loss_reader),
            tokenizer=tokens_digest(models.tokenizer.model),
        ),
        loss_reader=loss_reader,
        evaluate=evaluate,
    )
    if (fall := fall_of_psnr(read_log(context.folder / folder), alone)) > _FALL:
        warnings.warn(
            f"{name}: PSNR on held-out scenes was up to {fall:.2f} dB lower after the discriminator joined at update "
            f"{alone:,} than before ({context.folder / folder / 'log.jsonl'}): as an opponent it may be weaker than it "
            "could be",
            DCDDWarning,
            stacklevel=2,
        )
    decoder.eval().requires_grad_(False)
    save_feed_forward(context.folder / opponent_file(name), decoder)
    return decoder


def fall_of_psnr(log: Sequence[Mapping[str, float]], alone: int) -> float:
    """By how much, in dB, the held-out PSNR in a training's log was at most below the last one of its first `alone`
    updates; 0 if it never was, or if there is nothing to compare."""
    known = [(line["step"], line["eval/psnr"]) for line in log if "eval/psnr" in line]
    before = [value for step, value in known if step <= alone]
    after = [value for step, value in known if step > alone]
    return max(0.0, before[-1] - min(after)) if before and after else 0.0


class _Data:
    """Training scenes with the conditions that a decoder reads."""

    def __init__(self, context: BuildContext, models: Models, reads: str, batch: int, vlm_share: float):
        card, tokenizer, codec = read_card(reads, models.decoder.card), models.tokenizer, models.codec
        self.context, self.card, self.tokenizer, self.batch = context, card, tokenizer, batch
        self.vlm_share = 0.0 if reads == "tokens" else vlm_share
        encodings = encode_scenes(context, "train", context.train_images, tokenizer, codec.model)
        self.scenes = SceneEncodings(context, encodings, _STAGE, batch)
        self.make = ExampleMaker(
            card,
            tokenizer,
            codec,
            geometry_for(
                tokenizer,
                codec,
                patch=models.decoder.backbone.patch,
                resolution=card.resolution,
                token_resolution=card.resolution,
            ),
            vlm_share=self.vlm_share,
            conditions=VLMConditions(models.sampler, card, tokenizer) if self.vlm_share else None,
        )

    def examples(self, i: int) -> tuple[torch.Tensor, Condition]:
        """Pixels [B, 3, S, S] in -1..1 and conditions of an update."""
        context = self.context
        index = context.batch(_STAGE, i, self.batch)
        encoded = self.scenes.collate([self.scenes.load(Entry(str(k), int(k))) for k in index])
        if self.vlm_share:
            encoded = replace(encoded, captions=tuple(context.train_facts[k].caption() for k in index))
        with torch.no_grad():
            example = self.make(encoded, keyed_generator(context.recipe.seed, _STAGE, i))
        return encoded.pixels.to(context.device), example.condition

    @torch.no_grad()
    def proxies(self, pixels: torch.Tensor) -> Condition:
        """The conditions for other images."""
        codebook = self.tokenizer.codebook
        return proxy_condition(self.tokenizer.features(pixels), self.card, codebook, self.make.geometry.grid)


def train_diffusion_on_tokens(context: BuildContext, weights: Path, *, operations: float = 1.0) -> None:
    """Trains (or restores) the diffusion decoder on tokens alone, and saves its bundle. It is trained like the
    ablation's `discrete`, but for as many updates as the shipped decoder, its post-training included.

    Args:
        operations: number of updates, as a multiple of the shipped decoder's.

    Raises:
        ValueError: as `train_feed_forward`.
    """
    require_number("operations", operations, above=0, most=1000)
    recipe = context.recipe
    steps = math.ceil(operations * (recipe.decoder_steps + recipe.post_updates))
    context = replace(context, recipe=replace(recipe, decoder_steps=steps))
    pico = load_pico(device=context.device, weights=weights, with_sampler=False)
    reader = load_reader(device=context.device, weights=weights)
    vae, calibration = pico.codec.model, pico.decoder.card.calibration
    encodings = encode_scenes(context, "train", context.train_images, pico.tokenizer, vae)
    file = opponent_file(DIFFUSION)
    folder = file.removesuffix(".safetensors")
    decoder = train_pico_decoder(context, folder, "discrete", encodings, pico.tokenizer, vae, calibration, reader)
    save_bundle(context.folder / file, decoder, dtype=torch.float16)


def planned(context: BuildContext, weights: Path, *, operations: float = 1.0) -> str:
    """What would be trained, as a Markdown table."""
    models = load_pico(weights=weights, with_sampler=False)
    budget, batch = dcdd_budget(context, weights), context.recipe.decoder_batch
    ours = parameters(load_dcdd(model_paths(weights)["decoder"]))
    rows = [["", "parameters", "FLOPs per image", "losses, not counted", "updates", "FLOPs", "of DCDD's"]]
    images = decoder_images(context.recipe)
    rows.append(["DCDD", f"{ours / 1e6:.2f} M", f"{budget / images:.3g}", "", f"{images // batch:,}", f"{budget:.3g}"])
    for name in FEED_FORWARD:
        decoder = start(name, models, context.recipe.seed)
        plan = Plan.of(decoder, budget, batch, operations)
        losses = loss_flops(decoder.card.size)
        cells = [f"{plan.each:.3g}", f"{losses:.3g}", f"{plan.steps:,}", f"{plan.each * plan.images:.3g}"]
        rows.append([name, f"{parameters(decoder) / 1e6:.2f} M", *cells, f"{plan.share:.3f}"])
    return markdown_table([row + [""] * (len(rows[0]) - len(row)) for row in rows])


def save_curves(folder: Path, names: Sequence[str]) -> Path:
    """Plots the held-out perceptual distance over steps for decoders with a log: `<folder>/opponents/curves.png`."""
    logs = {name: read_log(folder / opponent_file(name).removesuffix(".safetensors")) for name in names}
    logs = {name: log for name, log in logs.items() if log}
    path = folder / "opponents" / "curves.png"
    save_image(training_curves(logs, dict.fromkeys(logs, "eval/perceptual")), path)
    return path


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument(
        "--operations", type=float, default=1.0, help="training FLOPs, times those of the diffusion decoder"
    )
    parser.add_argument(
        "--vlm-conditions",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the scenes for which decoders on the condition get the VLM's own (see post_train_decoder)",
    )
    parser.add_argument("--compile", action="store_true", help="compile the blocks (needs a C++ compiler)")
    parser.add_argument("--plan", action="store_true", help="say what would be trained, and train nothing")
    chosen = parser.parse_args()
    context = stage_context(chosen, compiled=chosen.compile)
    print(planned(context, chosen.weights, operations=chosen.operations), flush=True)
    if chosen.plan:
        return
    for name in chosen.only:
        if name == DIFFUSION:
            train_diffusion_on_tokens(context, chosen.weights, operations=chosen.operations)
        else:
            share = chosen.vlm_conditions
            train_feed_forward(context, chosen.weights, name, operations=chosen.operations, vlm_share=share)
    print(save_curves(context.folder, NAMES))


if __name__ == "__main__":
    main()
