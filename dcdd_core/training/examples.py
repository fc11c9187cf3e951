"""From encodings to what the decoder learns from: the condition, and what is to be painted.

Shapes: B batch, N tokens, D code dimension, C latent channels, h' w' latent grid, R resolution.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKL

from ..method.calibration import proxy_logits
from ..models.card import DecoderCard
from ..models.vq import VQTokenizer
from ..pipelines.condition import condition_for
from ..types import Codebook, Condition, TokenLogits
from .encoded_batch import EncodedBatch, encode, scaled_latents
from .image_batch import Geometry, PictureBatch


@dataclass(frozen=True, kw_only=True)
class Example:
    """One batch to learn from.

    Attributes:
        latents: [B, C, h', w'], scaled.
        condition: of the same pictures.
        masked_latents: [B, C, h', w'], scaled latents of the pictures with the masked part blank; [1, C, h', w'] of a
            blank picture where everything is to be painted.
        mask: [B or 1, 1, R, R], 1 where to paint.
    """

    latents: torch.Tensor
    condition: Condition
    masked_latents: torch.Tensor
    mask: torch.Tensor


class ExampleMaker:
    """Makes a decoder's examples from batches of a `Source`.

    Args:
        card: of the decoder; its variant and calibration say which conditions it learns from.
        vq, vae: the encoders; the examples are made on the autoencoder's device.
        geometry: the sizes of the batches.
        localised: share of the pictures that learn localised decoding: a box is to be painted, the rest is given. Needs
            the pictures' pixels.

    Raises:
        ValueError: for a share outside 0..1.
    """

    def __init__(
        self, card: DecoderCard, vq: VQTokenizer, vae: AutoencoderKL, geometry: Geometry, *, localised: float = 0.0
    ):
        if not 0 <= localised <= 1:
            raise ValueError(f"the share of localised pictures must lie in 0..1, got {localised!r}")
        self.card = card
        self.vq = vq
        self.vae = vae
        self.geometry = geometry
        self.localised = localised
        side = geometry.resolution
        self._blank = scaled_latents(vae, torch.zeros(1, 3, side, side, device=vae.device))
        self._everything = torch.ones(1, 1, side, side, device=vae.device)

    def __call__(self, batch: PictureBatch | EncodedBatch, draw: torch.Generator) -> Example:
        """The example of a batch; what is painted of it comes from `draw`."""
        encoded = encode(batch, self.vq, self.vae)
        condition = proxy_condition(encoded.features, self.card, self.vq.codebook, self.geometry.grid)
        example = Example(
            latents=encoded.latents, condition=condition, masked_latents=self._blank, mask=self._everything
        )
        return self._localise(example, encoded.pixels, draw) if self.localised else example

    def _localise(self, example: Example, pixels: torch.Tensor | None, draw: torch.Generator) -> Example:
        count = len(example.latents)
        local = (torch.rand(count, generator=draw) < self.localised).nonzero().squeeze(1)
        if not len(local):
            return example
        if pixels is None:
            raise ValueError(
                "localised training masks the pictures: take a cache that keeps their pixels, or a share of 0"
            )
        masked, mask = (part.repeat(count, 1, 1, 1) for part in (example.masked_latents, example.mask))
        mask[local] = boxes(len(local), self.geometry.resolution, draw).to(mask)
        masked[local] = scaled_latents(self.vae, pixels[local], mask[local])
        return replace(example, masked_latents=masked, mask=mask)


def proxy_condition(features: torch.Tensor, card: DecoderCard, codebook: Codebook, grid: tuple[int, int]) -> Condition:
    """The training condition of features [B, N, D] (Eqs. 9-15): what serving makes of the same proxies."""
    logits = proxy_logits(features, codebook)
    proxies = TokenLogits(logits, logits.argmax(-1), grid, source="proxy", codebook=card.codebook)
    return condition_for(card, proxies, codebook)


def boxes(count: int, size: int, draw: torch.Generator) -> torch.Tensor:
    """Masks [count, 1, size, size] of boxes with sides of a quarter to three quarters of the picture."""
    sides = (size * (0.25 + 0.5 * torch.rand(count, 2, generator=draw))).long()
    corners = ((size - sides) * torch.rand(count, 2, generator=draw)).long()
    line = torch.arange(size)
    inside = [(line >= corners[:, k, None]) & (line < corners[:, k, None] + sides[:, k, None]) for k in (0, 1)]
    return (inside[0][:, :, None] & inside[1][:, None, :]).float()[:, None]
