"""Matrices in 8 bits: what is stored, what comes back, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcdd_core.int8_rows import restored, rounded, to_int8


def test_a_row_of_zeros_stays_zeros():
    whole, scale = to_int8(torch.tensor([[0.0, 0.0], [127.0, -63.4]]))
    assert whole.tolist() == [[0, 0], [127, -63]] and scale.tolist() == [0.0, 1.0]


@given(seed=st.integers(0, 2**16), size=st.floats(1e-6, 1e6))
def test_a_matrix_comes_back_to_half_a_step_of_its_rows(seed, size):
    weight = size * torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
    tensors = {"w": weight, "bias": torch.tensor([0.1]), "count": torch.tensor(7)}
    stored = rounded(tensors, ["w"])
    assert {name: value.dtype for name, value in stored.items()} == {
        "w": torch.int8,
        "w_scale": torch.float32,
        "bias": torch.float16,
        "count": torch.int64,
    }
    found = restored(stored, remedy="")
    step = weight.abs().amax(1, keepdim=True) / 127
    assert set(found) == set(tensors) and found["w"].dtype == torch.float32
    assert ((found["w"] - weight).abs() <= 0.5001 * step).all()
    assert int(found["count"]) == 7 and torch.equal(found["bias"], tensors["bias"].half())


def test_a_name_of_nothing_is_not_passed_over():
    with pytest.raises(KeyError, match=r"no tensors \['v'\]"):
        rounded({"w": torch.ones(2, 2)}, ["v"])


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"w": torch.ones(2, 3, dtype=torch.int8)}, r"w as torch.int8 \[2, 3\]; expected floats, or int8 rows"),
        ({"w": torch.ones(2, 3, dtype=torch.int8), "w_scale": torch.ones(3)}, "one scale each"),
        ({"w": torch.ones(6, dtype=torch.int8), "w_scale": torch.ones(6)}, r"torch.int8 \[6\]"),
        ({"w": torch.ones(2, 3, dtype=torch.int32), "w_scale": torch.ones(2)}, "w as torch.int32"),
        ({"w": torch.ones(2, 3), "w_scale": torch.ones(2)}, "has w_scale and no int8 tensor for it"),
        ({"w_scale": torch.ones(2)}, "has w_scale and no int8 tensor for it"),
    ],
)
def test_what_does_not_fit_together_is_refused(tensors, words):
    with pytest.raises(ValueError, match=f"{words}.*fetch it again"):
        restored(tensors, remedy="fetch it again")
