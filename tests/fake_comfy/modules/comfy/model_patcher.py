"""What ComfyUI's memory manager holds a model by."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class ModelPatcher:
    def __init__(self, model: nn.Module, load_device: torch.device, offload_device: torch.device):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        model.device = offload_device
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Callable]]] = {}

    def clone(self) -> ModelPatcher:
        twin = copy.copy(self)
        twin.model_options = copy.copy(self.model_options)
        twin.wrappers = {kind: {key: list(own) for key, own in keys.items()} for kind, keys in self.wrappers.items()}
        return twin

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)

    def set_model_sampler_post_cfg_function(self, post_cfg_function: Callable) -> None:
        known = self.model_options.get("sampler_post_cfg_function", [])
        self.model_options["sampler_post_cfg_function"] = [*known, post_cfg_function]

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Callable) -> None:
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)
