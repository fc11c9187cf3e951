"""Weights sharded over devices (FSDP2): gathering, resharding, and checkpoints of them.

Checkpoints hold only the trained weights. accelerate's `save_state` would also write the frozen base: 17 GB for
FLUX.1-Fill.
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

NO_DEEPSPEED = (
    "the launcher is configured for DeepSpeed, which is not supported: choose DDP or FSDP2 "
    "(configs/accelerate/ddp.yaml, fsdp.yaml)"
)

_TRAINED = StateDictOptions(ignore_frozen_params=True)
_TRAINED_NOT_STRICT = StateDictOptions(ignore_frozen_params=True, strict=False)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The unsharded tensor; for a sharded one, all processes must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of the tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Frees the weights gathered in a forward pass without a backward pass; the next pass would use these values."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def save_sharded(folder: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Writes the trained weights and the optimisers' states; each process writes its own shards.

    Raises:
        CheckpointException: in all processes, if one of them cannot write.
    """
    distributed.save(_state(model, optimizers), checkpoint_id=folder)


def load_sharded(folder: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Loads what `save_sharded` wrote, with any number of processes at the time.

    Raises:
        CheckpointException: in all processes, if one of them cannot read.
    """
    state = _state(model, optimizers)
    distributed.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizers,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_TRAINED_NOT_STRICT,
    )


def _state(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    weights, optimizer_states = get_state_dict(model, optimizers, options=_TRAINED)
    return {"model": weights, "optimizer": optimizer_states}
