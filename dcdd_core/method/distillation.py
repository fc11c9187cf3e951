"""Step distillation: a student that takes a few long steps learns from a teacher that takes many short ones.

Both follow the path of `flow` from noise (t = 1) to the latents (t = 0) under the same condition. The student's times
are s_0 = 1 > ... > s_k = 0, and each of its steps should end where the teacher's steps over that segment end. The
student learns to predict the segment's average velocity, (x_s - x_s') / (s - s'), with which one Euler step covers the
whole segment. Errors are in units of velocity, as in Eq. 26, and all weights are 1 [choice].

An objective defines what the student is shown and what it should predict:
    trajectory   The student starts from the noise and follows its own states; each step should lead to the teacher's
                 state for the same noise. Progressive distillation (Salimans and Ho 2022, arXiv 2202.00512) and PeRFlow
                 (Yan et al. 2024, arXiv 2405.07510) show it the teacher's states or noised data instead. On its own
                 states the student learns to correct the errors of its earlier steps, and sees in training what it sees
                 at inference (backward distillation, Kohler et al. 2024, arXiv 2405.05224). [choice]
    consistency  Multistep consistency distillation (Heek et al. 2024, arXiv 2403.06807): the teacher takes one step
                 from a noised image, and from either end of that step the student should reach the same point, at the
                 end of the segment. An update costs one teacher pass instead of the teacher's whole walk, but the
                 target is the student's own prediction.

Shapes: B batch, further dimensions as they come; packed latents are [B, L, F].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch

from .flow import average_velocity, euler_step, interpolate

#: v(x [B, ...], t [B]) -> [B, ...] float32.
Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

#: Times closer together than this count as equal.
_SAME = 1e-6


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The times of a student and of its teacher, from 1 down to 0.

    Attributes:
        student: s_0 .. s_k.
        teacher: its own times merged with the student's, so that it passes every time at which the student stops.

    Raises:
        ValueError: if two of the student's times are less than 1e-6 apart.
    """

    student: tuple[float, ...]
    teacher: tuple[float, ...]

    def __post_init__(self):
        if any(now - after < _SAME for now, after in pairwise(self.student)):
            raise ValueError(
                f"the student's times {', '.join(f'{t:.7g}' for t in self.student)} leave no way to go between two of "
                "them: give a shift nearer to 0, or fewer steps"
            )

    @classmethod
    def of(cls, student: torch.Tensor, teacher: torch.Tensor) -> Schedule:
        """Merges the times [steps + 1] that each would use alone (`flow.timesteps`)."""
        stops = student.tolist()
        between = [t for t in teacher.tolist() if all(abs(t - stop) >= _SAME for stop in stops)]
        return cls(student=tuple(stops), teacher=tuple(sorted([*stops, *between], reverse=True)))

    @property
    def ends(self) -> tuple[float, ...]:
        """For each of the teacher's times but the last, the time at which the student's step from there ends."""
        return tuple(max(stop for stop in self.student if stop < t) for t in self.teacher[:-1])


@torch.no_grad()
def walk(velocity: Velocity, noise: torch.Tensor, times: Sequence[float]) -> list[torch.Tensor]:
    """Takes Euler steps from noise [B, ...] at times[0]; returns the states at all times, starting with the noise."""
    states = [noise]
    for now, after in pairwise(times):
        states.append(euler_step(states[-1], velocity(states[-1], _each(now, noise)), now, after))
    return states


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """The teacher's states [B, ...] at the student's times, the noise first."""

    states: Sequence[torch.Tensor]
    times: Sequence[float]


def trajectory_of(
    teacher: Velocity, clean: torch.Tensor, noise: torch.Tensor, schedule: Schedule, generator: torch.Generator
) -> Trajectory:
    """The teacher's walk from the noise, at the student's times; clean latents and generator are not used."""
    states = dict(zip(schedule.teacher, walk(teacher, noise, schedule.teacher)))
    return Trajectory(states=[states[t] for t in schedule.student], times=schedule.student)


def trajectory_losses(student: Velocity, lesson: Trajectory) -> torch.Tensor:
    """Mean over the student's steps of |v(x_j, s_j) - (x_j - y_{j+1}) / (s_j - s_{j+1})|^2, [B] float32.

    x_j are the student's own states, which start at the noise and carry no gradient; y_j are the teacher's. |.|^2 is
    the mean over elements.
    """
    x, errors = lesson.states[0], []
    for (now, after), aim in zip(pairwise(lesson.times), lesson.states[1:], strict=True):
        predicted = student(x, _each(now, x))
        errors.append(_squared(predicted - average_velocity(x, aim, now, after)))
        x = euler_step(x, predicted.detach(), now, after)
    return torch.stack(errors).mean(dim=0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Leap:
    """One step of the teacher from noised latents.

    Attributes:
        noised, arrived: [B, ...], latents before and after the step.
        times, arrival: [B], the times of these two.
        ends: [B], the times at which the student's steps from `times` end.
    """

    noised: torch.Tensor
    arrived: torch.Tensor
    times: torch.Tensor
    arrival: torch.Tensor
    ends: torch.Tensor


@torch.no_grad()
def leap_of(
    teacher: Velocity, clean: torch.Tensor, noise: torch.Tensor, schedule: Schedule, generator: torch.Generator
) -> Leap:
    """One step of the teacher for each image, from a time drawn uniformly from all but the last of the teacher's."""
    drawn = torch.randint(len(schedule.teacher) - 1, (len(clean),), generator=generator)
    now, after, ends = (torch.tensor(t)[drawn] for t in (schedule.teacher, schedule.teacher[1:], schedule.ends))
    noised = interpolate(clean, noise, now)
    arrived = euler_step(noised, teacher(noised, now), now, after)
    return Leap(noised=noised, arrived=arrived, times=now, arrival=after, ends=ends)


def consistency_losses(student: Velocity, lesson: Leap) -> torch.Tensor:
    """|v(x_t, t) - (x_t - f(x_t')) / (t - s)|^2, [B] float32; f(x_t') = x_t' - (t' - s) v(x_t', t') has no gradient.

    t' is the time at which the teacher's step from t ends, s the one at which the student's ends. If t' = s, f(x_t') is
    x_t' itself. |.|^2 is the mean over elements.
    """
    # The pass with a gradient comes first: autocast caches its copies of the weights, and copies made without a
    # gradient would be used again in the pass that needs one.
    predicted = student(lesson.noised, lesson.times)
    with torch.no_grad():
        there = student(lesson.arrived, lesson.arrival)
        aim = euler_step(lesson.arrived, there, lesson.arrival, lesson.ends)
    return _squared(predicted - average_velocity(lesson.noised, aim, lesson.times, lesson.ends))


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A distillation objective.

    Attributes:
        lesson: (teacher's velocity, clean latents, noise, schedule, generator) -> what the student is shown.
        losses: (student's velocity, lesson) -> [B] float32.
        teacher_passes: schedule -> number of teacher passes per lesson.
    """

    lesson: Callable[[Velocity, torch.Tensor, torch.Tensor, Schedule, torch.Generator], Any]
    losses: Callable[[Velocity, Any], torch.Tensor]
    teacher_passes: Callable[[Schedule], int]


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        "trajectory": Objective(
            lesson=trajectory_of,
            losses=trajectory_losses,
            teacher_passes=lambda schedule: len(schedule.teacher) - 1,
        ),
        "consistency": Objective(lesson=leap_of, losses=consistency_losses, teacher_passes=lambda schedule: 1),
    }
)


def _each(time: float, x: torch.Tensor) -> torch.Tensor:
    """The time of each sample, [B] on the CPU."""
    return torch.full((len(x),), time)


def _squared(error: torch.Tensor) -> torch.Tensor:
    """Mean square over each image's elements, [B]."""
    return error.flatten(1).square().mean(dim=1)
