"""Losses of the build against reference values: reconstruction, perceptual distance, KL, uniformity."""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dcdd_core.evaluation.metrics import psnr, ssim
from dcdd_pico.image_losses import blemishes, fidelity, reconstruction_loss
from dcdd_pico.reader import SceneReader
from dcdd_pico.train_autoencoder import kl_divergence
from dcdd_pico.train_tokenizer import uniformity_loss
from tests.tiny import fill


def random_images(seed, count=2):
    return torch.rand(count, 3, 96, 96, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def reader():
    return fill(SceneReader()).requires_grad_(False)


class Constant:
    """A loss reader whose perceptual distance is known."""

    def perceptual_distance(self, first, second):
        return torch.tensor([1.0, 3.0])


def test_the_reconstruction_loss_is_the_sum_in_float64():
    a, b = random_images(0), random_images(1)
    loss, parts = reconstruction_loss(a, b, Constant(), contextlib.nullcontext)
    x, y = a.double().numpy(), b.double().numpy()
    means = [p.reshape(2, 3, 12, 8, 12, 8).mean((3, 5)) for p in (x, y)]
    expected = {
        "l1": np.abs(x - y).mean(),
        "tones": np.abs(means[0] - means[1]).mean(),
        "edges": sum(np.abs(np.diff(x, axis=d) - np.diff(y, axis=d)).mean() for d in (2, 3)),
        "perceptual": 2.0,
    }
    assert {name: float(value) for name, value in parts.items()} == pytest.approx(expected, rel=1e-5)
    total = expected["l1"] + ((x - y) ** 2).mean() + expected["tones"] + 0.5 * expected["edges"] + 0.05 * 2.0
    assert float(loss) == pytest.approx(total, rel=1e-5)


def test_the_reconstruction_loss_is_zero_for_itself_and_sees_colour_and_edges(reader):
    a = random_images(0, 1)
    zero, _ = reconstruction_loss(a, a, reader, contextlib.nullcontext)
    assert float(zero) == pytest.approx(0, abs=1e-6)
    _, tinted = reconstruction_loss(a, a + 0.1, reader, contextlib.nullcontext)
    assert float(tinted["tones"]) == pytest.approx(0.1, rel=1e-3) and float(tinted["edges"]) < 1e-5


def test_the_perceptual_distance_is_the_formula_in_float64(reader):
    a, b = random_images(0), random_images(1)
    expected = np.zeros(2)
    for x, y in zip(reader.stage_maps(a), reader.stage_maps(b), strict=True):
        x, y = (m.double().numpy() / np.linalg.norm(m.double().numpy(), axis=1, keepdims=True) for m in (x, y))
        expected += ((x - y) ** 2).sum(1).mean((1, 2))
    found = reader.perceptual_distance(a, b)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4) and found.min() > 0.1
    assert torch.equal(reader.perceptual_distance(a, a), torch.zeros(2))


def test_frechet_features_are_the_means_of_the_last_two_stages(reader):
    maps = [m.double().numpy() for m in reader.stage_maps(random_images(0))]
    expected = np.concatenate([m.mean((2, 3)) for m in maps[2:]], axis=1)
    assert expected.shape == (2, 320)
    np.testing.assert_allclose(reader.frechet_features(random_images(0)).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_fidelity_is_the_mean_of_each_metric(reader):
    a, b = random_images(0), random_images(1)
    expected = {
        "psnr": float(psnr(a, b).mean()),
        "ssim": float(ssim(a, b).mean()),
        "perceptual": float(reader.perceptual_distance(a, b).mean()),
    }
    assert fidelity(a, b, reader) == pytest.approx(expected)


def test_a_tint_counts_on_greys_alone_and_only_where_it_is_new():
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[:, 0, :, 8:] = 0.15  # the right half is no grey
    pixels[:, 0, 0, 0] = 0.04  # nearly grey, and not tinted further
    decoded = pixels.clone()
    decoded[:, 1] += 0.3  # chroma -.1, .2, -.1
    assert blemishes(pixels, decoded)["tint of greys"] == pytest.approx(0.4 / 3)
    assert blemishes(pixels, pixels - 0.2)["tint of greys"] == pytest.approx(0, abs=1e-6), "darker is no tint"
    decoded = pixels.clone()
    decoded[..., 8:] += torch.tensor([0.3, 0.0, 0.0])[:, None, None]
    assert blemishes(pixels, decoded)["tint of greys"] == 0


@pytest.mark.parametrize("turned", [False, True])
def test_a_halo_is_an_error_beside_an_edge(turned):
    """An edge between columns 15 and 16: these two are the edge, four on each side of them are beside it."""
    pixels = torch.full((1, 3, 32, 32), -0.5)
    pixels[..., 16:] = 0.5
    error = torch.zeros_like(pixels)
    error[..., 14:18] = 9.0
    error[..., 15:17] = 7.0  # on the edge itself: no halo
    error[..., 11] = -3.0
    error[..., 10] = 0.5
    decoded = pixels + error
    if turned:
        pixels, decoded = pixels.mT, decoded.mT
    found = blemishes(pixels, decoded)
    assert found["beside edges"] == pytest.approx((9 + 9 + 3) / 8)
    assert found["elsewhere"] == pytest.approx(0.5 / 22)
    one = pixels.clone()
    one[:, :2] = 0.1  # an edge of one channel is an edge
    assert blemishes(one, one + 1)["beside edges"] == pytest.approx(1)
    flat = torch.full((1, 3, 8, 8), 0.2)
    assert blemishes(flat, flat + 1) == pytest.approx({"tint of greys": 0, "beside edges": 0, "elsewhere": 1}, abs=1e-6)


def test_the_kl_divergence_is_torch_s():
    draw = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 16, 4, 4, generator=draw), torch.randn(2, 16, 4, 4, generator=draw)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    assert float(kl_divergence(mean, log_variance)) == pytest.approx(float(expected), rel=1e-5)
    assert float(kl_divergence(torch.zeros(3), torch.zeros(3))) == 0


def test_the_uniformity_loss_is_the_log_mean_of_the_gaussian_potential():
    features = F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    squared = torch.cdist(features.double(), features.double()).square()
    assert float(uniformity_loss(features)) == pytest.approx(float((-2 * squared).exp().mean().log()), rel=1e-5)
    assert float(uniformity_loss(features[:1].expand(3, -1))) == pytest.approx(0, abs=1e-6)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert float(uniformity_loss(opposite)) == pytest.approx(np.log((1 + np.exp(-8)) / 2), rel=1e-6)
