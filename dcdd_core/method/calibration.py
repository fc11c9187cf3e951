"""Logit calibration: fits the statistics of proxy logits to a VLM's (Eqs. 10-16), and the anchor.

Logits are read chunk by chunk (`chunks.CHUNK_BYTES`), so those of a hundred images (576 x 16384 each) are never in
memory at once. Everything is computed in float32 without gradients.

Shapes: B batch, N tokens, n tokens of one chunk, M tokens of all images, K codes, D code dimension.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F

from ..types import Calibration, CalibrationStatistics, Codebook, DCDDWarning, Source, TokenLogits
from .chunks import Grids, chunk_rows, float32_maths, logit_chunks, neg_p_ln_p, underflows

TOLERANCE = 0.02
"""Tolerance on the mean entropy (paper, 5.2); decides `converged`."""
FINE_TOLERANCE = 0.001
"""Tolerance on the mean entropy at which the bisection stops: our choice, which costs a few more passes."""
SCALES = (10.0, 60.0)
"""Range of the cosine scale s (paper, 5.2)."""
WIDENINGS, BISECTIONS = 8, 20
"""The most times that the search moves beyond that range (each time by a factor of 2), and the most bisections."""
SMOOTHINGS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
"""Values of eps that are tried ("a small grid around zero", paper, 5.2)."""
AFFINE_STEPS = (0.94, 0.96, 0.98, 0.99, 1.0, 1.01, 1.02, 1.04, 1.06)
"""Factors on the affine scale a that are tried ("a narrow neighbourhood of 1", paper, 5.2)."""
_ANY_SCALE = (1.0, 4096.0)
"""Range in which the scale for a VLM without a calibration is searched."""
PASSES = 70
"""About how many passes `fit_calibration` makes over the features, for progress bars."""
WEIGHTS = {"mean_entropy": 1.0, "entropy_95": 0.25, "mean_confidence": 0.5, "confidence_95": 0.5}
"""Weights of Eq. 16: our choice. The paper gives no numbers, only that the mean entropy weighs most."""
ANCHORS = (0.0, *np.geomspace(0.25, 64, 25).tolist())
"""Values of beta at which the anchor is measured."""
ANCHOR_STEPS = 64
"""Values of beta that are tried from one anchor to the next, by interpolating the measurements."""


@dataclass(frozen=True, kw_only=True)
class AnchorStatistics:
    """How close the expected code vector c is to that of the sampled token t: mean |c|, and mean cos(c, e_t)."""

    length: float
    alignment: float


@float32_maths
def proxy_logits(features: torch.Tensor, codebook: Codebook) -> torch.Tensor:
    """Cosines of VQ-encoder features with all code vectors (Eqs. 10, 13).

    Args:
        features: [..., D], of any norm (a zero vector has cosine 0 with every code).

    Returns:
        [..., K] float32 in -1..1.

    Raises:
        ValueError: if D is not the codebook's, or a feature is not finite.
    """
    _check_features(features, codebook)
    return F.normalize(features.float(), dim=-1) @ codebook.vectors.to(features.device).T


@float32_maths
def to_probabilities(
    logits: torch.Tensor,
    calibration: Calibration | None,
    *,
    source: Source,
    codebook: Codebook | None = None,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits -> probabilities, p = (1 - eps) q + eps / K (Eq. 15).

    Proxy logits: q = softmax(s (a cos + b)) (Eq. 14); b cancels and is not added. A VLM's logits have a scale of
    their own, so q = softmax(l / tau + beta cos(e_k, e_t)), with t the sampled token, beta the anchor and tau its
    temperature; beta = 0 and tau = 1 give the plain softmax. Both are our choice. Without a calibration p = softmax(l)
    for either source (Eq. 5).

    Args:
        logits: [..., K], floating point; -inf bars a code, so that only smoothing gives it probability (eps / K).
        codebook, tokens [...]: needed if a VLM's logits are anchored (beta > 0).

    Returns:
        [..., K] float32, rows sum to 1.

    Raises:
        ValueError: with a calibration, for an unknown source, or an anchor without codebook and tokens.
    """
    q = _scores(logits, calibration, source, codebook, tokens).softmax(-1)
    return q if calibration is None else q.mul_(1 - calibration.smoothing).add_(calibration.smoothing / q.shape[-1])


@float32_maths
def to_log_probabilities(
    logits: torch.Tensor,
    calibration: Calibration | None,
    *,
    source: Source,
    codebook: Codebook | None = None,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """ln p of `to_probabilities`, [..., K] float32, exact even where p underflows; -inf for a barred code."""
    ln_q = _scores(logits, calibration, source, codebook, tokens).log_softmax(-1)
    if calibration is None or calibration.smoothing == 0:
        return ln_q
    ln_share = ln_q.new_tensor(math.log(calibration.smoothing / ln_q.shape[-1]))
    return torch.logaddexp(ln_q + math.log(1 - calibration.smoothing), ln_share)


def _scores(
    logits: torch.Tensor,
    calibration: Calibration | None,
    source: Source,
    codebook: Codebook | None,
    tokens: torch.Tensor | None,
) -> torch.Tensor:
    """The logits whose softmax is q (Eq. 14), [..., K] float32."""
    logits = logits.float()
    if calibration is None:
        return logits
    if source == "proxy":
        return logits * calibration.sharpness
    if source != "vlm":
        raise ValueError(f"source must be 'vlm' or 'proxy', got {source!r}")
    if calibration.anchor_temperature != 1:
        logits = logits / calibration.anchor_temperature
    if calibration.anchor == 0:
        return logits
    if codebook is None or tokens is None:
        raise ValueError(
            f"an anchor of {calibration.anchor} pulls towards the sampled tokens: give the codebook and the tokens, "
            "or a calibration with anchor=0"
        )
    vectors = codebook.vectors.to(logits.device)
    return logits.add(vectors[tokens.to(logits.device)] @ vectors.T, alpha=calibration.anchor)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Probabilities of n tokens of one grid, and what they were computed from.

    Attributes:
        probabilities: p [n, K] float32 (Eq. 15).
        tokens: [n], the token sampled at each position.
        ln_p: boolean mask [n] -> ln p [m, K] of the m selected rows, recomputed from their logits so that it is exact
            even where p underflows float32.
    """

    probabilities: torch.Tensor
    tokens: torch.Tensor
    ln_p: Callable[[torch.Tensor], torch.Tensor]


def probability_chunks(
    token_logits: Grids, codebook: Codebook | None = None, calibration: Calibration | None = None
) -> Iterator[Chunk]:
    """Probabilities (Eq. 15) of one grid or many, chunk by chunk in row-major order.

    Where logits are calibrated already, p is their plain softmax.

    Raises:
        ValueError: if logits, codebook and calibration do not share one codebook, logits would be calibrated twice, or
            there is no grid at all.

    Warns if a VLM's logits were not sampled the way the calibration was measured.
    """
    for grid, part, tokens, calibrated in logit_chunks(token_logits, codebook, calibration):
        given = {"source": grid.source, "codebook": codebook}
        chunk = probability_chunk(part, tokens, calibration, **given)
        yield chunk if calibrated is None else _kept_where(calibrated, part, chunk, given)


def probability_chunk(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    calibration: Calibration | None,
    *,
    source: Source,
    codebook: Codebook | None = None,
) -> Chunk:
    """Probabilities (Eq. 15) of one chunk: logits [n, K], tokens [n]; arguments and errors as `to_probabilities`."""
    given = {"source": source, "codebook": codebook}
    p = to_probabilities(logits, calibration, tokens=tokens, **given)
    return Chunk(probabilities=p, tokens=tokens, ln_p=partial(_ln_p_of_rows, logits, tokens, calibration, given))


def _kept_where(calibrated: torch.Tensor, logits: torch.Tensor, chunk: Chunk, given: dict) -> Chunk:
    """A chunk whose rows that are calibrated already, bool [n], have the plain softmax of their logits."""
    at = calibrated.to(logits.device)
    p = chunk.probabilities
    p[at] = to_probabilities(logits[at], None, **given)

    def ln_p(rows: torch.Tensor) -> torch.Tensor:
        found = chunk.ln_p(rows)
        found[at[rows]] = to_log_probabilities(logits[rows & at], None, **given)
        return found

    return replace(chunk, ln_p=ln_p)


def _ln_p_of_rows(
    logits: torch.Tensor, tokens: torch.Tensor, calibration: Calibration | None, given: dict, rows: torch.Tensor
) -> torch.Tensor:
    return to_log_probabilities(logits[rows], calibration, tokens=tokens[rows.to(tokens.device)], **given)


def apply_calibration(token_logits: TokenLogits, codebook: Codebook, calibration: Calibration) -> TokenLogits:
    """The same tokens with ln p (Eq. 15) as logits, whose plain softmax is the calibrated distribution.

    Returns:
        TokenLogits marked as calibrated, with float32 logits: a copy that takes 4 B N K bytes.

    Raises:
        ValueError: if logits, codebook and calibration do not share one codebook, or logits are calibrated already.

    Warns if a VLM's logits were not sampled the way the calibration was measured.
    """
    logits = torch.empty_like(token_logits.logits, dtype=torch.float32, memory_format=torch.contiguous_format)
    rows, done = logits.flatten(0, 1), 0
    for chunk in probability_chunks(token_logits, codebook, calibration):
        ln_p = chunk.probabilities.log()
        underflown = underflows(chunk.probabilities.amin(-1))
        if bool(underflown.any()):
            exact = chunk.ln_p(underflown)
            ln_p[underflown] = torch.where(underflows(chunk.probabilities[underflown]), exact, ln_p[underflown])
        rows[done : done + len(ln_p)] = ln_p
        done += len(ln_p)
    return replace(token_logits, logits=logits, calibrated=True, calibrated_at=None)


def target_statistics(token_logits: Grids) -> CalibrationStatistics:
    """The target of calibration: entropy and confidence of a VLM's tokens (Eqs. 11-12).

    H = -sum p ln p / ln K and max p per token; their means and 95th percentiles over all tokens of all grids (the paper
    takes 100 images). An iterable is read once, and only two numbers per token are kept.

    Raises:
        ValueError: for proxy logits, calibrated logits, no logits, or grids over codebooks of different sizes.
    """
    return _summarise(
        to_probabilities(part.logits, None, source="vlm") for part in logit_chunks(token_logits, needs="vlm")
    )


@float32_maths
def _least_squares(logits: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    return logits.float() @ torch.linalg.pinv(vectors).T


def proxy_features(token_logits: Grids, codebook: Codebook) -> torch.Tensor:
    """The unit features [M, D] behind proxy logits: cos = E f (Eq. 10), solved for f by least squares.

    Exact up to rounding if the codebook spans all D dimensions.

    Raises:
        ValueError: for a VLM's logits, calibrated logits, or logits over another codebook.
    """
    vectors = codebook.vectors
    parts = logit_chunks(token_logits, codebook, needs="proxy")
    return torch.cat([_least_squares(part.logits, vectors.to(part.logits.device)) for part in parts])


def fit_calibration(
    features: torch.Tensor | Iterable[torch.Tensor],
    codebook: Codebook,
    target: CalibrationStatistics,
    *,
    vlm: str = "",
    guidance: float | None = None,
    temperature: float | None = None,
    on_chunk: Callable[[int], None] | None = None,
) -> Calibration:
    """Fits s, eps and a so that the proxies' statistics match the target (Eqs. 13-16), in the paper's order.

    1. Bisection on s in 10..60, with a = 1 and eps = 0, for the mean entropy, which falls with s. If the target lies
       outside that range, the range is widened with a warning.
    2. A sweep over eps. Since eps raises the entropy, each value is judged after re-tuning a (our choice).
    3. A sweep over a around the result.
    Each sweep picks the value that minimises Eq. 16 among those that keep the mean entropy within 0.02 of the target.
    b cancels in the softmax and stays 0; s and a act as one number.

    Args:
        features: VQ-encoder features before quantisation, [..., D], or an iterable of these.
        target: from `target_statistics`.
        vlm, guidance, temperature: what the target was measured on; stored in the result.
        on_chunk: called after each chunk with the number of completed passes over the features, about `PASSES` in the
            end; may raise to stop.

    Returns:
        Calibration with `achieved` and `converged`; for a target out of reach, the nearest s, unconverged (warns).

    Raises:
        ValueError: for features that are empty, not finite, or of another dimension than the codebook.
    """
    tensors = [features] if isinstance(features, torch.Tensor) else list(features)
    for tensor in tensors:
        _check_features(tensor, codebook)
    if sum(tensor.numel() for tensor in tensors) == 0:
        raise ValueError("got no features; expected those of about 100 images, [..., D]")
    points = torch.cat([tensor.reshape(-1, codebook.dim) for tensor in tensors])

    passes = 0

    def probabilities(trial: Calibration) -> Iterator[torch.Tensor]:
        for part in points.split(chunk_rows(codebook.size)):
            yield to_probabilities(proxy_logits(part, codebook), trial, source="proxy")
            if on_chunk is not None:
                on_chunk(passes)

    @cache
    def statistics(sharpness: float, smoothing: float) -> CalibrationStatistics:
        nonlocal passes
        found = _summarise(probabilities(Calibration(scale=sharpness, smoothing=smoothing)))
        passes += 1
        return found

    def fits(sharpness: float, smoothing: float) -> bool:
        return abs(statistics(sharpness, smoothing).mean_entropy - target.mean_entropy) <= TOLERANCE

    def objective(sharpness: float, smoothing: float) -> float:
        found, wanted = asdict(statistics(sharpness, smoothing)), asdict(target)
        return sum(weight * abs(found[name] - wanted[name]) for name, weight in WEIGHTS.items())

    def tuned(low: float, high: float, smoothing: float) -> float:
        return _bisect(lambda x: statistics(x, smoothing).mean_entropy, target.mean_entropy, low, high)

    scale = tuned(*_widened(lambda x: statistics(x, 0.0).mean_entropy, target.mean_entropy), 0.0)
    sharpness, smoothing = scale, 0.0
    converged = fits(scale, 0.0)
    if converged:
        tries = [(scale, 0.0)]
        for eps in SMOOTHINGS[1:]:
            tries.append((tuned(tries[-1][0], 1.25 * tries[-1][0], eps), eps))
        _, smoothing = best = min((t for t in tries if fits(*t)), key=lambda t: objective(*t))
        steps = [(best[0] * step, smoothing) for step in AFFINE_STEPS]
        sharpness, _ = min((t for t in steps if fits(*t)), key=lambda t: objective(*t))
    else:
        warnings.warn(
            f"calibration did not converge: the nearest to a mean entropy of {target.mean_entropy:.3f} is "
            f"{statistics(scale, 0.0).mean_entropy:.3f}, at scale {scale:.3g}; check that features and codebook belong "
            "together",
            DCDDWarning,
            stacklevel=2,
        )
    return Calibration(
        scale=scale,
        affine_scale=sharpness / scale,
        smoothing=smoothing,
        target=target,
        achieved=statistics(sharpness, smoothing),
        converged=converged,
        vlm=vlm,
        guidance=guidance,
        temperature=temperature,
        codebook=codebook.fingerprint,
    )


def anchor_statistics(
    token_logits: Grids, codebook: Codebook, calibration: Calibration | None = None
) -> AnchorStatistics:
    """Mean |c| and mean cos(c, e_t) over all tokens of VLM or (calibrated) proxy logits; t is the sampled token.

    Raises:
        ValueError: as `probability_chunks`.
    """
    read = probability_chunks(token_logits, codebook, calibration)
    parts = [_anchor_sums(chunk.probabilities, chunk.tokens, codebook) for chunk in read]
    count, length, alignment = np.sum(parts, axis=0).tolist()
    return AnchorStatistics(length=length / count, alignment=alignment / count)


def fit_anchor(
    token_logits: Grids,
    codebook: Codebook,
    target: AnchorStatistics,
    calibration: Calibration,
    *,
    on_chunk: Callable[[int], None] | None = None,
) -> Calibration:
    """Finds the anchor beta in 0..64 whose mean |c| and cos(c, e_t) come closest to the proxies' (our choice).

    Both are measured at `ANCHORS` in one pass over the logits and interpolated between them; the sum of the two squared
    differences is minimised. The result is beta = 0, as in the paper, if every anchor only increases that sum.

    Args:
        token_logits: the VLM's logits, one grid or an iterable of them, read once.
        target: `anchor_statistics` of proxy logits under `calibration`.
        on_chunk: called after each chunk of the pass, with 0; may raise to stop.

    Returns:
        The calibration with this anchor; with the largest beta and a warning if the target lies beyond it.

    Raises:
        ValueError: for proxy logits, and as `probability_chunks`.
    """
    trials = [replace(calibration, anchor=beta) for beta in ANCHORS]
    sums = np.zeros((len(trials), 3))
    for _, part, tokens, _ in logit_chunks(token_logits, codebook, calibration, needs="vlm"):
        for total, trial in zip(sums, trials):
            total += _anchor_sums(
                to_probabilities(part, trial, source="vlm", codebook=codebook, tokens=tokens), tokens, codebook
            )
        if on_chunk is not None:
            on_chunk(0)
    # Steps beyond the last anchor repeat it.
    betas = np.interp(np.arange(ANCHOR_STEPS * len(ANCHORS)) / ANCHOR_STEPS, np.arange(len(ANCHORS)), ANCHORS)
    length, alignment = (np.interp(betas, ANCHORS, sums[:, i] / sums[:, 0]) for i in (1, 2))
    beta = float(betas[np.argmin((length - target.length) ** 2 + (alignment - target.alignment) ** 2)])
    if beta == ANCHORS[-1]:
        warnings.warn(
            f"the proxies' code vectors are out of reach; the anchor stays at {beta:g}", DCDDWarning, stacklevel=2
        )
    return replace(calibration, anchor=beta)


def _check_features(features: torch.Tensor, codebook: Codebook) -> None:
    if features.ndim < 1 or features.shape[-1] != codebook.dim:
        raise ValueError(
            f"features {list(features.shape)} do not fit a codebook of dimension {codebook.dim}: expected "
            f"[..., {codebook.dim}], channels last, as they leave the encoder's quant_conv"
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features hold NaN or infinity: run the VQ encoder in float32")


def _entropy_and_confidence(probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    entropy = neg_p_ln_p(probabilities).sum(-1) / math.log(probabilities.shape[-1])
    return entropy, probabilities.amax(-1)


@torch.no_grad()
def scale_for_confidence(features: torch.Tensor, codebook: Codebook, confidence: float) -> float:
    """The scale s at which q = softmax(s cos(f, e_k)) is on average as confident as a VLM without a calibration.

    This is our choice. The mean of max q over all positions grows with s.

    Args:
        features: [B, N, D], before quantisation (Eq. 9), such as those of the soft VQ decode of the VLM's predictions.
        confidence: mean max p of the VLM, in 0..1.

    Returns:
        s in 1..4096; close to the nearer end if no scale in that range gives this confidence.

    Raises:
        ValueError: as `proxy_logits`.
    """
    cosines = proxy_logits(features, codebook)

    def doubt(scale: float) -> float:
        return 1 - float((scale * cosines).softmax(-1).amax(-1).mean())

    return _bisect(doubt, 1 - confidence, *_ANY_SCALE)


def _summarise(parts: Iterable[torch.Tensor]) -> CalibrationStatistics:
    sizes, pairs = set(), []
    for part in parts:
        sizes.add(part.shape[-1])
        pairs.append([values.cpu().double().numpy() for values in _entropy_and_confidence(part)])
    if len(sizes) > 1:
        raise ValueError(
            f"the grids have codebooks of different sizes, {sorted(sizes)}: calibrate one tokenizer at a time"
        )
    entropy, confidence = (np.concatenate(values).clip(max=1) for values in zip(*pairs))
    return CalibrationStatistics(
        mean_entropy=float(entropy.mean()),
        entropy_95=float(np.percentile(entropy, 95)),
        mean_confidence=float(confidence.mean()),
        confidence_95=float(np.percentile(confidence, 95)),
    )


@float32_maths
def _anchor_sums(probabilities: torch.Tensor, tokens: torch.Tensor, codebook: Codebook) -> list[float]:
    vectors = codebook.vectors.to(probabilities.device)
    c = probabilities @ vectors
    cosine = F.cosine_similarity(c, vectors[tokens.to(c.device)], dim=-1)
    return [len(c), float(c.norm(dim=-1).cpu().double().sum()), float(cosine.cpu().double().sum())]


def _widened(entropy: Callable[[float], float], target: float) -> tuple[float, float]:
    low, high = SCALES
    for _ in range(WIDENINGS):
        if entropy(low) < target - FINE_TOLERANCE:
            low, high = low / 2, low
        elif entropy(high) > target + FINE_TOLERANCE:
            low, high = high, high * 2
        else:
            break
    if (low, high) != SCALES:
        warnings.warn(
            f"a mean entropy of {target:.3f} is not reached with a scale in {SCALES[0]:g}..{SCALES[1]:g}: "
            f"searching {low:g}..{high:g}",
            DCDDWarning,
            stacklevel=3,
        )
    return low, high


def _bisect(entropy: Callable[[float], float], target: float, low: float, high: float) -> float:
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found = entropy(middle)
        if abs(found - target) <= FINE_TOLERANCE:
            break
        low, high = (middle, high) if found > target else (low, middle)
    return middle
