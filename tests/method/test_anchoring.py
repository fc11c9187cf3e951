"""Anchor and temperature, fitted together, find what made the proxies of a VLM's logits."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from dcdd_core.files import write_record
from dcdd_core.method.anchoring import (
    QUANTITIES,
    condition_spread,
    fit_anchor_and_temperature,
    spread_distance,
)
from dcdd_core.method.calibration import anchor_statistics, fit_anchor, proxy_logits, to_log_probabilities
from dcdd_core.method.calibration import to_probabilities as probabilities
from dcdd_core.method.lcdm import map_logits
from dcdd_core.models.card import DecoderCard
from dcdd_core.pipelines.condition import condition_for
from dcdd_core.training.vlm_conditions import Served
from dcdd_core.types import Calibration
from tests.method.test_calibration import CODEBOOK, FEATURES, grid, rand
from tests.tiny import tiny_card

CALIBRATION = Calibration(scale=20, smoothing=0.01, vlm="janus")
COSINES = proxy_logits(FEATURES, CODEBOOK)
TOKENS = COSINES.argmax(-1)


def vlm_logits(beta: float, tau: float) -> torch.Tensor:
    """Logits of which an anchor of beta at temperature tau makes the proxies of FEATURES at s = 20."""
    return tau * (20 * COSINES - beta * CODEBOOK.vectors[TOKENS] @ CODEBOOK.vectors.T)


def test_the_temperature_divides_the_logits_before_the_anchor_and_the_smoothing():
    logits, tokens = 3 * rand(2, 5, 128), torch.randint(128, (2, 5), generator=torch.Generator().manual_seed(0))
    given = {"source": "vlm", "codebook": CODEBOOK, "tokens": tokens}
    calibration = Calibration(scale=20, smoothing=0.03, anchor=4.0, anchor_temperature=1.7)
    E = CODEBOOK.vectors.double()
    expected = 0.97 * (logits.double() / 1.7 + 4 * E[tokens] @ E.T).softmax(-1) + 0.03 / 128
    torch.testing.assert_close(probabilities(logits, calibration, **given).double(), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(
        to_log_probabilities(logits, calibration, **given).double(), expected.log(), rtol=1e-4, atol=1e-5
    )
    alone = dataclasses.replace(calibration, anchor=0.0)
    found = probabilities(logits, alone, source="vlm").double()
    torch.testing.assert_close(found, 0.97 * (logits.double() / 1.7).softmax(-1) + 0.03 / 128, rtol=1e-4, atol=1e-7)
    same = probabilities(logits, calibration, source="proxy")
    assert torch.equal(same, probabilities(logits, calibration.unanchored, source="proxy")), "proxies have none"


def test_a_spread_is_the_cumulative_histogram_of_the_condition():
    made = grid(3 * rand(3, 40, 128), TOKENS)
    condition = map_logits(made, CODEBOOK, CALIBRATION)
    c, e = condition.code_vectors.double(), CODEBOOK.vectors.double()[TOKENS]
    cosine = (c * e).sum(-1) / c.norm(dim=-1)
    values = [c.norm(dim=-1), cosine, *condition.uncertainty.double().unbind(-1)]
    found = condition_spread(made, CODEBOOK, CALIBRATION)
    assert found.shape == (len(QUANTITIES), 1024)
    edges = np.arange(1, 1025) / 1024
    for name, mine, value in zip(QUANTITIES, found.numpy(), values):
        expected = (value.flatten().clamp(0, 1).numpy()[:, None] < edges).mean(0)
        expected[-1] = 1
        assert np.abs(mine - expected).max() <= 0.01, name  # a float32 on the edge of a step
    parts = condition_spread([grid(made.logits[k : k + 1], TOKENS[k : k + 1]) for k in range(3)], CODEBOOK, CALIBRATION)
    assert torch.equal(parts, found)
    moved = found.roll(64, dims=1)
    moved[:, :64] = 0
    assert spread_distance(found, found) == 0
    assert spread_distance(found, moved) > 0
    # Of two points at .25 and .75 of one quantity: half apart.
    ends = torch.zeros(2, 1, 1024, dtype=torch.float64)
    ends[0, :, 256:], ends[1, :, 768:] = 1, 1
    assert spread_distance(*ends) == pytest.approx(0.5)
    assert spread_distance(*ends.expand(2, 3, 1024)) == pytest.approx(1.5), "the sum over the quantities"


@pytest.mark.parametrize(("beta", "tau"), [(0.0, 1.0), (1.3, 0.6), (9.0, 2.2)])
def test_both_are_found_together(beta, tau):
    proxies = grid(COSINES, source="proxy")
    target = condition_spread(proxies, CODEBOOK, CALIBRATION)
    logits = vlm_logits(beta, tau)
    several = [grid(logits[k : k + 1], TOKENS[k : k + 1]) for k in range(3)]
    found = fit_anchor_and_temperature(several, CODEBOOK, target, CALIBRATION)
    assert found == dataclasses.replace(CALIBRATION, anchor=found.anchor, anchor_temperature=found.anchor_temperature)
    assert found.anchor == pytest.approx(beta, abs=0.03 + 0.05 * beta)
    assert found.anchor_temperature == pytest.approx(tau, rel=0.03)
    distance = spread_distance(condition_spread(several, CODEBOOK, found), target)
    assert distance < 0.01
    if tau != 1:
        alone = fit_anchor(several, CODEBOOK, anchor_statistics(proxies, CODEBOOK, CALIBRATION), CALIBRATION)
        assert distance < 0.2 * spread_distance(condition_spread(several, CODEBOOK, alone), target)


def test_its_ends_and_what_it_refuses():
    target = condition_spread(grid(COSINES, source="proxy"), CODEBOOK, CALIBRATION)
    with pytest.warns(UserWarning, match="out of reach; anchor and temperature stay at"):
        far = fit_anchor_and_temperature(grid(vlm_logits(0.0, 9.0), TOKENS), CODEBOOK, target, CALIBRATION)
    assert far.anchor_temperature == pytest.approx(4)
    with pytest.warns(UserWarning, match="out of reach; anchor and temperature stay at .* and 0.25"):
        near = fit_anchor_and_temperature(grid(vlm_logits(0.0, 0.1), TOKENS), CODEBOOK, target, CALIBRATION)
    assert near.anchor_temperature == pytest.approx(1 / 4)
    with pytest.raises(ValueError, match="vlm logits, got proxy logits"):
        fit_anchor_and_temperature(grid(COSINES, source="proxy"), CODEBOOK, target, CALIBRATION)
    with pytest.raises(ValueError, match="give them as a list"):
        fit_anchor_and_temperature(iter([grid(COSINES, TOKENS)]), CODEBOOK, target, CALIBRATION)


def test_files_without_a_temperature_are_read_and_written_as_they_were(tmp_path):
    old = CALIBRATION.to_dict()
    assert "anchor_temperature" not in old and "anchor_temperature" not in json.dumps(
        tiny_card(calibration=CALIBRATION).to_dict()
    )
    write_record(tmp_path / "old", "calibration", {}, old)
    assert Calibration.load(tmp_path / "old") == CALIBRATION == Calibration.from_dict(old)
    warm = dataclasses.replace(CALIBRATION, anchor=3.0, anchor_temperature=1.5, guidance=2.0)
    warm.save(tmp_path / "new")
    assert Calibration.load(tmp_path / "new") == warm
    card = tiny_card(calibration=warm, reads="anchored")
    assert DecoderCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card
    served = Served.of(card)
    assert (served.anchor, served.anchor_temperature) == (3.0, 1.5) and "temperature 1.5" in served.words()
    assert Served.from_dict(served.to_dict()) == served
    logits = Served.of(dataclasses.replace(card, reads="logits"))
    assert (logits.anchor, logits.anchor_temperature) == (0.0, 1.0)
    assert "anchor_temperature" not in logits.to_dict() and Served.from_dict(logits.to_dict()) == logits
    assert len(served.misfits(dataclasses.replace(served, anchor_temperature=1.0))) == 1
    for wrong in (0.0, -1.0, float("nan"), "warm"):
        with pytest.raises(ValueError, match="anchor_temperature"):
            dataclasses.replace(CALIBRATION, anchor_temperature=wrong)


def test_a_decoder_that_reads_logits_is_served_neither():
    warm = dataclasses.replace(CALIBRATION, anchor=3.0, anchor_temperature=1.5)
    made = grid(3 * rand(1, 40, 128), TOKENS[:1])

    def served(calibration: Calibration, reads: str) -> torch.Tensor:
        return condition_for(tiny_card(calibration=calibration, reads=reads), made, CODEBOOK).uncertainty

    assert torch.equal(served(warm, "logits"), served(CALIBRATION, "logits"))
    assert not torch.allclose(
        served(warm, "anchored"), served(dataclasses.replace(warm, anchor_temperature=1.0), "anchored")
    )
