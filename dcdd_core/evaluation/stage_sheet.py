"""A contact sheet of a progressive sampler's passes: the image so far, and what each pass revealed and rewrote.

Shapes: B batch, N tokens (a row-major h x w grid), H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from einops import rearrange, repeat
from PIL import Image

from ..method.progressive import Stage
from .figures import labelled_grid

REVEALED, CHANGED = (0.2, 0.75, 0.35), (0.95, 0.35, 0.1)
"""Green for new positions, orange for rewritten ones; 0..1, sRGB."""
_HIDDEN = -0.55
"""Pixel value of a hidden position, in -1..1: a dark grey."""
_COLUMNS = 12
"""Passes side by side; further ones go into rows below."""


def stage_sheet(
    stages: Sequence[Stage],
    decode: Callable[[torch.Tensor], torch.Tensor],
    grid: tuple[int, int],
    *,
    row: int = 0,
    title: str = "",
    side: int = 160,
) -> Image.Image:
    """One column per pass: the image with hidden positions in grey, and below it the same with changes in colour.

    After 12 passes the sheet continues below. All sheets of a batch have the same size.

    Args:
        decode: tokens [B, N] -> pixels [B, 3, H, W] in -1..1, such as `ImageTokenizer.decode_tokens`.
        row: index of the image in the batch.
        side: height in pixels of each image.

    Raises:
        ValueError: if there is no pass.
    """
    title = " ".join(title.split())  # a single line
    if not stages:
        raise ValueError("there are no passes to show: this edit changed nothing")
    tokens = torch.stack([nearest_known(stage.tokens[row], stage.known[row], grid) for stage in stages])
    flags = [torch.stack([getattr(stage, name)[row] for stage in stages]) for name in ("known", "revealed", "changed")]
    pixels = decode(tokens).cpu()
    known, revealed, changed = (_as_pixels(flag, grid, pixels.shape[2:]) for flag in flags)
    images = torch.where(known, pixels, _HIDDEN)
    marked = images.clone()
    for where, colour in ((revealed, REVEALED), (changed, CHANGED)):
        tint = torch.tensor(colour)[:, None, None] * 2 - 1
        marked = torch.where(where, 0.45 * images + 0.55 * tint, marked)
    counts = [(int(new.sum()), int(old.sum())) for new, old in zip(*flags[1:])]
    names = [f"{number}: +{new}, {old} rewritten" for number, (new, old) in enumerate(counts, start=1)]
    return _below(
        labelled_grid(
            [list(row[first : first + _COLUMNS]) for row in (images, marked)],
            columns=names[first : first + _COLUMNS],
            captions=["the image after each pass; what is hidden is grey", "green: revealed, orange: rewritten"],
            title="" if first else title,
            side=side,
        )
        for first in range(0, len(names), _COLUMNS)
    )


def _below(strips: Iterable[Image.Image]) -> Image.Image:
    """Strips from top to bottom; the first is the widest."""
    first, *others = strips
    sheet = Image.new("RGB", (first.width, first.height + sum(s.height for s in others)), first.getpixel((0, 0)))
    top = 0
    for strip in (first, *others):
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def nearest_known(tokens: torch.Tensor, known: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Tokens [N] with each hidden one replaced by the nearest known token, since a decoder mixes neighbours.

    Without any known token, all are 0.
    """
    if not bool(known.any()):
        return torch.zeros_like(tokens)
    places = torch.cartesian_prod(*(torch.arange(float(side)) for side in grid))
    nearest = torch.cdist(places, places[known]).argmin(dim=1)
    return torch.where(known, tokens, tokens[known][nearest])


def _as_pixels(flags: torch.Tensor, grid: tuple[int, int], size: Sequence[int]) -> torch.Tensor:
    """Flags of P passes on the pixels: bool [P, N] -> [P, 1, H, W]."""
    fields = rearrange(flags, "p (h w) -> p 1 h w", h=grid[0])
    return repeat(fields, "p c h w -> p c (h a) (w b)", a=size[0] // grid[0], b=size[1] // grid[1])
