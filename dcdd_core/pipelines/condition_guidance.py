"""Guidance on the condition: a decoder's velocity, pushed on from what it would be without the condition.

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
    """v_null + w (v_cond - v_null) of one condition and latent size, at any time.

    With w = 1 it is v_cond to the last bit, at its cost. Otherwise the network sees each image twice, in one batch with
    and without its condition, and a step takes about twice the time; if the batch runs out of memory, in two passes
    from then on, which take the memory of one.

    Args:
        condition: of B images, on the decoder's device.
        weight: w, as `DecoderCard.condition_guidance_of` gives it.
        host: told when memory ran out.
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
        """[B, L, F] float32; arguments as `DistributionConditionedDecoder.forward`."""
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
