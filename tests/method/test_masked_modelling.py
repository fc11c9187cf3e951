"""Hidden positions, wrong tokens and losses of masked training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dcdd_core.method import masked_modelling
from dcdd_core.method.masked_modelling import (
    hidden_shares,
    importance_loss,
    is_measured,
    measured_importance,
    nearest,
    neighbours,
    pick,
    position_weights,
    shuffled,
    token_losses,
    weighted_mean,
)
from dcdd_core.method.progressive import SCHEDULES, revealed_share


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shares_follow_the_arccos():
    u = torch.rand(20_000, generator=draw())
    shares = hidden_shares(u)
    np.testing.assert_allclose(shares.numpy(), np.arccos(u.numpy()) * 2 / np.pi, rtol=1e-5)
    # P(share < s) = 1 - cos(pi s / 2)
    for s in (0.1, 0.5, 0.9):
        assert float((shares < s).float().mean()) == pytest.approx(1 - math.cos(math.pi * s / 2), abs=0.01)


@given(seed=st.integers(0, 2**31), shares=st.lists(st.floats(0, 1), min_size=1, max_size=4), count=st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_a_share_of_what_is_there_is_picked(seed, shares, count):
    among = torch.rand(len(shares), count, generator=draw(seed)) < 0.7
    chosen = pick(torch.tensor(shares), among, draw(seed + 1))
    assert not (chosen & ~among).any()
    for row, share, of in zip(chosen, shares, among.sum(1).tolist()):
        assert abs(int(row.sum()) - share * of) <= 0.5 + 1e-4


def test_every_position_is_picked_as_often():
    chosen = pick(torch.full((4000,), 0.25), torch.ones(4000, 8, dtype=torch.bool), draw())
    assert (chosen.float().mean(0) - 0.25).abs().max() < 0.03
    assert torch.equal(chosen, pick(torch.full((4000,), 0.25), torch.ones(4000, 8, dtype=torch.bool), draw()))


def test_shuffled_tokens_are_the_same_tokens():
    tokens = torch.randint(0, 99, (5, 30), generator=draw())
    found = shuffled(tokens, draw(1))
    assert torch.equal(found.sort(1).values, tokens.sort(1).values)
    assert all(not torch.equal(a, b) for a, b in zip(found, tokens))
    orders = shuffled(torch.arange(30).expand(5, -1), draw(1))
    assert len({tuple(row.tolist()) for row in orders}) == 5, "each image in an order of its own"


def test_neighbours_are_the_nearest_codes():
    vectors = F.normalize(torch.randn(20, 3, generator=draw()), dim=1)
    found = neighbours(vectors, 4)
    for code in range(20):
        cosines = [(float(vectors[code] @ vectors[other]), other) for other in range(20) if other != code]
        assert set(found[code].tolist()) == {other for _, other in sorted(cosines, reverse=True)[:4]}
    tokens = torch.randint(0, 20, (50, 40), generator=draw(1))
    wrong = nearest(tokens, found, draw(2))
    assert (wrong != tokens).all() and (found[tokens] == wrong[..., None]).any(-1).all()
    assert all((wrong == found[tokens][..., m]).float().mean() > 0.2 for m in range(4)), "one as often as another"
    assert torch.equal(neighbours(vectors, 1), found[:, :1]) and neighbours(vectors, 19).shape == (20, 19)
    for count in (0, 20):
        with pytest.raises(ValueError, match=r"count must lie in 1\.\.19"):
            neighbours(vectors, count)


def test_the_loss_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [0.0, math.log(3)], [0.0, 0.0]]])
    tokens = torch.tensor([[0, 1, 1]])
    losses = token_losses(logits, tokens)
    torch.testing.assert_close(losses, torch.tensor([[math.log(2), math.log(4 / 3), math.log(2)]]))
    assert token_losses(logits.bfloat16(), tokens).dtype == torch.float32, "autocast gives halves"
    torch.testing.assert_close(token_losses(logits.bfloat16(), tokens), losses, rtol=0, atol=2e-3)
    hidden, wrong = torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]])
    weights = position_weights(hidden, wrong)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 1.0, 0.1]]))
    expected = (math.log(2) + math.log(4 / 3) + 0.1 * math.log(2)) / 2.1
    assert float(weighted_mean(losses, weights)) == pytest.approx(expected, rel=1e-6)
    assert float(weighted_mean(losses, torch.zeros(1, 3))) == 0
    assert float(weighted_mean(torch.tensor([2.0]), torch.tensor([0.1]))) == pytest.approx(2)
    assert float(weighted_mean(losses, weights, 8.4)) == pytest.approx(expected / 4, rel=1e-6), "a part of a mean"


def test_importance_by_hand():
    hidden = torch.tensor([[True, True, True, False], [True, False, False, False]])
    revealed = torch.tensor([[True, False, False, False], [True, False, False, False]])
    before = torch.tensor([[9.0, 3.0, 2.0, 5.0], [1.0, 1.0, 1.0, 1.0]])
    after = torch.tensor([[0.0, 1.0, 1.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    measured = measured_importance(before, after, hidden, revealed)
    assert measured.tolist() == [2.5, 0.0], "of what stays hidden alone"
    two = revealed | torch.tensor([[False, True, False, False], [False] * 4])
    of_two = measured_importance(before, after, hidden, two)
    assert of_two.tolist() == [0.25, 0.0]
    predicted = torch.tensor([[4.5, 7.0, 7.0, 7.0], [8.0, 7.0, 7.0, 7.0]])
    # |4.5 - 2.5| - 0.5; the second image has nothing left to lose.
    assert float(importance_loss(predicted, measured, hidden, revealed)) == pytest.approx(1.5)
    assert float(importance_loss(predicted, measured, hidden, torch.zeros_like(hidden))) == 0
    assert float(importance_loss(predicted, measured, hidden, revealed, 0.5)) == pytest.approx(3.0)
    assert is_measured(hidden, revealed).tolist() == [True, False]
    assert is_measured(hidden, torch.zeros_like(hidden)).tolist() == [False, False]
    # |(4.5 + 7) / 2 - 0.25| - 0.5
    assert float(importance_loss(predicted, of_two, hidden, two)) == pytest.approx(5.0)
    twice = [torch.cat([part[:1], part]) for part in (predicted, of_two, hidden, two)]
    assert float(importance_loss(*twice)) == pytest.approx(5.0), "the mean over images that count"


def test_schedules_of_hidden_shares_have_their_means():
    u = (torch.arange(10_000) + 0.5) / 10_000
    for schedule, mean in (("arccos", 2 / torch.pi), ("cosine", 2 / torch.pi), ("linear", 0.5)):
        shares = masked_modelling.hidden_shares(u, schedule)
        assert float(shares.min()) >= 0 and float(shares.max()) <= 1
        assert float(shares.mean()) == pytest.approx(mean, abs=1e-3)
    nearly_all = [(masked_modelling.hidden_shares(u, name) > 0.95).float().mean() for name in ("cosine", "arccos")]
    assert nearly_all[0] > 2 * nearly_all[1]
    with pytest.raises(ValueError, match="must be one of arccos, cosine, linear, got 'square'"):
        masked_modelling.hidden_shares(u, "square")


def test_training_hides_what_sampling_has_not_revealed():
    """A schedule of one name means the same in both, in the same direction."""
    assert set(masked_modelling.HIDDEN_SHARES) == set(SCHEDULES)
    for schedule in SCHEDULES:
        for t in (0.0, 0.125, 0.5, 0.875, 1.0):
            hidden = float(hidden_shares(torch.tensor(t, dtype=torch.float64), schedule))
            assert hidden == pytest.approx(1 - revealed_share(t, schedule), abs=1e-9)


def test_codes_are_compared_a_part_at_a_time(monkeypatch):
    vectors = torch.nn.functional.normalize(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    whole = masked_modelling.neighbours(vectors, 3)
    monkeypatch.setattr(masked_modelling, "_CHUNK", 7)
    assert torch.equal(masked_modelling.neighbours(vectors, 3), whole)
    assert not (whole == torch.arange(50)[:, None]).any()
