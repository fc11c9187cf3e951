"""Guidance on the condition: moves a decoder's velocity further away from its unconditional velocity.

Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), beyond the paper.

Shapes: B batch, L latent tokens, F and G channels of packed latents and context.
"""

from __future__ import annotations

import torch

from ..method import sampling
from ..models.decoder import DistributionConditionedDecoder
from ..types import Condition
from .host import PLAIN, Host
from .oom import is_out_of_memory


class ConditionedVelocity:
    """The velocity v_null + w (v_cond - v_null) for one condition and latent size, at any time.

    With w = 1 this is exactly v_cond, bit for bit, at the same cost. Otherwise each image passes through the network
    twice, with and without its condition, in one batch, and a step takes about twice as long. If that batch runs out of
    memory, every later step makes two passes, which need the memory of one.

    Args:
        condition: of B images, on the decoder's device.
        latent_size: (h', w').
        weight: w, as returned by `DecoderCard.condition_guidance_of`.
        host: told when memory runs out.
    """

    def __init__(
        self,
        decoder: DistributionConditionedDecoder,
        condition: Condition,
        latent_size: tuple[int, int],
        weight: float,
        host: Host = PLAIN,
    ):
        self.decoder, self.latent_size, self.weight, self.host = decoder, latent_size, weight, host
        self._conditioned = decoder.condition_tokens(condition, latent_size)
        self._null = None if weight == 1 else decoder.null_tokens(condition, latent_size)
        self._together = True

    def __call__(self, packed: torch.Tensor, context: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The velocity [B, L, F] float32; arguments as in `DistributionConditionedDecoder.forward`."""
        if self._null is None:
            return self._at(packed, context, self._conditioned, t)
        if self._together:
            try:
                kept = context if len(context) == 1 else context.repeat(2, 1, 1)
                tokens = torch.cat([self._conditioned, self._null])
                both = self._at(packed.repeat(2, 1, 1), kept, tokens, t.repeat(2))
                return sampling.guide(*both.chunk(2), self.weight)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._together = False
            self.host.on_fallback("guidance on the condition takes two passes a step")
        conditioned, null = (self._at(packed, context, tokens, t) for tokens in (self._conditioned, self._null))
        return sampling.guide(conditioned, null, self.weight)

    def _at(self, packed: torch.Tensor, context: torch.Tensor, tokens: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.decoder(packed, context, tokens, t, self.latent_size).float()
