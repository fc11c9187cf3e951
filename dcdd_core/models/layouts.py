"""Reads network weights in other layouts: diffusers folders, and single files with tensor names of their own.

Every tensor is found under the network's own name, as rows of a tensor in the file, so that a stacked projection is
split while it is read and never held twice. Nothing is downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from .checkpoints import Place, StoredTensors, misfits, open_safetensors, quantised, weight_files


def component(path: str | Path, name: str) -> Path:
    """`path`, or the folder `name` inside it if `path` is the folder of a whole diffusers pipeline."""
    path = Path(path)
    return path / name if (path / name).is_dir() else path


def as_named(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The layout of a file that uses the network's own names."""
    return {name: (name,) for name in model.state_dict()}


def remedy(needs: str) -> str:
    """What to do if the files of a model do not fit."""
    return f"give the diffusers folder or the .safetensors file of {needs}"


class Found(NamedTuple):
    """A tensor of a file, with its name there, as a safetensors slice, which is read when it is indexed."""

    file: Path
    name: str
    part: Any


@contextmanager
def opened(path: Path, needs: str) -> Iterator[dict[str, Found]]:
    """Every tensor in the safetensors files of `path` (see `checkpoints.weight_files`), by name.

    Raises:
        ValueError: as `weight_files` and `open_safetensors`.
    """
    way_out = remedy(needs)
    chosen = weight_files(path, remedy=way_out, endings=(".safetensors",))
    with ExitStack() as stack:

        def entries(file: Path) -> Iterator[tuple[str, Found]]:
            handle = stack.enter_context(open_safetensors(file, remedy=way_out))
            return ((name, Found(file, name, handle.get_slice(name))) for name in handle.keys())

        yield chosen.collect(entries)


def within(
    found: Mapping[str, Found], prefixes: Sequence[str], signs: tuple[str, str]
) -> tuple[dict[str, Found], bool]:
    """The tensors under the first prefix that holds a model, or all if none does; and whether they are in BFL's layout.

    Args:
        signs: name prefixes that only the BFL layout and only the diffusers layout has.
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
    """Checks every name and shape of `found`, and locates the tensors of `layout` that are not in `without`.

    Args:
        layout: the file's tensor names, each with the network's names whose rows it stacks, in order.
        needs: what to call the model in errors.
        rolled: prefix of the file's tensor names whose halves are swapped.

    Raises:
        ValueError: for quantised weights, and for tensors that are missing, unexpected or of a wrong shape, by their
            names in the file.
    """
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    wanted = {source: names for source, names in layout.items() if not set(names) <= set(without)}
    unexpected = sorted(set(found) - set(layout))
    dtypes = {name: found[name].part.get_dtype() for name in wanted if name in found}
    if how := quantised(dtypes, unexpected):
        raise ValueError(
            f"{path} is quantised {how}, which is not read; plain bfloat16, float16 and float8 are: {remedy(needs)}"
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
    """Equality up to trailing ones: BFL's attention projections are convolutions, [C, C, 1, 1] for [C, C]."""
    return list(given[: len(expected)]) == list(expected) and math.prod(given) == math.prod(expected)
