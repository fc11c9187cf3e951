"""The second metric network: what it refuses everywhere, and what it says where the optional packages are."""

from importlib.util import find_spec
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dcdd_pico import ruler
from dcdd_pico.guided_sections import DAMAGES, Rulers, measure_rulers
from dcdd_pico.models import load_reader
from dcdd_pico.ruler import TextDetectorRuler
from dcdd_pico.scenes import render_scene, scene_pixels

needs_extra = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxruntime", "rapidocr")), reason="the extra `ruler` is optional"
)


def test_a_missing_package_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setattr(ruler, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"rapidocr, which is not installed: pip install 'dcdd\[ruler\]'"):
        TextDetectorRuler()


def test_a_rapidocr_without_the_detector_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(ruler, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    with pytest.raises(ValueError, match=r"rapidocr has no models/PP-OCRv6_det_small\.onnx: install rapidocr 3\.10\.0"):
        TextDetectorRuler()


def test_another_file_is_refused(tmp_path):
    (tmp_path / "other.onnx").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"SHA-256 is d9298a10d1b0\.\.\., expected 090f04abcd9d"):
        TextDetectorRuler(tmp_path / "other.onnx")


@needs_extra
def test_features_and_distances_are_those_of_its_maps():
    network = TextDetectorRuler(threads=1)
    images = scene_pixels(np.stack([render_scene("calibration", k).image for k in range(3)]))
    maps = network.stage_maps(images)
    assert [tuple(found.shape) for found in maps] == [(3, 48, 24, 24), (3, 96, 12, 12), (3, 192, 6, 6)]
    features = network.frechet_features(images)
    assert torch.equal(features[:, 48:144], maps[1].mean((2, 3))) and features.shape == (3, 336)
    assert torch.allclose(network.perceptual_distance(images, images), torch.zeros(3), atol=1e-9)
    # Squared differences of unit vectors: 2 - 2 cos, the mean over positions.
    expected = sum((2 - 2 * torch.cosine_similarity(a[:1], a[1:2], dim=1)).mean() for a in maps)
    assert float(network.perceptual_distance(images[:1], images[1:2])) == pytest.approx(float(expected), rel=1e-4)
    given = {}
    network._run = lambda feed: given.update(feed) or []
    network.stage_maps(images)
    blue = (images[:, 2].numpy() / 2 + 0.5 - 0.485) / 0.229  # it reads blue first
    red = (images[:, 0].numpy() / 2 + 0.5 - 0.406) / 0.225
    np.testing.assert_allclose(given["x"][:, 0], blue, atol=1e-5)
    np.testing.assert_allclose(given["x"][:, 2], red, atol=1e-5)
    assert network.fingerprint == "pp-ocrv6-det-small-090f04abcd9d-imagenet"


@needs_extra
def test_both_networks_rise_with_every_damage(monkeypatch):
    """Blur, noise, JPEG, a tint, and the object's place emptied: each distance at each level above the one before."""
    rulers = SimpleNamespace(
        painters=SimpleNamespace(pico=SimpleNamespace(tokenizer=SimpleNamespace(device="cpu"))),
        reader=load_reader(),
        detector=TextDetectorRuler(threads=1),
    )
    monkeypatch.setattr(Rulers, "of", classmethod(lambda cls, setup: rulers))
    with torch.no_grad():
        rows = measure_rulers(SimpleNamespace(images=[None] * 16))
    assert list(rows) == [f"{damage} {level:g}" for damage, levels in DAMAGES.items() for level in levels]
    for damage, levels in DAMAGES.items():
        for column in ("perceptual", "perceptual, text detector", "frechet", "frechet, text detector"):
            values = [0.0, *(rows[f"{damage} {level:g}"][column] for level in levels)]
            assert all(before < after for before, after in pairwise(values)), (damage, column, values)
