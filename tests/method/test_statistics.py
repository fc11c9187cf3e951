"""Table 1's raw column, and the streaming form against the plain one."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from skimage.filters import threshold_otsu

from dcdd_core.method import chunks, statistics
from dcdd_core.method.calibration import proxy_logits, to_probabilities
from dcdd_core.method.lcdm import features_and_entropy, map_probabilities
from dcdd_core.method.statistics import describe, describe_logits
from dcdd_core.types import Calibration, Codebook, TokenLogits
from tests.mps import WithoutFloat64


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_raw_cosines_reproduce_table_1():
    codebook = Codebook(rand(16384, 8))
    proxies = proxy_logits(rand(1, 200, 8, seed=1), codebook)
    found = describe_logits(TokenLogits(proxies, proxies.argmax(-1), (10, 20), source="proxy"), codebook)
    assert found.top_1 == pytest.approx(0.000151, rel=0.03)
    assert found.top_2 == pytest.approx(0.000145, rel=0.03)
    assert found.entropy == pytest.approx(0.993630, rel=0.03)
    assert found.tail_entropy == pytest.approx(0.993661, rel=0.03)
    # 1 - H is what says something here: 0.0064 against the 0 of a uniform distribution.
    assert 1 - found.entropy == pytest.approx(1 - 0.993630, rel=0.03)
    assert found.otsu_threshold == pytest.approx(6.66e-5, rel=0.03)
    assert found.rank == pytest.approx(5767, rel=0.03)
    assert found.head_mass == pytest.approx(0.492722, rel=0.03)
    assert found.tokens == 200


def test_every_row_against_numpy():
    p = (3 * rand(2, 30, 100)).softmax(-1)
    found = describe(p)
    q = p.double().reshape(60, 100).numpy()
    means = np.sort(q)[:, ::-1].mean(0)
    threshold = threshold_otsu(means)
    # Sums are taken in float64, so the means are exact.
    assert (found.top_1, found.top_2) == pytest.approx((means[0], means[1]), rel=1e-12)
    assert found.entropy == pytest.approx(-(q * np.log(q)).sum(-1).mean() / math.log(100))
    assert found.tail_entropy == pytest.approx(map_probabilities(p, Codebook(rand(100, 2)))[1][..., 3].mean().item())
    assert found.otsu_threshold == pytest.approx(threshold)
    assert found.rank == (means > threshold).sum() > 0
    assert found.head_mass == pytest.approx(means[means > threshold].sum())
    assert found.curve == pytest.approx(means[:30], rel=1e-12) and found.tokens == 60


def test_chunked_and_streamed_is_whole(monkeypatch):
    codebook, logits = Codebook(rand(50, 4)), rand(4, 6, 50, seed=1)
    calibration = Calibration(scale=9, smoothing=0.02)
    whole = describe(to_probabilities(logits, calibration, source="proxy"))
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 50 * 4 * 4)
    grids = (TokenLogits(x[None], x[None].argmax(-1), (2, 3), source="proxy") for x in logits)
    parts = dataclasses.asdict(describe_logits(grids, codebook, calibration))
    for name, value in dataclasses.asdict(whole).items():
        assert parts[name] == pytest.approx(value, rel=1e-6), name


class Elsewhere(WithoutFloat64):
    """Says that it is not on the CPU, where NumPy cannot read it."""

    @property
    def device(self):
        return torch.device("mps")

    def numpy(self):
        raise TypeError("can't convert a device tensor to numpy")


def test_a_device_without_float64_will_do(monkeypatch):
    p = rand(2, 30, 100).softmax(-1)
    expected, sorted_by_numpy = describe(p), []
    monkeypatch.setattr(np, "sort", lambda rows, own=np.sort: sorted_by_numpy.append(rows.shape) or own(rows))
    assert describe(p.as_subclass(WithoutFloat64)) == expected
    # Four times as fast as torch, so a CPU's rows go there.
    assert sorted_by_numpy == [(60, 100)]
    sums, there = statistics._sums(p[0], None), p[0].as_subclass(Elsewhere)
    monkeypatch.setattr(
        statistics, "features_and_entropy", lambda p, _: features_and_entropy(p.as_subclass(torch.Tensor))
    )
    assert torch.equal(statistics._sums(there, None), sums) and sorted_by_numpy[1:] == [(30, 100)]


def test_one_distribution_alone():
    p = rand(100).softmax(-1)
    assert describe(p) == describe(p[None]) and describe(p).tokens == 1


def test_edges():
    uniform = describe(torch.full((3, 40), 1 / 40))
    assert uniform.rank == 0 and uniform.head_mass == 0 and uniform.entropy == pytest.approx(1)
    sure = describe(torch.eye(2).half())
    assert (sure.top_1, sure.top_2, sure.rank, sure.entropy, sure.tail_entropy) == (1, 0, 1, 0, 0)
    assert sure.curve == (1, 0)


@pytest.mark.parametrize(
    ("probabilities", "says"),
    [
        (torch.empty(0, 5), "at least one"),
        (torch.ones(5, 1), "K >= 2"),
        (torch.tensor(1.0), "K >= 2"),
        (torch.full((2, 5), torch.nan), "finite"),
        (torch.ones(2, 5), "sum to 1"),
    ],
)
def test_refuses(probabilities, says):
    with pytest.raises(ValueError, match=says):
        describe(probabilities)
