"""What the decoder is served with: the distance that sees whether a picture shows what its caption says."""

import pytest
import torch

from dcdd_core.evaluation.frechet import FrechetStatistics, frechet_distance
from dcdd_core.pico.choose import said_beside
from dcdd_core.pico.reader import FACTS, fact_labels
from dcdd_core.pico.scenes import scene_facts


def test_pictures_of_other_captions_are_farther_off():
    facts = scene_facts("calibration", 600)
    shapes = fact_labels(facts)["shape"]
    features = torch.randn(600, 4, generator=torch.Generator().manual_seed(0))
    features[:, 0] += shapes
    said = said_beside(features, facts)
    assert said.shape == (600, sum(map(len, FACTS.values())))
    assert float(said.norm(dim=1).mean()) == pytest.approx(float(features.norm(dim=1).mean()))

    def distance(made, *beside):
        pairs = [torch.cat([one, *beside], dim=1) for one in (features, made)]
        return frechet_distance(*(FrechetStatistics.of([pair]) for pair in pairs))

    assert distance(features, said) == pytest.approx(0, abs=1e-3)
    assert distance(features.flip(0)) == pytest.approx(0, abs=1e-3)
    assert distance(features.flip(0), said) > 0.1
