"""Trains the KL autoencoder whose latents the diffusion decoder paints (FLUX's VAE in small: 16 channels).

In two stages, so that whoever learns its latents need not wait for its decoder's last polish:
1. `train_autoencoder`: all of it;
2. `train_vae_decoder`: the encoder frozen, and with it the latents; the decoder trained on with an adversarial loss.
"""

from __future__ import annotations

import copy

import torch
from diffusers import AutoencoderKL
from torch import nn

from dcdd_core.method.sampling import keyed_generator
from dcdd_core.training.simple_loop import moving_average, set_learning_rate, train, warmup_cosine

from .build_context import Workshop, digest
from .gan_finetune import polish
from .image_losses import fidelity, reconstruction_loss
from .reader import SceneReader
from .scenes import scene_pixels

_STAGE, _DECODER_STAGE = 2, 7


def autoencoder_config() -> dict:
    """f = 4, 16 latent channels: two packed latents a side of every 8-pixel token."""
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


def train_autoencoder(shop: Workshop, loss_reader: SceneReader) -> AutoencoderKL:
    """Trains (or restores) the autoencoder; returns it in evaluation mode, its shift and scale set so that latents have
    mean 0 and standard deviation 1 over training scenes."""
    recipe, device = shop.recipe, shop.device
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed + _STAGE)
        vae = AutoencoderKL(**autoencoder_config()).train().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=1e-4)
    average = moving_average(vae, 0.998)

    def step(i: int) -> dict[str, torch.Tensor]:
        draw = keyed_generator(recipe.seed, _STAGE, i)
        set_learning_rate(optimizer, warmup_cosine(i, recipe.autoencoder_steps, peak=1e-3, warmup=200))
        pixels = scene_pixels(shop.train_images[shop.batch(_STAGE, i, recipe.autoencoder_batch)], device)
        with shop.autocast():
            posterior = vae.encode(pixels).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float().clamp(-20, 10)
        noise = torch.randn(mean.shape, generator=draw).to(device)
        with shop.autocast():
            decoded = vae.decode(mean + (0.5 * log_variance).exp() * noise).sample.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss, parts = reconstruction_loss(pixels, decoded, loss_reader, shop.autocast)
        loss = loss + 2e-3 * divergence
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(vae)
        return parts | {"divergence": divergence.detach()}

    train(
        shop.folder / "autoencoder",
        settings=shop.settings("autoencoder_batch", architecture=autoencoder_config(), loss_reader=digest(loss_reader)),
        steps=recipe.autoencoder_steps,
        step=step,
        state={"model": vae, "average": average, "optimizer": optimizer},
        evaluate=lambda _: _evaluate(shop, average.module, average.module.decoder, loss_reader),
        evaluate_every=500,
        save_every=500,
    )
    vae = average.module.eval().requires_grad_(False)
    with torch.no_grad():
        latents = torch.cat(
            [
                vae.encode(scene_pixels(shop.train_images[i : i + 32], device)).latent_dist.mean
                for i in range(0, min(512, recipe.train_scenes), 32)
            ]
        )
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    return vae


def train_vae_decoder(shop: Workshop, vae: AutoencoderKL, loss_reader: SceneReader) -> AutoencoderKL:
    """Trains (or restores) the decoder on; returns an autoencoder of the same latents, `vae` stays as it is."""
    polished = copy.deepcopy(vae)

    def encode(pixels: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        with shop.autocast():
            posterior = vae.encode(pixels).latent_dist
        mean, deviation = posterior.mean.float(), (0.5 * posterior.logvar.float().clamp(-20, 10)).exp()
        return mean + deviation * torch.randn(mean.shape, generator=draw).to(mean.device)

    averaged = polish(
        shop,
        "vae-decoder",
        _DECODER_STAGE,
        polished.decoder,
        last=polished.decoder.conv_out.weight,
        encode=encode,
        decode=lambda decoder, latents: decoder(latents),
        steps=shop.recipe.vae_decoder_steps,
        batch=shop.recipe.autoencoder_batch,
        settings=shop.settings("autoencoder_batch", autoencoder=digest(vae), loss_reader=digest(loss_reader)),
        loss_reader=loss_reader,
        evaluate=lambda decoder: _evaluate(shop, vae, decoder, loss_reader),
    )
    polished.decoder.load_state_dict(averaged.state_dict())
    return polished.eval().requires_grad_(False)


@torch.no_grad()
def _evaluate(shop: Workshop, vae: AutoencoderKL, decoder: nn.Module, loss_reader: SceneReader) -> dict[str, float]:
    pixels = scene_pixels(shop.held_out_images, shop.device)
    decoded = []
    for part in pixels.split(32):
        with shop.autocast():
            decoded.append(decoder(vae.encode(part).latent_dist.mean).float().clamp(-1, 1))
    return fidelity(pixels, torch.cat(decoded), loss_reader)
