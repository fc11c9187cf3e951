"""Distillation of steps: a student that takes a few long steps learns from a teacher that takes many short ones.

Both walk the path of `flow` from noise, t = 1, to the latents, t = 0, under the same condition. The student's times are
s_0 = 1 > ... > s_k = 0, and each of its steps is to arrive where the teacher's steps over that segment arrive. The
average velocity there, (x_s - x_s') / (s - s'), is what it learns to predict; an Euler step with it takes the whole
segment at once. Errors are in units of velocity, as in Eq. 26, and their weights are all 1 [choice].

An objective says what the student is shown, and what it should have answered:
    trajectory   The student walks from the noise by itself, and every step is to lead to the teacher's state of the
                 same noise. Progressive distillation (Salimans and Ho 2022, arXiv 2202.00512) and PeRFlow (Yan et al.
                 2024, arXiv 2405.07510) give it the teacher's states, or noised data, in place of its own. From its own
                 it learns to take back what its earlier steps did wrong, and sees in training what it sees when it
                 paints (backward distillation, Kohler et al. 2024, arXiv 2405.05224). [choice]
    consistency  Multistep consistency distillation (Heek et al. 2024, arXiv 2403.06807): from a noised image the
                 teacher takes one step, and the student is to arrive from both of its ends at the same place, the end
                 of the segment. One pass of the teacher an update in place of its whole walk, but the student's own
                 guess is the target.

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

#: v(x [B, ...], t [B]), [B, ...] float32.
Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

#: Times that are closer together are one.
_SAME = 1e-6


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The times of a student and of its teacher, from 1 down to 0.

    Attributes:
        student: s_0 .. s_k.
        teacher: its own times, and the student's between them, so that it comes by where the student stops.

    Raises:
        ValueError: if two of the student's times are one.
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
        """From the times that each would have alone (`flow.timesteps`)."""
        stops = student.tolist()
        between = [t for t in teacher.tolist() if all(abs(t - stop) >= _SAME for stop in stops)]
        return cls(student=tuple(stops), teacher=tuple(sorted([*stops, *between], reverse=True)))

    @property
    def ends(self) -> tuple[float, ...]:
        """For each of the teacher's times but the last, where the student's step from there ends."""
        return tuple(max(stop for stop in self.student if stop < t) for t in self.teacher[:-1])


@torch.no_grad()
def walk(velocity: Velocity, noise: torch.Tensor, times: Sequence[float]) -> list[torch.Tensor]:
    """Euler steps from noise [B, ...] at times[0]: the states at all times, the noise itself first."""
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
    """The teacher's walk from the noise; the clean latents give no more than their shape."""
    states = dict(zip(schedule.teacher, walk(teacher, noise, schedule.teacher)))
    return Trajectory(states=[states[t] for t in schedule.student], times=schedule.student)


def trajectory_losses(student: Velocity, lesson: Trajectory) -> torch.Tensor:
    """Mean over the student's steps of |v(x_j, s_j) - (x_j - y_{j+1}) / (s_j - s_{j+1})|^2, [B] float32.

    x_j are the student's own states from the noise on, without a gradient, and y_j the teacher's.
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
        noised, arrived: [B, ...], before and after it.
        times, arrival: [B], of the two.
        ends: [B], where the student's step from `times` ends.
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
    """A step of the teacher from each image's own time, which is drawn evenly from the teacher's."""
    drawn = torch.randint(len(schedule.teacher) - 1, (len(clean),), generator=generator)
    now, after, ends = (torch.tensor(t)[drawn] for t in (schedule.teacher, schedule.teacher[1:], schedule.ends))
    noised = interpolate(clean, noise, now)
    arrived = euler_step(noised, teacher(noised, now), now, after)
    return Leap(noised=noised, arrived=arrived, times=now, arrival=after, ends=ends)


def consistency_losses(student: Velocity, lesson: Leap) -> torch.Tensor:
    """|v(x_t, t) - (x_t - f(x_t')) / (t - s)|^2, [B] float32; f(x_t') = x_t' - (t' - s) v(x_t', t') has no gradient.

    t' is where the teacher's step from t arrived, s the end of the student's. Where t' = s, f(x_t') is x_t' itself.
    """
    # The pass with a gradient first: autocast keeps its copies of weights, and those of a pass without have none.
    predicted = student(lesson.noised, lesson.times)
    with torch.no_grad():
        there = student(lesson.arrived, lesson.arrival)
        aim = euler_step(lesson.arrived, there, lesson.arrival, lesson.ends)
    return _squared(predicted - average_velocity(lesson.noised, aim, lesson.times, lesson.ends))


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a student learns.

    Attributes:
        lesson: (teacher's velocity, clean latents, noise, schedule, generator) -> what the student is shown.
        losses: (student's velocity, lesson) -> [B].
        teacher_passes: of a lesson, by schedule.
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
    """[B], on the CPU."""
    return torch.full((len(x),), time)


def _squared(error: torch.Tensor) -> torch.Tensor:
    """The mean over each image's elements, [B]."""
    return error.flatten(1).square().mean(dim=1)
