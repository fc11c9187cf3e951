"""The adapter: a condition on the token grid -> one vector for every packed latent token (Eqs. 19-22).

Shapes: B batch, h w token grid, h' w' latent grid, p latents per side of a packed token, D code dimension, C adapter
width, M inner width of the transformer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..types import Condition


class NullCondition(nn.Module):
    """Stands for "no condition": one learned token [M], the same at every position."""

    def __init__(self, token: nn.Parameter, patch: int):
        super().__init__()
        self.token = token
        self.patch = patch

    def forward(self, condition: Condition, latent_size: tuple[int, int]) -> torch.Tensor:
        """The tokens [B, h' w' / p^2, M]; only the number of images of the condition matters."""
        length = (latent_size[0] // self.patch) * (latent_size[1] // self.patch)
        return self.token.expand(len(condition.code_vectors), length, -1)


class ConditionEncoder(nn.Module):
    """C_map = concat(SiLU(GroupNorm(Conv(W c))), upsample(u)), then a linear map of its patches.

    The last map starts at zero, so an untrained adapter leaves the base model exactly as it was.

    Args:
        code_dim: D.
        width: C, a multiple of 8.
        inner: M, the width of the transformer's tokens.
        patch: p, latents per side of one of the transformer's tokens.
        null: whether to have a null condition.

    Attributes:
        null: replaces a condition that is dropped; None for an adapter that was not trained with dropped conditions.
    """

    def __init__(self, code_dim: int, width: int, inner: int, *, patch: int = 2, null: bool = False):
        super().__init__()
        self.project = nn.Linear(code_dim, width)
        self.refine = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)
        self.patch = patch
        self.fuse = nn.Linear(patch**2 * (width + 4), inner)
        nn.init.zeros_(self.fuse.weight)
        nn.init.zeros_(self.fuse.bias)
        self.null: NullCondition | None = None
        self.keep_null(null)

    def keep_null(self, wanted: bool) -> None:
        """If wanted, keeps the null condition or adds one of zeros, which changes nothing; otherwise removes it."""
        if not wanted:
            self.null = None
        elif self.null is None:
            self.null = NullCondition(nn.Parameter(torch.zeros_like(self.fuse.bias)), self.patch)

    def forward(self, condition: Condition, latent_size: tuple[int, int]) -> torch.Tensor:
        """Condition on an (h, w) grid and latent size (h', w'), multiples of p -> [B, h' w' / p^2, M].

        Code vectors are upsampled to the latent grid by nearest neighbour (the convolution after it smooths them),
        uncertainty features bilinearly.
        """
        h, _ = condition.grid
        dtype = self.project.weight.dtype
        codes = rearrange(self.project(condition.code_vectors.to(dtype)), "b (h w) c -> b c h w", h=h)
        codes = F.interpolate(codes, size=latent_size, mode="nearest")
        codes = F.silu(self.norm(self.refine(codes)))
        uncertainty = rearrange(condition.uncertainty.to(dtype), "b (h w) u -> b u h w", h=h)
        uncertainty = F.interpolate(uncertainty, size=latent_size, mode="bilinear", align_corners=False)
        condition_map = torch.cat([codes, uncertainty], dim=1)
        return self.fuse(rearrange(condition_map, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch))
