"""Linear weights in 8 bits, with torchao."""

from __future__ import annotations

import torch
from torch import nn


class NeedsTorchao(ValueError):
    """torchao is needed for weights in 8 bits, and cannot be imported (`__cause__` says why)."""


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that `store_in_int8` rounded as an ordinary one, of which parts can be taken; others are returned."""
    return tensor.dequantize() if type(tensor).__module__.startswith("torchao.") else tensor


def linear_weights(module: nn.Module) -> list[str]:
    """The names of a module's linear weights, which `store_in_int8` rounds."""
    return [f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Linear)]


def store_in_int8(module: nn.Module, device: torch.device | str) -> None:
    """Moves a module to the device layer by layer and rounds its linear weights to int8 there, one scale per row.

    They are dequantised inside each product; everything else in the module is unchanged. Linear weights that are stored
    in fewer bytes than the module's others are widened to the dtype of these first, each just before it is rounded, so
    that they never are in memory together in that dtype.

    Raises:
        NeedsTorchao: if torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise NeedsTorchao(
            f"weights in 8 bits need torchao ({error}): pip install torchao, or load without int8 and eight_bit"
        ) from error
    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
    others = [
        weight.dtype
        for part in module.modules()
        if not isinstance(part, nn.Linear)
        for weight in part.parameters(recurse=False)
    ]
    widest = max(others, key=lambda dtype: dtype.itemsize, default=None)
    # Otherwise torchao changes inductor's settings for the whole process; older versions also lower float32 precision.
    config = Int8WeightOnlyConfig(set_inductor_config=False)
    for linear in linears:
        if widest is not None and linear.weight.dtype.itemsize < widest.itemsize:
            linear.to(widest)
        quantize_(linear, config, device=device)
    module.to(device)
