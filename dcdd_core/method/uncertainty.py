"""From uncertainty features to masks, and from masks in pixels to tokens.

Shapes: B batch, N = h w tokens in row-major order, H W pixels. Masks are float32 in 0..1, 1 for selected.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from skimage.filters import gaussian

Feature = Literal["confidence", "margin", "head_mass", "tail_entropy"]
"""The uncertainty features of Eq. 8, in their order."""
FEATURES: tuple[Feature, ...] = get_args(Feature)


def doubt_map(uncertainty: torch.Tensor, feature: Feature, grid: tuple[int, int]) -> torch.Tensor:
    """One uncertainty feature (Eq. 8) as a map in which 1 always means unsure.

    This is 1 - p(1), 1 - (p(1) - p(2)), 1 - (mass of the top k), or H_tail itself.

    Args:
        uncertainty: u [B, N, 4].
        grid: (h, w).

    Returns:
        [B, 1, h, w] float32 in 0..1.

    Raises:
        ValueError: for an unknown feature, or features that do not fill the grid.
    """
    if feature not in FEATURES:
        raise ValueError(f"feature must be one of {', '.join(FEATURES)}, got {feature!r}")
    h, w = grid
    if uncertainty.ndim != 3 or uncertainty.shape[1:] != (h * w, len(FEATURES)):
        raise ValueError(
            f"expected features [B, {h * w}, {len(FEATURES)}] of a {h} x {w} grid, got {list(uncertainty.shape)}"
        )
    chosen = uncertainty[..., FEATURES.index(feature)]
    return rearrange(chosen if feature == "tail_entropy" else 1 - chosen, "b (h w) -> b 1 h w", h=h).float()


def threshold_doubt(doubt: torch.Tensor, threshold: float, *, soft: bool = False) -> torch.Tensor:
    """1 (with `soft`, the doubt itself) where the doubt exceeds the threshold, else 0: of the same shape."""
    above = (doubt > threshold).float()
    return above * doubt if soft else above


def grow_mask(mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """Grey dilation of [B, 1, h, w] by a square of 2 |tokens| + 1 cells a side, erosion for a negative number.

    The square is cut off at the border of the grid: nothing outside counts.
    """
    if tokens < 0:
        return -grow_mask(-mask, -tokens)
    return F.max_pool2d(mask, 2 * tokens + 1, stride=1, padding=tokens)


def mask_to_pixels(mask: torch.Tensor, size: tuple[int, int], *, blur: float = 0.0) -> torch.Tensor:
    """A mask on the token grid [B, 1, h, w] -> [B, 1, H, W] by nearest neighbour, then blurred.

    It covers the centre crop with the grid's aspect ratio, which is what the tokens are of; the rest is 0.

    Args:
        size: (H, W).
        blur: standard deviation of the Gaussian in tokens; in pixels it scales with the sides of a token.
            A blurred mask is on the CPU.
    """
    h, w = mask.shape[2:]
    height, width = inner = area_of_tokens(size, (h, w))
    pixels = F.interpolate(mask, size=inner, mode="nearest")
    if blur:
        sigma = (0, blur * height / h, blur * width / w)
        pixels = torch.from_numpy(gaussian(pixels.squeeze(1).cpu().numpy(), sigma=sigma)).unsqueeze(1)
    return surrounded(pixels, size, 0.0)


def area_of_tokens(size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the centre crop of an image (H, W) that has the aspect ratio of a grid (h, w)."""
    top, left = _margins(size, grid)
    return size[0] - 2 * top, size[1] - 2 * left


def surrounded(pixels: torch.Tensor, size: tuple[int, int], value: float) -> torch.Tensor:
    """[B, C, H', W'] in the middle of [B, C, H, W] of a value: the inverse of a centre crop.

    Args:
        size: (H, W), larger by even numbers.
    """
    top, left = ((outer - own) // 2 for outer, own in zip(size, pixels.shape[2:]))
    return F.pad(pixels, (left, left, top, top), value=value)


def tokens_under_mask(mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Which tokens have any pixel under the mask (above 0.5), bool [B, N].

    A mask whose aspect ratio differs from the grid's is centre-cropped, as the image is before it is encoded.

    Args:
        mask: [B, 1, H, W].
        grid: (h, w); if H, W are not multiples of h, w, a pixel at a border counts for both tokens.
    """
    return F.adaptive_max_pool2d(crop_to_aspect(mask, *grid), grid).flatten(1) > 0.5


def crop_to_aspect(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The largest centre crop of [B, C, H, W] with the aspect ratio height : width (to a pixel, and at least one)."""
    h, w = pixels.shape[2:]
    top, left = _margins((h, w), (height, width))
    return pixels[:, :, top : h - top, left : w - left]


def _margins(size: tuple[int, int], aspect: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that the largest centre crop with this aspect ratio leaves out, on each side."""
    (h, w), (height, width) = size, aspect
    kept = min(h, w * height / width), min(w, h * width / height)
    top, left = (min(round((side - part) / 2), (side - 1) // 2) for side, part in zip(size, kept))
    return top, left
