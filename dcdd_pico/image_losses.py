"""Reconstruction loss of the tokenizer and the autoencoder, and the held-out metrics logged in their trainings.

Shapes: B batch, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F

from dcdd_core.evaluation.metrics import psnr, ssim

from .reader import SceneReader

#: Channels of a grey pixel differ by at most the first, neighbours across an edge by more than the second; in -1..1.
_GREY, _STEP = 0.05, 0.2
#: Pixels within this distance of an edge count as beside it.
_REACH = 4


def reconstruction_loss(
    pixels: torch.Tensor,
    decoded: torch.Tensor,
    loss_reader: SceneReader,
    autocast: Callable[[], AbstractContextManager],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L1 + MSE + L1 of 8 x 8 means + 0.5 L1 of image gradients + 0.05 perceptual distance.

    The 8 x 8 means carry colour. Without them colour is learned last, since group norms remove a channel's mean.

    Args:
        pixels, decoded: [B, 3, H, W] in -1..1.
        loss_reader: network of the perceptual distance, run under `autocast`.

    Returns:
        The loss, and its detached parts for the log.
    """
    l1 = (decoded - pixels).abs().mean()
    squared = (decoded - pixels).square().mean()
    tones = (F.avg_pool2d(decoded, 8) - F.avg_pool2d(pixels, 8)).abs().mean()
    edges = sum((decoded.diff(dim=d) - pixels.diff(dim=d)).abs().mean() for d in (2, 3))
    with autocast():
        perceptual = loss_reader.perceptual_distance(pixels, decoded).mean()
    parts = {"l1": l1.detach(), "tones": tones.detach(), "edges": edges.detach(), "perceptual": perceptual.detach()}
    return l1 + squared + tones + 0.5 * edges + 0.05 * perceptual, parts


@torch.no_grad()
def fidelity(pixels: torch.Tensor, decoded: torch.Tensor, loss_reader: SceneReader) -> dict[str, float]:
    """PSNR (dB), SSIM and the loss reader's perceptual distance, averaged over images [B, 3, H, W] in -1..1."""
    return {
        "psnr": float(psnr(pixels, decoded).mean()),
        "ssim": float(ssim(pixels, decoded).mean()),
        "perceptual": float(loss_reader.perceptual_distance(pixels, decoded).mean()),
    }


@torch.no_grad()
def blemishes(pixels: torch.Tensor, decoded: torch.Tensor) -> dict[str, float]:
    """Visible defects of decoded images: colour in greys, and halos beside edges.

    "tint of greys" is the mean absolute change of chroma (a channel minus the mean of the three) over pixels that are
    grey in the original. "beside edges" and "elsewhere" are mean absolute errors over pixels that resemble their four
    neighbours in the original: up to four pixels from one that does not, and farther. Halos raise "beside edges".

    Args:
        pixels, decoded: [B, 3, H, W] in -1..1.

    Returns:
        The three numbers; 0 for one whose pixels do not occur.
    """
    error = decoded - pixels
    grey = pixels.amax(1) - pixels.amin(1) <= _GREY
    tint = (error - error.mean(1, keepdim=True)).abs().mean(1)
    edge = torch.zeros_like(grey)
    for d in (1, 2):
        step = (pixels.diff(dim=d + 1).abs() > _STEP).any(1)
        edge.narrow(d, 0, step.shape[d]).logical_or_(step)
        edge.narrow(d, 1, step.shape[d]).logical_or_(step)
    near = F.max_pool2d(edge.float(), 2 * _REACH + 1, stride=1, padding=_REACH) > 0
    size = error.abs().mean(1)

    def mean(values: torch.Tensor, where: torch.Tensor) -> float:
        return float(values[where].mean()) if where.any() else 0.0

    return {
        "tint of greys": mean(tint, grey),
        "beside edges": mean(size, near & ~edge),
        "elsewhere": mean(size, ~near),
    }
