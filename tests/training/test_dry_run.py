"""Dry runs: bytes and FLOPs of networks small enough to count by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dcdd_core.training.dry_run import Meter, dry_run, dry_run_peak

B, N, M = 2, 64, 128
X = 4 * B * N * M
"""Bytes of one activation [B, N, M] in float32."""


def tokens(dtype=torch.float32):
    return torch.empty(B, N, M, device="meta", dtype=dtype)


def linear(**options):
    return nn.Linear(M, M, bias=False, device="meta", **options)


def test_two_layers_by_hand():
    first, second, x = linear(), linear(), tokens()
    made = dry_run(lambda: second(F.relu(first(x))).sum(), [first.weight, second.weight])
    product = 2 * B * N * M * M
    assert made.forward_flops == 2 * product
    assert made.flops == 5 * product  # the gradient for x is not asked for
    assert made.gradients == 2 * 4 * M * M
    assert made.activations == X + 4  # relu's result serves both it and the next layer; the loss is one number
    assert first.weight.grad.is_meta and first.weight.grad.shape == (M, M)


def test_frozen_weights_take_no_gradient_and_keep_no_input():
    first, second, x = linear(), linear().requires_grad_(False), tokens()
    made = dry_run(lambda: second(first(x)).sum(), [first.weight])
    assert made.gradients == 4 * M * M and made.activations == 4
    assert made.flops == 4 * 2 * B * N * M * M


def test_what_is_freed_does_not_count():
    weights = [linear().requires_grad_(False) for _ in range(20)]

    def loss():
        x = tokens().requires_grad_()
        for weight in weights:
            x = weight(x)
        return x.sum()

    assert dry_run(loss, []).peak <= 3 * X + 8


def test_without_gradients_only_two_activations_are_held():
    first, second = linear(), linear()
    assert dry_run_peak(lambda: second(F.relu(first(tokens())))) == 2 * X


def test_checkpointing_trades_memory_for_flops():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(linear(), nn.GELU(), linear(), nn.GELU(), linear())

        def forward(self, x):
            return x + self.layers(x)

    net = nn.Sequential(*[Block() for _ in range(4)])
    plain, again = (
        dry_run(lambda: net(tokens()).sum(), net.parameters(), checkpointed=blocks) for blocks in ((), list(net))
    )
    assert (
        again.activations == 4 * X + 4 < plain.activations / 3
    )  # a block keeps its input, the first one's comes from outside
    assert again.gradients == plain.gradients and again.peak < plain.peak
    # Of each block's three products the last one is not needed again: its result is known outside.
    assert again.flops == plain.flops + plain.forward_flops * 2 // 3
    assert all("forward" not in vars(block) for block in net)


def test_gradients_are_set_apart_when_they_are_finished():
    net = nn.Sequential(*[linear() for _ in range(6)])
    made = dry_run(lambda: net(tokens()).sum(), net.parameters())
    assert made.peak <= made.peak_without_gradients + made.gradients
    assert made.peak_without_gradients < made.peak


def test_attention_keeps_no_matrix():
    def saved(count):
        q, k, v = (torch.empty(1, 2, count, 32, device="meta").requires_grad_() for _ in range(3))
        return dry_run(lambda: F.scaled_dot_product_attention(q, k, v).sum(), []).activations

    assert saved(2048) == 4 * 2048 * 2 * (32 + 1) + 4 + (saved(1024) - 4 * 1024 * 2 * (32 + 1) - 4)
    assert saved(2048) < 4 * 2048 * 2048


@pytest.mark.parametrize(("on_gpu", "size"), [(True, 4), (False, 2)])
def test_autocast_follows_the_device(on_gpu, size):
    """A GPU's autocast normalises in float32, a CPU's in the type that comes in."""
    made = []

    def loss():
        made.append(F.layer_norm(F.linear(tokens(), weight), (M,)))
        return made[0].sum()

    weight = nn.Parameter(torch.empty(M, M, device="meta"))
    dry_run(loss, [weight], autocast=torch.bfloat16, on_gpu=on_gpu)
    assert made[0].element_size() == size and weight.grad.dtype == torch.float32


def test_autocast_copies_trained_weights_once_and_until_the_end_of_the_forward_pass():
    weight, frozen, x = nn.Parameter(torch.empty(M, M, device="meta")), linear(dtype=torch.bfloat16), tokens()
    frozen.requires_grad_(False)

    def loss():
        once = F.linear(x, weight)
        return frozen(F.linear(once, weight)).float().sum()

    # The copy; x and the first result in bfloat16, which the weight's gradient needs; the loss.
    assert dry_run(loss, [weight], autocast=torch.bfloat16).activations == 2 * M * M + X + 4


def test_autocast_s_copies_are_gone_after_the_forward_pass_where_nothing_needs_them():
    layer = linear()
    made = dry_run(lambda: layer(tokens()).float().sum(), [layer.weight], checkpointed=[layer], autocast=torch.bfloat16)
    assert made.activations == X + 4  # the layer's input, and the loss


def test_the_meter_sees_views_and_updates_in_place_as_nothing_new():
    with Meter() as meter:
        x = tokens()
        x.add_(1)
        y = x[0].T
        assert meter.now == meter.peak == X
        del x, y
    assert meter.now == 0 and meter.peak == X
