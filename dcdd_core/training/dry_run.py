"""A dry run of a training step, from shapes alone: its peak memory and FLOPs.

The real networks, loss, autograd and optimisers run on the meta device, where tensors have shapes but no memory, and
every tensor counts for as long as it lives. FLOPs are PyTorch's own (`torch.utils.flop_counter`: 2 for each
multiply-add of matrix products, convolutions and attention).

Not counted: the memory of a device's libraries (contexts, workspaces), and fragmentation. The rules for a CPU agree
with PyTorch's profiler within 1 % (`tests/training/test_cost.py`); those for a GPU were not compared with a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

#: The functions a decoder calls that autocast runs in the lower precision on every device (ATen/autocast_mode.h).
LOWER_PRECISION = frozenset({F.linear, F.conv2d, torch.matmul, torch.bmm, F.scaled_dot_product_attention})
#: The functions that it runs in float32 on a GPU, but not on a CPU.
FLOAT32 = frozenset({F.layer_norm, F.rms_norm, F.group_norm, F.interpolate})


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """The cost of a step, in addition to the weights and whatever else existed before it.

    Attributes:
        peak: peak bytes, gradients included.
        peak_without_gradients: peak of all bytes except finished gradients.
        activations: bytes that the forward pass stores for the backward pass.
        gradients: bytes of the gradients that remain at the end.
        forward_flops, flops: of the forward pass, and of the whole step including recomputation.
    """

    peak: int
    peak_without_gradients: int
    activations: int
    gradients: int
    forward_flops: int
    flops: int


def dry_run(
    loss: Callable[[], torch.Tensor],
    trained: Iterable[nn.Parameter],
    *,
    checkpointed: Iterable[nn.Module] = (),
    autocast: torch.dtype | None = None,
    on_gpu: bool = True,
) -> DryRun:
    """Runs the forward and backward pass of a loss on meta tensors; earlier gradients of the weights are dropped.

    Attention is counted as flash attention: it stores its inputs, its output and one number per row.

    Args:
        loss: computes the scalar loss.
        trained: the weights that receive gradients.
        checkpointed: modules that store only their input and recompute their activations in the backward pass.
        autocast: the dtype of mixed precision, or None; `torch.autocast` itself does not support the meta device.
        on_gpu: True for autocast's rules and the fused kernels of a GPU, False for those of a CPU.
    """
    device, meter = _Device(autocast, on_gpu), Meter()
    with ExitStack() as stack:
        for module in checkpointed:
            # Autograd recomputes outside of function modes, so the recomputation enters this one itself.
            recomputed = partial(
                checkpoint, module.forward, use_reentrant=False, context_fn=lambda: (nullcontext(), device)
            )
            module.forward = partial(recomputed, preserve_rng_state=False)
            stack.callback(delattr, module, "forward")
        for weight in trained:
            weight.grad = None
            hook = weight.register_post_accumulate_grad_hook(lambda weight: meter.set_apart(weight.grad))
            stack.callback(hook.remove)
        stack.enter_context(device)
        stack.enter_context(meter)
        value = loss()
        device.end_forward()
        activations, forward_flops = meter.now, meter.flops
        value.backward()
    return DryRun(
        peak=meter.peak,
        peak_without_gradients=meter.peak_without_apart,
        activations=activations,
        gradients=meter.apart,
        forward_flops=forward_flops,
        flops=meter.flops,
    )


@torch.no_grad()
def dry_run_peak(work: Callable[[], object]) -> int:
    """The peak bytes of some work on meta tensors, without gradients or autocast."""
    with _Device(None, on_gpu=True), Meter() as meter:
        work()
    return meter.peak


class Meter(TorchDispatchMode):
    """A context that counts FLOPs, and the bytes of meta tensors created within it for as long as they live.

    Attributes:
        now, peak: bytes of all of them.
        apart, peak_without_apart: bytes of those that were set apart, and the peak of all others.
        flops: 2 for each multiply-add of matrix products, convolutions and attention.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.peak_without_apart = self.apart = self.flops = 0
        self._sizes = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        # A result that shares its storage with an argument (a view, an in-place update) takes no memory of its own.
        known = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        # Not FlopCounterMode, which keeps tensors alive until Python's next garbage collection.
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=made)
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self._count(tensor.untyped_storage(), known)
        return made

    def set_apart(self, tensor: torch.Tensor) -> None:
        """Excludes a tensor that was created in this context from `peak_without_apart` from now on."""
        self.apart += self._sizes[tensor.untyped_storage()]

    def _count(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        if storage in self._sizes or id(storage) in known:
            return
        self._sizes[storage] = size = storage.nbytes()
        weakref.finalize(storage, self._free, size)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.peak_without_apart = max(self.peak_without_apart, self.now - self.apart)

    def _free(self, size: int) -> None:
        self.now -= size


class _Device(TorchFunctionMode):
    """Imitates a device: autocast's conversions, and fused kernels that store less."""

    def __init__(self, autocast: torch.dtype | None, on_gpu: bool):
        super().__init__()
        self.autocast, self.on_gpu = autocast, on_gpu
        self._converted: dict[int, torch.Tensor] | None = {}

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if self.autocast is not None and func in LOWER_PRECISION:
            args, kwargs = tree_map(partial(self._to, dtype=self.autocast), (args, kwargs))
        elif self.autocast is not None and self.on_gpu and func in FLOAT32:
            args, kwargs = tree_map(partial(self._to, dtype=torch.float32), (args, kwargs))
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.rms_norm and self.on_gpu:
            return _rms_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def end_forward(self) -> None:
        """Autocast caches its copies of trained weights until its context ends; recomputation's are not cached."""
        self._converted = None

    def _to(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if self._converted is None or not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self._converted:
            self._converted[id(value)] = value.to(dtype)
        return self._converted[id(value)]


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, dropout_p, is_causal, scale=kwargs.get("scale"))[0]


def _rms_norm(
    input: torch.Tensor, normalized_shape: list[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """Layer norm in place of the fused RMS norm, which stores its input and one number per row; layer norm stores 2."""
    return F.layer_norm(input, normalized_shape, weight, None, eps or 1e-6)
