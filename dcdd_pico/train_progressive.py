"""Trains pico's masked sampler: captions to image tokens, many at a time, with wrong ones taken back.

`python -m dcdd_pico.train_progressive` trains it for the weights that are there, resuming where it stopped, and writes
it beside them. It starts from pico's Janus and reads scenes that are rendered as it goes.

Shapes: B batch, N tokens, K codes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcdd_core import registry
from dcdd_core.evaluation.figures import save_image, training_curves
from dcdd_core.files import write_text
from dcdd_core.method import masked_modelling
from dcdd_core.method.masked_modelling import CORRUPTIONS
from dcdd_core.method.sampling import keyed_generator
from dcdd_core.models.masked.files import save_masked
from dcdd_core.models.masked.network import MaskedTransformer
from dcdd_core.models.masked.words import Words, padded
from dcdd_core.training.ema import EMA
from dcdd_core.training.log import read_log
from dcdd_core.training.optimizers import adamw_with_muon
from dcdd_core.training.schedules import set_learning_rate, warmup_cosine
from dcdd_core.types import Codebook

from .build_context import WORK, BuildContext, Recipe
from .embedded import WEIGHTS, model_paths
from .progressive import SAMPLING, TEMPLATE, TOKENIZER, progressive_folder, start_from_janus
from .scene_tokens import SceneTokens, encode_scenes, scene_facts_of
from .train_janus import save_tokenizer
from .train_tokenizer import tokens_digest
from .training_loop import train

_STAGE = 9
_RATE = 1e-3
_DROPPED = 0.1
_EMA = 0.998
_NEIGHBOURS = 8
_MOST_WRONG = 0.4
"""Largest share of the visible tokens that are replaced; uniform from 0, on average .2."""
_COMPLETE = 0.1
"""Share of the images that have no hidden position, as in the passes that only revise."""
_PROBED = 4
"""One in so many images is read a second time, with a few more positions revealed, to measure importance."""
_PROBE = 0.08
"""Share of the hidden positions that are revealed there."""
_ERROR_WEIGHT, _IMPORTANCE_WEIGHT = 0.05, 0.02
_BLOCK = 2048
_SAVE_EVERY = 250


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """What the network sees of a batch, and what it is asked for.

    Attributes:
        ids: of the captions, or of the rows without one.
        tokens: the scenes' own, [B, N] int64.
        errors: standardised log quantisation error [B, N].
        hidden, wrong: bool [B, N]; hidden positions, and visible ones with another token than the scene's.
        seen: [B, N] int64, what stands there: K where hidden.
        probe: bool [B, N], some of the hidden positions, in the images that are read twice.
    """

    ids: list[list[int]]
    tokens: torch.Tensor
    errors: torch.Tensor
    hidden: torch.Tensor
    wrong: torch.Tensor
    seen: torch.Tensor
    probe: torch.Tensor


class Corruption:
    """Replaces visible tokens by wrong ones, each image's from one source.

    Args:
        kinds: some of `CORRUPTIONS`; none leaves all visible tokens right.
        model: whose draws are "samples"; used as it is when called.
    """

    def __init__(self, kinds: Sequence[str], codebook: Codebook, model: MaskedTransformer):
        if unknown := set(kinds) - set(CORRUPTIONS):
            raise ValueError(f"unknown corruptions {sorted(unknown)}: expected some of {', '.join(CORRUPTIONS)}")
        self.kinds, self.model = tuple(kinds), model
        self.neighbours = masked_modelling.neighbours(codebook.vectors.cpu(), _NEIGHBOURS)

    @torch.no_grad()
    def __call__(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        chosen: torch.Tensor,
        ids: list[list[int]],
        draw: torch.Generator,
    ) -> torch.Tensor:
        """Tokens [B, N] with others at the `chosen` positions (bool [B, N], visible ones); a few may be the same."""
        if not self.kinds:
            return tokens
        kind = torch.randint(len(self.kinds), (len(tokens),), generator=draw)
        found = tokens.clone()
        for number, name in enumerate(self.kinds):
            rows = (kind == number).nonzero().flatten()
            if not len(rows):
                continue
            if name == "shuffled":
                others = masked_modelling.shuffled(tokens[rows], draw)
            elif name == "nearest":
                others = masked_modelling.nearest(tokens[rows], self.neighbours, draw)
            else:
                others = self._samples(tokens[rows], (hidden | chosen)[rows], [ids[row] for row in rows], draw)
            found[rows] = torch.where(chosen[rows], others, tokens[rows])
        return found

    def _samples(
        self, tokens: torch.Tensor, hidden: torch.Tensor, ids: list[list[int]], draw: torch.Generator
    ) -> torch.Tensor:
        """The model's draws where `hidden`, all at once: the mistakes of a parallel pass."""
        device = self.model.mask.device
        seen = tokens.masked_fill(hidden, self.model.mask_token).to(device)
        chances = self.model.logits(self.model(seen, self.model.prefix(*padded(ids, device)))).softmax(-1).cpu()
        drawn = torch.multinomial(chances.flatten(0, 1), 1, generator=draw)
        return drawn.view(tokens.shape)


def make_example(
    ids: list[list[int]], tokens: torch.Tensor, errors: torch.Tensor, corruption: Corruption, draw: torch.Generator
) -> Example:
    """Hides and corrupts a batch; everything on the CPU."""
    batch = len(tokens)
    shares = masked_modelling.hidden_shares(torch.rand(batch, generator=draw))
    shares = shares.masked_fill(torch.rand(batch, generator=draw) < _COMPLETE, 0.0)
    hidden = masked_modelling.pick(shares, torch.ones_like(tokens, dtype=torch.bool), draw)
    chosen = masked_modelling.pick(_MOST_WRONG * torch.rand(batch, generator=draw), ~hidden, draw)
    shown = corruption(tokens, hidden, chosen, ids, draw)
    probe = masked_modelling.pick(torch.full((batch,), _PROBE), hidden, draw)
    probe[max(1, batch // _PROBED) :] = False
    return Example(
        ids=ids,
        tokens=tokens,
        errors=errors,
        hidden=hidden,
        wrong=~hidden & (shown != tokens),
        seen=shown.masked_fill(hidden, corruption.model.mask_token),
        probe=probe,
    )


def losses_of(network: MaskedTransformer, example: Example) -> dict[str, torch.Tensor]:
    """The losses of a batch, and means to log: cross-entropy where hidden and where wrong.

    "loss" is what is trained: the tokens' weighted cross-entropy and small parts of the two scores' losses.
    """
    device = network.mask.device
    moved = {
        name: getattr(example, name).to(device) for name in ("tokens", "errors", "hidden", "wrong", "seen", "probe")
    }
    tokens, hidden, wrong, seen, probe = (moved[name] for name in ("tokens", "hidden", "wrong", "seen", "probe"))
    prefix = network.prefix(*padded(example.ids, device))
    states = network(seen, prefix)
    token_losses = masked_modelling.token_losses(network.logits(states), tokens)
    weights = masked_modelling.position_weights(hidden, wrong)
    predicted_error, predicted_importance = network.scores(states)
    error_loss = masked_modelling.weighted_mean((predicted_error - moved["errors"]).square(), hidden.float())

    probed = max(1, len(tokens) // _PROBED)
    with torch.no_grad():
        more = torch.where(probe, tokens, seen)[:probed]
        after = masked_modelling.token_losses(network.logits(network(more, prefix.rows(0, probed))), tokens[:probed])
        parts = (hidden[:probed], probe[:probed])
        measured = masked_modelling.measured_importance(token_losses[:probed], after, *parts)
    importance_loss = masked_modelling.importance_loss(predicted_importance[:probed], measured, *parts)
    token_loss = masked_modelling.weighted_mean(token_losses, weights)
    return {
        "loss": token_loss + _ERROR_WEIGHT * error_loss + _IMPORTANCE_WEIGHT * importance_loss,
        "hidden": masked_modelling.weighted_mean(token_losses, hidden.float()).detach(),
        "wrong": masked_modelling.weighted_mean(token_losses, wrong.float()).detach(),
        "error": error_loss.detach(),
        "importance": importance_loss.detach(),
    }


def train_progressive(
    context: BuildContext,
    weights: Path,
    *,
    kinds: Sequence[str] = CORRUPTIONS,
    ahead: bool = True,
) -> tuple[MaskedTransformer, Codebook]:
    """Trains (or restores) the masked sampler of the models in `weights`.

    Args:
        kinds: the corruptions it learns to take back.
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
    network = start_from_janus(sampler.model, recipe.seed + _STAGE).to(device)
    trained = dict(network.named_parameters())
    matrices = [name for name, weight in trained.items() if name.startswith("layers.") and weight.ndim == 2]
    optimizers = adamw_with_muon(trained, matrices, betas=(0.9, 0.95), weight_decay=0.05)
    ema = EMA(trained, _EMA)
    corruption = Corruption(kinds, codebook, network)
    digest = tokens_digest(tokenizer.model)
    block = min(_BLOCK, recipe.train_scenes)
    scenes = SceneTokens(
        context.folder / "progressive-tokens",
        weights.resolve(),
        digest,
        seed=recipe.seed,
        size=recipe.size,
        block=block,
        ahead=ahead,
    )

    held_out_facts = scene_facts_of("calibration", range(recipe.held_out_scenes))
    held_out_tokens, held_out_errors = encode_scenes(
        tokenizer, "calibration", range(recipe.held_out_scenes), size=recipe.size
    )
    mean, deviation = held_out_errors.mean(), held_out_errors.std()

    def example_of(facts: Sequence[Any], tokens: torch.Tensor, errors: torch.Tensor, draw: torch.Generator) -> Example:
        ids = [words.ids(one.caption()) for one in facts]
        dropped = torch.rand(len(ids), generator=draw) < _DROPPED
        ids = [words.unconditional(row) if drop else row for row, drop in zip(ids, dropped)]
        with ema.swapped_in(), context.autocast():
            return make_example(ids, tokens, (errors - mean) / deviation, corruption, draw)

    def step(i: int) -> dict[str, torch.Tensor]:
        found = scenes.batch(i, size)
        example = example_of(found.facts, found.tokens, found.errors, keyed_generator(recipe.seed, _STAGE, i))
        with context.autocast():
            losses = losses_of(network, example)
        network.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        for optimizer in optimizers.values():
            set_learning_rate(optimizer, warmup_cosine(i, steps, peak=_RATE, warmup=min(150, max(1, steps // 20))))
            optimizer.step()
        ema.update()
        return {name: value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def evaluate(_: int) -> dict[str, float]:
        """Means over the held-out scenes, hidden and corrupted the same way each time."""
        found: dict[str, list[float]] = {}
        for start in range(0, len(held_out_tokens), size):
            part = slice(start, start + size)
            draw = keyed_generator(recipe.seed, _STAGE, 1 << 41, start)
            example = example_of(held_out_facts[part], held_out_tokens[part], held_out_errors[part], draw)
            with ema.swapped_in(), context.autocast():
                losses = losses_of(network, example)
            for name, value in losses.items():
                found.setdefault(name, []).append(float(value))
        return {name: sum(values) / len(values) for name, values in found.items()}

    try:
        train(
            context.folder / "progressive",
            settings=context.settings(
                "progressive_batch",
                tokenizer=digest,
                start=sampler.fingerprint,
                corruptions=list(kinds),
                rate=_RATE,
                block=block,
            ),
            steps=steps,
            step=step,
            state={"model": network, "ema": ema, **optimizers},
            evaluate=evaluate,
            evaluate_every=500,
            save_every=_SAVE_EVERY,
            log_every=25,
        )
    finally:
        scenes.close()
    ema.apply()
    return network.eval().requires_grad_(False), codebook


def save_progressive(context: BuildContext, weights: Path, network: MaskedTransformer, codebook: Codebook) -> Path:
    """Writes the sampler beside the models in `weights`, with a card and its training's curves; returns its folder.

    Linear weights are stored in 8 bits with one scale a row: 5.5 MB where float16 takes 11.
    """
    folder = progressive_folder(weights)
    sampler = registry.sampler_family(model_paths(weights)["vlm"]).load_sampler(str(model_paths(weights)["vlm"]))
    save_masked(
        folder,
        network,
        codebook,
        name="pico progressive",
        template=TEMPLATE,
        tokenizer=TOKENIZER,
        sampling=SAMPLING,
        int8=True,
    )
    save_tokenizer(sampler.tokenizer, folder)
    log = read_log(context.folder / "progressive")
    write_text(folder / "README.md", card(context.recipe, network, log))
    curves = training_curves(
        {"progressive": log, "revision": log}, {"progressive": "eval/hidden", "revision": "eval/wrong"}
    )
    save_image(curves, context.folder / "progressive-curves.png")
    return folder


def card(recipe: Recipe, network: MaskedTransformer, log: Sequence[dict[str, Any]]) -> str:
    """What the weights are, in Markdown."""
    last = next((line for line in reversed(log) if "eval/loss" in line), {})
    parameters = sum(weight.numel() for weight in network.parameters())
    drawn = recipe.progressive_steps * recipe.progressive_batch
    rows = "\n".join(
        f"| {name.removeprefix('eval/')} | {last[name]:.4f} |" for name in last if name.startswith("eval/")
    )
    return f"""# pico's masked sampler

A bidirectional transformer of {parameters / 1e6:.1f} M parameters that reveals image tokens in a few passes and revises
them (`dcdd_core.method.progressive`). It started from pico's Janus and was trained for {recipe.progressive_steps:,}
updates of {recipe.progressive_batch} scenes ({drawn:,} drawn; each fresh scene is drawn three times),
{last.get("seconds", 0) / 3600:.2f} hours. Weights: int8 with a float32 scale a row.

Command: `python -m dcdd_pico.train_progressive`. Held-out loss in nats a token, and of the two scores, at the end:

| held-out | |
|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=WORK, help="work folder")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="updates; the recipe's by default")
    parser.add_argument("--corruptions", nargs="*", default=CORRUPTIONS, choices=CORRUPTIONS)
    chosen = parser.parse_args()
    recipe = Recipe.load(chosen.weights)
    if chosen.steps is not None:
        recipe = replace(recipe, progressive_steps=chosen.steps)
    context = BuildContext(folder=chosen.folder, device=torch.device(chosen.device), recipe=recipe)
    trained = train_progressive(context, chosen.weights, kinds=chosen.corruptions)
    print(save_progressive(context, chosen.weights, *trained))


if __name__ == "__main__":
    main()
