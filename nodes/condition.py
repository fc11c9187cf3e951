"""From logits to the decoder's condition, and from the condition to a mask of uncertainty."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy_api.latest import io

from ..dcdd_core.evaluation.figures import heat_map
from ..dcdd_core.method.uncertainty import (
    Feature,
    area_of_tokens,
    doubt_map,
    grow_mask,
    mask_to_pixels,
    surrounded,
    threshold_doubt,
)
from ..dcdd_core.models.card import DecoderCard, why_not_read
from ..dcdd_core.pipelines.condition import condition, serving
from ..dcdd_core.protocols import ImageTokenizer
from ..dcdd_core.types import TokenLogits
from . import checks, host
from .convert import check_finite, image_of, pixels_of
from .host import Managed
from .sockets import (
    CONNECT_LOGITS,
    CONNECT_VQ,
    ConditionSocket,
    Decoder,
    DecoderSocket,
    MappedCondition,
    TokenLogitsSocket,
    VQVAESocket,
    expect,
    schema,
)

AS_TRAINED = "as measured best for the decoder"
READS = {
    AS_TRAINED: None,
    "logits (the paper)": "logits",
    "logits anchored to the sampled tokens": "anchored",
    "sampled tokens alone": "tokens",
}
DOUBTS: dict[str, Feature] = {
    "doubt: 1 - confidence": "confidence",
    "narrow choice: 1 - margin": "margin",
    "spread: 1 - mass of the top k": "head_mass",
    "tail entropy": "tail_entropy",
}


class LCDMEncoder(io.ComfyNode):
    """Token logits -> condition."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LCDMEncoder",
            "LCDM Encoder",
            category="condition",
            description=(
                "Logit-to-Code Distributional Mapping: for each position, the expected code vector under the whole "
                "distribution, and four features that measure its uncertainty. With a decoder connected, the "
                "logits are first calibrated as in its training; logits from a Logit Calibrator are used as they "
                "are."
            ),
            search_aliases=["distributional mapping", "expected code", "uncertainty", "condition"],
            inputs=[
                TokenLogitsSocket.Input(
                    "token_logits", tooltip="From a Janus Logit Sampler, VQ-VAE Encode or Logit Calibrator."
                ),
                VQVAESocket.Input(
                    "vq_vae", tooltip="The tokenizer that these logits belong to; its codebook gives the code vectors."
                ),
                DecoderSocket.Input(
                    "decoder",
                    optional=True,
                    tooltip="The decoder that will decode the condition; its calibration is applied.",
                ),
                io.Combo.Input(
                    "reads",
                    options=list(READS),
                    default=AS_TRAINED,
                    tooltip=(
                        "Which form of Janus' output the decoder gets. It has no effect on the logits of an "
                        "encoded image, or without a decoder."
                    ),
                ),
            ],
            outputs=[
                ConditionSocket.Output(
                    "condition",
                    display_name="condition",
                    tooltip="Connect to a Distribution-Conditioned FLUX Decoder or an Uncertainty Mask.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, token_logits: TokenLogits, vq_vae: Managed[ImageTokenizer], reads: str, decoder: Decoder | None = None
    ) -> io.NodeOutput:
        expect(token_logits, TokenLogits, "token_logits", CONNECT_LOGITS)
        expect(vq_vae, Managed, "vq_vae", CONNECT_VQ)
        if reads not in READS:
            raise ValueError(f"reads must be one of {', '.join(READS)}, got {reads!r}")
        tokenizer, card = vq_vae.idle, _card(decoder, READS[reads])
        checks.check_tokenizer(token_logits, tokenizer)
        if card is not None:
            checks.check_decoder(card, tokenizer)
        count = len(token_logits.tokens)
        progress = host.NodeProgress(count)
        with host.noticed():
            served = None if card is None else checks.served(card, token_logits)
            mapped = condition(
                served,
                token_logits,
                tokenizer.codebook,
                device=vq_vae.device,
                on_image=lambda done: progress.step(done, count),
                host=host.ComfyHost(),
            )
        made = MappedCondition(
            mapped.code_vectors,
            mapped.uncertainty,
            mapped.grid,
            codebook=mapped.codebook,
            token_size=tokenizer.factor,
            model=token_logits.model,
            source=token_logits.source,
            calibrated=token_logits.calibrated,
            card=card,
            sharpness=None if served is None or served.calibration is None else served.calibration.sharpness,
        )
        return io.NodeOutput(made)


class UncertaintyMask(io.ComfyNode):
    """Condition -> mask of where the model was uncertain."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "UncertaintyMask",
            "Uncertainty Mask",
            category="condition",
            description=(
                "Makes a mask of where Janus was uncertain, as the condition describes it, so that an inpainting "
                "node repaints only there, and a heat map to look at. 'hard' is white above the threshold; 'soft' "
                "keeps the uncertainty as grey values."
            ),
            search_aliases=["heat map", "confidence", "entropy", "auto mask", "inpaint mask"],
            inputs=[
                ConditionSocket.Input("condition", tooltip="From the LCDM Encoder."),
                io.Combo.Input(
                    "feature",
                    options=list(DOUBTS),
                    default=next(iter(DOUBTS)),
                    tooltip="Which of the four uncertainty features to use; 1 always means uncertain.",
                ),
                io.Combo.Input(
                    "edge",
                    options=["hard", "soft"],
                    default="hard",
                    tooltip="'hard' applies the threshold; 'soft' keeps grey values.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="White above this value. With 'soft', values below it become black.",
                ),
                io.Int.Input(
                    "grow",
                    default=0,
                    min=-16,
                    max=16,
                    tooltip="Grows the mask by this many tokens; a negative number shrinks it.",
                ),
                io.Float.Input(
                    "blur",
                    default=0.0,
                    min=0.0,
                    max=8.0,
                    step=0.1,
                    tooltip="Softens the edge with a Gaussian blur; the unit is tokens.",
                ),
                io.Int.Input(
                    "token_size",
                    default=0,
                    min=0,
                    max=64,
                    tooltip=(
                        "Pixels per token, used if no image is connected; 0 takes the condition's own (Janus: 16, "
                        "pico: 8)."
                    ),
                ),
                io.Image.Input("image", optional=True, tooltip="The image to mask; the mask gets its size."),
            ],
            outputs=[
                io.Mask.Output("mask", display_name="mask", tooltip="White where the model was uncertain."),
                io.Image.Output(
                    "heat_map", display_name="heat_map", tooltip="The feature in colours; dark means certain."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        condition: MappedCondition,
        feature: str,
        edge: str,
        threshold: float,
        grow: int,
        blur: float,
        token_size: int,
        image: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        expect(condition, MappedCondition, "condition", "connect the condition of an LCDM Encoder")
        check_finite(threshold=threshold, blur=blur)
        if feature not in DOUBTS or edge not in ("hard", "soft"):
            raise ValueError(f"unknown feature {feature!r} or edge {edge!r}: choose both from their lists again")
        h, w = condition.grid
        side = token_size or condition.token_size
        size = (h * side, w * side) if image is None else tuple(pixels_of(image).shape[2:])
        doubt = doubt_map(condition.uncertainty, DOUBTS[feature], condition.grid).cpu()
        chosen = grow_mask(threshold_doubt(doubt, threshold, soft=edge == "soft"), grow)
        mask = mask_to_pixels(chosen, size, blur=blur)[:, 0].contiguous()
        area = area_of_tokens(size, condition.grid)
        heat = surrounded(torch.stack([heat_map(one[0], area) for one in doubt]), size, -1.0)
        return io.NodeOutput(mask.to(comfy.model_management.intermediate_device()), image_of(heat))


NODES = [LCDMEncoder, UncertaintyMask]


def _card(decoder: Decoder | None, reads: str | None) -> DecoderCard | None:
    if decoder is None:
        return None
    expect(decoder, Decoder, "decoder", "connect a Load DCDD Decoder")
    card = decoder.decoder.idle.card
    if why := why_not_read(reads, variant=card.variant, calibrated=card.calibration is not None):
        host.notice(f"reads has no effect: this decoder {why}")
        return card
    return serving(card, reads=reads)
