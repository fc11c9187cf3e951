"""Masks from uncertainty features, against scipy's morphology and masks worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from dcdd_core.method.uncertainty import (
    crop_to_aspect,
    doubt_map,
    grow_mask,
    mask_to_pixels,
    threshold_doubt,
    tokens_under_mask,
)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("feature", "expected"),
    [
        ("confidence", [0.3, 0.9]),
        ("margin", [0.5, 1.0]),
        ("head_mass", [0.1, 0.2]),
        ("tail_entropy", [0.4, 0.6]),
    ],
)
def test_one_means_unsure_in_every_feature(feature, expected):
    u = torch.tensor([[[0.7, 0.5, 0.9, 0.4], [0.1, 0.0, 0.8, 0.6]]])
    found = doubt_map(u.double(), feature, (2, 1))
    assert found.shape == (1, 1, 2, 1) and found.dtype == torch.float32
    assert found.flatten().tolist() == pytest.approx(expected)


def test_maps_are_row_major():
    u = torch.zeros(1, 6, 4)
    u[0, 4, 3] = 1.0
    assert doubt_map(u, "tail_entropy", (2, 3))[0, 0].nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("uncertainty", "feature", "says"),
    [
        (torch.zeros(1, 6, 4), "entropy", "feature must be one of confidence, margin, head_mass, tail_entropy"),
        (torch.zeros(1, 6, 4).flatten(1), "margin", r"\[B, 6, 4\] of a 2 x 3 grid, got \[1, 24\]"),
        (torch.zeros(1, 5, 4), "margin", r"\[B, 6, 4\]"),
        (torch.zeros(1, 6, 3), "margin", r"\[B, 6, 4\]"),
    ],
)
def test_refuses(uncertainty, feature, says):
    with pytest.raises(ValueError, match=says):
        doubt_map(uncertainty, feature, (2, 3))


def test_threshold_is_exclusive_and_soft_keeps_the_doubt():
    doubt = torch.tensor([0.2, 0.7, 0.71, 1.0])
    assert threshold_doubt(doubt, 0.7).tolist() == [0, 0, 1, 1]
    assert torch.equal(threshold_doubt(doubt, 0.7, soft=True), doubt * torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("tokens", [-2, -1, 0, 1, 3])
def test_growing_is_scipys_grey_morphology(tokens):
    mask = rand(2, 1, 6, 9)
    filters = {-1: ndimage.minimum_filter, 1: ndimage.maximum_filter}
    side = 2 * abs(tokens) + 1
    for found, one in zip(grow_mask(mask, tokens)[:, 0].numpy(), mask[:, 0].numpy()):
        # The nearest cell repeated outside adds no new value: as if nothing outside counted.
        expected = filters[int(np.sign(tokens))](one, side, mode="nearest") if tokens else one
        np.testing.assert_array_equal(found, expected)


def test_pixels_repeat_their_token():
    mask = rand(2, 1, 2, 3)
    assert torch.equal(mask_to_pixels(mask, (8, 12)), mask.repeat_interleave(4, 2).repeat_interleave(4, 3))


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        ((8, 16), slice(0, 8), slice(2, 14)),
        ((14, 12), slice(3, 11), slice(0, 12)),
        ((9, 13), slice(0, 9), slice(0, 13)),
    ],
)
@pytest.mark.parametrize("blur", [0.0, 0.5])
def test_mask_covers_what_the_tokens_were_cropped_from(size, rows, columns, blur):
    """A crop of it is the mask again, and its tokens are those that were masked."""
    mask = (rand(1, 1, 2, 3) > 0.5).float()
    found = mask_to_pixels(mask, size, blur=blur)
    assert found.shape[2:] == size and torch.equal(crop_to_aspect(found, 2, 3), found[:, :, rows, columns])
    outside = found.clone()
    outside[:, :, rows, columns] = 0
    assert not outside.any() and found.any()
    inner = (rows.stop - rows.start, columns.stop - columns.start)
    assert torch.equal(found[:, :, rows, columns], mask_to_pixels(mask, inner, blur=blur))


def test_blur_is_a_gaussian_in_tokens_over_each_image_alone():
    mask = torch.zeros(2, 1, 4, 5)
    mask[0, 0, 2, 2] = 1.0
    found = mask_to_pixels(mask, (16, 20), blur=0.5)
    plain = mask_to_pixels(mask, (16, 20))[0, 0].double().numpy()
    expected = ndimage.gaussian_filter(plain, 0.5 * 4, mode="nearest")
    np.testing.assert_allclose(found[0, 0].numpy(), expected, atol=1e-6)
    assert found.shape == (2, 1, 16, 20) and found.dtype == torch.float32 and not found[1].any()


def test_blur_stays_within_a_mask():
    for blur in (0.3, 1.0, 2.0):
        found = mask_to_pixels(torch.ones(1, 1, 3, 3), (48, 48), blur=blur)
        assert found.min() >= 0 and found.max() <= 1


def test_a_token_is_under_the_mask_if_any_of_its_pixels_is():
    mask = torch.zeros(2, 1, 8, 12)
    mask[0, 0, 3, 4] = 0.51  # token (0, 1) of 2 x 3, its last row and first column
    mask[1, 0, 4, 11] = 0.5  # not above one half
    found = tokens_under_mask(mask, (2, 3))
    assert found.dtype == torch.bool and found.tolist() == [[False, True, False, False, False, False], [False] * 6]


@pytest.mark.parametrize(
    ("size", "grid", "rows", "columns"),
    [
        ((8, 12), (2, 3), slice(0, 8), slice(0, 12)),
        ((8, 16), (2, 3), slice(0, 8), slice(2, 14)),
        ((14, 12), (2, 3), slice(3, 11), slice(0, 12)),
        ((9, 9), (1, 3), slice(3, 6), slice(0, 9)),
        ((9, 9), (3, 1), slice(0, 9), slice(3, 6)),
        ((1000, 1), (96, 96), slice(499, 501), slice(0, 1)),
        ((1, 1001), (96, 96), slice(0, 1), slice(500, 501)),
    ],
)
def test_crop_is_the_centre(size, grid, rows, columns):
    pixels = rand(1, 2, *size)
    assert torch.equal(crop_to_aspect(pixels, *grid), pixels[:, :, rows, columns])


def test_mask_of_another_aspect_is_cropped_first():
    mask = torch.zeros(1, 1, 8, 16)
    mask[..., :2] = 1.0
    assert not tokens_under_mask(mask, (2, 3)).any()
    mask[..., 2] = 1.0
    assert tokens_under_mask(mask, (2, 3))[0].tolist() == [True, False, False, True, False, False]
