"""The paper's Tables 2, 3, 4 and 6 on the embedded models, and few steps, beyond the paper: sections of docs/results.md
and of the report.

Scenes, captions, both metric networks and the intervals are those of `guided_sections`, which keeps the images and
scores of ways that occur in both. Each row also has the ratios of its scores to a baseline's, with their own intervals.

Shapes: B images of a part, M images, S image side in pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from dcdd_core.models.bundle import DecoderOptions, load_decoder
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.pipelines.condition import condition_for, serving
from dcdd_core.pipelines.decode import decode
from dcdd_core.pipelines.load import Models
from dcdd_core.protocols import SamplingOptions

from .embedded import JANUS
from .guided_images import Task, Way, originals, scenes_of
from .guided_sections import F1, FRECHET, Rulers, Scores, collect, joined, labels_of, parts_of, ratio, row_of
from .reader import FACTS
from .scenes import draw, scene_pixels
from .section_keys import code_hash, files_hash
from .sections import (
    ABLATION_SCORES,
    BY_LOGITS,
    DCDD,
    RERENDERED,
    SECTIONS,
    SERVED,
    STEP_COUNTS,
    VQ,
    EvalSetup,
    Rows,
    Section,
    ratio_name,
    steps_name,
)

SOFT = "VQ-VAE decode of expected codes"
REAL = "real scenes"
TOKENS = "DCDD, the sampled tokens alone"
RECONSTRUCTION = ("frechet", "frechet, text detector", "ssim", "psnr", "perceptual", "perceptual, text detector", "F1")
TEXT = (*FRECHET, *F1)
#: Upper limit on the scenes of the table of steps.
STEPPED = 512
#: Numbers of steps for using the decoder itself where a student could be used, and the time shift for them. The shift
#: was chosen on 256 calibration scenes and captions.
FEW, FEW_SHIFT = (4, 2, 1), 0.5
#: Seed of the jitter for scenes that are rendered a second time.
_RERENDERED = 1
_READ = (JANUS, "vae", "decoder.safetensors", "reader.safetensors")


def anchored_name(anchor: float) -> str:
    """Name of the row of anchored logits."""
    return f"DCDD, anchored logits (beta = {anchor:.3g})"


def few_name(steps: int) -> str:
    """Name of the row of few steps."""
    return f"{steps_name(steps)} at shift {FEW_SHIFT:g}"


def with_ratios(scores: Mapping[str, Scores], columns: Sequence[str], baseline: str) -> Rows:
    """A row for each way, and a row with the ratios of its scores to the baseline's."""
    count = len(scores[baseline])
    rows = {name: row_of(columns, own.score, count) for name, own in scores.items()}
    return rows | ratios(scores, columns, baseline)


def ratios(scores: Mapping[str, Scores], columns: Sequence[str], baseline: str) -> Rows:
    """For each other way, a row with the ratios of its scores to the baseline's."""
    base = scores[baseline]
    return {
        ratio_name(name, baseline): row_of(columns, partial(ratio, own, base), len(base))
        for name, own in scores.items()
        if name != baseline
    }


def measure_reader(setup: EvalSetup) -> Rows:
    """How well the scene reader reads real scenes; below an F1 of 0.9 its distances mean little.

    Also the distances for other renderings of the same facts: the chance level of text-to-image.
    """
    rulers, count = Rulers.of(setup), len(setup.images)
    real, made = [], []
    for part in parts_of(count, "reader"):
        real.append(rulers.real("test", part))
        name = f"rerendered-{code_hash(rerendered)}"
        made.append(rulers.of_images(name, part, partial(rerendered, rulers, part)))
    labels = labels_of("test", count)
    truth = joined(real)
    whole = Scores(held=truth, real=truth, labels=labels)
    again = Scores(held=joined(made), real=truth, labels=labels)
    return {REAL: row_of(F1, whole.score, count), RERENDERED: row_of(TEXT, again.score, count) | by_shape(again)}


def rerendered(rulers: Rulers, part: slice) -> torch.Tensor:
    """Draws the facts of a part's scenes with other jitter: [B, 3, S, S] in -1..1."""
    size = originals("test", part).shape[1]
    drawn = [
        draw(scene.facts, np.random.default_rng([_RERENDERED, k]), size=size)
        for k, scene in zip(range(part.start, part.stop), scenes_of("test", part), strict=True)
    ]
    return scene_pixels(np.stack(drawn), rulers.painters.pico.tokenizer.device)


def measure_reconstruction(setup: EvalSetup) -> Rows:
    """The paper's Table 2: held-out scenes, encoded and decoded."""
    ways = (Way(name=VQ, paints="vq"), Way(name=SOFT, paints="soft"), _trained(setup, DCDD))
    return with_ratios(collect(Rulers.of(setup), ways, "reconstruction", "test", len(setup.images)), RECONSTRUCTION, VQ)


def measure_text(setup: EvalSetup) -> Rows:
    """The paper's Table 3: images of the scenes' captions, by the VQ-VAE decoder and by the decoder as served, from the
    same sampled tokens.

    The details of a row's Frechet distance are distances over the images of one shape.
    """
    ways = (Way(name=VQ, paints="vq"), _trained(setup, SERVED))
    scores = collect(Rulers.of(setup), ways, "text", "test", len(setup.images))
    rows = with_ratios(scores, TEXT, VQ)
    for name, own in scores.items():
        rows[name] |= by_shape(own)
    return rows


def measure_readings(setup: EvalSetup) -> Rows:
    """As `measure_text`, for each way of reading the VLM's output; each is also compared with the served one."""
    rulers, card, count = Rulers.of(setup), setup.pico.decoder.card, len(setup.images)
    scores = collect(rulers, [Way(name=VQ, paints="vq")], "text", "test", count)
    names = {"logits": BY_LOGITS, "anchored": anchored_name(card.calibration.anchor), "tokens": TOKENS}
    for reads, name in names.items():
        own = rulers if reads == card.reads else _reading(rulers, reads)
        scores |= collect(own, [_trained(setup, name)], "text", "test", count)
    rows = with_ratios(scores, TEXT, VQ)
    readings = {name: scores[name] for name in names.values()}
    return rows | ratios(readings, TEXT, names[card.reads])


def by_shape(scores: Scores) -> dict[str, float]:
    """Details of the Frechet distance: one for each shape that at least two images have."""
    found = {}
    for k, shape in enumerate(FACTS["shape"]):
        images = np.flatnonzero(scores.labels["shape"] == k)
        if len(images) > 1:
            found[f"frechet: {shape}"] = scores.score("frechet", images)
    return found


def measure_steps(setup: EvalSetup) -> Rows:
    """The paper's Table 6: the number of Euler steps, on the first `STEPPED` scenes at most."""
    ways = [Way(name=steps_name(steps), paints="trained", steps=steps) for steps in STEP_COUNTS]
    count = min(STEPPED, len(setup.images))
    scores = collect(Rulers.of(setup), [Way(name=VQ, paints="vq"), *ways], "reconstruction", "test", count)
    ten, thirty = steps_name(10), steps_name(30)
    rows = with_ratios(scores, RECONSTRUCTION, VQ)
    return rows | ratios({name: scores[name] for name in (ten, thirty)}, RECONSTRUCTION, thirty)


def measure_few(setup: EvalSetup) -> Rows:
    """Reconstruction by the decoder in few steps, compared with its own number of steps and time shift."""
    return _in_few_steps(setup, "reconstruction", RECONSTRUCTION)


def measure_few_text(setup: EvalSetup) -> Rows:
    """As `measure_few`, for images of captions from the same sampled tokens and logits."""
    return _in_few_steps(setup, "text", TEXT)


def _in_few_steps(setup: EvalSetup, task: Task, columns: Sequence[str]) -> Rows:
    few = [Way(name=few_name(steps), paints="trained", steps=steps, shift=FEW_SHIFT) for steps in FEW]
    ways = (_trained(setup, steps_name(setup.steps)), *few)
    scores = collect(Rulers.of(setup), ways, task, "test", len(setup.images))
    return with_ratios(scores, columns, ways[0].name)


def measure_ablation(setup: EvalSetup) -> Rows:
    """The paper's Table 4: what a decoder is conditioned on, with one row for each decoder of `setup.ablation`.

    The scores are those of reconstruction. "text frechet" is the distance for images of the scenes' captions, decoded
    from the same tokens and logits in every row, with the logits as the VLM gave them (beta = 0).
    """
    rulers, rows, count = Rulers.of(setup), {}, len(setup.images)
    labels = labels_of("test", count)
    for name, path in setup.ablation.items():
        where = {"device": setup.pico.tokenizer.device, "dtype": setup.pico.decoder.dtype}
        decoder = load_decoder(path, options=DecoderOptions(**where, compiled=setup.compiled))
        weights = files_hash([path, *(setup.weights / read for read in _READ[:2])])
        version = f"{code_hash(painted_of)}-{weights}-{setup.steps}-steps"
        own: dict[Task, Scores] = {}
        for task in ("reconstruction", "text"):
            made, real = [], []
            for part in parts_of(count, f"{name}, {task}"):
                real.append(rulers.real("test", part))
                images = partial(painted_of, setup, decoder, task, part)
                made.append(rulers.of_images(f"ablation-{version}/{task}", part, images, original=task != "text"))
            own[task] = Scores(held=joined(made), real=joined(real), labels=labels)
        rows[name] = row_of([c for c in ABLATION_SCORES if c in RECONSTRUCTION], own["reconstruction"].score, count)
        for column, value in row_of(tuple(FRECHET), own["text"].score, count).items():
            rows[name]["images" if column == "images" else f"text {column}"] = value
    return rows


@torch.no_grad()
def painted_of(setup: EvalSetup, decoder: DistributionConditionedDecoder, task: Task, part: slice) -> torch.Tensor:
    """Paints a part's scenes or captions with one of the ablation's decoders, at the shipped decoder's time shift."""
    pico = setup.pico
    if task == "text":
        captions = [scene.caption for scene in scenes_of("test", part)]
        options = SamplingOptions(guidance=setup.guidance)
        grid = pico.sampler.sample(captions, seeds=range(part.start, part.stop), options=options)
    else:
        grid = pico.tokenizer.encode(scene_pixels(originals("test", part), pico.tokenizer.device))
    condition = condition_for(decoder.card, grid, pico.tokenizer.codebook)
    options = {"steps": setup.steps, "shift": pico.decoder.card.shift}
    return decode(decoder, pico.codec, condition, seeds=range(part.start, part.stop), **options).pixels


def _trained(setup: EvalSetup, name: str) -> Way:
    return Way(name=name, paints="trained", steps=setup.steps)


def _reading(rulers: Rulers, reads: str) -> Rulers:
    """Rulers for images of the decoder when it reads the VLM's output in another way."""
    painters = rulers.painters
    own = replace(painters, pico=reading(painters.pico, reads), name=f"{painters.name}{reads}-")
    return replace(rulers, painters=own)


def reading(pico: Models, reads: str) -> Models:
    """The same models, with the decoder reading the VLM's output in another way; the weights are shared."""
    decoder = copy.copy(pico.decoder)
    decoder.card = serving(decoder.card, reads=reads)
    return replace(pico, decoder=decoder)


SECTIONS.update(
    {
        "reader": Section(measure_reader, ("reader.safetensors",)),
        "reconstruction": Section(measure_reconstruction, _READ),
        "text": Section(measure_text, _READ),
        "readings": Section(measure_readings, _READ),
        "steps": Section(measure_steps, _READ),
        "few": Section(measure_few, _READ),
        "few-text": Section(measure_few_text, _READ),
        "ablation": Section(measure_ablation, _READ),
    }
)
