"""LCDM against its identities, a plain NumPy version in float64, and hostile input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special

from benchmarks.peak import Peak
from dcdd_core.method import calibration as method
from dcdd_core.method import chunks, lcdm
from dcdd_core.method.calibration import apply_calibration, to_probabilities
from dcdd_core.method.lcdm import features_and_entropy, map_logits, map_probabilities, uncertainty_features
from dcdd_core.method.statistics import describe_logits
from dcdd_core.types import Calibration, Codebook, TokenLogits


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid(logits: torch.Tensor, **fields) -> TokenLogits:
    return TokenLogits(logits, logits.argmax(-1), (1, logits.shape[1]), **fields)


def plain(p: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eqs. 6-8 for one distribution, as written."""
    codes = len(p)
    ordered = np.sort(p)[::-1]
    entropy = -sum(x * math.log(x) for x in ordered if x > 0)
    k = int(min(max(round(math.exp(entropy)), 8), min(64, codes - 1)))
    tail = ordered[k:]
    if codes - k > 1 and tail.sum() > 0:
        tail = tail / tail.sum()
        tail_entropy = -sum(x * math.log(x) for x in tail if x > 0) / math.log(codes - k)
    else:
        tail_entropy = 0.0
    return p @ vectors, np.array([ordered[0], ordered[0] - ordered[1], ordered[:k].sum(), tail_entropy])


@pytest.mark.parametrize("codes", [2, 3, 8, 9, 10, 11, 40, 64, 65, 66, 300])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 4.0, 30.0])
def test_agrees_with_numpy(codes, sharpness):
    codebook = Codebook(rand(codes, 5))
    p = (sharpness * rand(12, codes, seed=1)).double().softmax(-1)
    c, u = map_probabilities(p, codebook)
    for row, *found in zip(p.float().double().numpy(), c.numpy(), u.numpy()):
        for value, expected in zip(found, plain(row, codebook.vectors.double().numpy())):
            np.testing.assert_allclose(value, expected, atol=2e-5)


def test_one_hot_gives_the_code_also_where_the_smallest_numbers_are_taken_for_zero():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor knows no such mode")
    try:
        test_one_hot_gives_the_code()
    finally:
        torch.set_flush_denormal(False)


def test_one_hot_gives_the_code():
    codebook = Codebook(rand(100, 5))
    logits = torch.where(torch.eye(100, dtype=torch.bool), 0.0, -torch.inf)[None]
    condition = map_logits(grid(logits), codebook)
    assert torch.equal(condition.code_vectors[0], codebook.vectors)
    assert torch.equal(condition.uncertainty[0], torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(100, 4))


def test_uniform_gives_the_mean():
    codebook = Codebook(rand(100, 5))
    condition = map_logits(grid(torch.zeros(1, 1, 100)), codebook)
    torch.testing.assert_close(condition.code_vectors[0, 0], codebook.vectors.mean(0))
    torch.testing.assert_close(condition.uncertainty[0, 0], torch.tensor([0.01, 0.0, 0.64, 1.0]))


def test_constants_and_the_order_of_codes_do_not_matter():
    codebook, logits = Codebook(rand(200, 5)), 3 * rand(2, 6, 200, seed=1)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    base = map_logits(grid(logits), codebook)
    for same in (
        map_logits(grid(logits + 7), codebook),
        map_logits(grid(logits[..., order]), Codebook(codebook.vectors[order])),
    ):
        torch.testing.assert_close(same.code_vectors, base.code_vectors)
        torch.testing.assert_close(same.uncertainty, base.uncertainty)
    assert base.codebook == codebook.fingerprint


@pytest.mark.parametrize("mass", [1e-3, 1e-7, 1e-12, 1e-30, 1e-37])
def test_entropy_of_a_tiny_tail(mass):
    # 8 head codes; a tail of 92 codes, half of them 3 times as likely as the others.
    tail = torch.tensor([1.0, 3.0]).repeat(46).double()
    tail /= tail.sum()
    p = torch.cat([torch.full((8,), 1 / 8, dtype=torch.float64) * (1 - mass), tail * mass])
    _, u = map_probabilities(p, Codebook(rand(100, 3)))
    assert u[3].item() == pytest.approx(-(tail * tail.log()).sum().item() / math.log(92), abs=1e-5)


def tail_entropy(row: np.ndarray) -> float:
    """H_tail of one row of logits in float64, all of it in the log domain; -inf bars a code."""
    ordered = np.sort(row)[::-1]
    ln_p = ordered - special.logsumexp(ordered)
    p = np.exp(ln_p)
    entropy = -(p[p > 0] * ln_p[p > 0]).sum()
    k = int(np.clip(np.round(np.exp(entropy)), 8, min(64, len(row) - 1)))
    tail = ln_p[k:]
    if not np.isfinite(tail).any():
        return 0.0
    tail = tail[np.isfinite(tail)] - special.logsumexp(tail)
    return float(-(np.exp(tail) * tail).sum() / np.log(len(row) - k))


def far_tails(codes: int, deviation: float) -> torch.Tensor:
    """[1, 4, K]: heads of 1, 3, 11 and 1 codes above a tail `deviation` lower; the last row bars half of its codes."""
    logits = rand(1, 4, codes, seed=3) - deviation
    for row, head in enumerate((1, 3, 11, 1)):
        logits[0, row, 5 : 5 + head] = 0.1 * rand(head, seed=4)
    logits[0, 3, 30:60] = -torch.inf
    return logits


@pytest.mark.parametrize("codes", [70, 16384])
@pytest.mark.parametrize("deviation", [60.0, 86.0, 97.0, 104.0, 200.0, 5000.0])
def test_entropy_of_a_tail_that_float32_takes_for_nothing(codes, deviation):
    codebook, logits = Codebook(rand(codes, 3)), far_tails(codes, deviation)
    expected = [tail_entropy(row) for row in logits[0].double().numpy()]
    assert min(expected) > 0.5
    item, no_smoothing = grid(logits), Calibration(scale=20.0)
    for condition in (
        map_logits(item, codebook),
        map_logits(item, codebook, no_smoothing),
        map_logits(apply_calibration(item, codebook, no_smoothing), codebook),
    ):
        np.testing.assert_allclose(condition.uncertainty[0, :, 3].numpy(), expected, atol=1e-5)
    found = describe_logits(item, codebook)
    assert found.tail_entropy == pytest.approx(np.mean(expected), abs=1e-5)


def test_entropy_of_a_vanishing_tail_follows_scale_and_anchor():
    codebook, logits = Codebook(rand(70, 3)), far_tails(70, 4.0)
    vectors = codebook.vectors.double().numpy()
    scaled = map_logits(grid(logits, source="proxy"), codebook, Calibration(scale=25.0, affine_scale=2.0))
    expected = [tail_entropy(50 * row) for row in logits[0].double().numpy()]
    np.testing.assert_allclose(scaled.uncertainty[0, :, 3].numpy(), expected, atol=1e-4)
    item = grid(far_tails(70, 120.0))
    pulled = map_logits(item, codebook, Calibration(scale=20.0, anchor=3.0))
    rows = zip(item.logits[0].double().numpy(), item.tokens[0].tolist())
    expected = [tail_entropy(row + 3 * vectors @ vectors[token]) for row, token in rows]
    np.testing.assert_allclose(pulled.uncertainty[0, :, 3].numpy(), expected, atol=1e-5)


def test_tail_entropy_has_no_jump_where_float32_ends():
    codebook = Codebook(rand(500, 3))
    deviations = torch.arange(80.0, 115.0, 0.5)
    logits = torch.cat([far_tails(500, deviation)[:, :1] for deviation in deviations.tolist()], dim=1)
    found = map_logits(grid(logits), codebook).uncertainty[0, :, 3]
    assert found.min() > 0.9 and found.diff().abs().max() < 1e-5


def test_a_tail_of_barred_codes_has_no_entropy():
    logits = torch.full((1, 2, 70), -torch.inf)
    logits[0, :, :9] = 0.0  # a head of 9 codes: its perplexity
    logits[0, 1, 9:11] = torch.tensor([-200.0, -200.0])
    found = map_logits(grid(logits), Codebook(rand(70, 3))).uncertainty[0, :, 3]
    assert found.tolist() == pytest.approx([0.0, math.log(2) / math.log(70 - 9)])


def test_only_vanishing_tails_are_computed_again():
    logits, asked = torch.cat([far_tails(70, 20.0), far_tails(70, 200.0)], dim=1)[0], []

    def ln_p(rows):
        asked.append(rows.tolist())
        return logits[rows].log_softmax(-1)

    found = uncertainty_features(logits.softmax(-1), ln_p)
    assert asked == [[False] * 4 + [True] * 4]
    assert torch.equal(found[:4], uncertainty_features(logits[:4].softmax(-1)))


def test_features_stay_in_range():
    uniform = torch.full((1, 16384), 1 / 16384)
    # Eight codes whose half-precision values sum to a little more than 1.
    rounded = torch.cat([torch.full((1, 8), 0.1256), torch.zeros(1, 92)], dim=1)
    # Rounding puts the entropy of a uniform tail above its bound, and that of a single code below 0.
    single = [
        torch.cat([torch.full((8,), (1 - x) / 8), torch.tensor([x]), torch.zeros(61)])
        for x in 10 ** -(1 + rand(500).abs())
    ]
    tails = [torch.full((1, codes), 1 / codes) for codes in range(70, 100)]
    for p in (uniform, rounded, torch.full((1, 2), 0.5), torch.stack(single), *tails):
        _, u = map_probabilities(p, Codebook(rand(p.shape[1], 2)))
        assert u.min() >= 0 and u.max() <= 1


@pytest.mark.parametrize("calibration", [None, Calibration(scale=20, smoothing=0.01, anchor=2.0)])
@pytest.mark.parametrize("source", ["vlm", "proxy"])
def test_chunked_is_unchunked(monkeypatch, calibration, source):
    codebook, logits = Codebook(rand(50, 5)), rand(3, 7, 50, seed=1)
    tokens = torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(2))
    item = TokenLogits(logits, tokens, (1, 7), source=source)
    whole = map_logits(item, codebook, calibration)
    p = to_probabilities(logits, calibration, source=source, codebook=codebook, tokens=tokens)
    sizes = []
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * 50 * 4)
    split = chunks.chunks
    monkeypatch.setattr(chunks, "chunks", lambda x: (sizes.append(len(part)) or part for part in split(x)))
    parts = map_logits(item, codebook, calibration)
    assert sum(sizes) == 21 and max(sizes) == 4
    for other in (parts.code_vectors, map_probabilities(p, codebook)[0]):
        torch.testing.assert_close(other, whole.code_vectors)
    for other in (parts.uncertainty, map_probabilities(p, codebook)[1]):
        torch.testing.assert_close(other, whole.uncertainty)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.half(),
        lambda x: x.bfloat16(),
        lambda x: x.double(),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: x.clone().requires_grad_(),
    ],
    ids=["half", "bfloat16", "double", "batch inside", "codes outside", "strided", "requires grad"],
)
def test_layout_and_type_do_not_matter(change):
    codebook, logits = Codebook(rand(80, 5)), rand(3, 6, 80, seed=1)
    changed = change(logits)
    before, version = changed.detach().clone(), changed._version
    found = map_logits(grid(changed), codebook, Calibration(scale=9, smoothing=0.02, anchor=1.0))
    expected = map_logits(grid(before.float()), codebook, Calibration(scale=9, smoothing=0.02, anchor=1.0))
    torch.testing.assert_close(found.code_vectors, expected.code_vectors)
    torch.testing.assert_close(found.uncertainty, expected.uncertainty)
    assert torch.equal(changed, before) and changed._version == version
    assert not found.code_vectors.requires_grad and found.code_vectors.dtype == torch.float32
    c, _ = map_probabilities(change(logits.softmax(-1)), codebook)
    torch.testing.assert_close(c, logits.softmax(-1) @ codebook.vectors, atol=3e-3, rtol=0)


def test_autocast_around_it_does_not_matter():
    codebook, item = Codebook(rand(80, 5)), grid(rand(3, 6, 80, seed=1))
    calibration = Calibration(scale=9, anchor=1.0)
    expected = map_logits(item, codebook, calibration)
    with torch.autocast("cpu", torch.bfloat16):
        found = map_logits(item, codebook, calibration)
    assert torch.equal(found.code_vectors, expected.code_vectors)
    assert torch.equal(found.uncertainty, expected.uncertainty)


def test_shapes_follow():
    codebook = Codebook(rand(9, 5))
    for lead in [(), (4,), (2, 3), (2, 3, 4), (0,), (2, 0)]:
        c, u = map_probabilities(torch.full((*lead, 9), 1 / 9), codebook)
        assert c.shape == (*lead, 5) and u.shape == (*lead, 4)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([0.5, torch.nan, 0.5], "finite"),
        ([torch.inf, 0, 0], "finite"),
        ([1.5, -0.5, 0], ">= 0"),
        ([0.5, 0.1, 0.1], "sum to 1"),
        ([0.5, 0.5], "expected .* 3"),
    ],
)
def test_what_is_no_distribution_is_refused(row, says):
    with pytest.raises(ValueError, match=says):
        map_probabilities(torch.tensor([[0.2, 0.3, 0.5][: len(row)], row]), Codebook(rand(3, 2)))


def test_features_come_with_the_entropy_they_are_made_with():
    p = (3 * rand(6, 70)).softmax(-1)
    u, entropy = features_and_entropy(p)
    assert torch.equal(u, uncertainty_features(p)) and entropy.shape == (6,)
    np.testing.assert_allclose(entropy.numpy(), special.entr(p.double().numpy()).sum(-1), rtol=1e-5)


def test_features_need_no_gradient_and_stay_where_the_distribution_is():
    assert not uncertainty_features(rand(2, 70).softmax(-1).requires_grad_()).requires_grad
    top, k = torch.ones(2, 8, device="meta"), torch.ones(2, 1, device="meta")
    assert lcdm._beyond(top, k).device.type == "meta"


def test_a_lone_number_is_no_distribution():
    with pytest.raises(ValueError, match="do not fit a codebook of 3"):
        map_probabilities(torch.tensor(1.0), Codebook(rand(3, 2)))


@pytest.mark.parametrize("total", [0.9901, 1.0099])
def test_rounding_of_half_precision_passes(total):
    p = torch.full((1, 40), total / 40)
    assert map_probabilities(p, Codebook(rand(40, 2)))[1][0, 2] <= 1
    with pytest.raises(ValueError, match="sum to 1"):
        map_probabilities(p + (0.0005 if total > 1 else -0.0005) / 40, Codebook(rand(40, 2)))


def test_mismatched_codebooks_are_refused():
    own, other = Codebook(rand(9, 5)), Codebook(rand(9, 5, seed=1))
    logits = rand(1, 4, 9)
    with pytest.raises(ValueError, match="9 codes do not fit a codebook of 8"):
        map_logits(grid(logits), Codebook(rand(8, 5)))
    with pytest.raises(ValueError, match="logits and codebook do not belong together"):
        map_logits(grid(logits, codebook=other.fingerprint), own)
    with pytest.raises(ValueError, match="calibration do not belong together"):
        map_logits(grid(logits), own, Calibration(scale=20, codebook=other.fingerprint))
    fitting = Calibration(scale=20, codebook=own.fingerprint)
    assert map_logits(grid(logits, codebook=own.fingerprint), own, fitting).codebook == own.fingerprint


@pytest.mark.parametrize("function", [map_logits, describe_logits])
def test_logits_are_gone_through_once(monkeypatch, function):
    codebook, logits, read = Codebook(rand(64, 4)), rand(2, 9, 64, seed=1), []
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 64 * 4 * 5)
    monkeypatch.setattr(
        method, "to_probabilities", lambda part, *a, **kw: read.append(part) or to_probabilities(part, *a, **kw)
    )
    function(grid(logits), codebook, Calibration(scale=20))
    assert torch.equal(torch.cat(read), logits.flatten(0, 1)) and max(map(len, read)) == 5


@pytest.mark.parametrize("layout", ["contiguous", "codes outside"])
@pytest.mark.parametrize(("anchor", "sharpness"), [(0.0, 1.0), (2.0, 1.0), (2.0, 400.0)])
def test_memory_is_bounded(monkeypatch, layout, anchor, sharpness):
    limit = 2**16
    monkeypatch.setattr(chunks, "CHUNK_BYTES", limit)
    codebook, logits = Codebook(rand(1024, 4)), (sharpness * rand(2, 144, 1024, seed=1)).half()
    if layout == "codes outside":
        logits = logits.transpose(1, 2).contiguous().transpose(1, 2)
    item = grid(logits)
    _ = codebook.fingerprint
    with Peak() as peak:
        condition = map_logits(item, codebook, Calibration(scale=20, anchor=anchor))
    results = condition.code_vectors.nbytes + condition.uncertainty.nbytes
    # Beside the four arrays: the results, twice while they are joined, and what is of the size of a chunk's top 64.
    allowed = 4 * limit + 3 * results + limit // 2
    assert limit < peak.peak < allowed < logits.nbytes, (peak.peak / limit, allowed / limit)
