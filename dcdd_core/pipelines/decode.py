"""Condition -> image: the decoder's Euler steps from noise to latents, then the codec to pixels; also tokens -> image.

Shapes: B batch, N tokens, D code dim, H W pixels, h' w' latent grid, C latent channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..files import is_finite
from ..method.chunks import check_codebooks
from ..method.flow import euler_step, interpolate, recover_clean, timesteps
from ..method.guidance import velocity_towards
from ..method.lcdm import map_logits
from ..method.sampling import keyed_generator
from ..models.card import MOST_STEPS
from ..models.decoder import DistributionConditionedDecoder
from ..protocols import ImageTokenizer, LatentCodec, OnLayer
from ..settings import require_number
from ..types import Condition, DCDDWarning, TokenLogits, same_codebook
from .condition_guidance import ConditionedVelocity
from .guided import TokenGuide
from .host import PLAIN, Host
from .oom import in_parts, one_by_one

#: Called after every step with (steps done, steps, the current estimate of the image as raw latents [B, C, h', w']);
#: may raise to stop.
OnDecodeStep = Callable[[int, int, torch.Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Painted images.

    Attributes:
        pixels: [B, 3, H, W] float32 in -1..1; where the mask was 0, bit-identical to the given image.
        latents: [B, C, h', w'] float32, raw (not normalised), as the decoder produced them.
    """

    pixels: torch.Tensor
    latents: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """What painting starts from.

    Attributes:
        given: [B or 1, C, h', w'] raw latents of the image to keep, with the area to paint in grey.
        area: [B or 1, 1, H, W], 1 where the image is painted, 0 where it is kept.
    """

    given: torch.Tensor
    area: torch.Tensor

    def part(self, first: int, last: int) -> Canvas:
        """The canvas of images first..last - 1."""
        given, area = (x if len(x) == 1 else x[first:last] for x in (self.given, self.area))
        return Canvas(given=given, area=area)


def decode(
    decoder: DistributionConditionedDecoder,
    codec: LatentCodec,
    condition: Condition,
    *,
    seeds: Sequence[int],
    steps: int | None = None,
    shift: float | None = None,
    condition_guidance: float | None = None,
    image: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    guide: TokenGuide | None = None,
    start: float = 1.0,
    on_step: OnDecodeStep | None = None,
    on_prepare: OnLayer | None = None,
    host: Host = PLAIN,
    codec_remedy: str | None = None,
) -> Decoded:
    """Paints the images of a condition (Eqs. 17-25) with `canvas_of`, `paint` and `pixels_of`; arguments as there.

    If a batch runs out of memory, it is painted in smaller parts, with the same result; `on_step` then starts again at
    the first step for each part. The codec works on one image at a time, outside the steps. A few-step student that is
    asked to paint at times it was not distilled for issues a `DCDDWarning`.

    Args:
        codec_remedy: what to do if the codec does not fit into memory; the host's by default.

    Raises:
        ValueError: as `canvas_of`, `paint` and `pixels_of`.
        RuntimeError: if a single image does not fit into memory.
    """
    batch = len(condition.code_vectors)
    _check_seeds(seeds, batch)
    w = decoder.card.condition_guidance_of(condition_guidance)
    (canvas,) = in_parts(lambda *_: canvas_of(codec, decoder, condition, image, mask), 1, host, remedy=codec_remedy)
    latent_size = (canvas.given.shape[2], canvas.given.shape[3])
    if doubt := _doubt_of_student(decoder, latent_size, steps, shift, start):
        warnings.warn(doubt, DCDDWarning, stacklevel=2)

    def run(first: int, last: int) -> torch.Tensor:
        host.bring(decoder.backbone.working_memory((last - first) * (1 if w == 1 else 2), latent_size))
        return paint(
            decoder,
            codec,
            condition.part(first, last),
            canvas.part(first, last),
            seeds=seeds[first:last],
            steps=steps,
            shift=shift,
            condition_guidance=w,
            guide=None if guide is None else guide.part(first, last),
            start=start,
            on_step=on_step,
            on_prepare=on_prepare,
            host=host,
        )

    latents = torch.cat(in_parts(run, batch, host))

    def show(k: int) -> torch.Tensor:
        own = (x if x is None or len(x) == 1 else x[k : k + 1] for x in (image, mask))
        return host.keep(pixels_of(codec, latents[k : k + 1], *own))

    # Separate from the steps, which must not be repeated when the codec runs out of memory.
    pixels = torch.cat(list(one_by_one(show, batch, host, remedy=codec_remedy)))
    return Decoded(pixels=pixels, latents=latents)


def decode_tokens(
    tokenizer: ImageTokenizer,
    token_logits: TokenLogits,
    *,
    soft: bool = False,
    at_once: int | None = None,
    on_images: Callable[[int, torch.Tensor], None] | None = None,
    host: Host = PLAIN,
) -> torch.Tensor:
    """Decodes the VLM's own images [B, 3, H, W] in -1..1, in smaller parts if memory runs out.

    Args:
        soft: decode the expected code vector of each position (Eqs. 4-5) instead of its token.
        at_once: number of images decoded together; None for all. Other batch sizes may round differently.
        on_images: called with (images done so far, pixels of the latest ones).

    Raises:
        ValueError: for another tokenizer's logits.
        RuntimeError: if an image does not fit into memory.
    """
    count, memory = len(token_logits.tokens), tokenizer.working_memory(token_logits.grid)
    images: list[torch.Tensor] = []
    for first in range(0, count, at_once or count):
        part = token_logits.part(first, min(count, first + (at_once or count)))
        host.check()

        def run(begin: int, end: int, part: TokenLogits = part) -> torch.Tensor:
            host.bring(memory * (end - begin))
            own = part.part(begin, end)
            if soft:
                mapped = map_logits(own, tokenizer.codebook)
                return host.keep(tokenizer.decode_vectors(mapped.code_vectors, own.grid))
            check_codebooks(own, tokenizer.codebook, None)
            return host.keep(tokenizer.decode_tokens(own.tokens, own.grid))

        images.append(torch.cat(in_parts(run, len(part.tokens), host)))
        if on_images is not None:
            on_images(first + len(part.tokens), images[-1])
    return torch.cat(images)


@torch.no_grad()
def canvas_of(
    codec: LatentCodec,
    decoder: DistributionConditionedDecoder,
    condition: Condition,
    image: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> Canvas:
    """The canvas for the images of a condition, encoded one by one; an empty one if no image is given.

    Args:
        condition: of B images on an (h, w) grid, painted at the size `decoder.painted_size`.
        image, mask: for localised decoding, both or neither: [B or 1, 3, H, W] in -1..1, and [B or 1, 1, H, W] in 0..1,
            where 0 is kept, 1 is painted, and values in between are painted and blended.

    Raises:
        ValueError: for another tokenizer's condition, and for an image or mask that does not fit.
    """
    height, width = decoder.painted_size(condition.grid)
    _check_condition(decoder, condition)
    check_part(image, mask, len(condition.code_vectors), (height, width))
    if image is None:
        return Canvas(given=codec.encode(torch.zeros(1, 3, height, width)), area=torch.ones(1, 1, height, width))
    area = (mask > 0).float()
    kept = image.float() * (1 - area.to(image.device))
    return Canvas(given=torch.cat([codec.encode(one) for one in kept.split(1)]), area=area)


@torch.no_grad()
def paint(
    decoder: DistributionConditionedDecoder,
    codec: LatentCodec,
    condition: Condition,
    canvas: Canvas,
    *,
    seeds: Sequence[int],
    steps: int | None = None,
    shift: float | None = None,
    condition_guidance: float | None = None,
    guide: TokenGuide | None = None,
    start: float = 1.0,
    on_step: OnDecodeStep | None = None,
    on_prepare: OnLayer | None = None,
    host: Host = PLAIN,
) -> torch.Tensor:
    """Runs the Euler steps from noise to raw latents [B, C, h', w'] float32.

    Args:
        codec: defines how latents are normalised; only a guide uses its network.
        seeds: one integer per image; each image is the same as when painted on its own.
        steps: number of Euler steps, 1..`MOST_STEPS`; the bundle's own by default.
        shift: mu of the time shift; by default the bundle's own, or the backbone's if it has none.
        condition_guidance: guidance scale w of v_null + w (v_cond - v_null), for a decoder trained with dropped
            conditions (`ConditionedVelocity`); 1 is off, any other value about doubles the time of a step. The bundle's
            own by default. It is applied before the guide.
        guide: distribution guidance for these images; None for none. Areas that the canvas keeps are not guided.
        start: time to start from, above 0 and up to 1, which is pure noise; below 1 the steps start from the guide's
            soft VQ decode noised to that time, and the schedule is scaled to it.
        on_prepare: called with (layers read, layers) while a new schedule is prepared; may raise to stop.
        host: told when memory runs out.

    Raises:
        ValueError: for another tokenizer's condition, a wrong number of seeds or steps, a condition_guidance out of
            range, or other than 1 for a decoder trained without dropped conditions, a start out of range or below 1
            without a guide, and a canvas that is not finite; if the latents become NaN or infinite, naming the step.
    """
    card, backbone, batch = decoder.card, decoder.backbone, len(condition.code_vectors)
    _check_condition(decoder, condition)
    _check_seeds(seeds, batch)
    device, dtype = decoder.device, decoder.dtype
    height, width = canvas.given.shape[2:]
    size = (height, width)
    steps = card.steps if steps is None else steps
    require_number("steps", steps, whole=True, least=1, most=MOST_STEPS)
    w = card.condition_guidance_of(condition_guidance)
    if not is_finite(canvas.given):
        raise ValueError(
            "the autoencoder's latents of the image to keep hold NaN or infinity: check that image, or load the "
            "autoencoder in float32"
        )

    require_number("start", start, above=0, most=1)
    if start < 1 and guide is None:
        raise ValueError(
            f"painting from t = {start} starts from the VQ decode: give a guide, which holds it, or start = 1"
        )

    if guide is not None:
        guide = guide.under(canvas.area)
        guide.begin()
    given = codec.normalize(canvas.given.to(device))
    context = backbone.context(given, canvas.area.to(device), card.vae_factor).to(dtype)
    noise = [torch.randn(1, *canvas.given.shape[1:], generator=keyed_generator(seed)) for seed in seeds]
    x = torch.cat(noise).to(device)  # float32: Euler steps add up small differences.
    x = backbone.pack(x if start == 1 else interpolate(guide.soft.to(x), x, start))
    velocity_of = ConditionedVelocity(decoder, condition.to(device, dtype), size, w, host)
    if shift is None:
        shift = decoder.served_shift(size, steps)
    times = (start * timesteps(steps, shift=shift)).tolist()
    decoder.prepare(times[:-1], on_layer=on_prepare)
    finite: list[torch.Tensor] = []
    for i, (now, after) in enumerate(pairwise(times)):
        t = torch.full((batch,), now)
        v = velocity_of(x.to(dtype), context, t)
        if guide is not None and guide.guided(now, i):
            clean = guide.correct(backbone.unpack(recover_clean(x, v, now), size), now)
            v = velocity_towards(x, backbone.pack(clean), now)
        if on_step is not None:
            on_step(i + 1, steps, codec.denormalize(backbone.unpack(recover_clean(x, v, now), size)))
        x = euler_step(x, v, now, after)
        # NaN and infinity survive in a sum. On a GPU it is read after the last step: reading it here would synchronise.
        finite.append(x.sum().isfinite())
        if x.device.type == "cpu":
            _require_finite(finite, dtype)
    _require_finite(finite, dtype)
    return codec.denormalize(backbone.unpack(x, size))


@torch.no_grad()
def pixels_of(
    codec: LatentCodec, latents: torch.Tensor, image: torch.Tensor | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Painted raw latents [B, C, h', w'] -> pixels [B, 3, H, W] float32 in -1..1, one by one, on the latents' device.

    Args:
        image, mask: see `canvas_of`; where the mask is 0, the image is returned bit for bit.

    Raises:
        ValueError: for latents that are not finite, and if the codec decodes finite ones to NaN or infinity.
    """
    if not is_finite(latents):
        raise ValueError("the latents hold NaN or infinity, and cannot become an image: paint them again")
    pixels = torch.cat([codec.decode(one) for one in latents.split(1)]).to(latents.device)
    if not is_finite(pixels):
        raise ValueError(
            "the autoencoder decodes the latents to NaN or infinity: load it in float32 (in ComfyUI: --fp32-vae), or "
            "use another one"
        )
    if image is None:
        return pixels
    image, mask = image.to(pixels), mask.to(pixels)
    return torch.where(mask == 0, image, mask * pixels + (1 - mask) * image)


def _check_condition(decoder: DistributionConditionedDecoder, condition: Condition) -> None:
    card = decoder.card
    if not same_codebook(card.codebook, condition.codebook):
        raise ValueError(
            f"this condition is of codebook {condition.codebook}, but the decoder was trained for {card.tokenizer} "
            f"({card.codebook}): use the tokenizer and VLM that it names"
        )
    if condition.code_vectors.shape[2] != card.code_dim:
        raise ValueError(
            f"the condition has {condition.code_vectors.shape[2]}-dimensional code vectors, the decoder reads "
            f"{card.code_dim}: use a condition of {card.tokenizer}"
        )


def _require_finite(finite: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
    """Refuses latents that are not finite, naming the first step after which they were not.

    Args:
        finite: whether the latents were finite, after each step.
        dtype: the decoder's compute dtype.
    """
    if bool(finite[-1]):
        return
    step = 1 + [bool(each) for each in torch.stack(list(finite)).tolist()].index(False)
    remedy = "its weights are damaged or of a training that diverged: use another bundle or base model"
    if dtype != torch.float32:
        remedy = f"it computes in {str(dtype).removeprefix('torch.')}: load it in float32; or else {remedy}"
    raise ValueError(f"the decoder's latents became NaN or infinite in step {step}: {remedy}")


def _doubt_of_student(
    decoder: DistributionConditionedDecoder,
    latent_size: tuple[int, int],
    steps: int | None,
    shift: float | None,
    start: float,
) -> str | None:
    """Why a student's images may be worse than its best; None at its own times, and for other decoders."""
    card, found = decoder.card, []
    if card.distilled is None:
        return None
    if steps not in (None, card.steps):
        found.append(f"{steps} steps")
    if shift not in (None, own := decoder.served_shift(latent_size, card.steps)):
        found.append(f"shift {shift:g}")
    if start != 1:
        found.append(f"start {start:g}")
    if not found:
        return None
    return (
        f"this decoder is a student that was made for {card.steps} steps from noise at shift {own:g}, and is to paint "
        f"with {', '.join(found)}: its images will be worse; leave that out, or use its teacher"
    )


def _check_seeds(seeds: Sequence[int], batch: int) -> None:
    if len(seeds) != batch:
        raise ValueError(f"got {len(seeds)} seeds for {batch} images: give one seed an image")


def check_part(image: torch.Tensor | None, mask: torch.Tensor | None, batch: int, size: tuple[int, int]) -> None:
    """Refuses an image or mask (see `canvas_of`) that does not fit `batch` images of this size (H, W).

    Raises:
        ValueError: naming what does not fit.
    """
    if (image is None) != (mask is None):
        raise ValueError("localised decoding needs an image and a mask: give both, or neither to paint everything")
    for name, value, channels in (("image", image, 3), ("mask", mask, 1)):
        if value is None:
            continue
        if not is_finite(value):
            raise ValueError(f"the {name} holds NaN or infinity: give one of finite numbers")
        if value.ndim != 4 or value.shape[0] not in (1, batch) or value.shape[1:] != (channels, *size):
            raise ValueError(
                f"the {name} is {list(value.shape)}, expected [{batch} or 1, {channels}, {size[0]}, {size[1]}]: "
                "resize it to the size that the tokens are painted at"
            )
