"""MPS' one gap that the code must go round, on any machine."""

from __future__ import annotations

import torch


class WithoutFloat64(torch.Tensor):
    """A tensor as on MPS, where nothing can be float64 before it is on the CPU; so is what is computed of it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        found = super().__torch_function__(function, types, args, kwargs)
        if function is torch.Tensor.cpu:
            return found.as_subclass(torch.Tensor)
        if isinstance(found, cls) and found.dtype == torch.float64:
            raise TypeError("MPS has no float64")
        return found
