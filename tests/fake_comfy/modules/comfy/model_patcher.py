"""What ComfyUI's memory manager holds a model by."""

from __future__ import annotations

import torch
from torch import nn


class ModelPatcher:
    def __init__(self, model: nn.Module, load_device: torch.device, offload_device: torch.device):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        model.device = offload_device
