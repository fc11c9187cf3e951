"""Eq. 26 against float64 NumPy: the path, the target, the weights, and what the network is given."""

import math

import numpy as np
import pytest
import torch

from dcdd_core.method.flow import sample_times
from dcdd_core.method.sampling import keyed_generator
from dcdd_core.training.config import OptimizationConfig
from dcdd_core.training.examples import Example
from dcdd_core.training.loss import decoder_loss, velocity_losses
from dcdd_core.training.trainable import choose_trained
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


def seen_with(monkeypatch, decoder, example, drop, seed=5):
    """The arguments of the network's forward pass."""
    seen, forward = [], type(decoder).forward
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "forward", lambda *given: seen.append(given) or forward(decoder, *given))
        loss = decoder_loss(decoder, example, keyed_generator(0, seed), OptimizationConfig(steps=1), drop=drop)
    return *seen, loss


def test_a_share_of_the_conditions_is_the_null_one(monkeypatch, example):
    """Whose, is drawn after the times and noises, which therefore do not depend on the share."""
    decoder = tiny_decoder(condition_dropout=0.4)
    own = decoder.condition_tokens(example.condition, (SIDE, SIDE))
    null = decoder.adapter.null.token.expand(SIDE * SIDE // 4, -1)
    assert all((one - null).abs().max() > 0.1 for one in own)
    dropped = []
    for seed in range(200):
        (packed, context, tokens, t, _), _ = seen_with(monkeypatch, decoder, example, 0.4, seed)
        generator = keyed_generator(0, seed)
        torch.testing.assert_close(t, sample_times(BATCH, generator=generator))
        torch.randn(example.latents.shape, generator=generator)
        expected = torch.rand(BATCH, generator=generator) < 0.4
        for k in range(BATCH):
            torch.testing.assert_close(tokens[k], null if expected[k] else own[k], rtol=0, atol=0)
        dropped.append(expected)
        if seed < 3:
            (every_packed, every_context, every, every_t, _), _ = seen_with(monkeypatch, decoder, example, 0.0, seed)
            assert torch.equal(packed, every_packed) and torch.equal(t, every_t)
            assert torch.equal(context, every_context) and torch.equal(every, own)
    assert 0.34 < torch.stack(dropped).float().mean() < 0.46


def test_without_dropping_it_is_the_loss_as_before(example):
    decoder, config = tiny_decoder(), OptimizationConfig(steps=1)
    generator, other = keyed_generator(1), keyed_generator(1)
    t = sample_times(BATCH, generator=other)
    noise = torch.randn(example.latents.shape, generator=other)
    expected = velocity_losses(decoder, example, t, noise, "uniform").mean()
    assert torch.equal(decoder_loss(decoder, example, generator, config), expected)
    assert torch.equal(generator.get_state(), other.get_state())


@pytest.mark.parametrize("what", ["all", "adapter", "lora"])
def test_the_null_condition_learns_from_dropped_images_alone(example, what):
    """And the adapter from the others; both have a gradient in every step, as DDP needs."""
    decoder = tiny_decoder(condition_dropout=0.5)
    choose_trained(decoder, what, rank=2)
    t, noise = torch.full((BATCH,), 0.5), torch.ones(example.latents.shape)
    for dropped in ([False] * 3, [True] * 3, [True, False, False]):
        decoder.zero_grad(set_to_none=True)
        velocity_losses(decoder, example, t, noise, "uniform", torch.tensor(dropped)).sum().backward()
        assert bool(decoder.adapter.null.token.grad.any()) == any(dropped)
        assert bool(decoder.adapter.fuse.weight.grad.any()) == (not all(dropped))
        assert all(weight.grad is not None for weight in decoder.adapter.parameters())


def test_a_null_condition_does_not_change_the_precision(monkeypatch, example):
    decoder = tiny_decoder(condition_dropout=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        (_, _, tokens, _, _), _ = seen_with(monkeypatch, decoder, example, 0.5)
    assert tokens.dtype == decoder.adapter.fuse.weight.bfloat16().dtype


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
