"""Networks' weights as others lay them out: diffusers folders, and single files under names of their own.

Every tensor is found under the network's own name, as rows of a file's tensor, so that a stacked projection is cut on
the way and never held twice. Nothing is fetched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import nn

from .checkpoints import Place, StoredTensors, misfits, read_config

_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_SIGN_OF_QUANTISATION = re.compile(r"scaled_fp8|scale_weight|weight_scale|absmax|quant|qweight")
_OTHER_FORMATS = (
    (b"GGUF", "a GGUF file"),
    (b"PK\x03\x04", "a PyTorch checkpoint (.pt, .ckpt, .bin)"),
    (b"\x80", "a pickled PyTorch checkpoint (.pt, .ckpt, .bin)"),
    (b"version https://git-lfs", "a git-lfs pointer instead of the file it stands for"),
    (b"<", "a web page instead of the file"),
)


def component(path: str | Path, name: str) -> Path:
    """`path`, or the folder `name` inside it, where `path` is the folder of a whole diffusers pipeline."""
    path = Path(path)
    return path / name if (path / name).is_dir() else path


def as_named(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The layout of a file that has the network's own names."""
    return {name: (name,) for name in model.state_dict()}


def remedy(needs: str) -> str:
    """What to do where the files of a model do not fit."""
    return f"give the diffusers folder or the .safetensors file of {needs}"


def _files(path: Path, needs: str) -> list[Path]:
    """The one safetensors file that `path` is or holds, or the shards that the one index in it names."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: {remedy(needs)}")
    files, indexes = sorted(path.glob("*.safetensors")), sorted(path.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        shards = read_config(path, indexes[0].name).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{indexes[0]} names no shards: download it again")
        files = [path / name for name in sorted(set(map(str, shards.values())))]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise ValueError(
                f"{path} lacks {', '.join(absent)}, which {indexes[0].name} names: its download has not finished, "
                "start it again"
            )
        return files
    if len(files) != 1:
        held = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{path} holds {held}; expected one .safetensors file, or shards with one index: "
            + (f"name one of its {len(files)} files" if files else remedy(needs))
        )
    return files


class Found(NamedTuple):
    """A tensor of a file, by the name that it has there, as a safetensors slice, which reads when it is indexed."""

    file: Path
    name: str
    part: Any


@contextmanager
def opened(path: Path, needs: str) -> Iterator[dict[str, Found]]:
    """Every tensor of `path` by its name."""
    with ExitStack() as stack:
        found = {}
        for file in _files(path, needs):
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                with file.open("rb") as raw:
                    start = raw.read(32)
                for sign, kind in _OTHER_FORMATS:
                    if start.startswith(sign):
                        raise ValueError(
                            f"{file} is {kind}; only safetensors files are read: {remedy(needs)}"
                        ) from error
                raise ValueError(
                    f"{file} cannot be read ({error}): it is cut short or damaged, download it again"
                ) from error
            found |= {name: Found(file, name, opened.get_slice(name)) for name in opened.keys()}
        yield found


def within(
    found: Mapping[str, Found], prefixes: Sequence[str], signs: tuple[str, str]
) -> tuple[dict[str, Found], bool]:
    """What lies under the first prefix that holds a model, and whether it is in the BFL layout; all, if none does.

    Args:
        signs: beginnings of names that only the BFL and only the diffusers layout has.
    """
    for prefix in prefixes:
        for is_bfl, sign in zip((True, False), signs):
            if any(name.startswith(prefix + sign) for name in found):
                return {n.removeprefix(prefix): entry for n, entry in found.items() if n.startswith(prefix)}, is_bfl
    return dict(found), False


def find(
    path: Path,
    found: Mapping[str, Found],
    layout: Mapping[str, tuple[str, ...]],
    model: nn.Module,
    needs: str,
    *,
    without: Collection[str] = (),
    rolled: str | None = None,
) -> StoredTensors:
    """Checks every name and shape of `found`, and says where the parts of `layout` lie that are not in `without`.

    Args:
        layout: the file's tensor names, each with the network's names whose rows it stacks, in order.
        needs: what to call the model in errors.
        rolled: beginning of the file's names whose halves are swapped.

    Raises:
        ValueError: for quantised weights, and tensors that are missing, unexpected or of a wrong shape, in the file's
            own names.
    """
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    wanted = {source: names for source, names in layout.items() if not set(names) <= set(without)}
    unexpected = sorted(set(found) - set(layout))
    scales = [name for name in unexpected if _SIGN_OF_QUANTISATION.search(name)]
    scales += [name for name in wanted if name in found and found[name].part.get_dtype() not in _FLOATS]
    if scales:
        raise ValueError(
            f"{path} is quantised (it has {scales[0]}), which is not read; plain bfloat16, float16 and float8 are: "
            + remedy(needs)
        )
    wrong = []
    for source, names in wanted.items():
        whole = [sum(shapes[name][0] for name in names), *shapes[names[0]][1:]]
        if source in found and not _same_but_for_ones(given := found[source].part.get_shape(), whole):
            wrong.append(f"{source} is {given}, expected {whole}")
    if misfit := misfits(missing=sorted(set(wanted) - set(found)), unexpected=unexpected, wrong=wrong):
        raise ValueError(f"{path} does not fit {needs}; {misfit}: {remedy(needs)}")

    places = {}
    for source, names in wanted.items():
        stop = 0
        for name in names:
            start, stop = stop, stop + shapes[name][0]
            if name in without:
                continue
            places[name] = Place(
                file=found[source].file,
                source=found[source].name,
                rows=(start, stop),
                shape=tuple(shapes[name]),
                roll=shapes[name][0] // 2 if rolled is not None and source.startswith(rolled) else 0,
            )
    return StoredTensors(places)


def _same_but_for_ones(given: Sequence[int], expected: Sequence[int]) -> bool:
    """BFL's attention projections are convolutions: [C, C, 1, 1] for [C, C]."""
    return list(given[: len(expected)]) == list(expected) and math.prod(given) == math.prod(expected)
