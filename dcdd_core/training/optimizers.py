"""Optimisers. Their learning rates start at zero and are set before each update (`schedules`)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from importlib import import_module

import torch
from torch import nn

OPTIMIZERS = ("adamw", "adamw8bit", "muon")


def adamw_with_muon(
    weights: Mapping[str, nn.Parameter],
    matrices: Collection[str],
    *,
    betas: tuple[float, float],
    weight_decay: float,
) -> dict[str, torch.optim.Optimizer]:
    """AdamW, and `muon` for the weights named in `matrices`.

    Args:
        weights: the trained weights by name.
        matrices: the names of hidden layers' matrices among them; empty for AdamW alone.

    Returns:
        "optimizer", and "muon" if there are matrices; each weight is in exactly one of them.
    """
    others = [weight for name, weight in weights.items() if name not in matrices]
    optimizers: dict[str, torch.optim.Optimizer] = {
        "optimizer": torch.optim.AdamW(others, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True)
    }
    if matrices:
        optimizers["muon"] = muon([weights[name] for name in matrices], weight_decay=weight_decay)
    return optimizers


def muon(matrices: Iterable[nn.Parameter], *, weight_decay: float) -> torch.optim.Muon:
    """Orthogonalised momentum (Jordan et al. 2024); its updates have AdamW's RMS, so both share a learning rate.

    Raises:
        ValueError: if torch is older than 2.9, which brought it.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"muon needs torch 2.9 or newer, this is {torch.__version__}: update torch, or take adamw")
    return torch.optim.Muon(matrices, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


def adamw_8bit(
    weights: Iterable[nn.Parameter], *, betas: tuple[float, float], weight_decay: float, sharded: bool = False
) -> torch.optim.Optimizer:
    """AdamW with 8-bit moments, a quarter of the memory: bitsandbytes' or, without it, torchao's.

    Args:
        sharded: whether the weights will be sharded (FSDP), which only torchao's supports.

    Raises:
        ValueError: if no suitable library is installed.
    """
    libraries = ("torchao",) if sharded else ("bitsandbytes", "torchao")
    for library in libraries:
        try:
            kind = import_module(f"{library}.optim").AdamW8bit
        except ImportError:
            continue
        return kind(list(weights), lr=0.0, betas=betas, weight_decay=weight_decay)
    raise ValueError(
        f"8-bit AdamW{' of sharded weights (FSDP)' if sharded else ''} needs {' or '.join(libraries)}: install "
        f"{'it' if sharded else 'one of them'}, or take the optimiser 'adamw'"
    )
