"""`train.py progressive`: from captioned images to the folder of a masked sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files import remove_leftovers, write_text
from ..models.checkpoints import fingerprint_of, load_strictly
from ..models.masked.sampler import MaskedSampler
from ..protocols import ImageTokenizer
from .batches import Batches, DataShard, ReadCounter
from .cache import CacheCard
from .checkpoints import HELD_OUT, HELD_OUT_FRACTION, load_best, load_ema, newest_checkpoint, settings_of
from .config import DataConfig, OptimizationConfig, RunConfig
from .folders import digest
from .held_out import Split
from .lock import run_lock
from .log import read_log
from .masked_plan import MaskedPlan
from .masked_task import ErrorScale, MaskedHeldOut, MaskedSampleSheet, MaskedTask, MaskingConfig, TokenEncoder
from .progress import ProgressBar
from .run import (
    ends_training,
    open_source,
    process_device,
    require_settings_of,
    say_nothing,
    split_for_run,
    summary,
    train_and_write,
)
from .trainer import Evaluation, Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator

SAMPLER, BEST = "sampler", "best"
"""Folders of a run: the sampler with the EMA's weights, and the one with the lowest loss on held-out images."""


def run_masked(
    folder: Path,
    plan: MaskedPlan,
    optimization: OptimizationConfig,
    data: DataConfig,
    masking: MaskingConfig,
    run: RunConfig,
    *,
    accelerator: Accelerator,
    report: Callable[[str], None] = print,
    progress: ProgressBar | None = None,
) -> Path:
    """Trains a masked sampler, resuming from the folder's newest checkpoint, and writes it into the folder.

    Args:
        progress: see `Trainer`.

    Returns:
        The sampler's folder.

    Raises:
        ValueError: also if another training runs in the folder, or it cannot be written to.
        ValueError, FloatingPointError, OSError, TrainingStopped: see `Trainer.train`, `MaskedPlan` and the sources of
            images.
    """
    with run_lock(folder, accelerator), ends_training(accelerator):
        return _run(folder, plan, optimization, data, masking, run, accelerator, report, progress)


def _run(
    folder: Path,
    plan: MaskedPlan,
    optimization: OptimizationConfig,
    data: DataConfig,
    masking: MaskingConfig,
    run: RunConfig,
    accelerator: Accelerator,
    report: Callable[[str], None],
    progress: ProgressBar | None,
) -> Path:
    say = report if accelerator.is_main_process else say_nothing
    plan.check()
    if accelerator.is_main_process:
        for name in (SAMPLER, BEST):
            remove_leftovers(folder / name / "model.safetensors")
    newest = newest_checkpoint(folder)
    before = None if newest is None else settings_of(newest)
    device = process_device(accelerator)
    tokenizer = plan.tokenizer(device)
    geometry = plan.geometry(tokenizer)
    card = CacheCard.of(tokenizer, None, geometry)
    source = open_source(data, geometry, lambda cache: cache.require_captions(card), accelerator)
    parts = split_for_run(source, run, before, say, shown=accelerator.is_main_process)
    sampler = plan.sampler(tokenizer, geometry)
    sampler.name = folder.resolve().name
    settings = _settings(sampler, card)
    sampler.model.to(device)
    encode = TokenEncoder(tokenizer)
    training = source if parts is None else parts.training
    # A resumed run keeps its scale: on another device it might be rounded to another number.
    scale = _scale_of(before) or ErrorScale.of(training, encode, batch=data.batch)
    settings |= {"precision": accelerator.mixed_precision}
    if parts is not None:
        settings |= {HELD_OUT: parts.fingerprint, HELD_OUT_FRACTION: run.held_out}
    task = MaskedTask(sampler, encode, scale, masking)
    for line in summary(task.network, optimization, data, parts, source, accelerator):
        say(f"{folder.name}: {line}")
    accelerator.init_trackers("dcdd", config={name: str(value) for name, value in asdict(optimization).items()})
    rank, world = accelerator.process_index, accelerator.num_processes
    shard = DataShard(seed=optimization.seed, rank=rank, world=world, window=data.window)
    batches = Batches(training, size=data.batch, shard=shard, workers=data.workers)
    held_out = _held_out(parts, task, optimization, data, accelerator)
    sheet = None
    if run.samples:
        shown = source if parts is None else parts.held_out
        sheet = MaskedSampleSheet(shown, sampler, encode, task.reader, run.samples)

    def evaluate(network: torch.nn.Module) -> Evaluation:
        numbers = {} if held_out is None else held_out(network)
        return Evaluation(numbers=numbers, sheet=sheet and sheet(network), score=numbers.get("loss"))

    trainer = Trainer(
        folder,
        task,
        batches,
        optimization,
        accelerator=accelerator,
        settings=settings,
        run=run,
        evaluate=evaluate if run.sample_every else None,
        report=report,
        progress=progress,
    )
    counter = ReadCounter() if held_out is None else held_out.counter
    train_and_write(trainer, lambda: _write(folder, plan, sampler, tokenizer, report), source, counter)
    return folder / SAMPLER


def run_sampler(
    folder: Path, plan: MaskedPlan, *, accelerator: Accelerator, report: Callable[[str], None] = print
) -> Path:
    """Writes the sampler of a run's newest checkpoint; the run may be unfinished, or still running.

    Returns:
        The sampler's folder, whose name includes the step.

    Raises:
        ValueError: if there is no checkpoint yet, or it was made with another plan or cannot be read.
    """
    newest = newest_checkpoint(folder)
    if newest is None:
        raise ValueError(f"{folder} has no checkpoint yet to make a sampler of (see --save-every)")
    path = folder / f"{SAMPLER}-{newest.name}"
    if accelerator.is_main_process:
        before = settings_of(newest)
        plan.check()
        tokenizer = plan.tokenizer("cpu")
        geometry = plan.geometry(tokenizer)
        sampler = plan.sampler(tokenizer, geometry)
        sampler.name = folder.resolve().name
        card = CacheCard.of(tokenizer, None, geometry)
        require_settings_of(newest, before, _settings(sampler, card) | {"network": asdict(sampler.model.config)})
        _write(folder, plan, sampler, tokenizer, report, path)
    return path


def _settings(sampler: MaskedSampler, card: CacheCard) -> dict[str, Any]:
    """What a checkpoint depends on, besides what `MaskedTask` adds; the network must still be untrained.

    Args:
        card: of the encodings to train on.
    """
    words = sampler.words
    return {
        "codebook": card.codebook,
        "tokenizer": card.tokenizer,
        "side": card.geometry.token_resolution,
        "words": digest(f"{word} {number}" for word, number in sorted(words.tokenizer.get_vocab().items())),
        "template": words.template,
        "start": fingerprint_of(sampler.model.state_dict()),
    }


def _scale_of(before: dict[str, Any] | None) -> ErrorScale | None:
    """The scale of a resumed run; None for a new one."""
    return None if before is None or "error_scale" not in before else ErrorScale(**before["error_scale"])


def _held_out(
    parts: Split | None,
    task: MaskedTask,
    optimization: OptimizationConfig,
    data: DataConfig,
    accelerator: Accelerator,
) -> MaskedHeldOut | None:
    if parts is None:
        return None
    return MaskedHeldOut(
        parts.held_out,
        task,
        seed=optimization.seed,
        batch=data.batch,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        total=lambda sums: accelerator.reduce(sums.to(accelerator.device), "sum"),
    )


def _write(
    folder: Path,
    plan: MaskedPlan,
    sampler: MaskedSampler,
    tokenizer: ImageTokenizer,
    report: Callable[[str], None],
    path: Path | None = None,
) -> None:
    """Writes the samplers of a run, the best one first, so that a run whose last sampler is written has both.

    Args:
        path: where the newest checkpoint's sampler goes; None for `SAMPLER`.
    """
    newest = newest_checkpoint(folder)
    settings, log = settings_of(newest), read_log(folder)
    best = load_best(folder)
    made = [] if best is None else [(folder / BEST, best.step, best.weights)]
    step = int(newest.name.removeprefix("step-"))
    made.append((path or folder / SAMPLER, step, load_ema(newest)))
    model = sampler.model.to("cpu").requires_grad_(False)
    for where, done, weights in made:
        load_strictly(model, dict(weights), "the EMA of the training")
        plan.save(where, sampler, tokenizer, sampling=sampler.sampling)
        write_text(where / "README.md", card(sampler, plan, settings, done, log))
        best_said = ", the lowest held-out loss" if where.name == BEST else ""
        report(f"wrote {where}, of step {done}{best_said}")


def card(
    sampler: MaskedSampler, plan: MaskedPlan, settings: dict[str, Any], step: int, log: list[dict[str, float]]
) -> str:
    """A sampler's model card, in Markdown."""
    lines = [line for line in log if line["step"] <= step]
    held_out = next((line for line in reversed(lines) if "eval/loss" in line), {})
    seconds = max((line.get("seconds", 0.0) for line in lines), default=0.0)
    images = settings["batch"] * settings["processes"] * settings["recipe"]["accumulation"]
    masking, parameters = settings["masking"], sum(weight.numel() for weight in sampler.model.parameters())
    start = "random weights" if plan.start is None else plan.start.resolve().name
    side, (rows, columns) = settings["side"], sampler.grid
    facts = {
        "images": f"{side} x {side} pixels, {rows} x {columns} tokens of {sampler.codebook.size} codes",
        "image tokenizer": f"of {Path(plan.vlm).resolve().name}, codebook {sampler.codebook.fingerprint}",
        "started from": start,
        "updates": f"{step:,} of {images} images, {seconds / 3600:.2f} hours",
        "learning rate": f"{settings['recipe']['learning_rate']:g}, {settings['recipe']['optimizer']}",
        "wrong tokens": ", ".join(masking["corruptions"]) or "none: it has not learned to revise",
        "hidden positions": masking["schedule"],
        "dropped captions": f"{masking['dropped']:g}",
    }
    facts |= {
        f"held-out {name.removeprefix('eval/')}": f"{value:.4f}" for name, value in held_out.items() if "eval/" in name
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""# {sampler.name}

A bidirectional transformer of {parameters:,} parameters that reveals an image's tokens in a few passes and
revises them. ComfyUI-DCDD trained it on captioned images (`train.py progressive`), and loads it:
`dcdd generate --vlm FOLDER "a prompt"`.

| | |
|---|---|
{table}

Losses are in nats a token.
"""
