"""Logit-to-Code Distributional Mapping: image-token distributions -> condition (Eqs. 4-8).

No gradient flows through the mapping. However large the input, it holds at most four float32 arrays of
`chunks.CHUNK_BYTES` (16 MiB in total) besides input and result. The input may be in half precision and in any memory
layout.

Shapes: B batch, N tokens, n tokens of one chunk, K codes, D code dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..types import Calibration, Codebook, Condition, TokenLogits
from .calibration import probability_chunks
from .chunks import chunks, float32_maths, neg_p_ln_p, underflows

HEAD_BOUNDS = (8, 64)
"""Bounds of the entropy-adaptive k (paper, B.1)."""

LogRows = Callable[[torch.Tensor], torch.Tensor]


def map_probabilities(probabilities: torch.Tensor, codebook: Codebook) -> tuple[torch.Tensor, torch.Tensor]:
    """Distribution-weighted code vectors c = p E (Eqs. 6-7) and uncertainty features u (Eq. 8).

    Args:
        probabilities: [..., K], rows that sum to 1 (within 0.01, so that half precision passes).
        codebook: E [K, D].

    Returns:
        c [..., D], length 0..1, and u [..., 4] in 0..1 (see `uncertainty_features`), both float32.

    Raises:
        ValueError: if K is not the codebook's, or a row is not a distribution (NaN, negative, wrong sum).
    """
    if probabilities.ndim < 1 or probabilities.shape[-1] != codebook.size:
        raise ValueError(
            f"probabilities {list(probabilities.shape)} do not fit a codebook of {codebook.size} codes: "
            f"expected [..., {codebook.size}]; load the codebook of the tokenizer that they belong to"
        )
    vectors = codebook.vectors.to(probabilities.device)
    mapped = [_map(check_probabilities(part), vectors) for part in chunks(probabilities)]
    code_vectors, uncertainty = (torch.cat(parts) for parts in zip(*mapped))
    lead = probabilities.shape[:-1]
    return code_vectors.reshape(*lead, codebook.dim), uncertainty.reshape(*lead, 4)


def map_logits(token_logits: TokenLogits, codebook: Codebook, calibration: Calibration | None = None) -> Condition:
    """The condition for a grid of image-token logits (Eqs. 4-8), with p from `calibration.to_probabilities`.

    Args:
        token_logits: logits [B, N, K] of either source.
        codebook: E [K, D].
        calibration: None uses the plain softmax (Eq. 5).

    Returns:
        Condition with c [B, N, D] and u [B, N, 4], float32, on the logits' device.

    Raises:
        ValueError: if logits, codebook and calibration do not share one codebook, or logits would be calibrated twice.

    Warns if a VLM's logits were not sampled the way the calibration was measured.
    """
    vectors = codebook.vectors.to(token_logits.logits.device)
    read = probability_chunks(token_logits, codebook, calibration)
    mapped = [_map(chunk.probabilities, vectors, chunk.ln_p) for chunk in read]
    code_vectors, uncertainty = (torch.cat(parts) for parts in zip(*mapped))
    lead = token_logits.tokens.shape
    return Condition(
        code_vectors.reshape(*lead, codebook.dim),
        uncertainty.reshape(*lead, 4),
        token_logits.grid,
        codebook=codebook.fingerprint,
    )


def uncertainty_features(probabilities: torch.Tensor, ln_p: LogRows | None = None) -> torch.Tensor:
    """u = [p(1), p(1) - p(2), sum_{j <= k} p(j), H_tail] (Eq. 8), p(j) sorted descending.

    k = clip(round(exp(H(p))), 8, min(64, K - 1)) is the perplexity within the paper's bounds; using the perplexity is
    our choice. H_tail is the entropy of p outside its top k, renormalised and divided by ln(K - k); 0 if that tail has
    no mass or a single code.

    Args:
        probabilities: [..., K] float32, K >= 2; one chunk, since two more arrays of this size are made.
        ln_p: boolean mask [...] -> ln p [m, K] of the selected rows (see `calibration.Chunk`). If a tail underflows
            float32, its H_tail is computed from this in the log domain; without it, from the log of the float32 p.

    Returns:
        [..., 4] in 0..1.
    """
    return features_and_entropy(probabilities, ln_p)[0]


@float32_maths
def features_and_entropy(probabilities: torch.Tensor, ln_p: LogRows | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`uncertainty_features` [..., 4], and the entropy H(p) [...] in nats that determines k."""
    codes = probabilities.shape[-1]
    most = min(HEAD_BOUNDS[1], codes - 1)
    surprise = neg_p_ln_p(probabilities)
    entropy = surprise.sum(-1, keepdim=True)
    # Where K - 1 < 8 the bounds cross, and clamp lets the upper one win.
    k = entropy.exp().round().clamp(HEAD_BOUNDS[0], most).long()
    top, index = probabilities.topk(max(2, most))
    mass = top.cumsum(-1).gather(-1, k - 1).clamp(max=1)

    # The tail is summed on its own, with the head set to zero: 1 - mass would lose a tiny tail to cancellation.
    beyond = _beyond(top, k)
    tail_mass = probabilities.scatter(-1, index, top * beyond).sum(-1, keepdim=True)
    tail = surprise.scatter_(-1, index, surprise.gather(-1, index) * beyond).sum(-1, keepdim=True)
    del surprise
    # With q = p / m, -sum q ln q = (-sum p ln p) / m + ln m: no second pass over the tail.
    tail_entropy = tail / tail_mass + tail_mass.log()
    tiny = underflows(tail_mass).squeeze(-1)
    if bool(tiny.any()):
        ln_p_of_tiny = probabilities[tiny].log() if ln_p is None else ln_p(tiny)
        tail_entropy[tiny] = _log_domain_tail_entropy(ln_p_of_tiny, k[tiny])
    bound = (codes - k).float().log()
    tail_entropy = tail_entropy / torch.where(bound > 0, bound, torch.inf)
    u = torch.cat([top[..., :1], top[..., :1] - top[..., 1:2], mass, tail_entropy.clamp(0, 1)], dim=-1)
    return u, entropy.squeeze(-1)


def _log_domain_tail_entropy(ln_p: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Entropy [m, 1] in nats of the renormalised tail of ln p [m, K], beyond its k [m, 1] largest; 0 if all barred.

    Overwrites ln p.
    """
    top, index = ln_p.topk(int(k.max()))
    ln_q = ln_p.scatter_(-1, index, top.where(_beyond(top, k), -torch.inf)).log_softmax(-1)
    # A row whose codes are all barred is NaN throughout.
    return neg_p_ln_p(ln_q.exp_()).sum(-1, keepdim=True).nan_to_num_()


def _beyond(top: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """True for those of the largest values [..., most], in descending order, that come after the first k [..., 1]."""
    return torch.arange(top.shape[-1], device=top.device) >= k


def check_probabilities(part: torch.Tensor) -> torch.Tensor:
    """One chunk [n, K] as float32, without gradient.

    Raises:
        ValueError: if a row is not a distribution: finite, >= 0, with a sum within 0.01 of 1.
    """
    part = part.detach().float()
    sums = part.sum(-1)
    if not bool(((part.amin(-1) >= 0) & ((sums - 1).abs() <= 0.01)).all()):
        raise ValueError(
            f"probabilities must be finite, >= 0 and sum to 1, got rows from {float(part.min()):g} with sums "
            f"{float(sums.min()):g}..{float(sums.max()):g}: give softmax(logits), or use map_logits for logits"
        )
    return part


@float32_maths
def _map(
    probabilities: torch.Tensor, vectors: torch.Tensor, ln_p: LogRows | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return probabilities @ vectors, uncertainty_features(probabilities, ln_p)
