"""The path, its inverses, and diffusers' own schedule."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, training_utils
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from scipy import stats

from dcdd_core.method import flow
from dcdd_core.method.flow import (
    euler_step,
    interpolate,
    loss_weight,
    recover_clean,
    resolution_shift,
    sample_times,
    shift_time,
    timesteps,
    velocity,
)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CLEAN, NOISE = rand(3, 4, 6), rand(3, 4, 6, seed=1)


@pytest.mark.parametrize("times", [(0.2, 0.5, 0.9), (0.3, 0.3, 0.3)])
def test_the_path_is_numpys(times):
    z0, n = CLEAN.double().numpy(), NOISE.double().numpy()
    t = np.array(times)[:, None, None]
    z_t = (1 - t) * z0 + t * n
    time = torch.tensor(times)
    np.testing.assert_allclose(interpolate(CLEAN, NOISE, time), z_t, atol=1e-6)
    np.testing.assert_allclose(velocity(CLEAN, NOISE), n - z0, atol=1e-6)
    np.testing.assert_allclose(recover_clean(CLEAN, NOISE, time), z0 - t * n, atol=1e-6)
    np.testing.assert_allclose(euler_step(CLEAN, NOISE, time, 0.1), z0 + (0.1 - t) * n, atol=1e-6)
    np.testing.assert_allclose(euler_step(CLEAN, NOISE, 0.8, time), z0 + (t - 0.8) * n, atol=1e-6)


def test_results_have_the_dtype_of_the_latents():
    half = CLEAN.half()
    for found in (interpolate(half, NOISE, 0.3), recover_clean(half, NOISE, 0.3), euler_step(half, NOISE, 0.3, 0.1)):
        assert found.dtype == torch.float16


def test_a_time_of_another_shape_is_refused():
    for time in (torch.zeros(3, 1), torch.zeros(1, 1), torch.zeros(4)):
        with pytest.raises(ValueError, match=r"one number or one a sample, \[3\]"):
            recover_clean(CLEAN, NOISE, time)
    # One time of a batch of one serves any batch.
    assert torch.equal(interpolate(CLEAN, NOISE, torch.tensor([0.25])), interpolate(CLEAN, NOISE, 0.25))


def test_times_go_to_the_device_of_the_latents():
    there = CLEAN.to("meta")
    for found in (interpolate(there, there, 0.3), recover_clean(there, there, 0.3), euler_step(there, there, 0.3, 0.1)):
        assert found.device.type == "meta" and found.shape == CLEAN.shape


def test_path_ends_and_velocity():
    assert torch.equal(interpolate(CLEAN, NOISE, 0.0), CLEAN) and torch.equal(interpolate(CLEAN, NOISE, 1.0), NOISE)
    slope = (interpolate(CLEAN, NOISE, 0.75) - interpolate(CLEAN, NOISE, 0.25)) / 0.5
    torch.testing.assert_close(slope, velocity(CLEAN, NOISE))


@pytest.mark.parametrize("time", [0.3, torch.tensor(0.3), torch.tensor([0.0, 0.4, 1.0])])
def test_clean_is_recovered_and_stepped_to(time):
    noised, v = interpolate(CLEAN, NOISE, time), velocity(CLEAN, NOISE)
    torch.testing.assert_close(recover_clean(noised, v, time), CLEAN)
    torch.testing.assert_close(euler_step(noised, v, time, 0.1), interpolate(CLEAN, NOISE, 0.1))


def test_each_sample_has_its_own_time():
    whole = interpolate(CLEAN, NOISE, torch.tensor([0.2, 0.5, 0.9]))
    for i, t in enumerate((0.2, 0.5, 0.9)):
        torch.testing.assert_close(whole[i : i + 1], interpolate(CLEAN[i : i + 1], NOISE[i : i + 1], t))
    with pytest.raises(ValueError, match=r"\[3\], got \[2\]"):
        interpolate(CLEAN, NOISE, torch.tensor([0.2, 0.5]))


def test_half_precision_is_rounded_once():
    clean, noise = CLEAN.bfloat16(), NOISE.bfloat16()
    for time in (0.301, torch.tensor(0.301)):
        found = interpolate(clean, noise, time)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, (0.699 * clean.double() + 0.301 * noise.double()).bfloat16())


def test_shift_is_linear_in_the_tokens():
    assert [resolution_shift(n) for n in (256, 4096)] == pytest.approx([0.5, 1.15])
    assert resolution_shift(2176) == pytest.approx(0.825)
    time = torch.linspace(0, 1, 11)
    torch.testing.assert_close(shift_time(time, 0.0), time)
    assert shift_time(time, 1.0)[[0, -1]].tolist() == [0, 1]
    mu = torch.tensor(0.7)
    torch.testing.assert_close(shift_time(time[1:], 0.7), mu.exp() / (mu.exp() + (1 / time[1:] - 1)))


@pytest.mark.parametrize(("steps", "tokens"), [(1, 256), (5, 144), (30, 576), (25, 4096)])
def test_schedule_is_that_of_diffusers(steps, tokens):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=resolution_shift(tokens))
    found = timesteps(steps, shift=resolution_shift(tokens))
    torch.testing.assert_close(found, scheduler.sigmas, atol=1e-6, rtol=1e-5)
    assert found[0] == 1 and found[-1] == 0 and (found.diff() < 0).all()


def test_shift_is_that_of_diffusers_pipeline():
    for tokens in (1, 144, 576, 1024, 4096, 9216):
        assert resolution_shift(tokens) == pytest.approx(calculate_shift(tokens))


def test_shift_reaches_its_bounds():
    for shift, middle in ((-100.0, 0.0), (-30.0, 0.0), (30.0, 1.0), (100.0, 1.0)):
        assert timesteps(2, shift=shift).tolist() == pytest.approx([1, middle, 0], abs=1e-12)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        resolution_shift(0)
    assert resolution_shift(1) == pytest.approx(0.5 - 255 * 0.65 / 3840)


def test_times_are_drawn_on_the_device_of_the_generator(monkeypatch):
    asked, generator = {}, torch.Generator()
    monkeypatch.setattr(training_utils, "compute_density_for_timestep_sampling", lambda *a, **kw: asked.update(kw))
    monkeypatch.setattr(flow, "shift_time", lambda time, shift: time)
    sample_times(4, generator=generator)
    assert asked["device"] == generator.device and asked["generator"] is generator


def test_default_times_are_unshifted_and_logit_normal():
    logits = sample_times(20000, generator=torch.Generator().manual_seed(0)).double().logit().numpy()
    assert stats.kstest(logits, "norm").pvalue > 0.001
    mode = sample_times(20000, generator=torch.Generator().manual_seed(0), density="mode").double().numpy()
    u = torch.rand(20000, generator=torch.Generator().manual_seed(0)).double().numpy()
    np.testing.assert_allclose(mode, 1 - u - 1.29 * (np.cos(np.pi * u / 2) ** 2 - 1 + u), atol=1e-6)


def test_schedule():
    torch.testing.assert_close(timesteps(4, shift=0.0), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    with pytest.raises(ValueError, match="steps"):
        timesteps(0, shift=0.0)
    for shift in (float("nan"), float("inf"), -1000.0, -100.5, 100.5):
        with pytest.raises(ValueError, match="shift must be a number in -100..100"):
            timesteps(4, shift=shift)
    with pytest.raises(ValueError, match="image_tokens"):
        resolution_shift(0)


def test_euler_steps_along_the_schedule_reach_the_clean_latent():
    z, times = NOISE, timesteps(7, shift=0.55)
    for t, t_next in pairwise(times):
        z = euler_step(z, velocity(CLEAN, NOISE), t, t_next)
    torch.testing.assert_close(z, CLEAN, atol=1e-5, rtol=0)


@pytest.mark.parametrize("density", ["logit_normal", "mode", "uniform"])
def test_densities_are_those_of_diffusers(density):
    state = torch.get_rng_state()
    found = sample_times(64, generator=torch.Generator().manual_seed(3), density=density, shift=0.6)
    expected = compute_density_for_timestep_sampling(
        density, 64, 0.0, 1.0, 1.29, generator=torch.Generator().manual_seed(3)
    )
    torch.testing.assert_close(found, shift_time(expected, 0.6))
    assert torch.equal(state, torch.get_rng_state())
    assert found.shape == (64,) and found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize("weighting", ["uniform", "sigma_sqrt", "cosmap"])
def test_weights_are_those_of_diffusers(weighting):
    time = torch.tensor([0.1, 0.5, 1.0])
    found = loss_weight(time, weighting)
    torch.testing.assert_close(found, compute_loss_weighting_for_sd3(weighting, time))
    t = time.double().numpy()
    written = {"uniform": t**0, "sigma_sqrt": t**-2, "cosmap": 2 / (np.pi * (1 - 2 * t + 2 * t**2))}
    np.testing.assert_allclose(found.numpy(), written[weighting], rtol=1e-6)
    assert loss_weight(time.half(), weighting).dtype == torch.float32
    assert (found == 1).all() == (weighting == "uniform")


def test_the_weight_of_early_times_is_finite():
    """As for the smallest of the 1,000 times of diffusers' scripts."""
    found = loss_weight(torch.tensor([0.0, 1e-9, 1e-3, 2e-3]), "sigma_sqrt")
    torch.testing.assert_close(found, torch.tensor([1e6, 1e6, 1e6, 2.5e5]))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="logit_normal, mode, uniform, got 'normal'"):
        sample_times(4, generator=torch.Generator(), density="normal")
    with pytest.raises(ValueError, match="cosmap, got 'cosine'"):
        loss_weight(torch.ones(2), "cosine")
