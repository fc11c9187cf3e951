"""The loop of pico's small trainings (readers, tokenizer, autoencoder, Janus): log, atomic checkpoints, exact resume.

A step is a function of its number alone: it draws its batch and its noise from generators seeded by that number, so a
run that was killed and resumed sees just what an uninterrupted run would have seen.

The decoder is trained by `decoder.train_decoder`, on accelerate. These trainings do not fit there: a step of theirs is
no one loss of one module (codes that move by statistics of their own, an opponent with an optimiser of its own, parts
that freeze on the way), and they run in one process.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from .disk import reason, unwritten
from .log import Means, append_to_log, cut_log
from .settings import require_same_settings


class Stateful(Protocol):
    """What a checkpoint keeps: modules, optimisers, averages."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> Any: ...


def train(
    folder: Path,
    *,
    settings: Mapping[str, Any],
    steps: int,
    step: Callable[[int], Mapping[str, torch.Tensor | float]],
    state: Mapping[str, Stateful],
    evaluate: Callable[[int], Mapping[str, float]] | None = None,
    evaluate_every: int = 500,
    log_every: int = 50,
    save_every: int = 500,
    report: Callable[[str], None] = print,
) -> None:
    """Runs `step(0) .. step(steps - 1)`, going on from the folder's checkpoint if there is one.

    Args:
        settings: everything besides the step's number that a result depends on, as plain JSON values: a checkpoint made
            under others is not gone on from.
        folder: receives `log.jsonl` (one object a line: step, seconds, means since the last line; evaluations carry
            the prefix `eval/`) and `checkpoint.pt` (read back with `weights_only=True`).
        step: does one whole update and returns the numbers to log. It must depend on its number and `state` only.
        state: everything that an update changes.
        evaluate: called after every `evaluate_every` steps and at the end.

    Raises:
        ValueError: if the checkpoint was made under other settings, or is damaged.
        FloatingPointError: if a logged number stops being finite; the last checkpoint is left as it was.
        OSError: if a checkpoint or the log cannot be written, such as on a full disk; the checkpoint before is left as
            it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    settings = {"steps": steps, **settings}
    means = Means()
    done, spent = _resume(checkpoint, state, settings, means)
    cut_log(folder, done)
    if done >= steps:
        return
    if done:
        report(f"{folder.name}: going on from step {done} of {steps}")
    started = time.monotonic() - spent
    while done < steps:
        means.add(step(done))
        done += 1
        line: dict[str, float] = {}
        if done % log_every == 0 or done == steps:
            line = means.take()
            bad = [name for name, value in line.items() if not math.isfinite(value)]
            if bad:
                raise FloatingPointError(
                    f"{folder.name}: {', '.join(bad)} stopped being finite before step {done}. The last checkpoint is "
                    f"untouched ({checkpoint}): move {folder} away, and train this part again with a lower learning "
                    "rate"
                )
        if evaluate is not None and (done % evaluate_every == 0 or done == steps):
            line |= {f"eval/{name}": float(value) for name, value in evaluate(done).items()}
        if line:
            line = {"step": done, "seconds": round(time.monotonic() - started, 1)} | line
            append_to_log(folder, line)
            report(f"{folder.name} " + " ".join(f"{k}={v:.4g}" for k, v in line.items()))
        if done % save_every == 0 or done == steps:
            _save(checkpoint, done, time.monotonic() - started, state, settings, means)


def moving_average(module: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a module's weights, `.module` being the averaged copy.

    The n-th update decays by min(decay, (1 + n) / (10 + n)): with the full decay from the start, a run not much longer
    than 1 / (1 - decay) steps would keep a large share of its first, untrained weights.
    """

    @torch.no_grad()
    def update(averaged: list[torch.Tensor], current: list[torch.Tensor], count: torch.Tensor) -> None:
        n = int(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(module, multi_avg_fn=update)


def warmup_cosine(step: int, steps: int, *, peak: float, warmup: int, floor: float = 0.02) -> float:
    """Learning rate: linear over `warmup` steps up to `peak`, then a half cosine down to `floor * peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Of all groups; where it is a tensor, as torchao's optimisers want it, that stays the same one."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _save(
    path: Path, step: int, seconds: float, state: Mapping[str, Stateful], settings: Mapping[str, Any], means: Means
) -> None:
    parts = {name: part.state_dict() for name, part in state.items()}
    temporary = path.with_suffix(".tmp")
    saved = {"step": step, "seconds": seconds, "settings": json.dumps(settings, sort_keys=True), "parts": parts}
    if pending := means.state_dict():
        saved["means"] = pending
    try:
        torch.save(saved, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
        temporary.unlink(missing_ok=True)
        raise unwritten(step, error, path.parent, path if path.exists() else None) from error


def _resume(
    checkpoint: Path, state: Mapping[str, Stateful], settings: Mapping[str, Any], means: Means
) -> tuple[int, float]:
    if not checkpoint.exists():
        return 0, 0.0
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly every kind of error for damaged files.
        raise ValueError(
            f"{checkpoint} is damaged ({reason(error)}): move it away to train this part from its beginning"
        ) from error
    before = json.loads(saved["settings"]) | {"parts": sorted(saved["parts"])}
    require_same_settings(checkpoint, before, {**settings, "parts": sorted(state)})
    for name, part in state.items():
        part.load_state_dict(saved["parts"][name])
    means.load_state_dict(saved.get("means", {}))
    return saved["step"], saved["seconds"]
