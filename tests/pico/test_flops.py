"""Training FLOPs of the decoders."""

import pytest
import torch
from safetensors.torch import load_file

from dcdd_core.models.bundle import save_bundle
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.types import Condition
from dcdd_pico.build_context import Recipe
from dcdd_pico.feed_forward import FeedForwardCard, FeedForwardDecoder
from dcdd_pico.flops import (
    dcdd_flops,
    decoder_images,
    feed_forward_flops,
    load_dcdd,
    loss_flops,
    parameters,
    training_flops,
    vae_flops,
    vq_flops,
)
from dcdd_pico.gan_finetune import PatchDiscriminator
from dcdd_pico.reader import SceneReader
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
    recipe = Recipe(
        size=16,
        tokenizer_batch=1,
        vae_decoder_before=3,
        autoencoder_before=5,
        autoencoder_batch=7,
        post_updates=2,
        **{f"{name}_steps": 1 for name in steps},
    )
    once = training_flops(vq, small, vae, recipe)
    assert f"| VQ-VAE decoder | {vq_flops(vq):.3g} | 2 | {2 * vq_flops(vq):.3g} |" in once
    assert f"| diffusion decoder | {dcdd_flops(small):.3g} | 48 | {48 * dcdd_flops(small):.3g} |" in once
    assert f"| autoencoder's decoder | {vae_flops(vae, 16):.3g} | 70 | {70 * vae_flops(vae, 16):.3g} |" in once
    ours, latents = 48 * dcdd_flops(small), 70 * vae_flops(vae, 16)
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


def test_attention_is_counted():
    """12 N^2 M a block: queries with keys and weights with values, 2 N^2 M each, and twice that backward. Of the rest,
    layers grow with the number of tokens N, and modulations do not."""
    tokens, counted = zip(*((side * side, dcdd_flops(decoder(resolution=4 * side))) for side in (4, 8, 12)))
    slopes = [(counted[k + 1] - counted[k]) / (tokens[k + 1] - tokens[k]) for k in (0, 1)]
    quadratic = (slopes[1] - slopes[0]) / (tokens[2] - tokens[0])
    assert quadratic == 12 * 32 * 2  # width 32, two blocks


def test_a_feed_forward_decoder_costs_what_its_layers_do():
    card = FeedForwardCard(reads="tokens", codebook="", grid=(4, 4), width=16, blocks=2, channels=(16, 8, 8))
    network, counted = FeedForwardDecoder(card), 0

    def count(layer, given, made):
        nonlocal counted
        positions = made.numel() // made.shape[1 if isinstance(layer, torch.nn.Conv2d) else -1]
        passes = 2 if layer is network.adapter.project else 3  # the condition needs no gradient
        counted += passes * 2 * layer.weight.numel() * positions

    for layer in network.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.register_forward_hook(count)
    with torch.no_grad():
        network(Condition(torch.zeros(1, 16, 8), torch.zeros(1, 16, 4), (4, 4)))
    expected = counted + 2 * 12 * 16**2 * 16  # attention
    for layer in network.modules():
        layer._forward_hooks.clear()
    assert feed_forward_flops(network) == expected
    assert not any(weight.grad is not None for weight in network.parameters())


def test_losses_are_counted_by_themselves():
    """The perceptual network sees two images and gives the gradient of one; the discriminator sees the decoded image
    twice and the original once, and its last layers have gradients of weights and of inputs."""
    cost = {"reader": 0, "discriminator": 0}

    def counting(name, network):
        def count(layer, given, made):
            if isinstance(layer, torch.nn.Conv2d):
                cost[name] += 2 * layer.weight.numel() * made.shape[2] * made.shape[3]

        for layer in network.modules():
            layer.register_forward_hook(count)
        return network.eval()

    pixels = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        counting("reader", SceneReader()).stage_maps(pixels)
        counting("discriminator", PatchDiscriminator())(pixels)
    found, least = loss_flops((32, 32)), 3 * cost["reader"] + 8 * cost["discriminator"]
    assert least < found < least + cost["discriminator"]


def test_images_are_counted_by_the_recipe_and_parameters_by_the_file(tmp_path):
    assert decoder_images(Recipe(decoder_steps=7, post_updates=2, decoder_batch=3)) == 27
    whole = decoder()
    save_bundle(tmp_path / "a.safetensors", whole)
    loaded = load_dcdd(tmp_path / "a.safetensors")
    assert parameters(loaded) == sum(tensor.numel() for tensor in load_file(tmp_path / "a.safetensors").values())
    assert dcdd_flops(loaded) == pytest.approx(dcdd_flops(whole), rel=0.01)  # without the text stream's modulations
    assert parameters(torch.nn.Linear(2, 3), torch.nn.Linear(1, 1)) == 9 + 2
