"""Reading checkpoints strictly: files and folders of shards, configs, and modules that get exactly their tensors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn


def read_config(folder: str | Path, name: str = "config.json") -> dict[str, Any]:
    """A model folder's JSON configuration.

    Raises:
        ValueError: if the folder or the file is missing, or not JSON.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected a model folder with {name} and *.safetensors in it")
    path = folder / name
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"{folder} has no {name} (it holds {found}); give the folder that the model was saved into")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, expected an object; download it again")
    return config


def read_tensors(
    source: str | Path, *, prefix: str = "", dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """The tensors of one file, or of all in a folder, whose names start with `prefix` (then cut off).

    Only these are read from disk: the VQ-VAE of a 14 GB checkpoint costs 0.3 GB.

    Raises:
        ValueError: as `read_wanted` does, and if nothing has the prefix.
    """
    tensors = read_wanted(source, lambda name: name.startswith(prefix), dtype=dtype, device=device)
    if not tensors:
        raise ValueError(f"{source} holds no tensor named {prefix}*; it is another kind of model")
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items()}


def read_wanted(
    source: str | Path,
    wanted: Callable[[str], bool],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """The tensors of one file, or of all in a folder, whose names are `wanted`, under these names.

    A folder's files are its *.safetensors or, if there are none, its pytorch_model*.bin, read one after the other. No
    code in a .bin is run.

    Args:
        dtype: of floating-point tensors; None for the file's.

    Raises:
        ValueError: if there is no file, an index names one that is absent and holds what is wanted, or a file is cut
            short, damaged, or holds more than tensors.
    """
    source = Path(source)
    tensors: dict[str, torch.Tensor] = {}
    for file in [source] if source.is_file() else _shards(source, wanted):
        read = _read_bin if file.suffix == ".bin" else _read_safetensors
        for name, tensor in read(file, wanted, device):
            cast = dtype is not None and tensor.is_floating_point()
            tensors[name] = tensor.to(dtype) if cast else tensor
    return tensors


def _shards(folder: Path, wanted: Callable[[str], bool]) -> list[Path]:
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        for index in sorted(folder.glob(f"{pattern}.index.json")):
            shards = read_config(folder, index.name).get("weight_map")
            if not isinstance(shards, dict):
                raise ValueError(f"{index} has no weight_map, which says where the weights are: download it again")
            needed = {str(shard) for name, shard in shards.items() if wanted(name)}
            if absent := sorted(shard for shard in needed if not (folder / shard).is_file()):
                raise ValueError(f"{folder} lacks {_some(absent)}, which {index.name} names: download the rest of it")
        if files := sorted(folder.glob(pattern)):
            return files
    raise ValueError(f"{folder} holds no .safetensors file and no pytorch_model*.bin; give a model folder that does")


def _read_safetensors(
    file: Path, wanted: Callable[[str], bool], device: torch.device | str
) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            for name in opened.keys():
                if wanted(name):
                    yield name, opened.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read ({error}): it is cut short or damaged, download it again") from error


def _read_bin(
    file: Path, wanted: Callable[[str], bool], device: torch.device | str
) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        # Memory-mapped, so that only what is wanted is read.
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{file} cannot be read as weights that torch.save wrote ({error}): it is cut short, damaged or older than "
            "torch 1.6, download it again or take safetensors"
        ) from error
    except Exception as error:
        # An UnpicklingError, mostly. Not chained: torch's message explains how to run the code.
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{file} holds {named[1] if named else 'something'} besides tensors, which could run code on loading; none "
            "was run: fetch the file from its author again, or take safetensors"
        ) from None
    if not isinstance(held, dict):
        raise ValueError(
            f"{file} holds a {type(held).__name__}, expected tensors by name: take the model's own weights"
        )
    for name, tensor in held.items():
        if wanted(name):
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(
                    f"{file} holds a {type(tensor).__name__} as {name}, expected a tensor: take the model's own weights"
                )
            # Copied: a file that is replaced later must not change the model through its mapping.
            yield name, tensor.to(device, copy=True)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor is stored: rows of a tensor in a safetensors file.

    Attributes:
        source: its name in the file.
        rows: the first of its rows and the one after the last.
        shape: of the tensor that they become.
        roll: rows to roll them by when they are read.
    """

    file: Path
    source: str
    rows: tuple[int, int]
    shape: tuple[int, ...]
    roll: int = 0


class StoredTensors:
    """Tensors by name that stay on disk until they are read; only what is asked for is read."""

    def __init__(self, places: Mapping[str, Place], stamps: Mapping[Path, tuple[int, int] | None] | None = None):
        """
        Args:
            stamps: size and modification time of the files when they were opened; None for those of now.
        """
        self._places = dict(places)
        self._stamps = stamps or {place.file: _stamp(place.file) for place in self._places.values()}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __or__(self, other: StoredTensors) -> StoredTensors:
        """The union; names in both come from `other`."""
        return StoredTensors(self._places | other._places, other._stamps | self._stamps)

    def within(self, prefix: str) -> StoredTensors:
        """Those whose names start with `prefix`, which is cut off."""
        inside = {n.removeprefix(prefix): place for n, place in self._places.items() if n.startswith(prefix)}
        return StoredTensors(inside, self._stamps)

    def below(self, prefix: str) -> StoredTensors:
        """The same tensors, with `prefix` before every name."""
        return StoredTensors({prefix + name: place for name, place in self._places.items()}, self._stamps)

    def read(
        self,
        names: Iterable[str] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, torch.Tensor]:
        """The tensors called `names`, all by default.

        Peak memory: what is returned plus one tensor. If neither dtype nor device changes, the tensors stay mapped from
        their file and take no memory of their own.

        Args:
            dtype: to convert to; None keeps the stored dtypes, except that float8, which has no arithmetic, becomes
                bfloat16.

        Raises:
            ValueError: if a file was changed or removed.
        """
        tensors = {}
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            for name in self._places if names is None else names:
                place = self._places[name]
                if place.file not in opened:
                    if _stamp(place.file) != self._stamps[place.file]:
                        raise ValueError(f"{place.file} was changed or removed after it was opened: load it again")
                    opened[place.file] = stack.enter_context(safe_open(place.file, framework="pt"))
                part = opened[place.file].get_slice(place.source)[slice(*place.rows)].reshape(place.shape)
                part = part.roll(place.roll, 0) if place.roll else part
                stored = torch.bfloat16 if part.dtype.itemsize == 1 else part.dtype
                # In two steps: some devices have no float8.
                tensors[name] = part.to(dtype or stored).to(device)
        return tensors


def _stamp(file: Path) -> tuple[int, int] | None:
    if not file.is_file():
        return None
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def find_tensors(file: str | Path, expected: Mapping[str, torch.Size], what: str) -> StoredTensors:
    """The tensors of a safetensors file, none of them read.

    Args:
        expected: the names that it may hold, with their shapes.
        what: names the model in errors.

    Raises:
        ValueError: naming unexpected tensors, and shapes that do not fit.
    """
    file = Path(file)
    with safe_open(file, framework="pt") as opened:
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    wrong = [
        f"{name} is {list(shape)}, expected {list(expected[name])}"
        for name, shape in shapes.items()
        if name in expected and shape != tuple(expected[name])
    ]
    if misfit := misfits(unexpected=sorted(set(shapes) - set(expected)), wrong=wrong):
        raise ValueError(f"{file} does not fit {what}; {misfit}")
    return StoredTensors(
        {name: Place(file=file, source=name, rows=(0, shape[0]), shape=shape) for name, shape in shapes.items()}
    )


def load_strictly(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], what: str, *, unused: Iterable[str] = ()
) -> None:
    """Assigns `tensors` to all of the module's parameters and persistent buffers (which may be on "meta").

    Args:
        what: names the file in errors.
        unused: parameters that may be missing.

    Raises:
        ValueError: naming missing and unexpected tensors, and shapes that do not fit.
    """
    expected = module.state_dict()
    missing = sorted(set(expected) - set(tensors) - set(unused))
    unexpected = sorted(set(tensors) - set(expected))
    wrong = [
        f"{name} is {list(tensors[name].shape)}, expected {list(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if misfit := misfits(missing=missing, unexpected=unexpected, wrong=wrong):
        raise ValueError(f"{what} does not fit {type(module).__name__}; {misfit}")
    module.load_state_dict(dict(tensors), strict=not unused, assign=True)


def fingerprint_of(tensors: Mapping[str, torch.Tensor], most: int = 1024) -> str:
    """16 hexadecimal digits of the names, shapes and up to `most` values, evenly spread, of each tensor.

    Training changes all values, so a sample tells two models apart without moving 14 GB off a GPU. Tensors on "meta" do
    not count.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if not tensor.is_meta:
            flat = tensor.detach().flatten()
            values = flat[:: max(1, flat.numel() // most)][:most].to("cpu", torch.float32)
            digest.update(f"{name} {list(tensor.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def misfits(*, missing: Sequence[str] = (), unexpected: Sequence[str] = (), wrong: Sequence[str] = ()) -> str:
    """Describes tensors that do not fit, the first few of each kind by name; empty if there are none."""
    kinds = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
    return "; ".join(f"{kind}: {_some(names)}" for kind, names in kinds if names)


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
