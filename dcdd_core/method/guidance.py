"""Distribution guidance: pulls any diffusion model towards a VLM's token distributions. Beyond the paper.

At each step the model's predicted clean latent x0 is decoded, and the image is encoded by the VLM's own VQ encoder. The
gradient of the cross-entropy between the VLM's distributions and the encoder's moves x0, and sampling continues from
there. No gradient passes through the diffusion model. Related: FreeDoM (arXiv 2303.09833), MPGD (arXiv 2311.16424).

Time t runs from 0 (clean) to 1 (noise) on the path z_t = (1 - t) z0 + t n. The functions at the end convert models on
other paths.

Shapes: B batch, N tokens (row-major h x w grid), K codes, D code dimension; latents [B, ...].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import einsum

from ..types import Codebook

WEIGHTS = ("confidence", "uniform")
_TINY = 1e-20


def token_cross_entropy(
    features: torch.Tensor, code_vectors: torch.Tensor, codebook: Codebook, *, scale: float
) -> torch.Tensor:
    """CE(p_n, q_n) = -sum_k p_k ln q_k with q = softmax(s cos(f, e_k)) at each position, in nats: [B, N].

    The cosine is linear in e_k, so p enters only through its expected code vector c = p E (Eqs. 6-7):
    CE = ln sum_k exp(s cos(f, e_k)) - s cos(f, c) |c|. One-hot p gives c = e_t: the ordinary cross-entropy of a token.

    Args:
        features: [B, N, D], before quantisation (Eq. 9); differentiable.
        code_vectors: [B, N, D], c from LCDM.
        scale: s of the calibration (Eq. 14, with a = 1).

    Raises:
        ValueError: for shapes that do not fit each other or the codebook, and a scale that is not positive.
    """
    if features.shape != code_vectors.shape or features.ndim != 3 or features.shape[2] != codebook.dim:
        raise ValueError(
            f"features {list(features.shape)} and code vectors {list(code_vectors.shape)} must be [B, N, "
            f"{codebook.dim}] alike: use the tokenizer that the condition is of, on its grid"
        )
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be a positive number, got {scale!r}: take the calibration's")
    directions = F.normalize(_at_least_float32(features), dim=-1)
    vectors = codebook.vectors.to(directions)
    normaliser = (scale * einsum(directions, vectors, "b n d, k d -> b n k")).logsumexp(-1)
    return normaliser - scale * (directions * code_vectors.to(directions)).sum(-1)


def position_weights(
    confidence: torch.Tensor, weight: str = "confidence", free: torch.Tensor | None = None
) -> torch.Tensor:
    """Weight w_n of each position, [B, N] float32: max p_n, or 1 everywhere; 0 where a position is free.

    Args:
        confidence: [B, N] max p_n, the first uncertainty feature (Eq. 8).
        weight: one of `WEIGHTS`.
        free: bool [B, N] or [1, N], positions on which guidance does not act.

    Raises:
        ValueError: for an unknown weight.
    """
    if weight not in WEIGHTS:
        raise ValueError(f"weight must be one of {', '.join(WEIGHTS)}, got {weight!r}")
    weights = confidence.float() if weight == "confidence" else torch.ones_like(confidence, dtype=torch.float32)
    return weights if free is None else weights.masked_fill(free.to(weights.device), 0.0)


def token_loss(
    features: torch.Tensor,
    code_vectors: torch.Tensor,
    weights: torch.Tensor,
    codebook: Codebook,
    *,
    scale: float,
) -> torch.Tensor:
    """L = sum_n w_n CE(p_n, q_n), [B]: see `token_cross_entropy`.

    Args:
        weights: [B, N].

    Raises:
        ValueError: as `token_cross_entropy`.
    """
    return (weights.to(features.device) * token_cross_entropy(features, code_vectors, codebook, scale=scale)).sum(-1)


def noise_share(time: float) -> float:
    """r(t) = t / sqrt(t^2 + (1 - t)^2), the noise's share of z_t's standard deviation for data of unit variance."""
    return time / math.hypot(time, 1 - time)


def guide_clean(clean: torch.Tensor, gradient: torch.Tensor, time: float, strength: float) -> torch.Tensor:
    """x0 - eta r(t) g / rms(g): a step with root mean square eta r(t), whatever the scale of the loss.

    Args:
        clean: x0 [B, ...].
        gradient: g = dL/dx0 [B, ...]; an image whose gradient is 0 stays unchanged.
        strength: eta; 0 returns x0 itself.

    Raises:
        ValueError: for a strength that is negative or not finite.
    """
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength must be a number >= 0, got {strength!r}; 0 switches guidance off")
    if strength == 0:
        return clean
    gradient = _at_least_float32(gradient)
    size = gradient.square().flatten(1).mean(1).sqrt().clamp_min(_TINY)
    size = size.reshape(-1, *[1] * (gradient.ndim - 1))
    return clean - (strength * noise_share(time) * gradient / size).to(clean.dtype)


def pull_to(clean: torch.Tensor, target: torch.Tensor, time: float, pull: float) -> torch.Tensor:
    """x0 + pull t^2 (z_soft - x0): early steps stay near the soft VQ decode.

    Args:
        target: z_soft, the latents of the image that the VQ decoder makes from the expected code vectors.
        pull: 0..1; 0 returns x0 itself.

    Raises:
        ValueError: for a pull outside 0..1.
    """
    if not 0 <= pull <= 1:
        raise ValueError(f"pull must lie in 0..1, got {pull!r}; 0 switches it off")
    return clean if pull == 0 else clean + pull * time**2 * (target.to(clean) - clean)


def velocity_towards(noised: torch.Tensor, clean: torch.Tensor, time: float) -> torch.Tensor:
    """v = (z_t - x0) / t, the velocity whose predicted clean latent is x0; the inverse of `flow.recover_clean`.

    Raises:
        ValueError: unless t > 0; at t = 0 every velocity has the same clean latent.
    """
    if not time > 0:
        raise ValueError(f"time must be above 0, got {time!r}")
    return (noised - clean) / time


def clean_from_noise(noised: torch.Tensor, noise: torch.Tensor, alpha_bar: float) -> torch.Tensor:
    """x0 of a model that predicts the noise, on x_t = sqrt(a) x0 + sqrt(1 - a) n (DDPM, arXiv 2006.11239, Eq. 4)."""
    return (noised - math.sqrt(1 - alpha_bar) * noise) / math.sqrt(alpha_bar)


def noise_from_clean(noised: torch.Tensor, clean: torch.Tensor, alpha_bar: float) -> torch.Tensor:
    """The noise for which `clean_from_noise` gives x0."""
    return (noised - math.sqrt(alpha_bar) * clean) / math.sqrt(1 - alpha_bar)


def clean_from_v(noised: torch.Tensor, v: torch.Tensor, alpha_bar: float) -> torch.Tensor:
    """x0 of a model that predicts v = sqrt(a) n - sqrt(1 - a) x0 (arXiv 2202.00512, Sec. 4)."""
    return math.sqrt(alpha_bar) * noised - math.sqrt(1 - alpha_bar) * v


def v_from_clean(noised: torch.Tensor, clean: torch.Tensor, alpha_bar: float) -> torch.Tensor:
    """The v for which `clean_from_v` gives x0."""
    return (math.sqrt(alpha_bar) * noised - clean) / math.sqrt(1 - alpha_bar)


def time_of_alpha(alpha_bar: float) -> float:
    """The t on the path above with the same noise-to-signal ratio: sigma / (1 + sigma), sigma^2 = (1 - a) / a; 1 if a
    is 0, which is noise alone."""
    noise, signal = math.sqrt(1 - alpha_bar), math.sqrt(alpha_bar)
    return noise / (signal + noise)


def time_of_sigma(sigma: float) -> float:
    """The t on the path above for x = x0 + sigma n (arXiv 2206.00364): sigma / (1 + sigma)."""
    return sigma / (1 + sigma)


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
