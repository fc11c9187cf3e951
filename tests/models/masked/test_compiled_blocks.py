"""Compiled blocks of a masked transformer: captions of all lengths and batches of all sizes share their graphs."""

from __future__ import annotations

import torch
from torch._dynamo.testing import CompileCounter

from dcdd_core.models.masked.words import padded
from tests.models.masked.tiny_masked import tiny_network


def logits_of(network, rows: int, words: int) -> torch.Tensor:
    """Of captions of which one is a word shorter than the others."""
    draw = torch.Generator().manual_seed(rows)
    tokens = torch.randint(0, 65, (rows, 16), generator=draw)
    ids = [[1] * (words - (row == 0)) for row in range(rows)]
    return network.logits(network(tokens, network.prefix(*padded(ids))))


def test_two_graphs_with_gradients_and_two_without_serve_all_rows_and_lengths():
    torch._dynamo.reset()
    plain, compiled, counter = tiny_network(), tiny_network().requires_grad_(True), CompileCounter()
    for layer in compiled.layers:
        layer.compile(dynamic=True, backend=counter)
    for grad in (True, False):
        for rows, words in ((4, 7), (6, 9), (3, 12)):
            with torch.set_grad_enabled(grad):
                found = logits_of(compiled, rows, words)
            torch.testing.assert_close(found.detach(), logits_of(plain, rows, words).detach(), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 4, "text and image, with gradients and without"
    torch._dynamo.reset()
