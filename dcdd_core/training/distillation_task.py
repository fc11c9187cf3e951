"""The training of a few-step student as the task of a `Trainer`: a frozen teacher replaces the target of Eq. 26.

Shapes: B batch, C latent channels, h' w' latent grid; packed latents [B, L, F].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..method.distillation import OBJECTIVES, Schedule, Velocity, walk
from ..method.flow import timesteps
from ..models.checkpoints import fingerprint_of
from ..models.decoder import DistributionConditionedDecoder
from ..pipelines.condition_guidance import ConditionedVelocity
from .checkpoints import TEACHER_GUIDANCE, TEACHER_SHIFT
from .config import OptimizationConfig
from .decoder_task import DecoderTask
from .encoded_batch import Autocast
from .examples import Example
from .loss import trained_velocity
from .trainer import Averaged


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """An example, and what the teacher shows the student about it (`method.distillation.Objective.lesson`)."""

    example: Example
    shown: Any


class DistillationTask(DecoderTask):
    """See `trainer.Task`.

    Args:
        decoder: the student, which starts from the teacher's weights; its card describes the distillation.
        examples: see `DecoderTask`.
        teacher: frozen, on the device of the examples. It paints as its card says, including guidance on the condition.
        autocast: entered around the teacher's passes, which are outside the trainer's.
    """

    remedy = "start another run with a lower --learning-rate"

    def __init__(
        self,
        decoder: DistributionConditionedDecoder,
        examples: Callable[[Any, torch.Generator], Example],
        teacher: DistributionConditionedDecoder,
        *,
        autocast: Autocast = nullcontext,
    ):
        super().__init__(decoder, examples)
        self.teacher, self.autocast = teacher, autocast
        self.objective = OBJECTIVES[decoder.card.distilled.objective]
        shift = teacher.card.shift
        self.settings = {
            **self.settings,
            "teacher": fingerprint_of(teacher.state_dict()),
            TEACHER_GUIDANCE: teacher.card.condition_guidance,
            TEACHER_SHIFT: "the backbone's" if shift is None else shift,
        }

    def example(self, batch: Any, generator: torch.Generator, averaged: Averaged) -> Lesson:
        """See `trainer.Task`; the noise is drawn after everything else that an example draws."""
        example = self.examples(batch, generator)
        noise = torch.randn(example.latents.shape, generator=generator)
        pack, clean = self.teacher.backbone.pack, example.latents.float()
        schedule = self.schedule((clean.shape[2], clean.shape[3]))
        teacher = self._teacher_velocity(example, schedule)
        return Lesson(
            example=example,
            shown=self.objective.lesson(teacher, pack(clean), pack(noise.to(clean)), schedule, generator),
        )

    def losses(
        self,
        network: DistributionConditionedDecoder,
        example: Lesson,
        generator: torch.Generator,
        config: OptimizationConfig,
    ) -> dict[str, torch.Tensor]:
        """See `method.distillation.Objective.losses`."""
        student = trained_velocity(network, example.example)
        return {"loss": self.objective.losses(student, example.shown).mean()}

    @torch.no_grad()
    def distances(self, network: DistributionConditionedDecoder, example: Example, noise: torch.Tensor) -> torch.Tensor:
        """Mean squared difference of the student's latents from the teacher's for the same noise, [B] float32.

        Comparable between objectives and numbers of steps.

        Args:
            noise: [B, C, h', w'].
        """
        schedule = self.schedule((noise.shape[2], noise.shape[3]))
        packed = network.backbone.pack(noise.to(example.latents.device).float())
        aim = walk(self._teacher_velocity(example, schedule), packed, schedule.teacher)[-1]
        return (walk(trained_velocity(network, example), packed, schedule.student)[-1] - aim).square().mean(dim=(1, 2))

    def summary(self, latent_size: tuple[int, int]) -> Iterator[str]:
        """Lines of text that say what will be learned."""
        card, schedule = self.network.card, self.schedule(latent_size)
        guided = self.teacher.card.condition_guidance
        yield (
            f"a student of {card.steps} step{'s' if card.steps > 1 else ''} from a teacher of "
            f"{card.distilled.teacher_steps}, objective {card.distilled.objective}"
            + ("" if guided == 1 else f", which takes the teacher's condition guidance of {guided:g} over")
        )
        yield f"the student's times: {', '.join(f'{t:.3g}' for t in schedule.student)}"
        if (passes := len(schedule.teacher) - 1) > card.distilled.teacher_steps:
            yield f"the teacher takes {passes} steps in training, so that it comes by the student's times"

    def schedule(self, latent_size: tuple[int, int]) -> Schedule:
        """The times of student and teacher for latents of size (h', w')."""

        def own(decoder: DistributionConditionedDecoder, steps: int) -> torch.Tensor:
            return timesteps(steps, shift=decoder.served_shift(latent_size, steps))

        card = self.network.card
        return Schedule.of(own(self.network, card.steps), own(self.teacher, card.distilled.teacher_steps))

    def _teacher_velocity(self, example: Example, schedule: Schedule) -> Velocity:
        """The teacher's velocity, computed as when it paints (`pipelines.decode.paint`)."""
        teacher, size = self.teacher, (example.latents.shape[2], example.latents.shape[3])
        dtype = teacher.dtype
        with torch.no_grad(), self.autocast():
            context = teacher.backbone.context(example.masked_latents, example.mask, teacher.card.vae_factor).to(dtype)
            condition = example.condition.to(teacher.device, dtype)
            velocity = ConditionedVelocity(teacher, condition, size, teacher.card.condition_guidance)
            teacher.prepare(schedule.teacher[:-1])

        def of(packed: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), self.autocast():
                return velocity(packed.to(dtype), context, t)

        return of
