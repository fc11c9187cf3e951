"""What the nodes of distribution guidance work with: tokens to follow, copies for gradients, and the hook in a sampler.

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
from torch import nn

from ..dcdd_core.method.calibration import scale_for_confidence
from ..dcdd_core.method.lcdm import map_logits
from ..dcdd_core.models.decoder import DistributionConditionedDecoder
from ..dcdd_core.pipelines.condition import discrete_condition
from ..dcdd_core.pipelines.guided import GuidanceOptions, TokenGuide, token_guide
from ..dcdd_core.pipelines.oom import one_by_one
from ..dcdd_core.protocols import ImageTokenizer
from ..dcdd_core.types import Calibration, Condition, TokenLogits
from . import checks, host
from .convert import in_words, resized
from .host import Managed, ManagedCodec
from .sockets import CONNECT_LOGITS, CONNECT_VQ, MappedCondition, expect

SOFT, HARD = "soft: the distributions", "hard: the tokens"
#: How far the sides of an image may be from the tokens' before the artist is told that it is stretched.
_STRETCH = 1.05
#: Latents of up to so many positions a side are guided as a whole, 512 pixels of most models; others in tiles of the
#: second number, so that the way back takes 3.5 GB whatever the image.
_WHOLE, _TILE = 64, 32


# --- what is followed -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FollowedTokens:
    """What a guide follows.

    Attributes:
        tokenizer: whose encoder reads the images.
        condition: of B images.
        scale: s of its cosines.
        soft: [B, 3, H, W] in -1..1, the VQ decode of the expected code vectors.
    """

    tokenizer: Managed[ImageTokenizer]
    condition: Condition
    scale: float
    soft: torch.Tensor

    def part(self, k: int) -> FollowedTokens:
        """That of image k."""
        return replace(self, condition=self.condition.part(k, k + 1), soft=self.soft[k : k + 1])

    def guide(self, codec: Any, count: int, size: tuple[int, int], options: GuidanceOptions) -> TokenGuide:
        """Of `count` images, painted at (H, W) = `size`."""
        host.let_gradients_pass(self.tokenizer)
        own = self.condition.to(self.tokenizer.device)
        if len(self.soft) != count:
            own = Condition.joined([own] * count)
        return token_guide(
            self.tokenizer.idle,
            codec,
            own,
            scale=self.scale,
            options=options,
            size=size,
            tile=tile_of((size[0] // codec.factor, size[1] // codec.factor)),
            host=host.ComfyHost(),
        )


def followed_tokens(
    token_logits: TokenLogits, vq_vae: Managed[ImageTokenizer], codes: str, calibration: Calibration | None
) -> FollowedTokens:
    """Checks what is connected, and maps it.

    Raises:
        ValueError: for what does not fit together.
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
            scale = calibration.scale * calibration.affine_scale
        else:
            scale = _fitted_scale(tokenizer, soft)
        return made, comfy_host.keep(pixels), scale

    with host.noticed():
        made = list(one_by_one(run, len(token_logits.tokens), comfy_host))
    conditions, soft, scales = zip(*made)
    return FollowedTokens(
        tokenizer=_guide_tokenizer(vq_vae),
        condition=Condition.joined(list(conditions)),
        scale=sum(scales) / len(scales),
        soft=torch.cat(soft),
    )


# --- copies that gradients can pass -----------------------------------------------------------------------------------

#: A network that came from a socket -> its copy; gone with it.
_copies: weakref.WeakKeyDictionary[nn.Module, Managed] = weakref.WeakKeyDictionary()


def _copy_of(network: nn.Module, value: Any) -> Managed:
    if network not in _copies:
        _copies[network] = host.copied(value)
    return _copies[network]


def _guide_tokenizer(vq_vae: Managed[ImageTokenizer]) -> Managed[ImageTokenizer]:
    return _copy_of(vq_vae.idle.model, vq_vae.idle)


@dataclass(frozen=True, eq=False)
class GuideVAE:
    """A copy of a core VAE's network, and how it is called."""

    vae: comfy.sd.VAE
    network: Managed[nn.Module]
    factor: int

    def of_unit_spread(self, pixels: torch.Tensor) -> _Codec:
        """For latents of variance 1: a VAE does not say how large its latents are, so those of an image are measured.

        Args:
            pixels: [1, 3, H, W] in -1..1.
        """
        spread = float(self.of(lambda z: z, lambda z: z).encode(pixels).std())
        return self.of(lambda z: z / spread, lambda z: z * spread)

    def of(self, normalize: Any, denormalize: Any) -> _Codec:
        """For the latents of a model that normalises them so."""
        host.let_gradients_pass(self.network)
        return _Codec(self, normalize, denormalize)


def guide_vae(vae: comfy.sd.VAE) -> GuideVAE:
    """
    Raises:
        ValueError: for what is no VAE of images.
    """
    factor = pixels_a_latent(vae)
    return GuideVAE(vae=vae, network=_copy_of(vae.first_stage_model, vae.first_stage_model), factor=factor)


def pixels_a_latent(vae: comfy.sd.VAE) -> int:
    expect(vae, comfy.sd.VAE, "vae", "connect the VAE of your model, from Load VAE or Load Checkpoint")
    if not isinstance(vae.downscale_ratio, int) or getattr(vae, "latent_dim", 2) != 2:
        raise ValueError("the connected VAE is one for video or sound: guidance works with models of images")
    return vae.downscale_ratio


@dataclass(frozen=True, eq=False)
class _Codec:
    """What a `TokenGuide` needs of a `LatentCodec`."""

    own: GuideVAE
    normalize: Any
    denormalize: Any

    @property
    def factor(self) -> int:
        """Pixels a latent position."""
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
        return self.own.vae.process_output(made) * 2 - 1


def preview_of(guide: TokenGuide, z: torch.Tensor) -> torch.Tensor | None:
    if not host.shows_previews():
        return None
    with torch.no_grad():
        return guide.decode(z)


def tile_of(latent_size: tuple[int, int]) -> int | None:
    """Side in latents of the tiles that a gradient goes back in; None for none."""
    return None if max(latent_size) <= _WHOLE else _TILE


def gradient_memory(size: tuple[int, int], factor: int) -> int:
    """Bytes that a gradient through VAE and tokenizer takes besides their weights, in float32.

    The image is decoded as a whole, of which ComfyUI assumes 2178 bytes a pixel and byte of the dtype; the way back
    holds 53,000 bytes a pixel, of the whole or of a tile: `python -m benchmarks guidance`, counted at FLUX.1's shape,
    not measured on a GPU.
    """
    height, width = size
    tile = tile_of((height // factor, width // factor))
    held = height * width if tile is None else min(height * width, (tile * factor) ** 2)
    return 53_000 * held + (0 if tile is None else 4 * 2178 * height * width)


def tell_stretch(size: tuple[int, int], own: tuple[int, int]) -> None:
    ratio = (size[1] / size[0]) / (own[1] / own[0])
    if not 1 / _STRETCH < ratio < _STRETCH:
        host.notice(
            f"Janus' image has {in_words(*own)} pixels and is stretched to {in_words(*size)}: choose sides of the same "
            "ratio to keep its proportions"
        )


# --- on a decoder -----------------------------------------------------------------------------------------------------


class _GuidedHost(host.ComfyHost):
    """The models of a node, and the copies that gradients pass."""

    def __init__(self, plain: host.ComfyHost, copies: tuple[Managed, ...], memory: int):
        super().__init__(*plain.models, *copies, besides=plain.besides + memory)
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
        codec: `ManagedCodec`, or a core VAE as a codec that has it as `vae`.
    """
    size, tokenizer = decoder.painted_size(condition.grid), _guide_tokenizer(vq_vae)
    if isinstance(codec, ManagedCodec):
        own = codec.managed.idle
        network = _copy_of(own.model, own)
        sees = network.idle
    else:
        own = guide_vae(codec.vae)
        network, sees = own.network, own.of(codec.normalize, codec.denormalize)
    latent_size = (size[0] // codec.factor, size[1] // codec.factor)
    both = _GuidedHost(plain, (network, tokenizer), gradient_memory(size, codec.factor))
    both.bring()
    mapped = condition.to(tokenizer.device)
    calibration = None if condition.card is None else condition.card.calibration
    if calibration is not None:
        scale = calibration.scale * calibration.affine_scale
    else:
        scale = _fitted_scale(tokenizer.idle, mapped)
    guide = token_guide(
        tokenizer.idle,
        sees,
        mapped,
        scale=scale,
        options=GuidanceOptions(strength=strength, pull=0.0),
        size=size,
        tile=tile_of(latent_size),
        host=both,
    )
    return both, guide


def _fitted_scale(tokenizer: ImageTokenizer, condition: Condition) -> float:
    """s at which the encoder is as confident, of the soft VQ decode, as the condition is."""
    with torch.no_grad():
        features = tokenizer.features(tokenizer.decode_vectors(condition.code_vectors, condition.grid))
    return scale_for_confidence(features, tokenizer.codebook, float(condition.uncertainty[..., 0].mean()))


# --- within a sampler -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class SamplerGuidance:
    """Corrects the predicted clean latents of every step.

    Attributes:
        percent: of the schedule, (first, last).
        mask: [1 or B, 1, H, W], where tokens are followed.
    """

    tokens: FollowedTokens
    vae: GuideVAE
    options: GuidanceOptions
    percent: tuple[float, float]
    mask: torch.Tensor | None
    _guides: dict[tuple, TokenGuide] = field(default_factory=dict)
    _last: float = -1.0
    _step: int = 0

    def join(self, model: Any) -> None:
        """Lets ComfyUI load the copies together with the model, and keep memory for them."""
        host.accompany(model, self.vae.network, self.tokens.tokenizer)
        kind = comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING
        model.add_wrapper_with_key(kind, "DCDD", self._prepare)

    def _prepare(self, run: Any, model: Any, noise_shape: Any, *args: Any, **options: Any) -> Any:
        """ComfyUI estimates a model's memory by the number of images: told as many more as a gradient takes."""
        self._guides.clear()
        self._last, self._step = -1.0, 0
        height, width = (side * self.vae.factor for side in noise_shape[-2:])
        one = max(1.0, float(model.model.memory_required([1, *noise_shape[1:]])))
        more = round(gradient_memory((height, width), self.vae.factor) / one)
        return run(model, [noise_shape[0] + more, *noise_shape[1:]], *args, **options)

    def __call__(self, args: dict[str, Any]) -> torch.Tensor:
        """See `set_model_sampler_post_cfg_function`: the denoised latents of a step, corrected."""
        denoised, model = args["denoised"], args["model"]
        comfy.model_management.throw_exception_if_processing_interrupted()
        time = self._time(model.model_sampling, float(args["sigma"].max()))
        step = self._count(time)
        first, last = (self._time(model.model_sampling, self._sigma(model, each)) for each in self.percent)
        options = replace(self.options, first=max(first, last), last=last)
        if not options.guides(time, step):
            return denoised
        self._check(denoised)
        with host.noticed():
            guide = self._guide(model, denoised, options)
            return guide.correct(denoised.to(guide.soft), time).to(denoised)

    def _guide(self, model: Any, denoised: torch.Tensor, options: GuidanceOptions) -> TokenGuide:
        key = (tuple(denoised.shape), denoised.device)
        codec = self.vae.of(model.process_latent_in, model.process_latent_out)
        host.let_gradients_pass(self.tokens.tokenizer)
        if key not in self._guides:
            size = (denoised.shape[-2] * self.vae.factor, denoised.shape[-1] * self.vae.factor)
            guide = self.tokens.guide(codec, len(denoised), size, options)
            if guide.soft.shape[1:] != denoised.shape[1:]:
                came, paints = (" x ".join(map(str, each.shape[1:])) for each in (guide.soft, denoised))
                raise ValueError(
                    f"the VAE of Distribution Guidance makes latents of {came} (channels, height, width), and the "
                    f"model paints {paints}: connect the VAE of this model; models of video cannot be guided"
                )
            h, w = guide.condition.grid
            factor = self.tokens.tokenizer.idle.factor
            tell_stretch(size, (h * factor, w * factor))
            self._guides[key] = guide if self.mask is None else guide.under(resized(self.mask, *size))
        return self._guides[key]

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

    def _count(self, time: float) -> int:
        """Number of this step. Samplers may predict more than once a time."""
        if time > self._last:
            self._step = 0
        elif time < self._last:
            self._step += 1
        self._last = time
        return self._step

    @staticmethod
    def _sigma(model: Any, percent: float) -> float:
        return float(model.model_sampling.percent_to_sigma(percent))

    @staticmethod
    def _time(sampling: Any, sigma: float) -> float:
        """t of a sigma: itself on the flow's path; sigma / (1 + sigma) where noise is added to what keeps its size."""
        return min(1.0, sigma) if isinstance(sampling, comfy.model_sampling.CONST) else sigma / (1 + sigma)
