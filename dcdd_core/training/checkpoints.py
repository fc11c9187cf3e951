"""Checkpoints of a run, from which it resumes exactly. A checkpoint is complete or absent.

A checkpoint is a folder, RUN/checkpoints/step-00001000:
    the files of `accelerator.save_state`    the trained weights, optimisers and random generators
    parts                                    instead of these, for sharded weights (FSDP): see `save_sharded`
    average.safetensors                      the EMA of the weights, float32, by name
    position-0.json, ...                     each process's position in the data
    means-0.json, ...                        each process's running means since the last line of the log, if any
    training.json                            the step, the seconds, the settings that the result depends on, and the
                                             checksums of all other files and of itself

Beside them is RUN/checkpoints/best.safetensors, the EMA that had the lowest loss on held-out images.

accelerate pickles objects that are registered with it, reads them without `weights_only`, and keeps only those of the
main process. The EMA and the positions therefore have files of their own.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from ..files import (
    read_json,
    regular_file,
    remove_leftovers,
    require_checksums,
    stored_checksums,
    utf8_path,
    write_tensors,
    write_text,
)
from ..settings import require_same_settings
from .sharding import load_sharded, save_sharded
from .write_errors import checkpoint_error, describe

if TYPE_CHECKING:
    from accelerate import Accelerator

#: Names of two settings of a distillation, which runs did not record at first.
TEACHER_GUIDANCE, TEACHER_SHIFT = "teacher's guidance", "teacher's shift"
#: Names of two settings: the fingerprint of the held-out images, and the fraction (`RunConfig.held_out`).
HELD_OUT, HELD_OUT_FRACTION = "held_out", "held_out_fraction"

_FORMAT = "dcdd training 1"
_FOLDER = "checkpoints"
_BEST = "best.safetensors"
_SHARDS = "parts"
_HEADER = "training.json"
_REMEDY = "delete it to resume from the one before it, or move the folder away to start afresh"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a checkpoint holds besides accelerate's own files.

    Attributes:
        step, seconds: updates done, and time spent.
        ema: the EMA of the weights by name, on the CPU.
        position: this process's, of `Batches`.
        means: this process's, of `RunningMeans`.
    """

    step: int
    seconds: float
    ema: Mapping[str, torch.Tensor]
    position: Mapping[str, Any]
    means: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What a checkpoint holds for a run that resumes.

    Attributes:
        step, seconds, ema: as in `TrainingState`.
        positions: of all processes that saved it, by rank.
        means: this process's; empty if the number of processes has changed.
        settings: those that it was made under.
    """

    step: int
    seconds: float
    ema: Mapping[str, torch.Tensor]
    positions: Sequence[Mapping[str, Any]]
    means: Mapping[str, Any]
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best weights so far.

    Attributes:
        step: of the run.
        loss: on the held-out images.
        weights: their EMA by name.
    """

    step: int
    loss: float
    weights: Mapping[str, torch.Tensor]


class Checkpoints:
    """The checkpoints of one run; the newest are kept.

    Args:
        folder: of the run.
        accelerator: the one that prepared the model and the optimisers.
        model, optimizers: as prepared; only trained weights are saved.
        settings: everything that the result depends on, as plain JSON values; a checkpoint made under others is
            refused (but see `load`).
        keep: how many of the newest are kept.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        *,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        settings: Mapping[str, Any],
        keep: int = 2,
    ):
        self.keep = keep
        self.run = folder
        self.folder = folder / _FOLDER
        self.accelerator = accelerator
        self.model = model
        self.optimizers = optimizers
        self.settings = settings
        accelerator.register_save_state_pre_hook(_drop_frozen(model))

    def save(self, state: TrainingState) -> None:
        """Writes a checkpoint; all processes must call this together.

        It is written under a temporary name and then renamed, so that the previous one is intact if a process is
        killed.

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
                self._write_header(temporary, state)
                _fsync_all(temporary)
                os.replace(temporary, final)
                _fsync(self.folder)
                for old in sorted(path for path in self.folder.glob("step-*") if not path.suffix)[: -self.keep]:
                    os.replace(old, old.with_suffix(".tmp"))  # Half deleted under its own name, it would look complete.
                self._remove_leftovers()
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise checkpoint_error(state.step, error, self.run, previous) from error

    def load(self) -> Resumed | None:
        """Loads the newest checkpoint into the model and the optimisers; None if there is none.

        The run may be longer than before, and the number of processes different. Batch size and accumulation may
        differ if an update still has as many images as before.

        Raises:
            ValueError: if it was made under other settings, is damaged or cannot be read.
        """
        path = newest_checkpoint(self.run)
        if path is None:
            return None
        header = _read_header(path)
        remedy = f"move {path.parent} away to start afresh, or use those settings to resume"
        before = header["settings"]
        require_same_settings(f"{path} was", _continued(before, self.settings), self.settings, remedy=remedy)
        self._require_sound(path, header)
        ema = load_ema(path)
        world, means = before["processes"], {}
        if world == self.accelerator.num_processes:
            means = _read_means(path / f"means-{self.accelerator.process_index}.json")
        positions = [_read_position(path / f"position-{rank}.json") for rank in range(world)]
        try:
            self._read(path)
        except torch.OutOfMemoryError:
            raise
        except (Exception, CheckpointException) as error:  # torch raises nearly every kind of error for damaged files.
            raise ValueError(f"{path} is damaged ({describe(error)}): {_REMEDY}") from error
        return Resumed(
            step=header["step"],
            seconds=header["seconds"],
            ema=ema,
            positions=positions,
            means=means,
            settings=before,
        )

    def save_best(self, best: Best) -> None:
        """Writes the best weights, completely or not at all; to be called in the main process.

        Raises:
            OSError: if they cannot be written.
        """
        told = {"format": _FORMAT, "step": str(best.step), "loss": repr(best.loss)}
        write_tensors(self.folder / _BEST, best.weights, told, checksums=True)

    def _require_sound(self, path: Path, header: Mapping[str, Any]) -> None:
        """Compares a checkpoint's files with their checksums, each process a share; older checkpoints have none.

        Raises:
            ValueError: in all processes, naming the files that differ.
        """
        expected = header.get("files", {})
        own = sorted(expected)[self.accelerator.process_index :: self.accelerator.num_processes]
        bad = [name for name in own if not (path / name).is_file() or _checksum(path / name) != expected[name]]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            bad = gather_object(bad)
        if bad:
            raise ValueError(f"{path} is damaged ({', '.join(sorted(bad))}: not what was written): {_REMEDY}")

    def _of_process(self, folder: Path, what: str) -> Path:
        return folder / f"{what}-{self.accelerator.process_index}.json"

    def _read(self, folder: Path) -> None:
        if self.accelerator.distributed_type == "FSDP":
            load_sharded(folder / _SHARDS, self.model, self.optimizers)
        else:
            with utf8_path(folder) as readable:
                self.accelerator.load_state(str(readable), strict=False)
            # accelerate counts micro-batches on from the saved run, which may have accumulated another number of them.
            self.accelerator.step = 0

    def _write(self, folder: Path, state: TrainingState) -> None:
        if self.accelerator.distributed_type == "FSDP":
            save_sharded(folder / _SHARDS, self.model, self.optimizers)
        else:
            with utf8_path(folder) as writable:
                self.accelerator.save_state(str(writable))
        self._of_process(folder, "position").write_text(json.dumps(state.position))
        if state.means:
            self._of_process(folder, "means").write_text(json.dumps(state.means))
        if self.accelerator.is_main_process:
            write_tensors(folder / "average.safetensors", state.ema, {})

    def _write_header(self, folder: Path, state: TrainingState) -> None:
        """Writes the header, once all other files are there."""
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        header = {"format": _FORMAT, "step": state.step, "seconds": state.seconds, "settings": self.settings}
        header["files"] = {name: _checksum(path) for name, path in files.items()}
        # As it will be read back, with tuples turned into lists.
        header["checksum"] = _checksum_of(json.loads(json.dumps(header)))
        mode = stat.S_IMODE(write_text(folder / _HEADER, json.dumps(header)).stat().st_mode)
        for path in files.values():
            path.chmod(mode)  # safetensors gives other users no access.

    def _remove_leftovers(self) -> None:
        """Deletes what killed runs left unfinished."""
        for leftover in self.folder.glob("step-*.tmp"):
            shutil.rmtree(leftover)
        remove_leftovers(self.folder / _BEST)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run's folder, "step-<eight digits>"; None if there is none."""
    return max((path for path in (folder / _FOLDER).glob("step-*") if not path.suffix), default=None)


def load_ema(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The EMA of the weights in a checkpoint, by name.

    Raises:
        ValueError: if it cannot be read.
    """
    path = checkpoint / "average.safetensors"
    expected = _read_header(checkpoint).get("files", {}).get(path.name)
    try:
        if expected is not None and _checksum(path) != expected:
            raise ValueError(f"{checkpoint} is damaged ({path.name}: not what was written): {_REMEDY}")
        with utf8_path(path) as readable:
            return load_file(readable)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{checkpoint} is damaged ({path.name}, {describe(error)}): {_REMEDY}") from error


def settings_of(checkpoint: Path) -> dict[str, Any]:
    """The settings that a checkpoint was made under (see `Checkpoints`).

    Raises:
        ValueError: if it cannot be read.
    """
    return _read_header(checkpoint)["settings"]


def _read_header(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint's training.json.

    Raises:
        ValueError: naming the file and what is wrong in it.
    """
    path = checkpoint / _HEADER
    header = read_json(path, "the description of a training checkpoint", _REMEDY)
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"{path} has the format {header.get('format')!r}, expected {_FORMAT!r}, as of this version's training "
            f"checkpoints: {_REMEDY}"
        )
    checksum = header.pop("checksum", None)
    if checksum is not None and checksum != _checksum_of(header):
        raise ValueError(f"{path} is damaged: it is not what was written (its checksum differs): {_REMEDY}")
    _require(path, header, step=_COUNT, seconds=_NUMBER, settings=_OBJECT)
    _require(path, header["settings"], processes=_COUNT)
    if "files" in header:
        _require(path, header, files=_OBJECT)
    return header


def _read_position(path: Path) -> dict[str, Any]:
    position = read_json(path, "a position in the data", _REMEDY)
    _require(path, position, epoch=_COUNT, consumed=_COUNT, read=_COUNT, unreadable=_COUNT, mark=_MARK)
    if "before" in position:
        _require(path, position, before=_CHANGES)
    if "left_out" in position:
        _require(path, position, left_out=_LEFT_OUT)
    return position


def _read_means(path: Path) -> dict[str, Any]:
    """A process's running means since the last line of the log; empty if that had just been written."""
    if not path.exists():
        return {}
    means = read_json(path, "running means", _REMEDY)
    _require(path, means, **dict.fromkeys(means, _MEAN))
    return means


_Kind = tuple[str, Callable[[Any], bool]]


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_mark(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) >= 3 and all(map(_is_count, value)))


def _is_reach(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(_is_count(value.get(name)) for name in ("epoch", "consumed"))
        and _is_mark(value.get("mark"))
    )


def _are_changes(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, list) and one and all(map(_is_reach, one)) for one in value)


def _are_left_out(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    unreadable = value.get("unreadable")
    named = isinstance(unreadable, dict) and all(isinstance(reason, str) for reason in unreadable.values())
    lists = (value.get("small"), value.get("uncaptioned", []), value.get("without_caption", []))
    return named and all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists)


_COUNT: _Kind = ("a whole number >= 0", _is_count)
_NUMBER: _Kind = ("a number", _is_number)
_OBJECT: _Kind = ("an object", lambda value: isinstance(value, dict))
_MARK: _Kind = ("null, or a list of at least three whole numbers", _is_mark)
_CHANGES: _Kind = ("a list of lists of positions", _are_changes)
_LEFT_OUT: _Kind = ("the names of unreadable and of small images", _are_left_out)
_MEAN: _Kind = (
    "a sum and a count",
    lambda value: isinstance(value, list) and len(value) == 2 and _is_number(value[0]) and _is_count(value[1]),
)


def _require(path: Path, values: Mapping[str, Any], **kinds: _Kind) -> None:
    """Refuses fields that are missing or of another kind.

    Raises:
        ValueError: naming the file and the field.
    """
    for name, (expected, fits) in kinds.items():
        if not fits(values.get(name)):
            found = f"holds {str(values[name])[:80]!r}" if name in values else "is missing"
            raise ValueError(f"{path}: the field {name!r} {found}, expected {expected}: {_REMEDY}")


def _continued(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint, with those that may change between runs replaced by the current ones."""
    continued, recipe = dict(before), dict(before.get("recipe", {}))
    continued["processes"] = now["processes"]
    if HELD_OUT_FRACTION in now:  # Only which images they are counts.
        continued[HELD_OUT_FRACTION] = now[HELD_OUT_FRACTION]
    # Of an older run, which does not say, they are not asked.
    continued |= {name: now[name] for name in (TEACHER_GUIDANCE, TEACHER_SHIFT) if name in now and name not in before}
    steps = recipe.get("steps")
    if _is_count(steps) and now["recipe"]["steps"] > steps:
        recipe["steps"] = now["recipe"]["steps"]
    if images_per_update(before) == images_per_update(now):
        continued["batch"], recipe["accumulation"] = now["batch"], now["recipe"]["accumulation"]
    return continued | ({"recipe": recipe} if recipe else {})


def images_per_update(settings: Mapping[str, Any]) -> int | None:
    """The images per update, over all processes; None if the settings do not say."""
    parts = [settings.get("batch"), settings.get("processes"), settings.get("recipe", {}).get("accumulation")]
    return math.prod(parts) if all(map(_is_count, parts)) else None


def load_best(folder: Path) -> Best | None:
    """The best weights of a run's folder; None if it has none.

    Raises:
        ValueError: if they cannot be read.
    """
    path = folder / _FOLDER / _BEST
    if not path.exists():
        return None
    remedy = "delete it; the next evaluation writes another one"
    regular_file(path, "the best weights of a training")
    try:
        with utf8_path(path) as readable, safe_open(readable, framework="pt") as file:
            told = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
        require_checksums(path, weights, stored_checksums(path, told))
        return Best(step=int(told["step"]), loss=float(told["loss"]), weights=weights)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as the best weights of a training ({error}): {remedy}") from error


def _checksum(path: Path) -> str:
    """A file's checksum, in the form of `files.tensor_checksums`; the file is read in blocks."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
    return f"crc32:{found:08x}"


def _checksum_of(values: Mapping[str, Any]) -> str:
    """The checksum of JSON values, whatever their order."""
    return f"crc32:{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def _drop_frozen(model: nn.Module) -> Callable[..., None]:
    """A hook for `register_save_state_pre_hook` that drops frozen weights from the full state dicts to be saved."""
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}

    def hook(models: list[nn.Module], state_dicts: list[dict[str, torch.Tensor]], folder: str) -> None:
        for state_dict in state_dicts:
            for name in frozen & set(state_dict):
                del state_dict[name]

    return hook


def _fsync_all(folder: Path) -> None:
    """Waits until all files are on the disk, since after the rename they must survive a power failure."""
    for path in (*folder.rglob("*"), folder):
        _fsync(path)


def _fsync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk; does nothing on Windows, which refuses this."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
