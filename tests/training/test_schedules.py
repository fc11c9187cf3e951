"""Learning rates, worked by hand."""

import math

import pytest
import torch

from dcdd_core.training.schedules import set_learning_rate, warmup_cosine


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.3),
        (4, 1.5),
        (9, 3.0),  # the last update of the warm-up has the peak, and so has the first one after it
        (10, 3.0),
        (35, 3 * (0.02 + 0.49 * (1 + math.sqrt(0.5)))),  # a quarter of the way: cos 45 degrees
        (60, 3 * 0.51),  # half of the way
        (85, 3 * (0.02 + 0.49 * (1 - math.sqrt(0.5)))),
        (110, 0.06),
        (500, 0.06),
    ],
)
def test_the_rate_warms_up_and_decays_by_a_half_cosine(step, expected):
    assert warmup_cosine(step, 110, peak=3.0, warmup=10) == pytest.approx(expected, rel=1e-12)


def test_the_floor_and_the_warm_up_may_be_nothing_or_all():
    assert warmup_cosine(0, 100, peak=1.0, warmup=0) == 1.0
    assert warmup_cosine(100, 100, peak=1.0, warmup=0, floor=0.5) == pytest.approx(0.5)
    assert warmup_cosine(50, 100, peak=1.0, warmup=0, floor=0.5) == pytest.approx(0.75)
    assert warmup_cosine(3, 4, peak=1.0, warmup=8) == 0.5
    assert warmup_cosine(8, 8, peak=1.0, warmup=8) == 1.0
    assert warmup_cosine(9, 9, peak=1.0, warmup=8) == pytest.approx(0.02)  # a decay of one update


def test_a_rate_is_set_in_every_group_and_a_tensor_stays_the_same_one():
    first, second = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [first]}, {"params": [second], "lr": 7.0}], lr=3.0)
    held = optimizer.param_groups[1]["lr"] = torch.tensor(7.0)
    set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[1]["lr"] is held and float(held) == 0.25
