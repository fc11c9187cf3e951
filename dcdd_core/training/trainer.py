"""Training the diffusion decoder on pairs of latents and conditions, on one process or many.

A step is a function of its number: what it draws comes from generators keyed by the numbers of its batches, and the
data's position is part of a checkpoint, so a run that was killed and resumed sees just what an uninterrupted one would.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..files import whole_file
from ..method.sampling import keyed_generator
from ..models.decoder import DistributionConditionedDecoder
from .batches import Batches
from .ema import MovingAverage, all_finite
from .examples import Example
from .log import Means, append_to_log, cut_log
from .recipe import DecoderTraining, decoder_loss, decoder_optimizers
from .run_state import Checkpoints, Kept
from .sharding import take_apart, whole
from .simple_loop import set_learning_rate, warmup_cosine
from .trainable import trained_weights

if TYPE_CHECKING:
    from accelerate import Accelerator

#: What a recipe says of how steps are computed, not of what they are: a run may go on with other choices.
_HOW = ("compiled", "recomputed")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How good a decoder is at some point: numbers for the log by name, and a picture of its pictures."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    sheet: Image.Image | None = None


class Workpiece(nn.Module):
    """A decoder whose every use is a forward pass of this module: `workpiece(work)` is `work(decoder)`.

    What wraps a module to train it on many devices (DDP, FSDP, DeepSpeed, autocast) acts on forward passes alone; the
    decoder's use has two (`condition_tokens`, `forward`), and its painting many.

    Args:
        precision: entered in every pass. accelerate does so by itself, but not for FSDP2 and DeepSpeed; and the latter
            leaves what was entered outside of its own forward pass.
    """

    def __init__(
        self, decoder: DistributionConditionedDecoder, precision: Callable[[], AbstractContextManager] = nullcontext
    ):
        super().__init__()
        self.decoder = decoder
        self.precision = precision

    def forward(self, work: Callable[[DistributionConditionedDecoder], Any]) -> Any:
        """What `work` gives of the decoder."""
        with self.precision():
            return work(self.decoder)


def train_decoder(
    folder: Path,
    decoder: DistributionConditionedDecoder,
    batches: Batches,
    examples: Callable[[Any, torch.Generator], Example],
    recipe: DecoderTraining,
    *,
    accelerator: Accelerator,
    settings: Mapping[str, Any],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    evaluate: Callable[[DistributionConditionedDecoder], Evaluation] | None = None,
    evaluate_every: int = 500,
    save_every: int = 250,
    log_every: int = 50,
    report: Callable[[str], None] = print,
) -> DistributionConditionedDecoder:
    """Trains (or restores) a decoder's weights that require a gradient; returns it with their averages.

    Everything is the same whether the run was interrupted or not. With several processes, all call this.

    Args:
        folder: of the run; receives `log.jsonl`, `checkpoints` (see `Checkpoints`) and the sheets of `evaluate`.
        batches: this process's.
        examples: an example of a batch; what it draws comes from the generator it is given.
        accelerator: one that has prepared nothing yet; its trackers get what the log gets.
        settings: what the examples depend on; the recipe and the card are added.
        autocast: entered around the loss, besides the accelerator's own mixed precision.
        evaluate: looks at the averaged decoder.

    Raises:
        ValueError: if the newest checkpoint was made under other settings, or the optimiser or the way that weights are
            cut into parts does not fit.
        FloatingPointError: if the loss or a weight stops being finite; the last checkpoint is left as it was.
        OSError: if a checkpoint, a sheet or the log cannot be written; the checkpoint before is left as it was.
    """
    _require_whole_average(accelerator)
    if recipe.optimizer == "muon" and accelerator.distributed_type in ("FSDP", "DEEPSPEED"):
        raise ValueError("Muon needs whole matrices, and here each process holds parts of them: take 'adamw'")
    accelerator.gradient_accumulation_steps = recipe.accumulation
    if accelerator.distributed_type == "DEEPSPEED":  # which does this by itself, and is given no data loader to ask
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": batches.size,
            "gradient_accumulation_steps": recipe.accumulation,
            "gradient_clipping": recipe.clip,
        }
    folder.mkdir(parents=True, exist_ok=True)
    decoder.train()
    optimizers = decoder_optimizers(decoder, recipe, sharded=accelerator.distributed_type == "FSDP")
    with _blocks(decoder.backbone.blocks, recipe):
        model, *optimizers = accelerator.prepare(Workpiece(decoder, _precision(accelerator)), *optimizers)
        average = MovingAverage(trained_weights(decoder), recipe.average_decay)
        checkpoints = Checkpoints(
            folder,
            accelerator,
            model=model,
            optimizers=optimizers,
            settings={
                **settings,
                "recipe": {name: value for name, value in asdict(recipe).items() if name not in _HOW},
                "card": asdict(decoder.card),
                "batch": batches.size,
                "processes": accelerator.num_processes,
            },
        )
        done, spent, means = 0, 0.0, Means()
        if (kept := checkpoints.load()) is not None:
            done, spent = kept.step, kept.seconds
            average.load(kept.average, done)
            batches.load_state_dict(kept.position)
            means.load_state_dict(kept.means)
        if accelerator.is_main_process:
            cut_log(folder, done)
            if done:
                report(f"{folder.name}: going on from step {done} of {recipe.steps}")
        started, stream = time.monotonic() - spent, iter(batches)

        def step(i: int) -> dict[str, torch.Tensor]:
            """One update; the loss is this process's."""
            for optimizer in optimizers:
                rate = warmup_cosine(i, recipe.steps, peak=recipe.learning_rate, warmup=recipe.warmup)
                set_learning_rate(optimizer, rate)
            losses = []
            for k in range(recipe.accumulation):
                # The number of the batch among all batches of all processes.
                number = (i * recipe.accumulation + k) * accelerator.num_processes + accelerator.process_index
                draw = keyed_generator(recipe.seed, number)
                example = examples(next(stream), draw)
                with accelerator.accumulate(model):
                    with autocast():
                        loss = model(partial(decoder_loss, example=example, draw=draw, recipe=recipe))
                    accelerator.backward(loss)
                    losses.append(loss.detach())
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(model.parameters(), recipe.clip)
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad()
            average.update()
            found = {"loss": torch.stack(losses).mean()}
            if norm is not None:  # as with DeepSpeed before its first update
                found["gradient_norm"] = whole(torch.as_tensor(norm)).to(accelerator.device)
            return found

        def look(step: int) -> dict[str, float]:
            decoder.eval()
            with average.in_place(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
                found = model(evaluate)
                take_apart(model)
            decoder.train()
            if found.sheet is not None and accelerator.is_main_process:
                _show(accelerator, folder / "samples" / f"step-{step:08}.png", found.sheet, step)
            return {f"eval/{name}": float(value) for name, value in found.numbers.items()}

        def together(total: torch.Tensor | float) -> torch.Tensor:
            return accelerator.reduce(torch.as_tensor(total, device=accelerator.device), "mean")

        while done < recipe.steps:
            means.add(step(done))
            done += 1
            last = done == recipe.steps
            line: dict[str, float] = {}
            if done % log_every == 0 or last:
                line = means.take(together)
                _require_finite({name: math.isfinite(value) for name, value in line.items()}, done, folder)
            if evaluate is not None and (done % evaluate_every == 0 or last):
                line |= look(done)
            if line and accelerator.is_main_process:
                line = {"step": done, "seconds": round(time.monotonic() - started, 1)} | line
                append_to_log(folder, line)
                accelerator.log({name: value for name, value in line.items() if name != "step"}, step=done)
                report(f"{folder.name} " + " ".join(f"{k}={v:.4g}" for k, v in line.items()))
            if done % save_every == 0 or last:
                finite = all_finite([*average.weights.values(), *average.parts()])
                everywhere = accelerator.reduce(torch.tensor(float(finite), device=accelerator.device), "mean")
                _require_finite({"a weight": bool(everywhere == 1)}, done, folder)
                checkpoints.save(
                    Kept(
                        step=done,
                        seconds=time.monotonic() - started,
                        average=average.whole(),
                        position=batches.state_dict(),
                        means=means.state_dict(),
                    )
                )
        average.put_in_place()
    return decoder.eval().requires_grad_(False)


def _precision(accelerator: Accelerator) -> Callable[[], AbstractContextManager]:
    """What the accelerator's mixed precision enters around a forward pass."""
    if accelerator.mixed_precision == "bf16":
        return partial(torch.autocast, accelerator.device.type, torch.bfloat16)
    return nullcontext


@contextmanager
def _blocks(blocks: tuple[nn.Module, ...], recipe: DecoderTraining) -> Iterator[None]:
    """Within it the transformer's blocks are compiled or recomputed, as the recipe says."""
    for block in blocks:
        if recipe.compiled:
            block.forward = torch.compile(block.forward, fullgraph=True)
        if recipe.recomputed:  # The transformer's own switch acts on its forward pass, which the decoder does not use.
            # Around what is compiled: torch compiles nothing of what is called inside of a checkpoint that it compiles.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _show(accelerator: Accelerator, path: Path, sheet: Image.Image, step: int) -> None:
    """A sheet into a file, and to the trackers that take pictures."""
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG")
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(sheet)[None]}, step=step, **options)


def _require_whole_average(accelerator: Accelerator) -> None:
    """Refuses the ways to cut weights into parts that the moving average and the checkpoints do not know."""
    known = "FSDP2 and DeepSpeed up to stage 2 are known here (configs/accelerate has both)"
    if accelerator.distributed_type == "FSDP" and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError(f"accelerate was told to cut the weights up with FSDP1: {known}; set fsdp_version: 2")
    if accelerator.distributed_type == "DEEPSPEED" and (stage := accelerator.state.deepspeed_plugin.zero_stage) > 2:
        raise ValueError(f"accelerate was told to take DeepSpeed's stage {stage}: {known}; set zero_stage: 2, or FSDP2")


def _require_finite(found: Mapping[str, bool], step: int, folder: Path) -> None:
    if bad := [name for name, finite in found.items() if not finite]:
        raise FloatingPointError(
            f"{folder.name}: {', '.join(bad)} stopped being finite before step {step}. The last checkpoint is "
            f"untouched ({folder / 'checkpoints'}): make a bundle of it (`train.py --bundle-now`, with the options of "
            "this run), and begin another run from that one (--bundle) with a lower learning rate"
        )
