"""Image tokens with their logits: sampled from a prompt, or encoded from an image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from einops import repeat

from ..dcdd_core.evaluation.stage_sheet import nearest_known, stage_sheet
from ..dcdd_core.method.progressive import ORDERS, Staged
from ..dcdd_core.method.uncertainty import tokens_under_mask
from ..dcdd_core.pipelines.encode import encode, fitting_size
from ..dcdd_core.pipelines.oom import one_by_one
from ..dcdd_core.pipelines.progressive import StagedSampler, changed_plan, sample_stages, staged_sampler
from ..dcdd_core.pipelines.sample import edit_prompts, partial_tokens, sample
from ..dcdd_core.protocols import ImageTokenizer, Progress, SamplingOptions, TokenSampler
from ..dcdd_core.settings import require_number
from ..dcdd_core.types import TokenLogits
from . import checks, host
from .convert import check_finite, from_pil, image_of, mask_of, pixels_of, resized
from .host import Managed
from .load import PICO_PROGRESSIVE
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

#: The combo value that leaves the order to the model.
OWN_ORDER = "the model's own"
#: The most passes of the Progressive Token Sampler: each of them is a tile of its contact sheet.
MOST_PASSES = 100
#: The most parallel tokens of the Janus Logit Sampler: more than an image of Janus has.
MOST_PARALLEL = 1024
#: The most images of a batch in a preview, and the most for which a sheet of their passes is made.
MOST_SHOWN = 4


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
                *_inputs(),
                # Last and optional, so that graphs saved without it still work.
                io.Int.Input(
                    "parallel_tokens",
                    optional=True,
                    default=0,
                    min=0,
                    max=MOST_PARALLEL,
                    tooltip=(
                        "For speed: how many tokens the model guesses ahead at a time. 0 is automatic (several on a "
                        "CPU in float32, otherwise one), 1 is off: one token after the other. Wrong guesses are "
                        "thrown away, so in float32 the image stays the same. In bfloat16 and float16 a change of "
                        "this number gives another image for the same seed, neither better nor worse."
                    ),
                ),
            ],
            outputs=[_sampled()],
        )

    @classmethod
    def execute(
        cls,
        janus: JanusModel,
        token_logits: TokenLogits | None = None,
        mask: torch.Tensor | None = None,
        parallel_tokens: int = 0,
        **drawn,
    ) -> io.NodeOutput:
        request = _requested(janus, token_logits, mask, **drawn)
        sampler, previewing = janus.sampler.idle, host.shows_previews()
        report = _Report(janus, math.prod(sampler.grid), len(request.prompts), token_logits, previewing)
        with host.noticed():
            sampled = sample(
                sampler,
                request.prompts,
                seeds=request.seeds,
                options=request.options,
                previous=token_logits,
                resample=request.resample,
                on_progress=report,
                parallel=_parallel(parallel_tokens, sampler),
                host=_host(janus, previewing),
            )
            report.tell_passes(request)
        return io.NodeOutput(sampled)


class ProgressiveTokenSampler(io.ComfyNode):
    """Prompt -> tokens with all their logits, many of them in each of a few passes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "ProgressiveTokenSampler",
            "Progressive Token Sampler",
            category="tokens",
            description=(
                "Samples an image from a prompt in a few passes, from coarse to fine: each pass reveals many tokens "
                "at once and draws earlier ones again, which corrects mistakes. It needs a masked sampler, such as "
                "'pico progressive (built in)' in Load Janus. To inpaint, connect token_logits and a mask: only tokens "
                "under the mask are sampled again, and the model sees the image on all sides of them. For image to "
                "image, connect token_logits and set start."
            ),
            search_aliases=[
                "masked sampler",
                "parallel sampler",
                "maskgit",
                "coarse to fine",
                "token inpainting",
                "revision",
                "渐进",
            ],
            inputs=_inputs(
                io.Int.Input(
                    "passes",
                    default=0,
                    min=0,
                    max=MOST_PASSES,
                    tooltip=(
                        "How often the model runs; 0 uses its own number (pico progressive: 11). More passes take "
                        "longer and decide fewer tokens at a time."
                    ),
                ),
                io.Int.Input(
                    "revision_passes",
                    default=-1,
                    min=-1,
                    max=MOST_PASSES - 1,
                    tooltip=(
                        "How many of the passes are kept for the end, where nothing new is revealed and tokens are "
                        "only corrected. -1 uses the model's own share of the passes."
                    ),
                ),
                io.Combo.Input(
                    "order",
                    options=[OWN_ORDER, *ORDERS],
                    default=OWN_ORDER,
                    tooltip=(
                        "Which tokens are revealed first. 'quantisation-error': those that the codebook represents "
                        "best. 'importance': those that help the others most. 'confidence': those that the model is "
                        "most certain of. 'halton': evenly spread. 'random' and 'raster' (row by row): to compare. Not "
                        "every model can give the first two."
                    ),
                ),
                io.Int.Input(
                    "spread",
                    default=-1,
                    min=-1,
                    max=64,
                    tooltip=(
                        "How many rows or columns of tokens lie between two that are revealed in the same pass, where "
                        "there is room. 0 lets them be neighbours. -1 uses the model's own."
                    ),
                ),
                io.Int.Input(
                    "revise",
                    default=-1,
                    min=-1,
                    max=65536,
                    tooltip=(
                        "How many of the tokens that are there already each pass draws again, the newest first. 0 "
                        "never changes a token; the number of tokens in the image (pico: 144) draws all again. -1 uses "
                        "the model's own."
                    ),
                ),
                io.Int.Input(
                    "start",
                    default=0,
                    min=0,
                    max=MOST_PASSES - 1,
                    tooltip=(
                        "Image to image: in this many passes at the beginning, tokens are taken from token_logits "
                        "instead of being drawn. Higher stays closer to that image; 0 draws everything. It has to be "
                        "less than the number of passes."
                    ),
                ),
            ),
            outputs=[
                _sampled(),
                io.Image.Output(
                    "stages",
                    display_name="stages",
                    tooltip=(
                        "A contact sheet for each of the first four images: every pass from left to right, 12 to a "
                        "row, with new tokens in green and rewritten ones in orange."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        janus: JanusModel,
        passes: int,
        revision_passes: int,
        order: str,
        spread: int,
        revise: int,
        start: int,
        token_logits: TokenLogits | None = None,
        mask: torch.Tensor | None = None,
        **drawn,
    ) -> io.NodeOutput:
        request = _requested(janus, token_logits, mask, start=start, **drawn)
        sampler = staged_sampler(
            janus.sampler.idle,
            remedy=(
                "connect it to a Janus Logit Sampler, or choose a masked sampler in Load Janus, such as "
                f"'{PICO_PROGRESSIVE}'"
            ),
        )
        if start and token_logits is None:
            raise ValueError(
                f"start is {start}, but there are no tokens to start from: connect token_logits, or set start to 0"
            )
        own = sampler.sampling.revise
        if revision_passes > 0 and (own if revise < 0 else revise) == 0:
            whose = "revise is 0" if revise == 0 else f"revise is {revise}, since this model's own is 0"
            raise ValueError(
                f"{revision_passes} revision_passes have nothing to draw again where {whose}: set revision_passes to "
                f"0, or revise to {'more than 0' if own == 0 else '-1 or more than 0'}"
            )
        plan = changed_plan(
            sampler.sampling,
            request.options,
            passes=passes or None,
            revision_passes=None if revision_passes < 0 else revision_passes,
            order=None if order == OWN_ORDER else order,
            spread=None if spread < 0 else spread,
            revise=None if revise < 0 else revise,
            start=start,
        )
        previewing = host.shows_previews()
        report = _Report(janus, plan.passes, len(request.prompts), token_logits, previewing)
        with host.noticed():
            staged = sample_stages(
                sampler,
                request.prompts,
                seeds=request.seeds,
                options=plan,
                previous=token_logits,
                resample=request.resample,
                on_progress=report,
                host=_host(janus, previewing),
            )
            report.tell_passes(request)
        # Without a pass there is nothing to show; the node has said why.
        sheets = _sheets(janus, staged, request.prompts) if staged.stages else ExecutionBlocker(None)
        return io.NodeOutput(staged.token_logits, sheets)


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
            host=host.ComfyHost(vq_vae, convolutional=True, smaller="set longest_side to -1 or a smaller number"),
        )
        return io.NodeOutput(encoded, image_of(pixels))


NODES = [JanusLogitSampler, ProgressiveTokenSampler, VQVAEEncode]


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What either sampler is asked to do.

    Attributes:
        prompts, seeds: one of each per image.
        resample: bool [B, N], tokens that an edit samples again; None for new images.
    """

    prompts: list[str]
    seeds: list[int]
    options: SamplingOptions
    resample: torch.Tensor | None


def _requested(
    janus: JanusModel,
    token_logits: TokenLogits | None,
    mask: torch.Tensor | None,
    *,
    prompt: str,
    seed: int,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    batch_size: int,
    prompt_per_line: bool,
    start: int | None = None,
) -> _Request:
    """
    Args:
        start: that of the Progressive Token Sampler; from 1 on, token_logits without a mask are allowed: a whole image
            to start from.

    Raises:
        ValueError: if the inputs do not fit together, in the terms of the node.
    """
    expect(janus, JanusModel, "janus", "connect the janus output of Load Janus")
    check_finite(guidance=guidance, temperature=temperature, top_p=top_p)
    if (token_logits is None) != (mask is None) and not (start and mask is None):
        instead = "" if start is None else "; to start from all of token_logits, set start to 1 or more"
        raise ValueError(
            f"an edit needs token_logits and a mask: connect both, or neither to sample a new image{instead}"
        )
    sampler = janus.sampler.idle
    lines = [line for line in prompt.splitlines() if line.strip()] if prompt_per_line else [prompt]
    resample = None
    if token_logits is None:
        prompts = [line for line in lines or [""] for _ in range(batch_size)]
    else:
        expect(token_logits, TokenLogits, "token_logits", CONNECT_LOGITS)
        checks.check_edit(token_logits, sampler, janus.vq.idle)
        prompts = edit_prompts(lines, len(token_logits.tokens))
        whole = torch.ones(token_logits.tokens.shape, dtype=torch.bool)
        resample = whole if mask is None else _under_mask(mask, token_logits)
    if unknown := _unknown_words(sampler, "\n".join(lines)):
        host.notice(unknown)
    options = SamplingOptions(
        guidance=sampler.default_guidance if guidance < 0 else guidance,
        temperature=temperature,
        top_k=_own_top_k(sampler) if top_k < 0 else top_k,
        top_p=top_p if top_p < 1 else None,
    )
    seeds = [seed + k for k in range(len(prompts))]
    return _Request(prompts=prompts, seeds=seeds, options=options, resample=resample)


def _inputs(*own: io.Input) -> list[io.Input]:
    """The inputs of both samplers; `own`, which only one of them has, come after the prompt."""
    return [
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
        *own,
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**63 - 1,
            control_after_generate=True,
            tooltip=(
                "Seed of the first image; each further image of the batch adds 1. An image is the same in a batch "
                "and alone, but for rounding: in half precision that can change a token, and so the picture."
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
                "Janus-Pro, 7.5 for LlamaGen, 3 for pico, 1.5 for pico llamagen. 1 turns guidance off and takes half "
                "the time."
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
            default=-1,
            min=-1,
            max=65536,
            tooltip=(
                "Samples only from the k most likely tokens; 0 means all. -1 uses the model's own: 1000 for the "
                "published LlamaGen, all for the others. The logits that are kept are always complete."
            ),
        ),
        io.Float.Input(
            "top_p",
            default=1.0,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip=(
                "Samples only from the most likely tokens whose probabilities add up to this value. 1 uses the model's "
                "own: 0.8 for BIGFix, all tokens for the others."
            ),
        ),
        io.Int.Input(
            "batch_size",
            default=1,
            min=1,
            max=256,
            tooltip="Number of images. In an edit, the batch size of the connected token_logits is used instead.",
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
                "For an edit: the tokens of an image; those outside the mask are kept. From a sampler, or from an "
                "image of your own through VQ-VAE Encode and Logit Calibrator."
            ),
        ),
        io.Mask.Input("mask", optional=True, tooltip="For an edit: white where tokens are sampled again."),
    ]


def _sampled() -> io.Output:
    return TokenLogitsSocket.Output(
        "sampled",
        display_name="token_logits",
        tooltip="Tokens with their distributions. Connect to LCDM Encoder, VQ-VAE Decode or Logit Statistics.",
    )


def _own_top_k(sampler: TokenSampler) -> int | None:
    """The model's own top_k for `SamplingOptions`; for a sampler that draws token by token, None already means that."""
    return sampler.sampling.top_k if isinstance(sampler, StagedSampler) else None


def _parallel(tokens: int, sampler: TokenSampler) -> int | None:
    """The widget's number as `pipelines.sample` takes it; 0 becomes None.

    Raises:
        ValueError: for a number out of range, and for one that is not 0 with a sampler in passes.
    """
    require_number(
        "parallel_tokens", tokens, whole=True, least=0, most=MOST_PARALLEL, remedy="0 is automatic, 1 is off"
    )
    if tokens and isinstance(sampler, StagedSampler):
        raise ValueError(
            f"parallel_tokens is {tokens}, but {sampler.name or 'this model'} is a masked sampler, which draws many "
            "tokens in each pass anyway: set it to 0; a Progressive Token Sampler lets you choose the passes"
        )
    return tokens or None


class _Report:
    """Moves the node's bar, with a preview whenever at least another row of tokens is done; at the end it shows on the
    node how many passes the model took."""

    def __init__(self, janus: JanusModel, total: int, batch: int, token_logits: TokenLogits | None, previewing: bool):
        self._tokenizer, self._grid, self._batch = janus.vq.idle, janus.sampler.idle.grid, batch
        self._previous, self._previewing = token_logits, previewing
        self._bar = host.NodeProgress(total)
        self._shown = 0
        self._passes: dict[int, int] = {}  # by the first image of each part, if the batch was split

    def __call__(self, now: Progress) -> None:
        rows = now.done * self._grid[0] // now.total
        wanted = self._previewing and rows > self._shown
        self._shown = rows  # less than before where a part of the batch begins
        self._passes[now.first] = now.passes
        place = {"first": now.first, "count": len(now.tokens), "batch": self._batch}
        self._bar.step(
            *host.over_batch(now.done, now.total, **place),
            _so_far(self._tokenizer, self._grid, now, self._previous) if wanted else None,
        )

    def tell_passes(self, request: _Request) -> None:
        """Shows the number of passes on the node; nothing if there were none, or none were reported."""
        passes = sum(self._passes.values())
        if passes == 0:
            return
        drawn = [math.prod(self._grid)] if request.resample is None else request.resample.sum(dim=1).tolist()
        count = f"{max(drawn)} tokens" if min(drawn) == max(drawn) else f"{min(drawn)} to {max(drawn)} tokens"
        images = f" for each of {len(request.prompts)} images" if len(request.prompts) > 1 else ""
        host.tell(f"{count}{images} in {passes} {'pass' if passes == 1 else 'passes'}")


def _host(janus: JanusModel, previewing: bool) -> host.ComfyHost:
    """The sampler, together with the tokenizer if that draws previews."""
    smaller = "choose a smaller model in Load Janus"  # the size of the images is the model's own
    if not previewing:
        return host.ComfyHost(janus.sampler, smaller=smaller)
    tokenizer = janus.vq.idle
    memory = tokenizer.working_memory(janus.sampler.idle.grid)
    return host.ComfyHost(janus.vq, janus.sampler, besides=host.convolution_memory(memory), smaller=smaller)


def _under_mask(mask: torch.Tensor, token_logits: TokenLogits) -> torch.Tensor:
    """MASK -> bool [B, N], True for each token that is at least partly under the mask."""
    batch = len(token_logits.tokens)
    area = tokens_under_mask(mask_of(mask), token_logits.grid)
    if len(area) not in (1, batch):
        raise ValueError(f"got {len(area)} masks for {batch} images: connect one mask, or one for each image")
    if not bool(area.any()):
        host.notice("the mask is empty: all tokens are kept")
    return area.expand(batch, -1).cpu()


def _unknown_words(sampler: TokenSampler, prompt: str) -> str:
    """A sentence about the words that mean nothing to the sampler; "" if there are none."""
    unknown, known = sampler.unknown_words(prompt), sampler.known_words()
    if not unknown:
        return ""
    return f"{sampler.name} does not know {', '.join(unknown)}." + (f" It knows: {', '.join(known)}" if known else "")


def _so_far(
    tokenizer: ImageTokenizer, grid: tuple[int, int], now: Progress, previous: TokenLogits | None
) -> torch.Tensor:
    """Up to four images while they are sampled: tokens that are not known yet are dark, or in an edit as before."""
    tokens, known = now.tokens[:MOST_SHOWN].cpu(), now.known[:MOST_SHOWN].cpu()
    if previous is None:
        tokens = torch.stack([nearest_known(*one, grid) for one in zip(tokens, known)])
    else:
        tokens = partial_tokens(tokens, known, previous.part(now.first, now.first + len(tokens)))
    pixels = torch.cat([tokenizer.decode_tokens(one, grid) for one in tokens.split(1)])
    if previous is None:
        side = tokenizer.factor
        shown = repeat(known, "b (h w) -> b 1 (h f) (w g)", h=grid[0], f=side, g=side)
        pixels = torch.where(shown.to(pixels.device), pixels, -0.8)
    return pixels


def _sheets(janus: JanusModel, staged: Staged, prompts: list[str]) -> torch.Tensor:
    """The passes of up to four images as an IMAGE, a contact sheet for each."""
    tokenizer, grid = janus.vq.idle, staged.token_logits.grid
    alone, memory = host.ComfyHost(janus.vq, convolutional=True), tokenizer.working_memory(grid)

    def decode(tokens: torch.Tensor) -> torch.Tensor:
        def one(k: int) -> torch.Tensor:
            alone.bring(memory)
            return tokenizer.decode_tokens(tokens[k : k + 1], grid).cpu()

        return torch.cat(list(one_by_one(one, len(tokens), alone)))

    shown = enumerate(prompts[:MOST_SHOWN])
    sheets = [stage_sheet(staged.stages, decode, grid, row=row, title=text) for row, text in shown]
    return torch.cat([from_pil(sheet) for sheet in sheets])
