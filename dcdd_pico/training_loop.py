"""The training loop of pico's small networks (readers, tokenizer, autoencoder, Janus): log, checkpoints, exact resume.

An update is a function of its number alone: it draws its batch and its noise from generators keyed by that number. A
run that was killed and resumed therefore computes exactly what an uninterrupted one does.

The decoder is trained by `dcdd_core.training.trainer`. These trainings do not fit there: their update is not one loss
of one module (a codebook updated from statistics, a discriminator with its own optimiser, parts that are frozen
midway), and they run in one process.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from dcdd_core.evaluation.tables import markdown_table
from dcdd_core.settings import require_same_settings
from dcdd_core.training.log import RunningMeans, append_to_log, truncate_log
from dcdd_core.training.write_errors import checkpoint_error, describe


class Stateful(Protocol):
    """Anything a checkpoint can hold: modules, optimisers, EMAs."""

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
    """Runs `step(0) .. step(steps - 1)`, resuming from the folder's checkpoint if there is one.

    Args:
        folder: receives `log.jsonl` (one object per line: step, seconds, means since the last line; the names of
            evaluations start with `eval/`) and `checkpoint.pt` (read with `weights_only=True`).
        settings: everything besides the step's number that the result depends on, as plain JSON values; a checkpoint
            with other settings is refused.
        step: does one whole update and returns the numbers to log. It must depend only on its number and `state`.
        state: everything that an update changes.
        evaluate: called after every `evaluate_every` steps and after the last.

    Raises:
        ValueError: if the checkpoint has other settings, or is damaged.
        FloatingPointError: if a logged number is no longer finite; the last checkpoint stays as it is.
        OSError: if a checkpoint or the log cannot be written, for example because the disk is full; the last checkpoint
            stays as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    settings = {"steps": steps, **settings}
    means = RunningMeans()
    done, spent = _resume(checkpoint, state, settings, means)
    truncate_log(folder, done)
    if done >= steps:
        return
    if done:
        report(f"{folder.name}: resuming from step {done} of {steps}")
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
                    f"intact ({checkpoint}): move {folder} away, and train this network again with a lower learning "
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


def _save(
    path: Path,
    step: int,
    seconds: float,
    state: Mapping[str, Stateful],
    settings: Mapping[str, Any],
    means: RunningMeans,
) -> None:
    parts = {name: part.state_dict() for name, part in state.items()}
    temporary = path.with_suffix(".tmp")
    saved = {"step": step, "seconds": seconds, "settings": json.dumps(settings, sort_keys=True), "parts": parts}
    if pending := means.state_dict():
        saved["means"] = pending
    try:
        torch.save(saved, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError on a full disk.
        temporary.unlink(missing_ok=True)
        raise checkpoint_error(step, error, path.parent, path if path.exists() else None) from error


def _resume(
    checkpoint: Path, state: Mapping[str, Stateful], settings: Mapping[str, Any], means: RunningMeans
) -> tuple[int, float]:
    if not checkpoint.exists():
        return 0, 0.0
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly every kind of error for damaged files.
        raise ValueError(
            f"{checkpoint} is damaged ({describe(error)}): move it away to train this network from the start"
        ) from error
    before = json.loads(saved["settings"]) | {"parts": sorted(saved["parts"])}
    remedy = f"move {checkpoint.parent} away to start afresh, or use those settings to resume"
    require_same_settings(f"{checkpoint} was", before, {**settings, "parts": sorted(state)}, remedy=remedy)
    for name, part in state.items():
        part.load_state_dict(saved["parts"][name])
    means.load_state_dict(saved.get("means", {}))
    return saved["step"], saved["seconds"]


def last_held_out(log: Sequence[Mapping[str, Any]]) -> tuple[float, str]:
    """A training's seconds up to its last evaluation, and that evaluation's numbers as a Markdown table."""
    evaluated = (line for line in reversed(log) if any(name.startswith("eval/") for name in line))
    last = next(evaluated, {})
    names = [name for name in last if name.startswith("eval/")]
    rows = [[name.removeprefix("eval/"), f"{last[name]:.4f}"] for name in names]
    return last.get("seconds", 0.0), markdown_table([["held-out", ""], *rows])
