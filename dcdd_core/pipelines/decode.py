"""Condition -> image: Euler steps of the decoder from noise to latents, and the autoencoder to pixels.

Shapes: B batch, H W pixels, h' w' latent grid, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..method.flow import euler_step, recover_clean, timesteps
from ..method.latents import fill_input, pack, pack_mask, scale_latents, unpack, unscale_latents
from ..method.sampling import keyed_generator
from ..models.flux import DistributionConditionedDecoder
from ..models.flux_inference import OnLayer
from ..models.vae import Autoencoder
from ..types import Condition, same_codebook

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


@torch.no_grad()
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
    on_prepare: OnLayer | None = None,
) -> Decoded:
    """Paints the pictures of a condition (Eqs. 17-25).

    Args:
        condition: of B pictures on an (h, w) grid, painted at `decoder.card.painted_size`.
        seeds: one whole number a picture; a batch equals its singles.
        steps: Euler steps; the bundle's own number by default.
        shift: mu of the time shift; FLUX's resolution-dependent one by default.
        image, mask: for localised decoding, both or neither: [B or 1, 3, H, W] in -1..1, and [B or 1, 1, H, W] in 0..1
            where 0 is kept, 1 is painted, and anything between is painted and blended.
        on_prepare: called with (layers read, layers) while a new schedule is prepared; may raise to stop.

    Raises:
        ValueError: for another tokenizer's condition, a wrong number of seeds, or image and mask that do not fit.
    """
    card = decoder.card
    batch, (height, width) = len(condition.code_vectors), card.painted_size(condition.grid)
    _check(decoder, condition, seeds, image, mask, (height, width))
    device, dtype = decoder.device, decoder.dtype
    size = (height // card.vae_factor, width // card.vae_factor)
    steps = card.steps if steps is None else steps

    if image is None:
        canvas, area = torch.zeros(1, 3, height, width, device=device), torch.ones(1, 1, height, width, device=device)
    else:
        canvas, mask = image.to(device).float(), mask.to(device).float()
        area = (mask > 0).float()
    given = vae.encode(canvas * (1 - area)).to(device)
    given = pack(scale_latents(given, card.vae_shift, card.vae_scale)).to(dtype)
    area_tokens = pack_mask(area.to(device, dtype), card.vae_factor)

    channels = decoder.transformer.out_channels // 4
    noise = [torch.randn(1, channels, *size, generator=keyed_generator(seed)) for seed in seeds]
    x = pack(torch.cat(noise)).to(device)  # float32: Euler steps add up small differences.
    fused = decoder.condition_tokens(condition.to(device, dtype), size)
    times = timesteps(steps, **({"image_tokens": x.shape[1]} if shift is None else {"shift": shift})).tolist()
    decoder.prepare(times[:-1], on_layer=on_prepare)
    for i, (now, after) in enumerate(pairwise(times)):
        t = torch.full((batch,), now)
        v = decoder(fill_input(x.to(dtype), given, area_tokens), fused, t, size).float()
        if on_step is not None:
            estimate = unpack(recover_clean(x, v, now), *size)
            on_step(i + 1, steps, unscale_latents(estimate, card.vae_shift, card.vae_scale))
        x = euler_step(x, v, now, after)
    latents = unscale_latents(unpack(x, *size), card.vae_shift, card.vae_scale)
    pixels = vae.decode(latents).to(device)
    if image is not None:
        pixels = torch.where(mask == 0, canvas, mask * pixels + (1 - mask) * canvas)
    return Decoded(pixels=pixels, latents=latents)


def _check(decoder, condition, seeds, image, mask, size) -> None:
    card, batch = decoder.card, len(condition.code_vectors)
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
    if len(seeds) != batch:
        raise ValueError(f"got {len(seeds)} seeds for {batch} pictures: give one a picture")
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
