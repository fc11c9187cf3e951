"""What a masked sampler learns from a batch: images with hidden positions and wrong tokens, and the losses on them.

Shapes: B batch, N tokens, K codes, D code dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ..method import masked_modelling
from ..method.masked_modelling import CORRUPTIONS
from ..models.masked.network import MaskedTransformer
from ..models.masked.words import padded
from ..protocols import ImageTokenizer
from ..types import Codebook

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


class Totals(NamedTuple):
    """What sums of losses are divided by to become means.

    Attributes:
        weight: sum of the positions' weights in the tokens' cross-entropy.
        hidden, wrong: numbers of such positions.
        measured: number of images whose importance was measured.
    """

    weight: float
    hidden: float
    wrong: float
    measured: float


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedExample:
    """What the network sees of a batch, and what it should predict.

    Attributes:
        ids: token ids of the captions, or of the row without a caption.
        tokens: the images' own, [B, N] int64.
        errors: standardised log quantisation errors [B, N].
        hidden, wrong: bool [B, N]; hidden positions, and visible ones with another token than the image's.
        seen: [B, N] int64, the tokens that the network sees; K where hidden.
        probe: bool [B, N], some of the hidden positions, in the images that are read twice.
        totals: what its losses are divided by, if they are parts of means over more images (`in_one_mean`); None for
            means over this batch.
    """

    ids: list[list[int]]
    tokens: torch.Tensor
    errors: torch.Tensor
    hidden: torch.Tensor
    wrong: torch.Tensor
    seen: torch.Tensor
    probe: torch.Tensor
    totals: Totals | None = None


class Corruption:
    """Replaces visible tokens by wrong ones, using one kind of corruption for each image.

    Args:
        kinds: some of `CORRUPTIONS`; with none, all visible tokens stay right.
        run: runs a function on the model that draws the kind "samples", and returns its result.

    Raises:
        ValueError: for an unknown kind.
    """

    def __init__(
        self, kinds: Sequence[str], codebook: Codebook, run: Callable[[Callable[[MaskedTransformer], Any]], Any]
    ):
        if unknown := set(kinds) - set(CORRUPTIONS):
            raise ValueError(f"unknown corruptions {sorted(unknown)}: expected some of {', '.join(CORRUPTIONS)}")
        self.kinds, self.run = tuple(kinds), run
        count = min(_NEIGHBOURS, codebook.size - 1)
        self.neighbours = masked_modelling.neighbours(codebook.vectors.cpu(), count) if "nearest" in kinds else None

    def drawing(self, run: Callable[[Callable[[MaskedTransformer], Any]], Any]) -> Corruption:
        """A copy with another `run`."""
        other = copy.copy(self)
        other.run = run
        return other

    @torch.no_grad()
    def __call__(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        chosen: torch.Tensor,
        ids: list[list[int]],
        draw: torch.Generator,
    ) -> torch.Tensor:
        """Tokens [B, N], replaced at the `chosen` positions (bool [B, N], visible ones); a few may stay the same."""
        if not self.kinds:
            return tokens
        kind = torch.randint(len(self.kinds), (len(tokens),), generator=draw)
        found = tokens.clone()
        for number, name in enumerate(self.kinds):
            rows = ((kind == number) & chosen.any(1)).nonzero().flatten()
            if not len(rows):
                continue
            if name == "shuffled":
                others = masked_modelling.shuffled(tokens[rows], draw)
            elif name == "nearest":
                others = masked_modelling.nearest(tokens[rows], self.neighbours, draw)
            else:
                others = self._samples(tokens[rows], hidden[rows], chosen[rows], [ids[row] for row in rows], draw)
            found[rows] = torch.where(chosen[rows], others, tokens[rows])
        return found

    def _samples(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        chosen: torch.Tensor,
        ids: list[list[int]],
        draw: torch.Generator,
    ) -> torch.Tensor:
        """The model's draws at the `chosen` positions, all at once and blind to each other, as in a parallel pass."""

        def chances_of(model: MaskedTransformer) -> torch.Tensor:
            device = model.mask.device
            seen = tokens.masked_fill(hidden | chosen, model.mask_token).to(device)
            states = model(seen, model.prefix(*padded(ids, device)))
            return model.logits(states[chosen.to(device)]).softmax(-1).cpu()

        drawn = tokens.clone()
        drawn[chosen] = torch.multinomial(self.run(chances_of), 1, generator=draw)[:, 0]
        return drawn


def tokens_and_errors(tokenizer: ImageTokenizer, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, N] int64 and log quantisation errors [B, N] float32 of features [B, N, D], on the CPU.

    The error is the logarithm of the tokenizer's `quantisation_errors`, with these at least 1e-4.
    """
    tokens = tokenizer.tokens(features)
    return tokens.cpu(), tokenizer.quantisation_errors(features, tokens).clamp(min=1e-4).log().cpu()


def drop_captions(
    ids: Sequence[list[int]],
    share: float,
    unconditional: Callable[[list[int]], list[int]],
    draw: torch.Generator,
) -> list[list[int]]:
    """The ids of captions, of which a share is replaced by the row without a prompt, to train guidance."""
    dropped = torch.rand(len(ids), generator=draw) < share
    return [unconditional(row) if drop else row for row, drop in zip(ids, dropped)]


def make_example(
    ids: list[list[int]],
    tokens: torch.Tensor,
    errors: torch.Tensor,
    corruption: Corruption,
    draw: torch.Generator,
    *,
    codes: int,
    schedule: str = "arccos",
) -> MaskedExample:
    """Hides and corrupts tokens of a batch; everything is on the CPU.

    Args:
        codes: K.
        schedule: one of `masked_modelling.HIDDEN_SHARES`.
    """
    batch = len(tokens)
    shares = masked_modelling.hidden_shares(torch.rand(batch, generator=draw), schedule)
    shares = shares.masked_fill(torch.rand(batch, generator=draw) < _COMPLETE, 0.0)
    hidden = masked_modelling.pick(shares, torch.ones_like(tokens, dtype=torch.bool), draw)
    chosen = masked_modelling.pick(_MOST_WRONG * torch.rand(batch, generator=draw), ~hidden, draw)
    shown = corruption(tokens, hidden, chosen, ids, draw)
    probe = masked_modelling.pick(torch.full((batch,), _PROBE), hidden, draw)
    probe[max(1, batch // _PROBED) :] = False
    return MaskedExample(
        ids=ids,
        tokens=tokens,
        errors=errors,
        hidden=hidden,
        wrong=~hidden & (shown != tokens),
        seen=shown.masked_fill(hidden, codes),
        probe=probe,
    )


def in_one_mean(
    examples: Sequence[MaskedExample], total: Callable[[torch.Tensor], torch.Tensor], *, parts: int = 1
) -> list[MaskedExample]:
    """These examples, with the losses of each as its part of the mean over all of them in all processes.

    Every position then weighs alike, however the images are divided into batches.

    Args:
        examples: this process's; maybe none.
        total: numbers of this process -> their sums over all processes.
        parts: how many examples all processes have, if the mean of their losses shall be that mean; 1 for their sum.
    """
    own = torch.zeros(len(Totals._fields))
    for example in examples:
        hidden, wrong = example.hidden, example.wrong
        weight = masked_modelling.position_weights(hidden, wrong)
        own += torch.stack(
            [part.sum() for part in (weight, hidden, wrong, masked_modelling.is_measured(hidden, example.probe))]
        )
    # A total of 0 divides a sum of nothing.
    totals = Totals(*((value or 1.0) / parts for value in total(own).tolist()))
    return [replace(example, totals=totals) for example in examples]


def masked_losses(network: MaskedTransformer, example: MaskedExample) -> dict[str, torch.Tensor]:
    """The losses of a batch, and means to log: cross-entropy where hidden and where wrong.

    "loss" is what is trained: the tokens' weighted cross-entropy plus small multiples of the two scores' losses.
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
    whole, in_hidden, in_wrong, in_measured = example.totals or (None,) * len(Totals._fields)
    errors = (predicted_error - moved["errors"]).square()
    error_loss = masked_modelling.weighted_mean(errors, hidden.float(), in_hidden)

    probed = max(1, len(tokens) // _PROBED)
    with torch.no_grad():
        more = torch.where(probe, tokens, seen)[:probed]
        after = masked_modelling.token_losses(network.logits(network(more, prefix.rows(0, probed))), tokens[:probed])
        parts = (hidden[:probed], probe[:probed])
        measured = masked_modelling.measured_importance(token_losses[:probed], after, *parts)
    importance_loss = masked_modelling.importance_loss(predicted_importance[:probed], measured, *parts, in_measured)
    token_loss = masked_modelling.weighted_mean(token_losses, weights, whole)
    return {
        "loss": token_loss + _ERROR_WEIGHT * error_loss + _IMPORTANCE_WEIGHT * importance_loss,
        "hidden": masked_modelling.weighted_mean(token_losses, hidden.float(), in_hidden).detach(),
        "wrong": masked_modelling.weighted_mean(token_losses, wrong.float(), in_wrong).detach(),
        "error": error_loss.detach(),
        "importance": importance_loss.detach(),
    }
