"""Trains the KL autoencoder whose latents the diffusion decoder generates (like FLUX's VAE, 16 channels).

`python -m dcdd_pico.train_autoencoder` trains both sides of the existing one further, after making it deeper if asked
to. This changes the latents: every model that reads or generates them has to be trained on the new ones.
docs/embedded.md lists these models with their commands. `train_vae_decoder` then trains the decoder alone, with a GAN
loss and the same latents.

Scenes are rendered on the fly, each seen once. Nothing is compiled: PyTorch 2.13 compiled an `UpDecoderBlock2D` for a
CPU in such a way that all layers before it got a gradient of zero, without any warning.

Shapes: B batch, C channels, h w latent pixels.
"""

from __future__ import annotations

import copy

import torch
from diffusers import AutoencoderKL
from torch import nn

from dcdd_core.method.sampling import keyed_generator
from dcdd_core.training.ema import EMA
from dcdd_core.training.schedules import set_learning_rate, warmup_cosine
from dcdd_core.training.trainable import trained_weights

from .autoencoder_command import run_command
from .build_context import BuildContext, Recipe, digest
from .image_losses import blemishes, fidelity, reconstruction_loss
from .reader import SceneReader
from .scene_arrays import FreshImages
from .scenes import scene_pixels
from .training_loop import train

#: Folder of the log and the checkpoint.
FOLDER = "autoencoder"
_STAGE = 2
#: Peak learning rates: for an untrained autoencoder, and for one that is trained further.
_RATE, _FURTHER_RATE = 1e-3, 3e-4
_DIVERGENCE = 1e-3
_BLOCK = 1024
_BATCH = 32


def autoencoder_config(layers: int = 1) -> dict:
    """f = 4, 16 latent channels: one packed 2 x 2 latent per 8-pixel token.

    Args:
        layers: residual blocks of the encoder at each resolution; the decoder has one more.
    """
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [16, 32, 64],
        "layers_per_block": layers,
        "latent_channels": 16,
        "norm_num_groups": 4,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.0,
        "scaling_factor": 1.0,
    }


def untrained(recipe: Recipe) -> AutoencoderKL:
    """An untrained autoencoder; its random weights depend on the recipe's seed only."""
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed + _STAGE)
        return AutoencoderKL(**autoencoder_config(recipe.vae_decoder_layers))


def deepened(vae: AutoencoderKL, layers: int, *, seed: int = 0, encoder_learns: bool = False) -> AutoencoderKL:
    """The same function with more residual blocks at each resolution; `vae` is not changed.

    An `AutoencoderKL` has one configuration for both sides. Its widths cannot grow without changing the function, since
    group normalisation sees all channels of a group. Its depth can: a residual block whose last convolution is zero
    passes its input on (Net2DeeperNet, Chen et al. 2016, arXiv 1511.05641). All new blocks end in such a convolution.
    Their first convolution is drawn from the seed, so that the block can learn, or is zero too, which takes next to no
    space in a compressed file.

    Args:
        layers: `layers_per_block` of the result; the decoder has one more at each resolution.
        encoder_learns: the encoder's new blocks can learn as well; otherwise they are all zeros.

    Raises:
        ValueError: if `layers` is fewer than `vae` has.
    """
    if layers < vae.config.layers_per_block:
        raise ValueError(
            f"the autoencoder has {vae.config.layers_per_block} layers a block and cannot get {layers}: choose at "
            "least as many"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        deeper = AutoencoderKL.from_config({**vae.config, "layers_per_block": layers})
    deeper.to(device=vae.device, dtype=vae.dtype).train(vae.training)
    old, drawn = vae.state_dict(), ("decoder.", "encoder.") if encoder_learns else ("decoder.",)
    for name, weight in deeper.state_dict().items():
        if name in old:
            if not (name.startswith(drawn) and ".conv1." in name and not old[name].any()):
                weight.copy_(old[name])
        elif ".conv2." in name or (not name.startswith(drawn) and ".conv1." in name):
            weight.zero_()
    return deeper.requires_grad_(False)


def train_autoencoder(
    context: BuildContext, start: AutoencoderKL, loss_reader: SceneReader, *, rate: float = _RATE, ahead: bool = True
) -> AutoencoderKL:
    """Trains (or restores) both sides of an autoencoder, and returns the result; `start` is not changed.

    Its shift and scale are kept; see `normalise`.

    Args:
        rate: peak learning rate.
        ahead: see `FreshImages`.
    """
    recipe, device = context.recipe, context.device
    steps, size = recipe.autoencoder_steps, recipe.autoencoder_batch
    vae = copy.deepcopy(start).to(device).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    ema = EMA(trained_weights(vae), 0.998)
    scenes = FreshImages("train", recipe.size, block=_BLOCK, ahead=ahead)
    held_out = scene_pixels(context.held_out_images, device)
    with torch.no_grad(), context.autocast():
        before = torch.cat([start.encode(part).latent_dist.mean for part in held_out.split(_BATCH)])

    def step(i: int) -> dict[str, torch.Tensor]:
        draw = keyed_generator(recipe.seed, _STAGE, i)
        set_learning_rate(optimizer, warmup_cosine(i, steps, peak=rate, warmup=min(200, max(1, steps // 10))))
        pixels = scene_pixels(scenes.batch(i, size), device)
        with context.autocast():
            posterior = vae.encode(pixels).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float().clamp(-20, 10)
        noise = torch.randn(mean.shape, generator=draw).to(device)
        with context.autocast():
            decoded = vae.decode(mean + (0.5 * log_variance).exp() * noise).sample.float()
        divergence = kl_divergence(mean, log_variance)
        loss, parts = reconstruction_loss(pixels, decoded, loss_reader, context.autocast)
        optimizer.zero_grad(set_to_none=True)
        (loss + _DIVERGENCE * divergence).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        ema.update()
        return parts | {"divergence": divergence.detach()}

    @torch.no_grad()
    def evaluate(_: int) -> dict[str, float]:
        with ema.swapped_in(), context.autocast():
            means = torch.cat([vae.encode(part).latent_dist.mean for part in held_out.split(_BATCH)])
            decoded = torch.cat([vae.decode(part).sample.float().clamp(-1, 1) for part in means.split(_BATCH)])
        drift = (means - before).float().square().mean().sqrt()
        found = fidelity(held_out, decoded, loss_reader) | blemishes(held_out, decoded)
        return found | {"drift of latents": float(drift)}

    try:
        train(
            context.folder / FOLDER,
            settings=context.settings(
                "autoencoder_batch",
                architecture=autoencoder_config(vae.config.layers_per_block),
                rate=rate,
                divergence=_DIVERGENCE,
                start=digest(start),
                loss_reader=digest(loss_reader),
            ),
            steps=steps,
            step=step,
            state={"model": vae, "ema": ema, "optimizer": optimizer},
            evaluate=evaluate,
            evaluate_every=500,
            save_every=250,
        )
    finally:
        scenes.close()
    ema.apply()
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def normalise(context: BuildContext, vae: AutoencoderKL) -> None:
    """Sets shift and scale so that latents of training scenes have mean 0 and standard deviation 1."""
    images = context.train_images[: min(512, context.recipe.train_scenes)]
    latents = [
        vae.encode(scene_pixels(images[i : i + _BATCH], context.device)).latent_dist.mean
        for i in range(0, len(images), _BATCH)
    ]
    latents = torch.cat(latents)
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))


def kl_divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """KL divergence of N(mean, exp(log_variance)) from N(0, 1) in nats, mean over all elements [B, C, h, w]."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def main() -> None:
    def train(context: BuildContext, vae: AutoencoderKL, loss_reader: SceneReader) -> AutoencoderKL:
        recipe = context.recipe
        start = deepened(vae, recipe.vae_decoder_layers, seed=recipe.seed + _STAGE, encoder_learns=True)
        return train_autoencoder(context, start, loss_reader, rate=_FURTHER_RATE)

    run_command(__doc__, "autoencoder", train)


if __name__ == "__main__":
    main()
