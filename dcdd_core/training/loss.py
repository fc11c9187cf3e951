"""The decoder's training loss (Eqs. 17-26)."""

from __future__ import annotations

import torch

from ..method.distillation import Velocity
from ..method.flow import interpolate, loss_weight, sample_times, velocity
from ..models.decoder import DistributionConditionedDecoder
from .config import OptimizationConfig
from .examples import Example


def decoder_loss(
    decoder: DistributionConditionedDecoder,
    example: Example,
    generator: torch.Generator,
    config: OptimizationConfig,
    *,
    drop: float = 0.0,
) -> torch.Tensor:
    """Mean over the batch of w(t) |v - (n - z0)|^2 (Eq. 26), a scalar in float32.

    |.|^2 is the mean over a latent's elements.

    Args:
        generator: draws the times t and the noise n, and then which conditions are left out.
        drop: share of the images whose condition is left out, for a decoder that has a null condition.
    """
    z0 = example.latents
    t = sample_times(len(z0), generator=generator, density=config.density, shift=config.shift)
    noise = torch.randn(z0.shape, generator=generator)
    dropped = torch.rand(len(z0), generator=generator) < drop if drop else None
    return velocity_losses(decoder, example, t, noise, config.weighting, dropped).mean()


def velocity_losses(
    decoder: DistributionConditionedDecoder,
    example: Example,
    t: torch.Tensor,
    noise: torch.Tensor,
    weighting: str,
    dropped: torch.Tensor | None = None,
) -> torch.Tensor:
    """w(t) |v - (n - z0)|^2 (Eq. 26) of each image, [B] in float32.

    Args:
        t, noise: [B] and [B, C, h', w'], on any device.
        weighting: one of `method.flow.WEIGHTINGS`.
        dropped: bool [B], True where the decoder's null condition replaces the condition; None for nowhere.
    """
    z0 = example.latents
    t, noise = t.to(z0.device), noise.to(z0)
    pack = decoder.backbone.pack
    predicted = trained_velocity(decoder, example, dropped)(pack(interpolate(z0, noise, t)), t)
    error = (predicted - pack(velocity(z0, noise))).square().mean(dim=(1, 2))
    return loss_weight(t, weighting) * error


def trained_velocity(
    decoder: DistributionConditionedDecoder, example: Example, dropped: torch.Tensor | None = None
) -> Velocity:
    """The velocity that a decoder predicts for packed latents [B, L, F] at times [B], with gradients for its weights.

    Args:
        dropped: see `velocity_losses`.
    """
    size = (example.latents.shape[2], example.latents.shape[3])
    context = decoder.backbone.context(example.masked_latents, example.mask, decoder.card.vae_factor)
    condition = decoder.condition_tokens(example.condition, size)
    if dropped is not None:
        # Both are computed and one is chosen, so that every trained weight has a gradient in every process and step.
        null = decoder.null_tokens(example.condition, size).to(condition.dtype)
        condition = torch.where(dropped.to(null.device)[:, None, None], null, condition)
    return lambda packed, t: decoder(packed, context, condition, t, size).float()
