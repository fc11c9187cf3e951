"""From tokens and conditions to pictures: the VQ-VAE's own decoder, and the diffusion decoder.

Shapes: B batch, h w token grid, H W pixels, h' w' latent grid, C latent channels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import comfy.latent_formats
import comfy.model_management
import comfy.sd
import latent_preview
import torch
from comfy_api.latest import io
from einops import rearrange

from ..dcdd_core.method.flow import resolution_shift
from ..dcdd_core.method.latents import scale_latents
from ..dcdd_core.method.lcdm import map_logits
from ..dcdd_core.models.backbones.flux_fill.inference import OnLayer
from ..dcdd_core.models.card import DecoderCard
from ..dcdd_core.models.vae import Autoencoder
from ..dcdd_core.models.vq import VQTokenizer
from ..dcdd_core.pipelines.decode import Canvas, canvas_of, paint, pixels_of
from ..dcdd_core.types import Condition, TokenLogits
from . import host
from .host import Managed, Progress
from .sockets import ConditionSocket, Decoder, DecoderSocket, TokenLogitsSocket, VQVAESocket, expect, schema
from .tokens import CONNECT_LOGITS, CONNECT_VQ, vq_memory

HARD, SOFT = "hard: the tokens", "soft: the expected codes"
AS_MEASURED, BY_RESOLUTION, UNIFORM = "as measured best for the decoder", "FLUX: by resolution", "uniform"
SCHEDULES = (AS_MEASURED, BY_RESOLUTION, UNIFORM)
#: Seconds after which the node says that a new schedule is being read.
_LONG = 1.0
_TILES = "connect a VAE from ComfyUI's own Load VAE, which goes on in tiles, or choose a smaller picture"


class VQVAEDecode(io.ComfyNode):
    """Tokens -> picture, by the VLM's own decoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "VQVAEDecode",
            "VQ-VAE Decode",
            category="decode",
            description=(
                "The picture as Janus itself would show it: its tokens through the VQ-VAE decoder. 'soft' decodes the "
                "expected code of each position instead, which keeps some of what a single token loses."
            ),
            search_aliases=["detokenize", "tokens to image", "vqgan decode", "janus decode"],
            inputs=[
                TokenLogitsSocket.Input("token_logits", tooltip="From the sampler or a VQ-VAE Encode."),
                VQVAESocket.Input("vq_vae", tooltip="The tokenizer of these tokens."),
                io.Combo.Input(
                    "codes",
                    options=[HARD, SOFT],
                    default=HARD,
                    tooltip=(
                        "What is decoded: 'soft' washes colours out where the model was unsure. A picture's proxy "
                        "logits must be calibrated first for it, or all is a grey mean."
                    ),
                ),
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="The decoded picture.")],
        )

    @classmethod
    def execute(cls, token_logits: TokenLogits, vq_vae: Managed[VQTokenizer], codes: str) -> io.NodeOutput:
        expect(token_logits, TokenLogits, "token_logits", CONNECT_LOGITS)
        expect(vq_vae, Managed, "vq_vae", CONNECT_VQ)
        if codes not in (HARD, SOFT):
            raise ValueError(f"codes must be {HARD!r} or {SOFT!r}, got {codes!r}")
        count, memory = len(token_logits.tokens), vq_memory(vq_vae.idle, token_logits.grid)

        def run(k: int) -> torch.Tensor:
            vq, part = vq_vae.ready(memory), token_logits.part(k, k + 1)
            # Mapped for the hard tokens too: it is where another tokenizer's logits are refused.
            mapped = map_logits(part, vq.codebook)
            if codes == SOFT:
                return vq.decode_vectors(mapped.code_vectors, part.grid)
            return vq.decode_tokens(part.tokens, part.grid)

        progress, decoded = Progress(count), []
        for pixels in host.one_by_one(run, count):
            decoded.append(host.image_of(pixels))
            progress.step(len(decoded), count, pixels)
        return io.NodeOutput(torch.cat(decoded))


class FluxDecoder(io.ComfyNode):
    """Condition -> picture, by the diffusion decoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FluxDecoder",
            "Distribution-Conditioned FLUX Decoder",
            category="decode",
            description=(
                "Paints the picture from the condition: everything Janus knew, not only the tokens it picked. With an "
                "image and a mask only what is under the mask is painted, and the rest stays as it is to the last bit."
            ),
            search_aliases=["dcdd", "diffusion decoder", "flux fill", "decode", "inpaint"],
            inputs=[
                DecoderSocket.Input("decoder", tooltip="From Load DCDD Decoder."),
                ConditionSocket.Input("condition", tooltip="From the LCDM Encoder."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=True,
                    tooltip="Of the noise that the first picture starts from; the next ones of the batch count on.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=100,
                    tooltip="Euler steps; 0 takes the number that the decoder was made for. 10 give a good picture.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=list(SCHEDULES),
                    default=AS_MEASURED,
                    tooltip="How the steps lie between noise and picture: as measured, FLUX's way, or evenly.",
                ),
                io.Image.Input(
                    "image", optional=True, tooltip="To paint only a part: the picture to keep the rest of."
                ),
                io.Mask.Input("mask", optional=True, tooltip="To paint only a part: where to paint (white)."),
                io.Vae.Input(
                    "vae", optional=True, tooltip="A FLUX VAE from ComfyUI's own loader, in place of the decoder's."
                ),
            ],
            outputs=[
                io.Image.Output("painted", display_name="image", tooltip="The painted picture."),
                io.Latent.Output(
                    "latent", display_name="latent", tooltip="Its latents, for further sampling with FLUX in ComfyUI."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        decoder: Decoder,
        condition: Condition,
        seed: int,
        steps: int,
        schedule: str,
        image: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        vae: comfy.sd.VAE | None = None,
    ) -> io.NodeOutput:
        expect(decoder, Decoder, "decoder", "connect a Load DCDD Decoder")
        expect(condition, Condition, "condition", "connect the condition of an LCDM Encoder")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if (image is None) != (mask is None):
            raise ValueError("painting a part needs an image and a mask: connect both, or neither to paint everything")
        card, batch = decoder.decoder.idle.card, len(condition.code_vectors)
        given = area = None
        if image is not None:
            given, area = host.pixels_of(image), host.mask_of(mask)
            for name, value in (("image", given), ("mask", area)):
                if len(value) not in (1, batch):
                    raise ValueError(
                        f"{name} is a batch of {len(value)}, the condition one of {batch}: connect one for all, or "
                        f"{batch}"
                    )
            area = host.resized(area, *given.shape[2:]).clamp(0, 1)
            if not bool(area.any()):
                host.notice("the mask is empty: there is nothing to paint, the picture stays as it is")
        autoencoder, draws = _autoencoder(decoder, vae)
        (canvas,) = host.one_by_one(lambda _: canvas_of(autoencoder, card, condition, given, area), 1, remedy=_TILES)
        steps, shift = steps or card.steps, _shift(schedule, canvas)

        def run(first: int, last: int) -> torch.Tensor:
            progress = Progress(steps)
            memory = _working_memory(card, last - first, condition.grid)
            if draws:
                host.bring(decoder.decoder, decoder.vae.managed, memory=memory + decoder.vae.memory(canvas.given))
                preview = decoder.vae.preview
            else:
                host.bring(decoder.decoder, memory=memory)
                preview = _linear_preview(card)
            return paint(
                decoder.decoder.idle,
                condition.part(first, last),
                canvas.part(first, last),
                seeds=[seed + k for k in range(first, last)],
                steps=steps,
                shift=shift,
                on_step=lambda done, total, latents: progress.step(done, total, preview(latents)),
                on_prepare=_reading(progress, steps),
            )

        latents = torch.cat(host.in_parts(run, batch))

        def show(k: int) -> torch.Tensor:
            comfy.model_management.throw_exception_if_processing_interrupted()
            part = (x if x is None or len(x) == 1 else x[k : k + 1] for x in (given, area))
            return host.image_of(pixels_of(autoencoder, latents[k : k + 1], *part))

        # Apart from the steps: what the autoencoder has no memory for must not have these made again.
        painted = torch.cat(list(host.one_by_one(show, batch, remedy=_TILES)))
        latent = {"samples": latents.to(painted.device)}
        if image is not None:
            # Again on the IMAGE itself: on its way through -1..1 it would lose its last bit.
            keep = rearrange(area == 0, "b 1 h w -> b h w 1").to(painted.device)
            painted = torch.where(keep, image[..., :3].to(painted), painted)
            latent["noise_mask"] = area.to(painted.device)
        return io.NodeOutput(painted, latent)


NODES = [VQVAEDecode, FluxDecoder]


def _shift(schedule: str, canvas: Canvas) -> float | None:
    """Mu of the time shift; None for the decoder's own."""
    packed = math.prod(canvas.given.shape[2:]) // 4
    return {AS_MEASURED: None, BY_RESOLUTION: resolution_shift(packed), UNIFORM: 0.0}[schedule]


def _working_memory(card: DecoderCard, batch: int, grid: tuple[int, int]) -> int:
    """Bytes that a step takes besides weights: an estimate, 64 float32 arrays of all tokens."""
    width = card.base_config["num_attention_heads"] * card.base_config["attention_head_dim"]
    packed = math.prod(side // (2 * card.vae_factor) for side in card.painted_size(grid))
    return 64 * 4 * batch * packed * width


def _reading(progress: Progress, steps: int) -> OnLayer:
    """What to do while a new schedule's modulations are read: nothing of the steps is done, and it may take long."""
    began = time.monotonic()

    def on_layer(done: int, layers: int) -> None:
        progress.step(0, steps)
        if time.monotonic() - began > _LONG:
            host.tell(
                f"reading the modulations of a new schedule: {done} of {layers}"
                if done < layers
                else "the modulations of the new schedule are read"
            )

    return on_layer


class _CoreAutoencoder:
    """ComfyUI's VAE as an `Autoencoder`: it looks after its memory, and tiles where that is short."""

    def __init__(self, vae: comfy.sd.VAE):
        self._vae = vae

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._vae.encode(host.image_of(pixels)).float()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return host.pixels_of(self._vae.decode(latents))


def _autoencoder(decoder: Decoder, vae: comfy.sd.VAE | None) -> tuple[Autoencoder, bool]:
    """The autoencoder to use, and whether it draws the previews too.

    Raises:
        ValueError: if there is none, or one of another kind.
    """
    if vae is not None:
        _check_core_vae(vae, decoder.decoder.idle.card)
        return _CoreAutoencoder(vae), False
    if decoder.vae is None:
        raise ValueError(
            "this decoder was loaded without an autoencoder: choose one in Load DCDD Decoder, or connect a FLUX VAE "
            "(ae.safetensors) from Load VAE"
        )
    return decoder.vae, decoder.vae.is_small


def _linear_preview(card: DecoderCard) -> Callable[[torch.Tensor], host.Preview]:
    """ComfyUI's own estimate of FLUX latents' colours."""
    flux = comfy.latent_formats.Flux()
    previewer = latent_preview.Latent2RGBPreviewer(flux.latent_rgb_factors, flux.latent_rgb_factors_bias)
    return lambda latents: previewer.decode_latent_to_preview(scale_latents(latents, card.vae_shift, card.vae_scale))


def _check_core_vae(vae: comfy.sd.VAE, card: DecoderCard) -> None:
    if not isinstance(vae, comfy.sd.VAE):
        raise ValueError(f"vae got {type(vae).__name__}: connect a FLUX VAE from Load VAE")
    factor, channels = vae.downscale_ratio, vae.latent_channels
    if factor != card.vae_factor or channels != 16:
        raise ValueError(
            f"this VAE has {channels} channels at 1/{factor} of the size, the decoder paints 16 at "
            f"1/{card.vae_factor}: connect the autoencoder that the decoder was trained with "
            "(for FLUX.1-Fill, ae.safetensors), or none"
        )
