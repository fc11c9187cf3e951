"""aMUSEd's image tokenizer: diffusers' `VQModel`, which finds the nearest code by Euclidean distance.

A `Codebook` has rows of unit length and compares by cosine. The codes e [D] become such rows without loss in two extra
dimensions [our choice]: with s the largest length of a code and R = s sqrt(5) / 2,

    u = [e, |e|^2 / (2 s), sqrt(R^2 - |e|^2 - |e|^4 / (4 s^2))] / R     of unit length,
    v = [f, -s, 0]                                                      for a feature f,

so that cos(v, u) = (f e - |e|^2 / 2) / (R |v|). For a given f it decreases with |f - e|^2 only: the code with the
largest cosine is the nearest one. Mixtures of rows u give the same mixtures of codes e, as R u [: D].

Shapes: B batch, K codes, D dimension of the network's codes, h x w token grid, H x W pixels.
"""

from __future__ import annotations

import math

import torch
from diffusers import VQModel

from ...types import Codebook
from ..vq import VQTokenizer

_RADIUS = math.sqrt(5) / 2
"""R / s, chosen so that the longest code's last entry is 0."""


def unit_rows(codes: torch.Tensor, device: torch.device | str = "cpu") -> tuple[Codebook, float]:
    """Codes [K, D] of any lengths, on the CPU, as rows u [K, D + 2] of unit length on a device, and s.

    Raises:
        ValueError: as `Codebook`, and if all codes are zero.
    """
    e = codes.detach().double()
    squared = e.square().sum(1, keepdim=True)
    longest = float(squared.max().sqrt())
    if longest == 0:
        raise ValueError("all codes are zero: take the image tokenizer of a trained model")
    height = squared / (2 * longest)
    rest = ((_RADIUS * longest) ** 2 - squared - height.square()).clamp(min=0).sqrt()
    rows = torch.cat([e, height, rest], dim=1) / (_RADIUS * longest)
    return Codebook(rows.float().to(device)), longest


class AmusedTokenizer(VQTokenizer):
    """A frozen `VQModel` with its codebook in rows of unit length.

    Attributes: see `VQTokenizer`.

    Args:
        codes: [K, D], the codebook as it is stored; the network's own may be rounded to half precision.
        grid: (h, w) of the images that the masked sampler paints.
    """

    def __init__(self, model: VQModel, codes: torch.Tensor, *, grid: tuple[int, int], name: str = ""):
        self.model = model.eval().requires_grad_(False)
        # A network of shapes alone has a codebook too.
        self.codebook, self._longest = unit_rows(codes, "cpu" if self.device.type == "meta" else self.device)
        self.factor = 2 ** (len(model.config.block_out_channels) - 1)
        self.grid = grid
        self.name = name

    def quantisation_errors(self, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """|f - e|^2 / (2 s^2) of features v [B, N, D + 2] and the codes of tokens [B, N]: [B, N] float32.

        The cosine of v and u would not do: at f = e it depends on the code's length.
        """
        rows = self.codebook.of(tokens).to(features.device)
        codes = rows[..., :-2] * (_RADIUS * self._longest)
        return (features[..., :-2].float() - codes).square().sum(-1) / (2 * self._longest**2)

    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        """v [B, D + 2, h, w] float32; the network reads pixels in 0..1."""
        features = self.model.encode((pixels + 1) / 2).latents.float()
        rest = torch.zeros_like(features[:, :2])
        rest[:, 0] = -self._longest
        return torch.cat([features, rest], dim=1)

    def _decoded(self, code_map: torch.Tensor) -> torch.Tensor:
        """Rows u or mixtures of them [B, D + 2, h, w] -> pixels [B, 3, H, W] float32, about in -1..1."""
        codes = code_map[:, :-2] * (_RADIUS * self._longest)
        return 2 * self.model.decoder(self.model.post_quant_conv(codes)).float() - 1

    def working_memory(self, grid: tuple[int, int]) -> int:
        """Bytes for one image in float32: ComfyUI's estimate for FLUX's autoencoder (width 128), scaled by width."""
        h, w = grid
        return round(4 * 2178 * h * w * self.factor**2 * self.model.config.block_out_channels[0] / 128)
