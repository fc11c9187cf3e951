"""Intervals against scipy's bootstrap, and against the formulas of the mean."""

import numpy as np
import pytest
from scipy import stats

from dcdd_core.evaluation.intervals import Interval, block_jackknife, bootstrap

VALUES = np.random.default_rng(3).gamma(2.0, size=80)
OTHERS = VALUES + np.random.default_rng(4).normal(0.3, 0.1, size=80)


def test_bootstrap_of_a_mean_is_scipys():
    found = bootstrap(lambda k: VALUES[k].mean(), 80, resamples=4000)
    theirs = stats.bootstrap((VALUES,), np.mean, n_resamples=4000, method="percentile", random_state=1)
    assert found.value == VALUES.mean()
    expected = theirs.confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_bootstrap_of_a_paired_ratio_is_scipys():
    found = bootstrap(lambda k: OTHERS[k].mean() / VALUES[k].mean(), 80, resamples=4000)
    theirs = stats.bootstrap(
        (OTHERS, VALUES),
        lambda a, b, axis: a.mean(axis) / b.mean(axis),
        n_resamples=4000,
        method="percentile",
        paired=True,
        random_state=1,
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.005)


def test_paired_differences_are_narrower_than_unpaired_ones():
    paired = bootstrap(lambda k: (OTHERS[k] - VALUES[k]).mean(), 80)
    alone = bootstrap(lambda k: VALUES[k].mean(), 80)
    assert paired.high - paired.low < 0.2 * (alone.high - alone.low)
    assert 0.25 < paired.low < paired.value < paired.high < 0.35


def test_bootstrap_is_the_same_every_time_and_follows_its_seed():
    first, again, other = (bootstrap(lambda k: VALUES[k].mean(), 80, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_jackknife_of_a_mean_has_its_standard_error():
    """With blocks of one image, the jackknife's SE of a mean is exactly s / sqrt(M)."""
    found = block_jackknife(lambda k: VALUES[k].mean(), 80, blocks=80)
    error = VALUES.std(ddof=1) / np.sqrt(80)
    assert (found.value, found.low, found.high) == pytest.approx(
        (VALUES.mean(), VALUES.mean() - 1.959964 * error, VALUES.mean() + 1.959964 * error)
    )


def test_blocks_of_a_mean_by_hand():
    """Four blocks of equal size: the SE of the mean of their means."""
    found = block_jackknife(lambda k: VALUES[k].mean(), 80, blocks=4)
    error = VALUES.reshape(4, 20).mean(1).std(ddof=1) / 2
    assert found.high - found.value == pytest.approx(1.959964 * error)


def test_every_image_is_left_out_once():
    kept = []
    block_jackknife(lambda k: kept.append(k) or 0.0, 7, blocks=3)
    left_out = [sorted(set(range(7)) - set(k)) for k in kept[:3]]
    assert left_out == [[0, 1, 2], [3, 4], [5, 6]] and len(kept[3]) == 7
    kept.clear()
    block_jackknife(lambda k: kept.append(k) or 0.0, 3, blocks=20)
    assert [len(k) for k in kept] == [2, 2, 2, 3]


@pytest.mark.parametrize(
    "interval, above, below",
    [
        (Interval(2.0, 1.0, 3.0), "met", "open"),
        (Interval(0.5, 0.0, 0.9), "MISSED", "met"),
        (Interval(1.0, 0.9, 1.1), "open", "open"),
        (Interval(1.2, 1.1, 1.3), "met", "MISSED"),
    ],
)
def test_a_verdict_needs_the_whole_interval(interval, above, below):
    assert interval.above(1.0) == above and interval.below(1.0) == below


def test_too_few_images_are_refused():
    for measure in (bootstrap, block_jackknife):
        with pytest.raises(ValueError, match="at least two images, got 1"):
            measure(lambda k: 0.0, 1)
    with pytest.raises(ValueError, match="at least two blocks, got 1"):
        block_jackknife(lambda k: 0.0, 5, blocks=1)


def test_the_defaults_are_those_that_the_documents_name():
    def mean(k):
        return VALUES[k].mean()

    assert bootstrap(mean, 80) == bootstrap(mean, 80, resamples=1000) != bootstrap(mean, 80, resamples=999)
    assert block_jackknife(mean, 80) == block_jackknife(mean, 80, blocks=20) != block_jackknife(mean, 80, blocks=10)
