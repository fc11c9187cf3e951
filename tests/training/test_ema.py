"""The EMA of weights, against its recursion in float64 and by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from dcdd_core.training.ema import EMA, all_finite


def weights_of(*values, dtype=torch.float32):
    return {f"w{k}": nn.Parameter(torch.tensor(value, dtype=dtype)) for k, value in enumerate(values)}


def set_to(weights, value):
    for weight in weights.values():
        nn.init.constant_(weight, value)


@pytest.mark.parametrize(
    ("decay", "expected"),
    # Updates with 1, 2 and 4: a copy, then decays of 2/11 and 3/12, or less.
    [(0.999, [1, 20 / 11, 5 / 11 + 3]), (0.2, [1, 20 / 11, 4 / 11 + 3.2]), (0.1, [1, 1.9, 3.79]), (0.0, [1, 2, 4])],
)
def test_the_first_updates_by_hand(decay, expected):
    weights = weights_of([5.0])
    ema, found = EMA(weights, decay), []
    for value in (1.0, 2.0, 4.0):
        set_to(weights, value)
        ema.update()
        found.append(float(ema.full()["w0"]))
    assert found == pytest.approx(expected, rel=1e-6)


def test_many_updates_are_the_recursion_in_float64():
    weights = {"a": nn.Parameter(torch.zeros(3, 4)), "b": nn.Parameter(torch.zeros(5))}
    ema, decay = EMA(weights, 0.95), 0.95
    values = np.random.default_rng(0).normal(size=(300, 17))
    expected = None
    for n, row in enumerate(values):
        with torch.no_grad():
            weights["a"].copy_(torch.tensor(row[:12].reshape(3, 4)))
            weights["b"].copy_(torch.tensor(row[12:]))
        ema.update()
        kept = min(decay, (1 + n) / (10 + n))
        expected = row if expected is None else kept * expected + (1 - kept) * row
    found = ema.full()
    np.testing.assert_allclose(found["a"].double().numpy().ravel(), expected[:12], atol=1e-5)
    np.testing.assert_allclose(found["b"].double().numpy(), expected[12:], atol=1e-5)


def test_it_forgets_its_start_and_then_keeps_its_decay():
    weights = weights_of([100.0])
    ema = EMA(weights, 0.999)
    ema.update()
    set_to(weights, 1.0)
    for _ in range(300):
        ema.update()
    assert float(ema.full()["w0"]) == pytest.approx(1.0, abs=0.01)  # with .999 throughout: 74
    for _ in range(10_000):
        ema.update()
    set_to(weights, 2.0)
    ema.update()
    assert float(ema.full()["w0"]) == pytest.approx(1.001, abs=1e-5)


def test_it_averages_in_float32_whatever_the_weights_are_in():
    weights = weights_of([1.0], dtype=torch.bfloat16)
    ema = EMA(weights, 0.999)
    for value in (1.0, 2.0, 3.0):
        set_to(weights, value)
        ema.update()
    (found,) = ema.full().values()
    assert found.dtype == torch.float32 and float(found) == pytest.approx(5 / 11 + 2.25, rel=1e-6)


def test_the_weights_are_swapped_back_even_after_an_error():
    weights = weights_of([1.0, 2.0], [3.0])
    ema = EMA(weights, 0.0)
    ema.update()
    set_to(weights, 9.0)
    with pytest.raises(KeyboardInterrupt), ema.swapped_in():
        assert weights["w0"].tolist() == [1, 2] and weights["w1"].tolist() == [3]
        raise KeyboardInterrupt
    assert weights["w0"].tolist() == [9, 9]
    ema.apply()
    assert weights["w0"].tolist() == [1, 2]


def test_a_restored_one_continues_exactly():
    weights = weights_of([0.3], [0.1, -0.7])
    ema = EMA(weights, 0.9)
    for k in range(4):
        set_to(weights, 0.37 * k)
        ema.update()
    other = EMA(weights_of([0.0], [0.0, 0.0]), 0.9)
    other.load_state_dict(ema.state_dict())
    other.weights["w0"].data, other.weights["w1"].data = weights["w0"].data, weights["w1"].data
    for k in range(12):
        set_to(weights, -0.11 * k)
        ema.update(), other.update()
    for name, value in ema.full().items():
        assert torch.equal(value, other.full()[name])
    for held in (ema.full()["w0"], *ema.shards()):
        assert not held.requires_grad


def test_what_was_taken_from_it_does_not_follow_later_updates():
    weights = weights_of([1.0])
    ema = EMA(weights, 0.0)
    ema.update()
    taken = ema.full()["w0"]
    set_to(weights, 5.0)
    ema.update()
    assert float(taken) == 1 and float(ema.full()["w0"]) == 5


@pytest.mark.parametrize(("bad", "finite"), [(1.0, True), (float("nan"), False), (float("-inf"), False)])
def test_one_number_that_is_not_finite_is_found(bad, finite):
    assert all_finite([torch.zeros(3), torch.tensor([[0.0, bad]])]) is finite


def test_the_weights_are_swapped_without_a_copy(monkeypatch):
    weights = weights_of([1.0, 2.0], [3.0])
    ema = EMA(weights, 0.0)
    ema.update()
    set_to(weights, 9.0)
    before = [weight.data_ptr() for weight in weights.values()]
    monkeypatch.setattr(ema._ema, "store", lambda _: pytest.fail("copied"))
    with ema.swapped_in():
        assert weights["w0"].tolist() == [1, 2] and float(weights["w1"]) == 3
    assert [weight.data_ptr() for weight in weights.values()] == before and weights["w0"].tolist() == [9, 9]
    assert ema.full()["w0"].tolist() == [1, 2]


def test_weights_in_half_precision_are_swapped_too():
    weights = weights_of([1.0], dtype=torch.bfloat16)
    ema = EMA(weights, 0.0)
    ema.update()
    set_to(weights, 9.0)
    with ema.swapped_in():
        assert float(weights["w0"]) == 1 and weights["w0"].dtype == torch.bfloat16
    assert float(weights["w0"]) == 9
