"""Linear layers that ComfyUI's memory manager can stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class _Linear(nn.Linear):
    comfy_cast_weights = False

    def reset_parameters(self) -> None:
        """The weights come from a file."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.comfy_cast_weights:
            return super().forward(input)
        bias = None if self.bias is None else self.bias.to(input)
        return F.linear(input, self.weight.to(input), bias)


class _CastingLinear(_Linear):
    comfy_cast_weights = True


class disable_weight_init:
    """Layers that compute in the type of their weights."""

    Linear = _Linear


class manual_cast:
    """Layers that compute in the type of their input, whatever their weights are stored in."""

    Linear = _CastingLinear
