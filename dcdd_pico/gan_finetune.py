"""Training of decoders with a GAN loss and frozen encoders: those of the VQ-VAE, the autoencoder and the opponents.

The losses are VQGAN's: hinge loss, PatchGAN discriminator, and an adaptive weight from the ratio of gradient norms at
the decoder's last layer (Esser et al. 2021, arXiv 2012.09841, Eqs. 6-7).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from dcdd_core.method.sampling import keyed_generator
from dcdd_core.training.ema import EMA
from dcdd_core.training.schedules import set_learning_rate, warmup_cosine
from dcdd_core.training.trainable import trained_weights

from .build_context import BuildContext
from .image_losses import reconstruction_loss
from .reader import SceneReader
from .scenes import scene_pixels
from .training_loop import train

#: What a decoder decodes.
Input = TypeVar("Input")


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017), three strided convolutions: pixels [B, 3, H, W] -> logits [B, 1, H/8, W/8]."""

    def __init__(self, width: int = 32):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in (1, 2):
            layers += [
                nn.Conv2d(width * i, width * i * 2, 4, 2, 1, bias=False),
                nn.GroupNorm(8, width * i * 2),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width * 4, 1, 3, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layers(pixels)


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Hinge loss of the discriminator's logits for real and decoded images: mean max(0, 1 - r) + mean max(0, 1 + f)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def generator_loss(fake: torch.Tensor) -> torch.Tensor:
    """Hinge loss of the decoder: minus the mean of the discriminator's logits for its images."""
    return -fake.mean()


def adaptive_weight(reconstruction: torch.Tensor, adversarial: torch.Tensor, last: nn.Parameter) -> torch.Tensor:
    """Weight of the adversarial loss: |d reconstruction / d last| / (|d adversarial / d last| + 1e-6), at most 1000.

    Args:
        reconstruction, adversarial: the two losses; their graphs are kept.
        last: weight of the decoder's last layer.
    """
    (fidelity_gradient,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    (adversarial_gradient,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    return (fidelity_gradient.norm() / (adversarial_gradient.norm() + 1e-6)).clamp(0, 1e3)


def adversarial_ramp(step: int, steps: int) -> float:
    """Factor of the adaptive weight at a step: rises linearly over the first 5 % of the steps to 0.25."""
    return 0.25 * min(1.0, step / max(1, int(0.05 * steps)))


def finetune_with_gan(
    context: BuildContext,
    name: str,
    stage: int,
    decoder: nn.Module,
    *,
    last: nn.Parameter,
    encode: Callable[[torch.Tensor, torch.Generator], torch.Tensor],
    decode: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    steps: int,
    batch: int,
    settings: dict[str, Any],
    loss_reader: SceneReader,
    evaluate: Callable[[nn.Module], dict[str, float]],
) -> None:
    """Fine-tunes (or restores) `decoder` in the folder called `name`; afterwards it holds its EMA weights.

    Args:
        stage: number of the training, on which its random numbers depend.
        last: weight of the decoder's last layer.
        encode: pixels [B, 3, H, W] in -1..1 and a generator -> input of the decoder; run without gradients.
        decode: decoder and its input -> pixels.
        evaluate: EMA decoder -> metrics.
    """

    def examples(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = scene_pixels(context.train_images[context.batch(stage, i, batch)], context.device)
        with torch.no_grad():
            return pixels, encode(pixels, keyed_generator(context.recipe.seed, stage, i))

    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=1e-4)
    train_with_gan(
        context,
        name,
        stage,
        decoder,
        last=last,
        examples=examples,
        decode=decode,
        optimizers={"optimizer": optimizer},
        peak=4e-4,
        steps=steps,
        settings=settings,
        loss_reader=loss_reader,
        evaluate=evaluate,
    )


def train_with_gan(
    context: BuildContext,
    name: str,
    stage: int,
    decoder: nn.Module,
    *,
    last: nn.Parameter,
    examples: Callable[[int], tuple[torch.Tensor, Input]],
    decode: Callable[[nn.Module, Input], torch.Tensor],
    optimizers: Mapping[str, torch.optim.Optimizer],
    peak: float,
    steps: int,
    settings: dict[str, Any],
    loss_reader: SceneReader,
    evaluate: Callable[[nn.Module], dict[str, float]],
    alone: int = 0,
) -> None:
    """`finetune_with_gan` for any optimisers and inputs.

    Args:
        examples: update number -> pixels [B, 3, H, W] in -1..1, and the decoder's input for them.
        optimizers: optimisers of all the decoder's weights, by their names in checkpoints.
        peak: peak learning rate.
        alone: number of updates before the discriminator joins.
    """
    device = context.device
    with torch.random.fork_rng():
        torch.manual_seed(context.recipe.seed + stage)
        discriminator = PatchDiscriminator().to(device)
    decoder.train().requires_grad_(True)
    discriminator_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=3e-4, betas=(0.5, 0.9))
    ema = EMA(trained_weights(decoder), 0.998)

    def update_decoder(i: int, loss: torch.Tensor) -> None:
        decoder.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        for optimizer in optimizers.values():
            set_learning_rate(optimizer, warmup_cosine(i, steps, peak=peak, warmup=100))
            optimizer.step()
        ema.update()

    def update_discriminator(pixels: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        with context.autocast():
            real, fake = discriminator(pixels).float(), discriminator(decoded).float()
        hinge = discriminator_loss(real, fake)
        discriminator_optimizer.zero_grad(set_to_none=True)
        hinge.backward()
        discriminator_optimizer.step()
        return hinge.detach()

    def step(i: int) -> dict[str, torch.Tensor]:
        pixels, given = examples(i)
        with context.autocast():
            decoded = decode(decoder, given).float()
        loss, parts = reconstruction_loss(pixels, decoded, loss_reader, context.autocast)
        if i < alone:
            update_decoder(i, loss)
            return parts
        with context.autocast():
            adversarial = generator_loss(discriminator(decoded).float())
        ratio = adaptive_weight(loss, adversarial, last)
        update_decoder(i, loss + adversarial_ramp(i - alone, steps) * ratio * adversarial)
        adversary = update_discriminator(pixels, decoded.detach())
        return parts | {"fooling": adversarial.detach(), "adversary": adversary}

    def evaluate_ema(_: int) -> dict[str, float]:
        with ema.swapped_in():
            return evaluate(decoder)

    train(
        context.folder / name,
        settings=settings,
        steps=steps,
        step=step,
        state={  # these names, and those of the log, are also in the checkpoints of builds
            "model": decoder,
            "adversary": discriminator,
            "ema": ema,
            "adversary_optimizer": discriminator_optimizer,
            **optimizers,
        },
        evaluate=evaluate_ema,
        evaluate_every=500,
        save_every=250,
    )
    ema.apply()
