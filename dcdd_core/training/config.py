"""The configuration of a decoder's training, all of it validated before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..method.distillation import OBJECTIVES
from ..method.flow import DENSITIES, WEIGHTINGS
from ..models.card import MOST_STEPS as MOST_EULER_STEPS
from ..pipelines.image_files import ReadPolicy
from ..settings import require_at_least, require_at_most, require_number
from .captions import Captions
from .optimizers import OPTIMIZERS

#: A checkpoint's name gives the step in eight digits.
MOST_STEPS = 10**8 - 1
#: Beyond any use: a larger number is a typing error, and would read images forever.
MOST_ACCUMULATED, MOST_BATCH, MOST_SAMPLES = 2**16, 2**16, 64
#: Images of a stream held in RAM, and images per file of a cache; a thousand times the defaults.
MOST_WINDOW, MOST_SHARD = 10**6, 10**6
#: Worker processes.
MOST_WORKERS = 1024
#: Bound on |mu|: beyond it, exp(mu) shifts all times to pure noise, or to none.
MOST_SHIFT = 16.0
#: Far beyond where AdamW and Muon are stable; a larger number has a misplaced decimal point [choice].
MOST_RATE, MOST_DECAY = 10.0, 10.0


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """How the weights are updated.

    Attributes:
        steps: updates of the weights.
        accumulation: micro-batches per process and update.
        learning_rate, warmup: the peak, and the updates until it; then a half cosine (`schedules.warmup_cosine`).
        clip: the largest gradient norm; larger gradients are scaled down to it.
        ema_decay: decay of the weights' EMA, which is the result of the training.
        density, weighting: density of the times, and w(t) of Eq. 26, by diffusers' names (`method.flow`).
        shift: mu of the shift of the times; positive values sample more of them near the noise.
        optimizer: "adamw" (the paper's), "adamw8bit" (`optimizers.adamw_8bit`), or "muon": orthogonalised momentum
            (Jordan et al. 2024) for the matrices inside the blocks, scaled to AdamW's step size (Liu et al. 2025, arXiv
            2502.16982), and AdamW for everything else.
        compile: run each transformer block through torch.compile, one compilation for all blocks of a kind. On a CPU,
            where this needs a C++ compiler, a step of the pico decoder takes about three quarters of the time.
        activation_checkpointing: recompute each block's activations in the backward pass instead of storing them.

    Raises:
        ValueError: for unknown choices and numbers out of range.
    """

    steps: int
    accumulation: int = 1
    learning_rate: float = 8e-4
    warmup: int = 200
    weight_decay: float = 0.01
    clip: float = 1.0
    ema_decay: float = 0.999
    density: str = "logit_normal"
    shift: float = 0.0
    weighting: str = "uniform"
    seed: int = 0
    optimizer: str = "adamw"
    compile: bool = False
    activation_checkpointing: bool = False

    def __post_init__(self):
        choices = {"optimizer": OPTIMIZERS, "density": DENSITIES, "weighting": WEIGHTINGS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        require_number("shift", self.shift, least=-MOST_SHIFT, most=MOST_SHIFT)
        require_number("weight_decay", self.weight_decay, least=0, most=MOST_DECAY)
        require_number("learning_rate", self.learning_rate, above=0, most=MOST_RATE)
        if self.steps < 1 or self.accumulation < 1:
            raise ValueError(f"steps and accumulation must be at least 1, got {self.steps} and {self.accumulation}")
        if not self.clip > 0:
            raise ValueError(f"clip, the largest gradient norm, must be above 0, got {self.clip}")
        require_at_least(0, warmup=self.warmup)
        require_at_most(MOST_STEPS, steps=self.steps, warmup=self.warmup)
        require_at_most(MOST_ACCUMULATED, accumulation=self.accumulation)
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number of 64 bits, got {self.seed}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"the EMA's decay must lie in [0, 1), got {self.ema_decay}")

    def settings(self) -> dict[str, Any]:
        """The settings that the result depends on, under their names in checkpoints.

        Not `compile` and `activation_checkpointing`, which may change when a run is resumed.
        """
        values = asdict(self)
        del values["compile"], values["activation_checkpointing"]
        values["average_decay"] = values.pop("ema_decay")
        return values


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """How a decoder is distilled into a student of few steps (`method.distillation`).

    Attributes:
        steps: Euler steps of the student.
        objective: one of `OBJECTIVES`.
        teacher_steps: Euler steps of the teacher; None for the number on its card.
        shift: mu of the student's time shift; None for the teacher's.

    Raises:
        ValueError: for an unknown objective and numbers out of range.
    """

    steps: int = 2
    objective: str = "trajectory"
    teacher_steps: int | None = None
    shift: float | None = None

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        require_number("student-steps", self.steps, whole=True, least=1, most=MOST_EULER_STEPS, remedy="1, 2 or 4")
        require_number("teacher-steps", self.teacher_steps, whole=True, least=2, most=MOST_EULER_STEPS, optional=True)
        require_number("shift", self.shift, least=-MOST_SHIFT, most=MOST_SHIFT, optional=True)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data to train on.

    Attributes:
        images, column: the images, as `open_images` takes them; or
        cache: a folder that `write_cache` wrote.
        verify: first compare the whole cache with its checksums, which reads all of it.
        batch: images per process and micro-batch.
        window: see `DataShard`.
        workers: processes that decode images, for each training process.
        localised: see `ExampleMaker`.
        min_side, skip_unreadable: which images may be left out (`ReadPolicy`).
        captions: how the images' captions are read; None for images without captions.
        vlm_conditions: see `ExampleMaker`'s vlm_share.

    Raises:
        ValueError: unless there is exactly one of images and cache, and for numbers out of range.
    """

    images: str | Path | None = None
    column: str | None = None
    cache: Path | None = None
    verify: bool = False
    batch: int = 4
    window: int = 1000
    workers: int = 0
    localised: float = 0.2
    min_side: int | None = None
    skip_unreadable: float = ReadPolicy.skip_unreadable
    captions: Captions | None = None
    vlm_conditions: float = 0.0

    def __post_init__(self):
        if (self.images is None) == (self.cache is None):
            raise ValueError("give either images or a cache of their encodings to train on")
        if self.verify and self.cache is None:
            raise ValueError("images have no checksums to verify: leave --verify out, or train on a cache")
        require_at_least(0, workers=self.workers)
        require_at_least(1, batch=self.batch, window=self.window)
        require_at_most(MOST_WORKERS, workers=self.workers)
        require_at_most(MOST_BATCH, batch=self.batch)
        require_at_most(MOST_WINDOW, window=self.window)
        if not 0 <= self.localised <= 1:
            raise ValueError(f"the fraction of localised images must lie in 0..1, got {self.localised!r}")
        require_number("vlm-conditions", self.vlm_conditions, least=0, most=1, remedy="0 trains on proxies alone")
        _ = self.policy

    @property
    def policy(self) -> ReadPolicy:
        """Which images may be left out."""
        return ReadPolicy(min_side=self.min_side, skip_unreadable=self.skip_unreadable)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What is written during a training, and how often, in updates.

    Attributes:
        samples: how many images a sample sheet shows, held-out ones if there are any; 0 for no sheets.
        sample_every, save_every, log_every: updates between evaluations with their sample sheets, between checkpoints,
            and between lines of the log. Each is also done after the last update. sample_every=0 means no
            evaluations, and requires samples=0.
        keep: how many of the newest checkpoints are kept.
        held_out: fraction of the images that are never trained on (`held_out.split`); 0 for none. A run that began
            without held-out images continues without them.

    Raises:
        ValueError: for numbers out of range.
    """

    samples: int = 4
    sample_every: int = 1000
    save_every: int = 500
    log_every: int = 10
    keep: int = 2
    held_out: float = 0.01

    def __post_init__(self):
        require_at_least(0, samples=self.samples, sample_every=self.sample_every)
        require_at_least(1, save_every=self.save_every, log_every=self.log_every, keep=self.keep)
        require_at_most(MOST_SAMPLES, samples=self.samples)
        # No run has more updates than this, and so no more checkpoints either.
        every = {"sample_every": self.sample_every, "save_every": self.save_every, "log_every": self.log_every}
        require_at_most(MOST_STEPS, **every, keep=self.keep)
        if not 0 <= self.held_out <= 0.5:
            raise ValueError(f"the fraction of held-out images must lie in 0..0.5, got {self.held_out!r}")
        if self.sample_every < 1 and self.samples:
            raise ValueError(
                f"sample_every must be at least 1, got {self.sample_every}: for no sheets take --samples 0"
            )
