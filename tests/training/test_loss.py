"""Eq. 26 against float64 NumPy: the path, the target, the weights, and what the network is given."""

import math

import numpy as np
import pytest
import torch

from dcdd_core.method.sampling import keyed_generator
from dcdd_core.training.config import OptimizationConfig
from dcdd_core.training.examples import Example
from dcdd_core.training.loss import decoder_loss
from tests.tiny import tiny_condition, tiny_decoder

BATCH, CHANNELS, SIDE, FACTOR = 3, 16, 8, 2


def packed_by_hand(latents):
    """FLUX's tokens [B, L, 4 C] of latents [B, C, h', w'], float64: each a 2 x 2 square, channel by channel."""
    latents = np.asarray(latents, np.float64)
    rows, columns = latents.shape[2] // 2, latents.shape[3] // 2
    tokens = [
        latents[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(len(latents), -1)
        for i in range(rows)
        for j in range(columns)
    ]
    return np.stack(tokens, axis=1)


def packed_mask_by_hand(mask):
    """[B, L, 4 f^2]: the mask's pixels of each latent are its channels."""
    mask = np.asarray(mask, np.float64)[:, 0]
    latents = np.stack([mask[:, a::FACTOR, b::FACTOR] for a in range(FACTOR) for b in range(FACTOR)], axis=1)
    return packed_by_hand(latents)


@pytest.fixture
def example():
    draw = torch.Generator().manual_seed(3)
    return Example(
        latents=torch.randn(BATCH, CHANNELS, SIDE, SIDE, generator=draw),
        condition=tiny_condition(BATCH),
        masked_latents=torch.randn(BATCH, CHANNELS, SIDE, SIDE, generator=draw),
        mask=(torch.rand(BATCH, 1, FACTOR * SIDE, FACTOR * SIDE, generator=draw) < 0.5).float(),
    )


def observed(monkeypatch, example, **options):
    """The loss for a fixed prediction, and the arguments of the network's forward pass with that prediction."""
    decoder, seen = tiny_decoder(), {}
    prediction = torch.randn(BATCH, SIDE * SIDE // 4, 4 * CHANNELS, generator=torch.Generator().manual_seed(9))

    def forward(packed, context, condition, t, latent_size):
        seen.update(packed=packed, context=context, condition=condition, t=t, latent_size=latent_size)
        return prediction

    monkeypatch.setattr(decoder, "forward", forward)
    config = OptimizationConfig(steps=1, **options)
    loss = decoder_loss(decoder, example, keyed_generator(0, 5), config)
    expected_condition = decoder.condition_tokens(example.condition, (SIDE, SIDE))
    torch.testing.assert_close(seen["condition"], expected_condition)
    return float(loss.detach()), seen | {"prediction": prediction.double().numpy()}


WEIGHTS = {
    "uniform": lambda t: np.ones_like(t),
    "sigma_sqrt": lambda t: t**-2.0,
    "cosmap": lambda t: 2 / (np.pi * (1 - 2 * t + 2 * t**2)),  # Esser et al. 2024, arXiv 2403.03206
}


@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("density", ["logit_normal", "uniform"])
def test_it_is_the_weighted_squared_distance_to_the_true_velocity(monkeypatch, example, weighting, density):
    loss, seen = observed(monkeypatch, example, weighting=weighting, density=density)
    t = seen["t"].double().numpy()
    assert t.shape == (BATCH,) and (t > 0).all() and (t < 1).all() and len(set(t)) == BATCH
    z0, z_t = packed_by_hand(example.latents), seen["packed"].double().numpy()
    noise = (z_t - (1 - t[:, None, None]) * z0) / t[:, None, None]
    distance = ((seen["prediction"] - (noise - z0)) ** 2).mean(axis=(1, 2))
    assert loss == pytest.approx(float((WEIGHTS[weighting](t) * distance).mean()), rel=1e-4)


def test_the_noise_is_standard_and_drawn_after_the_times(monkeypatch, example):
    _, seen = observed(monkeypatch, example, density="uniform")
    generator = keyed_generator(0, 5)
    t = torch.rand(BATCH, generator=generator)
    noise = torch.randn(example.latents.shape, generator=generator)
    torch.testing.assert_close(seen["t"], t)
    path = (1 - t.double().numpy()[:, None, None]) * packed_by_hand(example.latents)
    path += t.double().numpy()[:, None, None] * packed_by_hand(noise)
    np.testing.assert_allclose(seen["packed"].double().numpy(), path, rtol=1e-5, atol=1e-6)


def test_the_network_sees_the_masked_image_and_the_mask(monkeypatch, example):
    _, seen = observed(monkeypatch, example)
    context = seen["context"].double().numpy()
    assert context.shape == (BATCH, SIDE * SIDE // 4, 4 * CHANNELS + 4 * FACTOR**2)
    np.testing.assert_allclose(context[..., : 4 * CHANNELS], packed_by_hand(example.masked_latents), rtol=1e-6)
    np.testing.assert_array_equal(context[..., 4 * CHANNELS :], packed_mask_by_hand(example.mask))
    assert seen["latent_size"] == (SIDE, SIDE)


def test_the_masked_image_reaches_the_loss(example):
    """Through the real network: another image to keep gives another loss."""
    decoder, config = tiny_decoder(), OptimizationConfig(steps=1)
    torch.nn.init.normal_(decoder.transformer.proj_out.weight, generator=torch.Generator().manual_seed(1))
    other = Example(
        latents=example.latents, condition=example.condition, masked_latents=-example.masked_latents, mask=example.mask
    )
    first, second = (float(decoder_loss(decoder, one, keyed_generator(1), config)) for one in (example, other))
    assert abs(first - second) > 1e-4 * first


def test_the_error_of_a_prediction_in_bfloat16_is_computed_in_float32(monkeypatch, example):
    decoder = tiny_decoder()
    monkeypatch.setattr(decoder, "forward", lambda packed, *rest: torch.zeros_like(packed).bfloat16())
    loss = decoder_loss(decoder, example, keyed_generator(1), OptimizationConfig(steps=1))
    monkeypatch.setattr(decoder, "forward", lambda packed, *rest: torch.zeros_like(packed))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, decoder_loss(decoder, example, keyed_generator(1), OptimizationConfig(steps=1)))


def test_times_are_shifted_as_configured(monkeypatch, example):
    t, shifted = (
        observed(monkeypatch, example, density="uniform", shift=s)[1]["t"].double() for s in (0.0, math.log(3))
    )
    torch.testing.assert_close(shifted, 3 * t / (1 + 2 * t), rtol=1e-6, atol=0)


def test_the_network_is_told_height_and_width_in_this_order(monkeypatch):
    decoder, seen = tiny_decoder(), []
    wide = Example(
        latents=torch.zeros(1, CHANNELS, 4, 8),
        condition=tiny_condition(1, grid=(2, 4)),
        masked_latents=torch.zeros(1, CHANNELS, 4, 8),
        mask=torch.ones(1, 1, 4 * FACTOR, 8 * FACTOR),
    )
    condition_tokens = decoder.condition_tokens
    monkeypatch.setattr(decoder, "condition_tokens", lambda c, size: seen.append(size) or condition_tokens(c, size))
    decoder_loss(decoder, wide, keyed_generator(1), OptimizationConfig(steps=1))
    assert seen == [(4, 8)]
