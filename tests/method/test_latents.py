"""Packing against diffusers' FluxFillPipeline."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxFillPipeline

from dcdd_core.method.latents import (
    fill_context,
    fill_input,
    pack,
    pack_mask,
    position_ids,
    scale_latents,
    unpack,
    unscale_latents,
)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_packing_is_that_of_diffusers():
    latents = rand(2, 16, 6, 10)
    tokens = pack(latents)
    assert torch.equal(tokens, FluxFillPipeline._pack_latents(latents, 2, 16, 6, 10))
    assert torch.equal(unpack(tokens, 6, 10), latents)
    assert torch.equal(unpack(tokens, 6, 10), FluxFillPipeline._unpack_latents(tokens, 48, 80, 8))


def test_position_ids_are_those_of_diffusers():
    expected = FluxFillPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.bfloat16)
    found = position_ids(6, 10, dtype=torch.bfloat16)
    assert torch.equal(found, expected) and found.dtype == expected.dtype
    # Row n of the ids and token n are of one place.
    y, x = torch.meshgrid(torch.arange(3.0), torch.arange(5.0), indexing="ij")
    place = torch.stack([y, x]).repeat_interleave(2, 1).repeat_interleave(2, 2)[None]
    assert torch.equal(pack(place)[0, :, [0, 4]], position_ids(6, 10)[:, 1:])


@pytest.mark.parametrize("factor", [8, 4])
def test_mask_is_that_of_diffusers(factor):
    mask = (rand(2, 1, 6 * factor, 10 * factor) > 0).float()
    masked = rand(2, 16, 6, 10, seed=1)
    pipeline = SimpleNamespace(
        vae_scale_factor=factor,
        vae=SimpleNamespace(config=SimpleNamespace(shift_factor=0.1159, scaling_factor=0.3611)),
        _pack_latents=FluxFillPipeline._pack_latents,
    )
    expected_mask, expected_image = FluxFillPipeline.prepare_mask_latents(
        pipeline, mask, masked, 2, 16, 1, 6 * factor, 10 * factor, torch.float32, "cpu", None
    )
    found = pack_mask(mask, factor)
    assert torch.equal(found, expected_mask) and found.shape == (2, 15, 4 * factor**2)
    image = pack(scale_latents(masked, 0.1159, 0.3611))
    assert torch.equal(image, expected_image)
    noised = rand(2, 15, 64, seed=2)
    found = fill_input(noised, fill_context(image, found))
    assert torch.equal(found, torch.cat([noised, expected_image, expected_mask], dim=2))


def test_scaling_inverts():
    latents = rand(2, 16, 4, 4)
    scaled = scale_latents(latents, 0.1159, 0.3611)
    torch.testing.assert_close(scaled, (latents - 0.1159) * 0.3611)
    torch.testing.assert_close(unscale_latents(scaled, 0.1159, 0.3611), latents)


def test_packing_is_numpys():
    latents = rand(2, 3, 4, 6)
    patches = [latents[:, :, y : y + 2, x : x + 2].reshape(2, 12) for y in (0, 2) for x in (0, 2, 4)]
    assert torch.equal(pack(latents), torch.stack(patches, dim=1))
    assert pack(rand(1, 3, 2, 2)).shape == (1, 1, 12) and unpack(rand(1, 1, 12), 2, 2).shape == (1, 3, 2, 2)


def test_mask_channels_are_the_pixels_of_their_latent():
    mask = rand(1, 1, 8, 8)
    found = unpack(pack_mask(mask, 2), 4, 4)
    for y in range(4):
        for x in range(4):
            assert torch.equal(found[0, :, y, x], mask[0, 0, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten())
    assert pack_mask(torch.ones(1, 1, 2, 2), 1).shape == (1, 1, 4)


def test_position_ids_default_to_float32():
    assert position_ids(2, 2).dtype == torch.float32 and position_ids(2, 2).tolist() == [[0, 0, 0]]
    assert position_ids(2, 2, device="meta").device.type == "meta"


@pytest.mark.parametrize(("images", "masks"), [(1, 1), (3, 1), (1, 3), (3, 3)])
def test_context_repeats_one_image_or_mask_over_the_batch(images, masks):
    image, mask = rand(images, 15, 64).bfloat16(), rand(masks, 15, 256, seed=1) > 0
    found = fill_context(image, mask)
    batch = max(images, masks)
    assert found.shape == (batch, 15, 320) and found.dtype == torch.bfloat16
    for i in range(batch):
        assert torch.equal(found[i, :, :64], image[i if images > 1 else 0])
        assert torch.equal(found[i, :, 64:], mask[i if masks > 1 else 0].bfloat16())


@pytest.mark.parametrize("contexts", [1, 3])
def test_fill_input_repeats_one_context_over_the_batch(contexts):
    noised, context = rand(3, 15, 64).bfloat16(), rand(contexts, 15, 320, seed=1)
    found = fill_input(noised, context)
    assert found.shape == (3, 15, 384) and found.dtype == torch.bfloat16
    assert torch.equal(found[..., :64], noised)
    for i in range(3):
        assert torch.equal(found[i, :, 64:], context[i if contexts > 1 else 0].bfloat16())


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: pack(rand(1, 16, 5, 6)), "even sides.*5 x 6"),
        (lambda: pack(rand(1, 16, 6, 5)), "even sides.*6 x 5"),
        (lambda: pack(rand(16, 6, 6)), r"\[B, C, h, w\]"),
        (lambda: unpack(rand(1, 9, 64), 6, 7), "even sides"),
        (lambda: unpack(rand(1, 9, 64), 6, 8), r"\[B, 12, 4 C\]"),
        (lambda: unpack(rand(1, 9, 63), 6, 6), "does not unpack"),
        (lambda: position_ids(0, 4), "even sides"),
        (lambda: position_ids(4, 3), "even sides"),
        (lambda: pack_mask(torch.ones(1, 1, 24, 32), 8), "16 x 16"),
        (lambda: pack_mask(torch.ones(1, 1, 32, 24), 8), "16 x 16"),
        (lambda: pack_mask(torch.ones(1, 3, 32, 32), 8), r"\[B, 1, H, W\]"),
        (lambda: pack_mask(torch.ones(1, 32, 32), 8), r"\[B, 1, H, W\]"),
        (lambda: pack_mask(torch.ones(0, 1, 32, 32), 8), "16 x 16"),
        (lambda: unpack(rand(9, 64), 6, 6), "does not unpack"),
        (lambda: position_ids(1, 4), "even sides"),
        (lambda: position_ids(4, 1), "even sides"),
        (lambda: fill_context(rand(2, 9, 64), rand(2, 8, 256)), "masked image .* do not fit"),
        (lambda: fill_context(rand(2, 9, 64), rand(3, 9, 256)), "masked image .* do not fit"),
        (lambda: fill_context(rand(3, 9, 64), rand(2, 9, 256)), "masked image .* do not fit"),
        (lambda: fill_context(rand(2, 9, 64), rand(2, 256)), "masked image .* do not fit"),
        (lambda: fill_context(rand(2, 64), rand(2, 64, 256)), "masked image .* do not fit"),
        (lambda: fill_input(rand(2, 9, 64), rand(2, 8, 320)), "noised .* do not fit"),
        (lambda: fill_input(rand(2, 9, 64), rand(3, 9, 320)), "noised .* do not fit"),
        (lambda: fill_input(rand(2, 9, 64), rand(2, 320)), "noised .* do not fit"),
        (lambda: fill_input(rand(9, 64), rand(2, 64, 320)), "noised .* do not fit"),
        (lambda: fill_input(rand(2, 9, 64), rand(2, 9, 64)), "noised .* do not fit"),
        (lambda: fill_input(rand(2, 9, 64), rand(2, 9, 60)), "noised .* do not fit"),
    ],
)
def test_refuses(call, says):
    with pytest.raises(ValueError, match=says):
        call()
