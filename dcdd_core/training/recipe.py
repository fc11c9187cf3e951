"""The decoder's loss (Eqs. 17-26), and the numbers of its training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..method.flow import DENSITIES, WEIGHTINGS, interpolate, loss_weight, sample_times, velocity
from ..models.decoder import DistributionConditionedDecoder
from .examples import Example
from .optimizers import OPTIMIZERS, adamw_8bit, adamw_with_muon
from .trainable import trained_weights


@dataclass(frozen=True, kw_only=True)
class DecoderTraining:
    """Numbers of a decoder's training.

    Attributes:
        steps: updates of the weights.
        accumulation: batches of each process that one update adds up.
        learning_rate, warmup: its peak, and the steps up to it; then a half cosine down.
        clip: greatest length of the gradient.
        average_decay: of the weights' moving average, which is what the training results in.
        density, weighting: of the time, and w(t) of Eq. 26, by diffusers' names (`method.flow`).
        shift: mu that the times are then shifted by; above 0 more of them lie near the noise.
        optimizer: "adamw" (the paper's), "adamw8bit" (`optimizers.adamw_8bit`), or "muon": orthogonalised momentum
            (Jordan et al. 2024) for the matrices inside the blocks, at steps of AdamW's size (Liu et al. 2025, arXiv
            2502.16982), and AdamW for all else.
        compiled: each of the transformer's blocks runs compiled (torch.compile, one compilation for all of a kind): on
            a CPU, which then needs a C++ compiler, a step of the pico decoder takes about three quarters of the time.
        recomputed: gradient checkpointing, which keeps no block's activations but computes them again.
    """

    steps: int
    accumulation: int = 1
    learning_rate: float = 8e-4
    warmup: int = 200
    weight_decay: float = 0.01
    clip: float = 1.0
    average_decay: float = 0.999
    density: str = "logit_normal"
    shift: float = 0.0
    weighting: str = "uniform"
    seed: int = 0
    optimizer: str = "adamw"
    compiled: bool = False
    recomputed: bool = False

    def __post_init__(self):
        choices = {"optimizer": OPTIMIZERS, "density": DENSITIES, "weighting": WEIGHTINGS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not math.isfinite(self.shift):
            raise ValueError(f"shift must be a finite number, got {self.shift!r}")
        if self.steps < 1 or self.accumulation < 1:
            raise ValueError(f"steps and accumulation must be at least 1, got {self.steps} and {self.accumulation}")
        if not self.learning_rate > 0 or self.warmup < 0 or not self.clip > 0 or not 0 <= self.average_decay < 1:
            raise ValueError(
                "a training needs a learning rate and a clip above 0, a warm-up of 0 or more steps and an average's "
                f"decay in [0, 1), got {self.learning_rate}, {self.clip}, {self.warmup} and {self.average_decay}"
            )


def decoder_loss(
    decoder: DistributionConditionedDecoder, example: Example, draw: torch.Generator, recipe: DecoderTraining
) -> torch.Tensor:
    """Mean over the batch of w(t) |v - (n - z0)|^2 (Eq. 26), t and n from `draw`."""
    z0 = example.latents
    t = sample_times(len(z0), generator=draw, density=recipe.density, shift=recipe.shift).to(z0.device)
    noise = torch.randn(z0.shape, generator=draw).to(z0)
    size = (z0.shape[2], z0.shape[3])
    backbone = decoder.backbone
    context = backbone.context(example.masked_latents, example.mask, decoder.card.vae_factor)
    condition = decoder.condition_tokens(example.condition, size)
    predicted = decoder(backbone.pack(interpolate(z0, noise, t)), context, condition, t, size).float()
    error = (predicted - backbone.pack(velocity(z0, noise))).square().mean(dim=(1, 2))
    return (loss_weight(t, recipe.weighting) * error).mean()


def decoder_optimizers(
    decoder: DistributionConditionedDecoder, recipe: DecoderTraining, *, sharded: bool = False
) -> list[torch.optim.Optimizer]:
    """Each trained weight is in one of them; `sharded` as for `adamw_8bit`."""
    weights = trained_weights(decoder)
    options = {"betas": (0.9, 0.99), "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adamw8bit":
        return list(adamw_8bit(weights, **options, sharded=sharded).values())
    inner = muon_matrices(weights) if recipe.optimizer == "muon" else []
    return list(adamw_with_muon(weights, inner, **options).values())


def muon_matrices(weights: Mapping[str, nn.Parameter]) -> list[str]:
    """Which of a decoder's trained weights Muon takes: the matrices inside the blocks.

    Not the modulations: their input is the time alone, and they start at zero.
    """
    return [name for name, weight in weights.items() if "_blocks." in name and weight.ndim == 2 and ".norm" not in name]
