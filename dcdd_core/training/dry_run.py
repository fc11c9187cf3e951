"""A training step on shapes alone: how many bytes it holds at its worst moment, and how many operations it does.

The real networks, loss, autograd and optimisers run on the meta device, where tensors have shapes and no memory; what
is counted is every tensor that they make, for as long as it lives. Nothing is a formula here but PyTorch's own of
operations (`torch.utils.flop_counter`: 2 for each multiply-add of matrix products, convolutions and attention).

Left out: what a device's libraries take for themselves (contexts, workspaces), and fragmentation. The rules of a CPU
agree with PyTorch's profiler within 1 % (`tests/training/test_cost.py`); those of a GPU have not been measured on one.
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

#: What autocast computes in the lower type on every device, of what a decoder calls (ATen/autocast_mode.h).
LOWER = frozenset({F.linear, F.conv2d, torch.matmul, torch.bmm, F.scaled_dot_product_attention})
#: And what it computes in float32 on a GPU; on a CPU nothing of this.
FLOAT32 = frozenset({F.layer_norm, F.rms_norm, F.group_norm, F.interpolate})


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What a step makes, on top of the weights and whatever else was there before.

    Attributes:
        peak: bytes at the worst moment, gradients included.
        peak_beside_gradients: bytes of all but finished gradients at the worst moment for these.
        saved: bytes that the forward pass leaves for the backward pass, the activations.
        gradients: bytes that are left at the end.
        forward_operations, operations: of the forward pass, and of the whole step with what is recomputed.
    """

    peak: int
    peak_beside_gradients: int
    saved: int
    gradients: int
    forward_operations: int
    operations: int


def replay(
    loss: Callable[[], torch.Tensor],
    trained: Iterable[nn.Parameter],
    *,
    checkpointed: Iterable[nn.Module] = (),
    autocast: torch.dtype | None = None,
    on_gpu: bool = True,
) -> Replayed:
    """Forward and backward pass of a loss over meta tensors, from weights without gradients; afterwards they have them.

    Attention is counted as flash attention: it keeps its inputs, its output and one number a row.

    Args:
        trained: the weights that receive gradients.
        checkpointed: modules that keep nothing but their input, and compute the rest again in the backward pass.
        autocast: the lower type that `loss` runs in, as under `torch.autocast`, which does not know the meta device.
        on_gpu: autocast's rules and the fused kernels of a GPU; False for those of a CPU.
    """
    device, meter = _Device(autocast, on_gpu), Meter()
    with ExitStack() as stack:
        for module in checkpointed:
            # Autograd runs a recomputation outside of function modes, so it enters this one by itself.
            again = partial(checkpoint, module.forward, use_reentrant=False, context_fn=lambda: (nullcontext(), device))
            module.forward = partial(again, preserve_rng_state=False)
            stack.callback(delattr, module, "forward")
        for weight in trained:
            weight.grad = None
            hook = weight.register_post_accumulate_grad_hook(lambda weight: meter.set_apart(weight.grad))
            stack.callback(hook.remove)
        stack.enter_context(device)
        stack.enter_context(meter)
        value = loss()
        device.end_forward()
        saved, forward_operations = meter.now, meter.operations
        value.backward()
    return Replayed(
        peak=meter.peak,
        peak_beside_gradients=meter.peak_beside,
        saved=saved,
        gradients=meter.apart,
        forward_operations=forward_operations,
        operations=meter.operations,
    )


@torch.no_grad()
def replay_peak(work: Callable[[], object]) -> int:
    """Bytes that work over meta tensors makes at its worst moment, without gradients and autocast."""
    with _Device(None, on_gpu=True), Meter() as meter:
        work()
    return meter.peak


class Meter(TorchDispatchMode):
    """Bytes of the meta tensors that were made inside and still live, and operations that were done.

    Attributes:
        now, peak: bytes of all of them.
        peak_beside, apart: the highest without those that were set apart, and the bytes of these.
        operations: 2 for each multiply-add of matrix products, convolutions and attention.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.peak_beside = self.apart = self.operations = 0
        self._sizes = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        # A result that shares its storage with an argument, a view or an update in place, is nothing new.
        known = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        # Not FlopCounterMode: its bookkeeping keeps tensors alive until Python's next collection of cycles.
        if func._overloadpacket in flop_registry:
            self.operations += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=made)
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self._count(tensor.untyped_storage(), known)
        return made

    def set_apart(self, tensor: torch.Tensor) -> None:
        """Takes a tensor that was made inside out of `peak_beside` from now on."""
        self.apart += self._sizes[tensor.untyped_storage()]

    def _count(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        if storage in self._sizes or id(storage) in known:
            return
        self._sizes[storage] = size = storage.nbytes()
        weakref.finalize(storage, self._free, size)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.peak_beside = max(self.peak_beside, self.now - self.apart)

    def _free(self, size: int) -> None:
        self.now -= size


class _Device(TorchFunctionMode):
    """What the device would do with the calls: autocast's conversions, and kernels that keep less than their parts."""

    def __init__(self, autocast: torch.dtype | None, on_gpu: bool):
        super().__init__()
        self.autocast, self.on_gpu = autocast, on_gpu
        self._converted: dict[int, torch.Tensor] | None = {}

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if self.autocast is not None and func in LOWER:
            args, kwargs = tree_map(partial(self._to, dtype=self.autocast), (args, kwargs))
        elif self.autocast is not None and self.on_gpu and func in FLOAT32:
            args, kwargs = tree_map(partial(self._to, dtype=torch.float32), (args, kwargs))
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.rms_norm and self.on_gpu:
            return _rms_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def end_forward(self) -> None:
        """Autocast keeps its copies of trained weights until its context is left, and those of a recomputation not."""
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
    """The fused kernel keeps its input and a number a row; layer normalisation keeps one number a row more."""
    return F.layer_norm(input, normalized_shape, weight, None, eps or 1e-6)
