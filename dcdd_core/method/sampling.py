"""How an image token is drawn from logits: guidance, temperature, filters, Gumbel-max.

All logits are returned as new float32 tensors. A draw is argmax(l + g) with noise g that depends only on (sample seed,
position) (our choice). It is a sample from softmax(l), the same in any batch, in any order and on any device.

Shapes: B batch, P positions, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

NOT_FINITE = "logits hold NaN or +inf, or bar every code"
"""Message for a draw whose largest value is not finite."""


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance, uncond + g (cond - uncond); a code that either bars (-inf) stays barred.

    Args:
        conditional, unconditional: logits [..., K] of one shape, or a decoder's velocities.
        guidance: g; 1 is the conditional model, 0 the unconditional.

    Returns:
        float32 of the same shape, since guidance amplifies the rounding errors of half precision.

    Raises:
        ValueError: for different shapes, or a g that is not finite.
    """
    if conditional.shape != unconditional.shape:
        raise ValueError(
            f"conditional {list(conditional.shape)} and unconditional {list(unconditional.shape)} values must have one "
            "shape: split the rows of the batch in two halves"
        )
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be a finite number, got {guidance!r}; 1 switches it off")
    conditional, unconditional = conditional.float(), unconditional.float()
    guided = unconditional + guidance * (conditional - unconditional)
    return guided.masked_fill((conditional == -torch.inf) | (unconditional == -torch.inf), -torch.inf)


def temper(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """l / T, [..., K] float32; T = 0 is greedy: all but the (first) largest logit become -inf.

    Raises:
        ValueError: for a T that is negative or not finite.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature must be a finite number >= 0, got {temperature!r}; 0 is greedy, 1 changes nothing"
        )
    logits = logits.float()
    if temperature > 0:
        return logits / temperature
    best = logits.argmax(-1, keepdim=True)
    return torch.full_like(logits, -torch.inf).scatter(-1, best, logits.gather(-1, best))


def top_k(logits: torch.Tensor, k: int | None) -> torch.Tensor:
    """Bars all codes but the k largest of [..., K] (ties with the k-th stay, on every device alike); None or 0 is off.

    Raises:
        ValueError: if k is not a whole number >= 0.
    """
    if k is not None and (not isinstance(k, int) or k < 0):
        raise ValueError(f"top_k must be a whole number >= 0, got {k!r}; 0 or None switches it off")
    logits = logits.float()
    if not k or k >= logits.shape[-1]:
        return logits.clone()
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)


def top_p(logits: torch.Tensor, p: float | None) -> torch.Tensor:
    """Bars all codes of [..., K] but the fewest most likely ones with total mass p, at least one; None or 1 is off.

    Raises:
        ValueError: for a p outside (0, 1].
    """
    if p is not None and not 0 < p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {p!r}; 1 or None switches it off")
    logits = logits.float()
    if p is None or p == 1:
        return logits.clone()
    mass, order = logits.softmax(-1).sort(descending=True, stable=True)
    barred = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, mass.cumsum(-1) - mass >= p)
    return logits.masked_fill(barred, -torch.inf)


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator for a key of whole numbers, such as (sample seed, position)."""
    # Torch's CPU generator keeps the low 32 bits of its seed, so all numbers have to be mixed into those.
    state = 0
    for part in key:
        state = _splitmix64(state + part)
    return torch.Generator("cpu").manual_seed(state)


def gumbel_noise(seed: int, position: int, codes: int) -> torch.Tensor:
    """Standard Gumbel noise [K] float32 on the CPU, a function of (seed, position) only.

    Raises:
        ValueError: for a position < 0 or codes < 1.
    """
    if position < 0 or codes < 1:
        raise ValueError(f"expected a position >= 0 and at least one code, got position {position}, {codes} codes")
    generator = keyed_generator(seed, position)
    # float64, since 24 bits would quantise the upper tail, where the largest of many codes lies, into visible steps.
    uniform = torch.rand(codes, generator=generator, dtype=torch.float64).clamp_(min=torch.finfo(torch.float64).tiny)
    return uniform.log_().neg_().log_().neg_().float()


def gumbel_noise_grid(seeds: Sequence[int], positions: Sequence[int], codes: int) -> torch.Tensor:
    """`gumbel_noise` of all (seed, position) pairs, [B, P, K] float32 on the CPU."""
    return torch.stack([torch.stack([gumbel_noise(s, p, codes) for p in positions]) for s in seeds])


def gumbel_max(logits: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """max(l + g) float32 and argmax(l + g) int64 over [..., K], unchecked and without waiting for the device.

    The maximum is finite unless logits hold NaN or +inf, or bar every code.

    Args:
        logits: [..., K], after temperature and filters.
        noise: [..., K] of the same shape, on the same device.
    """
    return (logits.float() + noise).max(-1)


def _splitmix64(state: int) -> int:
    mask = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)
