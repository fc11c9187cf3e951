"""Trains a network, the diffusion decoder or a masked sampler, in one process or many.

An update is determined by its number: its random draws come from generators keyed by the numbers of its micro-batches,
and checkpoints hold the position in the data. So a run that is killed and resumed computes exactly what an
uninterrupted one would.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..files import whole_file
from ..method.sampling import keyed_generator
from .batches import Batches
from .checkpoints import Best, Checkpoints, Resumed, TrainingState, images_per_update, load_best
from .config import OptimizationConfig, RunConfig
from .ema import EMA, all_finite
from .log import RunningMeans, append_to_log, truncate_log
from .positions import restore_position, saved_position
from .progress import ProgressBar
from .schedules import set_learning_rate, warmup_cosine
from .sharding import NO_DEEPSPEED, full_tensor, reshard
from .stop import StopRequest, TrainingStopped, stop_on_signals
from .trainable import trained_weights

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of evaluating a network.

    Attributes:
        numbers: for the log, by name.
        sheet: a sheet of samples; None for none.
        score: lower is better; the weights with the lowest score are kept. It is the same in all processes. None for a
            training that keeps only the last weights.
    """

    numbers: Mapping[str, float] = field(default_factory=dict)
    sheet: Image.Image | None = None
    score: float | None = None


def sample_sheet(columns: Sequence[torch.Tensor]) -> Image.Image:
    """Images in -1..1 side by side: each column is [B, 3, H, W], and row b of the sheet shows image b of each."""
    sheet = rearrange(torch.stack(list(columns)), "k b c h w -> (b h) (k w) c").clamp(-1, 1)
    return Image.fromarray(((sheet + 1) * 127.5).round().byte().cpu().numpy())


Network = TypeVar("Network", bound=nn.Module)
Result = TypeVar("Result")
#: Runs a function on the network with the EMA of its weights, without gradients.
Averaged = Callable[[Callable[[Network], Result]], Result]


class Task(Protocol[Network]):
    """What a `Trainer` trains, and on which loss.

    Attributes:
        network: its weights that require a gradient are trained.
        blocks: the parts of the network that are compiled, checkpointed and sharded one by one.
        settings: what the result depends on, as plain JSON values.
        remedy: what to do once a loss or a weight is no longer finite.
    """

    network: Network
    blocks: Sequence[nn.Module]
    settings: Mapping[str, Any]
    remedy: str

    def optimizers(self, config: OptimizationConfig, *, sharded: bool) -> list[torch.optim.Optimizer]:
        """The optimisers of the trained weights, each weight in exactly one."""

    def example(self, batch: Any, generator: torch.Generator, averaged: Averaged) -> Any:
        """The example of a batch; all random draws come from the generator."""

    def update(
        self, examples: Iterable[Any], total: Callable[[torch.Tensor], torch.Tensor], *, parts: int
    ) -> Iterable[Any]:
        """The examples of an update's micro-batches, such that the mean of their losses is what the update minimises.

        Args:
            examples: this process's; each is made when it is taken.
            total: numbers of this process -> their sums over all processes.
            parts: number of micro-batches of all processes.
        """

    def losses(
        self, network: Network, example: Any, generator: torch.Generator, config: OptimizationConfig
    ) -> Mapping[str, torch.Tensor]:
        """Scalars for the log; the one called "loss" is minimised."""


class ForwardProxy(nn.Module):
    """Routes every use of a network through one forward pass: `proxy(work)` returns `work(network)`.

    DDP, FSDP and autocast hook only into a module's forward pass, whereas training calls a decoder twice
    (`condition_tokens`, `forward`), and sampling many times.

    Args:
        precision: a context entered in every pass. accelerate enters one by itself, except with FSDP2.
    """

    def __init__(self, network: nn.Module, precision: Callable[[], AbstractContextManager] = nullcontext):
        super().__init__()
        self.decoder = network  # Any network; the weights' names in checkpoints begin with this attribute's.
        self.precision = precision

    def forward(self, work: Callable[[nn.Module], Any]) -> Any:
        """Returns the result of `work` on the network."""
        with self.precision():
            return work(self.decoder)


class Trainer:
    """Trains those weights of a network that require a gradient, in one call to `train`.

    Args:
        folder: the run's; receives `log.jsonl`, `checkpoints` (see `Checkpoints`) and the sample sheets of `evaluate`.
        task: the network and its loss.
        batches: this process's.
        config: how the weights are updated.
        accelerator: one that has prepared nothing yet; its trackers receive the numbers of the log.
        settings: what the examples depend on; those of `config` and `task` are added.
        run: how often there are checkpoints, lines of the log and evaluations.
        autocast: entered around the loss, in addition to the accelerator's mixed precision.
        evaluate: evaluates the network with averaged weights; None for no evaluation.
        report: called with each line to print.
        progress: shown in the main process, instead of the log's lines.
    """

    def __init__(
        self,
        folder: Path,
        task: Task,
        batches: Batches,
        config: OptimizationConfig,
        *,
        accelerator: Accelerator,
        settings: Mapping[str, Any],
        run: RunConfig,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        evaluate: Callable[[Any], Evaluation] | None = None,
        report: Callable[[str], None] = print,
        progress: ProgressBar | None = None,
    ):
        self.folder = folder
        self.task = task
        self.batches = batches
        self.config = config
        self.accelerator = accelerator
        self.run = run
        self.autocast = autocast
        self.evaluate = evaluate
        self.report = report
        self.progress = progress
        self.settings = settings

    def train(self) -> nn.Module:
        """Trains from the newest checkpoint, or the start, to the last update; all processes must call this together.

        Ctrl-C or SIGTERM in any process ends it after the current update, with a checkpoint; a second one ends it at
        once.

        Returns:
            The network with the EMA of its weights, frozen, in evaluation mode.

        Raises:
            ValueError: if the newest checkpoint was made under other settings or is damaged, or the way that weights
                are sharded is not supported.
            TrainingStopped: in all processes, after a signal; the checkpoint is saved.
            KeyboardInterrupt: after a second signal.
            FloatingPointError: if the loss or a weight is no longer finite; the last checkpoint stays as it is.
            OSError: if a checkpoint, a sample sheet or the log cannot be written; the last checkpoint stays as it is.
        """
        self._check_sharding()
        if not self.accelerator.is_main_process:
            self.progress = None
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._wrapped_blocks():
            self._prepare()
            self._resume()
            with stop_on_signals() as request, self._shown():
                self._loop(request)
            self.ema.apply()
        return self.task.network.eval().requires_grad_(False)

    def _loop(self, request: StopRequest) -> None:
        """Makes the remaining updates."""
        stream = iter(self.batches)
        while self.step < self.config.steps:
            self.means.add(self._update(stream))
            self.step += 1
            self._log()
            number = self._signal(request)
            if number or self._is_due(self.run.save_every):
                self._save()
            if number:
                said = (
                    f"{self.folder.name}: stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'} after step "
                    f"{self.step} of {self.config.steps}. Its checkpoint is saved ({self.folder / 'checkpoints'}): run "
                    "the same command again to resume"
                )
                raise TrainingStopped(said, number)

    def _signal(self, request: StopRequest) -> int:
        """The number of a signal that any process received, the same in all processes; 0 for none."""
        if self.accelerator.num_processes == 1:
            return request.number
        numbers = self.accelerator.gather(torch.tensor([request.number], device=self.accelerator.device))
        return int(numbers.max())

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Shows the progress while the context lasts."""
        if self.progress is None:
            yield
            return
        self.progress.start(self.step)
        try:
            yield
        finally:
            self.progress.close()

    def _check_sharding(self) -> None:
        """Refuses ways of sharding that the EMA, the checkpoints or Muon do not support."""
        kind, state = self.accelerator.distributed_type, self.accelerator.state
        if kind == "DEEPSPEED":
            raise ValueError(NO_DEEPSPEED)
        if kind == "FSDP" and state.fsdp_plugin.fsdp_version != 2:
            raise ValueError("accelerate is configured for FSDP1, but FSDP2 is supported alone: set fsdp_version: 2")
        if self.config.optimizer == "muon" and kind == "FSDP":
            raise ValueError("Muon needs whole matrices, but each process holds shards of them: take 'adamw'")

    @contextmanager
    def _wrapped_blocks(self) -> Iterator[None]:
        """Compiles and checkpoints the network's blocks, as configured, while the context lasts."""
        blocks = self.task.blocks
        for block in blocks:
            if self.config.compile:
                block.forward = torch.compile(block.forward, fullgraph=True)
            if self.config.activation_checkpointing:
                # Not diffusers' own switch: it acts on the network's forward pass, which a backbone does not use.
                # Outside the compiled function: torch does not compile what is called inside a checkpoint within it.
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        try:
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)

    def _prepare(self) -> None:
        """Has accelerate wrap the model and the optimisers, and sets up the EMA and the checkpoints."""
        accelerator, config, network = self.accelerator, self.config, self.task.network
        accelerator.gradient_accumulation_steps = config.accumulation
        if accelerator.distributed_type == "FSDP":  # It shards the blocks, whatever their class.
            kinds = sorted({type(block).__name__ for block in self.task.blocks})
            accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = kinds
        network.train()
        optimizers = self.task.optimizers(config, sharded=accelerator.distributed_type == "FSDP")
        proxy = ForwardProxy(network, _autocast(accelerator))
        self.model, *self.optimizers = accelerator.prepare(proxy, *optimizers)
        self.ema = EMA(trained_weights(network), config.ema_decay)
        self.means = RunningMeans()
        self.checkpoints = Checkpoints(
            self.folder,
            accelerator,
            model=self.model,
            optimizers=self.optimizers,
            settings={
                **self.settings,
                "recipe": config.settings(),
                **self.task.settings,
                "batch": self.batches.size,
                "processes": accelerator.num_processes,
            },
            keep=self.run.keep,
        )

    def _resume(self) -> None:
        """Restores the newest checkpoint, if there is one."""
        self.step, seconds = 0, 0.0
        if (state := self.checkpoints.load()) is not None:
            self.step, seconds = state.step, state.seconds
            self.ema.load(state.ema, updates=self.step)
            restore_position(self.batches, state.positions)
            self.means.load_state_dict(state.means)
        best = load_best(self.folder) if self.accelerator.is_main_process else None
        self.best = math.inf if best is None else best.loss
        if self.accelerator.is_main_process:
            truncate_log(self.folder, self.step)
            if state is not None:
                self.report(f"{self.folder.name}: resuming from step {self.step} of {self.config.steps}")
                self._report_changes(state)
        self.started = time.monotonic() - seconds

    def _report_changes(self, state: Resumed) -> None:
        """Reports what has changed since the checkpoint."""
        before, now = state.settings, self.checkpoints.settings
        steps, world = before["recipe"]["steps"], before["processes"]
        if steps != self.config.steps:
            self.report(
                f"{self.folder.name}: extended from {steps} to {self.config.steps} updates. The learning rate goes on "
                f"as in a run of that length, at {self._learning_rate(self.config.steps):.3g} instead of "
                f"{self._learning_rate(steps):.3g}"
            )
        if world != now["processes"]:
            self.report(
                f"{self.folder.name}: resumed with world size {now['processes']} instead of {world}. Every image still "
                f"comes once an epoch; the batches and their random draws are others than {world} would have had. An "
                f"update sees {images_per_update(now)} images ({images_per_update(before)} before)"
            )

    def _learning_rate(self, steps: int) -> float:
        """The learning rate of the next update, in a run of this many steps."""
        return warmup_cosine(self.step, steps, peak=self.config.learning_rate, warmup=self.config.warmup)

    def _update(self, stream: Iterator[Any]) -> dict[str, torch.Tensor]:
        """One update of the weights; the loss is the mean over this process's micro-batches."""
        accelerator, config = self.accelerator, self.config
        world, parts = accelerator.num_processes, config.accumulation * accelerator.num_processes
        rate = self._learning_rate(config.steps)
        for optimizer in self.optimizers:
            set_learning_rate(optimizer, rate)
        # Numbers among the micro-batches of all processes.
        numbers = range(self.step * parts + accelerator.process_index, (self.step + 1) * parts, world)
        generators = [keyed_generator(config.seed, number) for number in numbers]
        made = (self.task.example(next(stream), generator, self._averaged) for generator in generators)
        found = []
        for generator, example in zip(generators, self.task.update(made, self._sum_of_processes, parts=parts)):
            work = partial(self.task.losses, example=example, generator=generator, config=config)
            with accelerator.accumulate(self.model):
                with self.autocast():
                    losses = self.model(work)
                accelerator.backward(losses["loss"])
                found.append({name: value.detach() for name, value in losses.items()})
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), config.clip)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        self.ema.update()
        means = {name: torch.stack([losses[name] for losses in found]).mean() for name in found[0]}
        return means | {"gradient_norm": full_tensor(norm).to(accelerator.device)}

    def _averaged(self, work: Callable[[nn.Module], Result]) -> Result:
        """See `Averaged`."""
        with self.ema.swapped_in(), torch.no_grad(), self.autocast():
            return self.model(work)

    def _log(self) -> None:
        """Evaluates and writes a line of the log, each if it is due."""
        line: dict[str, float] = {}
        if self._is_due(self.run.log_every):
            line = self.means.take(self._mean_of_processes)
            self._require_finite({name: math.isfinite(value) for name, value in line.items()})
        evaluated = self.evaluate is not None and self._is_due(self.run.sample_every)
        if evaluated:
            line |= self._evaluate()
        if line and self.accelerator.is_main_process:
            line = {"step": self.step, "seconds": round(time.monotonic() - self.started, 1)} | line
            append_to_log(self.folder, line)
            self.accelerator.log({name: value for name, value in line.items() if name != "step"}, step=self.step)
            if self.progress is None:
                self.report(f"{self.folder.name} " + " ".join(f"{name}={value:.4g}" for name, value in line.items()))
        if self.progress is not None:
            self.progress.advance(self.step, line, evaluated=evaluated)

    def _evaluate(self) -> dict[str, float]:
        """Evaluates the averaged weights: returns the numbers, and writes the sheet."""
        self.task.network.eval()
        with self.ema.swapped_in(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            found = self.model(self.evaluate)
            reshard(self.model)
        self._keep_best(found.score)
        self.task.network.train()
        if found.sheet is not None and self.accelerator.is_main_process:
            self._write_sheet(found.sheet)
        return {f"eval/{name}": float(value) for name, value in found.numbers.items()}

    def _keep_best(self, score: float | None) -> None:
        """Writes the EMA's weights if their score is the lowest so far."""
        if score is None:
            return
        # Only the main process has read the best score so far.
        better = torch.tensor(float(self.accelerator.is_main_process and score < self.best))
        if float(self._mean_of_processes(better)) > 0:
            self.best, weights = score, self.ema.full()
            if self.accelerator.is_main_process:
                self.checkpoints.save_best(Best(step=self.step, loss=score, weights=weights))

    def _write_sheet(self, sheet: Image.Image) -> None:
        """Writes a sample sheet to its file, and to the trackers that take images."""
        with whole_file(self.folder / "samples" / f"step-{self.step:08}.png") as temporary:
            sheet.save(temporary, format="PNG")
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": np.asarray(sheet)[None]}, step=self.step, **options)

    def _save(self) -> None:
        """Writes a checkpoint, unless a weight is not finite."""
        finite = all_finite([*self.ema.weights.values(), *self.ema.shards()])
        everywhere = self._mean_of_processes(float(finite))
        self._require_finite({"a weight": bool(everywhere == 1)})
        self.checkpoints.save(
            TrainingState(
                step=self.step,
                seconds=time.monotonic() - self.started,
                ema=self.ema.full(),
                position=saved_position(self.batches),
                means=self.means.state_dict(),
            )
        )

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _mean_of_processes(self, number: torch.Tensor | float) -> torch.Tensor:
        return self.accelerator.reduce(torch.as_tensor(number, device=self.accelerator.device), "mean")

    def _sum_of_processes(self, numbers: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:  # and nothing waits for the device
            return numbers
        return self.accelerator.reduce(numbers.to(self.accelerator.device), "sum")

    def _require_finite(self, finite: Mapping[str, bool]) -> None:
        if bad := [name for name, is_finite in finite.items() if not is_finite]:
            raise FloatingPointError(
                f"{self.folder.name}: {', '.join(bad)} stopped being finite before step {self.step}. The last "
                f"checkpoint is intact ({self.folder / 'checkpoints'}): {self.task.remedy}"
            )


def _autocast(accelerator: Accelerator) -> Callable[[], AbstractContextManager]:
    """The autocast of the accelerator's mixed precision."""
    if accelerator.mixed_precision == "bf16":
        return partial(torch.autocast, accelerator.device.type, torch.bfloat16)
    return nullcontext
