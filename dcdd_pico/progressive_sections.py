"""What the masked sampler scores against the autoregressive one: sections of docs/results.md, beside `sections`.

Both metric networks of `guided_sections` measure, on the same captions and with the same decoders. Samples and scores
are kept part by part, so that an interrupted measurement can resume.

Shapes: B images of a part, M images, N tokens.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from dcdd_core import registry
from dcdd_core.method.progressive import ORDERS, SCHEDULES, ProgressiveOptions
from dcdd_core.models.card import DecoderCard
from dcdd_core.models.masked.sampler import MaskedSampler
from dcdd_core.pipelines.condition import condition_for, serving
from dcdd_core.pipelines.decode import decode
from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import Calibration, Condition, TokenLogits

from .embedded import PROGRESSIVE, calibration_name, own_calibration
from .guided_images import Given, kept, scenes_of
from .guided_sections import (
    F1,
    Rulers,
    Scores,
    difference,
    joined,
    labels_of,
    minus,
    parts_of,
    ratio,
    row_of,
    rows_of,
    scores_of,
)
from .progressive import progressive_folder
from .section_keys import code_hash, files_hash
from .sections import SECTIONS, EvalSetup, Rows, Section, ratio_name

AR = "Janus, 144 passes"
VQ, DCDD = "VQ-VAE decode", "trained DCDD"
PASSES = (4, 8, 11, 16, 24, 64)
#: Number of passes compared with the autoregressive sampler: 13 times fewer than its 144.
TARGET = 11
SEEDS = 3
#: Upper limit on the captions of the curve over passes, and of the table of orders; with their many arms, more captions
#: would cost more than they tell.
CURVE, ORDERED = 512, 192
COLUMNS = ("frechet", "frechet, text detector", *F1)
PAPERS = ("quantisation-error", "importance")
REWRITTEN = "tokens rewritten"
_SHARED = ("janus", "vae", "decoder.safetensors", "reader.safetensors")
_READ = (*_SHARED, PROGRESSIVE, calibration_name(PROGRESSIVE))
#: Whether the masked sampler draws -> weights that an arm's scores depend on.
_READ_BY = {False: _SHARED, True: _READ}


def passes_name(passes: int) -> str:
    """Name of the row of a number of passes."""
    return f"progressive, {passes} passes"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to sample tokens.

    Attributes:
        name: name of its row.
        options: `ProgressiveOptions` for the masked sampler, `SamplingOptions` for the autoregressive one.
        seed: a million times this is added to the image's number to get its seed.
    """

    name: str
    options: SamplingOptions
    seed: int = 0

    @property
    def masked(self) -> bool:
        """Whether the masked sampler draws."""
        return isinstance(self.options, ProgressiveOptions)

    @property
    def file(self) -> str:
        """Name of the arm's folder, which depends on every field except the row's name."""
        return hashlib.sha256(f"{self.options} {self.seed}".encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Both samplers, what decodes their tokens, and what measures the images."""

    setup: EvalSetup
    rulers: Rulers

    @classmethod
    def of(cls, setup: EvalSetup) -> Samples:
        """Makes the samples for the models of a measurement.

        Raises:
            ValueError: as `Rulers.of`.
        """
        return cls(setup=setup, rulers=Rulers.of(setup))

    @cached_property
    def masked(self) -> MaskedSampler:
        """The masked sampler among the weights."""
        return load_progressive(self.setup)

    def card_of(self, arm: Arm) -> DecoderCard:
        """The card that an arm's logits are mapped with: the decoder's, for the masked sampler with its calibration."""
        own = own_calibration(self.setup.weights, vlm=PROGRESSIVE) if arm.masked else None
        return serving(self.setup.pico.decoder.card, calibration=None if own is None else Calibration.load(own))

    def in_passes(self, passes: int) -> ProgressiveOptions:
        """The masked sampler's own options, with this number of passes."""
        return self.masked.sampling.in_passes(passes)

    @cached_property
    def versions(self) -> dict[bool, str]:
        """Hashes of code and weights that scores depend on, and precision, by whether the masked sampler draws."""
        precision = str(self.setup.pico.decoder.dtype).removeprefix("torch.")
        read = {masked: files_hash([self.setup.weights / name for name in names]) for masked, names in _READ_BY.items()}
        return {masked: f"{code_hash(sampled_of, painted_of)}-{own}-{precision}" for masked, own in read.items()}

    def given(self, arm: Arm, part: slice) -> dict[str, torch.Tensor]:
        """`sampled_of` a part, sampled only once."""
        return self._kept(arm, "given", part, lambda: sampled_of(self, arm, part))

    def scores(self, arm: Arm, decoder: str, part: slice) -> dict[str, torch.Tensor]:
        """`scores_of` a part's images by one decoder."""

        def make() -> dict[str, torch.Tensor]:
            held = self.given(arm, part)
            tokenizer = self.setup.pico.tokenizer
            condition = Condition(
                held["code_vectors"], held["uncertainty"], tokenizer.grid, codebook=tokenizer.codebook.fingerprint
            )
            given = Given(tokens=held["tokens"], condition=condition.to(tokenizer.device, torch.float32))
            images = painted_of(self.setup, decoder, given, seeds_of(arm, part))
            return scores_of(self.rulers, images, None, None) | {REWRITTEN: held[REWRITTEN]}

        return self._kept(arm, f"{decoder}-{self.setup.steps}-steps", part, make)

    def _kept(
        self, arm: Arm, name: str, part: slice, make: Callable[[], Mapping[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        folder = self.setup.out / "progressive" / self.versions[arm.masked] / arm.file
        return kept(folder / name / f"{part.start:06d}-{part.stop:06d}.npz", make)


def load_progressive(setup: EvalSetup, folder: Path | None = None) -> MaskedSampler:
    """A masked sampler in the decoder's precision.

    Args:
        folder: None for the one among a measurement's weights.

    Raises:
        ValueError: if it has not been trained.
    """
    folder = folder or progressive_folder(setup.weights)
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist: train it with `python -m dcdd_pico.train_progressive`")
    where = {"device": setup.pico.tokenizer.device, "dtype": setup.pico.decoder.dtype}
    return registry.sampler_family(folder).load_sampler(str(folder), **where)


def seeds_of(arm: Arm, part: slice) -> range:
    """A seed for each image of a part; arms with different seeds share none."""
    return range(arm.seed * 10**6 + part.start, arm.seed * 10**6 + part.stop)


@torch.no_grad()
def sampled_of(samples: Samples, arm: Arm, part: slice) -> dict[str, torch.Tensor]:
    """What an arm samples for a part's captions: tokens, their condition, and how many tokens of each image were
    rewritten; each [B, ...]."""
    captions = [scene.caption for scene in scenes_of("test", part)]
    grid, rewritten = sample(samples, arm, captions, seeds_of(arm, part))
    condition = condition_for(samples.card_of(arm), grid, samples.setup.pico.tokenizer.codebook)
    return {
        "tokens": grid.tokens,
        "code_vectors": condition.code_vectors,
        "uncertainty": condition.uncertainty,
        REWRITTEN: rewritten,
    }


def sample(
    samples: Samples, arm: Arm, captions: Sequence[str], seeds: Sequence[int]
) -> tuple[TokenLogits, torch.Tensor]:
    """The token logits, and the number of rewritten tokens of each image, [B]."""
    if not arm.masked:
        return samples.setup.pico.sampler.sample(captions, seeds=seeds, options=arm.options), torch.zeros(len(captions))
    found = samples.masked.sample_stages(captions, seeds=seeds, options=arm.options)
    return found.token_logits, torch.stack([stage.changed.sum(1) for stage in found.stages]).sum(0).float()


@torch.no_grad()
def painted_of(setup: EvalSetup, decoder: str, given: Given, seeds: range) -> torch.Tensor:
    """Pixels [B, 3, S, S] in -1..1 by one of the decoders."""
    pico = setup.pico
    if decoder == VQ:
        return pico.tokenizer.decode_tokens(given.tokens, given.condition.grid)
    options = {"steps": setup.steps, "shift": pico.decoder.card.shift}
    return decode(pico.decoder, pico.codec, given.condition, seeds=seeds, **options).pixels


def collect(samples: Samples, arms: Sequence[Arm], decoder: str, count: int) -> dict[str, Scores]:
    """The scores of each arm, by row name, with one decoder."""
    made: dict[str, list[dict[str, torch.Tensor]]] = {arm.name: [] for arm in arms}
    real: list[dict[str, torch.Tensor]] = []
    for part in parts_of(count, decoder):
        real.append(samples.rulers.real("test", part))
        for arm in arms:
            made[arm.name].append(samples.scores(arm, decoder, part))
    labels, truth = labels_of("test", count), joined(real)
    return {name: Scores(held=joined(parts), real=truth, labels=labels) for name, parts in made.items()}


def measure_target(setup: EvalSetup) -> Rows:
    """`TARGET` passes against the autoregressive sampler, with both decoders, on all captions.

    Also against the autoregressive sampler without the trained decoder, and what that decoder contributes for each
    sampler: its scores divided by the VQ decode's.
    """
    scores, count = _compared(setup, (TARGET,), len(setup.images)), len(setup.images)
    rows = _rows_of(scores)
    ours, plain = f"{passes_name(TARGET)}, {DCDD}", f"{AR}, {VQ}"
    apart = partial(difference, scores[DCDD][ours], scores[VQ][plain])
    rows[minus(ours, plain)] = row_of(COLUMNS, apart, count)
    for sampler in (AR, passes_name(TARGET)):
        gain = partial(ratio, scores[DCDD][f"{sampler}, {DCDD}"], scores[VQ][f"{sampler}, {VQ}"])
        rows[gain_name(sampler)] = row_of(COLUMNS, gain, count)
    return rows


def gain_name(sampler: str) -> str:
    """Name of the row with the trained decoder's scores divided by the VQ decode's."""
    return f"{sampler}, {ratio_name(DCDD, VQ)}"


def measure_passes(setup: EvalSetup) -> Rows:
    """As `measure_target`, for all `PASSES`, on the first `CURVE` captions at most."""
    return _rows_of(_compared(setup, PASSES, min(CURVE, len(setup.images))))


def _compared(setup: EvalSetup, passes: Sequence[int], count: int) -> dict[str, dict[str, Scores]]:
    """Scores by decoder and row: the autoregressive sampler's, then those of each number of passes."""
    samples, found = Samples.of(setup), {}
    arms = [Arm(name=AR, options=SamplingOptions(guidance=setup.guidance))]
    arms += [Arm(name=passes_name(n), options=samples.in_passes(n)) for n in passes]
    for decoder in (VQ, DCDD):
        scores = collect(samples, arms, decoder, count)
        found[decoder] = {f"{name}, {decoder}": own for name, own in scores.items()}
    return found


def _rows_of(scores: Mapping[str, dict[str, Scores]]) -> Rows:
    """Rows for each decoder, with differences from the autoregressive sampler with the same decoder."""
    return {name: row for own in scores.values() for name, row in rows_of(own, COLUMNS).items()}


def measure_orders(setup: EvalSetup) -> Rows:
    """Orders with and without revision, and schedules, at `TARGET` passes with the VQ decoder, over `SEEDS` seeds.

    Measured on the first `ORDERED` captions at most.

    The paper's orders are measured twice: by score alone, and with the positions of a pass kept apart. Schedules other
    than the default are measured in the default order. A cell is the mean over the seeds, with the lowest and highest
    value of a seed.
    """
    samples, rows = Samples.of(setup), {}
    count = min(ORDERED, len(setup.images))
    revising = samples.in_passes(TARGET)
    kinds = {
        f"{order}{', apart' if spread else ''}, {name}": replace(options, order=order, spread=spread)
        for order in ORDERS
        for spread in ((0, 1) if order in PAPERS else (0,))
        for name, options in (("revision", revising), ("no revision", without_revision(revising)))
    }
    kinds |= {
        f"{revising.order}, {schedule} schedule, revision": replace(revising, schedule=schedule)
        for schedule in SCHEDULES
        if schedule != revising.schedule
    }
    for name, options in kinds.items():
        rows[name] = seeded_row(samples, options, count)
    return rows


def without_revision(options: ProgressiveOptions) -> ProgressiveOptions:
    """The same options, but all passes reveal and none draws again."""
    return replace(options, revise=0, revision_passes=0)


def seeded_row(samples: Samples, options: ProgressiveOptions, count: int) -> dict[str, float]:
    """A row: scores with the VQ decoder on the first `count` captions and the tokens rewritten, over `SEEDS` seeds."""
    every = np.arange(count)
    arms = [Arm(name=f"{seed}", options=options, seed=seed) for seed in range(SEEDS)]
    found = list(collect(samples, arms, VQ, count).values())
    row = {"images": float(len(every))}
    for column in COLUMNS:
        row |= over_seeds(column, [own.score(column, every) for own in found])
    return row | over_seeds(REWRITTEN, [float(own.held[REWRITTEN].mean()) for own in found])


def over_seeds(column: str, values: Sequence[float]) -> dict[str, float]:
    """A cell: the mean, and the lowest and highest value as details."""
    return {column: statistics.fmean(values), f"{column}: lowest": min(values), f"{column}: highest": max(values)}


def measure_seconds(setup: EvalSetup, rounds: int = 5) -> Rows:
    """Median wall time for an image's tokens, one and eight at a time, in one run; no GPU was measured.

    A pass of the masked sampler reads all positions again, while the autoregressive sampler reads a single one and has
    the others in its cache: fewer passes do not mean proportionally less time.
    """
    samples = Samples.of(setup)
    arms = [Arm(name=AR, options=SamplingOptions(guidance=setup.guidance))]
    arms += [Arm(name=passes_name(n), options=samples.in_passes(n)) for n in (8, TARGET, 16)]
    rows: Rows = {arm.name: {} for arm in arms}
    for batch in (1, 8):
        captions = [scene.caption for scene in scenes_of("test", slice(0, batch))]
        taken: dict[str, list[float]] = {arm.name: [] for arm in arms}
        for k in range(rounds + 1):
            for arm in arms:  # in turn, so that other load on the machine affects all arms alike
                start = time.perf_counter()
                sample(samples, arm, captions, range(k * batch, (k + 1) * batch))
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                taken[arm.name].append((time.perf_counter() - start) / batch)
        for name, seconds in taken.items():
            rows[name][f"seconds, batch {batch}"] = statistics.median(seconds[1:])
            rows[name]["threads"] = float(torch.get_num_threads())
    return rows


SECTIONS.update(
    {
        "progressive-target": Section(measure_target, _READ),
        "progressive-passes": Section(measure_passes, _READ),
        "progressive-orders": Section(measure_orders, _READ),
        "progressive-seconds": Section(measure_seconds, _READ),
    }
)
