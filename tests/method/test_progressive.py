"""Schedules, orders, noise and revision of progressive sampling."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import qmc

from dcdd_core.method.progressive import (
    ORDERS,
    SCHEDULES,
    OrderState,
    ProgressiveOptions,
    Stage,
    guidance_ramp,
    halton_places,
    order_noise,
    order_scores,
    redrawn,
    reveal,
    revealed_share,
    stage_counts,
    stage_rows,
)
from dcdd_core.method.sampling import gumbel_noise
from dcdd_core.protocols import SamplingOptions


def state(batch: int = 2, grid=(3, 4), seed: int = 0) -> OrderState:
    draw, count = torch.Generator().manual_seed(seed), grid[0] * grid[1]
    parts = [torch.randn(batch, count, generator=draw) for _ in range(3)]
    return OrderState(
        grid=grid,
        noise=order_noise(range(batch), count),
        log_probability=-parts[0].abs(),
        quantisation_error=parts[1],
        importance=parts[2],
    )


def test_shares_are_the_published_ones():
    for t in np.linspace(0, 1, 7):
        assert revealed_share(t, "linear") == pytest.approx(t)
        # MaskGIT masks the share cos(pi t / 2), Halton-MaskGIT 2 arccos(t) / pi.
        assert 1 - revealed_share(t, "cosine") == pytest.approx(np.cos(np.pi * t / 2), abs=1e-12)
        assert 1 - revealed_share(t, "arccos") == pytest.approx(2 * np.arccos(t) / np.pi, abs=1e-12)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="t must lie in"):
            revealed_share(wrong, "linear")
    with pytest.raises(ValueError, match="schedule must be one of cosine, arccos, linear"):
        revealed_share(0.5, "sine")


def test_counts_of_pico_by_hand():
    assert stage_counts(144, 4, "linear") == (36, 36, 36, 36)
    # floor(144 (1 - cos(pi i / 8)) + 1/2): 11, 42, 89, 144
    assert stage_counts(144, 4, "cosine") == (11, 31, 47, 55)
    # floor(144 (1 - 2 acos(i / 4) / pi) + 1/2): 23, 48, 78, 144
    assert stage_counts(144, 4, "arccos") == (23, 25, 30, 66)
    assert stage_counts(144, 8, "cosine") == (3, 8, 13, 18, 22, 25, 27, 28)
    assert stage_counts(144, 8, "arccos") == (11, 12, 12, 13, 14, 16, 20, 46)
    assert stage_counts(5, 8, "linear") == (0, 0, 0, 1, 1, 1, 1, 1)
    assert stage_counts(0, 3, "cosine") == (0, 0, 0)
    assert stage_counts(10, 10, "cosine") == (1,) * 10
    assert stage_counts(144, 4, (44, 0, 100, 0)) == (44, 0, 100, 0)
    assert stage_counts(10, 3, (0.5, 0.0, 0.5)) == (5, 0, 5)
    assert stage_counts(7, 2, (1e-9, 1.0)) == (0, 7)


@given(count=st.integers(0, 600), passes=st.integers(1, 80), schedule=st.sampled_from(SCHEDULES))
@settings(max_examples=200, deadline=None)
def test_every_pass_reveals_something_and_all_is_revealed(count, passes, schedule):
    counts = stage_counts(count, passes, schedule)
    assert len(counts) == passes and sum(counts) == count
    assert counts[max(0, passes - count) :] == tuple(c for c in counts if c > 0), "the last passes, each at least one"
    if count < passes:
        return
    ends = np.cumsum(counts)
    wanted = np.array([revealed_share(i / passes, schedule) for i in range(1, passes + 1)]) * count
    # Off the schedule only where it asks for less than one a pass.
    assert all(abs(end - share) <= 0.5 + 1e-9 or end <= i or end >= count - passes + i
               for i, (end, share) in enumerate(zip(ends, wanted), 1))  # fmt: skip


@given(
    count=st.integers(0, 600),
    weights=st.lists(st.floats(0, 1e6) | st.just(0.0), min_size=1, max_size=30).filter(any),
)
@settings(max_examples=200, deadline=None)
def test_a_list_is_kept_to_the_nearest_position(count, weights):
    counts = stage_counts(count, len(weights), tuple(weights))
    assert sum(counts) == count and min(counts) >= 0
    assert all(number == 0 for number, weight in zip(counts, weights) if weight == 0)
    ends, wanted = np.cumsum(counts), np.cumsum(weights) / np.sum(weights) * count
    assert np.abs(ends - wanted).max() <= 0.5 + 1e-6 * max(1, count)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((-1, 3), "count must be a whole number of at least 0"),
        ((9, 0), "passes must be a whole number in 1..4,096"),
        ((9, 2.0), "passes must be a whole number"),
        ((9, 2, "sine"), "schedule must be one of"),
        ((9, 2, (1.0,)), "schedule has 1 numbers for 2 revealing passes"),
        ((9, 2, (0.0, 0.0)), "only zeros"),
        ((9, 2, (1e300, 1e300)), "schedule"),
        ((9, 2, (1.0, -1.0)), r"schedule\[1\] must be a finite number in 0..1,000,000,000"),
        ((9, 2, {1.0, 2.0}), "a list of numbers"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        stage_counts(*arguments)


def test_guidance_ramps_from_the_prompt_alone():
    assert guidance_ramp(3.0, 5) == (1.0, 1.5, 2.0, 2.5, 3.0)
    assert guidance_ramp(0.0, 3) == (1.0, 0.5, 0.0)
    assert guidance_ramp(3.0, 1) == (3.0,)
    options = ProgressiveOptions(guidance=3.0, passes=5, revision_passes=2)
    assert options.guidances() == (1.0, 2.0, 3.0, 3.0, 3.0)
    assert replace(options, ramp=False).guidances() == (3.0,) * 5
    for wrong in (0, 4097, 1.5):
        with pytest.raises(ValueError, match="passes must be a whole number in 1..4,096"):
            guidance_ramp(3.0, wrong)


@pytest.mark.parametrize("grid", [(1, 1), (12, 12), (3, 4), (24, 24), (5, 7)])
def test_halton_is_scipys_sequence_of_first_visits(grid):
    rows, columns = grid
    points = qmc.Halton(2, scramble=False).random(40 * rows * columns)[1:]
    expected = list(dict.fromkeys((int(y * rows), int(x * columns)) for x, y in points))
    assert len(expected) == rows * columns
    places = halton_places(grid).reshape(grid)
    assert [int(places[cell]) for cell in expected] == list(range(rows * columns))


@pytest.mark.parametrize(("grid", "side"), [((0, 4), "rows"), ((4, 0), "columns"), ((4, 2.0), "columns")])
def test_a_grid_without_positions_has_no_places(grid, side):
    with pytest.raises(ValueError, match=f"{side} of the grid must be a whole number of at least 1"):
        halton_places(grid)


def test_halton_spreads_and_raster_does_not():
    """Of 16 revealed positions, the distance to the nearest other one."""

    def nearest(places):
        first = (places < 16).nonzero().flatten()
        points = torch.stack([first // 12, first % 12], dim=1).double()
        return float((torch.cdist(points, points) + 99 * torch.eye(16)).amin(1).mean())

    assert nearest(halton_places((12, 12))) > 2 * nearest(torch.arange(144))


def test_orders_are_one_interface_and_say_what_comes_first():
    found = state()
    scores = {name: order_scores(name, found) for name in ORDERS}
    for name, score in scores.items():
        assert score.shape == (2, 12) and score.dtype == torch.float64, name
    assert torch.equal(scores["quantisation-error"].argmax(1), found.quantisation_error.argmin(1))
    assert torch.equal(scores["importance"].argmax(1), found.importance.argmax(1))
    assert scores["raster"].argsort(dim=1, descending=True)[1].tolist() == list(range(12))
    assert torch.equal(scores["random"], found.noise)
    assert torch.equal(scores["halton"].argsort(dim=1, descending=True)[0], halton_places((3, 4)).argsort())
    assert torch.equal(scores["confidence"], found.log_probability.double())
    with pytest.raises(ValueError, match="order must be one of quantisation-error, importance"):
        order_scores("size", found)


def test_noise_of_the_order_has_the_temperature_of_the_pass():
    found = state()
    for name, order in ORDERS.items():
        added = order_scores(name, found, 1.8) - order_scores(name, found)
        expected = torch.zeros(2, 12).double() if order.reads is None else 1.8 * found.noise
        torch.testing.assert_close(added, expected)


def test_noise_of_the_order_is_annealed_and_can_be_set():
    own = ProgressiveOptions(order="confidence", passes=6, revision_passes=2)
    assert own.order_noises() == (4.5, 3.0, 1.5, 0.0, 0.0, 0.0)
    assert replace(own, order="importance").order_noises() == (0.0,) * 6
    assert replace(own, order="importance", order_noise=3.0).order_noises() == (3.0, 2.0, 1.0, 0.0, 0.0, 0.0)
    assert own.in_passes(4).order_noises() == (4.5, 2.25, 0.0, 0.0)
    assert own.in_passes(1).order_noises() == (4.5,)


def test_fixed_orders_need_no_prediction_and_others_do():
    bare = OrderState(grid=(3, 4), noise=order_noise([5, 6], 12))
    for name, order in ORDERS.items():
        if order.reads is None:
            assert torch.equal(order_scores(name, bare), order_scores(name, replace(state(), noise=bare.noise)))
        else:
            with pytest.raises(ValueError, match=f"{order.reads}, which is missing"):
                order_scores(name, bare)


def test_noise_of_the_order_is_gumbels_and_keyed_by_the_seed():
    noise = order_noise(range(40), 144)
    assert noise.dtype == torch.float64 and torch.equal(order_noise([7], 144)[0], noise[7])
    assert len({float(row[0]) for row in noise}) == 40
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 0.01
    # Apart from the noise of every position's token, in grids of any size.
    for count in (16, 4096):
        first = float(order_noise([5], count)[0, 0].float())
        assert first not in {float(gumbel_noise(5, position, 1)[0]) for position in range(count)}
    before = torch.get_rng_state()
    order_noise([1], 9)
    assert torch.equal(before, torch.get_rng_state())


@given(
    data=st.data(),
    batch=st.integers(1, 3),
    count=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_the_highest_hidden_scores_are_revealed(data, batch, count, seed):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (batch, count), generator=draw).double()  # with ties
    hidden = torch.rand(batch, count, generator=draw) < 0.6
    counts = [data.draw(st.integers(0, int(row.sum()))) for row in hidden]
    chosen, places = reveal(scores, hidden, counts)
    for b in range(batch):
        left = [i for i in range(count) if hidden[b, i]]
        ranked = sorted(left, key=lambda i: (-float(scores[b, i]), i))
        assert chosen[b].nonzero().flatten().tolist() == sorted(ranked[: counts[b]])
        assert [int(places[b, i]) for i in ranked[: counts[b]]] == list(range(counts[b]))


@given(
    data=st.data(),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    spread=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_spread_positions_keep_apart_as_far_as_they_can(data, grid, spread, seed):
    draw, count = torch.Generator().manual_seed(seed), grid[0] * grid[1]
    scores = torch.randint(0, 9, (2, count), generator=draw).double()
    hidden = torch.rand(2, count, generator=draw) < 0.8
    counts = [data.draw(st.integers(0, int(row.sum()))) for row in hidden]
    chosen, turns = reveal(scores, hidden, counts, grid=grid, spread=spread)
    for b in range(2):
        ranked = sorted((i for i in range(count) if hidden[b, i]), key=lambda i: (-float(scores[b, i]), i))
        apart: list[int] = []
        for i in ranked:
            far = all(max(abs(i // grid[1] - k // grid[1]), abs(i % grid[1] - k % grid[1])) > spread for k in apart)
            if far and len(apart) < counts[b]:
                apart.append(i)
        rest = [i for i in ranked if i not in apart]
        expected = (apart + rest)[: counts[b]]
        assert chosen[b].nonzero().flatten().tolist() == sorted(expected)
        assert [int(turns[b, i]) for i in expected] == list(range(counts[b]))


def test_revealing_what_cannot_be_is_refused():
    scores, hidden = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([[True, False, True]])
    with pytest.raises(ValueError, match=r"\[3\] positions cannot be revealed where \[2\] are hidden"):
        reveal(scores, hidden, [3])
    with pytest.raises(ValueError, match="cannot be revealed"):
        reveal(scores, hidden, [-1])
    nan = torch.tensor([[0.0, math.nan, 1.0]]).double()
    assert reveal(nan, hidden, [1])[0].tolist() == [[False, False, True]], "a score that is not looked at"
    with pytest.raises(ValueError, match="NaN or infinite"):
        reveal(nan.roll(1), hidden, [1])
    with pytest.raises(ValueError, match="cannot be spread without the grid"):
        reveal(scores, hidden, [1], spread=1)


def test_revision_takes_all_or_the_last():
    places = torch.tensor([[2, -1, 0, 1, 3], [-1, -1, 0, -1, -1]])
    assert redrawn(places, "all").tolist() == [[True, False, True, True, True], [False, False, True, False, False]]
    assert redrawn(places, 2).tolist() == [[True, False, False, False, True], [False, False, True, False, False]]
    assert not redrawn(places, 0).any()
    assert torch.equal(redrawn(places, 9), redrawn(places, "all"))
    for wrong in (-1, 1.0, "some", None, True, 10**30):
        with pytest.raises(ValueError, match="revise must be 'all' or a whole number"):
            redrawn(places, wrong)


def test_options_are_sampling_options_with_a_plan():
    options = ProgressiveOptions()
    assert isinstance(options, SamplingOptions) and options.guidance == SamplingOptions().guidance
    assert options.revealing == 8 and options.order == "halton"
    assert options.counts(144) == (*stage_counts(144, 8, "arccos"), 0, 0, 0)
    assert options.counts(3) == (0,) * 5 + (1, 1, 1) + (0,) * 3
    listed = [ProgressiveOptions(passes=3, revision_passes=0, schedule=schedule) for schedule in ((1, 0, 1), [1, 0, 1])]
    assert listed[0].counts(10) == (5, 0, 5) and listed[0] == listed[1]


def test_a_plan_in_other_passes_revises_in_the_nearest_share_of_them():
    plan = ProgressiveOptions()  # 3 of 11
    found = {passes: plan.in_passes(passes).revision_passes for passes in (1, 2, 5, 6, 11, 22)}
    assert found == {1: 0, 2: 1, 5: 1, 6: 2, 11: 3, 22: 6}
    assert replace(plan, passes=4, revision_passes=3).in_passes(2).revision_passes == 1, "one pass has to reveal"
    for wrong in (0, "many"):
        with pytest.raises(ValueError, match="passes must be a whole number in 1..4,096"):
            plan.in_passes(wrong)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"passes": 0}, "passes must be a whole number in 1..4,096"),
        ({"revision_passes": -1}, "revision_passes must be a whole number of at least 0, got -1"),
        ({"passes": 3, "revision_passes": 3}, "revision_passes must be less than passes"),
        ({"start": 11}, "start must be less than passes, got 11 of 11"),
        ({"start": -1}, "start must be a whole number of at least 0"),
        ({"order": "size"}, "order must be one of"),
        ({"order": ["halton"]}, "order must be one of"),
        ({"ramp": "no"}, "ramp must be True or False, got 'no'"),
        ({"order_noise": -1.0}, "order_noise must be a finite number of at least 0"),
        ({"spread": -1}, "spread must be a whole number in 0..1,024"),
        ({"spread": 10**30}, "spread must be a whole number in 0..1,024"),
        ({"revise": -1}, "revise must be 'all' or a whole number of positions in 0..1,048,576, got -1"),
        ({"revise": 0}, "3 revision passes have nothing to do"),
        ({"schedule": "sine"}, "schedule must be one of"),
        (
            {"schedule": (1.0, 1.0)},
            "schedule has 2 numbers for 8 revealing passes, .*: give as many passes as it has numbers, 8 numbers, or "
            "one of cosine, arccos, linear",
        ),
        ({"guidance": math.nan}, "guidance"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        ProgressiveOptions(**changes)


def test_the_table_counts_per_image():
    def flags(*rows):
        return torch.tensor(rows, dtype=torch.bool)

    stage = Stage(
        guidance=1.0,
        tokens=torch.zeros(2, 3, dtype=torch.int64),
        known=flags([1, 1, 1], [1, 0, 0]),
        revealed=flags([1, 1, 0], [1, 0, 0]),
        redrawn=flags([0, 0, 1], [0, 0, 0]),
        changed=flags([0, 0, 1], [0, 0, 0]),
    )
    assert stage_rows([stage, stage])[1] == {"pass": 2, "revealed": 1.5, "drawn again": 0.5, "changed": 0.5}
