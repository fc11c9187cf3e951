"""Trains pico's masked sampler: captions to image tokens, many at a time, with wrong ones revised.

`python -m dcdd_pico.train_progressive` trains it for existing weights, resuming where it stopped, and writes it beside
them. It starts from pico's Janus. Its scenes are rendered on the fly, or are those that Janus' training left as tokens
in the same work folder.

Shapes: B batch, N tokens, K codes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dcdd_core import registry
from dcdd_core.evaluation.figures import save_image, training_curves
from dcdd_core.files import write_text
from dcdd_core.method.masked_modelling import CORRUPTIONS
from dcdd_core.method.sampling import keyed_generator
from dcdd_core.models.janus.masked_start import TEMPLATE, start_from_janus
from dcdd_core.models.masked.files import save_masked
from dcdd_core.models.masked.network import MaskedTransformer
from dcdd_core.models.masked.words import Words
from dcdd_core.models.text_tokenizer import save_tokenizer
from dcdd_core.training.log import read_log
from dcdd_core.training.masked_loss import Corruption, MaskedExample, drop_captions, make_example, masked_losses
from dcdd_core.training.masked_task import muon_matrices
from dcdd_core.types import Codebook

from .build_context import BuildContext, Recipe, stage_context, stage_parser
from .embedded import model_paths
from .progressive import SAMPLING, TOKENIZER, progressive_folder
from .scene_tokens import TokenBatch, different_scenes, encode_scenes, scene_facts_of
from .token_training import TokenTraining, block_of
from .training_loop import last_held_out

_STAGE = 9
_RATE = 1e-3
_WARMUP = 150
_DROPPED = 0.1
_SAVE_EVERY = 250
#: Folder of the training's log and checkpoint in a work folder.
_NAME = "progressive"


def train_progressive(
    context: BuildContext,
    weights: Path,
    *,
    kinds: Sequence[str] = CORRUPTIONS,
    name: str = _NAME,
    ahead: bool = True,
) -> tuple[MaskedTransformer, Codebook]:
    """Trains (or restores) the masked sampler of the models in `weights`.

    Args:
        kinds: the corruptions that it learns to undo.
        name: the training's folder in the work folder.
        ahead: see `SceneTokens`.
    """
    recipe, device = context.recipe, context.device
    steps, size = recipe.progressive_steps, recipe.progressive_batch
    janus_folder = model_paths(weights)["vlm"]
    family = registry.sampler_family(janus_folder)
    sampler = family.load_sampler(str(janus_folder))
    tokenizer = family.load_tokenizer(str(janus_folder), device=device, dtype=torch.float32)
    codebook = sampler.codebook
    words = Words(sampler.tokenizer, TEMPLATE)
    layers = min(recipe.progressive_layers, sampler.model.config.text_config.num_hidden_layers)
    network = start_from_janus(sampler.model, recipe.seed + _STAGE, layers=layers).to(device)
    if recipe.compiled:
        for layer in network.layers:
            layer.compile(dynamic=True)  # Captions differ in length, and updates in the number of rows drawn for.
    trained = dict(network.named_parameters())
    training = TokenTraining(
        context,
        weights,
        tokenizer,
        network,
        trained=trained,
        matrices=muon_matrices(trained),
        uses=recipe.progressive_uses,
        ahead=ahead,
    )

    def averaged(work: Callable[[MaskedTransformer], Any]) -> Any:
        with training.averaged() as model, bfloat16(context):
            return work(model)

    corruption = Corruption(kinds, codebook, averaged)
    held_out_facts = scene_facts_of("calibration", range(recipe.held_out_scenes))
    held_out_tokens, held_out_errors = encode_scenes(
        tokenizer, "calibration", range(recipe.held_out_scenes), size=recipe.size
    )
    mean, deviation = held_out_errors.mean(), held_out_errors.std()

    def example_of(
        facts: Sequence[Any], tokens: torch.Tensor, errors: torch.Tensor, draw: torch.Generator
    ) -> MaskedExample:
        ids = [words.ids(one.caption()) for one in facts]
        ids = drop_captions(ids, _DROPPED, words.unconditional, draw)
        return make_example(ids, tokens, (errors - mean) / deviation, corruption, draw, codes=codebook.size)

    def objective(i: int, found: TokenBatch) -> dict[str, torch.Tensor]:
        example = example_of(found.facts, found.tokens, found.errors, keyed_generator(recipe.seed, _STAGE, i))
        with bfloat16(context):
            return masked_losses(network, example)

    @torch.no_grad()
    def evaluate(_: int) -> dict[str, float]:
        """Means over the held-out scenes. What is hidden is the same each time, and so are wrong tokens, but for those
        that the averaged model samples."""
        found: dict[str, list[float]] = {}
        for start in range(0, len(held_out_tokens), size):
            part = slice(start, start + size)
            draw = keyed_generator(recipe.seed, _STAGE, 1 << 41, start)
            example = example_of(held_out_facts[part], held_out_tokens[part], held_out_errors[part], draw)
            losses = averaged(lambda model, example=example: masked_losses(model, example))
            for name, value in losses.items():
                found.setdefault(name, []).append(float(value))
        return {name: sum(values) / len(values) for name, values in found.items()}

    training.run(
        name,
        objective,
        evaluate,
        steps=steps,
        batch=size,
        peak=_RATE,
        warmup=_WARMUP,
        settings=context.settings(
            "progressive_layers",
            "progressive_batch",
            "progressive_uses",
            start=sampler.fingerprint,
            corruptions=list(kinds),
        ),
        save_every=_SAVE_EVERY,
    )
    return network, codebook


@contextmanager
def bfloat16(context: BuildContext) -> Iterator[None]:
    """`BuildContext.autocast`, with attention computed in bfloat16 too.

    By default PyTorch's math attention converts to float32, which is slower on a CPU.
    """
    allow = torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp  # applies to all devices, despite its name
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    allow(True)
    try:
        with context.autocast():
            yield
    finally:
        allow(before)


def save_sampler(folder: Path, weights: Path, network: MaskedTransformer, codebook: Codebook, *, name: str) -> None:
    """Writes a masked sampler of the models in `weights` into a folder.

    Linear weights are stored in 8 bits with one scale per row, which takes half the space of float16.
    """
    vlm = model_paths(weights)["vlm"]
    sampling = {"template": TEMPLATE, "tokenizer": TOKENIZER, "sampling": SAMPLING}
    save_masked(folder, network, codebook, name=name, int8=True, **sampling)
    save_tokenizer(registry.sampler_family(vlm).load_sampler(str(vlm)).tokenizer, folder)


def save_progressive(
    context: BuildContext,
    weights: Path,
    network: MaskedTransformer,
    codebook: Codebook,
    *,
    kinds: Sequence[str] = CORRUPTIONS,
) -> Path:
    """Writes the sampler beside the models in `weights`, with a card and its training curves; returns its folder.

    Args:
        kinds: the corruptions it was trained with.
    """
    folder = progressive_folder(weights)
    save_sampler(folder, weights, network, codebook, name="pico progressive")
    log = read_log(context.folder / _NAME)
    write_text(folder / "README.md", card(context.recipe, network, log, kinds))
    curves = training_curves(
        {"progressive": log, "revision": log}, {"progressive": "eval/hidden", "revision": "eval/wrong"}
    )
    save_image(curves, context.folder / "progressive-curves.png")
    return folder


def card(recipe: Recipe, network: MaskedTransformer, log: Sequence[dict[str, Any]], kinds: Sequence[str]) -> str:
    """Describes the weights, in Markdown.

    Args:
        kinds: the corruptions they were trained with.
    """
    parameters = sum(weight.numel() for weight in network.parameters())
    drawn = recipe.progressive_steps * recipe.progressive_batch
    different = different_scenes(drawn, block=block_of(recipe.train_scenes), uses=recipe.progressive_uses)
    seconds, table = last_held_out(log)
    return f"""# pico's masked sampler

A bidirectional transformer of {parameters / 1e6:.1f} M parameters that reveals image tokens in a few passes and revises
them (`dcdd_core.method.progressive`). It started from the first {network.config.layers} layers of pico's Janus and
was trained for {recipe.progressive_steps:,} updates of {recipe.progressive_batch} scenes ({drawn:,} drawn,
{different:,} different ones), {seconds / 3600:.2f} hours. Wrong tokens: {", ".join(kinds) or "none"}.
Weights: int8 with a float32 scale a row.

Command: `python -m dcdd_pico.train_progressive`. Held-out loss in nats a token, and of the two scores, at the end:

{table}
"""


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--steps", type=int, default=Recipe.progressive_steps, help="updates (default %(default)s)")
    parser.add_argument("--corruptions", nargs="*", default=CORRUPTIONS, choices=CORRUPTIONS)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: as the recipe says")
    chosen = parser.parse_args()
    own = Recipe.defaults("progressive_") | {"progressive_steps": chosen.steps, "compiled": chosen.compile}
    context = stage_context(chosen, **own)
    trained = train_progressive(context, chosen.weights, kinds=chosen.corruptions)
    print(save_progressive(context, chosen.weights, *trained, kinds=chosen.corruptions))
    context.recipe.save(chosen.weights)


if __name__ == "__main__":
    main()
