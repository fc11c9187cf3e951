"""What the trainings of pico's decoders computed: `python -m dcdd_pico.flops`.

The VQ-VAE's decoder is to have had at least as much as the diffusion decoder. That one paints latents, which the
autoencoder's decoder makes pixels of: in the paper FLUX's, which came ready, here trained too. Counted are matrix
products, convolutions and attention, 2 operations for each multiply-add, of forward and backward passes of the decoders
themselves (`torch.utils.flop_counter`): not the networks that judge pictures, nor the encoders.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.janus.modeling_janus import JanusVQVAE

from dcdd_core.evaluation.tables import markdown_table
from dcdd_core.models.bundle import DecoderOptions, load_decoder
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.models.janus.tokenizer import load_tokenizer
from dcdd_core.types import Condition

from .build_context import Recipe
from .embedded import WEIGHTS


def vq_operations(vq: JanusVQVAE) -> int:
    """Of one picture in the training of the VQ-VAE's decoder."""
    decoding = copy.deepcopy(vq).requires_grad_(True)
    side, width = vq.config.num_patches, vq.quantize.embedding.weight.shape[1]
    codes = torch.zeros(1, width, side, side)
    return _counted(lambda: decoding.decoder(decoding.post_quant_conv(codes)).sum())


def dcdd_operations(decoder: DistributionConditionedDecoder) -> int:
    """Of one picture in the training of a decoder that holds its modulation layers (`load_decoder`, fold=False)."""
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


def vae_operations(vae: AutoencoderKL, size: int) -> int:
    """Of one picture, `size` pixels a side, in the training of the autoencoder's decoder."""
    decoding = copy.deepcopy(vae).requires_grad_(True)
    side = size // 2 ** (len(vae.config.block_out_channels) - 1)
    return _counted(lambda: decoding.decode(torch.zeros(1, vae.config.latent_channels, side, side)).sample.sum())


def training_operations(
    vq: JanusVQVAE, decoder: DistributionConditionedDecoder, vae: AutoencoderKL, recipe: Recipe
) -> str:
    """A Markdown table: operations of a picture, pictures, and their product."""
    rows = {
        "VQ-VAE's decoder": (
            vq_operations(vq),
            recipe.tokenizer_batch * (recipe.tokenizer_steps + recipe.vq_decoder_steps),
        ),
        "diffusion decoder": (dcdd_operations(decoder), recipe.decoder_batch * recipe.decoder_steps),
        "autoencoder's decoder": (
            vae_operations(vae, recipe.size),
            recipe.autoencoder_batch * (recipe.autoencoder_steps + recipe.vae_decoder_steps),
        ),
    }
    cells = [[name, f"{each:.3g}", f"{count:,}", f"{each * count:.3g}"] for name, (each, count) in rows.items()]
    theirs, ours, latents = map(math.prod, rows.values())
    return (
        markdown_table([["training of", "operations a picture", "pictures", "operations"], *cells])
        + f"\n\nThe VQ-VAE's decoder had {theirs / ours:.2f} times the diffusion decoder's, and "
        f"{theirs / (ours + latents):.2f} times what that and the autoencoder's decoder had together.\n"
    )


def operations_of(weights: Path) -> str:
    """`training_operations` of shipped models."""
    vq = load_tokenizer(weights / "janus", dtype=torch.float32)
    decoder = load_decoder(weights / "decoder.safetensors", options=DecoderOptions(dtype=torch.float32, fold=False))
    return training_operations(vq.model, decoder, AutoencoderKL.from_pretrained(weights / "vae"), Recipe.load(weights))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    chosen = parser.parse_args()
    print(operations_of(chosen.weights))


def _counted(loss: Callable[[], torch.Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
