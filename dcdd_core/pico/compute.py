"""What the trainings of the two pico decoders computed: `python -m dcdd_core.pico.compute`.

The VQ-VAE's decoder is to have had at least as much as the diffusion decoder. Counted are matrix products, convolutions
and attention, 2 operations for each multiply-add, of forward and backward passes of the decoders themselves
(`torch.utils.flop_counter`): not the networks that judge the VQ-VAE's pictures, nor the encoders.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.janus.modeling_janus import JanusVQVAE

from ..method.latents import fill_input, pack
from ..models.flux import DistributionConditionedDecoder, load_decoder
from ..models.vq import VQTokenizer
from ..pipelines.models import PICO_WEIGHTS
from ..types import Condition
from .workshop import Recipe


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
    latents = pack(torch.zeros(1, 16, side, side))
    area = torch.ones(1, latents.shape[1], card.base_config["in_channels"] - 2 * latents.shape[2])
    packed = fill_input(latents, latents, area)

    def loss() -> torch.Tensor:
        fused = decoder.condition_tokens(condition, (side, side))
        return decoder(packed, fused, torch.full((1,), 0.5), (side, side)).sum()

    return _counted(loss)


def training_operations(vq: JanusVQVAE, decoder: DistributionConditionedDecoder, recipe: Recipe) -> str:
    """A Markdown table: operations of a picture, pictures, and their product."""
    rows = {
        "VQ-VAE decoder": (
            vq_operations(vq),
            recipe.tokenizer_batch * (recipe.tokenizer_steps + recipe.vq_decoder_steps),
        ),
        "DCDD": (dcdd_operations(decoder), recipe.decoder_batch * recipe.decoder_steps),
    }
    lines = ["| training of | operations a picture | pictures | operations |", "|---|---|---|---|"]
    lines += [f"| {name} | {each:.3g} | {count:,} | {each * count:.3g} |" for name, (each, count) in rows.items()]
    ours, theirs = (math.prod(rows[name]) for name in ("DCDD", "VQ-VAE decoder"))
    return (
        "\n".join([*lines, "", f"The VQ-VAE's decoder had {theirs / ours:.2f} times the diffusion decoder's."]) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=PICO_WEIGHTS)
    chosen = parser.parse_args()
    vq = VQTokenizer.load(chosen.weights / "janus", dtype=torch.float32)
    decoder = load_decoder(chosen.weights / "decoder.safetensors", dtype=torch.float32, fold=False)
    print(training_operations(vq.model, decoder, Recipe.load(chosen.weights)))


def _counted(loss: Callable[[], torch.Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
