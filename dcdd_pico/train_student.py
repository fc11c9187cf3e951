"""Distils pico's decoder into a student that paints in a few steps: `python -m dcdd_pico.train_student`.

The teacher is the decoder in the weights folder, with the steps, shift and guidance on the condition of its card. The
student learns (`method.distillation`) on fresh training scenes, each seen once, a share of them with Janus' own
conditions for scene and caption. Its bundle is written into the work folder and can replace the teacher's wherever a
decoder is loaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from dcdd_core.evaluation.metrics import ssim
from dcdd_core.method.distillation import OBJECTIVES
from dcdd_core.method.sampling import keyed_generator
from dcdd_core.models.bundle import save_bundle
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.pipelines.decode import decode
from dcdd_core.training.batches import DataShard
from dcdd_core.training.config import DistillationConfig, OptimizationConfig, RunConfig
from dcdd_core.training.distillation_task import DistillationTask
from dcdd_core.training.encoded_batch import encode
from dcdd_core.training.examples import ExampleMaker
from dcdd_core.training.plan import Encoders, Plan
from dcdd_core.training.trainer import Evaluation, sample_sheet
from dcdd_core.types import Condition

from .build_context import BuildContext, stage_context, stage_parser
from .embedded import model_paths
from .fresh_scenes import FreshScenes, train_on_fresh_scenes
from .image_losses import fidelity
from .models import load_reader

_STAGE = 16
_LEARNING_RATE = 5e-4
_UPDATES = 4_000
_LOCALISED = 0.2
_VLM_SHARE = 0.5
#: The student's time shift. The teacher's own, 3, leaves nearly nothing to the first of two steps. Even the teacher,
#: in two steps, comes nearer to what it paints in ten if the shift is 1: on 32 held-out scenes the SSIM of the two
#: images is .997 instead of .975.
_SHIFT = 1.0
_EVALUATED = 64
_SHOWN = 8


class Agreement:
    """How a student's images of held-out scenes compare with its teacher's from the same noise, and with the scenes.

    Measured for proxies and, if the training uses them, for the VLM's own conditions ("vlm_..."): "to_teacher" is the
    SSIM of the two images; "ssim", "psnr" and "perceptual" are the student's distances to the scenes, "teacher_..." its
    teacher's.

    Args:
        conditions: prefix of the numbers' names -> condition.
    """

    def __init__(
        self,
        context: BuildContext,
        task: DistillationTask,
        encoders: Encoders,
        weights: Path,
        conditions: dict[str, Condition],
    ):
        self.context, self.codec = context, encoders.codec
        self.scenes = context.fresh_pixels("calibration", 0, _EVALUATED)
        self.reader = load_reader(device=context.device, weights=weights)
        self.conditions = conditions
        steps = task.network.card.distilled.teacher_steps
        self.taught = {name: self._painted(task.teacher, held, steps) for name, held in conditions.items()}
        self.teacher = {
            f"{name}teacher_{what}": value
            for name, painted in self.taught.items()
            for what, value in fidelity(self.scenes, painted, self.reader).items()
        }

    def __call__(self, student: DistributionConditionedDecoder) -> Evaluation:
        """The student's numbers and its teacher's, and a sheet for proxies: scene, teacher, student."""
        numbers, first = dict(self.teacher), None
        for name, held in self.conditions.items():
            painted = self._painted(student, held, None)
            numbers[f"{name}to_teacher"] = float(ssim(self.taught[name], painted).mean())
            numbers |= {f"{name}{what}": value for what, value in fidelity(self.scenes, painted, self.reader).items()}
            first = painted if first is None else first
        shown = (self.scenes, self.taught[next(iter(self.taught))], first)
        return Evaluation(numbers=numbers, sheet=sample_sheet([images[:_SHOWN] for images in shown]))

    def _painted(
        self, decoder: DistributionConditionedDecoder, condition: Condition, steps: int | None
    ) -> torch.Tensor:
        with self.context.autocast():
            return decode(decoder, self.codec, condition, seeds=range(_EVALUATED), steps=steps).pixels


def train_student(
    context: BuildContext,
    weights: Path,
    distillation: DistillationConfig,
    *,
    updates: int = _UPDATES,
    vlm_share: float = _VLM_SHARE,
) -> DistributionConditionedDecoder:
    """Trains (or restores) a student of the decoder in `weights`."""
    recipe, device = context.recipe, context.device
    paths = model_paths(weights)
    plan = Plan(vlm=paths["vlm"], vae=paths["vae"], bundle=paths["decoder"], distillation=distillation, trained="all")
    plan.check()
    encoders = plan.encoders(device)
    teacher = plan.teacher(device, dtype=torch.float32, compiled=recipe.compiled)
    student = plan.decoder(encoders).to(device)
    card, tokenizer, codec, geometry = student.card, encoders.tokenizer, encoders.codec, encoders.geometry
    own = plan.conditions(card, encoders) if vlm_share else None

    def examples(localised: float, share: float) -> ExampleMaker:
        return ExampleMaker(
            card, tokenizer, codec, geometry, localised=localised, vlm_share=share, conditions=own if share else None
        )

    task = DistillationTask(student, examples(_LOCALISED, vlm_share), teacher, autocast=context.autocast)
    source = FreshScenes("calibration", recipe.size)
    scenes = (source.load(entry) for _, entry in zip(range(_EVALUATED), source.entries(DataShard(), 0)))
    held_out = encode(source.collate(list(scenes)), tokenizer, codec)
    shares = {"": 0.0} | ({"vlm_": 1.0} if vlm_share else {})
    conditions = {name: examples(0.0, share)(held_out, keyed_generator(0)).condition for name, share in shares.items()}
    config = OptimizationConfig(
        steps=updates,
        learning_rate=_LEARNING_RATE,
        warmup=100,
        optimizer="muon",
        seed=recipe.seed + _STAGE,
        compile=recipe.compiled,
    )
    return train_on_fresh_scenes(
        context,
        f"student-{card.steps}-{distillation.objective}",
        task,
        config,
        encoders,
        own,
        vlm_share=vlm_share,
        batch=recipe.decoder_batch,
        run=RunConfig(samples=_SHOWN, sample_every=250, save_every=100, log_every=25),
        evaluate=Agreement(context, task, encoders, weights, conditions),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = stage_parser(__doc__)
    told = DistillationConfig()
    parser.add_argument("--student-steps", type=int, default=told.steps)
    parser.add_argument("--teacher-steps", type=int, help="default: as the teacher's card says")
    parser.add_argument("--objective", default=told.objective, choices=OBJECTIVES)
    parser.add_argument("--shift", type=float, default=_SHIFT, help=f"of the student; default: {_SHIFT:g}")
    parser.add_argument("--updates", type=int, default=_UPDATES, help="of the recipe's decoder_batch scenes each")
    parser.add_argument(
        "--vlm-conditions",
        type=float,
        default=_VLM_SHARE,
        metavar="SHARE",
        help="of the examples, with Janus' own conditions in the place of proxies",
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: as the recipe says")
    chosen = parser.parse_args(arguments)
    distillation = DistillationConfig(
        steps=chosen.student_steps,
        objective=chosen.objective,
        teacher_steps=chosen.teacher_steps,
        shift=chosen.shift,
    )
    context = stage_context(chosen, compiled=chosen.compile)
    student = train_student(
        context, chosen.weights, distillation, updates=chosen.updates, vlm_share=chosen.vlm_conditions
    )
    path = context.folder / f"student-{student.card.steps}-{distillation.objective}.safetensors"
    save_bundle(path, student, dtype=torch.float16)
    print(path)


if __name__ == "__main__":
    main()
