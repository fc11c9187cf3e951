"""Trains a decoder on, its encoder frozen, with an adversarial loss: the VQ-VAE's and the autoencoder's alike.

VQGAN's loss: hinge, PatchGAN, weight from the ratio of gradients at the last layer (Esser et al. 2021, Eqs. 6-7).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dcdd_core.method.sampling import keyed_generator
from dcdd_core.training.simple_loop import moving_average, set_learning_rate, train, warmup_cosine

from .build_context import Workshop
from .image_losses import reconstruction_loss
from .reader import SceneReader
from .scenes import scene_pixels


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017) with three strided convolutions: pixels [B, 3, H, W] -> scores [B, 1, H/8, W/8]."""

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


def polish(
    shop: Workshop,
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
) -> nn.Module:
    """Trains (or restores) `decoder` in the folder called `name`; returns the moving average of its weights.

    Args:
        stage: the number that its randomness is drawn under.
        last: the weight of its last layer.
        encode: pixels [B, 3, H, W] in -1..1 and a generator -> what is decoded; run without gradients.
        decode: the decoder and what is decoded -> pixels.
        evaluate: of the averaged decoder.
    """
    device = shop.device
    ramp = max(1, int(0.05 * steps))
    with torch.random.fork_rng():
        torch.manual_seed(shop.recipe.seed + stage)
        adversary = PatchDiscriminator().to(device)
    decoder.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=1e-4)
    adversary_optimizer = torch.optim.AdamW(adversary.parameters(), lr=3e-4, betas=(0.5, 0.9))
    average = moving_average(decoder, 0.998)

    def step(i: int) -> dict[str, torch.Tensor]:
        set_learning_rate(optimizer, warmup_cosine(i, steps, peak=4e-4, warmup=100))
        pixels = scene_pixels(shop.train_images[shop.batch(stage, i, batch)], device)
        with torch.no_grad():
            encoded = encode(pixels, keyed_generator(shop.recipe.seed, stage, i))
        with shop.autocast():
            decoded = decode(decoder, encoded).float()
            fooling = -adversary(decoded).float().mean()
        faithful, parts = reconstruction_loss(pixels, decoded, loss_reader, shop.autocast)
        (of_faithful,) = torch.autograd.grad(faithful, last, retain_graph=True)
        (of_fooling,) = torch.autograd.grad(fooling, last, retain_graph=True)
        ratio = (of_faithful.norm() / (of_fooling.norm() + 1e-6)).clamp(0, 1e3)
        loss = faithful + 0.25 * min(1.0, i / ramp) * ratio * fooling
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(decoder)
        with shop.autocast():
            real, fake = adversary(pixels).float(), adversary(decoded.detach()).float()
        judged = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        adversary_optimizer.zero_grad(set_to_none=True)
        judged.backward()
        adversary_optimizer.step()
        return parts | {"fooling": fooling.detach(), "adversary": judged.detach()}

    train(
        shop.folder / name,
        settings=settings,
        steps=steps,
        step=step,
        state={
            "model": decoder,
            "adversary": adversary,
            "average": average,
            "optimizer": optimizer,
            "adversary_optimizer": adversary_optimizer,
        },
        evaluate=lambda _: evaluate(average.module),
        evaluate_every=500,
        save_every=250,
    )
    return average.module
