"""Fidelity numbers on cases whose answers are known."""

import pytest
import torch

from dcdd_core.evaluation.frechet import features_of
from dcdd_core.evaluation.metrics import psnr, ssim
from tests.mps import WithoutFloat64


def pictures(seed=0):
    return torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_equal_pictures():
    assert torch.equal(ssim(pictures(), pictures()), torch.ones(3, dtype=torch.float64))
    assert torch.isinf(psnr(pictures(), pictures())).all()


def test_psnr_counts_the_whole_range():
    a = torch.zeros(1, 3, 24, 24)
    assert float(psnr(a, a + 0.2)) == pytest.approx(20.0, abs=1e-4)  # 10 log10(2^2 / 0.2^2)


def test_a_device_without_float64_will_do():
    a, b = pictures(0), pictures(1)
    for score in (psnr, ssim):
        assert torch.equal(score(*(x.as_subclass(WithoutFloat64) for x in (a, b))), score(a, b))


def test_noise_and_blur_lower_ssim_one_picture_at_a_time():
    a = pictures()
    b = a.clone()
    b[1] += 0.5 * torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(1))
    found = ssim(a, b)
    assert found[0] == 1 and found[2] == 1 and found[1] < 0.9


def test_features_come_a_batch_at_a_time():
    sizes = []

    def network(part):
        sizes.append(len(part))
        return part.mean((2, 3))

    assert torch.equal(features_of(pictures(), network, batch=2), pictures().mean((2, 3))) and sizes == [2, 1]
