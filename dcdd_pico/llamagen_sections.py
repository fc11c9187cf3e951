"""What pico's LlamaGen scores beside its Janus: sections of docs/results.md (the paper's Tables 7 and 8).

Both VLMs sample tokens of the same image tokenizer, and the same trained decoder paints them, each time with the VLM's
own calibration. Scores, intervals and the files that keep them are those of `guided_sections`.

Shapes: B images of a part, M images, N tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from dcdd_core.pipelines.condition import serving
from dcdd_core.pipelines.load import Models
from dcdd_core.protocols import SamplingOptions, TeacherForced

from .embedded import JANUS, LLAMAGEN, calibration_name
from .guided_images import Painters, Way, originals, scenes_of
from .guided_sections import F1, Rulers, Scores, collect, difference, minus, parts_of, ratio, row_of, rows_of
from .models import load_pico
from .scenes import scene_pixels
from .sections import SECTIONS, EvalSetup, Rows, Section, ratio_name

#: Names of rows.
NAMES = {JANUS: "Janus", LLAMAGEN: "LlamaGen"}
VQ, DCDD = "VQ-VAE decode", "trained DCDD"
#: Guidances compared; 7.5 is that of the published model.
GUIDANCES = (1.0, 1.5, 2.0, 3.0, 5.0, 7.5)
#: Upper limit on the captions they are compared on.
CHOICE = 256
LOSS = "loss, nats a token"
RECONSTRUCTION = ("frechet", "frechet, text detector", "ssim", "psnr", "perceptual", "perceptual, text detector")
TEXT = ("frechet", "frechet, text detector", *F1)
RATIOS = ("frechet", "frechet, text detector", "F1")
#: LlamaGen's weights, without config.json, which holds the guidance that is chosen here.
_NETWORK = (f"{LLAMAGEN}/t2i_pico.safetensors", f"{LLAMAGEN}/text_encoder")
_CALIBRATED = (*_NETWORK, calibration_name(LLAMAGEN))
_PAINTED = (JANUS, "vae", "decoder.safetensors")
_READER = "reader.safetensors"


def guidance_name(guidance: float) -> str:
    """Name of the row of a guidance."""
    return f"guidance {guidance:g}"


def row_name(vlm: str, decoder: str) -> str:
    """Name of the row with a VLM's images by one decoder."""
    return f"{NAMES[vlm]}, {decoder}"


def calibrated_name(vlm: str) -> str:
    """Name of the row with reconstructions under a VLM's calibration."""
    return f"{DCDD}, calibration of {NAMES[vlm]}"


def gain_name(vlm: str) -> str:
    """Name of the row with the trained decoder's scores divided by the VQ decode's."""
    return f"{NAMES[vlm]}, {ratio_name(DCDD, VQ)}"


def load_llamagen(setup: EvalSetup, *, calibrated: bool = True) -> Models:
    """The models of a measurement with LlamaGen in place of Janus.

    Raises:
        ValueError: if LlamaGen or, with `calibrated`, its calibration is missing.
    """
    path = setup.weights / calibration_name(LLAMAGEN)
    if calibrated and not path.is_file():
        raise ValueError(f"{path} does not exist: fit it with `python -m dcdd_pico.llamagen_calibration`")
    where = {"device": setup.pico.tokenizer.device, "weights": setup.weights, "compiled": setup.compiled}
    pico = load_pico(**where, vlm=LLAMAGEN)
    pico.decoder.to(setup.pico.decoder.dtype)
    return pico


def of_llamagen(rulers: Rulers, pico: Models, *read: str) -> Rulers:
    """Rulers that measure LlamaGen's images and keep them beside those of Janus, to which `rulers` belongs.

    Args:
        read: the files in the weights folder that the images depend on.
    """
    name = f"llamagen-{pico.decoder.card.calibration.guidance:g}-"
    own = rulers.painters
    return replace(rulers, painters=Painters(pico=pico, folder=own.folder, weights=own.weights, read=read, name=name))


def measure_choice(setup: EvalSetup) -> Rows:
    """Guidances by the VQ decode, on the first `CHOICE` calibration captions of a range not used for calibration."""
    pico, rulers, rows = load_llamagen(setup, calibrated=False), Rulers.of(setup), {}
    count = min(CHOICE, len(setup.images))
    for guidance in GUIDANCES:
        own = of_llamagen(rulers, at_guidance(pico, guidance), *_NETWORK, JANUS)
        scores = collect(own, [Way(name=VQ, paints="vq")], "text", "calibration", count)[VQ]
        rows[guidance_name(guidance)] = row_of(("frechet", "F1"), scores.score, count)
    return rows


def at_guidance(pico: Models, guidance: float) -> Models:
    """The same models, sampling with another guidance; the weights are shared."""
    decoder = copy.copy(pico.decoder)
    calibration = replace(decoder.card.calibration, vlm=pico.sampler.name, guidance=guidance)
    decoder.card = serving(decoder.card, calibration=calibration)
    return replace(pico, decoder=decoder)


def chosen_guidance(rows: Rows) -> float:
    """From `measure_choice`: the lowest Frechet distance among guidances whose F1 is in the interval of the best F1."""
    least = max(rows.values(), key=lambda row: row["F1"])["F1: lowest"]
    able = [guidance for guidance in GUIDANCES if rows[guidance_name(guidance)]["F1"] >= least]
    return min(able, key=lambda guidance: rows[guidance_name(guidance)]["frechet"])


def measure_loss(setup: EvalSetup) -> Rows:
    """Held-out loss of both VLMs on the same scenes: each token's, given the caption and the earlier tokens."""
    models, count = {JANUS: setup.pico, LLAMAGEN: load_llamagen(setup, calibrated=False)}, len(setup.images)
    found: dict[str, list[torch.Tensor]] = {vlm: [] for vlm in models}
    for part in parts_of(count, "loss"):
        captions = [scene.caption for scene in scenes_of("test", part)]
        tokens = setup.pico.tokenizer.encode(scene_pixels(originals("test", part), setup.pico.tokenizer.device)).tokens
        for vlm, pico in models.items():
            found[vlm].append(token_losses(pico.sampler, captions, tokens).mean(1).cpu())
    held = {vlm: torch.cat(parts).double().numpy() for vlm, parts in found.items()}
    rows = {NAMES[vlm]: row_of((LOSS,), _mean_of(values), count) for vlm, values in held.items()}
    weaker = minus(NAMES[LLAMAGEN], NAMES[JANUS])
    return rows | {weaker: row_of((LOSS,), _mean_of(held[LLAMAGEN] - held[JANUS]), count)}


def token_losses(sampler: TeacherForced, captions: Sequence[str], tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each token given its caption and the earlier tokens, guidance 1: [B, N] -> [B, N]."""
    found = sampler.teacher_forced(captions, tokens, options=SamplingOptions(guidance=1.0))
    return F.cross_entropy(rearrange(found.logits, "b n k -> b k n"), found.tokens, reduction="none")


def measure_reconstruction(setup: EvalSetup) -> Rows:
    """The paper's Table 7: scenes that no choice was made on, by the trained decoder with either VLM's calibration.

    Both VLMs share an image tokenizer, and therefore the VQ decode.
    """
    own = _collected(setup, load_llamagen(setup), "reconstruction")
    own = {calibrated_name(vlm): scores[DCDD] for vlm, scores in own.items()} | {VQ: own[JANUS][VQ]}
    names = [calibrated_name(vlm) for vlm in (JANUS, LLAMAGEN)]
    rows = rows_of({name: own[name] for name in (VQ, *names)}, RECONSTRUCTION)
    between = partial(difference, own[names[1]], own[names[0]])
    return rows | {minus(names[1], names[0]): row_of(RECONSTRUCTION, between, len(own[VQ]))}


def measure_text(setup: EvalSetup) -> Rows:
    """The paper's Table 8: the same captions for both VLMs, each at its own guidance.

    Also the difference of the two VQ decodes, and for each VLM the trained decoder's scores divided by the VQ decode's.
    The difference of these ratios shows which VLM gains less: for Frechet distances, LlamaGen if it is above 0.
    """
    pico = load_llamagen(setup)
    own = _collected(setup, pico, "text")
    guidance = {JANUS: setup.guidance, LLAMAGEN: pico.decoder.card.calibration.guidance}
    rows: Rows = {}
    for vlm, scores in own.items():
        found = rows_of({row_name(vlm, name): each for name, each in scores.items()}, TEXT)
        for name in (row_name(vlm, VQ), row_name(vlm, DCDD)):
            found[name]["guidance"] = guidance[vlm]
        rows |= found
    count = len(own[JANUS][VQ])
    apart = partial(difference, own[LLAMAGEN][VQ], own[JANUS][VQ])
    rows[minus(row_name(LLAMAGEN, VQ), row_name(JANUS, VQ))] = row_of(TEXT, apart, count)
    ratios = {vlm: partial(ratio, scores[DCDD], scores[VQ]) for vlm, scores in own.items()}
    for vlm, score in ratios.items():
        rows[gain_name(vlm)] = row_of(RATIOS, score, count)

    def of_ratios(column: str, k: np.ndarray) -> float:
        return ratios[LLAMAGEN](column, k) - ratios[JANUS](column, k)

    rows[minus(gain_name(LLAMAGEN), gain_name(JANUS))] = row_of(RATIOS, of_ratios, count)
    return rows


def _collected(setup: EvalSetup, pico: Models, task: Literal["reconstruction", "text"]) -> dict[str, dict[str, Scores]]:
    """Scores by VLM and decoder; those of Janus are the ones that `guided_sections` keeps."""
    ways = [Way(name=VQ, paints="vq"), Way(name=DCDD, paints="trained", steps=setup.steps)]
    rulers, own = Rulers.of(setup), {}
    for vlm, each in ((JANUS, rulers), (LLAMAGEN, of_llamagen(rulers, pico, *_CALIBRATED, *_PAINTED))):
        # Encoding an image gives the same tokens for both VLMs.
        of = ways[1:] if (vlm, task) == (LLAMAGEN, "reconstruction") else ways
        own[vlm] = collect(each, of, task, "test", len(setup.images))
    return own


def _mean_of(values: np.ndarray):
    return lambda _, images: float(values[images].mean())


SECTIONS.update(
    {
        "llamagen-choice": Section(measure_choice, (*_NETWORK, JANUS, _READER)),
        "llamagen-loss": Section(measure_loss, (*_NETWORK, JANUS)),
        "llamagen-reconstruction": Section(measure_reconstruction, (*_CALIBRATED, *_PAINTED, _READER)),
        "llamagen-text": Section(measure_text, (*_CALIBRATED, *_PAINTED, _READER)),
    }
)
