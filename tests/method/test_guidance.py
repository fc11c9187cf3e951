"""Distribution guidance against independent float64 references, diffusers' schedulers and its own identities."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from dcdd_core.method import guidance
from dcdd_core.method.flow import recover_clean
from dcdd_core.method.guidance import (
    clean_from_noise,
    clean_from_v,
    guide_clean,
    noise_from_clean,
    noise_share,
    position_weights,
    pull_to,
    time_of_alpha,
    time_of_sigma,
    token_cross_entropy,
    token_loss,
    v_from_clean,
    velocity_towards,
)
from dcdd_core.types import Codebook

B, N, K, D = 2, 5, 37, 8
SCALE = 23.0


@pytest.fixture
def codebook():
    return Codebook(torch.randn(K, D, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def case(codebook):
    draw = torch.Generator().manual_seed(1)
    features = torch.randn(B, N, D, generator=draw, dtype=torch.float64)
    p = torch.randn(B, N, K, generator=draw, dtype=torch.float64).mul(2).softmax(-1)
    return features, p, p @ codebook.vectors.double()


def reference(features, p, codebook):
    """-sum_k p_k ln q_k, code by code."""
    f, e = features.numpy(), codebook.vectors.double().numpy()
    cosine = (f @ e.T) / np.linalg.norm(f, axis=-1, keepdims=True)
    z = SCALE * cosine
    log_q = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
    return -(p.numpy() * log_q).sum(-1)


def test_the_expected_code_vector_is_all_that_the_cross_entropy_needs(case, codebook):
    features, p, c = case
    found = token_cross_entropy(features, c, codebook, scale=SCALE)
    assert found.shape == (B, N) and found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), reference(features, p, codebook), rtol=1e-6)
    single = token_cross_entropy(features.float(), c.float(), codebook, scale=SCALE)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, found.float(), rtol=1e-4, atol=1e-4)


def test_a_token_gives_its_ordinary_cross_entropy(case, codebook):
    features, p, _ = case
    tokens = p.argmax(-1)
    logits = SCALE * torch.nn.functional.normalize(features, dim=-1) @ codebook.vectors.double().T
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    found = token_cross_entropy(features, codebook.vectors.double()[tokens], codebook, scale=SCALE)
    torch.testing.assert_close(found.flatten(), expected)


def test_it_is_least_where_the_encoder_says_what_the_distributions_say(codebook):
    """Its minimum over q is the entropy of p, at q = p; the features whose q is p are a stationary point."""
    features = torch.randn(1, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    directions = torch.nn.functional.normalize(features, dim=-1).requires_grad_()
    p = (SCALE * directions @ codebook.vectors.double().T).softmax(-1).detach()
    loss = token_cross_entropy(directions, p @ codebook.vectors.double(), codebook, scale=SCALE)
    torch.testing.assert_close(loss, -(p * p.log()).sum(-1))
    (gradient,) = torch.autograd.grad(loss.sum(), directions)
    assert gradient.abs().max() < 1e-6


def test_the_length_of_the_features_means_nothing(case, codebook):
    features, _, c = case
    torch.testing.assert_close(
        token_cross_entropy(3 * features, c, codebook, scale=SCALE),
        token_cross_entropy(features, c, codebook, scale=SCALE),
    )


def test_gradients_in_float64(case, codebook):
    features, _, c = case
    weights = torch.rand(B, N, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    features.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: token_loss(f, c, weights, codebook, scale=SCALE), features)


def test_the_loss_is_the_weighted_sum_over_positions(case, codebook):
    features, p, c = case
    weights = torch.rand(B, N, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = (weights.numpy() * reference(features, p, codebook)).sum(-1)
    np.testing.assert_allclose(token_loss(features, c, weights, codebook, scale=SCALE).numpy(), expected, rtol=1e-6)


def test_a_weight_of_zero_frees_its_position(case, codebook):
    features, _, c = case
    weights = torch.ones(B, N, dtype=torch.float64)
    weights[0, 2] = 0
    features.requires_grad_()
    (gradient,) = torch.autograd.grad(token_loss(features, c, weights, codebook, scale=SCALE).sum(), features)
    assert not gradient[0, 2].any() and gradient.any(-1).sum() == B * N - 1


def test_weights_are_the_confidence_one_or_nothing():
    confidence = torch.tensor([[0.25, 0.5], [1.0, 0.0]])
    free = torch.tensor([[False, True]])
    assert torch.equal(position_weights(confidence), confidence)
    assert torch.equal(position_weights(confidence, "uniform"), torch.ones(2, 2))
    assert torch.equal(position_weights(confidence, free=free), torch.tensor([[0.25, 0], [1, 0]]))
    assert torch.equal(position_weights(confidence, "uniform", free), torch.tensor([[1.0, 0], [1, 0]]))
    assert all(position_weights(confidence.half(), weight).dtype == torch.float32 for weight in guidance.WEIGHTS)
    with pytest.raises(ValueError, match="weight must be one of confidence, uniform, got 'margin'"):
        position_weights(confidence, "margin")


@pytest.mark.parametrize("time, share", [(0.0, 0), (0.5, math.sqrt(0.5)), (1.0, 1), (0.6, 0.6 / math.sqrt(0.52))])
def test_the_share_of_noise(time, share):
    assert noise_share(time) == pytest.approx(share)


def test_a_step_has_the_size_that_the_strength_and_the_time_say():
    draw = torch.Generator().manual_seed(4)
    clean, gradient = (torch.randn(B, 4, 3, 3, generator=draw) for _ in range(2))
    gradient = gradient * torch.tensor([1e-3, 1e4]).reshape(2, 1, 1, 1)
    step = guide_clean(clean, gradient, 0.6, 0.4) - clean
    size = step.square().flatten(1).mean(1).sqrt()
    torch.testing.assert_close(size, torch.full((2,), 0.4 * 0.6 / math.sqrt(0.52)))
    cosine = torch.nn.functional.cosine_similarity(step.flatten(1), -gradient.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(2))
    alone = guide_clean(clean[:1], gradient[:1], 0.6, 0.4)
    assert torch.equal(alone, guide_clean(clean, gradient, 0.6, 0.4)[:1])


def test_no_strength_no_gradient_or_no_noise_changes_nothing():
    clean = torch.randn(B, 4, 3, 3, generator=torch.Generator().manual_seed(5)).bfloat16()
    assert torch.equal(guide_clean(clean, torch.ones_like(clean), 0.6, 0.0), clean)
    assert guide_clean(clean, torch.full_like(clean, torch.nan), 0.6, 0.0) is clean
    assert torch.equal(guide_clean(clean, torch.zeros_like(clean), 0.6, 0.4), clean)
    assert torch.equal(guide_clean(clean, torch.ones_like(clean), 0.0, 0.4), clean)
    assert guide_clean(clean, torch.ones_like(clean), 0.6, 0.4).dtype == torch.bfloat16


def test_the_pull_falls_with_the_square_of_time():
    clean, target = torch.tensor([[3.0, 1.0]]), torch.tensor([[4.0, -1.0]])
    torch.testing.assert_close(pull_to(clean, target, 0.5, 0.8), torch.tensor([[3.2, 0.6]]))
    assert torch.equal(pull_to(clean, target, 1.0, 1.0), target)
    assert pull_to(clean, target, 0.5, 0.0) is clean


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_a_pull_out_of_range_is_refused(bad):
    with pytest.raises(ValueError, match=r"pull must lie in 0..1, got .*; 0 switches it off"):
        pull_to(torch.zeros(1), torch.zeros(1), 0.5, bad)


@pytest.mark.parametrize("bad", [-0.1, math.inf, math.nan])
def test_a_strength_out_of_range_is_refused(bad):
    with pytest.raises(ValueError, match=r"strength must be a number >= 0, got .*; 0 switches guidance off"):
        guide_clean(torch.zeros(1, 1), torch.zeros(1, 1), 0.5, bad)


def test_velocity_and_clean_latent_are_inverse():
    draw = torch.Generator().manual_seed(6)
    noised, v = torch.randn(B, 4, generator=draw), torch.randn(B, 4, generator=draw)
    torch.testing.assert_close(velocity_towards(noised, recover_clean(noised, v, 0.7), 0.7), v)
    with pytest.raises(ValueError, match="time must be above 0, got 0"):
        velocity_towards(noised, noised, 0)


@pytest.mark.parametrize(
    "prediction, to_clean, from_clean",
    [("epsilon", clean_from_noise, noise_from_clean), ("v_prediction", clean_from_v, v_from_clean)],
)
def test_conversions_are_those_of_the_field(prediction, to_clean, from_clean):
    """diffusers' DDIM says the clean latent of either prediction; the way back is the inverse."""
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(10)
    draw = torch.Generator().manual_seed(7)
    noised, predicted = torch.randn(B, 4, 3, 3, generator=draw), torch.randn(B, 4, 3, 3, generator=draw)
    for step in (int(scheduler.timesteps[0]), int(scheduler.timesteps[5])):
        alpha_bar = float(scheduler.alphas_cumprod[step])
        expected = scheduler.step(predicted, step, noised).pred_original_sample
        found = to_clean(noised, predicted, alpha_bar)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(from_clean(noised, found, alpha_bar), predicted, rtol=1e-3, atol=1e-3)


def test_times_have_the_same_ratio_of_noise_to_signal():
    assert time_of_sigma(1.0) == 0.5 and time_of_sigma(0) == 0
    t = time_of_sigma(3.0)
    assert t / (1 - t) == pytest.approx(3.0)
    assert time_of_alpha(0.1) == pytest.approx(time_of_sigma(3.0)) and time_of_alpha(1.0) == 0
    assert time_of_alpha(0.0) == 1


def test_what_does_not_fit_is_refused(case, codebook):
    features, _, c = case
    for wrong in (c[:1], c[..., :7]):
        with pytest.raises(ValueError, match=rf"must be \[B, N, {D}\] alike: use the tokenizer"):
            token_cross_entropy(features, wrong, codebook, scale=SCALE)
    with pytest.raises(ValueError, match=rf"must be \[B, N, {D}\] alike"):
        token_cross_entropy(features[..., :7], c[..., :7], codebook, scale=SCALE)
    assert token_cross_entropy(features, c, codebook, scale=0.5).isfinite().all()
    for scale in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"scale must be a positive number, got .*: take the calibration's"):
            token_cross_entropy(features, c, codebook, scale=scale)
    assert guidance.WEIGHTS == ("confidence", "uniform")
