"""Image tokens with their logits: sampled from a prompt, or encoded from an image."""

from __future__ import annotations

import math

import torch
from comfy_api.latest import io
from einops import repeat

from ..dcdd_core.method.uncertainty import tokens_under_mask
from ..dcdd_core.pipelines.encode import encode, fitting_size
from ..dcdd_core.pipelines.sample import edit_prompts, partial_tokens, sample
from ..dcdd_core.protocols import ImageTokenizer, Progress, SamplingOptions, TokenSampler
from ..dcdd_core.types import TokenLogits
from . import checks, host
from .convert import check_finite, image_of, mask_of, pixels_of, resized
from .host import Managed
from .sockets import (
    CONNECT_LOGITS,
    CONNECT_VQ,
    JanusModel,
    JanusModelSocket,
    TokenLogitsSocket,
    VQVAESocket,
    expect,
    schema,
)


class JanusLogitSampler(io.ComfyNode):
    """Prompt -> tokens with all their logits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "JanusLogitSampler",
            "Janus Logit Sampler",
            category="tokens",
            description=(
                "Samples an image from a prompt, token by token. At every position it keeps the whole distribution "
                "over the codebook, not only the sampled token; the decoder works from these distributions. To "
                "edit an image, connect its token_logits and a mask: only tokens under the mask are sampled again."
            ),
            search_aliases=[
                "text to image",
                "generate",
                "janus sampler",
                "autoregressive sampler",
                "edit tokens",
                "自回归",
            ],
            inputs=[
                JanusModelSocket.Input("janus", tooltip="From Load Janus."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="a large striped red heart in the centre on a wavy sky ground",
                    tooltip=(
                        "What the image should show. pico knows only the words of its own small world; the "
                        "node lists the words that it does not know."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=True,
                    tooltip=(
                        "Seed of the first image; each further image of the batch adds 1. An image comes out "
                        "the same in a batch and alone."
                    ),
                ),
                io.Float.Input(
                    "guidance",
                    default=-1.0,
                    min=-1.0,
                    max=20.0,
                    step=0.1,
                    tooltip=(
                        "How closely the prompt is followed (classifier-free guidance). -1 uses the model's own: 5 for "
                        "Janus-Pro, 3 for pico, the built-in model. 1 turns guidance off and takes half the time."
                    ),
                ),
                io.Float.Input(
                    "temperature",
                    default=1.0,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="Below 1, sampling is safer; above 1, more varied. 0 always takes the most likely token.",
                ),
                io.Int.Input(
                    "top_k",
                    default=0,
                    min=0,
                    max=65536,
                    tooltip=(
                        "Samples only from the k most likely tokens; 0 means all. The logits that are kept are "
                        "always complete."
                    ),
                ),
                io.Float.Input(
                    "top_p",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Samples only from the most likely tokens whose probabilities add up to this value; 1 "
                        "means all."
                    ),
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=256,
                    tooltip=(
                        "Number of images. In an edit, the batch size of the connected token_logits is used instead."
                    ),
                ),
                io.Boolean.Input(
                    "prompt_per_line",
                    default=False,
                    tooltip="Treats each line of the prompt as a prompt of its own, with batch_size images for each.",
                ),
                TokenLogitsSocket.Input(
                    "token_logits",
                    optional=True,
                    tooltip=(
                        "For an edit: the tokens to keep outside the mask, from this sampler, or from an image of "
                        "your own through VQ-VAE Encode and Logit Calibrator."
                    ),
                ),
                io.Mask.Input("mask", optional=True, tooltip="For an edit: white where tokens are sampled again."),
            ],
            outputs=[
                TokenLogitsSocket.Output(
                    "sampled",
                    display_name="token_logits",
                    tooltip=(
                        "Tokens with their distributions. Connect to LCDM Encoder, VQ-VAE Decode or Logit Statistics."
                    ),
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        janus: JanusModel,
        prompt: str,
        seed: int,
        guidance: float,
        temperature: float,
        top_k: int,
        top_p: float,
        batch_size: int,
        prompt_per_line: bool,
        token_logits: TokenLogits | None = None,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        expect(janus, JanusModel, "janus", "connect the janus output of Load Janus")
        check_finite(guidance=guidance, temperature=temperature, top_p=top_p)
        if (token_logits is None) != (mask is None):
            raise ValueError("an edit needs token_logits and a mask: connect both, or neither to sample a new image")
        sampler, tokenizer = janus.sampler.idle, janus.vq.idle
        lines = [line for line in prompt.splitlines() if line.strip()] if prompt_per_line else [prompt]
        resample = None
        if token_logits is None:
            prompts = [line for line in lines or [""] for _ in range(batch_size)]
        else:
            expect(token_logits, TokenLogits, "token_logits", CONNECT_LOGITS)
            checks.check_edit(token_logits, sampler, tokenizer)
            prompts = edit_prompts(lines, len(token_logits.tokens))
            resample = _under_mask(mask, token_logits)
        _name_unknown_words(sampler, "\n".join(lines))
        progress, previewing = host.NodeProgress(math.prod(sampler.grid)), host.shows_previews()

        def on_progress(now: Progress) -> None:
            # A preview for each row of tokens, or for each step that is worth more than a row.
            rows, before = (done * sampler.grid[0] // now.total for done in (now.done, now.done - 1))
            preview = _so_far(tokenizer, sampler.grid, now, token_logits) if previewing and rows > before else None
            progress.step(now.done, now.total, preview)

        with host.noticed():
            sampled = sample(
                sampler,
                prompts,
                seeds=[seed + k for k in range(len(prompts))],
                options=SamplingOptions(
                    guidance=sampler.default_guidance if guidance < 0 else guidance,
                    temperature=temperature,
                    top_k=top_k or None,
                    top_p=top_p if top_p < 1 else None,
                ),
                previous=token_logits,
                resample=resample,
                on_progress=on_progress,
                host=_host(janus, previewing),
            )
        return io.NodeOutput(sampled)


class VQVAEEncode(io.ComfyNode):
    """Image -> tokens with proxy logits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "VQVAEEncode",
            "VQ-VAE Encode",
            category="tokens",
            description=(
                "Turns an image into tokens with proxy logits: how close each patch is to every code of the "
                "codebook. Start here to reconstruct an image, or to edit an image of your own. If a side is not a "
                "multiple of the token size, the image is resized and cropped at the centre."
            ),
            search_aliases=["image to tokens", "tokenize", "reconstruct", "vqgan encode", "令牌"],
            inputs=[
                VQVAESocket.Input("vq_vae", tooltip="From Load Janus or Load VQ-VAE."),
                io.Image.Input("image", tooltip="The image, or batch of images, to encode."),
                io.Int.Input(
                    "longest_side",
                    default=-1,
                    min=-1,
                    max=4096,
                    tooltip=(
                        "Shrinks larger images until the longer side has this many pixels. -1 uses the size of the "
                        "tokenizer's own images (Janus: 384, pico: 96), near which decoders work best; 0 keeps the "
                        "size."
                    ),
                ),
            ],
            outputs=[
                TokenLogitsSocket.Output(
                    "token_logits", display_name="token_logits", tooltip="Tokens with uncalibrated proxy logits."
                ),
                io.Image.Output(
                    "resized", display_name="image", tooltip="The image as it was encoded, after resizing and cropping."
                ),
            ],
        )

    @classmethod
    def execute(cls, vq_vae: Managed[ImageTokenizer], image: torch.Tensor, longest_side: int) -> io.NodeOutput:
        expect(vq_vae, Managed, "vq_vae", CONNECT_VQ)
        tokenizer, pixels = vq_vae.idle, pixels_of(image)
        height, width = pixels.shape[2:]
        longest = max(tokenizer.grid) * tokenizer.factor if longest_side < 0 else longest_side
        size = fitting_size((height, width), tokenizer.factor, longest or None)
        pixels = resized(pixels, *size).clamp(-1, 1)
        progress = host.NodeProgress(len(pixels))
        encoded = encode(
            tokenizer,
            pixels,
            on_image=lambda done, last: progress.step(done, len(pixels), last),
            host=host.ComfyHost(vq_vae, convolutional=True),
        )
        return io.NodeOutput(encoded, image_of(pixels))


NODES = [JanusLogitSampler, VQVAEEncode]


def _host(janus: JanusModel, previewing: bool) -> host.ComfyHost:
    """The sampler, together with the tokenizer if that draws previews."""
    if not previewing:
        return host.ComfyHost(janus.sampler)
    tokenizer = janus.vq.idle
    memory = tokenizer.working_memory(janus.sampler.idle.grid)
    return host.ComfyHost(janus.vq, janus.sampler, besides=host.convolution_memory(memory))


def _under_mask(mask: torch.Tensor, token_logits: TokenLogits) -> torch.Tensor:
    """MASK -> bool [B, N], True for each token of which at least a part is under the mask."""
    batch = len(token_logits.tokens)
    area = tokens_under_mask(mask_of(mask), token_logits.grid)
    if len(area) not in (1, batch):
        raise ValueError(f"got {len(area)} masks for {batch} images: connect one mask, or one for each image")
    if not bool(area.any()):
        host.notice("the mask is empty: all tokens are kept")
    return area.expand(batch, -1).cpu()


def _name_unknown_words(sampler: TokenSampler, prompt: str) -> None:
    unknown, known = sampler.unknown_words(prompt), sampler.known_words()
    if unknown:
        instead = f" It knows: {', '.join(known)}" if known else ""
        host.notice(f"{sampler.name} does not know {', '.join(unknown)}.{instead}")


def _so_far(
    tokenizer: ImageTokenizer, grid: tuple[int, int], now: Progress, previous: TokenLogits | None
) -> torch.Tensor:
    """Up to four images while they are sampled: tokens that are not known yet are dark, or in an edit as before."""
    before = None if previous is None else previous.part(now.first, now.first + len(now.tokens))
    tokens = partial_tokens(now.tokens, now.known, before)[:4]
    pixels = torch.cat([tokenizer.decode_tokens(one, grid) for one in tokens.split(1)])
    if previous is None:
        side = tokenizer.factor
        shown = repeat(now.known[:4], "b (h w) -> b 1 (h f) (w g)", h=grid[0], f=side, g=side)
        pixels = torch.where(shown.to(pixels.device), pixels, -0.8)
    return pixels
