"""Checkpoints of a run, from which it resumes exactly. A checkpoint is complete or absent.

A checkpoint is a folder, RUN/checkpoints/step-00001000:
    the files of `accelerator.save_state`    the trained weights, optimisers and random generators
    parts                                    in their place for sharded weights (FSDP): see `save_sharded`
    average.safetensors                      the EMA of the weights, float32, by name
    position-0.json, ...                     each process's position in the data
    means-0.json, ...                        each process's running means since the last line of the log, if any
    training.json                            the step, the seconds, and the settings that the result depends on

accelerate pickles objects that are registered with it, reads them without `weights_only`, and keeps those of the main
process alone. The EMA and the positions therefore have files of their own.
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

from ..settings import require_same_settings
from .sharding import load_sharded, save_sharded
from .write_errors import checkpoint_error, describe

if TYPE_CHECKING:
    from accelerate import Accelerator

_FORMAT = "dcdd training 1"
_FOLDER = "checkpoints"
_KEPT = 2
_SHARDS = "parts"
_REMEDY = "delete it to resume from the one before it, or move the folder away to start afresh"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a checkpoint holds besides accelerate's own files.

    Attributes:
        step, seconds: done and spent.
        ema: the EMA of the weights by name, on the CPU.
        position: this process's, of `Batches`.
        means: this process's, of `RunningMeans`.
    """

    step: int
    seconds: float
    ema: Mapping[str, torch.Tensor]
    position: Mapping[str, Any]
    means: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run; the newest two are kept.

    Args:
        folder: of the run.
        accelerator: has prepared the model and the optimisers.
        model, optimizers: as prepared; only trained weights are saved.
        settings: everything that the result depends on, as plain JSON values; a checkpoint made under others is
            refused.
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
        accelerator.register_save_state_pre_hook(_drop_frozen(model))

    def save(self, state: TrainingState) -> None:
        """Writes a checkpoint under a temporary name, then renames it: if the process is killed, the previous one is
        intact. All processes call this together.

        Raises:
            OSError: if it cannot be written, such as on a full disk; the previous one is intact.
        """
        final = self.folder / f"step-{state.step:08}"
        temporary = final.with_suffix(".tmp")
        previous = newest_checkpoint(self.run)
        main = self.accelerator.is_main_process
        try:
            if main:
                self._remove_leftovers()
                temporary.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self._write(temporary, state)
            self.accelerator.wait_for_everyone()
            if main:
                _fsync_all(temporary)
                os.replace(temporary, final)
                _fsync(self.folder)
                for old in sorted(path for path in self.folder.glob("step-*") if not path.suffix)[:-_KEPT]:
                    os.replace(old, old.with_suffix(".tmp"))  # Half deleted under its own name, it would look complete.
                self._remove_leftovers()
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise checkpoint_error(state.step, error, self.run, previous) from error

    def load(self) -> TrainingState | None:
        """Loads the newest checkpoint into the model and the optimisers; None if there is none.

        Raises:
            ValueError: if it was made under other settings, or cannot be read.
        """
        path = newest_checkpoint(self.run)
        if path is None:
            return None
        header = _read_header(path)
        remedy = f"move {path.parent} away to start afresh, or use those settings to resume"
        require_same_settings(f"{path} was", header["settings"], self.settings, remedy=remedy)
        ema = load_ema(path)
        try:
            self._read(path)
            position = json.loads(self._of_process(path, "position").read_text())
            means = self._of_process(path, "means")
            state = TrainingState(
                step=header["step"],
                seconds=header["seconds"],
                ema=ema,
                position=position,
                means=json.loads(means.read_text()) if means.exists() else {},
            )
        except torch.OutOfMemoryError:
            raise
        except (Exception, CheckpointException) as error:  # torch raises nearly every kind of error for damaged files.
            raise ValueError(f"{path} is damaged ({describe(error)}): {_REMEDY}") from error
        return state

    def _of_process(self, folder: Path, what: str) -> Path:
        return folder / f"{what}-{self.accelerator.process_index}.json"

    def _read(self, folder: Path) -> None:
        if self.accelerator.distributed_type == "FSDP":
            load_sharded(folder / _SHARDS, self.model, self.optimizers)
        elif self.accelerator.distributed_type == "DEEPSPEED":
            self.accelerator.load_state(str(folder), load_module_strict=False)
        else:
            self.accelerator.load_state(str(folder), strict=False)

    def _write(self, folder: Path, state: TrainingState) -> None:
        if self.accelerator.distributed_type == "FSDP":
            save_sharded(folder / _SHARDS, self.model, self.optimizers)
        elif self.accelerator.distributed_type == "DEEPSPEED":
            self.accelerator.save_state(str(folder), exclude_frozen_parameters=True)
        else:
            self.accelerator.save_state(str(folder))
        self._of_process(folder, "position").write_text(json.dumps(state.position))
        if state.means:
            self._of_process(folder, "means").write_text(json.dumps(state.means))
        if self.accelerator.is_main_process:
            save_file(dict(state.ema), folder / "average.safetensors")
            header = {"format": _FORMAT, "step": state.step, "seconds": state.seconds, "settings": self.settings}
            (folder / "training.json").write_text(json.dumps(header))

    def _remove_leftovers(self) -> None:
        """Deletes what killed runs did not finish."""
        for leftover in self.folder.glob("step-*.tmp"):
            shutil.rmtree(leftover)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run's folder, "step-<eight digits>"; None if there is none."""
    return max((path for path in (folder / _FOLDER).glob("step-*") if not path.suffix), default=None)


def load_ema(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The EMA of the weights in a checkpoint, by name.

    Raises:
        ValueError: if it cannot be read.
    """
    path = checkpoint / "average.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{checkpoint} is damaged ({path.name}, {describe(error)}): {_REMEDY}") from error


def settings_of(checkpoint: Path) -> dict[str, Any]:
    """The settings that a checkpoint was made under (see `Checkpoints`).

    Raises:
        ValueError: if it cannot be read.
    """
    return _read_header(checkpoint)["settings"]


def _read_header(checkpoint: Path) -> dict[str, Any]:
    """The content of its training.json."""
    try:
        header = json.loads((checkpoint / "training.json").read_text())
        if header.get("format") != _FORMAT:
            raise ValueError(f"its format is {header.get('format')!r}, expected {_FORMAT!r}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint} is not a training checkpoint ({error}): {_REMEDY}") from error
    return header


def _drop_frozen(model: nn.Module) -> Callable[..., None]:
    """A hook for `register_save_state_pre_hook`, which gets full state dicts: only trained weights are saved."""
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}

    def hook(models: list[nn.Module], state_dicts: list[dict[str, torch.Tensor]], folder: str) -> None:
        for state_dict in state_dicts:
            for name in frozen & set(state_dict):
                del state_dict[name]

    return hook


def _fsync_all(folder: Path) -> None:
    """Waits until all files are on the disk, before the rename: after a power failure they must be there."""
    for path in (*folder.rglob("*"), folder):
        _fsync(path)


def _fsync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
