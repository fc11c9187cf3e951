"""Linear weights in 8 bits."""

from __future__ import annotations

import torch
from torch import nn


def store_in_int8(module: nn.Module, device: torch.device | str) -> None:
    """Moves a module to the device layer by layer, and there rounds its linear weights to int8, one scale a row.

    They are lifted for their turn, inside the product; what else it holds stays as it is.

    Raises:
        ValueError: without torchao.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError(
            f"weights in 8 bits need torchao ({error}): pip install torchao, or load without --janus-int8 and "
            "--decoder-8bit (int8, eight_bit)"
        ) from error
    # Its advice on compiling would be set for the whole process; older ones also lower float32's precision by it.
    quantize_(module, Int8WeightOnlyConfig(set_inductor_config=False), device=device)
