"""A decoder in tiles: the whole of a decoder that looks nowhere else, and the gradient of whatever it makes."""

import pytest
import torch
import torch.nn.functional as F

from dcdd_core.models.vae import KLCodec
from dcdd_core.pipelines.tiles import decode_in_tiles, gradient_in_tiles
from tests.tiny import tiny_vae

SIZES = [(16, 16), (21, 9), (5, 30), (8, 8)]


def local(z):
    """Every latent position becomes 3 x 3 pixels of its own."""
    return F.interpolate(z[:, :3].square(), scale_factor=3, mode="nearest")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tile", [4, 6, 8, 11])
@pytest.mark.parametrize("size", SIZES)
def test_a_decoder_without_neighbours_is_the_same_in_tiles(size, tile):
    z, by_pixels = random(1, 4, *size), random(1, 3, 3 * size[0], 3 * size[1], seed=1)
    torch.testing.assert_close(decode_in_tiles(local, z, tile), local(z))
    found, expected = (gradient_in_tiles(local, z, by_pixels, one) for one in (tile, None))
    torch.testing.assert_close(found, expected)
    assert expected[:, :3].any()


@pytest.mark.parametrize("size", SIZES)
def test_no_tile_is_larger_than_asked_and_all_are_alike(size):
    seen = []

    def decode(z):
        seen.append(tuple(z.shape[2:]))
        return local(z)

    decode_in_tiles(decode, random(1, 4, *size), 6)
    assert set(seen) == {tuple(min(6, side) for side in size)}
    whole = len(seen)
    gradient_in_tiles(decode, random(1, 4, *size), random(1, 3, 3 * size[0], 3 * size[1]), 6)
    assert set(seen) == {tuple(min(6, side) for side in size)} and len(seen) == 2 * whole


@pytest.mark.parametrize("tile", [6, None])
def test_the_gradient_is_that_of_the_tiled_image(tile):
    codec = KLCodec(tiny_vae().requires_grad_(False))
    z, by_pixels = random(1, 16, 10, 13), random(1, 3, 20, 26, seed=1)
    found = gradient_in_tiles(codec.decode, z, by_pixels, tile)
    for way in (found / found.norm(), random(*z.shape, seed=2) / 40):
        after, before = ((decode_in_tiles(codec.decode, z + s * way, tile) * by_pixels).sum() for s in (0.01, -0.01))
        assert float(after - before) / 0.02 == pytest.approx(float((found * way).sum()), rel=0.03, abs=0.02)


def test_a_seam_is_blended():
    """A decoder that makes every tile as bright as its mean: tiles of different brightness meet without an edge."""
    z = torch.linspace(0, 1, 24).reshape(1, 1, 1, 24).expand(1, 3, 24, 24)
    image = decode_in_tiles(lambda part: local(part.mean((2, 3), keepdim=True).expand_as(part)), z, 12)
    steps = image.diff(dim=3).abs()
    assert image.std() > 0.05 and steps.max() < 0.2 * (image.max() - image.min())
