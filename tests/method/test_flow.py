"""The path, its inverses, and diffusers' own schedule."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

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


def test_schedule():
    torch.testing.assert_close(timesteps(4, shift=0.0), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    with pytest.raises(ValueError, match="steps"):
        timesteps(0, shift=0.0)
    for shift in (float("nan"), float("inf"), -1000.0):
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
    assert (found == 1).all() == (weighting == "uniform")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="logit_normal, mode, uniform, got 'normal'"):
        sample_times(4, generator=torch.Generator(), density="normal")
    with pytest.raises(ValueError, match="cosmap, got 'cosine'"):
        loss_weight(torch.ones(2), "cosine")
