"""Checkpoints of a run: whole or not there, and exact.

A checkpoint is a folder, RUN/checkpoints/step-00001000:
    what `accelerator.save_state` writes     the trained weights, optimisers, random generators, by process where needed
    parts                                    instead, where weights lie in parts (FSDP): see `save_parts`
    average.safetensors                      the weights' moving average, float32, by name
    position-0.json, ...                     where each process stands in the data
    means-0.json, ...                        what each process has added up for the next line of the log, if anything
    training.json                            the step, the seconds, and the settings that all of it depends on

Objects that are registered with accelerate are kept as pickles, which it loads without `weights_only`, and of one
process alone; the average and the positions therefore have files of their own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from .disk import reason, unwritten
from .settings import require_same_settings
from .sharding import load_parts, save_parts

if TYPE_CHECKING:
    from accelerate import Accelerator

_FORMAT = "dcdd training 1"
_FOLDER = "checkpoints"
_NEWEST = 2
_PARTS = "parts"
_REMEDY = "delete it to go on from the one before it, or move the folder away to start afresh"


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a checkpoint holds besides accelerate's own.

    Attributes:
        step, seconds: done and spent.
        average: the moving average by name, on the CPU.
        position: this process's, of `Batches`.
        means: this process's, of `Means`.
    """

    step: int
    seconds: float
    average: Mapping[str, torch.Tensor]
    position: Mapping[str, Any]
    means: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run; the newest two are kept.

    Args:
        folder: of the run.
        accelerator: prepared with the model and the optimisers.
        model, optimizers: as prepared; only trained weights are kept.
        settings: everything that a result depends on, as plain JSON values: a checkpoint made under others is refused.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        *,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        settings: Mapping[str, Any],
    ):
        self.run = folder
        self.folder = folder / _FOLDER
        self.accelerator = accelerator
        self.model = model
        self.optimizers = optimizers
        self.settings = settings
        accelerator.register_save_state_pre_hook(_leave_frozen_out(model))

    def save(self, kept: Kept) -> None:
        """Writes a checkpoint beside the others, then renames it: killed at any moment, the one before it stays.

        All processes call this.

        Raises:
            OSError: if it cannot be written, such as on a full disk; the one before it stays.
        """
        whole = self.folder / f"step-{kept.step:08}"
        temporary = whole.with_suffix(".tmp")
        before = newest_checkpoint(self.run)
        first = self.accelerator.is_main_process
        try:
            if first:
                self._clean()
                temporary.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self._write(temporary, kept)
            self.accelerator.wait_for_everyone()
            if first:
                _flush(temporary)
                os.replace(temporary, whole)
                _sync(self.folder)
                for old in sorted(path for path in self.folder.glob("step-*") if not path.suffix)[:-_NEWEST]:
                    os.replace(old, old.with_suffix(".tmp"))  # or, half deleted, it would look whole
                self._clean()
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise unwritten(kept.step, error, self.run, before) from error

    def load(self) -> Kept | None:
        """Puts the newest checkpoint back into what is prepared; None if there is none.

        Raises:
            ValueError: if it was made under other settings, or cannot be read.
        """
        path = newest_checkpoint(self.run)
        if path is None:
            return None
        held = _read_held(path)
        require_same_settings(path, held["settings"], self.settings)
        average = load_average(path)
        try:
            self._read(path)
            position = json.loads(self._own(path, "position").read_text())
            means = self._own(path, "means")
            kept = Kept(
                step=held["step"],
                seconds=held["seconds"],
                average=average,
                position=position,
                means=json.loads(means.read_text()) if means.exists() else {},
            )
        except torch.OutOfMemoryError:
            raise
        except (Exception, CheckpointException) as error:  # torch raises nearly every kind of error for damaged files.
            raise ValueError(f"{path} is damaged ({reason(error)}): {_REMEDY}") from error
        return kept

    def _own(self, folder: Path, what: str) -> Path:
        return folder / f"{what}-{self.accelerator.process_index}.json"

    def _read(self, folder: Path) -> None:
        if self.accelerator.distributed_type == "FSDP":
            load_parts(folder / _PARTS, self.model, self.optimizers)
        elif self.accelerator.distributed_type == "DEEPSPEED":
            self.accelerator.load_state(str(folder), load_module_strict=False)
        else:
            self.accelerator.load_state(str(folder), strict=False)

    def _write(self, folder: Path, kept: Kept) -> None:
        if self.accelerator.distributed_type == "FSDP":
            save_parts(folder / _PARTS, self.model, self.optimizers)
        elif self.accelerator.distributed_type == "DEEPSPEED":
            self.accelerator.save_state(str(folder), exclude_frozen_parameters=True)
        else:
            self.accelerator.save_state(str(folder))
        self._own(folder, "position").write_text(json.dumps(kept.position))
        if kept.means:
            self._own(folder, "means").write_text(json.dumps(kept.means))
        if self.accelerator.is_main_process:
            save_file(dict(kept.average), folder / "average.safetensors")
            held = {"format": _FORMAT, "step": kept.step, "seconds": kept.seconds, "settings": self.settings}
            (folder / "training.json").write_text(json.dumps(held))

    def _clean(self) -> None:
        """Deletes what killed runs left."""
        for left in self.folder.glob("step-*.tmp"):
            shutil.rmtree(left)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run's folder, "step-<eight digits>"."""
    return max((path for path in (folder / _FOLDER).glob("step-*") if not path.suffix), default=None)


def load_average(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The moving average of a checkpoint, by name.

    Raises:
        ValueError: if it cannot be read.
    """
    path = checkpoint / "average.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{checkpoint} is damaged ({path.name}, {reason(error)}): {_REMEDY}") from error


def settings_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint was made under (see `Checkpoints`).

    Raises:
        ValueError: if it cannot be read.
    """
    return _read_held(checkpoint)["settings"]


def _read_held(checkpoint: Path) -> dict[str, Any]:
    """What its training.json says."""
    try:
        held = json.loads((checkpoint / "training.json").read_text())
        if held.get("format") != _FORMAT:
            raise ValueError(f"its format is {held.get('format')!r}, expected {_FORMAT!r}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint} is no checkpoint of a training ({error}): {_REMEDY}") from error
    return held


def _leave_frozen_out(model: nn.Module) -> Callable[..., None]:
    """A hook for `register_save_state_pre_hook`, which is given whole weights: only the trained ones are saved."""
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}

    def hook(models: list[nn.Module], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
        for state in weights:
            for name in frozen & set(state):
                del state[name]

    return hook


def _flush(folder: Path) -> None:
    """Waits until the files are on the disk: a machine that loses power after the rename must find them."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
