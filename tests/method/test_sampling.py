"""Guidance, filters and Gumbel-max draws."""

from __future__ import annotations

import pytest
import torch

from dcdd_core.method.sampling import (
    guide,
    gumbel_max,
    gumbel_noise,
    gumbel_noise_grid,
    keyed_generator,
    temper,
    top_k,
    top_p,
)

INF = torch.inf
LOGITS = torch.tensor([[0.1, 0.4, 0.2, 0.3], [1.0, 1.0, 2.0, 0.0]]).log()


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kept(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_guidance():
    conditional, unconditional = rand(2, 5), rand(2, 5, seed=1)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(guide(conditional, unconditional, 5.0), 5 * conditional - 4 * unconditional)
    half = guide(conditional.bfloat16(), unconditional.bfloat16(), 5.0)
    torch.testing.assert_close(half, 5 * conditional.bfloat16().float() - 4 * unconditional.bfloat16().float())


def test_guidance_keeps_barred_codes_barred():
    found = guide(torch.tensor([0.0, -INF, 1.0, -INF]), torch.tensor([0.0, 1.0, -INF, -INF]), 5.0)
    assert found.tolist() == [0.0, -INF, -INF, -INF]


def test_temperature():
    torch.testing.assert_close(temper(LOGITS, 0.5), 2 * LOGITS)
    assert kept(temper(LOGITS, 0)) == [[1], [2]]
    assert kept(temper(torch.zeros(1, 3), 0)) == [[0]]


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1, [[1], [2]]),
        (2, [[1, 3], [0, 1, 2]]),
        (3, [[1, 2, 3], [0, 1, 2]]),
        (9, [[0, 1, 2, 3], [0, 1, 2]]),
        (0, [[0, 1, 2, 3], [0, 1, 2]]),
        (None, [[0, 1, 2, 3], [0, 1, 2]]),
    ],
)
def test_top_k(k, expected):
    assert kept(top_k(LOGITS, k)) == expected


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (1e-9, [[1], [2]]),
        (0.39, [[1], [2]]),
        (0.45, [[1, 3], [2]]),
        (0.65, [[1, 3], [0, 2]]),
        (0.8, [[1, 2, 3], [0, 1, 2]]),
        (1, [[0, 1, 2, 3], [0, 1, 2]]),
        (None, [[0, 1, 2, 3], [0, 1, 2]]),
    ],
)
def test_top_p(p, expected):
    assert kept(top_p(LOGITS, p)) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda x: temper(x, 0.7),
        lambda x: top_k(x, 2),
        lambda x: top_p(x, 0.6),
        lambda x: top_k(x, 0),
        lambda x: top_p(x, 1),
    ],
)
def test_input_is_not_touched_or_returned(change):
    before = rand(3, 6)
    logits = before.clone()
    found = change(logits)
    found.zero_()
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: guide(rand(2, 5), rand(2, 4), 1.0), "one shape"),
        (lambda: guide(rand(2, 5), rand(2, 5), float("nan")), "finite"),
        (lambda: temper(LOGITS, -1), "temperature"),
        (lambda: temper(LOGITS, float("nan")), "temperature"),
        (lambda: temper(LOGITS, INF), "temperature"),
        (lambda: top_k(LOGITS, -1), "top_k"),
        (lambda: top_k(LOGITS, 2.5), "top_k"),
        (lambda: top_p(LOGITS, 0.0), "top_p"),
        (lambda: top_p(LOGITS, 1.1), "top_p"),
        (lambda: top_p(LOGITS, float("nan")), "top_p"),
        (lambda: gumbel_noise(0, -1, 4), "position"),
        (lambda: gumbel_noise(0, 0, 0), "code"),
    ],
)
def test_refuses(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_noise_is_a_function_of_seed_and_position_only():
    state = torch.get_rng_state()
    first = gumbel_noise(7, 3, 50)
    gumbel_noise(8, 3, 50)
    assert torch.equal(first, gumbel_noise(7, 3, 50)) and first.dtype == torch.float32
    assert torch.equal(state, torch.get_rng_state())
    noises = {tuple(gumbel_noise(s, p, 4).tolist()) for s in (0, 1, 2, -1, 2**32, 2**40, 2**63) for p in range(20)}
    assert len(noises) == 7 * 20
    found = gumbel_noise_grid([7, 8], [0, 3, 5], 50)
    assert found.shape == (2, 3, 50) and torch.equal(found[0, 1], first)


def test_noise_stays_what_it_was():
    # Pictures of a seed must outlive a change of the code: numbers, not identities.
    expected = torch.tensor([0.241371, 0.315519, 0.010082])
    torch.testing.assert_close(gumbel_noise(1234, 56, 3), expected)


def test_noise_is_gumbel_and_independent_over_positions():
    noise = gumbel_noise_grid([0, 1], range(10), 4000)
    assert noise.isfinite().all()
    # Mean: Euler's constant; variance: pi^2 / 6; standard errors 0.0045 and about 0.01.
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(1.6449, abs=0.05)
    correlations = torch.corrcoef(noise.reshape(20, -1)) - torch.eye(20)
    assert correlations.abs().max() < 0.08


def test_draws_follow_the_softmax():
    logits = torch.tensor([0.5, 0.3, 0.2, 0.0]).log()
    noise = gumbel_noise_grid([0], range(4000), 4)[0]
    shares = gumbel_max(logits.expand(4000, 4), noise)[1].bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, logits.exp(), atol=0.03, rtol=0)
    assert shares[3] == 0


def test_a_batch_is_its_singles_and_greedy_ignores_the_noise():
    logits, noise = 2 * rand(5, 30), gumbel_noise_grid(range(5), [9], 30)[:, 0]
    tokens = gumbel_max(logits, noise)[1]
    assert tokens.tolist() == [gumbel_max(logits[i : i + 1], noise[i : i + 1])[1].item() for i in range(5)]
    assert tokens.dtype == torch.int64 and tokens.tolist() != logits.argmax(-1).tolist()
    assert torch.equal(gumbel_max(temper(logits, 0), noise)[1], logits.argmax(-1))


def test_a_draw_from_broken_logits_has_a_maximum_that_is_not_finite():
    noise = rand(2, 4)
    assert gumbel_max(LOGITS, noise)[0].isfinite().all() and gumbel_max(LOGITS.half(), noise)[0].dtype == torch.float32
    one_nan = LOGITS.masked_fill(torch.tensor([False, True, False, False]), torch.nan)
    for broken in (one_nan, torch.full((2, 4), INF), torch.full((2, 4), -INF)):
        assert not gumbel_max(broken, noise)[0].isfinite().any()


def test_generators_of_different_keys_differ_beyond_32_bits():
    keys = ((0, 1), (1, 0), (0,), (0, 1, 0), (1 << 32,), (-1,))
    draws = [torch.randint(1 << 60, (1,), generator=keyed_generator(*key)).item() for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws[0] == torch.randint(1 << 60, (1,), generator=keyed_generator(0, 1)).item()
