"""The exponential moving average (EMA) of trained weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .sharding import full_tensor, local_tensor


class EMA:
    """The EMA of weights, in float32, by diffusers' `EMAModel`.

    After its first update it is a copy of the weights. Update n + 1 keeps min(decay, (1 + n) / (10 + n)) of it: with
    the full decay from the start, a run not much longer than 1 / (1 - decay) updates would keep a large part of its
    untrained weights.

    Args:
        weights: by name; if they are sharded, each process averages its own shards.
        decay: the one that a long run reaches, in [0, 1).
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], decay: float):
        from diffusers.training_utils import EMAModel  # takes seconds, which the help texts of commands should not

        self.weights = weights
        self._ema = EMAModel(weights.values(), decay=decay)
        self._ema.to(dtype=torch.float32)

    def update(self) -> None:
        """Adds the weights to the average; call this once after each of their updates."""
        self._ema.step(self.weights.values())

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Replaces the weights by their averages while the context lasts; neither may be updated meanwhile."""
        pairs = list(zip(self.weights.values(), self._ema.shadow_params))
        if any(isinstance(weight, DTensor) or weight.dtype != average.dtype for weight, average in pairs):
            self._ema.store(self.weights.values())
            self.apply()
            undo = partial(self._ema.restore, self.weights.values())
        else:
            _exchange(pairs)  # without a copy, which `store` makes on the CPU
            undo = partial(_exchange, pairs)
        try:
            yield
        finally:
            undo()

    def apply(self) -> None:
        """Replaces the weights by their averages."""
        self._ema.copy_to(self.weights.values())

    def shards(self) -> list[torch.Tensor]:
        """What this process holds of the average."""
        return [local_tensor(shard) for shard in self._ema.shadow_params]

    def full(self) -> dict[str, torch.Tensor]:
        """The average by name, unsharded, on the CPU; all processes must call this together."""
        named = zip(self.weights, self._ema.shadow_params)
        return {name: full_tensor(shard).detach().to("cpu", copy=True) for name, shard in named}

    def load(self, average: Mapping[str, torch.Tensor], updates: int) -> None:
        """Continues from what `full` returned after that many updates."""
        self._ema.optimization_step = updates
        for name, shard in zip(self.weights, self._ema.shadow_params):
            value = average[name].to(shard.device)
            if isinstance(shard, DTensor):
                value = distribute_tensor(value, shard.device_mesh, shard.placements)
            shard.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The average and the number of updates, for checkpoints of loops that keep them together."""
        return {"updates": self._ema.optimization_step, "average": self.full()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned."""
        self.load(state["average"], state["updates"])


def _exchange(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for one, other in pairs:
        one.data, other.data = other.data, one.data


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether this process's shards of the tensors hold no NaN or infinity."""
    return bool(torch.stack([local_tensor(tensor).isfinite().all() for tensor in tensors]).all())
