"""TokenLogits -> Condition, the way a decoder was trained to read it."""

from __future__ import annotations

import torch.nn.functional as F

from ..method.lcdm import map_logits, map_probabilities
from ..models.flux import DecoderCard
from ..types import Calibration, Codebook, Condition, TokenLogits


def condition_for(
    card: DecoderCard, token_logits: TokenLogits, codebook: Codebook, *, calibration: Calibration | None = None
) -> Condition:
    """The condition that the decoder of this card wants: LCDM with a calibration, or discrete code vectors.

    Args:
        calibration: in place of the card's own.

    Raises:
        ValueError: if logits, codebook and calibration are not of one tokenizer, or a calibration is given to a decoder
            that was trained without one.
    """
    if calibration is not None and card.variant != "lcdm+lc":
        raise ValueError(f"this decoder was trained on {card.variant!r} conditions: it takes no calibration")
    if card.variant == "discrete":
        return discrete_condition(token_logits, codebook)
    return map_logits(token_logits, codebook, calibration or card.calibration)


def discrete_condition(token_logits: TokenLogits, codebook: Codebook) -> Condition:
    """The tokens alone, as distributions without doubt: the baseline of the paper's Table 4."""
    certain = F.one_hot(token_logits.tokens, codebook.size).float()
    c, u = map_probabilities(certain, codebook)
    return Condition(c, u, token_logits.grid, codebook=codebook.fingerprint)
