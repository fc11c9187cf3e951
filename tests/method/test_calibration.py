"""Calibration finds what made its target, and says so when it cannot."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import optimize

from benchmarks.peak import Peak
from dcdd_core.method import calibration as method
from dcdd_core.method import chunks
from dcdd_core.method.calibration import (
    AnchorStatistics,
    anchor_statistics,
    apply_calibration,
    fit_anchor,
    fit_calibration,
    proxy_logits,
    scale_for_confidence,
    target_statistics,
    to_log_probabilities,
    to_probabilities,
)
from dcdd_core.method.lcdm import map_logits
from dcdd_core.types import Calibration, CalibrationStatistics, Codebook, TokenLogits
from tests.mps import WithoutFloat64


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid(logits: torch.Tensor, tokens: torch.Tensor | None = None, **fields) -> TokenLogits:
    return TokenLogits(logits, logits.argmax(-1) if tokens is None else tokens, (1, logits.shape[1]), **fields)


CODEBOOK = Codebook(rand(128, 6))
FEATURES = rand(3, 40, 6, seed=1)


def statistics_of(p: torch.Tensor) -> CalibrationStatistics:
    """Eqs. 11-12 in float64."""
    p = p.double().reshape(-1, p.shape[-1]).numpy()
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1) / math.log(p.shape[-1])
    return CalibrationStatistics(
        mean_entropy=float(entropy.mean()),
        entropy_95=float(np.percentile(entropy, 95)),
        mean_confidence=float(p.max(-1).mean()),
        confidence_95=float(np.percentile(p.max(-1), 95)),
    )


def calibrated(sharpness: float, smoothing: float, features: torch.Tensor = FEATURES) -> torch.Tensor:
    """Eqs. 13-15 in float64."""
    cosines = F.normalize(features.double(), dim=-1) @ CODEBOOK.vectors.double().T
    return (1 - smoothing) * (sharpness * cosines).softmax(-1) + smoothing / CODEBOOK.size


def assert_near(found: CalibrationStatistics, expected: CalibrationStatistics, tolerance: float):
    for name, value in dataclasses.asdict(expected).items():
        assert getattr(found, name) == pytest.approx(value, abs=tolerance), name


def test_proxy_logits_are_cosines():
    found = proxy_logits(64 * FEATURES.half(), CODEBOOK)
    expected = F.cosine_similarity(FEATURES.half().float()[..., None, :], CODEBOOK.vectors, dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found.dtype == torch.float32
    assert torch.equal(proxy_logits(torch.zeros(2, 6), CODEBOOK), torch.zeros(2, 128))
    assert torch.equal(proxy_logits(FEATURES[0, 0], CODEBOOK), proxy_logits(FEATURES[0, :1], CODEBOOK)[0])


@pytest.mark.parametrize(
    ("features", "says"),
    [
        (torch.ones(4, 5), "dimension 6"),
        (torch.tensor(1.0), "dimension 6"),
        (torch.full((4, 6), torch.nan), "NaN"),
    ],
)
def test_features_that_do_not_fit(features, says):
    with pytest.raises(ValueError, match=says):
        proxy_logits(features, CODEBOOK)
    with pytest.raises(ValueError, match=says):
        fit_calibration([FEATURES, features], CODEBOOK, statistics_of(calibrated(20, 0)))


def test_apply_to_proxies_is_equations_14_and_15():
    calibration = Calibration(scale=20, affine_scale=1.1, affine_bias=3.0, smoothing=0.03, anchor=2.0)
    found = to_probabilities(proxy_logits(FEATURES, CODEBOOK), calibration, source="proxy")
    torch.testing.assert_close(found.double(), calibrated(22, 0.03), atol=1e-6, rtol=1e-4)


def test_apply_to_a_vlm_only_smooths():
    logits = 3 * rand(2, 5, 128)
    found = to_probabilities(logits, Calibration(scale=20, affine_scale=1.1, smoothing=0.03), source="vlm")
    torch.testing.assert_close(found, 0.97 * logits.softmax(-1) + 0.03 / 128)


@pytest.mark.parametrize("source", ["vlm", "proxy"])
def test_without_a_calibration_it_is_the_softmax(source):
    logits = 3 * rand(2, 5, 128)
    torch.testing.assert_close(to_probabilities(logits, None, source=source), logits.softmax(-1))


def test_anchor_weighs_with_the_sampled_token_before_the_smoothing():
    logits, tokens = 3 * rand(2, 5, 128), torch.randint(128, (2, 5), generator=torch.Generator().manual_seed(0))
    calibration = Calibration(scale=20, smoothing=0.03, anchor=4.0)
    found = to_probabilities(logits, calibration, source="vlm", codebook=CODEBOOK, tokens=tokens)
    vectors = CODEBOOK.vectors.double()
    weighed = logits.double().softmax(-1) * (4 * vectors[tokens] @ vectors.T).exp()
    expected = 0.97 * weighed / weighed.sum(-1, keepdim=True) + 0.03 / 128
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="give the codebook and the tokens"):
        to_probabilities(logits, calibration, source="vlm")
    for half in ({"codebook": CODEBOOK}, {"tokens": tokens}):
        with pytest.raises(ValueError, match="give the codebook and the tokens"):
            to_probabilities(logits, calibration, source="vlm", **half)
    with pytest.raises(ValueError, match="'vlm' or 'proxy'"):
        to_probabilities(logits, calibration, source="encoder")


def test_smoothing_gives_barred_codes_their_share():
    logits = torch.tensor([[0.0, -torch.inf]])
    found = to_probabilities(logits, Calibration(scale=20, smoothing=0.1), source="vlm")
    torch.testing.assert_close(found, torch.tensor([[0.95, 0.05]]))


@pytest.mark.parametrize("smoothing", [0.0, 0.03, 0.6])
@pytest.mark.parametrize("source", ["vlm", "proxy"])
def test_log_probabilities_are_the_logarithm_of_equation_15(source, smoothing):
    logits, tokens = 40 * rand(2, 5, 128), rand(2, 5, 128, seed=1).argmax(-1)
    calibration = Calibration(scale=2, affine_scale=1.1, smoothing=smoothing, anchor=4.0)
    vectors = CODEBOOK.vectors.double()
    scores = 2.2 * logits.double() if source == "proxy" else logits.double() + 4 * vectors[tokens] @ vectors.T
    ln_q = scores.log_softmax(-1).numpy()
    expected = np.logaddexp(ln_q + math.log(1 - smoothing), math.log(smoothing / 128) if smoothing else -np.inf)
    found = to_log_probabilities(logits, calibration, source=source, codebook=CODEBOOK, tokens=tokens)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=2e-5)
    assert found.dtype == torch.float32
    plain = to_log_probabilities(logits, None, source=source)
    np.testing.assert_allclose(plain.numpy(), logits.double().log_softmax(-1).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_calibrated_logits_keep_what_float32_cannot_hold_as_a_probability(monkeypatch, chunk):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 128 * 4 * chunk)
    raw = grid(torch.cat([40 * rand(2, 2, 128), rand(2, 5, 128, seed=2)], dim=1))
    made = apply_calibration(raw, CODEBOOK, Calibration(scale=20)).logits
    assert raw.logits.softmax(-1).min() == 0
    np.testing.assert_allclose(made.numpy(), raw.logits.double().log_softmax(-1).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("end", [10.0, 60.0])
def test_a_target_at_an_end_of_the_range_needs_no_other(end):
    for beyond in (0.0, 0.0005, -0.0005):
        target = statistics_of(calibrated(end, 0))
        target = dataclasses.replace(target, mean_entropy=target.mean_entropy + beyond)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert fit_calibration(FEATURES, CODEBOOK, target).scale == pytest.approx(end, rel=0.03)


def test_neither_autocast_nor_gradients_reach_the_equations():
    logits, tokens = vlm_logits(3.0)
    proxies = proxy_logits(FEATURES, CODEBOOK)
    anchored = {"source": "vlm", "codebook": CODEBOOK, "tokens": tokens}

    def everything(features: torch.Tensor, logits: torch.Tensor, proxies: torch.Tensor) -> list[torch.Tensor]:
        return [
            proxy_logits(features, CODEBOOK),
            to_probabilities(logits, Calibration(scale=20, anchor=3.0), **anchored),
            to_log_probabilities(logits, Calibration(scale=20, anchor=3.0), **anchored),
            method.proxy_features(grid(proxies, source="proxy"), CODEBOOK),
            torch.tensor(dataclasses.astuple(anchor_statistics(grid(logits, tokens), CODEBOOK))),
        ]

    expected = everything(FEATURES, logits, proxies)
    with torch.autocast("cpu", torch.bfloat16):
        found = everything(*(x.clone().requires_grad_() for x in (FEATURES, logits, proxies)))
    for ours, plain in zip(found, expected):
        assert torch.equal(ours, plain) and not ours.requires_grad


def test_target_statistics(monkeypatch):
    logits = 2 * rand(4, 25, 128)
    expected = statistics_of(logits.softmax(-1))
    assert_near(target_statistics(grid(logits)), expected, 1e-6)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 128 * 4 * 7)
    assert_near(target_statistics(grid(part) for part in logits.half().split(1)), expected, 1e-3)


@pytest.mark.parametrize("codes", [100, 1000, 3000, 16384])
def test_rounding_leaves_the_range_alone(codes):
    assert target_statistics(grid(torch.zeros(1, 2, codes))).entropy_95 <= 1


def test_target_statistics_refuse():
    with pytest.raises(ValueError, match="vlm logits, got proxy logits"):
        target_statistics(grid(rand(1, 4, 9), source="proxy"))
    with pytest.raises(ValueError, match="no token logits"):
        target_statistics([])
    with pytest.raises(ValueError, match=r"different sizes, \[8, 9\]"):
        target_statistics([grid(rand(1, 4, 9)), grid(rand(1, 4, 8))])


@pytest.mark.parametrize(("sharpness", "smoothing"), [(17.0, 0.0), (25.0, 0.005), (33.0, 0.05)])
def test_fit_finds_what_made_the_target(sharpness, smoothing):
    target = statistics_of(calibrated(sharpness, smoothing))
    found = fit_calibration(FEATURES, CODEBOOK, target, vlm="janus", guidance=5.0, temperature=1.0)
    assert found.converged and found.affine_bias == 0 and 10 < found.scale < 60
    assert found.scale * found.affine_scale == pytest.approx(sharpness, rel=0.05)
    assert found.smoothing == pytest.approx(smoothing, abs=0.01)
    assert_near(found.achieved, target, 0.01)
    assert_near(found.achieved, statistics_of(calibrated(found.scale * found.affine_scale, found.smoothing)), 1e-5)
    assert (found.vlm, found.guidance, found.temperature) == ("janus", 5.0, 1.0)
    assert found.codebook == CODEBOOK.fingerprint and found.target == target


def test_the_search_is_the_papers():
    """Section 5.2: s in 10..60 to 0.02 of the mean entropy, small grids of eps around 0 and of a around 1."""
    assert method.SCALES == (10, 60) and method.TOLERANCE == 0.02
    assert method.SMOOTHINGS == (0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
    assert method.AFFINE_STEPS == (0.94, 0.96, 0.98, 0.99, 1, 1.01, 1.02, 1.04, 1.06)
    # Ours: Eq. 16 with the mean entropy heaviest, a finer end of the bisection, and where the anchor is measured.
    assert list(method.WEIGHTS.values()) == [1, 0.25, 0.5, 0.5] and method.FINE_TOLERANCE == 0.001
    assert (method.WIDENINGS, method.BISECTIONS, method.PASSES) == (8, 20, 70)
    assert (method.ANCHORS[0], len(method.ANCHORS), method.ANCHOR_STEPS) == (0, 26, 64)
    np.testing.assert_allclose(method.ANCHORS[1:], 0.25 * 256 ** (np.arange(25) / 24))


def plain_fit(target: CalibrationStatistics) -> tuple[float, float, float]:
    """(s, eps, a) of Eqs. 13-16 over FEATURES in float64, with SciPy's root finder."""

    @functools.cache
    def statistics(sharpness: float, smoothing: float) -> CalibrationStatistics:
        return statistics_of(calibrated(sharpness, smoothing))

    def objective(trial: tuple[float, float]) -> float:
        found = statistics(*trial)
        if abs(found.mean_entropy - target.mean_entropy) > 0.02:
            return math.inf
        differences = [abs(x - y) for x, y in zip(dataclasses.astuple(found), dataclasses.astuple(target))]
        return float(np.dot([1.0, 0.25, 0.5, 0.5], differences))

    def tuned(low: float, high: float, smoothing: float) -> float:
        excess = [statistics(s, smoothing).mean_entropy - target.mean_entropy for s in (low, high)]
        if np.prod(excess) > 0:
            return low if excess[0] < 0 else high
        return optimize.brentq(lambda s: statistics(s, smoothing).mean_entropy - target.mean_entropy, low, high)

    scale = tuned(10, 60, 0.0)
    tries = [(scale, 0.0)]
    for eps in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05):
        tries.append((tuned(tries[-1][0], 1.25 * tries[-1][0], eps), eps))
    sharpness, smoothing = min(tries, key=objective)
    steps = [(sharpness * a, smoothing) for a in (0.94, 0.96, 0.98, 0.99, 1.0, 1.01, 1.02, 1.04, 1.06)]
    return scale, smoothing, min(steps, key=objective)[0] / scale


@pytest.mark.parametrize(
    ("sharpness", "smoothing", "moved"),
    [
        (30.0, 0.02, {}),
        (40.0, 0.001, {}),
        (40.0, 0.002, {}),
        (45.0, 0.05, {}),
        (20.0, 0.0, {"confidence_95": 0.09, "mean_confidence": 0.06}),
        (20.0, 0.0, {"confidence_95": -0.12, "mean_confidence": -0.05, "entropy_95": 0.08}),
        (25.0, 0.01, {"entropy_95": -0.15}),
        # With equal weights these two would end elsewhere: at a = .94, and at eps = .02.
        (20.0, 0.0, {"entropy_95": 0.08, "confidence_95": -0.03}),
        (35.0, 0.02, {"entropy_95": 0.03, "mean_confidence": -0.01, "confidence_95": -0.06}),
    ],
)
def test_fit_is_a_plain_search_in_float64(sharpness, smoothing, moved):
    base = statistics_of(calibrated(sharpness, smoothing))
    target = dataclasses.replace(base, **{name: getattr(base, name) + by for name, by in moved.items()})
    found = fit_calibration(FEATURES, CODEBOOK, target)
    scale, eps, a = plain_fit(target)
    assert found.scale == pytest.approx(scale, rel=0.01) and found.smoothing == eps
    assert found.affine_scale == pytest.approx(a, rel=0.012)


def test_smoothing_is_found_where_the_others_cannot_stand_in():
    found = fit_calibration(FEATURES, CODEBOOK, statistics_of(calibrated(40, 0.05)))
    assert found.smoothing == pytest.approx(0.05)


def test_mean_entropy_stays_within_the_tolerance_whatever_the_rest_asks(monkeypatch):
    monkeypatch.setitem(method.WEIGHTS, "mean_entropy", 0.0)
    monkeypatch.setattr(method, "AFFINE_STEPS", (1.0, 1.03, 1.5))
    target = dataclasses.replace(
        statistics_of(calibrated(20, 0)), mean_confidence=1.0, confidence_95=1.0, entropy_95=0.0
    )
    found = fit_calibration(FEATURES, CODEBOOK, target)
    assert found.converged and abs(found.achieved.mean_entropy - target.mean_entropy) <= 0.02
    # The sweep over a does use that freedom to follow the rest.
    assert target.mean_entropy - found.achieved.mean_entropy > 0.005


def test_fit_reads_any_features_alike(monkeypatch):
    target = statistics_of(calibrated(20, 0.01))
    whole = fit_calibration(FEATURES, CODEBOOK, target)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 128 * 4 * 7)
    for other in (FEATURES.reshape(-1, 6), (part for part in FEATURES), FEATURES.clone().requires_grad_()):
        found = fit_calibration(other, CODEBOOK, target)
        assert found.scale == pytest.approx(whole.scale, rel=1e-3) and found.smoothing == whole.smoothing


@pytest.mark.parametrize(("sharpness", "side", "range_"), [(3.0, "low", "2.5..5"), (150.0, "high", "120..240")])
def test_range_widens_and_says_so(sharpness, side, range_):
    target = statistics_of(calibrated(sharpness, 0))
    with pytest.warns(UserWarning, match=rf"not reached with a scale in 10\.\.60: searching {re.escape(range_)}"):
        found = fit_calibration(FEATURES, CODEBOOK, target)
    assert found.converged and (found.scale < 10) == (side == "low")
    assert found.scale * found.affine_scale == pytest.approx(sharpness, rel=0.1)


def test_target_out_of_reach_ends_and_says_so(monkeypatch):
    # Pairs of equal codes: no scale brings the entropy below ln 2 / ln 128.
    twins, passes = Codebook(rand(64, 6).repeat(2, 1)), []
    monkeypatch.setattr(method, "_summarise", lambda parts, own=method._summarise: passes.append(1) or own(parts))
    target = CalibrationStatistics(mean_entropy=0.0, entropy_95=0.0, mean_confidence=1.0, confidence_95=1.0)
    with pytest.warns(UserWarning, match="did not converge.*together"), pytest.warns(UserWarning, match="not reached"):
        found = fit_calibration(FEATURES, twins, target)
    assert not found.converged and found.smoothing == 0 and found.affine_scale == 1
    assert found.achieved.mean_entropy == pytest.approx(math.log(2) / math.log(128), abs=0.01)
    assert len(passes) < 50


def test_fit_to_one_feature():
    one = FEATURES[0, 0]
    assert fit_calibration(one, CODEBOOK, statistics_of(calibrated(20, 0, one))).scale == pytest.approx(20, rel=0.02)


def test_fit_without_features():
    for nothing in ([], torch.empty(0, 6), [torch.empty(0, 6)]):
        with pytest.raises(ValueError, match="no features"):
            fit_calibration(nothing, CODEBOOK, statistics_of(calibrated(20, 0)))


def test_other_sampling_warns_once_and_only_for_a_vlm():
    calibration = Calibration(scale=20, vlm="janus", guidance=5.0, temperature=1.0)
    other = {"model": "llamagen", "guidance": 7.5, "temperature": 1.0}
    logits = rand(1, 4, 128)
    with pytest.warns(UserWarning, match="VLM 'llamagen' .*'janus'.*, guidance 7.5 .*5.0") as caught:
        anchor_statistics([grid(logits, **other)] * 3, CODEBOOK, calibration)
    assert len(caught) == 1 and "temperature" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        map_logits(grid(logits, source="proxy", **other), CODEBOOK, calibration)
        map_logits(grid(logits, model="janus", guidance=5.0, temperature=1.0), CODEBOOK, calibration)
        map_logits(grid(logits), CODEBOOK, calibration)


def vlm_logits(beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of which an anchor of beta makes the proxies of FEATURES at s = 20."""
    cosines = proxy_logits(FEATURES, CODEBOOK)
    tokens = cosines.argmax(-1)
    return 20 * cosines - beta * CODEBOOK.vectors[tokens] @ CODEBOOK.vectors.T, tokens


def test_anchor_statistics():
    logits, tokens = vlm_logits(3.0)
    p = logits.double().softmax(-1)
    c = p @ CODEBOOK.vectors.double()
    found = anchor_statistics(iter([grid(logits[:1], tokens[:1]), grid(logits[1:], tokens[1:])]), CODEBOOK)
    assert found.length == pytest.approx(c.norm(dim=-1).mean().item(), abs=1e-5)
    cosine = F.cosine_similarity(c, CODEBOOK.vectors.double()[tokens], dim=-1)
    assert found.alignment == pytest.approx(cosine.mean().item(), abs=1e-5)


def test_a_device_without_float64_will_do():
    logits, tokens = vlm_logits(3.0)
    there = grid(logits.as_subclass(WithoutFloat64), tokens)
    assert anchor_statistics(there, CODEBOOK) == anchor_statistics(grid(logits, tokens), CODEBOOK)
    assert target_statistics(there) == target_statistics(grid(logits, tokens))


@pytest.mark.parametrize("beta", [0.0, 1.3, 9.0])
def test_fit_anchor_finds_what_was_taken_away(beta):
    calibration = Calibration(scale=20, smoothing=0.01, vlm="janus")
    proxies = grid(proxy_logits(FEATURES, CODEBOOK), source="proxy")
    target = anchor_statistics(proxies, CODEBOOK, calibration)
    logits, tokens = vlm_logits(beta)
    found = fit_anchor((grid(x[None], t[None]) for x, t in zip(logits, tokens)), CODEBOOK, target, calibration)
    assert found == dataclasses.replace(calibration, anchor=found.anchor)
    assert found.anchor == pytest.approx(beta, abs=0.05 * beta)
    after = anchor_statistics(grid(logits, tokens), CODEBOOK, found)
    assert after.length == pytest.approx(target.length, abs=3e-3)
    assert after.alignment == pytest.approx(target.alignment, abs=3e-3)


def test_fit_anchor_at_its_ends():
    calibration = Calibration(scale=20)
    logits, tokens = vlm_logits(0.0)
    nearer = AnchorStatistics(length=0.2, alignment=0.2)
    assert fit_anchor(grid(logits, tokens), CODEBOOK, nearer, calibration).anchor == 0
    far = grid(logits - 80 * CODEBOOK.vectors[tokens] @ CODEBOOK.vectors.T, tokens)
    with pytest.warns(UserWarning, match="out of reach"):
        found = fit_anchor(far, CODEBOOK, AnchorStatistics(length=1.0, alignment=1.0), calibration)
    assert found.anchor == 64
    with pytest.raises(ValueError, match="vlm logits, got proxy logits"):
        fit_anchor(grid(logits, source="proxy"), CODEBOOK, nearer, calibration)
    with pytest.raises(ValueError, match="no token logits"):
        fit_anchor([], CODEBOOK, nearer, calibration)
    elsewhere = dataclasses.replace(calibration, codebook=Codebook(rand(128, 6, seed=9)).fingerprint)
    with pytest.raises(ValueError, match="codebook and calibration do not belong together"):
        fit_anchor(grid(logits, tokens), CODEBOOK, nearer, elsewhere)


@pytest.mark.parametrize("source", ["vlm", "proxy"])
def test_calibrated_logits_hold_the_calibrated_distribution(source):
    raw, calibration = grid(rand(2, 9, 128), source=source), Calibration(scale=12, smoothing=0.01, anchor=1.5)
    made = apply_calibration(raw, CODEBOOK, calibration)
    assert made.calibrated and made.source == source and torch.equal(made.tokens, raw.tokens)
    p = to_probabilities(raw.logits, calibration, source=source, codebook=CODEBOOK, tokens=raw.tokens)
    torch.testing.assert_close(made.logits.softmax(-1), p)
    whole, mapped = map_logits(raw, CODEBOOK, calibration), map_logits(made, CODEBOOK)
    torch.testing.assert_close(mapped.code_vectors, whole.code_vectors, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mapped.uncertainty, whole.uncertainty, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [torch.Tensor.half, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)])
def test_calibrated_logits_are_float32_in_any_layout(change):
    raw = grid(change(rand(2, 9, 128)))
    made = apply_calibration(raw, CODEBOOK, Calibration(scale=12, smoothing=0.01)).logits
    expected = to_probabilities(raw.logits, Calibration(scale=12, smoothing=0.01), source="vlm").log()
    assert made.dtype == torch.float32 and made.is_contiguous()
    torch.testing.assert_close(made, expected)


def test_nothing_is_calibrated_twice():
    calibration = Calibration(scale=12)
    made = apply_calibration(grid(rand(1, 4, 128)), CODEBOOK, calibration)
    for again in (lambda: map_logits(made, CODEBOOK, calibration), lambda: target_statistics(made)):
        with pytest.raises(ValueError, match="calibrated already"):
            again()


def test_features_are_found_again_in_their_proxies():
    proxies = grid(proxy_logits(FEATURES, CODEBOOK), source="proxy")
    found = method.proxy_features(proxies, CODEBOOK)
    torch.testing.assert_close(found, F.normalize(FEATURES, dim=-1).flatten(0, 1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="proxy logits"):
        method.proxy_features(grid(rand(1, 4, 128)), CODEBOOK)
    with pytest.raises(ValueError, match="logits and codebook do not belong together"):
        other = Codebook(rand(128, 6, seed=9)).fingerprint
        method.proxy_features(grid(rand(1, 4, 128), source="proxy", codebook=other), CODEBOOK)


def test_every_evaluation_reads_each_feature_once_a_bounded_chunk_at_a_time(monkeypatch):
    codebook, features, limit = Codebook(rand(1024, 6)), rand(96, 6, seed=1), 2**16
    monkeypatch.setattr(chunks, "CHUNK_BYTES", limit)
    target = target_statistics(grid(20 * proxy_logits(features, codebook)[None]))
    read, evaluations = [], []

    def reading(part, *rest):
        read.append(part)
        return proxy_logits(part, *rest)

    def evaluated(parts, own=method._summarise):
        read.clear()
        found = own(parts)
        evaluations.append(found)
        assert torch.equal(torch.cat(read), features) and max(map(len, read)) * 4 * codebook.size <= limit
        return found

    monkeypatch.setattr(method, "proxy_logits", reading)
    monkeypatch.setattr(method, "_summarise", evaluated)
    _ = codebook.fingerprint
    with Peak() as peak:
        found = fit_calibration(features, codebook, target)
    assert found.converged and len(evaluations) > 10
    assert len(set(map(dataclasses.astuple, evaluations))) == len(evaluations), "no trial is evaluated twice"
    assert limit < peak.peak < 4 * limit + 2 * features.nbytes < 4 * len(features) * codebook.size


@pytest.mark.parametrize(("sharpness", "smoothing", "passes"), [(25.0, 0.005, 41), (45.0, 0.05, 58)])
def test_each_smoothing_is_searched_in_a_narrow_bracket(sharpness, smoothing, passes):
    """From the s of the smoothing before to 1.25 times that: a wider one takes more passes than these, measured."""
    told = []
    fit_calibration(FEATURES, CODEBOOK, statistics_of(calibrated(sharpness, smoothing)), on_chunk=told.append)
    assert told[-1] <= passes


def test_fit_anchor_tells_of_each_chunk_of_its_one_pass(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 128 * 4 * 50)
    logits, tokens = vlm_logits(1.3)
    told = []
    target = AnchorStatistics(length=0.9, alignment=0.9)
    fit_anchor(grid(logits, tokens), CODEBOOK, target, Calibration(scale=20), on_chunk=told.append)
    assert told == [0, 0, 0]


def test_fit_tells_its_passes_and_can_be_stopped(monkeypatch):
    target, told = statistics_of(calibrated(25.0, 0.005)), []
    fit_calibration(FEATURES, CODEBOOK, target, on_chunk=told.append)
    assert told == list(range(told[-1] + 1)) and 10 < told[-1] < 2 * method.PASSES  # one chunk a pass

    def stop(passes):
        if passes == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit_calibration(FEATURES, CODEBOOK, target, on_chunk=stop)


@pytest.mark.parametrize("confidence", [0.2, 0.6, 0.95])
def test_scale_for_confidence_reaches_the_confidence(confidence):
    generator = torch.Generator().manual_seed(3)
    codebook = Codebook(torch.randn(64, 8, generator=generator))
    features = torch.randn(2, 30, 8, generator=generator)
    scale = scale_for_confidence(features, codebook, confidence)
    vectors = codebook.vectors.double().numpy()
    directions = features.double().numpy()
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    scores = scale * directions @ vectors.T
    q = np.exp(scores - scores.max(-1, keepdims=True))
    q /= q.sum(-1, keepdims=True)
    assert q.max(-1).mean() == pytest.approx(confidence, abs=2e-3)


def test_scale_for_a_confidence_out_of_reach_is_the_nearer_end():
    codebook = Codebook(torch.eye(4))
    features = torch.eye(4)[None]
    assert scale_for_confidence(features, codebook, 0.0) == pytest.approx(1, rel=1e-2)
    flat = torch.ones(1, 3, 4)
    assert scale_for_confidence(flat, codebook, 0.9) == pytest.approx(4096, rel=1e-2)


@pytest.mark.parametrize("source", ["vlm", "proxy"])
def test_positions_that_are_calibrated_already_stay(source):
    """Beside others, whose p is that of a grid without them; also where p underflows, and in a copy with ln p."""
    generator = torch.Generator().manual_seed(4)
    codebook = Codebook(torch.randn(64, 8, generator=generator))
    raw = 30 * torch.randn(2, 6, 64, generator=generator)
    at = torch.rand(2, 6, generator=generator) < 0.5
    given = {"grid": (2, 3), "tokens": raw.argmax(-1), "source": source}
    calibration = Calibration(scale=9.0, smoothing=0.02, anchor=3.0, anchor_temperature=1.7)
    mixed = TokenLogits(raw, calibrated_at=at, **given)
    plain, whole = map_logits(TokenLogits(raw, **given), codebook), TokenLogits(raw, **given)
    mapped, found = map_logits(whole, codebook, calibration), map_logits(mixed, codebook, calibration)
    for name in ("code_vectors", "uncertainty"):
        ours, kept, new = (getattr(one, name) for one in (found, plain, mapped))
        assert torch.equal(ours[at], kept[at]) and torch.equal(ours[~at], new[~at])
    applied = apply_calibration(mixed, codebook, calibration)
    assert applied.calibrated and applied.calibrated_at is None
    torch.testing.assert_close(applied.logits[at], raw[at].log_softmax(-1))
    assert torch.equal(applied.logits[~at], apply_calibration(whole, codebook, calibration).logits[~at])
    with pytest.raises(ValueError, match=f"{int(at.sum())} of 12 positions were kept from an image"):
        list(chunks.logit_chunks(mixed, needs=source))
