"""Choosing the serving options: the joint distance of images and captions, and the search."""

import pytest
import torch

from dcdd_core.evaluation.frechet import FrechetStatistics, frechet_distance
from dcdd_pico.reader import FACTS, fact_labels
from dcdd_pico.scenes import scene_facts
from dcdd_pico.serving import fact_features, search_serving
from tests.tiny import tiny_card


def test_images_of_other_captions_are_farther_off():
    facts = scene_facts("calibration", 600)
    shapes = fact_labels(facts)["shape"]
    features = torch.randn(600, 4, generator=torch.Generator().manual_seed(0))
    features[:, 0] += shapes
    said = fact_features(features, facts)
    assert said.shape == (600, sum(map(len, FACTS.values())))
    assert float(said.norm(dim=1).mean()) == pytest.approx(float(features.norm(dim=1).mean()))

    def distance(made, *beside):
        pairs = [torch.cat([one, *beside], dim=1) for one in (features, made)]
        return frechet_distance(*(FrechetStatistics.of([pair]) for pair in pairs))

    assert distance(features, said) == pytest.approx(0, abs=1e-3)
    assert distance(features.flip(0)) == pytest.approx(0, abs=1e-3)
    assert distance(features.flip(0), said) > 0.1


def test_the_shift_grows_as_long_as_that_is_better_and_each_reading_is_tried_with_the_best():
    tried = []

    def distance(card):
        tried.append((card.shift, card.reads))
        return {"anchored": 0.5, "logits": 0.4, "tokens": 0.6}[card.reads] + abs((card.shift or 0.0) - 2.2)

    by_shift, by_reading = search_serving(tiny_card(reads="anchored"), distance)
    assert list(by_shift) == [None, 1.0, 1.5, 2.0, 2.5] and min(by_shift, key=by_shift.get) == 2.0
    assert by_reading == pytest.approx({"anchored": 0.7, "logits": 0.6, "tokens": 0.8})
    assert tried[-2:] == [(2.0, "logits"), (2.0, "tokens")] and len(tried) == 7
    by_shift, _ = search_serving(tiny_card(reads="anchored"), lambda card: card.shift or 0.0)
    assert list(by_shift) == [None, 1.0]
