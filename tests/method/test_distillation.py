"""Distillation's schedule, walk and losses against float64 NumPy, and who is asked how often and for what."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from dcdd_core.method.distillation import (
    OBJECTIVES,
    Leap,
    Schedule,
    Trajectory,
    consistency_losses,
    leap_of,
    trajectory_losses,
    trajectory_of,
    walk,
)
from dcdd_core.method.flow import average_velocity, euler_step, timesteps
from dcdd_core.method.sampling import keyed_generator

BATCH, SHAPE = 3, (5, 4)
WEIGHT, BENT = 0.7, -1.3


def latents(key):
    return torch.randn(BATCH, *SHAPE, generator=keyed_generator(key))


def teacher(x, t):
    return torch.sin(3 * x) + t.reshape(-1, 1, 1) * x


def curved(x, t, weight=WEIGHT):
    """What is neither linear in the latents nor in the time."""
    t = np.asarray(t, dtype=np.float64).reshape(-1, 1, 1)
    return weight * np.sin(2 * x) + BENT * t**2


class Student:
    """`curved` in torch, with a weight to learn; keeps what it is asked."""

    def __init__(self, dtype=torch.float64):
        self.weight = torch.tensor(WEIGHT, dtype=dtype, requires_grad=True)
        self.asked = []

    def __call__(self, x, t):
        self.asked.append((x.detach().clone(), t.clone()))
        return self.weight * torch.sin(2 * x) + BENT * t.reshape(-1, 1, 1) ** 2


def schedule(student=2, steps=10, shift=3.0, student_shift=None):
    own = shift if student_shift is None else student_shift
    return Schedule.of(timesteps(student, shift=own), timesteps(steps, shift=shift))


@pytest.mark.parametrize(
    ("student", "steps", "shift", "student_shift", "passes"),
    [
        (1, 10, 3.0, None, 10),
        (2, 10, 3.0, None, 10),
        (4, 10, 3.0, None, 12),
        (2, 10, 3.0, 1.0, 11),
        (4, 8, 0.0, None, 8),
    ],
)
def test_the_teacher_comes_by_where_the_student_stops(student, steps, shift, student_shift, passes):
    found = schedule(student, steps, shift, student_shift)
    own = shift if student_shift is None else student_shift
    assert found.student == tuple(timesteps(student, shift=own).tolist())
    assert set(found.student) <= set(found.teacher) and len(found.teacher) == passes + 1
    assert found.teacher[0] == 1 and found.teacher[-1] == 0 and all(a > b for a, b in pairwise(found.teacher))
    for t in timesteps(steps, shift=shift).tolist():
        assert min(abs(t - other) for other in found.teacher) < 1e-6
    for t, end in zip(found.teacher, found.ends, strict=False):
        assert end in found.student and end < t and not any(end < stop < t for stop in found.student)
    assert len(found.ends) == passes


def test_times_that_leave_no_way_to_go_are_refused():
    with pytest.raises(ValueError, match="leave no way to go .* give a shift nearer to 0, or fewer steps"):
        schedule(4, 10, 16.0)


def test_the_average_velocity_leads_there_in_one_step():
    start, end = latents(1), latents(2)
    now, after = torch.tensor([1.0, 0.9, 0.5]), torch.tensor([0.25, 0.0, 0.125])
    found = average_velocity(start, end, now, after)
    gap = (now - after).double().reshape(-1, 1, 1).numpy()
    np.testing.assert_allclose(found.numpy(), (start.double().numpy() - end.double().numpy()) / gap, rtol=1e-5)
    torch.testing.assert_close(euler_step(start, found, now, after), end)
    torch.testing.assert_close(average_velocity(start, end, 0.75, 0.25), 2 * (start - end))
    assert average_velocity(start.bfloat16(), end.bfloat16(), 1, 0).dtype == torch.float32


def walked(velocity, x, times):
    """Euler's states in float64."""
    states = [x]
    for now, after in pairwise(times):
        states.append(states[-1] + (after - now) * velocity(states[-1], [now] * BATCH))
    return states


def test_a_walk_is_eulers():
    noise, times, student = latents(3), schedule().teacher, Student(torch.float32)
    found = walk(student, noise, times)
    assert found[0] is noise and len(found) == len(times) and not any(state.requires_grad for state in found)
    for mine, theirs in zip(found, walked(curved, noise.double().numpy(), times)):
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-4, atol=1e-5)
    assert [t.tolist() for _, t in student.asked] == [[t] * BATCH for t in times[:-1]]


def test_the_trajectory_is_the_teachers_of_the_same_noise_at_the_students_times():
    told, noise = schedule(4, 10), latents(3)
    found = trajectory_of(teacher, latents(9), noise, told, keyed_generator(0))
    every = dict(zip(told.teacher, walk(teacher, noise, told.teacher)))
    assert found.times == told.student and len(found.states) == 5
    assert all(torch.equal(state, every[t]) for t, state in zip(told.student, found.states))
    assert torch.equal(found.states[0], noise)


def test_the_student_walks_by_itself_and_aims_at_the_teachers_states():
    """Its loss and gradient in float64: each step starts where its own last one led, which gives no gradient."""
    times = (1.0, 0.8, 0.3, 0.0)
    states = [latents(key).double() for key in range(4)]
    student = Student()
    losses = trajectory_losses(student, Trajectory(states=states, times=times))
    assert losses.shape == (BATCH,)
    losses.sum().backward()
    x, errors, slope = states[0].numpy(), [], 0.0
    for (now, after), aim in zip(pairwise(times), states[1:]):
        predicted = curved(x, [now] * BATCH)
        error = predicted - (x - aim.numpy()) / (now - after)
        errors.append((error**2).mean(axis=(1, 2)))
        slope += (2 * error * np.sin(2 * x)).mean(axis=(1, 2)).sum() / 3
        x = x + (after - now) * predicted
    np.testing.assert_allclose(losses.detach().numpy(), np.mean(errors, axis=0), rtol=1e-5)
    assert float(student.weight.grad) == pytest.approx(slope, rel=1e-5)
    assert [t[0].item() for _, t in student.asked] == pytest.approx(times[:-1])


def test_the_consistency_loss_is_the_distance_to_where_it_arrives_from_the_teachers_step():
    times, arrival = torch.tensor([1.0, 0.8, 0.3]), torch.tensor([0.9, 0.5, 0.2])
    ends = torch.tensor([0.5, 0.5, 0.0])
    noised, arrived, student = latents(1).double(), latents(2).double(), Student()
    losses = consistency_losses(student, Leap(noised=noised, arrived=arrived, times=times, arrival=arrival, ends=ends))
    losses.sum().backward()
    t, there, end = (each.double().reshape(-1, 1, 1).numpy() for each in (times, arrival, ends))
    x, y = noised.numpy(), arrived.numpy()
    aim = y - (there - end) * curved(y, there)
    np.testing.assert_array_equal(aim[1], y[1])  # the teacher's step ends where the student's does
    error = curved(x, t) - (x - aim) / (t - end)
    np.testing.assert_allclose(losses.detach().numpy(), (error**2).mean(axis=(1, 2)), rtol=1e-5)
    slope = (2 * error * np.sin(2 * x)).mean(axis=(1, 2)).sum()
    assert float(student.weight.grad) == pytest.approx(slope, rel=1e-5)


def test_a_leap_is_a_step_of_the_teacher_from_a_time_of_its_own():
    told, clean, noise = schedule(), latents(4), latents(5)
    drawn = []
    for key in range(300):
        found = leap_of(teacher, clean, noise, told, keyed_generator(key))
        for now, after, end in zip(found.times, found.arrival, found.ends):
            place = told.teacher.index(now.item())
            assert after.item() == told.teacher[place + 1] and end.item() == told.ends[place]
            drawn.append(place)
        if key < 3:
            t = found.times.double().reshape(-1, 1, 1)
            noised = (1 - t) * clean + t * noise
            torch.testing.assert_close(found.noised, noised.float())
            step = (found.arrival - found.times).reshape(-1, 1, 1) * teacher(found.noised, found.times)
            torch.testing.assert_close(found.arrived, found.noised + step)
    shares = np.bincount(drawn, minlength=10) / len(drawn)
    assert len(shares) == 10 and (np.abs(shares - 0.1) < 0.04).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_who_goes_straight_has_nothing_to_learn(objective):
    """A teacher of constant velocity is as good in one step as in ten; any other is not."""
    told, clean, noise = schedule(), latents(4), latents(5)
    kind = OBJECTIVES[objective]

    def loss(velocity):
        lesson = kind.lesson(velocity, clean, noise, told, keyed_generator(0))
        return kind.losses(velocity, lesson)

    assert float(loss(lambda x, t: torch.full_like(x, 0.7)).max()) < 1e-8
    assert float(loss(teacher).min()) > 1e-5


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_teacher_is_asked_as_often_as_it_is_said(objective):
    asked = []
    for told in (schedule(), schedule(4, 10), schedule(2, 10, 3.0, 1.0)):
        asked.clear()
        OBJECTIVES[objective].lesson(
            lambda x, t: asked.append(t) or teacher(x, t), latents(4), latents(5), told, keyed_generator(0)
        )
        assert len(asked) == OBJECTIVES[objective].teacher_passes(told)
