"""Applies a latent decoder tile by tile, forward and backward, in the memory of one tile.

Neighbouring tiles overlap by a quarter of their side, and the weight of each falls linearly towards its inner edges.
The weights of a pixel add up to 1.

Shapes: h' w' latent grid, C latent channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

#: Normalised latents [B, C, h', w'] -> pixels [B, 3, H, W] in -1..1, differentiable.
Decode = Callable[[torch.Tensor], torch.Tensor]

#: The side of the smallest tile that overlaps its neighbours, in latent positions.
LEAST_TILE = 4


@torch.no_grad()
def decode_in_tiles(decode: Decode, latents: torch.Tensor, tile: int | None) -> torch.Tensor:
    """Latents [1, C, h', w'] -> pixels [1, 3, H, W] float32, without gradients.

    Args:
        tile: side of a tile in latent positions, at least `LEAST_TILE`; None, or a tile that covers everything, decodes
            everything at once.
    """
    if _covers(tile, latents):
        return decode(latents).float()
    image = None
    for part, share in _parts(latents, tile):
        pixels = decode(latents[part]).float()
        factor = pixels.shape[2] // latents[part].shape[2]
        if image is None:
            image = pixels.new_zeros(1, pixels.shape[1], *(side * factor for side in latents.shape[2:]))
        image[_scaled(part, factor)] += share(factor).to(pixels.device) * pixels
    return image


def gradient_at_once(
    decode: Decode, latents: torch.Tensor, gradient_of: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """dL/dlatents [1, C, h', w'] in a single pass of the decoder, which holds all its activations.

    Args:
        gradient_of: pixels [1, 3, H, W] float32 -> dL/dpixels.
    """
    with torch.enable_grad():
        x = latents.detach().clone().requires_grad_()
        pixels = decode(x).float()
        (gradient,) = torch.autograd.grad(pixels, x, gradient_of(pixels.detach()))
    return gradient


def gradient_in_tiles(decode: Decode, latents: torch.Tensor, by_pixels: torch.Tensor, tile: int | None) -> torch.Tensor:
    """dL/dlatents [1, C, h', w'] from dL/dpixels [1, 3, H, W]: the vector-Jacobian product of `decode_in_tiles`.

    Args:
        by_pixels: dL/dpixels, float32.
        tile: as in `decode_in_tiles`.
    """
    if _covers(tile, latents):
        return gradient_at_once(decode, latents, lambda _: by_pixels)
    factor = by_pixels.shape[2] // latents.shape[2]
    gradient = torch.zeros_like(latents)
    for part, share in _parts(latents, tile):
        weighted = share(factor).to(by_pixels.device) * by_pixels[_scaled(part, factor)]
        gradient[part] += gradient_at_once(decode, latents[part], lambda _, weighted=weighted: weighted)
    return gradient


def _covers(tile: int | None, latents: torch.Tensor) -> bool:
    return tile is None or tile >= max(latents.shape[2:])


Part = tuple[slice, slice, slice, slice]


def _parts(latents: torch.Tensor, tile: int) -> Iterator[tuple[Part, Callable[[int], torch.Tensor]]]:
    """Yields each tile of the latents, and a function from pixels per latent position to its pixel weights [h, w]."""
    rows, columns = (_axis(side, tile) for side in latents.shape[2:])
    everything = slice(None)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):

            def share(factor: int, i: int = i, j: int = j) -> torch.Tensor:
                return torch.outer(_shares(rows, factor)[i], _shares(columns, factor)[j])

            yield (everything, everything, row, column), share


def _axis(side: int, tile: int) -> list[slice]:
    """Tiles of equal size along an axis, covering it from end to end."""
    if tile >= side:
        return [slice(0, side)]
    overlap = tile // 4
    count = math.ceil((side - overlap) / (tile - overlap))
    starts = (round(i * (side - tile) / (count - 1)) for i in range(count))
    return [slice(start, start + tile) for start in starts]


def _shares(tiles: list[slice], factor: int) -> list[torch.Tensor]:
    """The weight of each tile at each of its pixels, along one axis; where tiles overlap, the weights add up to 1."""
    length, side = (tiles[0].stop - tiles[0].start) * factor, tiles[-1].stop * factor
    overlap = max(1, length // factor // 4) * factor
    ramp = ((torch.arange(length) + 0.5) / overlap).clamp(max=1)
    weights = []
    for k in range(len(tiles)):
        weight = torch.ones(length)
        if k > 0:
            weight = weight * ramp
        if k < len(tiles) - 1:
            weight = weight * ramp.flip(0)
        weights.append(weight)
    total = torch.zeros(side)
    for tile, weight in zip(tiles, weights):
        total[_times(tile, factor)] += weight
    return [weight / total[_times(tile, factor)] for tile, weight in zip(tiles, weights)]


def _times(part: slice, factor: int) -> slice:
    return part if part.start is None else slice(part.start * factor, part.stop * factor)


def _scaled(part: Part, factor: int) -> Part:
    images, channels, rows, columns = part
    return images, channels, _times(rows, factor), _times(columns, factor)
