"""Fidelity metrics against reference values: by hand, by scikit-image, and by an independent float64 version."""

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dcdd_core.evaluation.frechet import features_of
from dcdd_core.evaluation.metrics import psnr, ssim
from tests.mps import WithoutFloat64


def random_images(seed=0):
    return torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noisy(images, scale=0.3):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(9))
    return (images + scale * noise).clamp(-1, 1)


def test_equal_images():
    assert torch.equal(ssim(random_images(), random_images()), torch.ones(3, dtype=torch.float64))
    assert torch.isinf(psnr(random_images(), random_images())).all()


def test_psnr_by_hand():
    a = torch.zeros(2, 3, 24, 24)
    b = torch.stack([a[0] + 0.2, a[1] + 0.02])
    assert psnr(a, b).tolist() == pytest.approx([20.0, 40.0], abs=1e-4)  # 10 log10(2^2 / 0.2^2)


def test_psnr_is_scikit_image_s_on_the_range_of_the_pixels():
    a, b = random_images(), noisy(random_images())
    expected = [peak_signal_noise_ratio(p.double().numpy(), q.double().numpy(), data_range=2) for p, q in zip(a, b)]
    assert psnr(a, b).tolist() == pytest.approx(expected, rel=1e-12)


def ssim_by_hand(a, b):
    """Wang et al. 2004, Eq. 13, in float64, of intensities 0..255: uniform window of 7 x 7, unbiased variances, borders
    cut."""
    c1, c2, n = (0.01 * 255) ** 2, (0.03 * 255) ** 2, 49
    values = []
    for x, y in zip(*((p.double().numpy() + 1) * 127.5 for p in (a, b))):  # channels
        mx, my = uniform_filter(x, 7), uniform_filter(y, 7)
        vx, vy, cov = (uniform_filter(p, 7) for p in (x * x, y * y, x * y))
        vx, vy, cov = ((p - q) * n / (n - 1) for p, q in ((vx, mx * mx), (vy, my * my), (cov, mx * my)))
        both = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
        values.append(both[3:-3, 3:-3].mean())
    return np.mean(values)


def test_ssim_is_the_formula_of_intensities():
    a, b = random_images(), noisy(random_images())
    assert ssim(a, b).tolist() == pytest.approx([ssim_by_hand(p, q) for p, q in zip(a, b)], abs=1e-5)


def test_ssim_of_constant_images_by_hand():
    """Two greys that can hardly be told apart, on either side of the middle: 131 and 124 of 255."""
    a, b = (torch.full((1, 3, 16, 16), grey / 127.5 - 1) for grey in (131, 124))
    c1 = (0.01 * 255) ** 2
    expected = (2 * 131 * 124 + c1) / (131**2 + 124**2 + c1)
    assert float(ssim(a, b)) == pytest.approx(expected, abs=1e-6) and expected > 0.998


def test_ssim_is_scikit_image_s_of_the_8_bit_images():
    a, b = (
        (x * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for x in (random_images(), noisy(random_images()))
    )
    expected = [structural_similarity(p, q, channel_axis=2, data_range=255) for p, q in zip(a, b)]
    first, second = (torch.from_numpy(x).permute(0, 3, 1, 2) / 127.5 - 1 for x in (a, b))
    assert ssim(first, second).tolist() == pytest.approx(expected, abs=1e-5)


def test_each_image_has_its_own_scores():
    a = random_images()
    b = a.clone()
    b[1] = noisy(a)[1]
    found = ssim(a, b)
    assert found[0] == 1 and found[2] == 1 and found[1] < 0.9
    assert torch.isinf(psnr(a, b)[[0, 2]]).all() and torch.isfinite(psnr(a, b)[1])


def test_as_many_images_are_needed_of_both():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        ssim(random_images()[:2], random_images())


def test_a_device_without_float64_will_do():
    a, b = random_images(0), random_images(1)
    for score in (psnr, ssim):
        assert torch.equal(score(*(x.as_subclass(WithoutFloat64) for x in (a, b))), score(a, b))


def test_features_come_a_batch_at_a_time():
    sizes = []

    def network(part):
        sizes.append(len(part))
        return part.mean((2, 3))

    found = features_of(random_images(), network, batch=2)
    assert torch.equal(found, random_images().mean((2, 3))) and sizes == [2, 1]
