"""Learning-rate schedules."""

from __future__ import annotations

import math

import torch


def warmup_cosine(step: int, steps: int, *, peak: float, warmup: int, floor: float = 0.02) -> float:
    """Learning rate of an update, counted from 0: linear warm-up to `peak`, then a half cosine to `floor * peak`.

    peak (step + 1) / warmup for the first `warmup` updates, then peak (floor + (1 - floor) (1 + cos(pi p)) / 2) with
    p = (step - warmup) / (steps - warmup).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of all parameter groups; a rate that is a tensor (torchao) is changed in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
