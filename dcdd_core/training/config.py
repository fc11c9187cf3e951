"""What a decoder's training is configured with. All of it is validated before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..method.flow import DENSITIES, WEIGHTINGS
from ..settings import require_at_least
from .optimizers import OPTIMIZERS


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """How the weights are updated.

    Attributes:
        steps: updates of the weights.
        accumulation: micro-batches per process and update.
        learning_rate, warmup: the peak, and the updates up to it; then a half cosine (`schedules.warmup_cosine`).
        clip: the largest gradient norm; longer gradients are scaled down to it.
        ema_decay: of the weights' EMA, which is the result of the training.
        density, weighting: of the times, and w(t) of Eq. 26, by diffusers' names (`method.flow`).
        shift: mu of the shift of the times; positive values sample more of them near the noise.
        optimizer: "adamw" (the paper's), "adamw8bit" (`optimizers.adamw_8bit`), or "muon": orthogonalised momentum
            (Jordan et al. 2024) for the matrices inside the blocks, scaled to AdamW's step size (Liu et al. 2025, arXiv
            2502.16982), and AdamW for all else.
        compile: run each transformer block through torch.compile, one compilation for all blocks of a kind. On a CPU,
            which then needs a C++ compiler, a step of the pico decoder takes about three quarters of the time.
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
        if not math.isfinite(self.shift):
            raise ValueError(f"shift must be a finite number, got {self.shift!r}")
        if self.steps < 1 or self.accumulation < 1:
            raise ValueError(f"steps and accumulation must be at least 1, got {self.steps} and {self.accumulation}")
        if not self.learning_rate > 0 or not self.clip > 0:
            raise ValueError(
                f"the learning rate and the largest gradient norm must be above 0, got {self.learning_rate} and "
                f"{self.clip}"
            )
        require_at_least(0, warmup=self.warmup)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"the EMA's decay must lie in [0, 1), got {self.ema_decay}")

    def settings(self) -> dict[str, Any]:
        """What the result depends on, by the names in checkpoints: a run may be resumed with other ways to compute it
        (`compile`, `activation_checkpointing`)."""
        values = asdict(self)
        del values["compile"], values["activation_checkpointing"]
        values["average_decay"] = values.pop("ema_decay")
        return values


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on.

    Attributes:
        images, column: images, as `open_images` takes them; or
        cache: a folder of `write_cache`.
        verify: compare the whole cache with its checksums first, which reads all of it.
        batch: images per process and micro-batch.
        window: see `DataShard`.
        workers: processes that decode images, for each training process.
        localised: see `ExampleMaker`.

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

    def __post_init__(self):
        if (self.images is None) == (self.cache is None):
            raise ValueError("give either images or a cache of their encodings to train on")
        if self.verify and self.cache is None:
            raise ValueError("images have no checksums to verify: leave --verify out, or train on a cache")
        require_at_least(0, workers=self.workers)
        require_at_least(1, batch=self.batch, window=self.window)
        if not 0 <= self.localised <= 1:
            raise ValueError(f"the fraction of localised images must lie in 0..1, got {self.localised!r}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What is written during a training, and how often, in updates.

    Attributes:
        samples: how many of the first images a sample sheet shows; 0 for no sheets.
        sample_every, save_every, log_every: updates between evaluations with their sample sheets, between checkpoints,
            and between lines of the log. Each is also done after the last update.

    Raises:
        ValueError: for numbers out of range.
    """

    samples: int = 4
    sample_every: int = 1000
    save_every: int = 500
    log_every: int = 10

    def __post_init__(self):
        require_at_least(0, samples=self.samples)
        require_at_least(1, save_every=self.save_every, log_every=self.log_every)
        if self.sample_every < 1 and self.samples:
            raise ValueError(
                f"sample_every must be at least 1, got {self.sample_every}: for no sheets take --samples 0"
            )
