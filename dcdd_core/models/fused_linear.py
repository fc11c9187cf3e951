"""Fused linear layers for CPU decode steps, which have few rows and spend their time reading the weights.

A BLAS multiplies few rows with a single thread. With weights stored by columns, the columns can be split across all
threads, and layers that read the same input become one product. For large weights and a few more rows, oneDNN is faster
than MKL.

Shapes: R rows, I input width, O output width, P parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

#: A thread gets at least this many columns.
MIN_COLUMNS = 64
#: Least numbers of rows and weights for which oneDNN is used (`python -m benchmarks products`).
ONEDNN_ROWS, ONEDNN_WEIGHTS = 4, 2**20


def fuse_weights(layers: Sequence[nn.Linear]) -> None:
    """Stores the weights [O, I] of layers that read the same input as columns of one matrix [I, sum of O].

    Values, shapes and biases do not change. The order of summation does, and with it the last bits of a product.
    Weights that are moved or copied afterwards have their own storage again.
    """
    matrix = torch.cat([layer.weight.data.t() for layer in layers], dim=1)
    for layer, columns in zip(layers, matrix.split([len(layer.weight) for layer in layers], dim=1)):
        layer.weight.data = columns.t()


class FusedLinear:
    """Layers that read the same input: one product if `fuse_weights` stored them together, otherwise one each.

    The fused product computes no gradients for the weights and runs no hooks of the layers.
    """

    def __init__(self, layers: Sequence[nn.Module], *, device: torch.device, resident: bool):
        """
        Args:
            device: device of the rows; on anything but a CPU each layer is called separately.
            resident: whether linear layers that are not torch's own compute the same as torch's.
        """
        self.layers, matrix = layers, None
        if device.type == "cpu" and all(_is_plain(layer, resident) for layer in layers):
            matrix = _matrix([layer.weight for layer in layers])
            self.sizes = [layer.out_features for layer in layers]
        self.parts = None if matrix is None else _split(matrix)
        self.weight = matrix.t() if matrix is not None and _suits_onednn(matrix) else None

    def __call__(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        """Rows [R, I] -> [R, O] of each layer."""
        if self.parts is None:
            return [layer(rows) for layer in self.layers]
        if self.weight is not None and len(rows) >= ONEDNN_ROWS:
            # torch has no public name for it in float32: this is the operator that torch.compile calls.
            product = torch.ops.mkldnn._linear_pointwise(rows, self.weight, None, "none", [], "")
            return product.split_with_sizes(self.sizes, dim=1)
        product = torch.bmm(rows.expand(len(self.parts), *rows.shape), self.parts)
        return product.transpose(0, 1).flatten(1).split_with_sizes(self.sizes, dim=1)


def _is_plain(layer: nn.Module, resident: bool) -> bool:
    """Whether the layer is a product with its weights and nothing else."""
    ours = isinstance(layer, nn.Linear) if resident else type(layer) is nn.Linear
    return ours and layer.bias is None


def _matrix(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The matrix [I, sum of O] in which `fuse_weights` stored these weights; None if they are stored otherwise."""
    first, width, inputs = weights[0], sum(len(weight) for weight in weights), weights[0].shape[1]
    start = first.data_ptr()
    for weight in weights:
        if weight.device.type != "cpu" or weight.stride() != (1, width) or weight.data_ptr() != start:
            return None
        start += len(weight) * weight.element_size()
    return first.detach().as_strided((inputs, width), (width, 1))


def _suits_onednn(matrix: torch.Tensor) -> bool:
    """Whether oneDNN is used with this matrix for many rows; measured only where MKL is the alternative."""
    there = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    there = there and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return there and matrix.dtype == torch.float32 and matrix.numel() >= ONEDNN_WEIGHTS


def _split(matrix: torch.Tensor) -> torch.Tensor:
    """[I, O] -> a view [P, I, O / P], at most one part per thread; only MKL multiplies the parts in parallel."""
    width, threads = matrix.shape[1], torch.get_num_threads() if torch.backends.mkl.is_available() else 1
    counts = range(min(threads, width // MIN_COLUMNS), 1, -1)
    count = next((count for count in counts if width % count == 0), 1)
    return matrix.unflatten(1, (count, -1)).transpose(0, 1)
