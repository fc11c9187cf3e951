"""Images in other sizes."""

from __future__ import annotations

import sys

import pytest
import torch


@pytest.fixture
def convert(double):
    return sys.modules[f"{double.pack.__name__}.nodes.convert"]


@pytest.mark.parametrize("size", [(1000, 1), (1, 1000), (1, 1001), (1, 1)])
def test_an_image_that_is_very_narrow_keeps_a_pixel_at_least(size, convert):
    found = convert.resized(torch.full((1, 3, *size), 0.5), 96, 96)
    assert found.shape == (1, 3, 96, 96)
    torch.testing.assert_close(found, torch.full_like(found, 0.5))
