"""Trains a deeper decoder for pico's autoencoder: `python -m dcdd_pico.train_vae_decoder`.

The encoder, and so every latent, stays bit-identical: the diffusion decoder was trained on these latents. An
`AutoencoderKL` has one configuration for both sides, so both get more blocks, which change nothing at first
(`train_autoencoder.deepened`). The encoder's new blocks stay like that; the decoder's are trained. The decoder starts
from the existing one.

The losses are those of the VQ-VAE's decoder and the opponents (`gan_finetune`), none of them a metric of the tables;
the discriminator joins for the last quarter. Scenes are rendered on the fly, each seen once. Nothing is compiled
(`train_autoencoder`).

Besides SSIM, PSNR and perceptual distance on held-out scenes, the log has the visible defects of a round trip
(`image_losses.blemishes`): a tint of greys, and the error beside edges and elsewhere.

The network of the perceptual loss is trained first if the work folder has none. docs/embedded.md lists what new weights
make stale, and the commands that renew it.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import nn

from dcdd_core.method.sampling import keyed_generator

from .autoencoder_command import run_command
from .build_context import BuildContext, digest
from .gan_finetune import train_with_gan
from .image_losses import blemishes, fidelity
from .reader import SceneReader
from .scene_arrays import FreshImages
from .scenes import scene_pixels
from .train_autoencoder import deepened

#: Folder of the log and the checkpoint.
FOLDER = "vae-decoder"
_STAGE = 7
_RATE = 1e-3
#: Share of the updates before the discriminator joins.
_ALONE = 0.75
_BLOCK = 1024
_BATCH = 32


def train_vae_decoder(
    context: BuildContext, vae: AutoencoderKL, loss_reader: SceneReader, *, ahead: bool = True
) -> AutoencoderKL:
    """Trains (or restores) a deeper decoder; returns an autoencoder with the same latents. `vae` is not changed.

    Args:
        ahead: see `FreshImages`.
    """
    recipe, device = context.recipe, context.device
    steps, size = recipe.vae_decoder_steps, recipe.autoencoder_batch
    deeper = deepened(vae, recipe.vae_decoder_layers, seed=recipe.seed + _STAGE).to(device)
    decoder, alone = deeper.decoder, round(_ALONE * steps)
    scenes = FreshImages("train", recipe.size, block=_BLOCK, ahead=ahead)
    held_out = scene_pixels(context.held_out_images, device)

    @torch.no_grad()
    def posterior(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents, [B, C, h', w'] each."""
        with context.autocast():
            found = vae.encode(pixels).latent_dist
        return found.mean.float(), (0.5 * found.logvar.float().clamp(-20, 10)).exp()

    means = torch.cat([posterior(part)[0] for part in held_out.split(_BATCH)])

    def examples(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels and latents of an update: each scene's mean, plus noise at a random share of its posterior deviation.

        The diffusion decoder is trained on the means, but what it generates deviates from them.
        """
        pixels = scene_pixels(scenes.batch(i, size), device)
        mean, deviation = posterior(pixels)
        draw = keyed_generator(recipe.seed, _STAGE, i)
        share, noise = torch.rand(size, 1, 1, 1, generator=draw), torch.randn(mean.shape, generator=draw)
        return pixels, mean + (share * noise).to(device) * deviation

    @torch.no_grad()
    def evaluate(current: nn.Module) -> dict[str, float]:
        parts = []
        for part in means.split(_BATCH):
            with context.autocast():
                parts.append(current(part).float().clamp(-1, 1))
        decoded = torch.cat(parts)
        return fidelity(held_out, decoded, loss_reader) | blemishes(held_out, decoded)

    try:
        train_with_gan(
            context,
            FOLDER,
            _STAGE,
            decoder,
            last=decoder.conv_out.weight,
            examples=examples,
            decode=lambda network, latents: network(latents),
            optimizers={"optimizer": torch.optim.AdamW(decoder.parameters(), lr=0.0, betas=(0.9, 0.98), fused=True)},
            peak=_RATE,
            steps=steps,
            alone=alone,
            settings=context.settings(
                "autoencoder_batch",
                "vae_decoder_layers",
                rate=_RATE,
                alone=alone,
                autoencoder=digest(vae),
                loss_reader=digest(loss_reader),
            ),
            loss_reader=loss_reader,
            evaluate=evaluate,
        )
    finally:
        scenes.close()
    return deeper.eval().requires_grad_(False)


def main() -> None:
    run_command(__doc__, "vae_decoder", train_vae_decoder)


if __name__ == "__main__":
    main()
