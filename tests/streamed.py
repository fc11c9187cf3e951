"""Linear layers as a host has them that streams weights: those lie elsewhere, and come when a layer is called."""

from __future__ import annotations

import torch
from torch import nn


class Streamed(nn.Linear):
    """Computes with weights that nobody else can read: its own are on "meta"."""

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.kept = [None if part is None else part.detach().clone() for part in (layer.weight, layer.bias)]
        self.weight, self.bias = (
            None if part is None else nn.Parameter(part.detach().to("meta"), requires_grad=False)
            for part in (layer.weight, layer.bias)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, *self.kept)


def stream(module: nn.Module) -> None:
    """Replaces all linear layers within a module."""
    for part in list(module.modules()):
        for name, layer in part.named_children():
            if type(layer) is nn.Linear:
                setattr(part, name, Streamed(layer))
