"""The count of what the two decoders' trainings computed."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from dcdd_core.models.flux import DistributionConditionedDecoder
from dcdd_core.pico.compute import dcdd_operations, training_operations, vq_operations
from dcdd_core.pico.workshop import Recipe
from tests.tiny import tiny_card, tiny_vq


def decoder(**changes):
    card = tiny_card(**changes)
    return DistributionConditionedDecoder(FluxTransformer2DModel(**card.base_config), card)


def test_a_picture_costs_three_times_its_linear_layers():
    """Two operations a weight and token forward, twice as many backward; attention and modulations are small here."""
    small = decoder()
    card, blocks = small.card, small.transformer.single_transformer_blocks
    tokens = (card.resolution // card.vae_factor // 2) ** 2
    layers = [layer for block in blocks for layer in (block.proj_mlp, block.proj_out, *block.attn.children())]
    weights = sum(layer.weight.numel() for layer in layers if isinstance(layer, torch.nn.Linear))
    assert dcdd_operations(small) > 6 * tokens * weights
    larger = dcdd_operations(decoder(resolution=2 * card.resolution))
    assert larger == pytest.approx(4 * dcdd_operations(small), rel=0.35)


def test_the_table_multiplies_by_the_recipes_pictures():
    vq, small = tiny_vq(), decoder()
    recipe = Recipe(tokenizer_steps=1, vq_decoder_steps=1, tokenizer_batch=1, decoder_steps=1)
    once = training_operations(vq, small, recipe)
    assert f"| VQ-VAE decoder | {vq_operations(vq):.3g} | 2 | {2 * vq_operations(vq):.3g} |" in once
    assert f"| DCDD | {dcdd_operations(small):.3g} | 16 | {16 * dcdd_operations(small):.3g} |" in once
    assert f"{2 * vq_operations(vq) / (16 * dcdd_operations(small)):.2f} times" in once
