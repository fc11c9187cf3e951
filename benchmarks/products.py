"""Matrix products of a pass on the CPU, float32: seconds for all linear layers of two blocks, by number of rows

Ours (`fused_linear`) stores weights by columns, and chooses between MKL and oneDNN by the numbers of rows and weights.
oneDNN's linear operator for float32 has no public name in torch; the one used here is what torch.compile calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.memory import JANUS_PRO
from benchmarks.timing import compared
from dcdd_core.models.fused_linear import FusedLinear, fuse_weights

HEAD = ("shape, rows", "how", "seconds", "times ours")
#: Width and MLP width.
SHAPES = {"pico": (256, 704), "Janus-Pro-1B": JANUS_PRO["Janus-Pro-1B"][:2]}
ROWS = (2, 8, 24, 64)
_BLOCKS = 2


def by_mkl(rows: torch.Tensor, fused: FusedLinear) -> torch.Tensor:
    """A product [R, O]; each thread computes a part of the columns."""
    return torch.bmm(rows.expand(len(fused.parts), *rows.shape), fused.parts).transpose(0, 1).flatten(1)


def products(width: int, inner: int, rows: int) -> dict[str, Callable[[], object]]:
    """Name -> function that computes the products of all layers, with random inputs."""
    sizes = [(width, 3 * width), (width, width), (width, 2 * inner), (inner, width)] * _BLOCKS
    given = [torch.randn(rows, inputs) for inputs, _ in sizes]
    layers = [nn.Linear(inputs, outputs, bias=False) for inputs, outputs in sizes]
    weights = [layer.weight.detach().clone() for layer in layers]
    for layer in layers:
        fuse_weights([layer])
    ours = [FusedLinear([layer], device=torch.device("cpu"), resident=False) for layer in layers]

    def each(product: Callable, held: Sequence[object]) -> Callable[[], list[torch.Tensor]]:
        return torch.inference_mode()(lambda: [product(x, w) for x, w in zip(given, held)])

    found = {
        "ours": each(lambda x, fused: fused(x)[0], ours),
        "MKL, weights by columns": each(by_mkl, ours),
        "F.linear, weights by rows": each(F.linear, weights),
    }
    if torch.backends.mkldnn.is_available():

        def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

        packed = [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for weight in weights]
        found["oneDNN, weights by columns"] = each(product, [layer.weight.detach() for layer in layers])
        found["oneDNN, weights by rows"] = each(product, weights)
        found["oneDNN, weights packed, a second copy"] = each(product, packed)
    return found


def rows(shapes: Sequence[str] = tuple(SHAPES), counts: Sequence[int] = ROWS, rounds: int = 7) -> list[tuple[str, ...]]:
    return [
        row
        for name in shapes
        for count in counts
        for row in compared(f"{name}, {count}", products(*SHAPES[name], count), rounds)
    ]
