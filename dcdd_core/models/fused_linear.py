"""Linear layers on a CPU for the few rows of a step, whose time goes into reading the weights.

A BLAS multiplies few rows with one thread. Laid out in columns, weights can be shared among all threads, and layers
that read the same input become one product.

Shapes: R rows, I values of an input, O those of an output, P parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

#: A thread takes this many columns or more.
LEAST = 64


def lay_side_by_side(layers: Sequence[nn.Linear]) -> None:
    """Lays the weights [O, I] of layers that read the same input out as columns of one matrix [I, all their O].

    Values, shapes and biases stay; a multiplication's order of summation, and with it the last bits of a product,
    changes. Weights that are moved or copied lie by themselves again.
    """
    matrix = torch.cat([layer.weight.data.t() for layer in layers], dim=1)
    for layer, columns in zip(layers, matrix.split([len(layer.weight) for layer in layers], dim=1)):
        layer.weight.data = columns.t()


class Together:
    """Layers that read the same input: one product where their weights lie side by side, else each by itself.

    The product knows no gradients of the weights, nor hooks on the layers.
    """

    def __init__(self, layers: Sequence[nn.Module], *, device: torch.device, resident: bool):
        """
        Args:
            device: of the rows; elsewhere than on a CPU each layer is called.
            resident: linear layers that are not torch's own do nothing but what those do.
        """
        self.layers, matrix = layers, None
        if device.type == "cpu" and all(_is_plain(layer, resident) for layer in layers):
            matrix = _matrix([layer.weight for layer in layers])
            self.sizes = [layer.out_features for layer in layers]
        self.parts = None if matrix is None else _shared(matrix)

    def __call__(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        """Rows [R, I] -> [R, O] of each layer."""
        if self.parts is None:
            return [layer(rows) for layer in self.layers]
        made = torch.bmm(rows.expand(len(self.parts), *rows.shape), self.parts)
        return made.transpose(0, 1).flatten(1).split_with_sizes(self.sizes, dim=1)


def _is_plain(layer: nn.Module, resident: bool) -> bool:
    """Whether it is a product with its weights and nothing else."""
    ours = isinstance(layer, nn.Linear) if resident else type(layer) is nn.Linear
    return ours and layer.bias is None


def _matrix(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The matrix [I, all O] whose columns the weights are, as `lay_side_by_side` left them; None if they are not."""
    first, width, inputs = weights[0], sum(len(weight) for weight in weights), weights[0].shape[1]
    start = first.data_ptr()
    for weight in weights:
        if weight.device.type != "cpu" or weight.stride() != (1, width) or weight.data_ptr() != start:
            return None
        start += len(weight) * weight.element_size()
    return first.detach().as_strided((inputs, width), (width, 1))


def _shared(matrix: torch.Tensor) -> torch.Tensor:
    """[I, O] -> a view [P, I, O / P], at most a part for each thread; only MKL multiplies parts at the same time."""
    width, threads = matrix.shape[1], torch.get_num_threads() if torch.backends.mkl.is_available() else 1
    counts = range(min(threads, width // LEAST), 1, -1)
    count = next((count for count in counts if width % count == 0), 1)
    return matrix.unflatten(1, (count, -1)).transpose(0, 1)
