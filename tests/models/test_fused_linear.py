"""Linear layers that share what they read, and the threads."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dcdd_core.models import fused_linear as columns
from dcdd_core.models.fused_linear import FusedLinear, fuse_weights

CPU = torch.device("cpu")


class Own(nn.Linear):
    """A host's."""


def layers(*sizes, inputs=48, bias=False, kind=nn.Linear):
    torch.manual_seed(0)
    return [kind(inputs, size, bias=bias) for size in sizes]


@pytest.fixture(params=[1, 2, 3, 16])
def threads(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(64,), (128, 128, 64), (7, 5), (192, 192)])
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_they_give_what_each_gives(threads, sizes, rows):
    plain = layers(*sizes)
    x, before = torch.randn(rows, 48), [layer.weight.clone() for layer in plain]
    expected = [layer(x) for layer in plain]
    fuse_weights(plain)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(plain, before))
    together = FusedLinear(plain, resident=False, device=CPU)
    parts, inputs, each = together.parts.shape
    assert parts <= threads and inputs == 48 and parts * each == sum(sizes)
    assert parts == 1 or each >= columns.MIN_COLUMNS
    for made, wanted in zip(together(x), expected, strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)
    storages = {layer.weight.untyped_storage().data_ptr() for layer in plain}
    assert storages == {together.parts.untyped_storage().data_ptr()}, "no weight is there twice"


def test_every_thread_takes_a_part(threads):
    group = layers(1024)
    fuse_weights(group)
    assert len(FusedLinear(group, resident=False, device=CPU).parts) == {1: 1, 2: 2, 3: 2, 16: 16}[threads]


def test_without_mkl_there_is_one(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    group = layers(1024)
    fuse_weights(group)
    assert len(FusedLinear(group, resident=False, device=CPU).parts) == 1


def test_rows_elsewhere_are_for_the_layers():
    """Such as those of a host that fetches its weights from the CPU for each call."""
    group = layers(64, 64, kind=Own)
    fuse_weights(group)
    assert FusedLinear(group, resident=True, device=torch.device("meta")).parts is None


class Operators(TorchDispatchMode):
    """Notes the names of what is called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
@pytest.mark.parametrize(
    ("rows", "inputs", "onednn"), [(3, 1024, False), (4, 1024, True), (40, 1024, True), (40, 1023, False)]
)
def test_onednn_multiplies_many_rows_with_large_weights(monkeypatch, rows, inputs, onednn):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    plain = layers(768, 128, 128, inputs=inputs)
    x = torch.randn(rows, inputs)
    expected = [layer(x) for layer in plain]
    fuse_weights(plain)
    together = FusedLinear(plain, resident=False, device=CPU)
    with Operators() as called:
        found = together(x)
    assert any("_linear_pointwise" in name for name in called.names) == onednn
    for made, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert FusedLinear(plain, resident=False, device=CPU).weight is None


@torch.no_grad()
@pytest.mark.parametrize("least", [columns.ONEDNN_WEIGHTS, 0])
@pytest.mark.parametrize("rows", [2, 40])
def test_weights_that_change_are_seen(monkeypatch, least, rows):
    monkeypatch.setattr(columns, "ONEDNN_WEIGHTS", least)
    group, x = layers(64, 64), torch.randn(rows, 48)
    fuse_weights(group)
    together = FusedLinear(group, resident=False, device=CPU)
    group[1].weight.mul_(2)
    torch.testing.assert_close(together(x)[1], group[1](x), rtol=1e-5, atol=1e-5)


def moved(group):
    group[1].weight = nn.Parameter(group[1].weight.clone())


def swapped(group):
    group.reverse()


def elsewhere(group):
    for layer in group:
        layer.to("meta")


@pytest.mark.parametrize("change", [moved, swapped, elsewhere, lambda group: group.pop(0)])
def test_others_are_called_by_themselves(change):
    group = layers(64, 64, 64)
    fuse_weights(group)
    change(group)
    assert FusedLinear(group, resident=False, device=CPU).parts is None


def test_copies_and_biased_ones_too():
    group = layers(64, 64)
    fuse_weights(group)
    assert FusedLinear(copy.deepcopy(group), resident=False, device=CPU).parts is None
    group = layers(64, 64, bias=True)
    fuse_weights(group)
    assert FusedLinear(group, resident=False, device=CPU).parts is None


def test_a_host_s_layers_are_called_unless_it_says_that_they_are_torch_s():
    group = layers(64, 64, kind=Own)
    fuse_weights(group)
    assert FusedLinear(group, resident=False, device=CPU).parts is None
    assert FusedLinear(group, resident=True, device=CPU).parts is not None
    assert FusedLinear([nn.Identity()], resident=True, device=CPU).parts is None
