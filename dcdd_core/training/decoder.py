"""Training the diffusion decoder on pairs of latents and conditions (Eqs. 17-26).

Shapes: B batch, C latent channels, h' w' latent grid, f the autoencoder's factor, H = f h', W = f w'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..method.flow import interpolate, loss_weight, sample_times, velocity
from ..method.latents import fill_input, pack, pack_mask
from ..method.sampling import keyed_generator
from ..models.flux import DistributionConditionedDecoder
from ..types import Condition
from .loop import moving_average, set_learning_rate, train, warmup_cosine
from .optimizers import adamw_with_muon


@dataclass(frozen=True, kw_only=True)
class Example:
    """One batch to learn from.

    Attributes:
        latents: [B, C, h', w'], scaled.
        condition: of the same pictures.
        masked_latents: [B, C, h', w'], scaled latents of the pictures with the masked part blank; [1, C, h', w'] of a
            blank picture where everything is to be painted.
        mask: [B or 1, 1, H, W], 1 where to paint.
    """

    latents: torch.Tensor
    condition: Condition
    masked_latents: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class DecoderTraining:
    """Numbers of a decoder's training.

    Attributes:
        optimizer: "adamw" (the paper's), or "muon": orthogonalised momentum (Jordan et al. 2024) for the matrices
            inside the blocks, at steps of AdamW's size (Liu et al. 2025, arXiv 2502.16982), and AdamW for all else.
        compiled: each of the transformer's blocks runs compiled (torch.compile, one compilation for all of a kind): on
            a CPU, which then needs a C++ compiler, a step of the pico decoder takes about three quarters of the time.
    """

    steps: int
    learning_rate: float = 8e-4
    warmup: int = 200
    weight_decay: float = 0.01
    average_decay: float = 0.999
    density: str = "logit_normal"
    weighting: str = "uniform"
    seed: int = 0
    optimizer: str = "adamw"
    compiled: bool = False

    def __post_init__(self):
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be 'adamw' or 'muon', got {self.optimizer!r}")


def decoder_loss(
    decoder: DistributionConditionedDecoder, example: Example, draw: torch.Generator, recipe: DecoderTraining
) -> torch.Tensor:
    """Mean over the batch of w(t) |v - (n - z0)|^2 (Eq. 26), t and n from `draw`."""
    z0 = example.latents
    t = sample_times(len(z0), generator=draw, density=recipe.density).to(z0.device)
    noise = torch.randn(z0.shape, generator=draw).to(z0)
    size = (z0.shape[2], z0.shape[3])
    packed = fill_input(
        pack(interpolate(z0, noise, t)),
        pack(example.masked_latents),
        pack_mask(example.mask, decoder.card.vae_factor),
    )
    condition = decoder.condition_tokens(example.condition, size)
    predicted = decoder(packed, condition, t, size).float()
    error = (predicted - pack(velocity(z0, noise))).square().mean(dim=(1, 2))
    return (loss_weight(t, recipe.weighting) * error).mean()


def train_decoder(
    folder: Path,
    decoder: DistributionConditionedDecoder,
    examples: Callable[[int, torch.Generator], Example],
    recipe: DecoderTraining,
    *,
    settings: Mapping[str, Any],
    autocast: Callable[[], AbstractContextManager],
    evaluate: Callable[[DistributionConditionedDecoder], Mapping[str, float]] | None = None,
    evaluate_every: int = 500,
    save_every: int = 250,
) -> DistributionConditionedDecoder:
    """Trains (or restores) a decoder; returns its averaged weights in evaluation mode.

    Args:
        settings: what the examples depend on, see `loop.train`; the recipe and the card are added.
        examples: the batch of a step, a function of its number and the generator it is given.
        evaluate: held-out numbers of the averaged decoder, for the log.
    """
    decoder.train()
    trained = [p for p in decoder.parameters() if p.requires_grad]
    optimizers = _optimizers(decoder, recipe)
    average = moving_average(decoder, recipe.average_decay)
    if recipe.compiled:  # After the copy for the average was made: that one paints, at other sizes and batches.
        decoder.transformer.compile_repeated_blocks(fullgraph=True)

    def step(i: int) -> dict[str, torch.Tensor]:
        rate = warmup_cosine(i, recipe.steps, peak=recipe.learning_rate, warmup=recipe.warmup)
        draw = keyed_generator(recipe.seed, i)
        example = examples(i, draw)
        with autocast():
            loss = decoder_loss(decoder, example, draw, recipe)
        decoder.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers.values():
            set_learning_rate(optimizer, rate)
            optimizer.step()
        average.update_parameters(decoder)
        return {"loss": loss.detach(), "gradient_norm": norm.detach()}

    train(
        folder,
        settings={**settings, "recipe": asdict(recipe), "card": asdict(decoder.card)},
        steps=recipe.steps,
        step=step,
        state={"model": decoder, "average": average, **optimizers},
        evaluate=(lambda _: evaluate(average.module.eval())) if evaluate else None,
        evaluate_every=evaluate_every,
        save_every=save_every,
    )
    return average.module.eval().requires_grad_(False)


def _optimizers(decoder: DistributionConditionedDecoder, recipe: DecoderTraining) -> dict[str, torch.optim.Optimizer]:
    """By name; each trained weight is in one of them."""
    weights = {name: p for name, p in decoder.named_parameters() if p.requires_grad}
    # Not the modulations: their input is the time alone, and they start at zero.
    inner = [n for n, p in weights.items() if "_blocks." in n and p.ndim == 2 and ".norm" not in n]
    inner = inner if recipe.optimizer == "muon" else []
    return adamw_with_muon(weights, inner, betas=(0.9, 0.99), weight_decay=recipe.weight_decay)
