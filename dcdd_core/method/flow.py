"""The decoder's diffusion on FLUX's rectified-flow path (Eqs. 18, 25-26).

The path is our choice: the paper says v-prediction but fine-tunes FLUX.1-Fill, which predicts n - z0.
Time t runs from 0 (the clean latent z0) to 1 (noise n). Arithmetic is float32; results have the latents' dtype.

Shapes: B batch; latents [B, ...], packed or not.
"""

from __future__ import annotations

import math

import torch

DENSITIES = ("logit_normal", "mode", "uniform")
WEIGHTINGS = ("uniform", "sigma_sqrt", "cosmap")
#: Smallest time of diffusers' training scripts, which have 1,000 of them.
_FIRST_TIME = 1e-3

Time = torch.Tensor | float


def interpolate(clean: torch.Tensor, noise: torch.Tensor, time: Time) -> torch.Tensor:
    """z_t = (1 - t) z0 + t n (Eq. 18); t is one number or [B].

    Raises:
        ValueError: for times that are neither.
    """
    t = _over(time, clean)
    return ((1 - t) * clean + t * noise).to(clean.dtype)


def velocity(clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The target n - z0 (Eq. 26), dz_t / dt."""
    return noise - clean


def recover_clean(noised: torch.Tensor, velocity: torch.Tensor, time: Time) -> torch.Tensor:
    """z0 = z_t - t v; t is one number or [B].

    Raises:
        ValueError: for times that are neither.
    """
    return (noised - _over(time, noised) * velocity).to(noised.dtype)


def euler_step(noised: torch.Tensor, velocity: torch.Tensor, time: Time, next_time: Time) -> torch.Tensor:
    """Euler step z_t' = z_t + (t' - t) v from t to t' < t; each time is one number or [B].

    Raises:
        ValueError: for times that are neither.
    """
    return (noised + (_over(next_time, noised) - _over(time, noised)) * velocity).to(noised.dtype)


def average_velocity(noised: torch.Tensor, arrived: torch.Tensor, time: Time, next_time: Time) -> torch.Tensor:
    """(z_t - z_t') / (t - t') in float32, the velocity with which `euler_step` leads from z_t at t to z_t' at t' < t.

    Each time is one number or [B].

    Raises:
        ValueError: for times that are neither.
    """
    return (noised.float() - arrived.float()) / (_over(time, noised) - _over(next_time, noised))


def resolution_shift(image_tokens: int) -> float:
    """FLUX's mu for a packed latent of this many tokens: linear, 256 -> 0.5, 4096 -> 1.15.

    Raises:
        ValueError: for fewer than one token.
    """
    if image_tokens < 1:
        raise ValueError(f"image_tokens must be at least 1, got {image_tokens!r}")
    return 0.5 + (1.15 - 0.5) * (image_tokens - 256) / (4096 - 256)


def shift_time(time: torch.Tensor, shift: float) -> torch.Tensor:
    """t' = e^mu / (e^mu + 1/t - 1) with mu = `shift`; mu > 0 moves times towards the noise. 0 and 1 stay."""
    shifted = math.exp(shift) * time / (math.exp(shift) * time + 1 - time)
    # At t = 1 a very negative mu rounds the denominator to 0.
    return torch.where(time == 1, time, shifted)


def timesteps(steps: int, *, shift: float) -> torch.Tensor:
    """The sampler's times, [steps + 1] float32 from 1 down to 0.

    Args:
        steps: Euler steps, at least 1.
        shift: mu, for example from `resolution_shift`; 0 is a uniform schedule.

    Raises:
        ValueError: for steps < 1, or a shift outside -100..100.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps!r}")
    if not -100 <= shift <= 100:
        raise ValueError(f"shift must be a number in -100..100, got {shift!r}; 0 is an even schedule")
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def sample_times(
    count: int,
    *,
    generator: torch.Generator,
    density: str = "logit_normal",
    shift: float = 0.0,
) -> torch.Tensor:
    """Training times, [count] float32 in 0..1, from one of diffusers' densities, then shifted by mu = `shift`.

    The densities' parameters are the defaults of diffusers' training scripts. Drawn from `generator`, on its device.

    Raises:
        ValueError: for an unknown density.
    """
    if density not in DENSITIES:
        raise ValueError(f"density must be one of {', '.join(DENSITIES)}, got {density!r}")
    # Imported here since it loads most of diffusers, which sampling does not need.
    from diffusers.training_utils import compute_density_for_timestep_sampling

    time = compute_density_for_timestep_sampling(
        density,
        count,
        logit_mean=0.0,
        logit_std=1.0,
        mode_scale=1.29,
        device=generator.device,
        generator=generator,
    )
    return shift_time(time, shift)


def loss_weight(time: torch.Tensor, weighting: str = "uniform") -> torch.Tensor:
    """w(t) of Eq. 26, [B] float32, as in diffusers: 1, t^-2 ("sigma_sqrt") or SD3's "cosmap".

    Times below .001, which diffusers' scripts never draw, weigh as much as .001: t^-2 is infinite at t = 0.

    Raises:
        ValueError: for an unknown weighting.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    return compute_loss_weighting_for_sd3(weighting, time.float().clamp(min=_FIRST_TIME))


def _over(time: Time, latents: torch.Tensor) -> torch.Tensor:
    """t as float32, shaped to broadcast over [B, ...]."""
    t = torch.as_tensor(time, device=latents.device).float()
    if t.ndim == 0:
        # A zero-dimensional tensor would not promote half precision to float32.
        t = t[None]
    if t.ndim != 1 or len(t) not in (1, len(latents)):
        raise ValueError(f"time must be one number or one a sample, [{len(latents)}], got {list(t.shape)}")
    return t.reshape(-1, *[1] * (latents.ndim - 1))
