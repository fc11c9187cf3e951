"""Condition -> image: Euler steps of the decoder from noise to latents, and the autoencoder to pixels; tokens -> image.

Shapes: B batch, H W pixels, h' w' latent grid, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..method.flow import euler_step, recover_clean, resolution_shift, timesteps
from ..method.latents import fill_input, pack, pack_mask, scale_latents, unpack, unscale_latents
from ..method.sampling import keyed_generator
from ..models.backbones.flux_fill.inference import OnLayer
from ..models.decoder import DecoderCard, DistributionConditionedDecoder
from ..models.vae import Autoencoder
from ..models.vq import VQTokenizer
from ..types import Condition, TokenLogits, same_codebook
from .oom import in_parts

#: Called after every step with (steps done, steps, the picture's current estimate as raw latents [B, C, h', w']);
#: may raise to stop.
OnDecodeStep = Callable[[int, int, torch.Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Painted pictures.

    Attributes:
        pixels: [B, 3, H, W] float32 in -1..1; where a mask was 0, the given picture to the last bit.
        latents: [B, C, h', w'] float32, raw (before shift and scale), as the decoder left them.
    """

    pixels: torch.Tensor
    latents: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """What painting starts from.

    Attributes:
        given: [B or 1, C, h', w'] raw latents of what is kept; of grey where it is painted.
        area: [B or 1, 1, H, W], 1 where it is painted, 0 where it is kept.
    """

    given: torch.Tensor
    area: torch.Tensor

    def part(self, first: int, last: int) -> Canvas:
        """That of the pictures first..last - 1."""
        given, area = (x if len(x) == 1 else x[first:last] for x in (self.given, self.area))
        return Canvas(given=given, area=area)


def decode(
    decoder: DistributionConditionedDecoder,
    vae: Autoencoder,
    condition: Condition,
    *,
    seeds: Sequence[int],
    steps: int | None = None,
    shift: float | None = None,
    image: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    on_step: OnDecodeStep | None = None,
) -> Decoded:
    """Paints the pictures of a condition (Eqs. 17-25): `canvas_of`, `paint` and `pixels_of`, see these.

    Where a batch runs out of memory, it is painted in smaller parts, with the same result; `on_step` is then called for
    each of them from the first step on.

    Raises:
        ValueError: for what one of the three refuses.
        RuntimeError: if a single picture does not fit into memory.
    """
    batch = len(condition.code_vectors)
    _check_seeds(seeds, batch)
    canvas = canvas_of(vae, decoder.card, condition, image, mask)

    def run(first: int, last: int) -> torch.Tensor:
        return paint(
            decoder,
            condition.part(first, last),
            canvas.part(first, last),
            seeds=seeds[first:last],
            steps=steps,
            shift=shift,
            on_step=on_step,
        )

    latents = torch.cat(in_parts(run, batch))
    return Decoded(pixels=pixels_of(vae, latents, image, mask), latents=latents)


def decode_tokens(vq: VQTokenizer, token_logits: TokenLogits) -> torch.Tensor:
    """`vq.decode_tokens`, the VLM's own pictures [B, 3, H, W] in -1..1; in smaller parts where memory runs out.

    Raises:
        RuntimeError: if a single picture does not fit into memory.
    """
    tokens, grid = token_logits.tokens, token_logits.grid
    return torch.cat(in_parts(lambda first, last: vq.decode_tokens(tokens[first:last], grid), len(tokens)))


@torch.no_grad()
def canvas_of(
    vae: Autoencoder,
    card: DecoderCard,
    condition: Condition,
    image: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> Canvas:
    """The canvas for the pictures of a condition, encoded one by one; an empty one where no image is given.

    Args:
        condition: of B pictures on an (h, w) grid, painted at `card.painted_size`.
        image, mask: for localised decoding, both or neither: [B or 1, 3, H, W] in -1..1, and [B or 1, 1, H, W] in 0..1
            where 0 is kept, 1 is painted, and anything between is painted and blended.

    Raises:
        ValueError: for another tokenizer's condition, and for image and mask that do not fit.
    """
    height, width = card.painted_size(condition.grid)
    _check_condition(card, condition)
    _check_part(image, mask, len(condition.code_vectors), (height, width))
    if image is None:
        return Canvas(given=vae.encode(torch.zeros(1, 3, height, width)), area=torch.ones(1, 1, height, width))
    area = (mask > 0).float()
    kept = image.float() * (1 - area.to(image.device))
    return Canvas(given=torch.cat([vae.encode(one) for one in kept.split(1)]), area=area)


@torch.no_grad()
def paint(
    decoder: DistributionConditionedDecoder,
    condition: Condition,
    canvas: Canvas,
    *,
    seeds: Sequence[int],
    steps: int | None = None,
    shift: float | None = None,
    on_step: OnDecodeStep | None = None,
    on_prepare: OnLayer | None = None,
) -> torch.Tensor:
    """Euler steps from noise to raw latents [B, C, h', w'] float32 (before shift and scale).

    Args:
        seeds: one whole number a picture; a batch equals its singles.
        steps: Euler steps; the bundle's own number by default.
        shift: mu of the time shift; the bundle's own by default, and where it has none FLUX's by resolution.
        on_prepare: called with (layers read, layers) while a new schedule is prepared; may raise to stop.

    Raises:
        ValueError: for another tokenizer's condition, and a wrong number of seeds.
    """
    card, batch = decoder.card, len(condition.code_vectors)
    _check_condition(card, condition)
    _check_seeds(seeds, batch)
    device, dtype = decoder.device, decoder.dtype
    size = canvas.given.shape[2:]
    steps = card.steps if steps is None else steps

    given = pack(scale_latents(canvas.given.to(device), card.vae_shift, card.vae_scale)).to(dtype)
    area_tokens = pack_mask(canvas.area.to(device, dtype), card.vae_factor)
    channels = decoder.transformer.out_channels // 4
    noise = [torch.randn(1, channels, *size, generator=keyed_generator(seed)) for seed in seeds]
    x = pack(torch.cat(noise)).to(device)  # float32: Euler steps add up small differences.
    fused = decoder.condition_tokens(condition.to(device, dtype), size)
    if shift is None:
        shift = resolution_shift(x.shape[1]) if card.shift is None else card.shift
    times = timesteps(steps, shift=shift).tolist()
    decoder.prepare(times[:-1], on_layer=on_prepare)
    for i, (now, after) in enumerate(pairwise(times)):
        t = torch.full((batch,), now)
        v = decoder(fill_input(x.to(dtype), given, area_tokens), fused, t, size).float()
        if on_step is not None:
            estimate = unpack(recover_clean(x, v, now), *size)
            on_step(i + 1, steps, unscale_latents(estimate, card.vae_shift, card.vae_scale))
        x = euler_step(x, v, now, after)
    return unscale_latents(unpack(x, *size), card.vae_shift, card.vae_scale)


@torch.no_grad()
def pixels_of(
    vae: Autoencoder, latents: torch.Tensor, image: torch.Tensor | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Painted latents [B, C, h', w'] -> pixels [B, 3, H, W] float32 in -1..1, decoded one by one, on their device.

    Args:
        image, mask: see `canvas_of`; where the mask is 0, the image comes back to the last bit.
    """
    pixels = torch.cat([vae.decode(one) for one in latents.split(1)]).to(latents.device)
    if image is None:
        return pixels
    image, mask = image.to(pixels), mask.to(pixels)
    return torch.where(mask == 0, image, mask * pixels + (1 - mask) * image)


def _check_condition(card: DecoderCard, condition: Condition) -> None:
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


def _check_seeds(seeds: Sequence[int], batch: int) -> None:
    if len(seeds) != batch:
        raise ValueError(f"got {len(seeds)} seeds for {batch} pictures: give one a picture")


def _check_part(image: torch.Tensor | None, mask: torch.Tensor | None, batch: int, size: tuple[int, int]) -> None:
    if (image is None) != (mask is None):
        raise ValueError("localised decoding needs an image and a mask: give both, or neither to paint everything")
    for name, value, channels in (("image", image, 3), ("mask", mask, 1)):
        if value is None:
            continue
        if value.ndim != 4 or value.shape[0] not in (1, batch) or value.shape[1:] != (channels, *size):
            raise ValueError(
                f"the {name} is {list(value.shape)}, expected [{batch} or 1, {channels}, {size[0]}, {size[1]}]: "
                "resize it to the picture that the tokens paint"
            )
