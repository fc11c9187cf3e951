"""Distribution guidance: pulls any of ComfyUI's diffusion models towards what Janus predicted at each position.

Shapes: B batch, H W pixels, h' w' latent grid, C latent channels.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
import comfy.sd
import torch
import torch.nn.functional as F
from comfy_api.latest import io
from einops import rearrange

from ..dcdd_core.method.guidance import WEIGHTS
from ..dcdd_core.pipelines.guided import MOST_STRENGTH, GuidanceOptions, at_grid, sharpen
from ..dcdd_core.pipelines.images import stretched
from ..dcdd_core.pipelines.oom import one_by_one
from ..dcdd_core.protocols import ImageTokenizer
from ..dcdd_core.types import Calibration, TokenLogits
from . import checks, host
from .convert import check_finite, image_of, in_words, mask_of, pixels_of
from .guides import (
    HARD,
    SOFT,
    SamplerGuidance,
    denoise_from,
    followed_tokens,
    gradient_memory,
    guide_vae,
    pixels_a_latent,
    preview_of,
    tell_stretch,
)
from .host import Managed
from .sockets import (
    CONNECT_LOGITS,
    CONNECT_VQ,
    CalibrationSocket,
    TokenLogitsSocket,
    VQVAESocket,
    expect,
    schema,
)

CONNECT_MODEL = "connect a diffusion model"
_STEPS = 8
#: Standard deviation of the noise under which agreement is measured a second time, for pixels in -1..1.
_NOISE = 0.1


class DistributionGuidance(io.ComfyNode):
    """MODEL -> MODEL whose predictions follow the tokens."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "DistributionGuidance",
            "Distribution Guidance",
            category="guidance",
            description=(
                "Makes your own diffusion model (FLUX, SDXL, SD 1.5) paint what Janus said, without a trained "
                "decoder: at each step, its predicted image is pulled towards Janus' distributions. Start from a "
                "Token Guide Latent, with its denoise. Works with ComfyUI's samplers, LoRA and ControlNet."
            ),
            search_aliases=["token guidance", "guide model", "dcdd", "janus flux", "no training", "分布引导"],
            inputs=[
                io.Model.Input("model", tooltip="Any model that paints images, with its LoRAs."),
                io.Vae.Input("vae", tooltip="The VAE of this model."),
                _logits(),
                _vq(),
                _strength(0.4),
                io.Float.Input(
                    "pull",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How close the first steps stay to Janus' own image. 0 leaves it to the start latent.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Where in the whole sampling schedule guidance begins. With a denoise of 0.6 a sampler starts "
                        "at 0.4 of it, so lower values change nothing."
                    ),
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where it ends. A little below 1 leaves the last details to the model.",
                ),
                io.Int.Input(
                    "every",
                    default=1,
                    min=1,
                    max=100,
                    tooltip="Guides every step (1), every second (2) and so on, to save time.",
                ),
                io.Combo.Input(
                    "weight",
                    options=list(WEIGHTS),
                    default=WEIGHTS[0],
                    tooltip="'confidence' follows Janus most where it was sure; 'uniform' everywhere alike.",
                ),
                _codes(),
                _calibration(),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "Follows the tokens only where this is white. When you repaint a part, connect the mask of the "
                        "latent here too."
                    ),
                ),
            ],
            outputs=[io.Model.Output("guided", display_name="model", tooltip="Connect to a sampler.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: comfy.sd.VAE,
        token_logits: TokenLogits,
        vq_vae: Managed[ImageTokenizer],
        strength: float,
        pull: float,
        start_percent: float,
        end_percent: float,
        every: int,
        weight: str,
        codes: str,
        calibration: Calibration | None = None,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        expect(model, comfy.model_patcher.ModelPatcher, "model", CONNECT_MODEL)
        check_finite(strength=strength, pull=pull, start_percent=start_percent, end_percent=end_percent)
        if start_percent > end_percent:
            raise ValueError(
                f"guidance starts at {start_percent:g} and ends at {end_percent:g}: start_percent must not be larger"
            )
        tokens = followed_tokens(token_logits, vq_vae, codes, calibration)
        guidance = SamplerGuidance(
            tokens=tokens,
            vae=guide_vae(vae),
            options=GuidanceOptions(strength=strength, pull=pull if strength else 0.0, every=every, weight=weight),
            percent=(start_percent, end_percent),
            mask=None if mask is None else mask_of(mask),
        )
        guided = model.clone()
        guidance.join(guided)
        return io.NodeOutput(guided)


class TokenGuideLatent(io.ComfyNode):
    """Janus' own image as the latent to start from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TokenGuideLatent",
            "Token Guide Latent",
            category="guidance",
            description=(
                "The latent that a guided model starts from: what Janus' VQ-VAE makes of the expected codes, at the "
                "size that you want to paint. Connect both outputs to a KSampler."
            ),
            search_aliases=["start latent", "init latent", "soft decode", "img2img", "引导潜空间"],
            inputs=[
                _logits(),
                _vq(),
                io.Vae.Input("vae", tooltip="The VAE of the model that will paint."),
                *(
                    io.Int.Input(
                        name,
                        default=0,
                        min=0,
                        max=4096,
                        step=8,
                        tooltip=f"{name.capitalize()} of the image in pixels; 0 for that of Janus' own image.",
                    )
                    for name in ("width", "height")
                ),
                io.Float.Input(
                    "start",
                    default=0.6,
                    min=0.05,
                    max=1.0,
                    step=0.05,
                    tooltip=(
                        "How much noise the model starts from: its share, 0 to 1. Less stays closer to Janus' image, "
                        "more leaves the model more freedom; 0.6 is a good start."
                    ),
                ),
                _codes(),
                _calibration(),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip=(
                        "The model that will paint, so that denoise fits its own schedule: FLUX reaches this noise at "
                        "a lower denoise than others. Without it, denoise is start itself."
                    ),
                ),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="latent", tooltip="Connect to latent_image of a KSampler."),
                io.Float.Output("denoise", display_name="denoise", tooltip="Connect to denoise of a KSampler."),
                io.Image.Output("soft", display_name="image", tooltip="The same as an image."),
            ],
        )

    @classmethod
    def execute(
        cls,
        token_logits: TokenLogits,
        vq_vae: Managed[ImageTokenizer],
        vae: comfy.sd.VAE,
        width: int,
        height: int,
        start: float,
        codes: str,
        calibration: Calibration | None = None,
        model: Any = None,
    ) -> io.NodeOutput:
        check_finite(start=start)
        if model is not None:
            expect(model, comfy.model_patcher.ModelPatcher, "model", CONNECT_MODEL)
        tokens = followed_tokens(token_logits, vq_vae, codes, calibration)
        factor = pixels_a_latent(vae)
        own = tuple(side * vq_vae.idle.factor for side in tokens.condition.grid)
        size = (height or own[0], width or own[1])
        fits = _fitting(size, factor)
        tell_stretch(fits, own)
        image = image_of(stretched(tokens.soft, fits))
        denoise = start if model is None else denoise_from(model.get_model_object("model_sampling"), start)
        return io.NodeOutput({"samples": vae.encode(image).float()}, denoise, image)


class SharpenToTokens(io.ComfyNode):
    """Follows the loss alone, without a diffusion model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "SharpenToTokens",
            "Sharpen to Tokens",
            category="guidance",
            description=(
                "Janus' own image, moved until its encoder reads in it what Janus predicted: sharper than VQ-VAE "
                "Decode, and without a diffusion model. Also for an image of your own, by VQ-VAE Encode and Logit "
                "Calibrator."
            ),
            search_aliases=["refine", "enhance", "sharpen", "no diffusion", "锐化"],
            inputs=[
                _logits(),
                _vq(),
                io.Vae.Input("vae", tooltip="Any VAE of images, such as FLUX's or SDXL's; the image is moved in it."),
                io.Int.Input(
                    "steps",
                    default=_STEPS,
                    min=1,
                    max=100,
                    tooltip="Steps of the gradient. On pico, 24 were hardly better than 8.",
                ),
                _strength(0.1),
                _codes(),
                _calibration(),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The sharpened image."),
                io.Latent.Output("latent", display_name="latent", tooltip="Its latent, for a sampler."),
            ],
        )

    @classmethod
    def execute(
        cls,
        token_logits: TokenLogits,
        vq_vae: Managed[ImageTokenizer],
        vae: comfy.sd.VAE,
        steps: int,
        strength: float,
        codes: str,
        calibration: Calibration | None = None,
    ) -> io.NodeOutput:
        check_finite(strength=strength)
        tokens = followed_tokens(token_logits, vq_vae, codes, calibration)
        codec, count = guide_vae(vae), len(tokens.condition.code_vectors)
        progress = host.NodeProgress(steps * count)
        comfy_host = host.ComfyHost(codec.network, tokens.tokenizer)
        own = (tokens.soft.shape[2], tokens.soft.shape[3])
        size = _fitting(own, codec.factor)

        def run(k: int) -> torch.Tensor:
            comfy_host.bring(gradient_memory(size, codec.network, codec.factor, own))
            unit = codec.of_unit_spread(stretched(tokens.soft[k : k + 1], size))
            guide = tokens.guide(k, unit, size, GuidanceOptions(strength=strength))

            def show(done: int, _: int, z: torch.Tensor) -> None:
                progress.step(k * steps + done, count * steps, preview_of(guide, z))

            return unit.denormalize(sharpen(guide, guide.soft, steps=steps, on_step=show)).cpu()

        with host.noticed():
            latents = torch.cat(list(one_by_one(run, count, comfy_host)))
        return io.NodeOutput(vae.decode(latents), {"samples": latents})


class TokenAgreement(io.ComfyNode):
    """How many of the tokens the encoder finds in an image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TokenAgreement",
            "Token Agreement",
            category="guidance",
            description=(
                "Reads an image with Janus' own encoder and says in how many places it finds the tokens, and again "
                "under a little noise. Compare with a VQ-VAE Decode: if more strength lowers the first number a lot, "
                "it was too strong; if the second falls much further behind, the encoder was fooled."
            ),
            search_aliases=["check", "faithful", "agreement", "over-cooked", "一致"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="A painted image, of any size."),
                _logits(),
                _vq(),
            ],
            outputs=[
                io.Float.Output("agreement", display_name="agreement", tooltip="Share of the tokens, 0 to 1."),
                io.Float.Output("noisy", display_name="under noise", tooltip="The same under a little noise."),
                io.Mask.Output("differs", display_name="differs", tooltip="White where another token is read."),
            ],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, token_logits: TokenLogits, vq_vae: Managed[ImageTokenizer]) -> io.NodeOutput:
        expect(token_logits, TokenLogits, "token_logits", CONNECT_LOGITS)
        expect(vq_vae, Managed, "vq_vae", CONNECT_VQ)
        tokenizer = vq_vae.idle
        checks.check_tokenizer(token_logits, tokenizer)
        pixels, (h, w) = pixels_of(image), token_logits.grid
        if len(pixels) != len(token_logits.tokens):
            raise ValueError(
                f"image is a batch of {len(pixels)}, token_logits one of {len(token_logits.tokens)}: connect the "
                "images that were painted from these tokens"
            )
        small = at_grid(tokenizer, pixels, (h, w))
        noise = _NOISE * torch.randn(small.shape, generator=torch.Generator().manual_seed(0)).to(small)
        comfy_host = host.ComfyHost(vq_vae, convolutional=True)
        progress = host.NodeProgress(len(pixels))

        def run(k: int) -> torch.Tensor:
            comfy_host.bring(2 * tokenizer.working_memory(token_logits.grid))
            with torch.no_grad():
                both = torch.cat([small[k : k + 1], small[k : k + 1] + noise[k : k + 1]])
                found = tokenizer.tokens(tokenizer.features(both)).cpu() == token_logits.tokens[k].cpu()
            progress.step(k + 1, len(pixels))
            return found[None]

        found = torch.cat(list(one_by_one(run, len(pixels), comfy_host)))
        clean, noisy = (float(each) for each in found.float().mean((0, 2)))
        host.tell(f"{clean:.0%} of the tokens are read in the image, {noisy:.0%} under noise")
        differs = rearrange((~found[:, 0]).float(), "b (h w) -> b 1 h w", h=h)
        differs = F.interpolate(differs, pixels.shape[2:], mode="nearest")[:, 0]
        return io.NodeOutput(clean, noisy, differs.to(comfy.model_management.intermediate_device()))


NODES = [DistributionGuidance, TokenGuideLatent, SharpenToTokens, TokenAgreement]


def _fitting(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """The size nearest to (H, W) of which a VAE makes latents; says on the node if it is another one."""
    height, width = (max(factor, round(side / factor) * factor) for side in size)
    if (height, width) != size:
        host.notice(f"this VAE takes sides of multiples of {factor} pixels: the latent is of {in_words(height, width)}")
    return height, width


# --- inputs -----------------------------------------------------------------------------------------------------------


def _logits() -> io.Input:
    return TokenLogitsSocket.Input(
        "token_logits", tooltip="From a Janus Logit Sampler, or of an image from a Logit Calibrator."
    )


def _vq() -> io.Input:
    return VQVAESocket.Input("vq_vae", tooltip="The tokenizer that these logits belong to.")


def _strength(default: float) -> io.Input:
    return io.Float.Input(
        "strength",
        default=default,
        min=0.0,
        max=MOST_STRENGTH,
        step=0.05,
        tooltip=(
            "How far each step moves the image towards the tokens. 0 is off; CFG++ and LCM samplers need less. Too "
            "much looks over-cooked: hard edges, blotches on plain grounds."
        ),
    )


def _codes() -> io.Input:
    return io.Combo.Input(
        "codes",
        options=[SOFT, HARD],
        default=SOFT,
        tooltip="Whether to follow all that Janus thought possible at each position, or the sampled tokens alone.",
    )


def _calibration() -> io.Input:
    return CalibrationSocket.Input(
        "calibration",
        optional=True,
        tooltip=(
            "Optional. Needed for an image that was encoded and not calibrated; sampled tokens do without, and the "
            "sharpness of the encoder is then fitted to Janus' confidence."
        ),
    )
