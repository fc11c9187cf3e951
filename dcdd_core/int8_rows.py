"""Matrices that files hold in 8 bits, each with one scale per row: W = int8 * scale.

Shapes: M rows, C columns.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

#: Suffix that turns a matrix's name into that of its scales.
SCALE = "_scale"
_LEAST_ROW = 64
"""Inputs of the smallest linear layer that is stored in 8 bits; smaller ones hardly take space."""


def large_matrices(network: nn.Module) -> set[str]:
    """Names of the weights of linear layers that are worth storing in 8 bits: those with 64 inputs or more."""
    return {
        f"{name}.weight"
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and layer.in_features >= _LEAST_ROW
    }


def to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [M, C] as int8 [M, C] and float32 scales of rows [M]: weight = int8 * scale, to within half a scale."""
    scale = weight.float().abs().amax(dim=1) / 127
    whole = (weight.float() / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
    return whole.to(torch.int8), scale


def rounded(tensors: Mapping[str, torch.Tensor], names: Collection[str]) -> dict[str, torch.Tensor]:
    """The named matrices in 8 bits, each with its scales; floats among the rest in float16.

    Raises:
        KeyError: for a name that is not among the tensors.
    """
    stored = {}
    if missing := sorted(set(names) - set(tensors)):
        raise KeyError(f"no tensors {missing}")
    for name, value in tensors.items():
        if name in names:
            stored[name], stored[name + SCALE] = to_int8(value)
        else:
            stored[name] = value.half() if value.is_floating_point() else value
    return stored


def restored(tensors: Mapping[str, torch.Tensor], *, remedy: str) -> dict[str, torch.Tensor]:
    """Restores what `rounded` stored: its matrices are float32 again, and other tensors stay as they are.

    Args:
        remedy: what to do about a file whose tensors do not fit together.

    Raises:
        ValueError: for integer tensors that are not int8 rows with one scale each, and for scales without a matrix.
    """
    found = {}
    for name, value in tensors.items():
        if name.endswith(SCALE):
            if tensors.get(name.removesuffix(SCALE), value).dtype != torch.int8:
                raise ValueError(f"has {name} and no int8 tensor for it: {remedy}")
            continue
        if value.is_floating_point() or not value.ndim:  # a counter has no dimension
            found[name] = value
            continue
        scale = tensors.get(name + SCALE)
        if value.dtype != torch.int8 or value.ndim != 2 or scale is None or scale.shape != value.shape[:1]:
            raise ValueError(
                f"has {name} as {value.dtype} {list(value.shape)}; expected floats, or int8 rows with one scale each "
                f"({name}{SCALE}): {remedy}"
            )
        found[name] = value.float() * scale.float()[:, None]
    return found
