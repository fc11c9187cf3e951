"""TokenLogits -> Condition, in the form that a decoder was trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..method.calibration import proxy_logits
from ..method.chunks import check_codebooks
from ..method.lcdm import map_logits
from ..models.card import DecoderCard, why_not_read
from ..types import Calibration, Codebook, Condition, TokenLogits
from .host import PLAIN, Host
from .oom import one_by_one


def condition(
    card: DecoderCard | None,
    token_logits: TokenLogits,
    codebook: Codebook,
    *,
    device: torch.device | str | None = None,
    on_image: Callable[[int], None] | None = None,
    host: Host = PLAIN,
) -> Condition:
    """`condition_for`, one image at a time; without a card, LCDM applied to the logits unchanged.

    Args:
        device: device to compute on; None for that of the logits.
        on_image: called with the number of images done so far.

    Raises:
        ValueError: as `condition_for`.
        RuntimeError: if an image does not fit into memory.
    """

    def run(k: int) -> Condition:
        part = token_logits.part(k, k + 1)
        part = part if device is None else part.to(device)
        mapped = map_logits(part, codebook) if card is None else condition_for(card, part, codebook)
        return host.keep(mapped)

    parts = []
    for part in one_by_one(run, len(token_logits.tokens), host):
        parts.append(part)
        if on_image is not None:
            on_image(len(parts))
    return Condition.joined(parts)


def condition_for(card: DecoderCard, token_logits: TokenLogits, codebook: Codebook) -> Condition:
    """The condition that the decoder of this card expects: LCDM with its calibration, or discrete code vectors.

    For a VLM's logits, the card's `reads` selects the logits (the paper), the logits pulled towards the sampled token
    by the calibration's anchor, at its temperature, or the sampled tokens alone. Logits that are already calibrated are
    mapped unchanged, also if those are only the ones that an edit kept.

    Raises:
        ValueError: if logits, codebook and calibration do not belong to the same tokenizer.
    """
    if card.variant == "discrete":
        return discrete_condition(token_logits, codebook)
    if token_logits.calibrated:
        return map_logits(token_logits, codebook)
    calibration = card.calibration
    if token_logits.source == "vlm" and card.reads == "tokens":
        token_logits = proxies_of_tokens(token_logits, codebook)
    elif calibration is not None and card.reads == "logits":
        calibration = calibration.unanchored
    return map_logits(token_logits, codebook, calibration)


def serving(
    card: DecoderCard,
    *,
    calibration: Calibration | None = None,
    anchor: float | None = None,
    reads: str | None = None,
) -> DecoderCard:
    """The card with its calibration, its anchor, or what it reads of a VLM's output replaced as requested.

    Args:
        anchor: replaces the calibration's anchor and implies reads="anchored".
        reads: one of `models.card.READINGS`.

    Raises:
        ValueError: if the request does not fit the decoder, or an anchor is given with another reading.
    """
    if calibration is not None and card.variant != "lcdm+lc":
        raise ValueError(f"this decoder was trained on {card.variant!r} conditions: it takes no calibration")
    used = calibration or card.calibration
    if why := why_not_read(reads, variant=card.variant, calibrated=used is not None):
        raise ValueError(f"reads={reads!r} would do nothing: this decoder {why}")
    if anchor is not None:
        if used is None:
            raise ValueError("the anchor belongs to a calibration, and this decoder has none")
        if reads not in (None, "anchored"):
            raise ValueError(f"an anchor and reading the {reads} alone exclude each other: give one of them")
        used, reads = replace(used, anchor=anchor), "anchored"
    return replace(card, calibration=used, reads=reads or card.reads)


def discrete_condition(token_logits: TokenLogits, codebook: Codebook) -> Condition:
    """The tokens alone, as one-hot distributions: the baseline of the paper's Table 4.

    Raises:
        ValueError: if the tokens are of another codebook.
    """
    check_codebooks(token_logits, codebook, None)
    return condition_of_tokens(token_logits.tokens, token_logits.grid, codebook)


def condition_of_tokens(tokens: torch.Tensor, grid: tuple[int, int], codebook: Codebook) -> Condition:
    """`discrete_condition` for tokens [B, N] on an (h, w) grid, without their logits."""
    c = codebook.of(tokens)
    u = c.new_tensor([1.0, 1.0, 1.0, 0.0]).expand(*c.shape[:2], 4)
    return Condition(c, u, grid, codebook=codebook.fingerprint)


def proxies_of_tokens(token_logits: TokenLogits, codebook: Codebook) -> TokenLogits:
    """Proxy logits of the tokens' own code vectors e_t, as if the encoder had output exactly these (our choice).

    Logits that an edit kept and that are calibrated already stay.
    """
    vectors = codebook.of(token_logits.tokens)
    proxies, at = proxy_logits(vectors, codebook), token_logits.calibrated_at
    if at is not None:
        proxies = torch.where(at[..., None].to(proxies.device), token_logits.logits.to(proxies), proxies)
    return TokenLogits(
        proxies,
        token_logits.tokens,
        token_logits.grid,
        source="proxy",
        model=token_logits.model,
        codebook=token_logits.codebook,
        calibrated_at=at,
    )
