"""Linear weights in 8 bits, with torchao."""

from __future__ import annotations

import torch
from torch import nn


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that `store_in_int8` rounded as an ordinary one, of which parts can be taken; others are returned."""
    return tensor.dequantize() if type(tensor).__module__.startswith("torchao.") else tensor


def store_in_int8(module: nn.Module, device: torch.device | str) -> None:
    """Moves a module to the device layer by layer and rounds its linear weights to int8 there, one scale per row.

    They are dequantised inside each product; everything else in the module is unchanged.

    Raises:
        ValueError: if torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError(
            f"weights in 8 bits need torchao ({error}): pip install torchao, or load without --vlm-int8 and "
            "--decoder-8bit (int8, eight_bit)"
        ) from error
    # Otherwise torchao changes inductor's settings for the whole process; older versions also lower float32 precision.
    quantize_(module, Int8WeightOnlyConfig(set_inductor_config=False), device=device)
