"""The Distribution-Conditioned Diffusion Decoder: a diffusion backbone without text, conditioned on image tokens.

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

    The condition is its only guidance. Before training the adapter adds nothing, so this is exactly the base model.

    Attributes:
        backbone: wraps the network.
        transformer: the network itself, `backbone.model`; its weights are stored under "transformer." in the bundle.
        adapter: the condition encoder.
        card: the bundle's description.
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
        """Builds a decoder from its card, with random weights, on torch's current device.

        Raises:
            ValueError: for an unknown backbone.
        """
        return cls(registry.build_backbone(card.base_config, guidance=card.guidance), card)

    @property
    def device(self) -> torch.device:
        """The device it computes on."""
        return self._resident.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in."""
        return self._resident.dtype

    @property
    def _resident(self) -> torch.Tensor:
        """A weight of the adapter that is where it computes: a host may keep any linear layer elsewhere until its turn,
        and those of the transformer may be stored in 8 bits."""
        layers = (layer for layer in self.adapter.modules() if not isinstance(layer, nn.Linear))
        return next(weight for layer in layers for weight in layer.parameters(recurse=False))

    def painted_size(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(H, W) in pixels of the image that an (h, w) grid of tokens becomes."""
        return self.card.painted_size(grid, patch=self.backbone.patch)

    def served_shift(self, latent_size: tuple[int, int], steps: int) -> float:
        """The default mu of the time shift: the card's, or the backbone's for this (h', w') if the card has none."""
        if self.card.shift is not None:
            return self.card.shift
        return self.backbone.default_shift(math.prod(latent_size) // self.backbone.patch**2, steps)

    def prepare(self, times: Sequence[float], *, on_layer: OnLayer | None = None) -> None:
        """Computes in advance what steps at these times (0..1) share; call it before them.

        Args:
            on_layer: called with (layers done, layers) as their weights are read; may raise to stop.
        """
        self.backbone.prepare(times, self._resident, on_layer)

    def condition_tokens(self, condition: Condition, latent_size: tuple[int, int]) -> torch.Tensor:
        """What the condition adds to the fused tokens, [B, L, M]; the same at every step, so computed once (Eq. 22)."""
        return self.adapter(condition, latent_size)

    def null_tokens(self, condition: Condition, latent_size: tuple[int, int]) -> torch.Tensor:
        """The tokens [B, L, M] of the null condition, which replace those of `condition_tokens`.

        Only for a decoder that was trained with dropped conditions (`DecoderCard.condition_dropout`).
        """
        return self.adapter.null(condition, latent_size)

    def forward(
        self,
        packed: torch.Tensor,
        context: torch.Tensor,
        condition: torch.Tensor,
        t: torch.Tensor,
        latent_size: tuple[int, int],
    ) -> torch.Tensor:
        """The velocity n - z0 at time t, [B, L, F].

        Args:
            packed: [B, L, F] noisy latents (`Backbone.pack`).
            context: [B or 1, L, G] describing what is kept (`Backbone.context`).
            condition: [B, L, M] from `condition_tokens`.
            t: [B] in 0..1, 1 is pure noise; on the CPU, so that nothing has to wait for the device.
            latent_size: (h', w').
        """
        return self.backbone.velocity(packed, context, condition, t, latent_size)
