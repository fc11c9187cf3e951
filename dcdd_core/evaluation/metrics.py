"""Image fidelity metrics, one value per image.

Shapes: B batch, H x W pixels.
"""

from __future__ import annotations

import torch
from einops import rearrange
from skimage.metrics import structural_similarity


def psnr(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(2^2 / MSE): pixels [B, 3, H, W] in -1..1 -> [B] float64 on the CPU.

    Equal images give infinity.
    """
    a, b = (x.cpu().double() for x in (first, second))  # MPS has no float64
    return 10 * torch.log10(4.0 / (a - b).square().mean(dim=(1, 2, 3)))


def ssim(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004) of pixels [B, 3, H, W] in -1..1 -> [B], at most 1.

    scikit-image's, with a uniform 7-pixel window, averaged over channels, of intensities 0..1: its luminance term
    compares means, and is not the same for intensities around 0.
    """
    a, b = (rearrange((x.float() + 1) / 2, "b c h w -> b h w c").cpu().numpy() for x in (first, second))
    return torch.tensor(
        [structural_similarity(p, q, channel_axis=2, data_range=1.0) for p, q in zip(a, b, strict=True)]
    )
