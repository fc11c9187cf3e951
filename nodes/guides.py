"""What the guidance nodes share: tokens to follow, copies of models for gradients, and the hook in a sampler.

Shapes: B batch, H W pixels, h' w' latent grid, C latent channels.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.patcher_extension
import comfy.sd
import torch
import torch.nn.functional as F
from torch import nn

from ..dcdd_core.method.calibration import scale_for_confidence
from ..dcdd_core.method.guidance import time_of_sigma
from ..dcdd_core.method.lcdm import map_logits
from ..dcdd_core.models.decoder import DistributionConditionedDecoder
from ..dcdd_core.pipelines.condition import discrete_condition
from ..dcdd_core.pipelines.guided import Fallback, GuidanceOptions, TokenGuide, token_guide
from ..dcdd_core.pipelines.oom import one_by_one
from ..dcdd_core.protocols import ImageTokenizer
from ..dcdd_core.types import Calibration, Condition, TokenLogits
from . import checks, host
from .convert import in_words
from .host import Managed, ManagedCodec
from .sockets import CONNECT_LOGITS, CONNECT_VQ, MappedCondition, expect

SOFT, HARD = "soft: the distributions", "hard: the tokens"
#: Factor by which an image's aspect ratio may differ from the tokens' before the user is told that it is stretched.
_STRETCH = 1.05
#: Latents of at most the first number of positions per side (512 pixels for most models) are guided as a whole, larger
#: ones in tiles with the second number per side, so that the backward pass takes 3.5 GB for any image.
_WHOLE, _TILE = 64, 32


# --- what is followed -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FollowedTokens:
    """What a guide follows.

    Attributes:
        tokenizer: the one whose encoder reads the images.
        condition: what its encoder should find in B images.
        scales: the cosine scale s for each image.
        soft: [B, 3, H, W] in -1..1, the VQ decode of the condition's code vectors.
    """

    tokenizer: Managed[ImageTokenizer]
    condition: Condition
    scales: tuple[float, ...]
    soft: torch.Tensor

    def guide(
        self, k: int, codec: Any, size: tuple[int, int], options: GuidanceOptions, fallback: Fallback | None = None
    ) -> TokenGuide:
        """The guide for image k, painted at (H, W) = `size`."""
        host.let_gradients_pass(self.tokenizer)
        guide = token_guide(
            self.tokenizer.idle,
            codec,
            self.condition.part(k, k + 1).to(self.tokenizer.device),
            scale=self.scales[k],
            options=options,
            size=size,
            tile=tile_of((size[0] // codec.factor, size[1] // codec.factor)),
            host=host.ComfyHost(),
        )
        return guide if fallback is None else replace(guide, fallback=fallback)


def followed_tokens(
    token_logits: TokenLogits, vq_vae: Managed[ImageTokenizer], codes: str, calibration: Calibration | None
) -> FollowedTokens:
    """Checks what is connected, and maps the logits to conditions.

    Raises:
        ValueError: if the inputs do not fit together.
    """
    expect(token_logits, TokenLogits, "token_logits", CONNECT_LOGITS)
    expect(vq_vae, Managed, "vq_vae", CONNECT_VQ)
    if codes not in (SOFT, HARD):
        raise ValueError(f"codes must be {SOFT!r} or {HARD!r}, got {codes!r}")
    tokenizer = vq_vae.idle
    checks.check_tokenizer(token_logits, tokenizer)
    if calibration is not None:
        expect(calibration, Calibration, "calibration", "connect a Load Calibration or a Logit Calibrator")
        checks.check_calibration(calibration, tokenizer)
        checks.check_uncalibrated(token_logits)
        calibration = checks.without_provenance(token_logits, calibration)
    elif token_logits.source == "proxy" and not token_logits.calibrated:
        raise ValueError(
            "token_logits are of an image and were not calibrated, so they say nothing: connect a calibration, or put "
            "a Logit Calibrator between VQ-VAE Encode and this node"
        )
    comfy_host = host.ComfyHost(vq_vae, convolutional=True)

    def run(k: int) -> tuple[Condition, torch.Tensor, float]:
        comfy_host.bring(2 * tokenizer.working_memory(token_logits.grid))
        part = token_logits.part(k, k + 1)
        soft = map_logits(part, tokenizer.codebook, calibration)
        made = soft if codes == SOFT else discrete_condition(part, tokenizer.codebook)
        pixels = tokenizer.decode_vectors(made.code_vectors, part.grid)
        if calibration is not None:
            scale = calibration.sharpness
        else:
            scale = _fitted_scale(tokenizer, soft, pixels if made is soft else None)
        return made, comfy_host.keep(pixels), scale

    with host.noticed():
        made = list(one_by_one(run, len(token_logits.tokens), comfy_host))
    conditions, soft, scales = zip(*made)
    return FollowedTokens(
        tokenizer=_guide_tokenizer(vq_vae),
        condition=Condition.joined(list(conditions)),
        scales=scales,
        soft=torch.cat(soft),
    )


# --- copies that gradients can pass -----------------------------------------------------------------------------------

#: A network that came through a socket -> its copy, which is freed together with it.
_copies: weakref.WeakKeyDictionary[nn.Module, Managed] = weakref.WeakKeyDictionary()


def _copy_of(network: nn.Module, value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Managed:
    """
    Args:
        network: the original.
        value: what to copy: the network, or an object that has it as `model`.
        device: where the original computes.
    """
    if network not in _copies:
        _copies[network] = host.copied(value, placement="CPU" if device.type == "cpu" else "auto", dtype=dtype)
    return _copies[network]


def _guide_tokenizer(vq_vae: Managed[ImageTokenizer]) -> Managed[ImageTokenizer]:
    return _copy_of(vq_vae.idle.model, vq_vae.idle, vq_vae.device)


@dataclass(frozen=True, eq=False)
class GuideVAE:
    """A core VAE, a copy of its network for gradients, and pixels per latent position."""

    vae: comfy.sd.VAE
    network: Managed[nn.Module]
    factor: int

    def of_unit_spread(self, pixels: torch.Tensor) -> _Codec:
        """A codec that scales latents to variance 1. The scale is measured on an image, since a VAE does not say it.

        Args:
            pixels: [1, 3, H, W] in -1..1; if all latents of it are equal, they are not scaled.

        Raises:
            ValueError: if the VAE encodes it to NaN or infinity.
        """
        spread = checks.spread_of(self.of(lambda z: z, lambda z: z).encode(pixels)) or 1.0
        return self.of(lambda z: z / spread, lambda z: z * spread)

    def of(self, normalize: Any, denormalize: Any) -> _Codec:
        """A codec for a model that normalises latents by these functions."""
        host.let_gradients_pass(self.network)
        return _Codec(self, normalize, denormalize)


def guide_vae(vae: comfy.sd.VAE) -> GuideVAE:
    """
    Raises:
        ValueError: if it is not a VAE for images.
    """
    factor = pixels_a_latent(vae)
    network = vae.first_stage_model
    return GuideVAE(vae=vae, network=_copy_of(network, network, vae.device, vae.vae_dtype), factor=factor)


def pixels_a_latent(vae: comfy.sd.VAE) -> int:
    expect(vae, comfy.sd.VAE, "vae", "connect the VAE of your model, from Load VAE or Load Checkpoint")
    if not isinstance(vae.downscale_ratio, int) or getattr(vae, "latent_dim", 2) != 2:
        raise ValueError(
            "the connected VAE is one of video or sound (Qwen-Image's is, too): guidance works with models of images "
            "such as FLUX.1, SDXL and SD 1.5"
        )
    vae.throw_exception_if_invalid()
    return vae.downscale_ratio


@dataclass(frozen=True, eq=False)
class _Codec:
    """What a `TokenGuide` needs of a `LatentCodec`."""

    own: GuideVAE
    normalize: Any
    denormalize: Any

    @property
    def factor(self) -> int:
        """Pixels per latent position, along each side."""
        return self.own.factor

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] in -1..1 -> raw latents."""
        weight = next(self.own.network.idle.parameters())
        given = self.own.vae.process_input((pixels + 1) / 2)
        with torch.no_grad():
            return self.own.network.idle.encode(given.to(self.own.network.device, weight.dtype)).float()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Raw latents -> [B, 3, H, W] in -1..1; differentiable."""
        weight = next(self.own.network.idle.parameters())
        made = self.own.network.idle.decode(latents.to(self.own.network.device, weight.dtype)).float()
        # Cloned, since ComfyUI changes its input in place.
        return self.own.vae.process_output(made.clone()) * 2 - 1


def preview_of(guide: TokenGuide, z: torch.Tensor) -> torch.Tensor | None:
    if not host.shows_previews():
        return None
    with torch.no_grad():
        return guide.decode(z)


def tile_of(latent_size: tuple[int, int]) -> int | None:
    """Side, in latent positions, of the tiles of the backward pass; None to do it as a whole."""
    return None if max(latent_size) <= _WHOLE else _TILE


def gradient_memory(size: tuple[int, int], network: Managed, factor: int, tokens: tuple[int, int]) -> int:
    """Bytes that a gradient needs at least, besides weights: what does not fit is done in smaller parts.

    The backward pass of a network holds 6000 bytes per pixel and byte of the dtype (counted on FLUX.1's VAE by `python
    -m benchmarks guidance`; not measured on a GPU). It runs first through the encoder, on the tokens' own image in
    float32, then through the decoder, on a tile. Before both, the image is decoded, for which ComfyUI assumes 2178.

    Args:
        size: (H, W) of the painted image.
        network: the one that decodes it, with `factor` pixels per latent position.
        tokens: (H, W) of the image that the tokenizer reads.
    """
    pixels, width = size[0] * size[1], next(network.network.parameters()).element_size()
    tile = min(pixels, (_TILE * factor) ** 2)
    return host.convolution_memory(max(24_000 * tokens[0] * tokens[1], 6_000 * width * tile, 2178 * width * pixels))


def tell_stretch(size: tuple[int, int], own: tuple[int, int]) -> None:
    ratio = (size[1] / size[0]) / (own[1] / own[0])
    if not 1 / _STRETCH < ratio < _STRETCH:
        host.notice(
            f"Janus' image has {in_words(*own)} pixels and is stretched to {in_words(*size)}: choose sides of the same "
            "ratio to keep its proportions"
        )


# --- on a decoder -----------------------------------------------------------------------------------------------------


class _GuidedHost(host.ComfyHost):
    """The models of a node together with the copies for gradients."""

    def __init__(self, plain: host.ComfyHost, copies: tuple[Managed, ...], memory: int):
        smaller = f"set strength to 0, or {plain.smaller}"
        super().__init__(*plain.models, *copies, besides=plain.besides + memory, smaller=smaller)
        self._copies = copies

    def bring(self, memory: int = 0) -> None:
        super().bring(memory)
        host.let_gradients_pass(*self._copies)


def decoder_guide(
    plain: host.ComfyHost,
    codec: Any,
    vq_vae: Managed[ImageTokenizer],
    condition: MappedCondition,
    decoder: DistributionConditionedDecoder,
    strength: float,
) -> tuple[host.ComfyHost, TokenGuide]:
    """Guidance on top of a trained decoder, and the host that brings what it needs.

    Args:
        plain: the host without guidance.
        codec: a `ManagedCodec`, or a codec that has a core VAE as `vae`.
    """
    size, tokenizer = decoder.painted_size(condition.grid), _guide_tokenizer(vq_vae)
    if isinstance(codec, ManagedCodec):
        own = codec.managed.idle
        network = _copy_of(own.model, own, codec.managed.device)
        sees = network.idle
    else:
        own = guide_vae(codec.vae)
        network, sees = own.network, own.of(codec.normalize, codec.denormalize)
    h, w = (side * tokenizer.idle.factor for side in condition.grid)
    both = _GuidedHost(plain, (network, tokenizer), gradient_memory(size, network, codec.factor, (h, w)))
    both.bring()
    mapped = condition.to(tokenizer.device)
    scale = condition.sharpness
    if scale is None:
        each = one_by_one(
            lambda k: _fitted_scale(tokenizer.idle, mapped.part(k, k + 1)), len(mapped.code_vectors), both
        )
        scale = tuple(each)
    guide = token_guide(
        tokenizer.idle,
        sees,
        mapped,
        scale=scale,
        options=GuidanceOptions(strength=strength, pull=0.0),
        size=size,
        tile=tile_of((size[0] // codec.factor, size[1] // codec.factor)),
        host=both,
    )
    return both, guide


def _fitted_scale(tokenizer: ImageTokenizer, condition: Condition, pixels: torch.Tensor | None = None) -> float:
    """The scale s at which the encoder, given the soft VQ decode, is as confident as the condition.

    Args:
        pixels: the soft VQ decode, if it was made already.
    """
    if pixels is None:
        pixels = tokenizer.decode_vectors(condition.code_vectors, condition.grid)
    with torch.no_grad():
        features = tokenizer.features(pixels)
    return scale_for_confidence(features, tokenizer.codebook, float(condition.uncertainty[..., 0].mean()))


# --- within a sampler -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class SamplerGuidance:
    """Corrects the predicted clean latents of every step.

    Attributes:
        percent: the guided part of the schedule, (first, last) in 0..1.
        mask: [1 or B, 1, H, W], 1 where tokens are followed; None for everywhere.
    """

    tokens: FollowedTokens
    vae: GuideVAE
    options: GuidanceOptions
    percent: tuple[float, float]
    mask: torch.Tensor | None
    #: Guides for the latents being sampled, by shape and device; then what each image has given up to save memory in
    #: this sampling.
    _guides: dict[tuple, list[TokenGuide]] = field(default_factory=dict)
    _fallbacks: dict[int, Fallback] = field(default_factory=dict)

    def join(self, model: Any) -> None:
        """Adds guidance to a MODEL's sampling, and the copies and memory for it to what ComfyUI loads."""
        model.set_model_sampler_post_cfg_function(self)
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING, "DCDD", self._prepare)

    def _prepare(self, run: Any, model: Any, noise_shape: Any, conds: Any, *args: Any, **options: Any) -> Any:
        """ComfyUI estimates memory by the number of images, so the memory of a gradient is added as further images."""
        self._guides.clear()
        self._fallbacks.clear()
        if self.options.off:
            return run(model, noise_shape, conds, *args, **options)
        conds = host.with_models(conds, self.vae.network, self.tokens.tokenizer)
        height, width = (side * self.vae.factor for side in noise_shape[-2:])
        factor, (h, w) = self.tokens.tokenizer.idle.factor, self.tokens.condition.grid
        memory = gradient_memory((height, width), self.vae.network, self.vae.factor, (h * factor, w * factor))
        one = max(1.0, float(model.model.memory_required([1, *noise_shape[1:]])))
        return run(model, [noise_shape[0] + round(memory / one), *noise_shape[1:]], conds, *args, **options)

    def __call__(self, args: dict[str, Any]) -> torch.Tensor:
        """See `set_model_sampler_post_cfg_function`: the denoised latents of a step, corrected."""
        denoised, model, sigma = args["denoised"], args["model"], args["sigma"].max()
        time = time_in(model.model_sampling, float(sigma))
        first, last = (
            time_in(model.model_sampling, float(model.model_sampling.percent_to_sigma(each))) for each in self.percent
        )
        options = replace(self.options, first=max(first, last), last=last)
        # Samplers may predict more than once per step, also at times between those of two steps.
        sigmas = args["model_options"]["transformer_options"]["sample_sigmas"].to(sigma)
        step = max(0, int((sigmas >= sigma - 1e-6).sum()) - 1)
        if not options.guides(time, step):
            return denoised
        self._check(denoised)
        made = []
        with host.noticed():
            for k, guide in enumerate(self._guides_of(model, denoised, options)):
                comfy.model_management.throw_exception_if_processing_interrupted()
                made.append(guide.correct(denoised[k : k + 1].to(guide.soft), time).to(denoised))
        return torch.cat(made)

    def _guides_of(self, model: Any, denoised: torch.Tensor, options: GuidanceOptions) -> list[TokenGuide]:
        key = (tuple(denoised.shape), denoised.device)
        codec = self.vae.of(model.process_latent_in, model.process_latent_out)
        host.let_gradients_pass(self.tokens.tokenizer)
        if key in self._guides:
            return self._guides[key]
        size, guides = (denoised.shape[-2] * self.vae.factor, denoised.shape[-1] * self.vae.factor), []
        for k in range(len(denoised)):
            fallback = self._fallbacks.setdefault(k, Fallback())
            guide = self.tokens.guide(k % len(self.tokens.soft), codec, size, options, fallback)
            if guide.soft.shape[1:] != denoised.shape[1:]:
                came, paints = (" x ".join(map(str, each.shape[1:])) for each in (guide.soft, denoised))
                raise ValueError(
                    f"the VAE of Distribution Guidance makes latents of {came} (channels, height, width), and the "
                    f"model paints {paints}: connect the VAE of this model; models of video cannot be guided"
                )
            if self.mask is not None:
                # Stretched, as ComfyUI does with the mask of a latent.
                mask = self.mask if len(self.mask) == 1 else self.mask[k : k + 1]
                guide = guide.under(F.interpolate(mask.to(guide.soft.device), size, mode="bilinear"))
            guides.append(guide)
        if self.mask is not None and not bool(self.mask.any()):
            host.notice("the mask of Distribution Guidance is empty: nothing is guided")
        h, w = self.tokens.condition.grid
        tell_stretch(size, (h * self.tokens.tokenizer.idle.factor, w * self.tokens.tokenizer.idle.factor))
        self._guides[key] = guides
        return guides

    def _check(self, denoised: torch.Tensor) -> None:
        count = len(self.tokens.soft)
        if count not in (1, len(denoised)):
            raise ValueError(
                f"the latent is a batch of {len(denoised)}, token_logits one of {count}: connect the latent of a "
                "Token Guide Latent that has the same token_logits"
            )
        if self.mask is not None and len(self.mask) not in (1, len(denoised)):
            raise ValueError(
                f"mask is a batch of {len(self.mask)}, the latent one of {len(denoised)}: connect one for all, or "
                f"{len(denoised)}"
            )


def time_in(sampling: Any, sigma: float) -> float:
    """The time t of a sigma: for flow models itself, otherwise that of the same noise on data of unit variance."""
    if isinstance(sampling, comfy.model_sampling.CONST):
        return min(1.0, sigma)
    return time_of_sigma(sigma / getattr(sampling, "sigma_data", 1.0))


def denoise_from(sampling: Any, start: float) -> float:
    """The denoise with which a model starts from time `start`; by bisection, since each model has its own schedule."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        late = time_in(sampling, float(sampling.percent_to_sigma(1 - middle))) < start
        low, high = (middle, high) if late else (low, middle)
    return round(high, 4)
