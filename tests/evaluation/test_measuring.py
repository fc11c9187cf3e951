"""Frechet distances overall and by category from stored features."""

from __future__ import annotations

import weakref
from functools import reduce
from operator import add
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dcdd_core.evaluation.frechet import (
    FeatureSet,
    FrechetStatistics,
    frechet_distance,
    load_statistics,
    save_statistics,
)
from dcdd_core.evaluation.image_folder import ImageFile
from dcdd_core.evaluation.measuring import chosen_statistics, distances, statistics_of
from dcdd_core.evaluation.results_store import Measurements

COUNT, CATEGORIES, FEATURES = 60, 12, 24
NETWORK = SimpleNamespace(fingerprint="n")


@pytest.fixture
def images(tmp_path):
    return [ImageFile.at(tmp_path / f"{i}.png", tmp_path, f"c{i % CATEGORIES:02}") for i in range(COUNT)]


def measured(folder: Path, images, seed: int):
    """Stored features, and the same by category as they were summed at first: all categories at once."""
    features = torch.rand(COUNT, FEATURES, generator=torch.Generator().manual_seed(seed))
    kept = Measurements(folder, ["features"])
    kept.add([image.key for image in images], {"features": features})
    names = sorted({image.category for image in images})
    rows = {name: [i for i, image in enumerate(images) if image.category == name] for name in names}
    return kept, {name: FrechetStatistics.of([features[rows[name]]], network="n") for name in names}


def test_the_sums_of_a_few_categories_alone_exist_at_a_time(images, tmp_path, monkeypatch):
    """Those of a thousand, with 2048 features each, would take 33 GB."""
    (real, real_sums), (made, made_sums) = (measured(tmp_path / f"{seed}", images, seed) for seed in (0, 1))
    expected = {"overall": frechet_distance(reduce(add, real_sums.values()), reduce(add, made_sums.values()))}
    expected |= {name: frechet_distance(real_sums[name], made_sums[name]) for name in real_sums}
    alive, most, of = weakref.WeakSet(), [0], FrechetStatistics.__post_init__

    def watched(self):
        of(self)
        alive.add(self)
        most.append(len(alive))

    monkeypatch.setattr(FrechetStatistics, "__post_init__", watched)
    held = [statistics_of(images, kept, "features", NETWORK) for kept in (real, made)]
    path = tmp_path / "real.safetensors"
    save_statistics(path, held[0], size=96)
    found = chosen_statistics(load_statistics(path, network="n", size=96), [image.category for image in images], "it")
    assert distances(found, held[1]) == expected
    flat = chosen_statistics(found, [""] * COUNT, "it")[""]
    assert flat.count == COUNT and 2 <= max(most) <= 5, "the sum of a union so far, and what is added to it"
    assert path.stat().st_size < 2 * 4 * COUNT * FEATURES


def test_many_images_are_kept_as_sums(tmp_path):
    images = [ImageFile.at(tmp_path / f"{i}.png", tmp_path) for i in range(COUNT)]
    kept, sums = measured(tmp_path / "kept", images, 0)
    (found,) = statistics_of(images, kept, "features", NETWORK).values()
    assert isinstance(found, FrechetStatistics) and torch.equal(found.products, sums[""].products)
    (few,) = statistics_of(images[:9], kept, "features", NETWORK).values()
    assert isinstance(few, FeatureSet) and few.features.shape == (9, FEATURES)
