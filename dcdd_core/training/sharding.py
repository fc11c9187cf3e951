"""Weights that lie in parts on many devices (FSDP2): made whole, put back in parts, kept and read again.

What is kept is what is trained. accelerate's own `save_state` would keep the frozen base too, of FLUX.1-Fill 17 GB.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

_KEPT = StateDictOptions(ignore_frozen_params=True)
_READ = StateDictOptions(ignore_frozen_params=True, strict=False)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or all processes' parts of it together; then all of them call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or this process's part of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def take_apart(model: nn.Module) -> None:
    """Frees what a forward pass without a backward one left whole: the next pass would go on with those values."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def save_parts(folder: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Writes the trained weights and the optimisers' state, each process its parts.

    Raises:
        CheckpointException: in all processes, if one of them cannot write.
    """
    distributed.save(_state(model, optimizers, _KEPT), checkpoint_id=folder)


def load_parts(folder: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Puts back what `save_parts` wrote, by as many processes or not.

    Raises:
        CheckpointException: in all processes, if one of them cannot read.
    """
    state = _state(model, optimizers, _KEPT)
    distributed.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=_READ
    )


def _state(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], options: StateDictOptions) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizers, options=options)
    return {"model": weights, "optimizer": moments}
