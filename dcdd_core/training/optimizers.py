"""Optimisers by name, as checkpoints keep them. Their rates start at zero: they are set each step."""

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
        weights: name -> what is trained.
        matrices: names of hidden layers' matrices among them; empty for AdamW alone.

    Returns:
        "optimizer", and "muon" if there are matrices; each weight is in one of them.
    """
    others = [p for name, p in weights.items() if name not in matrices]
    found: dict[str, torch.optim.Optimizer] = {
        "optimizer": torch.optim.AdamW(others, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True)
    }
    if matrices:
        found["muon"] = muon([weights[name] for name in matrices], weight_decay=weight_decay)
    return found


def muon(matrices: Iterable[nn.Parameter], *, weight_decay: float) -> torch.optim.Muon:
    """Orthogonalised momentum (Jordan et al. 2024), its steps scaled to AdamW's size, so that one rate fits both."""
    return torch.optim.Muon(matrices, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


def adamw_8bit(
    weights: Mapping[str, nn.Parameter], *, betas: tuple[float, float], weight_decay: float, sharded: bool = False
) -> dict[str, torch.optim.Optimizer]:
    """AdamW with moments of 8 bits, a quarter of their memory: bitsandbytes' or, without it, torchao's.

    Args:
        sharded: each process will hold parts of the weights (FSDP), which only torchao's can update.

    Raises:
        ValueError: if what is needed is not installed.
    """
    libraries = ("torchao",) if sharded else ("bitsandbytes", "torchao")
    for library in libraries:
        try:
            kind = import_module(f"{library}.optim").AdamW8bit
        except ImportError:
            continue
        return {"optimizer": kind(list(weights.values()), lr=0.0, betas=betas, weight_decay=weight_decay)}
    raise ValueError(
        f"8-bit AdamW{' of weights in parts (FSDP)' if sharded else ''} needs {' or '.join(libraries)}: install "
        f"{'it' if sharded else 'one of them'}, or take the optimiser 'adamw'"
    )
