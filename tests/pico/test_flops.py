"""Training FLOPs of the decoders."""

import pytest
import torch

from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_pico.build_context import Recipe
from dcdd_pico.flops import dcdd_flops, training_flops, vae_flops, vq_flops
from tests.tiny import tiny_card, tiny_vae, tiny_vq


def decoder(**changes):
    card = tiny_card(**changes)
    return DistributionConditionedDecoder.build(card)


def test_a_image_costs_three_times_its_linear_layers():
    """2 FLOPs per weight and token forward, twice as many backward; attention and modulations are small here."""
    small = decoder()
    card, blocks = small.card, small.transformer.single_transformer_blocks
    tokens = (card.resolution // card.vae_factor // 2) ** 2
    layers = [layer for block in blocks for layer in (block.proj_mlp, block.proj_out, *block.attn.children())]
    weights = sum(layer.weight.numel() for layer in layers if isinstance(layer, torch.nn.Linear))
    assert dcdd_flops(small) > 6 * tokens * weights
    larger = dcdd_flops(decoder(resolution=2 * card.resolution))
    assert larger == pytest.approx(4 * dcdd_flops(small), rel=0.35)


def test_the_table_multiplies_by_the_recipes_images():
    vq, small, vae = tiny_vq(), decoder(), tiny_vae()
    steps = ("tokenizer", "vq_decoder", "decoder", "autoencoder", "vae_decoder")
    recipe = Recipe(size=16, tokenizer_batch=1, **{f"{name}_steps": 1 for name in steps})
    once = training_flops(vq, small, vae, recipe)
    assert f"| VQ-VAE decoder | {vq_flops(vq):.3g} | 2 | {2 * vq_flops(vq):.3g} |" in once
    assert f"| diffusion decoder | {dcdd_flops(small):.3g} | 16 | {16 * dcdd_flops(small):.3g} |" in once
    assert f"| autoencoder's decoder | {vae_flops(vae, 16):.3g} | 24 | {24 * vae_flops(vae, 16):.3g} |" in once
    ours, latents = 16 * dcdd_flops(small), 24 * vae_flops(vae, 16)
    assert f"{2 * vq_flops(vq) / ours:.2f} times the training FLOPs of the diffusion decoder" in once
    assert f"{2 * vq_flops(vq) / (ours + latents):.2f} times those of that decoder" in once


def test_convolutions_cost_two_flops_per_weight_and_position_and_twice_that_backward():
    vae, counted = tiny_vae(), 0

    def count(layer, given, made):
        nonlocal counted
        if isinstance(layer, torch.nn.Conv2d):
            counted += 6 * layer.weight.numel() * made.shape[2] * made.shape[3]
        elif isinstance(layer, torch.nn.Linear):
            counted += 6 * layer.weight.numel() * made.numel() // made.shape[-1]

    hooks = [layer.register_forward_hook(count) for layer in vae.modules()]
    with torch.no_grad():
        vae.decode(torch.zeros(1, vae.config.latent_channels, 8, 8))
    for hook in hooks:
        hook.remove()
    assert vae_flops(vae, 16) == pytest.approx(counted, rel=0.1)
