"""What the opponents of the diffusion decoder score: sections of docs/results.md.

Feed-forward decoders of the diffusion decoder's training FLOPs, and of its size or its time per image, show what
diffusion contributes when both read the same; decoders of each kind on the tokens alone show what distributions
contribute. All start from the tokens and distributions of `guided_sections`, whose scores and intervals are used too.
`train_opponents` trains them.

Shapes: B images of a part, N tokens, S image side in pixels.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dcdd_core.evaluation.intervals import Interval, bootstrap
from dcdd_core.models.bundle import DecoderOptions, load_decoder, read_card
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.pipelines.condition import condition_of_tokens
from dcdd_core.pipelines.decode import decode
from dcdd_core.training.log import read_log
from dcdd_core.types import same_codebook

from .build_context import Recipe
from .feed_forward import DIFFUSION, FEED_FORWARD, FeedForwardDecoder, load_feed_forward, opponent_file
from .flops import (
    dcdd_flops,
    decoder_images,
    feed_forward_flops,
    load_dcdd,
    parameters,
    vae_decoder_images,
    vae_flops,
    vq_flops,
)
from .guided_images import PART, Given, Painters, Source, Task, Way
from .guided_sections import (
    F1,
    RECONSTRUCTION,
    TEXT,
    Rulers,
    Scores,
    cells,
    collect,
    difference,
    minus,
    ratio,
    row_of,
    rows_of,
)
from .section_keys import code_hash, files_hash
from .sections import SECTIONS, EvalSetup, Rows, Section, ratio_name

#: Names of rows.
VQ, DCDD = "VQ-VAE decode", "diffusion on the condition"
#: The network that turns the diffusion decoder's latents into pixels, and that with the diffusion decoder.
CODEC, WHOLE = "autoencoder's decoder", "diffusion and the autoencoder's decoder"
NAMES = {
    "feed-forward-tokens": "feed-forward on tokens",
    "feed-forward-condition": "feed-forward on the condition",
    "fine-feed-forward-tokens": "fine feed-forward on tokens",
    "fine-feed-forward-condition": "fine feed-forward on the condition",
    DIFFUSION: "diffusion on tokens",
}
LARGE, LARGE_CONDITION, FINE, FINE_CONDITION, TOKENS = NAMES.values()
#: Pairs that show what distributions contribute: the same kind of decoder on the condition and on the tokens.
OF_DISTRIBUTIONS = ((DCDD, TOKENS), (LARGE_CONDITION, LARGE), (FINE_CONDITION, FINE))
#: Pairs that show what diffusion contributes: on the same input, but for the first two, which also add the condition.
OF_DIFFUSION = (
    (DCDD, LARGE),
    (DCDD, FINE),
    (DCDD, LARGE_CONDITION),
    (DCDD, FINE_CONDITION),
    (TOKENS, LARGE),
    (TOKENS, FINE),
)
RATIOS = {
    "reconstruction": ("frechet", "frechet, text detector", "perceptual", "perceptual, text detector", "ssim", "psnr"),
    "text": ("frechet", "frechet, text detector", *F1),
}
PARAMETERS, EACH, IMAGES, TOTAL = "parameters", "training FLOPs per image", "training images", "training FLOPs"
SECONDS = f"seconds per image, {PART} at once"
COSTS = (PARAMETERS, TOTAL, SECONDS)
_FILES = tuple(opponent_file(name) for name in NAMES)
_READ = ("janus", "vae", "decoder.safetensors", "reader.safetensors")
_AGAIN = "train it again: `python -m dcdd_pico.train_opponents`"


@dataclass(frozen=True, kw_only=True)
class OpponentPainters(Painters):
    """An opponent in place of the trained decoder, with the tokens and distributions of another `Painters`.

    Attributes:
        base: the painters whose tokens and distributions are used.
        file: the opponent's file.
        reads: "tokens" or "condition".
        network: the opponent.
    """

    base: Painters
    file: Path
    reads: str
    network: FeedForwardDecoder | DistributionConditionedDecoder

    @cached_property
    def own_folder(self) -> Path:
        """A folder within that of `base`, whose name covers what all images depend on."""
        return self.base.own_folder / f"{self.file.stem}-{code_hash(paint_opponent)}-{files_hash([self.file])}"

    def given(self, task: Task, source: Source, part: slice) -> Given:
        """Tokens and distributions of `base`."""
        return self.base.given(task, source, part)

    def paint(self, way: Way, given: Given, seeds: range) -> torch.Tensor:
        """Paints with the opponent: pixels [B, 3, S, S] in -1..1."""
        return paint_opponent(self, way, given, seeds)


@torch.no_grad()
def paint_opponent(painters: OpponentPainters, way: Way, given: Given, seeds: range) -> torch.Tensor:
    """`guided_images.paint` for an opponent. A diffusion decoder uses the shipped decoder's time shift. A feed-forward
    decoder runs under bfloat16 autocast, as in its training, if the shipped decoder is in bfloat16; else in float32."""
    pico, condition = painters.pico, given.condition
    if painters.reads == "tokens":
        condition = condition_of_tokens(given.tokens, condition.grid, pico.tokenizer.codebook)
        condition = condition.to(given.condition.code_vectors.device)
    if isinstance(painters.network, DistributionConditionedDecoder):
        shift = pico.decoder.card.shift
        return decode(painters.network, pico.codec, condition, seeds=seeds, steps=way.steps, shift=shift).pixels
    half = pico.decoder.dtype == torch.bfloat16
    with torch.autocast(condition.code_vectors.device.type, dtype=torch.bfloat16, enabled=half):
        return painters.network(condition).float()


def opponents(setup: EvalSetup, base: Painters) -> dict[str, OpponentPainters]:
    """The opponents found in the work folder, by row name.

    Raises:
        ValueError: if there is none, or if one was trained for other models.
    """
    found = {}
    for name, row in NAMES.items():
        file = setup.work / opponent_file(name)
        if file.exists():
            reads, network = _loaded(setup, name, file)
            found[row] = OpponentPainters(
                pico=setup.pico,
                folder=base.folder,
                weights=setup.weights,
                base=base,
                file=file,
                reads=reads,
                network=network,
            )
    if not found:
        raise ValueError(
            f"{setup.work / 'opponents'} holds none of {', '.join(NAMES)}: `python -m dcdd_pico.train_opponents` "
            "trains them, and --work names another folder"
        )
    return found


def _loaded(setup: EvalSetup, name: str, file: Path) -> tuple[str, FeedForwardDecoder | DistributionConditionedDecoder]:
    """What an opponent reads ("tokens" or "condition"), and its network."""
    pico, device = setup.pico, setup.pico.tokenizer.device
    ours = pico.decoder.card
    if name == DIFFUSION:
        card = read_card(file)
        expected = {"variant": "discrete", "vae_shift": ours.vae_shift, "vae_scale": ours.vae_scale}
        other = [f"{what} {getattr(card, what)}" for what, value in expected.items() if getattr(card, what) != value]
        options = DecoderOptions(device=device, dtype=pico.decoder.dtype, compiled=setup.compiled)
        reads, network = "tokens", load_decoder(file, options=options)
    else:
        network = load_feed_forward(file, device=device)
        if setup.compiled:
            for block in network.blocks:
                block.compile(dynamic=False)
        card, reads = network.card, network.card.reads
        other = [] if reads == FEED_FORWARD[name][1] else [f"reads the {reads}"]
        if reads == "condition" and card.calibration != ours.calibration:
            other.append("another calibration of the condition")
    if not same_codebook(card.codebook, pico.tokenizer.codebook.fingerprint):
        other.append("another codebook")
    if other:
        raise ValueError(f"{file} is not the opponent of the models in {setup.weights} ({', '.join(other)}): {_AGAIN}")
    return reads, network


def measure_reconstruction(setup: EvalSetup) -> Rows:
    """Scenes that no choice was made on, encoded and then painted by all decoders."""
    return compared(_collected(setup, "reconstruction"), RECONSTRUCTION, RATIOS["reconstruction"])


def measure_text(setup: EvalSetup) -> Rows:
    """Captions that no choice was made on; all decoders start from the same sampled tokens and distributions."""
    return compared(_collected(setup, "text"), TEXT, RATIOS["text"])


def compared(own: Mapping[str, Scores], columns: Sequence[str], ratios: Sequence[str]) -> Rows:
    """A row for each decoder, the VQ-VAE's first; differences from it and ratios to it; and both for the pairs of
    `OF_DIFFUSION` and `OF_DISTRIBUTIONS`."""
    rows, images = rows_of(dict(own), columns), len(own[VQ])
    pairs = [(name, other) for name, other in (*OF_DIFFUSION, *OF_DISTRIBUTIONS) if {name, other} <= set(own)]
    for name, other in pairs:
        rows[minus(name, other)] = row_of(columns, partial(difference, own[name], own[other]), images)
    for name, other in (*((name, VQ) for name in own if name != VQ), *pairs):
        rows[ratio_name(name, other)] = row_of(ratios, partial(ratio, own[name], own[other]), images)
    return rows


def _collected(setup: EvalSetup, task: Task) -> dict[str, Scores]:
    rulers, count = Rulers.of(setup), len(setup.images)
    ours = [Way(name=VQ, paints="vq"), Way(name=DCDD, paints="trained", steps=setup.steps)]
    scores = collect(rulers, ours, task, "test", count)
    found = {VQ: scores[VQ]}
    for row, painters in opponents(setup, rulers.painters).items():
        found |= collect(replace(rulers, painters=painters), [way_of(row, setup)], task, "test", count)
    return found | {DCDD: scores[DCDD]}


def way_of(row: str, setup: EvalSetup) -> Way:
    """The way an opponent's row is painted."""
    return Way(name=row, paints="trained", steps=setup.steps if row == TOKENS else 1)


def measure_latency(setup: EvalSetup, rounds: int = 15) -> Rows:
    """Sizes, training FLOPs (`flops`), and the median seconds per image from its tokens or condition, in batches of the
    size that all images are painted in.

    Decoders take turns in each round, after a warm-up. Ratios are to the diffusion decoder on the condition; for the
    seconds, which include the autoencoder's decoder, their interval is over rounds. The diffusion decoder alone makes
    no pixels, so a feed-forward decoder is also compared with it and the autoencoder's decoder together.
    """
    base = Painters(pico=setup.pico, folder=setup.out / "guided", weights=setup.weights)
    ways = {VQ: (base, Way(name=VQ, paints="vq"))}
    others = opponents(setup, base)
    ways |= {row: (painters, way_of(row, setup)) for row, painters in others.items()}
    ways[DCDD] = base, Way(name=DCDD, paints="trained", steps=setup.steps)
    count = min(PART, len(setup.images))
    given = base.given("reconstruction", "test", slice(0, count))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in tqdm(range(rounds + 1), desc="latency", unit="round", disable=None):
        for name, (painters, way) in ways.items():
            start = time.perf_counter()
            painters.paint(way, given, range(count))
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - start) / count)
    held = {name: np.array(times[1:]) for name, times in seconds.items()}
    rows = {name: costs_of(setup, name, others) | {SECONDS: float(np.median(times))} for name, times in held.items()}
    rows[CODEC] = costs_of(setup, CODEC, others)
    whole = {column: rows[DCDD][column] + rows[CODEC][column] for column in (PARAMETERS, TOTAL)}
    for name in others:
        own, ours = held[name], held[DCDD]
        interval = bootstrap(lambda k, own=own, ours=ours: float(np.median(own[k]) / np.median(ours[k])), len(own))
        rows[ratio_name(name, DCDD)] = _cost_ratios(rows[name], rows[DCDD]) | cells(SECONDS, interval)
        if name != TOKENS:
            rows[ratio_name(name, WHOLE)] = _cost_ratios(rows[name], whole)
    return rows


def _cost_ratios(own: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for column in (PARAMETERS, TOTAL):
        if column in own:
            value = own[column] / base[column]
            found |= cells(column, Interval(value, value, value))
    return found


def costs_of(setup: EvalSetup, name: str, others: Mapping[str, OpponentPainters]) -> dict[str, float]:
    """Parameters and training FLOPs of a row's decoder; without total FLOPs if its training has left no log."""
    recipe = Recipe.load(setup.weights)
    if name == VQ:
        vq = setup.pico.tokenizer.model
        size, each = parameters(vq.decoder, vq.post_quant_conv), vq_flops(vq)
        images = recipe.tokenizer_batch * (recipe.tokenizer_steps + recipe.vq_decoder_steps)
    elif name == CODEC:
        vae = setup.pico.codec.model
        size, each = parameters(vae.decoder), vae_flops(vae, recipe.size)
        images = vae_decoder_images(recipe)
    elif name in (DCDD, TOKENS):
        decoder = load_dcdd(setup.weights / "decoder.safetensors" if name == DCDD else others[name].file)
        size, each = parameters(decoder), dcdd_flops(decoder)
        images = decoder_images(recipe)
        if name == TOKENS:
            log = read_log(others[name].file.with_suffix(""))
            if not log:
                return {PARAMETERS: float(size), EACH: float(each)}
            images = recipe.decoder_batch * int(log[-1]["step"])
    else:
        network = others[name].network
        size, each, images = parameters(network), feed_forward_flops(network), network.card.images
    return {PARAMETERS: float(size), EACH: float(each), IMAGES: float(images), TOTAL: float(each * images)}


SECTIONS.update(
    {
        "opponents-latency": Section(measure_latency, (*_READ[:3], "recipe.json"), _FILES),
        "opponents-reconstruction": Section(measure_reconstruction, _READ, _FILES),
        "opponents-text": Section(measure_text, _READ, _FILES),
    }
)
