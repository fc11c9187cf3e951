"""Training FLOPs of pico's decoders: `python -m dcdd_pico.flops`.

The VQ-VAE decoder is the baseline of the diffusion decoder and should have had at least as many training FLOPs. The
diffusion decoder generates latents, which the autoencoder's decoder turns into pixels. The paper takes that decoder
from FLUX; here it was trained too, and is listed separately. The count covers the matrix products, convolutions and
attention of the decoders' forward and backward passes, with 2 FLOPs per multiply-add (`torch.utils.flop_counter`).
Encoders, discriminators and perceptual networks are not counted. Only decoders other than the diffusion decoder are
trained with the last two, so that at equal counts those others had in fact a little more.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.janus.modeling_janus import JanusVQVAE

from dcdd_core.evaluation.tables import markdown_table
from dcdd_core.models.bundle import DecoderOptions, load_decoder
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.models.janus.tokenizer import load_tokenizer
from dcdd_core.types import Condition

from .build_context import Recipe
from .embedded import WEIGHTS
from .feed_forward import FeedForwardDecoder
from .gan_finetune import PatchDiscriminator, discriminator_loss, generator_loss
from .image_losses import reconstruction_loss
from .reader import SceneReader


def vq_flops(vq: JanusVQVAE) -> int:
    """Training FLOPs of the VQ-VAE decoder for one image."""
    decoding = copy.deepcopy(vq).cpu().requires_grad_(True)
    side, width = vq.config.num_patches, vq.quantize.embedding.weight.shape[1]
    codes = torch.zeros(1, width, side, side)
    return _counted(lambda: decoding.decoder(decoding.post_quant_conv(codes)).sum())


def dcdd_flops(decoder: DistributionConditionedDecoder) -> int:
    """Training FLOPs of the diffusion decoder for one image; it must be loaded with fold=False (`load_decoder`)."""
    card, decoder = decoder.card, copy.deepcopy(decoder).requires_grad_(True)
    side, h = card.resolution // card.vae_factor, round(card.resolution / card.pixels_per_token)
    condition = Condition(
        torch.zeros(1, h * h, card.code_dim), torch.zeros(1, h * h, 4), (h, h), codebook=card.codebook
    )
    latents = torch.zeros(1, decoder.backbone.latent_channels, side, side)
    context = decoder.backbone.context(latents, torch.ones(1, 1, card.resolution, card.resolution), card.vae_factor)

    def loss() -> torch.Tensor:
        fused = decoder.condition_tokens(condition, (side, side))
        packed = decoder.backbone.pack(latents)
        return decoder(packed, context, fused, torch.full((1,), 0.5), (side, side)).sum()

    return _counted(loss)


def vae_flops(vae: AutoencoderKL, size: int) -> int:
    """Training FLOPs of the autoencoder's decoder for one image of `size` x `size` pixels."""
    decoding = copy.deepcopy(vae).cpu().requires_grad_(True)
    side = size // 2 ** (len(vae.config.block_out_channels) - 1)
    return _counted(lambda: decoding.decode(torch.zeros(1, vae.config.latent_channels, side, side)).sample.sum())


def feed_forward_flops(decoder: FeedForwardDecoder) -> int:
    """Training FLOPs of a feed-forward decoder for one image."""
    card, decoding = decoder.card, copy.deepcopy(decoder).cpu().requires_grad_(True)
    h, w = card.grid
    condition = Condition(torch.zeros(1, h * w, card.code_dim), torch.zeros(1, h * w, 4), (h, w))
    return _counted(lambda: decoding(condition).sum())


def loss_flops(size: tuple[int, int]) -> int:
    """FLOPs of the losses of one image in a training with a GAN loss, forward and backward: perceptual distance and
    discriminator updates, without the adaptive weight. For comparison only: they enter no total."""
    reader, discriminator = SceneReader().eval().requires_grad_(False), PatchDiscriminator()
    pixels, decoded = torch.zeros(1, 3, *size), torch.zeros(1, 3, *size, requires_grad=True)

    def losses() -> torch.Tensor:
        of_decoder, _ = reconstruction_loss(pixels, decoded, reader, nullcontext)
        of_decoder = of_decoder + generator_loss(discriminator(decoded))
        return of_decoder + discriminator_loss(discriminator(pixels), discriminator(decoded.detach()))

    return _counted(losses)


def parameters(*networks: nn.Module) -> int:
    """Number of parameters of the networks together."""
    return sum(weight.numel() for network in networks for weight in network.parameters())


def load_dcdd(path: Path) -> DistributionConditionedDecoder:
    """The diffusion decoder of a bundle with all parameters that it was trained with."""
    return load_decoder(path, options=DecoderOptions(dtype=torch.float32, fold=False))


def decoder_images(recipe: Recipe) -> int:
    """Images the diffusion decoder was trained on, post-training included, counting repeated ones each time."""
    return recipe.decoder_batch * (recipe.decoder_steps + recipe.post_updates)


def vae_decoder_images(recipe: Recipe) -> int:
    """Images the autoencoder's decoder was trained on, with its encoder and alone, counting repeated ones each time."""
    both_sides = recipe.autoencoder_before + recipe.autoencoder_steps
    return recipe.autoencoder_batch * (both_sides + recipe.vae_decoder_before + recipe.vae_decoder_steps)


def training_flops(vq: JanusVQVAE, decoder: DistributionConditionedDecoder, vae: AutoencoderKL, recipe: Recipe) -> str:
    """Markdown table of FLOPs per image, number of images, and their product, followed by ratios to the baseline."""
    rows = {
        "VQ-VAE decoder": (
            vq_flops(vq),
            recipe.tokenizer_batch * (recipe.tokenizer_steps + recipe.vq_decoder_steps),
        ),
        "diffusion decoder": (dcdd_flops(decoder), decoder_images(recipe)),
        "autoencoder's decoder": (
            vae_flops(vae, recipe.size),
            # All updates counted at its present depth, though the first ones had fewer layers.
            vae_decoder_images(recipe),
        ),
    }
    cells = [[name, f"{each:.3g}", f"{count:,}", f"{each * count:.3g}"] for name, (each, count) in rows.items()]
    baseline, ours, latents = map(math.prod, rows.values())
    return (
        markdown_table([["training of", "FLOPs per image", "images", "FLOPs"], *cells])
        + f"\n\nThe VQ-VAE decoder had {baseline / ours:.2f} times the training FLOPs of the diffusion decoder, and "
        f"{baseline / (ours + latents):.2f} times those of that decoder and the autoencoder's decoder together.\n"
    )


def flops_of(weights: Path) -> str:
    """`training_flops` of the models in a folder."""
    vq = load_tokenizer(weights / "janus", dtype=torch.float32)
    decoder = load_dcdd(weights / "decoder.safetensors")
    return training_flops(vq.model, decoder, AutoencoderKL.from_pretrained(weights / "vae"), Recipe.load(weights))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    chosen = parser.parse_args()
    print(flops_of(chosen.weights))


def _counted(loss: Callable[[], torch.Tensor]) -> int:
    # The counter does not count a CPU's fused attention. Sections of tables are measured without gradients.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
