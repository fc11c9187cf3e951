"""From logits to the decoder's condition, and from the condition to a mask of doubt."""

from __future__ import annotations

import comfy.model_management
import torch
import torch.nn.functional as F
from comfy_api.latest import io
from einops import rearrange
from skimage.filters import gaussian

from ..dcdd_core.evaluation.figures import heat_map
from ..dcdd_core.method.lcdm import map_logits
from ..dcdd_core.models.card import DecoderCard
from ..dcdd_core.models.vq import VQTokenizer
from ..dcdd_core.pipelines.condition import condition_for, serving
from ..dcdd_core.types import Condition, TokenLogits
from . import host
from .host import Managed, Progress
from .sockets import ConditionSocket, Decoder, DecoderSocket, TokenLogitsSocket, VQVAESocket, expect, schema
from .tokens import CONNECT_LOGITS, CONNECT_VQ

AS_TRAINED = "as measured best for the decoder"
READS = {
    AS_TRAINED: None,
    "logits (the paper)": "logits",
    "logits anchored to the sampled tokens": "anchored",
    "sampled tokens alone": "tokens",
}
FEATURES = {
    "doubt: 1 - confidence": lambda u: 1 - u[..., 0],
    "narrow choice: 1 - margin": lambda u: 1 - u[..., 1],
    "spread: 1 - mass of the top k": lambda u: 1 - u[..., 2],
    "tail entropy": lambda u: u[..., 3],
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
                "Logit-to-Code Distributional Mapping: at each position the mean code vector under the whole "
                "distribution, and four measures of how unsure it is. With the decoder connected, the logits are first "
                "calibrated as it was trained; logits from a Logit Calibrator are taken as they are."
            ),
            search_aliases=["distributional mapping", "expected code", "uncertainty", "condition"],
            inputs=[
                TokenLogitsSocket.Input("token_logits", tooltip="From the sampler, a VQ-VAE Encode, or a calibrator."),
                VQVAESocket.Input("vq_vae", tooltip="The tokenizer of these logits: its codebook is mapped to."),
                DecoderSocket.Input(
                    "decoder", optional=True, tooltip="The decoder that will paint: its calibration is applied."
                ),
                io.Combo.Input(
                    "reads",
                    options=list(READS),
                    default=AS_TRAINED,
                    tooltip=(
                        "What of Janus' output the decoder gets to see. It changes nothing for logits of a picture, "
                        "and without a decoder."
                    ),
                ),
            ],
            outputs=[
                ConditionSocket.Output(
                    "condition",
                    display_name="condition",
                    tooltip="To a Distribution-Conditioned FLUX Decoder and the Uncertainty Mask.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, token_logits: TokenLogits, vq_vae: Managed[VQTokenizer], reads: str, decoder: Decoder | None = None
    ) -> io.NodeOutput:
        expect(token_logits, TokenLogits, "token_logits", CONNECT_LOGITS)
        expect(vq_vae, Managed, "vq_vae", CONNECT_VQ)
        if reads not in READS:
            raise ValueError(f"reads must be one of {', '.join(READS)}, got {reads!r}")
        codebook, card = vq_vae.idle.codebook, _card(decoder, READS[reads])
        device = comfy.model_management.get_torch_device()

        def run(k: int) -> Condition:
            part = host.moved(token_logits.part(k, k + 1), device)
            mapped = map_logits(part, codebook) if card is None else condition_for(card, part, codebook)
            return mapped.to(comfy.model_management.intermediate_device())

        count = len(token_logits.tokens)
        progress, parts = Progress(count), []
        with host.noticed():
            for part in host.one_by_one(run, count):
                parts.append(part)
                progress.step(len(parts), count)
        return io.NodeOutput(
            Condition(
                torch.cat([part.code_vectors for part in parts]),
                torch.cat([part.uncertainty for part in parts]),
                token_logits.grid,
                codebook=parts[0].codebook,
            )
        )


class UncertaintyMask(io.ComfyNode):
    """Condition -> mask of what the model was unsure of."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "UncertaintyMask",
            "Uncertainty Mask",
            category="condition",
            description=(
                "A mask of where Janus was unsure, as the decoder gets to read it, for inpainting nodes to repaint "
                "just that, and a heat map to look at. 'hard' is white above the threshold; 'soft' keeps the doubt "
                "itself as grey."
            ),
            search_aliases=["heat map", "confidence", "entropy", "auto mask", "inpaint mask"],
            inputs=[
                ConditionSocket.Input("condition", tooltip="From the LCDM Encoder."),
                io.Combo.Input(
                    "feature",
                    options=list(FEATURES),
                    default=next(iter(FEATURES)),
                    tooltip="Which of the four uncertainty features; 1 always means unsure.",
                ),
                io.Combo.Input("edge", options=["hard", "soft"], default="hard", tooltip="Threshold it, or keep grey."),
                io.Float.Input(
                    "threshold",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="White above this. With 'soft', what lies below becomes black.",
                ),
                io.Int.Input(
                    "grow",
                    default=0,
                    min=-16,
                    max=16,
                    tooltip="Widens the mask by this many tokens, or narrows it if negative.",
                ),
                io.Float.Input(
                    "blur", default=0.0, min=0.0, max=8.0, step=0.1, tooltip="Softens the edge: a Gaussian, in tokens."
                ),
                io.Int.Input(
                    "token_size",
                    default=16,
                    min=1,
                    max=64,
                    tooltip="Pixels a token, where no image is connected (Janus: 16, pico: 8).",
                ),
                io.Image.Input("image", optional=True, tooltip="The picture to mask: gives the mask its size."),
            ],
            outputs=[
                io.Mask.Output("mask", display_name="mask", tooltip="White where the model was unsure."),
                io.Image.Output("heat_map", display_name="heat_map", tooltip="The feature in colours, dark for sure."),
            ],
        )

    @classmethod
    def execute(
        cls,
        condition: Condition,
        feature: str,
        edge: str,
        threshold: float,
        grow: int,
        blur: float,
        token_size: int,
        image: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        expect(condition, Condition, "condition", "connect the condition of an LCDM Encoder")
        host.check_finite(threshold=threshold, blur=blur)
        if feature not in FEATURES or edge not in ("hard", "soft"):
            raise ValueError(f"feature {feature!r} with edge {edge!r} is not in the lists: choose from them again")
        h, w = condition.grid
        size = (h * token_size, w * token_size) if image is None else host.pixels_of(image).shape[2:]
        doubt = rearrange(FEATURES[feature](condition.uncertainty), "b (h w) -> b 1 h w", h=h).float().cpu()
        mask = (doubt > threshold).float() * (1 if edge == "hard" else doubt)
        mask = _grown(mask, grow)
        mask = F.interpolate(mask, size=size, mode="nearest")
        if blur:
            sigma = (blur * size[0] / h, blur * size[1] / w)
            mask = torch.from_numpy(gaussian(mask[:, 0].numpy(), sigma=(0, *sigma)))[:, None].clamp(0, 1)
        heat = torch.stack([heat_map(one[0], size) for one in doubt])
        device = comfy.model_management.intermediate_device()
        return io.NodeOutput(mask[:, 0].contiguous().to(device), host.image_of(heat))


NODES = [LCDMEncoder, UncertaintyMask]


def _card(decoder: Decoder | None, reads: str | None) -> DecoderCard | None:
    if decoder is None:
        return None
    expect(decoder, Decoder, "decoder", "connect a Load DCDD Decoder")
    return serving(decoder.decoder.idle.card, reads=reads)


def _grown(mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """Grey dilation of [B, 1, h, w] by a square, erosion for a negative number; beyond the edge nothing counts."""
    if tokens == 0:
        return mask
    sign = 1 if tokens > 0 else -1
    return sign * F.max_pool2d(sign * mask, 2 * abs(tokens) + 1, stride=1, padding=abs(tokens))
