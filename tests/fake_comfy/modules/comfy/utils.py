"""Progress, and resizing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

_hooks: list[Callable] = []


def set_progress_bar_global_hook(function: Callable) -> None:
    """Has the function called with (value, total, preview) at each report, by bars that are made from now on."""
    _hooks[:] = [function]


class ProgressBar:
    """Reports, and checks for no interrupt.

    Newer versions leave out reports that come too soon, and with them the check: so a node has to check by itself.
    """

    def __init__(self, total: int):
        self.total, self._hooks = total, list(_hooks)

    def update_absolute(self, value: int, total: int | None = None, preview=None) -> None:
        self.total = self.total if total is None else total
        for hook in self._hooks:
            hook(min(value, self.total), self.total, preview)


def common_upscale(samples: torch.Tensor, width: int, height: int, upscale_method: str, crop: str) -> torch.Tensor:
    """[B, C, H, W] -> [B, C, height, width]; "center" takes the largest middle part of that shape."""
    if crop == "center":
        high, wide = samples.shape[-2:]
        top = max(0, round((high - wide * height / width) / 2))
        left = max(0, round((wide - high * width / height) / 2))
        samples = samples[..., top : high - top, left : wide - left]
    if upscale_method != "lanczos":
        return F.interpolate(samples, size=(height, width), mode=upscale_method)
    done = []
    for one in samples:
        raw = (255 * one.movedim(0, -1)).clamp(0, 255).byte().cpu().numpy()
        scaled = Image.fromarray(raw).resize((width, height), Image.Resampling.LANCZOS)
        done.append(torch.from_numpy(np.asarray(scaled, dtype=np.float32) / 255).movedim(-1, 0))
    return torch.stack(done).to(samples)
