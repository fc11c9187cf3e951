"""Tokens and their logits: sampled by Janus, encoded from a picture, calibrated; calibrations in files."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from comfy_api.latest import io

from ..dcdd_core.method.calibration import (
    PASSES,
    anchor_statistics,
    apply_calibration,
    fit_anchor,
    fit_calibration,
    proxy_features,
    target_statistics,
)
from ..dcdd_core.models.janus.sampler import JanusSampler
from ..dcdd_core.models.vq import VQTokenizer
from ..dcdd_core.types import Calibration, TokenLogits
from . import host
from .host import Managed, Progress
from .sockets import (
    CalibrationSocket,
    Decoder,
    DecoderSocket,
    JanusModel,
    JanusModelSocket,
    TokenLogitsSocket,
    VQVAESocket,
    expect,
    schema,
)

CONNECT_LOGITS = "connect the token_logits of a Janus Logit Sampler or a VQ-VAE Encode"
CONNECT_VQ = "connect the vq_vae of a Load Janus or Load VQ-VAE"


class JanusLogitSampler(io.ComfyNode):
    """Prompt -> tokens with all their logits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "JanusLogitSampler",
            "Janus Logit Sampler",
            category="tokens",
            description=(
                "Janus paints a prompt token by token. Kept is not only the token it picked at every position but its "
                "whole distribution over the codebook, from which the decoder paints. To edit, connect the "
                "token_logits of an earlier picture and a mask: only tokens under the mask are sampled anew."
            ),
            search_aliases=["text to image", "generate", "janus sampler", "autoregressive sampler", "edit tokens"],
            inputs=[
                JanusModelSocket.Input("janus", tooltip="From Load Janus."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="a large striped red heart in the centre on a wavy sky ground",
                    tooltip="What to paint. pico knows the words of its own small world, and names the others.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=True,
                    tooltip="Of the first picture; the next ones of the batch count on. A batch equals its singles.",
                ),
                io.Float.Input(
                    "guidance",
                    default=5.0,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    tooltip=(
                        "How strictly the prompt is followed (classifier-free guidance). 5 is Janus-Pro's; for pico, "
                        "the built-in model, set 3. 1 is the prompt alone and takes half the time."
                    ),
                ),
                io.Float.Input(
                    "temperature",
                    default=1.0,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="Below 1 the choice is safer, above 1 wilder; 0 always takes the most likely token.",
                ),
                io.Int.Input(
                    "top_k",
                    default=0,
                    min=0,
                    max=65536,
                    tooltip="Draws from the k most likely tokens only; 0 from all. The kept logits stay whole.",
                ),
                io.Float.Input(
                    "top_p",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Draws from the most likely tokens that hold this share of the probability; 1 from all.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=256,
                    tooltip="How many pictures. When editing, the batch of the connected token_logits counts instead.",
                ),
                io.Boolean.Input(
                    "prompt_per_line",
                    default=False,
                    tooltip="Each line of the prompt becomes a picture of its own, and batch_size counts for each.",
                ),
                TokenLogitsSocket.Input(
                    "token_logits",
                    optional=True,
                    tooltip=(
                        "To edit: the tokens to keep outside the mask, of this sampler, or of a picture by way of "
                        "VQ-VAE Encode and a Logit Calibrator."
                    ),
                ),
                io.Mask.Input("mask", optional=True, tooltip="To edit: where to sample anew (white)."),
            ],
            outputs=[
                TokenLogitsSocket.Output(
                    "sampled",
                    display_name="token_logits",
                    tooltip="Tokens with their distributions: to the LCDM Encoder, a VQ-VAE Decode, Logit Statistics.",
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
        host.check_finite(guidance=guidance, temperature=temperature, top_p=top_p)
        if (token_logits is None) != (mask is None):
            raise ValueError("an edit needs token_logits and a mask: connect both, or neither to paint from nothing")
        sampler = janus.sampler.idle
        lines = [line for line in prompt.splitlines() if line.strip()] if prompt_per_line else [prompt]
        resample = None
        if token_logits is not None:
            expect(token_logits, TokenLogits, "token_logits", CONNECT_LOGITS)
            batch_size = _each(len(token_logits.tokens), lines)
            resample = _under_mask(mask, token_logits)
        prompts = [line for line in lines or [""] for _ in range(batch_size)]
        _name_unknown_words(sampler, "\n".join(lines))

        count = sampler.grid[0] * sampler.grid[1]

        def run(first: int, last: int) -> TokenLogits:
            previous = None if token_logits is None else token_logits.part(first, last)
            progress, vq, working = Progress(count), janus.vq.idle, janus.sampler.idle
            logits = 2 * (last - first) * count * sampler.codebook.size * 4
            host.bring(janus.vq, janus.sampler, memory=logits + vq_memory(vq, sampler.grid))

            def on_step(step: int, total: int, tokens: torch.Tensor) -> None:
                row = step % sampler.grid[1] == 0
                progress.step(step, total, _so_far(vq, tokens, previous, sampler.grid) if row else None)

            sampled = working.sample(
                prompts[first:last],
                seeds=[seed + k for k in range(first, last)],
                guidance=guidance,
                temperature=temperature,
                top_k=top_k or None,
                top_p=top_p if top_p < 1 else None,
                previous=previous,
                resample=None if resample is None else resample[first:last],
                on_step=on_step,
                resident=janus.sampler.resident,
            )
            return host.kept(sampled)

        with host.noticed():
            return io.NodeOutput(TokenLogits.joined(host.in_parts(run, len(prompts))))


class VQVAEEncode(io.ComfyNode):
    """Picture -> tokens with proxy logits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "VQVAEEncode",
            "VQ-VAE Encode",
            category="tokens",
            description=(
                "Turns a picture into tokens, with proxy logits: how close every patch is to every code. The way into "
                "reconstruction, and into edits of your own pictures. Sides that are no multiple of the token size are "
                "resized and cropped at the centre."
            ),
            search_aliases=["image to tokens", "tokenize", "reconstruct", "vqgan encode"],
            inputs=[
                VQVAESocket.Input("vq_vae", tooltip="From Load Janus or Load VQ-VAE."),
                io.Image.Input("image", tooltip="The picture; a batch passes through."),
                io.Int.Input(
                    "longest_side",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip=(
                        "Shrinks larger pictures until their longer side has this many pixels; 0 keeps the size. "
                        "Decoders work best near the size they were trained on (Janus: 384, pico: 96)."
                    ),
                ),
            ],
            outputs=[
                TokenLogitsSocket.Output(
                    "token_logits", display_name="token_logits", tooltip="Tokens with proxy logits, uncalibrated."
                ),
                io.Image.Output("resized", display_name="image", tooltip="The picture as it was encoded."),
            ],
        )

    @classmethod
    def execute(cls, vq_vae: Managed[VQTokenizer], image: torch.Tensor, longest_side: int) -> io.NodeOutput:
        expect(vq_vae, Managed, "vq_vae", CONNECT_VQ)
        pixels = _fitting(host.pixels_of(image), vq_vae.idle.factor, longest_side)

        memory = vq_memory(vq_vae.idle, vq_vae.idle.grid_of(*pixels.shape[2:]))

        def run(k: int) -> TokenLogits:
            return host.kept(vq_vae.ready(memory).encode(pixels[k : k + 1]))

        progress, parts = Progress(len(pixels)), []
        for k, part in enumerate(host.one_by_one(run, len(pixels))):
            parts.append(part)
            progress.step(k + 1, len(pixels), pixels[k : k + 1])
        return io.NodeOutput(TokenLogits.joined(parts), host.image_of(pixels))


class LogitCalibrator(io.ComfyNode):
    """Applies a calibration, or fits one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LogitCalibrator",
            "Logit Calibrator",
            category="tokens",
            description=(
                "Makes the proxy logits of a picture as sure and as doubtful as the language model's own, as the "
                "decoder was trained on them. Takes the calibration of a decoder, of a file, or fits one: connect "
                "exactly one of decoder, calibration and reference. The LCDM Encoder does it by itself when a decoder "
                "is connected to it; use this node to look inside, to fit, or to edit pictures of your own."
            ),
            search_aliases=["calibration", "temperature scaling", "fit calibration", "LC"],
            inputs=[
                TokenLogitsSocket.Input(
                    "token_logits", tooltip="What to calibrate: a picture's proxies, or Janus' own."
                ),
                VQVAESocket.Input("vq_vae", tooltip="The tokenizer of these logits."),
                DecoderSocket.Input("decoder", optional=True, tooltip="Takes the calibration that is in its bundle."),
                CalibrationSocket.Input("calibration", optional=True, tooltip="From Load Calibration, or another one."),
                TokenLogitsSocket.Input(
                    "reference",
                    optional=True,
                    tooltip=(
                        "Fits a calibration: token_logits of many sampled pictures (the paper: 100), which the "
                        "proxies in token_logits are to look like."
                    ),
                ),
                io.Boolean.Input(
                    "anchored",
                    default=False,
                    tooltip=(
                        "For Janus' own logits: pulls each distribution towards the token that was sampled, as "
                        "strongly as the calibration says. When fitting, that strength is fitted too. Off is the paper."
                    ),
                ),
            ],
            outputs=[
                TokenLogitsSocket.Output("calibrated", display_name="token_logits", tooltip="The calibrated logits."),
                CalibrationSocket.Output(
                    "used", display_name="calibration", tooltip="What was used: to Save Calibration."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        token_logits: TokenLogits,
        vq_vae: Managed[VQTokenizer],
        anchored: bool,
        decoder: Decoder | None = None,
        calibration: Calibration | None = None,
        reference: TokenLogits | None = None,
    ) -> io.NodeOutput:
        expect(token_logits, TokenLogits, "token_logits", CONNECT_LOGITS)
        expect(vq_vae, Managed, "vq_vae", CONNECT_VQ)
        given = [value for value in (decoder, calibration, reference) if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"{len(given) or 'none'} of decoder, calibration and reference are connected: connect exactly one, "
                "to take a calibration from or to fit one to"
            )
        codebook = vq_vae.idle.codebook
        with host.noticed():
            if reference is not None:
                expect(reference, TokenLogits, "reference", "connect the token_logits of a Janus Logit Sampler")
                calibration = _fitted(token_logits, reference, codebook, anchored)
            elif decoder is not None:
                expect(decoder, Decoder, "decoder", "connect a Load DCDD Decoder")
                calibration = decoder.decoder.idle.card.calibration
                if calibration is None:
                    raise ValueError("this decoder was trained without a calibration: connect one from a file instead")
            expect(calibration, Calibration, "calibration", "connect a Load Calibration")
            used = calibration if anchored else replace(calibration, anchor=0.0)
            return io.NodeOutput(apply_calibration(token_logits, codebook, used), calibration)


class SaveCalibration(io.ComfyNode):
    """CALIBRATION -> file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "SaveCalibration",
            "Save Calibration",
            category="tokens",
            description="Keeps a calibration in models/dcdd/calibrations. An earlier file is never overwritten.",
            search_aliases=["export calibration"],
            is_output_node=True,
            inputs=[
                CalibrationSocket.Input("calibration", tooltip="From a Logit Calibrator."),
                io.String.Input("name", default="calibration", tooltip="Of the file; a number is added if it exists."),
            ],
            outputs=[io.String.Output("path", display_name="path", tooltip="Where it was written.")],
        )

    @classmethod
    def execute(cls, calibration: Calibration, name: str) -> io.NodeOutput:
        expect(calibration, Calibration, "calibration", "connect the calibration of a Logit Calibrator")
        path = host.new_calibration(name)
        calibration.save(path)
        host.tell(f"saved {path.name}: {_in_words(calibration)}")
        return io.NodeOutput(str(path))


class LoadCalibration(io.ComfyNode):
    """File -> CALIBRATION."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "LoadCalibration",
            "Load Calibration",
            category="tokens",
            description="Reads a calibration from models/dcdd/calibrations.",
            search_aliases=["import calibration"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.calibrations() or [host.NO_CALIBRATION],
                    tooltip="A file that Save Calibration or `dcdd calibrate` wrote. Press R after adding one.",
                )
            ],
            outputs=[
                CalibrationSocket.Output("calibration", display_name="calibration", tooltip="To a Logit Calibrator.")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return host.state_of(host.calibration_path(file))

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(Calibration.load(host.calibration_path(file)))


NODES = [JanusLogitSampler, VQVAEEncode, LogitCalibrator, SaveCalibration, LoadCalibration]


def _under_mask(mask: torch.Tensor, grid: TokenLogits) -> torch.Tensor:
    """MASK -> bool [B, N], True for each token of which at least a part lies under the mask.

    A mask of another shape than the grid is cropped at the centre, as VQ-VAE Encode crops the picture.
    """
    batch = len(grid.tokens)
    area = F.adaptive_max_pool2d(host.cropped(host.mask_of(mask), *grid.grid), grid.grid).flatten(1) > 0.5
    if len(area) not in (1, batch):
        raise ValueError(f"{len(area)} masks do not fit {batch} pictures: connect one mask, or one for each picture")
    if not bool(area.any()):
        host.notice("the mask is empty: every token is kept as it is")
    return area.expand(batch, -1).cpu()


def _each(count: int, lines: list[str]) -> int:
    """How many of `count` pictures each line is for.

    Raises:
        ValueError: if they do not come out even.
    """
    if not lines or count % len(lines):
        raise ValueError(
            f"{len(lines)} lines of prompts do not go evenly with the {count} pictures of token_logits: write one "
            "line, or as many as there are pictures"
        )
    return count // len(lines)


def _name_unknown_words(sampler: JanusSampler, prompt: str) -> None:
    unknown = sampler.unknown_words(prompt)
    if unknown:
        host.notice(f"{sampler.name} does not know {', '.join(unknown)}. It knows: {', '.join(sampler.known_words())}")


def _so_far(vq: VQTokenizer, tokens: torch.Tensor, previous: TokenLogits | None, grid: tuple[int, int]) -> torch.Tensor:
    """The picture while it grows: rows of tokens [B, step] decoded, what is not there yet dark or as it was."""
    h, w = grid
    count = tokens.shape[1]
    whole = tokens.new_zeros(len(tokens), h * w) if previous is None else previous.tokens.to(tokens).clone()
    whole[:, :count] = tokens
    pixels = torch.cat([vq.decode_tokens(one, grid) for one in whole[:4].split(1)])
    if previous is None:
        pixels[:, :, count // w * vq.factor :] = -0.8
    return pixels


def vq_memory(vq: VQTokenizer, grid: tuple[int, int]) -> int:
    """Bytes that the tokenizer takes for one picture of this grid, either way: an estimate."""
    return host.autoencoder_memory(*(side * vq.factor for side in grid), vq.model.config.base_channels)


def _fitting(pixels: torch.Tensor, factor: int, longest_side: int) -> torch.Tensor:
    """Pixels at a size that is a whole grid of tokens."""
    height, width = pixels.shape[2:]
    scale = min(1.0, longest_side / max(height, width)) if longest_side else 1.0
    sides = (max(factor, round(side * scale / factor) * factor) for side in (height, width))
    return host.resized(pixels, *sides).clamp(-1, 1)


def _fitted(proxies: TokenLogits, reference: TokenLogits, codebook, anchored: bool) -> Calibration:
    progress = Progress(PASSES)
    found = fit_calibration(
        proxy_features(proxies, codebook),
        codebook,
        target_statistics(reference),
        vlm=reference.model,
        guidance=reference.guidance,
        temperature=reference.temperature,
        on_chunk=lambda passes: progress.step(min(passes, PASSES - 1), PASSES),
    )
    if anchored:
        target = anchor_statistics(proxies, codebook, found)
        found = fit_anchor(reference, codebook, target, found, on_chunk=lambda _: progress.step(PASSES - 1, PASSES))
    progress.step(PASSES, PASSES)
    return found


def _in_words(calibration: Calibration) -> str:
    return (
        f"scale {calibration.scale * calibration.affine_scale:.3f}, smoothing {calibration.smoothing:.4f}, "
        f"anchor {calibration.anchor:.2f}"
    )
