"""The memory manager of a machine that has nothing but a CPU."""

from __future__ import annotations

import torch

_CPU = torch.device("cpu")
_state = {"interrupted": False}


class InterruptProcessingException(Exception):
    """An Exception and no BaseException, as in ComfyUI: a broad `except` swallows it."""


def interrupt_current_processing(value: bool = True) -> None:
    _state["interrupted"] = value


def throw_exception_if_processing_interrupted() -> None:
    if _state["interrupted"]:
        _state["interrupted"] = False
        raise InterruptProcessingException


def get_torch_device() -> torch.device:
    return _CPU


def intermediate_device() -> torch.device:
    return _CPU


def unet_offload_device() -> torch.device:
    return _CPU


def get_total_memory(dev: torch.device | None = None) -> int:
    return 2**34


def should_use_bf16(device: torch.device | None = None) -> bool:
    return False


def supports_cast(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type != "mps"


def is_amd() -> bool:
    return False


def soft_empty_cache() -> None:
    """Nothing is kept."""


def load_models_gpu(models, memory_required=0, force_patch_weights=False, minimum_memory_required=None):
    """Takes patchers alone, and writes the device on their modules: what has a read-only one fails here, as there."""
    for patcher in models:
        patcher.model.to(patcher.load_device)
        patcher.model.device = patcher.load_device
