"""Reads checkpoints strictly: which files count, what is in them, and modules that get exactly their tensors.

Sizes are compared before values are read: a safetensors header, or the records of a .bin, give names and shapes.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from ..files import is_finite, open_tensors, read_json, reading, regular_file, stand_in, utf8_path
from .int8 import plain

# Names of weight files without suffix, by suffix, as transformers and diffusers write them.
_CANONICAL: Mapping[str, tuple[str, ...]] = {
    ".safetensors": ("model", "diffusion_pytorch_model"),
    ".bin": ("pytorch_model", "diffusion_pytorch_model"),
}

_Entry = TypeVar("_Entry")
_Value = TypeVar("_Value")

# Name prefixes that a compiled or distributed model adds.
_WRAPPED = re.compile(r"^(module\.|_orig_mod\.)+")

_WEIGHTS = "a file with a model's weights"
_DAMAGED = "it is cut short or damaged, download it again"

# First bytes of files in formats other than safetensors.
_OTHER_FORMATS = (
    (b"GGUF", "a GGUF file"),
    (b"PK\x03\x04", "a PyTorch checkpoint (.pt, .ckpt, .bin)"),
    (b"\x80", "a pickled PyTorch checkpoint (.pt, .ckpt, .bin)"),
)

_MAPPED_AND_CHECKED = 2**30
"""Bytes of the largest file whose tensors are checked for NaN even if they stay mapped. A check reads them all, which
takes 0.2 s per GB from memory, but minutes from a slow disk, for a transformer that a host streams."""


_SPELLINGS: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}

FLOATS = frozenset(_SPELLINGS.values())
"""The dtypes, as safetensors spells them, of weights that are not quantised."""


def read_config(folder: str | Path, name: str = "config.json") -> dict[str, Any]:
    """Reads a model folder's JSON configuration.

    Raises:
        ValueError: if the folder or the file is missing, or the file is not a JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected a model folder with {name} and *.safetensors in it")
    path = folder / name
    if not path.exists():
        raise ValueError(f"{folder} has no {name} (it holds {_held(folder)}); give the folder of a saved model")
    return read_json(path, "a model's configuration")


def _held(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return _some(names, 8) or "nothing"


def model_name(folder: str | Path) -> str:
    """A folder's name; for a snapshot in the hub's cache (models--OWNER--NAME/snapshots/REVISION), the repository's."""
    path = Path(folder).resolve()
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.rsplit("--", 1)[1]
    return path.name


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The files that hold a model's weights.

    Attributes:
        files: one file, or the shards that an index names.
        placed: the index, from tensor name to file; empty without an index.
        index: the index file, for messages; None without one.
    """

    files: tuple[Path, ...]
    placed: Mapping[str, Path] = field(default_factory=dict)
    index: Path | None = None

    def for_(self, wanted: Callable[[str], bool]) -> list[Path]:
        """The files to open for tensors whose names are `wanted`.

        Raises:
            ValueError: naming those that are absent or not regular files.
        """
        needed = sorted({file for name, file in self.placed.items() if wanted(name)}) if self.index else self.files
        if self.index is not None and (absent := [file.name for file in needed if not file.exists()]):
            raise ValueError(
                f"{self.index.parent} lacks {_some(absent)}, which {self.index.name} names: its download has not "
                "finished, download the rest of it"
            )
        return [regular_file(file, _WEIGHTS) for file in needed]

    def collect(
        self, read: Callable[[Path], Iterable[tuple[str, _Entry]]], wanted: Callable[[str], bool] = lambda name: True
    ) -> dict[str, _Entry]:
        """What `read` finds in the files under `wanted` names; if the index places a name, only that file counts.

        Raises:
            ValueError: as `for_`; for a name that two files hold, and for one that is not where the index places it.
        """
        found: dict[str, _Entry] = {}
        holder: dict[str, Path] = {}
        for file in self.for_(wanted):
            for name, entry in read(file):
                if not wanted(name) or self.placed.get(name, file) != file:
                    continue
                if name in found:
                    raise ValueError(
                        f"{holder[name]} and {file.name} both hold {name}, and {self.index.name} does not say which "
                        "counts: download the model again"
                    )
                found[name], holder[name] = entry, file
        if absent := sorted(name for name in self.placed if wanted(name) and name not in found):
            shards = sorted({self.placed[name].name for name in absent})
            raise ValueError(
                f"{self.index} places {_some(absent)} in {_some(shards)}, which has no such tensor: the files do not "
                "belong together, download all of them again"
            )
        return found


def weight_files(
    source: str | Path, *, remedy: str = "give a model folder that does", endings: Sequence[str] = tuple(_CANONICAL)
) -> WeightFiles:
    """Finds the files of a model's weights, by one rule for all loaders.

    In a folder, these are for each suffix in turn the shards of the canonical index (such as
    model.safetensors.index.json) or the file with the canonical name; failing that, the only index or the only
    safetensors file with another name. Other weights next to these are not read. Anything else is refused, since
    nothing says which file is meant.

    Args:
        source: a file, which is taken as it is, or a folder.
        remedy: what to do if there are none.
        endings: suffixes of the formats that the caller reads.

    Raises:
        ValueError: if nothing is there, if it is unclear which of several files is meant, and for an index that names
            no files, or files outside its folder.
    """
    source = Path(source)
    if not source.is_dir():
        if not source.exists():
            raise ValueError(f"{source} does not exist: {remedy}")
        return WeightFiles(files=(regular_file(source, _WEIGHTS),))
    unread: list[Path] = []
    for ending, stems in _CANONICAL.items():
        indexes = [path for stem in stems if (path := source / f"{stem}{ending}.index.json").exists()]
        files = [path for stem in stems if (path := source / f"{stem}{ending}").exists()]
        if ending not in endings:
            unread += indexes or files
        elif len(indexes or files) > 1:
            raise ValueError(_unclear(source, indexes or files, remedy))
        elif indexes:
            return _sharded(indexes[0])
        elif files:
            return WeightFiles(files=(regular_file(files[0], _WEIGHTS),))
    others = _visible(source, "*.safetensors.index.json") or _visible(source, "*.safetensors")
    if len(others) == 1 and not unread:
        return _sharded(others[0]) if others[0].suffix == ".json" else WeightFiles(files=(others[0],))
    if others:
        raise ValueError(_unclear(source, [*unread, *others], remedy))
    accepted = " or ".join("one .safetensors file" if e == ".safetensors" else f"pytorch_model{e}" for e in endings)
    raise ValueError(f"{source} holds {_held(source)}; expected {accepted}, or shards with one index: {remedy}")


def _visible(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def only_checkpoint(folder: Path, found: Sequence[Path], missing: str) -> Path:
    """The one training checkpoint that was found in a folder.

    Args:
        missing: the end of the error message if there is none: what is missing, and where to get it.

    Raises:
        ValueError: if there is none, or more than one.
    """
    if not found:
        raise ValueError(f"{folder} has {missing}")
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds {', '.join(file.name for file in found)}, and nothing says which is the model: leave one "
            "of them there"
        )
    return found[0]


def unwrapped(held: Mapping[Any, _Value]) -> dict[str, _Value]:
    """Tensors by name, without the prefixes that a compiled or distributed model adds."""
    return {_WRAPPED.sub("", str(name)): value for name, value in held.items()}


def _unclear(folder: Path, files: Sequence[Path], remedy: str) -> str:
    return (
        f"{folder} holds {_some([file.name for file in files])}, and nothing says which is the model: name one of its "
        f"{len(files)} files model.safetensors and move the rest away, or add the index of the shards "
        f"(model.safetensors.index.json); or {remedy}"
    )


def _sharded(index: Path) -> WeightFiles:
    shards = read_json(index, "the index of a model's weights").get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index} has no weight_map, or one that names no shards: download it again")
    for name, shard in shards.items():
        if not isinstance(shard, str) or not shard:
            raise ValueError(f"{index} places {name} in {shard!r}, expected a file's name: download it again")
        # Checks names and not link targets: the hub's cache keeps every file elsewhere.
        for path in (PurePosixPath(shard), PureWindowsPath(shard)):
            if path.is_absolute() or path.drive or path.root or ".." in path.parts:
                raise ValueError(
                    f"{index} places {name} in {shard!r}, outside of its folder, which is not read: download the "
                    "model again, from its author"
                )
    placed = {name: index.parent / shard for name, shard in shards.items()}
    return WeightFiles(files=tuple(sorted(set(placed.values()))), placed=placed, index=index)


class Header(NamedTuple):
    """What a file says about a tensor: the file, its shape, and its dtype as safetensors spells it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Bytes of a value; only for `FLOATS`."""
        return next(dtype.itemsize for dtype, spelling in _SPELLINGS.items() if spelling == self.dtype)


def read_headers(source: str | Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Header]:
    """Reads names, shapes and dtypes of the tensors that `read_wanted` would read, but no values.

    Raises:
        ValueError: as `read_wanted`.
    """
    return weight_files(source).collect(lambda file: _headers(file, wanted), wanted)


def _headers(file: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Header]]:
    if file.suffix == ".bin":
        for name, tensor in _mapped(file, wanted).items():
            yield name, Header(file, tuple(tensor.shape), _SPELLINGS.get(tensor.dtype, str(tensor.dtype)))
        return
    with open_safetensors(file) as opened:
        for name in opened.keys():
            if wanted(name):
                part = opened.get_slice(name)
                yield name, Header(file, tuple(part.get_shape()), part.get_dtype())


def read_tensors(
    source: str | Path, *, prefix: str = "", dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Reads the tensors of a file or a folder whose names start with `prefix`, which is then cut off.

    Only these are read from disk: 0.3 GB for the VQ-VAE in a 14 GB checkpoint.

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
    """Reads the tensors of a model whose names are `wanted`, by name, from the files that `weight_files` chooses.

    The files are read one after the other. No code in a .bin is run.

    Args:
        dtype: dtype for floating-point tensors; None for the file's, except that float8, which has no arithmetic,
            becomes bfloat16.

    Raises:
        ValueError: as `weight_files`; if a file with wanted tensors that the index names is absent, if a file is cut
            short, damaged, or holds more than tensors, and if a tensor holds NaN or infinity.
    """
    found = read_headers(source, wanted)
    tensors: dict[str, torch.Tensor] = {}
    for file in dict.fromkeys(header.file for header in found.values()):
        here = {name for name, header in found.items() if header.file == file}
        read = _read_bin if file.suffix == ".bin" else _read_safetensors
        for name, tensor in read(file, here):
            cast = dtype is not None and tensor.is_floating_point()
            kind = dtype if cast else _arithmetic(tensor.dtype)
            # In two steps, since some devices have no float8 or bfloat16.
            tensors[name] = tensor.to(kind).to(device)
            check_finite(tensors[name], name, file)
    return tensors


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    """A dtype to compute with: bfloat16 for float8, which has no arithmetic; any other is itself."""
    return torch.bfloat16 if dtype.is_floating_point and dtype.itemsize == 1 else dtype


def check_finite(tensor: torch.Tensor, name: str, file: Path) -> None:
    """Raises ValueError for NaN or infinity in a tensor that was read; it takes 0.2 to 0.4 s per GB."""
    if not tensor.is_meta and not is_finite(tensor):
        raise ValueError(
            f"{file} holds values of {name} that are not finite in {str(tensor.dtype).removeprefix('torch.')}: the "
            "file is damaged or its training diverged, download it again (a value beyond float16 needs bfloat16 or "
            "float32)"
        )


@contextmanager
def open_safetensors(file: Path, remedy: str = "take the safetensors file of the model") -> Iterator[Any]:
    """Opens a safetensors file that may turn out to be anything else.

    Args:
        remedy: what to do about a file in another format.

    Raises:
        ValueError: for a damaged file, or saying what is there instead of a safetensors file.
    """
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(open_tensors(file, "a safetensors file", _DAMAGED))
        except ValueError as error:
            # Checked last: a safetensors file with a header of 128 bytes begins like a pickle.
            if (kind := _other_format(file)) is None:
                raise
            raise ValueError(f"{file} is {kind}; only safetensors files are read: {remedy}") from error
        yield opened


def _other_format(file: Path) -> str | None:
    """The format of a file in one of `_OTHER_FORMATS`, as text; None for any other file."""
    if not file.is_file():
        return None
    with reading(file, _WEIGHTS), file.open("rb") as raw:
        start = raw.read(32)
    return next((kind for sign, kind in _OTHER_FORMATS if start.startswith(sign)), None)


def _read_safetensors(file: Path, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    with open_safetensors(file) as opened:
        for name in names:
            with reading(file, "a safetensors file", _DAMAGED):
                tensor = opened.get_tensor(name)
            yield name, tensor


def _read_bin(file: Path, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in _mapped(file, names.__contains__).items():
        # Copied: a file that is replaced later must not change the model through its mapping.
        yield name, tensor.clone()


def open_saved(file: Path) -> dict[Any, Any]:
    """The dict in a file that torch.save wrote.

    Its tensors are memory-mapped, so that only those used are read; no code in it is run. An `argparse.Namespace` is
    allowed, since trainers save their options beside the weights.

    Raises:
        ValueError: for a file that is absent or damaged, or holds code or anything but a dict.
    """
    with reading(regular_file(file, _WEIGHTS), _WEIGHTS), file.open("rb") as raw:
        start = raw.read(512)
    if other := stand_in(start):
        raise ValueError(f"{file} cannot be read as weights that torch.save wrote, it is {other}: {_DAMAGED}")
    try:
        with utf8_path(file) as readable, torch.serialization.safe_globals([argparse.Namespace]):
            held = torch.load(readable, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{file} cannot be read as weights that torch.save wrote ({_first_line(error)}): it is cut short, damaged "
            "or older than torch 1.6, download it again or take safetensors"
        ) from error
    except Exception as error:
        # Mostly an UnpicklingError. Not chained, because torch's message explains how to run the code.
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{file} holds {named[1] if named else 'something'} besides tensors, which could run code on loading; none "
            "was run: fetch the file from its author again, or take safetensors"
        ) from None
    if not isinstance(held, dict):
        raise ValueError(
            f"{file} holds a {type(held).__name__}, expected tensors by name: take the model's own weights"
        )
    return held


def _mapped(file: Path, wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """The tensors of these names in a file that torch.save wrote."""
    held = open_saved(file)
    chosen = {str(name): tensor for name, tensor in held.items() if wanted(str(name))}
    for name, tensor in chosen.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"{file} holds a {type(tensor).__name__} as {name}, expected a tensor: take the model's own weights"
            )
    return chosen


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# Name parts, between dots or colons, that only one quantisation method writes, the most specific first.
_QUANTISED: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state"}), "bitsandbytes, 4 bits"),
    (frozenset({"SCB", "weight_format"}), "bitsandbytes, 8 bits"),
    (frozenset({"g_idx"}), "GPTQ"),
    (frozenset({"qweight", "qzeros"}), "AWQ or GPTQ"),
    (frozenset({"W_q"}), "HQQ"),
    (frozenset({"qdata", "_weight_qdata", "_weight_scale", "tensor_impl"}), "torchao"),
    (frozenset({"_data", "_scale"}), "quanto"),
    (frozenset({"weight_packed", "weight_zero_point", "weight_shape"}), "compressed-tensors"),
    (frozenset({"scaled_fp8", "scale_weight"}), "scaled float8"),
    (frozenset({"weight_scale", "weight_scale_inv", "scales"}), "values with scales"),
)


def quantised(dtypes: Mapping[str, str], unexpected: Collection[str] = ()) -> str | None:
    """How weights are quantised, with the name of a tensor that shows it; None if they are not.

    It is told from dtypes and whole parts of names, so a layer called quant_conv does not count.

    Args:
        dtypes: dtypes of the tensors that the original model has too, by name, as safetensors spells them.
        unexpected: names that the original model does not have.
    """
    parts = {name: set(re.split("[.:]", name)) for name in unexpected}
    for signs, how in _QUANTISED:
        for name, its in parts.items():
            if its & signs:
                return f"(it has {name}): {how}"
    for name, dtype in dtypes.items():
        if dtype not in FLOATS:
            return f"(it has {name}): {dtype} without scales"
    return None


def whole_number(
    values: Mapping[str, Any], name: str, what: str, *, usual: int | None = None, least: int = 1, remedy: str
) -> int:
    """An integer entry of a config.json.

    Args:
        what: names the folder in errors.
        usual: default if the entry is absent.

    Raises:
        ValueError: if it is not an integer, or below `least`.
    """
    value = values.get(name, usual)
    if type(value) is not int or value < least:
        raise ValueError(
            f"{what} has {name} {value!r} in its config.json, expected a whole number from {least}: {remedy}"
        )
    return value


def check_count(
    path: Path, setting: str, declared: int, names: Iterable[str], beginning: str, *, besides: int = 0
) -> None:
    """Refuses a configuration that declares more layers than the weights have, before they are built.

    Args:
        path, setting: the configuration's file and entry.
        beginning: prefix of the layers' names, before their number.
        besides: number of layers with other names.

    Raises:
        ValueError: stating both numbers.
    """
    number = re.compile(re.escape(beginning) + r"(\d+)\.")
    found = besides + len({match[1] for name in names if (match := number.match(name))})
    if declared > found:
        raise ValueError(
            f"{path} says {setting} {declared:,}, and the weights have {found:,} (missing: {beginning}{found}.* and "
            "on): they do not belong together, download the whole model again"
        )


def check_size(path: Path, setting: str, declared: int, headers: Mapping[str, Header], name: str, axis: int) -> None:
    """Refuses a configuration that declares another size than a tensor has, before the network is built.

    Args:
        path, setting: the configuration's file and entry.
        name, axis: the tensor, which may be absent, and its axis.

    Raises:
        ValueError: stating both numbers.
    """
    shape = headers[name].shape if name in headers else ()
    if len(shape) > axis and shape[axis] != declared:
        raise ValueError(
            f"{path} says {setting} {declared:,}, and the weights have {shape[axis]:,} ({name} is {list(shape)}): they "
            "do not belong together, download the whole model again"
        )


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor is stored: rows of a tensor in a safetensors file.

    Attributes:
        source: name of the tensor in the file.
        rows: its first row and the one after its last.
        shape: shape of the tensor that these rows become.
        roll: number of rows to roll them by when they are read.
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
            stamps: size and modification time of the files when they were opened; None for the current ones.
        """
        self._places = dict(places)
        self._stamps = stamps or {place.file: _stamp(place.file) for place in self._places.values()}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __or__(self, other: StoredTensors) -> StoredTensors:
        """The union; names in both come from `other`."""
        return StoredTensors(self._places | other._places, other._stamps | self._stamps)

    def within(self, prefix: str) -> StoredTensors:
        """The tensors whose names start with `prefix`, which is cut off."""
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
        """Reads the tensors called `names`, all by default.

        Peak memory: what is returned plus one tensor. If neither dtype nor device changes, the tensors stay mapped from
        their file and take no memory of their own.

        Args:
            dtype: dtype to convert to; None keeps the stored dtypes, except that float8, which has no arithmetic,
                becomes bfloat16.

        Raises:
            ValueError: if a file was changed or removed, and for NaN or infinity in tensors that are copied, or that
                stay mapped from a file of at most 1 GiB. Larger files that stay mapped are not checked for these.
        """
        tensors = {}
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            for name in self._places if names is None else names:
                place = self._places[name]
                if place.file not in opened:
                    if _stamp(place.file) != self._stamps[place.file]:
                        raise ValueError(f"{place.file} was changed or removed after it was opened: load it again")
                    opened[place.file] = stack.enter_context(open_safetensors(place.file))
                part = opened[place.file].get_slice(place.source)[slice(*place.rows)].reshape(place.shape)
                part = part.roll(place.roll, 0) if place.roll else part
                # In two steps, since some devices have no float8 or bfloat16.
                tensors[name] = part.to(dtype or _arithmetic(part.dtype)).to(device)
                size, _ = self._stamps[place.file]
                if tensors[name].data_ptr() != part.data_ptr() or size <= _MAPPED_AND_CHECKED:
                    check_finite(tensors[name], place.source, place.file)
        return tensors


def _stamp(file: Path) -> tuple[int, int] | None:
    if not file.is_file():
        return None
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def find_tensors(file: str | Path, expected: Mapping[str, torch.Size], what: str) -> StoredTensors:
    """Locates the tensors of a safetensors file, without reading any.

    Args:
        expected: the names that it may hold, with their shapes.
        what: names the model in errors.

    Raises:
        ValueError: naming unexpected tensors and shapes that do not fit.
    """
    file = Path(file)
    shapes = {name: header.shape for name, header in _headers(file, lambda name: True)}
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


def load_renamed(
    module: nn.Module,
    held: Mapping[str, Any],
    rename: Callable[[str], str],
    file: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Loads a module on "meta" with tensors under another layout's names, as `open_saved` finds them in `file`.

    Args:
        rename: maps a name in the module to the layout's.
        dtype: dtype of the loaded weights; None for the file's.

    Raises:
        ValueError: naming missing and unexpected tensors and shapes that do not fit, by the layout's names; for weights
            that are not floating-point or not finite.
    """
    expected = {rename(name): (name, value.shape) for name, value in module.state_dict().items()}
    shapes = {name: tuple(value.shape) if isinstance(value, torch.Tensor) else None for name, value in held.items()}
    misfit = misfits(
        missing=sorted(set(expected) - set(shapes)),
        unexpected=sorted(set(shapes) - set(expected)),
        wrong=[
            f"{name} is {'no tensor' if shapes[name] is None else list(shapes[name])}, expected {list(shape)}"
            for name, (_, shape) in expected.items()
            if name in shapes and shapes[name] != tuple(shape)
        ],
    )
    if misfit:
        raise ValueError(f"{file} does not fit {type(module).__name__}; {misfit}: download it again, from its author")
    if how := quantised({name: _SPELLINGS.get(held[name].dtype, str(held[name].dtype)) for name in expected}):
        raise ValueError(f"{file} is quantised {how}, which is not read: take the original file")
    tensors = {}
    for theirs, (name, _) in expected.items():
        # Copied: a file that is replaced later must not change the model through its mapping.
        tensors[name] = held[theirs].to(device, dtype or held[theirs].dtype, copy=True)
        check_finite(tensors[name], theirs, file)
    module.load_state_dict(tensors, assign=True)


def fingerprint_of(tensors: Mapping[str, torch.Tensor], most: int = 1024) -> str:
    """A hash of 16 hexadecimal digits over each tensor's name, shape and up to `most` evenly spread values.

    Training changes all values, so a sample tells two models apart without moving 14 GB off a GPU. Tensors on "meta"
    are ignored.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if not tensor.is_meta:
            flat = plain(tensor.detach()).flatten()
            values = flat[:: max(1, flat.numel() // most)][:most].to("cpu", torch.float32)
            digest.update(f"{name} {list(tensor.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def misfits(*, missing: Sequence[str] = (), unexpected: Sequence[str] = (), wrong: Sequence[str] = ()) -> str:
    """Describes tensors that do not fit, naming the first few of each kind; "" if there are none."""
    kinds = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
    return "; ".join(f"{kind}: {_some(names)}" for kind, names in kinds if names)


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
