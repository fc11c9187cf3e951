"""The moving average of the weights that are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .sharding import local, whole


class MovingAverage:
    """diffusers' average, in float32; the n-th update decays by min(decay, n / (9 + n)), the first one copies.

    With the full decay from the start, a run not much longer than 1 / (1 - decay) steps would keep a large share of its
    first, untrained weights.

    Args:
        weights: by name, prepared: each process may hold a part of them.
        decay: of a long run.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], decay: float):
        self.weights = weights
        self._average = EMAModel(weights.values(), decay=decay)
        self._average.to(dtype=torch.float32)

    def update(self) -> None:
        """Takes the weights in; once a step."""
        self._average.step(self.weights.values())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the weights are their averages."""
        self._average.store(self.weights.values())
        self.put_in_place()
        try:
            yield
        finally:
            self._average.restore(self.weights.values())

    def put_in_place(self) -> None:
        """The weights become their averages."""
        self._average.copy_to(self.weights.values())

    def parts(self) -> list[torch.Tensor]:
        """What this process holds."""
        return [local(part) for part in self._average.shadow_params]

    def whole(self) -> dict[str, torch.Tensor]:
        """The average by name, on the CPU; all processes call this together."""
        parts = zip(self.weights, self._average.shadow_params)
        return {name: whole(part).detach().to("cpu", copy=True) for name, part in parts}

    def load(self, values: Mapping[str, torch.Tensor], updates: int) -> None:
        """Goes on from what `whole` gave after so many updates."""
        self._average.optimization_step = updates
        for name, part in zip(self.weights, self._average.shadow_params):
            value = values[name].to(part.device)
            part.copy_(
                distribute_tensor(value, part.device_mesh, part.placements) if isinstance(part, DTensor) else value
            )


def all_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether this process's parts hold no NaN or infinity."""
    return bool(torch.stack([local(tensor).isfinite().all() for tensor in tensors]).all())
