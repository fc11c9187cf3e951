"""Reconstruction loss of the tokenizer and the autoencoder, and the held-out metrics that their trainings log."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F

from dcdd_core.evaluation.metrics import psnr, ssim

from .reader import SceneReader


def reconstruction_loss(
    pixels: torch.Tensor,
    decoded: torch.Tensor,
    loss_reader: SceneReader,
    autocast: Callable[[], AbstractContextManager],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L1 + MSE + L1 of 8 x 8 means + 0.5 L1 of image gradients + 0.05 perceptual distance.

    The 8 x 8 means carry colour. Without them it is learned last, since group norms remove a channel's mean.

    Args:
        pixels, decoded: [B, 3, H, W] in -1..1.
        loss_reader: network of the perceptual distance, which runs under `autocast`.

    Returns:
        The loss; and its parts, detached, for the log.
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
    """PSNR (dB), SSIM and the loss reader's perceptual distance; means over images [B, 3, H, W] in -1..1."""
    return {
        "psnr": float(psnr(pixels, decoded).mean()),
        "ssim": float(ssim(pixels, decoded).mean()),
        "perceptual": float(loss_reader.perceptual_distance(pixels, decoded).mean()),
    }
