"""From tokens and conditions to images: the VQ-VAE's own decoder, and the diffusion decoder.

Shapes: B batch, H W pixels, h' w' latent grid, C latent channels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import comfy.latent_formats
import comfy.sd
import latent_preview
import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from einops import rearrange

from ..dcdd_core import registry
from ..dcdd_core.method.latents import scale_latents, unscale_latents
from ..dcdd_core.models.card import MOST_CONDITION_GUIDANCE, DecoderCard
from ..dcdd_core.models.decoder import DistributionConditionedDecoder
from ..dcdd_core.pipelines.decode import decode, decode_tokens
from ..dcdd_core.pipelines.guided import MOST_STRENGTH
from ..dcdd_core.pipelines.load import check_codec
from ..dcdd_core.protocols import ImageTokenizer, LatentCodec, OnLayer
from ..dcdd_core.types import TokenLogits
from . import checks, host
from .convert import check_finite, image_of, mask_of, pixels_of, resized, unchecked_pixels_of
from .guides import decoder_guide
from .host import Managed, ManagedCodec
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

HARD, SOFT = "hard: the tokens", "soft: the expected codes"
AS_MEASURED, BY_RESOLUTION, UNIFORM = "as measured best for the decoder", "FLUX: by resolution", "uniform"
#: The value of the widgets strength and guidance that stands for the decoder card's own.
AS_SERVED = -1.0
SCHEDULES = (AS_MEASURED, BY_RESOLUTION, UNIFORM)
#: Seconds after which the node says that weights for a new schedule are being loaded.
_LONG = 1.0
_TILES = "connect a VAE from ComfyUI's Load VAE, which falls back to tiles, or use a smaller image"
_OWN_LATENTS = (
    "this decoder's latents are not FLUX's (pico has a space of its own), so no other node can use them: connect the "
    "image output instead, if need be through a VAE Encode"
)


class VQVAEDecode(io.ComfyNode):
    """Tokens -> image, by the VLM's own decoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "VQVAEDecode",
            "VQ-VAE Decode",
            category="decode",
            description=(
                "Decodes tokens with Janus' own VQ-VAE decoder: the image that you get without this pack. 'soft' "
                "decodes the expected code vector of each position instead, which keeps some of what a single "
                "token loses."
            ),
            search_aliases=[
                "decode tokens",
                "detokenize",
                "tokens to image",
                "vqgan decode",
                "janus decode",
                "令牌解码",
            ],
            inputs=[
                TokenLogitsSocket.Input("token_logits", tooltip="From a Janus Logit Sampler or VQ-VAE Encode."),
                VQVAESocket.Input("vq_vae", tooltip="The tokenizer that these tokens belong to."),
                io.Combo.Input(
                    "codes",
                    options=[HARD, SOFT],
                    default=HARD,
                    tooltip=(
                        "What is decoded. 'soft' fades colours where the model was uncertain. Calibrate the proxy "
                        "logits of an encoded image before you use it, or the result is a uniform grey."
                    ),
                ),
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="The decoded image.")],
        )

    @classmethod
    def execute(cls, token_logits: TokenLogits, vq_vae: Managed[ImageTokenizer], codes: str) -> io.NodeOutput:
        expect(token_logits, TokenLogits, "token_logits", CONNECT_LOGITS)
        expect(vq_vae, Managed, "vq_vae", CONNECT_VQ)
        if codes not in (HARD, SOFT):
            raise ValueError(f"codes must be {HARD!r} or {SOFT!r}, got {codes!r}")
        checks.check_tokenizer(token_logits, vq_vae.idle)
        count = len(token_logits.tokens)
        progress = host.NodeProgress(count)
        pixels = decode_tokens(
            vq_vae.idle,
            token_logits,
            soft=codes == SOFT,
            at_once=1,
            on_images=lambda done, last: progress.step(done, count, last),
            host=host.ComfyHost(vq_vae, convolutional=True),
        )
        return io.NodeOutput(image_of(pixels))


class FluxDecoder(io.ComfyNode):
    """Condition -> image, by the diffusion decoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FluxDecoder",
            "Distribution-Conditioned FLUX Decoder",
            category="decode",
            description=(
                "Decodes the condition into an image with a diffusion model: it uses everything that Janus "
                "predicted, not only the tokens that were sampled. With an image and a mask, only the area under "
                "the mask is painted; all other pixels stay exactly as they are."
            ),
            search_aliases=["dcdd", "diffusion decoder", "flux fill", "decode", "inpaint", "扩散解码"],
            inputs=[
                DecoderSocket.Input("decoder", tooltip="From Load DCDD Decoder."),
                ConditionSocket.Input("condition", tooltip="From the LCDM Encoder."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=True,
                    tooltip="Seed of the noise for the first image; each further image of the batch adds 1.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=100,
                    tooltip=(
                        "Number of Euler steps; 0 uses the decoder's own number. In the paper, rFID (lower is better) "
                        "with 10 steps is 1.18 times that with 30."
                    ),
                ),
                io.Combo.Input(
                    "schedule",
                    options=list(SCHEDULES),
                    default=AS_MEASURED,
                    tooltip=(
                        "How the steps are spaced between noise and image: as the decoder's bundle says, as FLUX does "
                        "by resolution, or uniformly."
                    ),
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip=(
                        "To paint only a part: the image to keep outside the mask. It is resized and cropped at the "
                        "centre to the size of the decoder's images."
                    ),
                ),
                io.Mask.Input("mask", optional=True, tooltip="To paint only a part: white where to paint."),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="A FLUX VAE from ComfyUI's Load VAE, used in place of the decoder's own.",
                ),
                VQVAESocket.Input(
                    "vq_vae",
                    optional=True,
                    tooltip="For distribution guidance: the tokenizer that the condition's tokens belong to.",
                ),
                io.Float.Input(
                    "strength",
                    optional=True,
                    default=AS_SERVED,
                    min=AS_SERVED,
                    max=MOST_STRENGTH,
                    step=0.05,
                    tooltip=(
                        "Distribution guidance on top of the decoder, which needs vq_vae: 0 is off. On an earlier "
                        "pico, 0.05 raised SSIM and worsened one of two Frechet distances; much more looks "
                        "over-cooked. -1 uses what the decoder's bundle says, which is mostly 0."
                    ),
                ),
                io.Float.Input(
                    "guidance",
                    optional=True,
                    default=AS_SERVED,
                    min=AS_SERVED,
                    max=MOST_CONDITION_GUIDANCE,
                    step=0.1,
                    tooltip=(
                        "Guidance on the condition, how closely the image follows it: 1 is off, more is closer. Other "
                        "values than 1 take twice the time, and need a decoder that was trained with dropped "
                        "conditions. -1 uses what the decoder's bundle says."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output("painted", display_name="image", tooltip="The decoded image."),
                io.Latent.Output(
                    "latent",
                    display_name="latent",
                    tooltip="Its latent, for further sampling with FLUX in ComfyUI; pico has none to give.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        decoder: Decoder,
        condition: MappedCondition,
        seed: int,
        steps: int,
        schedule: str,
        image: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        vae: comfy.sd.VAE | None = None,
        vq_vae: Managed[ImageTokenizer] | None = None,
        strength: float = AS_SERVED,
        guidance: float = AS_SERVED,
    ) -> io.NodeOutput:
        expect(decoder, Decoder, "decoder", "connect a Load DCDD Decoder")
        expect(condition, MappedCondition, "condition", "connect the condition of an LCDM Encoder")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if (image is None) != (mask is None):
            raise ValueError("painting a part needs an image and a mask: connect both, or neither to paint everything")
        for name, value in (("strength", strength), ("guidance", guidance)):
            check_finite(**{name: value})
            if value < 0 and value != AS_SERVED:
                raise ValueError(f"{name} must be 0 or more, or {AS_SERVED:g} for the decoder's own, got {value:g}")
        model, batch = decoder.decoder.idle, len(condition.code_vectors)
        checks.check_condition(condition, model)
        given = area = None
        if image is not None:
            given, area = pixels_of(image), mask_of(mask)
            for name, value in (("image", given), ("mask", area)):
                if len(value) not in (1, batch):
                    raise ValueError(
                        f"{name} is a batch of {len(value)}, the condition one of {batch}: connect one for all, or "
                        f"{batch}"
                    )
            # First the mask to the image as the user sees it, then both to the size at which the tokens are painted.
            area = resized(area, *given.shape[2:])
            size = model.painted_size(condition.grid)
            if given.shape[2:] != size:
                given, area = resized(given, *size).clamp(-1, 1), resized(area, *size)
                image = image_of(given)
            area = area.clamp(0, 1)
            if not bool(area.any()):
                host.notice("the mask is empty: nothing is painted, the image stays unchanged")
        codec = _codec(decoder, vae)
        steps = steps or model.card.steps
        shift = _shift(schedule, model, condition, steps)
        comfy_host, guide = _host(decoder, codec, condition), None
        strength, served_shift = _served(model.card, strength, vq_vae)
        if strength > 0 or vq_vae is not None:
            expect(vq_vae, Managed, "vq_vae", CONNECT_VQ)
        if strength > 0:
            checks.check_tokens_of_condition(condition, vq_vae.idle)
            comfy_host, guide = decoder_guide(comfy_host, codec, vq_vae, condition, model, strength)
            shift = served_shift if schedule == AS_MEASURED and served_shift is not None else shift
        progress, preview = host.NodeProgress(steps), _preview(codec, decoder.decoder.device)
        painted_before = 0  # images of the parts that are done, if the batch is split

        def on_step(done: int, total: int, latents: torch.Tensor) -> None:
            nonlocal painted_before
            place = {"first": painted_before, "count": len(latents), "batch": batch}
            progress.step(*host.over_batch(done, total, **place), preview(latents))
            if done == total:
                painted_before += len(latents)

        with host.noticed():
            decoded = decode(
                model,
                codec,
                condition,
                seeds=[seed + k for k in range(batch)],
                steps=steps,
                shift=shift,
                image=given,
                mask=area,
                guide=guide,
                condition_guidance=None if guidance == AS_SERVED else guidance,
                on_step=on_step,
                on_prepare=_on_layer(progress, steps),
                host=comfy_host,
                codec_remedy=_TILES if vae is None else None,
            )
        painted = image_of(decoded.pixels)
        latent = {"samples": decoded.latents.to(painted.device)}
        if image is not None:
            # Kept pixels are copied from the IMAGE itself: on the way to -1..1 and back they may lose their last bit.
            keep = rearrange(area == 0, "b 1 h w -> b h w 1").to(painted.device)
            painted = torch.where(keep, image[..., :3].to(painted), painted)
            latent["noise_mask"] = area.to(painted.device)
        return io.NodeOutput(painted, latent if codec.comfy_format else ExecutionBlocker(_OWN_LATENTS))


NODES = [VQVAEDecode, FluxDecoder]


def _served(card: DecoderCard, strength: float, vq_vae: Any) -> tuple[float, float | None]:
    """The strength of distribution guidance, and mu of its time shift; a mu of None is the decoder's own."""
    served = card.distribution_guidance
    if strength >= 0 or served is None or served.strength == 0:
        return max(strength, 0.0), None
    if vq_vae is None:
        host.notice(
            f"this decoder paints best with a guidance of strength {served.strength:g}, which needs vq_vae: connect it"
        )
        return 0.0, None
    return served.strength, served.shift


def _shift(
    schedule: str, model: DistributionConditionedDecoder, condition: MappedCondition, steps: int
) -> float | None:
    """Mu of the time shift; None for the decoder's own."""
    if schedule != BY_RESOLUTION:
        return {AS_MEASURED: None, UNIFORM: 0.0}[schedule]
    unit = model.card.vae_factor * model.backbone.patch
    tokens = math.prod(side // unit for side in model.painted_size(condition.grid))
    return model.backbone.default_shift(tokens, steps)


def _on_layer(progress: host.NodeProgress, steps: int) -> OnLayer:
    """The callback for loading the weights of a new schedule, which may take long and comes before the first step."""
    began = time.monotonic()

    def on_layer(done: int, layers: int) -> None:
        progress.step(0, steps)
        if time.monotonic() - began > _LONG:
            host.tell(
                f"loading modulation weights for a new schedule: {done} of {layers}"
                if done < layers
                else "modulation weights loaded"
            )

    return on_layer


class _CoreCodec:
    """ComfyUI's VAE as a `LatentCodec`: it manages its own memory, and falls back to tiles.

    It does not say how its latents are normalised, so shift and scale are taken from the decoder's card.
    """

    model = None

    def __init__(self, vae: comfy.sd.VAE, decoder: DistributionConditionedDecoder):
        card, self.vae = decoder.card, vae
        self.factor, self.channels = vae.downscale_ratio, vae.latent_channels
        # Latents that are not normalised if the card says nothing; `check_codec` refuses them if they do not fit.
        self.shift = 0.0 if card.vae_shift is None else card.vae_shift
        self.scale = 1.0 if card.vae_scale is None else card.vae_scale
        published = registry.codec_of(card.base_config).published()
        theirs = (published.channels, published.factor, published.shift, published.scale)
        own = (self.channels, self.factor, self.shift, self.scale)
        self.comfy_format = published.comfy_format if own == theirs else ""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `LatentCodec.encode`."""
        return self.vae.encode(image_of(pixels)).float()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See `LatentCodec.decode`."""
        # `pixels_of` would blame another node for NaN: what is painted is checked after it was decoded.
        return unchecked_pixels_of(self.vae.decode(latents))

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        """See `LatentCodec.normalize`."""
        return scale_latents(latents, self.shift, self.scale)

    def denormalize(self, z: torch.Tensor) -> torch.Tensor:
        """See `LatentCodec.denormalize`."""
        return unscale_latents(z, self.shift, self.scale)

    def preview(self, latents: torch.Tensor) -> None:
        """No preview: decoding with this VAE is too slow for that."""

    def working_memory(self, height: int, width: int) -> int:
        """0: ComfyUI's VAE reserves its memory itself."""
        return 0


def _codec(decoder: Decoder, vae: comfy.sd.VAE | None) -> LatentCodec:
    """The codec to use: the connected VAE, or the decoder's own.

    Raises:
        ValueError: if there is none, or one that does not fit.
    """
    if vae is not None:
        expect(vae, comfy.sd.VAE, "vae", "connect a FLUX VAE from Load VAE")
        model, has_own = decoder.decoder.idle, decoder.codec is not None
        checks.check_vae(vae, model, has_own=has_own)
        codec = _CoreCodec(vae, model)
        check_codec(codec, model, remedy=checks.vae_remedy(has_own))
        checks.check_vae_scale(codec, model.card, has_own=has_own)
        return codec
    if decoder.codec is None:
        raise ValueError(
            "this decoder was loaded without an autoencoder: choose one in Load DCDD Decoder, or connect a FLUX VAE "
            "(ae.safetensors) from Load VAE"
        )
    return decoder.codec


def _draws_previews(codec: LatentCodec) -> bool:
    return host.shows_previews() and isinstance(codec, ManagedCodec) and codec.draws_previews


def _host(decoder: Decoder, codec: LatentCodec, condition: MappedCondition) -> host.ComfyHost:
    """The decoder, together with the codec if that draws the previews."""
    if not _draws_previews(codec):
        return host.ComfyHost(decoder.decoder)
    size = decoder.decoder.idle.painted_size(condition.grid)
    return host.ComfyHost(decoder.decoder, codec.managed, besides=codec.working_memory(*size))


def _preview(codec: LatentCodec, device: torch.device) -> Callable[[torch.Tensor], host.Preview]:
    """A function that turns raw latents into a preview: a small codec itself, or else ComfyUI's previewer.

    --preview-method decides what ComfyUI's previewer is: none, an estimate of the colours, or TAESD.

    Args:
        device: where the latents are.
    """
    if _draws_previews(codec):
        return lambda latents: codec.preview(latents[:4])
    previewer = None
    if codec.comfy_format:
        previewer = latent_preview.get_previewer(device, getattr(comfy.latent_formats, codec.comfy_format)())
    if previewer is None:
        return lambda latents: None
    return lambda latents: previewer.decode_latent_to_preview(codec.normalize(latents))
