"""The Distribution-Conditioned Diffusion Decoder: a diffusion backbone without text, conditioned on the tokens.

Shapes: B batch, L latent tokens of the backbone, h' w' latent grid, M token width, F and G channels of packed latents
and context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from .. import registry
from ..protocols import Backbone, OnLayer
from ..types import Condition
from .adapter import ConditionEncoder
from .card import DecoderCard


class DistributionConditionedDecoder(nn.Module):
    """Backbone + adapter: predicts the velocity of packed latents (Eqs. 23-25).

    The condition is the only guide. Before training the adapter adds nothing, so this is exactly the base model.

    Attributes:
        backbone: what knows the network.
        transformer: the network itself, `backbone.model`; its weights are the bundle's below "transformer.".
        adapter: the condition encoder.
        card: what the bundle says.
    """

    def __init__(self, backbone: Backbone, card: DecoderCard):
        super().__init__()
        self.backbone = backbone
        self.transformer = backbone.model
        self.adapter = ConditionEncoder(
            card.code_dim, card.width, backbone.token_width, patch=backbone.patch, null=card.condition_dropout > 0
        )
        self.card = card

    @classmethod
    def build(cls, card: DecoderCard) -> DistributionConditionedDecoder:
        """A decoder of this card with random weights, on torch's current device.

        Raises:
            ValueError: for a backbone that is not known.
        """
        return cls(registry.build_backbone(card.base_config, guidance=card.guidance), card)

    # The adapter's: the transformer's layers may wait elsewhere for their turn, or be stored in 8 bits.
    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.adapter.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return next(self.adapter.parameters()).dtype

    def painted_size(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(H, W) in pixels of the image that an (h, w) grid of tokens becomes."""
        return self.card.painted_size(grid, patch=self.backbone.patch)

    def served_shift(self, latent_size: tuple[int, int], steps: int) -> float:
        """Mu of the time shift by default: the card's, or if it has none the backbone's for this (h', w')."""
        if self.card.shift is not None:
            return self.card.shift
        return self.backbone.default_shift(math.prod(latent_size) // self.backbone.patch**2, steps)

    def prepare(self, times: Sequence[float], *, on_layer: OnLayer | None = None) -> None:
        """Call before steps at these times (0..1): what all of them share is computed now.

        Args:
            on_layer: called with (layers done, layers) as weights are read for it; may raise to stop.
        """
        self.backbone.prepare(times, next(self.adapter.parameters()), on_layer)

    def condition_tokens(self, condition: Condition, latent_size: tuple[int, int]) -> torch.Tensor:
        """The condition's share of the fused tokens, [B, L, M]; the same at every step, so computed once (Eq. 22)."""
        return self.adapter(condition, latent_size)

    def null_tokens(self, condition: Condition, latent_size: tuple[int, int]) -> torch.Tensor:
        """What takes their place where a condition is left out, [B, L, M]; of a decoder that was trained to leave some
        out (`DecoderCard.condition_dropout`)."""
        return self.adapter.null(condition, latent_size)

    def forward(
        self,
        packed: torch.Tensor,
        context: torch.Tensor,
        condition: torch.Tensor,
        t: torch.Tensor,
        latent_size: tuple[int, int],
    ) -> torch.Tensor:
        """Velocity n - z0 at time t, [B, L, F].

        Args:
            packed: [B, L, F] noisy latents (`Backbone.pack`).
            context: [B or 1, L, G] of what is kept (`Backbone.context`).
            condition: [B, L, M] from `condition_tokens`.
            t: [B] in 0..1, 1 is pure noise; on the CPU, so that nothing waits for the device.
            latent_size: (h', w').
        """
        return self.backbone.velocity(packed, context, condition, t, latent_size)
