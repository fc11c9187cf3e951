"""FLUX's latents: VAE scaling, 2x2 packing, position ids, and FLUX.1-Fill's input.

Shapes: B batch, C latent channels, h w latent grid (even), H W pixels, f the VAE's factor (H = f h),
N = h w / 4 tokens.
"""

from __future__ import annotations

import torch
from einops import rearrange


def scale_latents(latents: torch.Tensor, shift: float, scale: float) -> torch.Tensor:
    """Raw VAE latents -> the transformer's latents: (z - shift) scale."""
    return (latents - shift) * scale


def unscale_latents(latents: torch.Tensor, shift: float, scale: float) -> torch.Tensor:
    """The transformer's latents -> raw VAE latents: z / scale + shift."""
    return latents / scale + shift


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] -> tokens [B, N, 4 C], channels in diffusers' order (c, row, column of the 2x2 patch).

    Raises:
        ValueError: for another shape, or an odd side.
    """
    if latents.ndim != 4:
        raise ValueError(f"expected latents [B, C, h, w], got {list(latents.shape)}")
    _check_even(*latents.shape[2:])
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Tokens [B, N, 4 C] -> [B, C, h, w], with (h, w) = (height, width) of the latent grid.

    Raises:
        ValueError: for an odd side, or if N, C do not fit.
    """
    _check_even(height, width)
    if tokens.ndim != 3 or tokens.shape[1] != height * width // 4 or tokens.shape[2] % 4:
        raise ValueError(
            f"{list(tokens.shape)} does not unpack to {height} x {width} latents: "
            f"expected [B, {height * width // 4}, 4 C]"
        )
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height // 2, p=2, q=2)


def position_ids(
    height: int, width: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """FLUX's image ids [N, 3], rows (0, y, x) of the packed tokens of an h x w = height x width latent.

    Raises:
        ValueError: for an odd side.
    """
    _check_even(height, width)
    y, x = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    return rearrange([torch.zeros_like(y), y, x], "i h w -> (h w) i").to(device=device, dtype=dtype)


def pack_mask(mask: torch.Tensor, factor: int) -> torch.Tensor:
    """A pixel mask [B, 1, H, W] (1: paint) -> [B, N, 4 f^2]: the f x f pixels of each latent position as its channels.

    Args:
        factor: f, 8 for FLUX's VAE.

    Raises:
        ValueError: for another shape, and unless H and W are multiples of 2 f.
    """
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError(f"expected a mask [B, 1, H, W], got {list(mask.shape)}")
    if mask.shape[2] % (2 * factor) or mask.shape[3] % (2 * factor) or mask.numel() == 0:
        raise ValueError(
            f"a mask of {mask.shape[2]} x {mask.shape[3]} pixels does not divide into patches of {2 * factor} x "
            f"{2 * factor}: pad or resize it, and its image, to a multiple of that"
        )
    return pack(rearrange(mask, "b 1 (h f) (w g) -> b (f g) h w", f=factor, g=factor))


def fill_context(masked_image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What FLUX.1-Fill sees of an image besides the noisy latent: [B, N, 4 C + 4 f^2], 320 channels for FLUX.

    Args:
        masked_image: packed, scaled latents of the masked image, [B or 1, N, 4 C]; sets the device and dtype.
        mask: from `pack_mask`, [B or 1, N, 4 f^2].

    Raises:
        ValueError: for shapes that do not fit.
    """
    batch = max(len(masked_image), len(mask))
    if masked_image.ndim != 3 or not _fits(mask, batch, masked_image.shape[1]) or len(masked_image) not in (1, batch):
        raise ValueError(
            f"masked image {list(masked_image.shape)} and mask {list(mask.shape)} do not fit: expected packed "
            "[B or 1, N, 4 C] and [B or 1, N, 4 f^2]"
        )
    return torch.cat([t.to(masked_image).expand(batch, -1, -1) for t in (masked_image, mask)], dim=-1)


def fill_input(noised: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """FLUX.1-Fill's input, concat(noised, masked image, mask): [B, N, 4 C + 4 C + 4 f^2], 384 channels for FLUX.

    Args:
        noised: packed noisy latents [B, N, 4 C]; sets the device and dtype.
        context: from `fill_context`, [B or 1, N, 4 C + 4 f^2].

    Raises:
        ValueError: for shapes that do not fit.
    """
    if noised.ndim != 3 or not _fits(context, len(noised), noised.shape[1]) or context.shape[2] <= noised.shape[2]:
        raise ValueError(
            f"noised {list(noised.shape)} and context {list(context.shape)} do not fit: expected packed [B, N, 4 C] "
            "and [B or 1, N, 4 C + 4 f^2]"
        )
    return torch.cat([noised, context.to(noised).expand(len(noised), -1, -1)], dim=-1)


def _fits(tokens: torch.Tensor, batch: int, count: int) -> bool:
    return tokens.ndim == 3 and tokens.shape[0] in (1, batch) and tokens.shape[1] == count


def _check_even(height: int, width: int) -> None:
    if height < 2 or width < 2 or height % 2 or width % 2:
        raise ValueError(
            f"a latent grid needs even sides to be packed 2 x 2, got {height} x {width}: crop or pad the image"
        )
