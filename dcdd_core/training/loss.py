"""The decoder's training loss (Eqs. 17-26)."""

from __future__ import annotations

import torch

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
        generator: draws the times t and the noise n, and after them whose conditions are left out.
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
        dropped: [B], True where the decoder's null condition takes the condition's place; None for nowhere.
    """
    z0 = example.latents
    t, noise = t.to(z0.device), noise.to(z0)
    size = (z0.shape[2], z0.shape[3])
    backbone = decoder.backbone
    context = backbone.context(example.masked_latents, example.mask, decoder.card.vae_factor)
    condition = decoder.condition_tokens(example.condition, size)
    if dropped is not None:
        # A choice between the two, so that every trained weight has a gradient in every process and step.
        null = decoder.null_tokens(example.condition, size).to(condition.dtype)
        condition = torch.where(dropped.to(z0.device)[:, None, None], null, condition)
    predicted = decoder(backbone.pack(interpolate(z0, noise, t)), context, condition, t, size).float()
    error = (predicted - backbone.pack(velocity(z0, noise))).square().mean(dim=(1, 2))
    return loss_weight(t, weighting) * error
