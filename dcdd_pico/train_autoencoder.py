"""Trains the KL autoencoder whose latents the diffusion decoder generates (like FLUX's VAE, 16 channels).

Its decoder is then made deeper and trained further by itself (`train_vae_decoder`), with the same latents, so that the
diffusion decoder need not wait for it.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import nn

from dcdd_core.method.sampling import keyed_generator
from dcdd_core.training.ema import EMA
from dcdd_core.training.schedules import set_learning_rate, warmup_cosine
from dcdd_core.training.trainable import trained_weights

from .build_context import BuildContext, digest
from .image_losses import fidelity, reconstruction_loss
from .reader import SceneReader
from .scenes import scene_pixels
from .training_loop import train

_STAGE = 2


def autoencoder_config() -> dict:
    """f = 4, 16 latent channels: one packed 2 x 2 latent per 8-pixel token."""
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [16, 32, 64],
        "layers_per_block": 1,
        "latent_channels": 16,
        "norm_num_groups": 4,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.0,
        "scaling_factor": 1.0,
    }


def train_autoencoder(context: BuildContext, loss_reader: SceneReader) -> AutoencoderKL:
    """Trains (or restores) the autoencoder and returns it in evaluation mode.

    Its shift and scale are set so that latents of training scenes have mean 0 and standard deviation 1.
    """
    recipe, device = context.recipe, context.device
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed + _STAGE)
        vae = AutoencoderKL(**autoencoder_config()).train().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=1e-4)
    ema = EMA(trained_weights(vae), 0.998)

    def step(i: int) -> dict[str, torch.Tensor]:
        draw = keyed_generator(recipe.seed, _STAGE, i)
        set_learning_rate(optimizer, warmup_cosine(i, recipe.autoencoder_steps, peak=1e-3, warmup=200))
        pixels = scene_pixels(context.train_images[context.batch(_STAGE, i, recipe.autoencoder_batch)], device)
        with context.autocast():
            posterior = vae.encode(pixels).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float().clamp(-20, 10)
        noise = torch.randn(mean.shape, generator=draw).to(device)
        with context.autocast():
            decoded = vae.decode(mean + (0.5 * log_variance).exp() * noise).sample.float()
        divergence = kl_divergence(mean, log_variance)
        loss, parts = reconstruction_loss(pixels, decoded, loss_reader, context.autocast)
        loss = loss + 2e-3 * divergence
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        ema.update()
        return parts | {"divergence": divergence.detach()}

    def evaluate(_: int) -> dict[str, float]:
        with ema.swapped_in():
            return _evaluate(context, vae, loss_reader)

    train(
        context.folder / "autoencoder",
        settings=context.settings(
            "autoencoder_batch", architecture=autoencoder_config(), loss_reader=digest(loss_reader)
        ),
        steps=recipe.autoencoder_steps,
        step=step,
        state={"model": vae, "ema": ema, "optimizer": optimizer},
        evaluate=evaluate,
        evaluate_every=500,
        save_every=500,
    )
    ema.apply()
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        latents = torch.cat(
            [
                vae.encode(scene_pixels(context.train_images[i : i + 32], device)).latent_dist.mean
                for i in range(0, min(512, recipe.train_scenes), 32)
            ]
        )
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    return vae


def kl_divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """KL divergence of N(mean, exp(log_variance)) from N(0, 1) in nats, mean over all elements."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


@torch.no_grad()
def _evaluate(context: BuildContext, vae: AutoencoderKL, loss_reader: SceneReader) -> dict[str, float]:
    pixels = scene_pixels(context.held_out_images, context.device)
    decoded = []
    for part in pixels.split(32):
        with context.autocast():
            decoded.append(vae.decode(vae.encode(part).latent_dist.mean).sample.float().clamp(-1, 1))
    return fidelity(pixels, torch.cat(decoded), loss_reader)
