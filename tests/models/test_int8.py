"""Linear weights in 8 bits."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dcdd_core.models.checkpoints import fingerprint_of
from dcdd_core.models.int8 import store_in_int8


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 8, bias=False))


def test_linear_weights_are_rounded_and_nothing_else():
    pytest.importorskip("torchao", reason="torchao is not installed")
    plain, small, x = layers(), layers(), torch.randn(4, 32)
    store_in_int8(small, "cpu")
    rounded = {name for name, weight in small.named_parameters() if type(weight.data) is not torch.Tensor}
    assert rounded == {"0.weight", "2.weight"}
    with torch.no_grad():
        error = (small(x) - plain(x)).std() / plain(x).std()
    assert 0 < error < 0.02


def test_nothing_is_set_for_the_process_and_the_device_is_said(monkeypatch):
    calls = []
    quantization = SimpleNamespace(
        Int8WeightOnlyConfig=lambda **options: options, quantize_=lambda *args, **options: calls.append((args, options))
    )
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(quantization=quantization))
    monkeypatch.setitem(sys.modules, "torchao.quantization", quantization)
    model = layers()
    store_in_int8(model, "meta")
    told = {"set_inductor_config": False}
    assert calls == [((model[number], told), {"device": "meta"}) for number in (0, 2)]
    assert {weight.device.type for weight in model.parameters()} == {"meta"}


def test_narrow_weights_are_widened_one_by_one_as_they_are_rounded(monkeypatch):
    """All of them at once would take twice the memory of their file."""
    model, seen = layers().to(torch.bfloat16), []
    model[1].to(torch.float32)

    def rounding(linear: nn.Linear, *_: object, **options: object) -> None:
        seen.append([model[number].weight.dtype for number in (0, 2)])
        linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)

    quantization = SimpleNamespace(Int8WeightOnlyConfig=lambda **options: options, quantize_=rounding)
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(quantization=quantization))
    monkeypatch.setitem(sys.modules, "torchao.quantization", quantization)
    store_in_int8(model, "cpu")
    assert seen == [[torch.float32, torch.bfloat16], [torch.int8, torch.float32]]
    seen.clear()
    wide = layers()
    wide[1].to(torch.float16)  # as T5 keeps one of its layers
    model = wide
    store_in_int8(model, "cpu")
    assert seen == [[torch.float32, torch.float32], [torch.int8, torch.float32]], "nothing becomes narrower"


def test_without_torchao_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"need torchao \(.*\): pip install .* without int8 and eight_bit$"):
        store_in_int8(layers(), "cpu")


def test_a_fingerprint_of_rounded_weights_is_that_of_what_they_stand_for():
    """torchao's tensors cannot be sliced once they are flat."""

    class Rounded(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.dequantize:
                return torch.arange(4.0)
            if function in (torch.Tensor.flatten, torch.Tensor.__getitem__):
                raise NotImplementedError("dispatch: aten.view")
            return super().__torch_function__(function, types, args, kwargs or {})

    Rounded.__module__ = "torchao.quantization"
    held = torch.zeros(4, dtype=torch.int8).as_subclass(Rounded)
    assert fingerprint_of({"w": held}) == fingerprint_of({"w": torch.arange(4.0)})
