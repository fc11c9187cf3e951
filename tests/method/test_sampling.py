"""Guidance, filters and Gumbel-max draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from dcdd_core.method.sampling import (
    _splitmix64,
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
    for g in (5.0, 1.0, 0.0, -1.0):
        found = guide(torch.tensor([0.0, -INF, 1.0, -INF]), torch.tensor([0.0, 1.0, -INF, -INF]), g)
        assert found.tolist() == [0.0, -INF, -INF, -INF]


def test_guidance_and_temperature_are_numpys():
    conditional, unconditional = rand(3, 40), rand(3, 40, seed=1)
    for g in (-1.0, 0.5, 3.0, 20.0):
        c, u = conditional.double().numpy(), unconditional.double().numpy()
        found = guide(conditional, unconditional, g)
        np.testing.assert_allclose(found.numpy(), u + g * (c - u), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(temper(conditional, 0.7).numpy(), c / 0.7, rtol=1e-6)
    half = rand(3, 40).half()
    for changed in (guide(half, half, 1.0), temper(half, 0.7), temper(half, 0), top_k(half, 3), top_p(half, 0.4)):
        assert changed.dtype == torch.float32


@pytest.mark.parametrize("k", [1, 7, 40, 50])
def test_top_k_is_numpys(k):
    logits = rand(5, 40).round(decimals=1)  # with ties
    found = top_k(logits, k).numpy()
    for row, before in zip(found, logits.numpy()):
        smallest = np.sort(before)[::-1][min(k, 40) - 1]
        np.testing.assert_array_equal(row, np.where(before >= smallest, before, -np.inf))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_is_numpys(p):
    logits = 2 * rand(5, 40)
    found = top_p(logits, p).numpy()
    for row, before in zip(found, logits.double().numpy()):
        share = np.exp(before) / np.exp(before).sum()
        order = np.argsort(-share)
        needed = int(np.searchsorted(np.cumsum(share[order]), p)) + 1
        assert set(np.flatnonzero(np.isfinite(row))) == set(order[:needed])
        expected = np.full(40, -np.inf, np.float32)
        expected[order[:needed]] = before[order[:needed]]
        np.testing.assert_array_equal(row, expected)


def test_top_p_keeps_the_first_of_equal_codes_and_no_more_than_needed():
    assert kept(top_p(torch.zeros(1, 32), 0.5)) == [list(range(16))]


def test_one_is_all_codes_however_small():
    logits = torch.tensor([[50.0, 0.0, -50.0]])
    assert torch.equal(top_p(logits, 1), logits) and torch.equal(top_p(logits, 1.0), logits)


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


def test_noise_of_one_code_at_the_first_position():
    assert gumbel_noise(0, 0, 1).isfinite().tolist() == [True]


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


@pytest.mark.parametrize("seed", [0, 2**40 + 3])
def test_draws_over_positions_pass_a_chi_square_test(seed):
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -2.0])
    draws, p = 3000, logits.double().softmax(-1).numpy()
    noise = gumbel_noise_grid([seed], range(draws), 6)[0]
    counts = gumbel_max(logits.expand(draws, 6), noise)[1].bincount(minlength=6).numpy()
    assert stats.chisquare(counts, p * draws).pvalue > 0.001
    # ... and so do draws of one position over the seeds.
    counts = gumbel_max(logits, gumbel_noise_grid(range(seed, seed + draws), [7], 6)[:, 0])[1].bincount(minlength=6)
    assert stats.chisquare(counts.numpy(), p * draws).pvalue > 0.001


def test_noise_passes_a_kolmogorov_smirnov_test():
    assert stats.kstest(gumbel_noise(5, 11, 20000).numpy(), "gumbel_r").pvalue > 0.001


def test_the_largest_of_many_is_not_cut_off():
    """The largest of a million standard Gumbel numbers is near ln(1e6) = 13.8, and no two of the largest are equal."""
    largest = gumbel_noise(0, 0, 1_000_000).topk(50).values
    assert 11 < largest[0] < 25 and len(set(largest.tolist())) == 50


def test_keys_are_mixed_by_splitmix64():
    """The published outputs of SplitMix64 for the seed 1234567."""
    state, gamma = 1234567, 0x9E3779B97F4A7C15
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [_splitmix64(state + i * gamma) for i in range(5)] == expected


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
