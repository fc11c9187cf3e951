"""Progressive sampling (Fei et al. 2022, arXiv 2210.02291): what each pass reveals, in which order, what it redraws.

A pass sees the prompt and all tokens so far, draws every hidden position, keeps those that come first in the order, and
draws revealed ones again. Only the paper's abstract is public: two of the orders and revision are the paper's, but all
formulas here are our choice or those of the methods named.

Orders are computed on the CPU in float64, so that ties are broken alike on every device.

Shapes: B batch, N positions (a row-major h x w grid).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch

from ..protocols import SamplingOptions
from ..settings import require_number, shown
from ..types import TokenLogits
from .sampling import keyed_generator

MOST_PASSES = 4096
"""A guard against typing errors: as many passes as a 64 x 64 grid has tokens."""
_MOST_SIDE = 1024
"""Longest side of a grid, in tokens."""
_ORDER_KEY = 0x0DE5
"""Key of the order's noise, which keeps it apart from the tokens' noise, whose keys are the positions."""
# 8 passes over 144 positions, "cosine": 3 8 13 18 22 25 27 28; "arccos": 11 12 12 13 14 16 20 46; "linear": 18 each.
_SHARES: Mapping[str, Callable[[float], float]] = {
    # Used by MaskGIT (Chang et al. 2022, arXiv 2202.04200) and aMUSEd: few positions first.
    "cosine": lambda t: 1 - math.cos(math.pi / 2 * t),
    # Used by MaskGIT's reproduction (Besnier and Chen 2023, arXiv 2310.14400), Halton-MaskGIT (arXiv 2503.17076) and
    # BIGFix: more first than "cosine", and a third of all in the last of 8 passes.
    "arccos": lambda t: 1 - math.acos(t) * 2 / math.pi,
    "linear": lambda t: t,
}
SCHEDULES = tuple(_SHARES)

Schedule = str | tuple[float, ...]
Revise = int | Literal["all"]


def revealed_share(t: float, schedule: str) -> float:
    """Share of the positions revealed once the share t of the revealing passes is done; 0 -> 0, 1 -> 1.

    Raises:
        ValueError: for an unknown schedule, or a t outside 0..1.
    """
    if schedule not in _SHARES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)} or a list of numbers, got {shown(schedule)}")
    if not 0 <= t <= 1:
        raise ValueError(f"t must lie in 0..1, got {t!r}: it is the share of passes that are done")
    return _SHARES[schedule](t)


def stage_counts(count: int, passes: int, schedule: Schedule = "arccos") -> tuple[int, ...]:
    """How many of `count` positions each of `passes` reveals; they sum to `count`.

    With a named schedule every pass reveals at least one; if there are more passes than positions, the first ones
    reveal none, so that all are drawn late in the guidance ramp. A list has one number >= 0 for each pass, in any unit
    (shares or counts); a pass with 0 reveals nothing.

    Raises:
        ValueError: for an unknown schedule, numbers out of range, or a list that is not one number for each pass.
    """
    require_number("count", count, whole=True, least=0)
    require_number("passes", passes, whole=True, least=1, most=MOST_PASSES)
    if isinstance(schedule, str) and count < passes:
        revealed_share(0.0, schedule)
        return (0,) * (passes - count) + (1,) * count
    if isinstance(schedule, str):
        ends = [math.floor(count * revealed_share(i / passes, schedule) + 0.5) for i in range(1, passes + 1)]
        done = 0
        for i, end in enumerate(ends, start=1):
            # At least one, and no more than leaves one for each pass that follows.
            ends[i - 1] = done = min(max(end, done + 1), count - (passes - i))
    else:
        _check_list(schedule, passes)
        total, part = math.fsum(schedule), 0.0
        ends = []
        for number in schedule:
            part += number
            ends.append(math.floor(count * min(1.0, part / total) + 0.5))
    return tuple(end - start for start, end in zip([0, *ends], ends))


def guidance_ramp(guidance: float, passes: int) -> tuple[float, ...]:
    """Guidance of each revealing pass: linear from 1, the prompt alone, to `guidance`; a single pass has `guidance`.

    Raises:
        ValueError: for passes out of range.
    """
    require_number("passes", passes, whole=True, least=1, most=MOST_PASSES)
    return tuple(1 + (guidance - 1) * i / (passes - 1) if passes > 1 else guidance for i in range(passes))


@dataclass(frozen=True, kw_only=True, eq=False)
class OrderState:
    """What an order may read.

    Attributes:
        grid: (h, w).
        noise: [B, N], standard Gumbel noise from `order_noise`.
        log_probability: [B, N], of the tokens that this pass drew, under guidance and temperature.
        quantisation_error: [B, N], as predicted by the model, in standard deviations from its mean.
        importance: [B, N], how much revealing a position lowers the loss of the others, as predicted by the model.
    """

    grid: tuple[int, int]
    noise: torch.Tensor
    log_probability: torch.Tensor | None = None
    quantisation_error: torch.Tensor | None = None
    importance: torch.Tensor | None = None


class Order(NamedTuple):
    """An order of revealing.

    Attributes:
        scores: state -> [B, N]; the highest are revealed first.
        reads: the state's field that the network predicts; None if grid and noise suffice, so that no network runs.
        noise: temperature of the Gumbel noise added to the scores in the first pass.
    """

    scores: Callable[[OrderState], torch.Tensor]
    reads: str | None = None
    noise: float = 0.0


#: Orders by name. Quantisation error and dynamic importance are the paper's, the others are baselines.
ORDERS: Mapping[str, Order] = {
    "quantisation-error": Order(lambda state: -state.quantisation_error, reads="quantisation_error"),
    "importance": Order(lambda state: state.importance, reads="importance"),
    # MaskGIT's, with its authors' temperature. In their code pass i of 1..R uses (1 - i / R) of it; here it falls as in
    # the released samplers of aMUSEd and BIGFix (`ProgressiveOptions.order_noises`).
    "confidence": Order(lambda state: state.log_probability, reads="log_probability", noise=4.5),
    "halton": Order(lambda state: -halton_places(state.grid).expand_as(state.noise)),
    "random": Order(lambda state: state.noise),
    "raster": Order(lambda state: -torch.arange(state.noise.shape[1]).expand_as(state.noise)),
}


def order_scores(order: str, state: OrderState, temperature: float = 0.0) -> torch.Tensor:
    """Scores [B, N] float64 on the CPU: the order's own, plus Gumbel noise of this temperature.

    Args:
        temperature: of this pass (`ProgressiveOptions.order_noises`); ignored by orders that read no prediction.

    Raises:
        ValueError: for an unknown order, and for a state that lacks what the order reads.
    """
    chosen = find_order(order)
    if chosen.reads is not None and getattr(state, chosen.reads) is None:
        raise ValueError(f"the order {order!r} reads {chosen.reads}, which is missing: run the network first")
    scores = chosen.scores(state).double().cpu()
    if chosen.reads is None or temperature == 0:
        return scores
    return scores + temperature * state.noise.double()


def find_order(order: str) -> Order:
    """The order of this name.

    Raises:
        ValueError: for an unknown one.
    """
    if not isinstance(order, str) or order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {shown(order)}")
    return ORDERS[order]


def order_noise(seeds: Sequence[int], count: int) -> torch.Tensor:
    """Standard Gumbel noise [B, N] float64 on the CPU for orders; row b depends only on seeds[b] and N."""
    tiny = torch.finfo(torch.float64).tiny
    key = max(_ORDER_KEY, count)
    rows = [torch.rand(count, generator=keyed_generator(s, key), dtype=torch.float64) for s in seeds]
    return torch.stack(rows).clamp_(min=tiny).log_().neg_().log_().neg_()


def halton_places(grid: tuple[int, int]) -> torch.Tensor:
    """Rank of each position in the Halton sequence (columns in base 2, rows in base 3): [N] int64 in 0..N-1.

    Cells are ranked by the first point that falls into them (Besnier et al. 2025, arXiv 2503.17076).

    Raises:
        ValueError: for a grid without positions.
    """
    for name, side in zip(("rows of the grid", "columns of the grid"), grid, strict=True):
        require_number(name, side, whole=True, least=1)
    return torch.tensor(_halton_places(*grid))


@lru_cache(maxsize=16)
def _halton_places(rows: int, columns: int) -> tuple[int, ...]:
    count, found = rows * columns, np.empty(0, np.int64)
    points = 4 * count
    while len(found) < count:
        numbers = np.arange(1, points + 1)
        x = (_radical_inverse(numbers, 2) * columns).astype(np.int64)
        y = (_radical_inverse(numbers, 3) * rows).astype(np.int64)
        cells, first = np.unique(y * columns + x, return_index=True)
        found, points = cells[np.argsort(first)], 2 * points
    places = np.empty(count, np.int64)
    places[found] = np.arange(count)
    return tuple(places.tolist())


def _radical_inverse(numbers: np.ndarray, base: int) -> np.ndarray:
    """The digits of whole numbers in a base, mirrored at the radix point: in [0, 1)."""
    result, scale, rest = np.zeros(len(numbers)), 1.0, numbers.copy()
    while rest.any():
        scale /= base
        result += scale * (rest % base)
        rest //= base
    return result


def reveal(
    scores: torch.Tensor,
    hidden: torch.Tensor,
    counts: Sequence[int] | torch.Tensor,
    *,
    grid: tuple[int, int] | None = None,
    spread: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Picks the hidden positions with the highest scores, `counts` [B] per row; ties go to the first in the grid.

    Tokens of one pass are drawn independently, so neighbours among them may contradict each other, and the model's
    scores are high over whole areas. With `spread`, a position waits while it is within this many rows and columns of
    one already taken; such positions are taken, by score, only when no others are left [our choice].

    Args:
        scores: [B, N].
        hidden: bool [B, N].
        grid: (h, w), for `spread`.

    Returns:
        The revealed positions, bool [B, N], and their turns, int64 [B, N] from 0, meaningless for other positions.

    Raises:
        ValueError: if the score of a hidden position is not finite, a count is negative or exceeds the hidden
            positions, or `spread` is given without a grid.
    """
    counts = torch.as_tensor(counts)
    if bool((counts < 0).any()) or bool((counts > hidden.sum(1)).any()):
        raise ValueError(
            f"{counts.tolist()} positions cannot be revealed where {hidden.sum(1).tolist()} are hidden: give counts "
            "of at most that"
        )
    if not bool(scores[hidden].isfinite().all()):
        raise ValueError("a score of the order is NaN or infinite: check the model's weights, or choose another order")
    if spread == 0:
        return _highest(scores, hidden, counts)
    if grid is None:
        raise ValueError("positions cannot be spread without the grid that they lie in: give `grid`")
    taken, turns = torch.zeros_like(hidden), torch.zeros(hidden.shape, dtype=torch.int64)
    near, blocked = _near(grid, spread), ~hidden
    for turn in range(int(counts.max())):
        free = ~blocked & (turn < counts)[:, None]
        rows = free.any(1).nonzero().flatten()
        if not len(rows):
            break
        best = scores.masked_fill(~free, -torch.inf)[rows].argmax(1)
        taken[rows, best], turns[rows, best] = True, turn
        blocked[rows] |= near[best]
    found = taken.sum(1)
    others, later = _highest(scores, hidden & ~taken, counts - found)
    return taken | others, torch.where(taken, turns, later + found[:, None])


def _highest(scores: torch.Tensor, hidden: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ranked = scores.masked_fill(~hidden, -torch.inf).argsort(dim=1, descending=True, stable=True)
    numbers = torch.arange(hidden.shape[1]).expand_as(ranked)
    turns = torch.empty_like(ranked).scatter_(1, ranked, numbers)
    return hidden & (turns < counts[:, None]), turns


def _near(grid: tuple[int, int], spread: int) -> torch.Tensor:
    """bool [N, N]: whether two positions are within `spread` rows and columns of each other."""
    places = torch.cartesian_prod(*(torch.arange(side) for side in grid))
    return (places[:, None] - places).abs().amax(-1) <= spread


def redrawn(places: torch.Tensor, revise: Revise) -> torch.Tensor:
    """The revealed positions that a pass draws again: all, or the `revise` that were revealed last.

    Args:
        places: int64 [B, N], the rank from 0 at which each position was revealed; -1 where it is hidden or given.

    Returns:
        bool [B, N].

    Raises:
        ValueError: for an invalid `revise`.
    """
    check_revise(revise)
    revealed = places >= 0
    if revise == "all":
        return revealed
    return revealed & (places > places.amax(dim=1, keepdim=True) - revise)


def check_revise(revise: Revise) -> None:
    """Checks that `revise` is "all" or a whole number of positions in 0..1024^2.

    Raises:
        ValueError: if it is not.
    """
    if revise != "all" and (type(revise) is not int or not 0 <= revise <= _MOST_SIDE**2):
        raise ValueError(
            f"revise must be 'all' or a whole number of positions in 0..{_MOST_SIDE**2:,}, got {shown(revise)}: 0 "
            "rewrites nothing"
        )


@dataclass(frozen=True, kw_only=True)
class ProgressiveOptions(SamplingOptions):
    """How a masked sampler draws.

    Attributes:
        passes: number of network passes, 1..4096; with guidance each takes two rows per image.
        revision_passes: how many of these, at the end, reveal nothing new and only draw again.
        schedule: one of `SCHEDULES`, or one number for each revealing pass (`stage_counts`).
        order: one of `ORDERS`.
        order_noise: temperature of the order's Gumbel noise in the first pass; None for the order's own.
        spread: rows and columns by which positions of one pass stay apart, where possible (`reveal`); 0 is off.
        revise: which revealed positions each pass draws again: "all", or the n that were revealed last.
        ramp: raises guidance from 1 over the revealing passes (`guidance_ramp`); False applies all of it in each.
        start: the first `start` passes reveal tokens of `previous` instead of drawn ones (image to image); 0 for none.
            Where fewer positions than passes are drawn, the first passes reveal none (`stage_counts`).

    Raises:
        ValueError: for values out of range, or that do not fit each other.
    """

    passes: int = 11
    revision_passes: int = 3
    schedule: Schedule = "arccos"
    order: str = "halton"
    order_noise: float | None = None
    spread: int = 0
    revise: Revise = "all"
    ramp: bool = True
    start: int = 0

    def __post_init__(self):
        super().__post_init__()
        require_number("passes", self.passes, whole=True, least=1, most=MOST_PASSES)
        require_number("revision_passes", self.revision_passes, whole=True, least=0)
        if self.revision_passes >= self.passes:
            raise ValueError(
                f"revision_passes must be less than passes, got {self.revision_passes} of {self.passes}: one pass at "
                "least has to reveal"
            )
        require_number("start", self.start, whole=True, least=0)
        if self.start >= self.passes:
            raise ValueError(
                f"start must be less than passes, got {self.start} of {self.passes}: one pass at least has to draw"
            )
        require_number("order_noise", self.order_noise, least=0, optional=True)
        require_number("spread", self.spread, whole=True, least=0, most=_MOST_SIDE)
        find_order(self.order)
        check_revise(self.revise)
        if not isinstance(self.ramp, bool):
            raise ValueError(f"ramp must be True or False, got {shown(self.ramp)}")
        if self.revise == 0 and self.revision_passes:
            raise ValueError(
                f"{self.revision_passes} revision passes have nothing to do where revise is 0: set revision_passes to "
                "0, or revise to 'all'"
            )
        if isinstance(self.schedule, str):
            revealed_share(0.0, self.schedule)
        else:
            if isinstance(self.schedule, list):
                object.__setattr__(self, "schedule", tuple(self.schedule))
            _check_list(self.schedule, self.revealing)

    def in_passes(self, passes: int) -> ProgressiveOptions:
        """The same options for this many passes, of which the same share (rounded) only revises.

        Raises:
            ValueError: for passes out of range, and a schedule that is a list of another length.
        """
        require_number("passes", passes, whole=True, least=1, most=MOST_PASSES)
        revising = min(passes - 1, round(passes * self.revision_passes / self.passes))
        return replace(self, passes=passes, revision_passes=revising)

    @property
    def revealing(self) -> int:
        """Number of passes that reveal."""
        return self.passes - self.revision_passes

    def counts(self, hidden: int) -> tuple[int, ...]:
        """How many of `hidden` positions each pass reveals."""
        return stage_counts(hidden, self.revealing, self.schedule) + (0,) * self.revision_passes

    def order_noises(self) -> tuple[float, ...]:
        """Temperature of the order's Gumbel noise in each pass: falls linearly to 0 in the last revealing pass.

        A single revealing pass has the full temperature, and revision passes have 0.
        """
        first, last = self.order_noise, max(1, self.revealing - 1)
        if first is None:
            first = find_order(self.order).noise
        return tuple(first * (last - i) / last for i in range(self.revealing)) + (0.0,) * self.revision_passes

    def guidances(self) -> tuple[float, ...]:
        """Guidance of each pass."""
        ramp = guidance_ramp(self.guidance, self.revealing) if self.ramp else (self.guidance,) * self.revealing
        return ramp + (self.guidance,) * self.revision_passes


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """What one pass did; everything on the CPU.

    Attributes:
        guidance: of this pass; 1 where it revealed the tokens of an image, which the prompt alone judges.
        tokens: [B, N] int64 after the pass; meaningless where not `known`.
        known: bool [B, N], where a token is decided.
        revealed: bool [B, N], new in this pass.
        redrawn: bool [B, N], drawn again in this pass.
        changed: bool [B, N], drawn again with another result.
    """

    guidance: float
    tokens: torch.Tensor
    known: torch.Tensor
    revealed: torch.Tensor
    redrawn: torch.Tensor
    changed: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Staged:
    """Sampled tokens with the passes that led to them.

    Attributes:
        token_logits: the result.
        stages: one for each pass; none for an edit of nothing.
    """

    token_logits: TokenLogits
    stages: tuple[Stage, ...]

    @classmethod
    def joined(cls, parts: Sequence[Staged]) -> Staged:
        """Joins parts sampled with the same options into one batch; a part without passes counts as idle in each.

        Raises:
            ValueError: for parts with different numbers of passes, and as `TokenLogits.joined`.
        """
        counts = {len(part.stages) for part in parts if part.stages}
        if len(counts) > 1:
            raise ValueError(f"parts of {sorted(counts)} passes cannot be joined: sample them with the same options")
        model = next((part.stages for part in parts if part.stages), ())
        whole = [part.stages or tuple(_idle(part.token_logits, stage.guidance) for stage in model) for part in parts]
        names = ("tokens", "known", "revealed", "redrawn", "changed")
        return cls(
            token_logits=TokenLogits.joined([part.token_logits for part in parts]),
            stages=tuple(
                Stage(guidance=same[0].guidance, **{n: torch.cat([getattr(stage, n) for stage in same]) for n in names})
                for same in zip(*whole)
            ),
        )


def _idle(token_logits: TokenLogits, guidance: float) -> Stage:
    tokens = token_logits.tokens.cpu()
    nothing = torch.zeros_like(tokens, dtype=torch.bool)
    return Stage(guidance=guidance, tokens=tokens, known=~nothing, revealed=nothing, redrawn=nothing, changed=nothing)


def stage_rows(stages: Sequence[Stage]) -> list[dict[str, float]]:
    """One row per pass: its number, and the mean numbers of positions revealed, drawn again and changed per image."""
    return [
        {
            "pass": number,
            "revealed": float(stage.revealed.sum(1).double().mean()),
            "drawn again": float(stage.redrawn.sum(1).double().mean()),
            "changed": float(stage.changed.sum(1).double().mean()),
        }
        for number, stage in enumerate(stages, start=1)
    ]


def _check_list(schedule: Sequence[float], passes: int) -> None:
    if not isinstance(schedule, (tuple, list)):
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)} or a list of numbers, got {shown(schedule)}")
    if len(schedule) != passes:
        raise ValueError(
            f"schedule has {len(schedule)} numbers for {passes} revealing passes, those that only revise left out: "
            f"give as many passes as it has numbers, {passes} numbers, or one of {', '.join(SCHEDULES)}"
        )
    for i, number in enumerate(schedule):
        require_number(f"schedule[{i}]", number, least=0, most=1e9)
    if not any(schedule):
        raise ValueError("schedule has only zeros: one pass at least has to reveal")
