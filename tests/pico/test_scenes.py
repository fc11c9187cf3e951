"""Scenes: reproducible, disjoint between splits, and as their captions say."""

import numpy as np
import pytest
import torch

from dcdd_pico.reader import FACTS, fact_labels
from dcdd_pico.scene_arrays import scene_images
from dcdd_pico.scenes import (
    COLOURS,
    GROUND_COLOURS,
    PLACES,
    SHAPES,
    SceneFacts,
    draw,
    render_scene,
    sample_facts,
    scene_facts,
    scene_pixels,
    vocabulary,
)


def facts(**changes):
    plain = {
        "shape": "circle",
        "colour": "red",
        "texture": "plain",
        "size": "large",
        "place": "in the centre",
        "ground_colour": "navy",
        "ground_texture": "plain",
    }
    return SceneFacts(**(plain | changes))


def image(size=96, seed=0, **changes):
    return draw(facts(**changes), np.random.default_rng(seed), size=size).astype(float) / 255


def test_a_scene_is_its_number():
    a, b = render_scene("train", 5), render_scene("train", 5)
    assert np.array_equal(a.image, b.image) and a.caption == b.caption and a.image.dtype == np.uint8
    assert not np.array_equal(a.image, render_scene("test", 5).image)


def test_splits_are_disjoint_and_bounded():
    captions = {split: {f.caption() for f in scene_facts(split, 200)} for split in ("train", "calibration", "test")}
    assert len(set.union(*captions.values())) > 590
    with pytest.raises(ValueError, match="outside"):
        render_scene("test", 1_000_000)
    with pytest.raises(ValueError, match="unknown split"):
        render_scene("validation", 0)


def test_facts_without_drawing_are_those_drawn():
    assert [render_scene("test", i).facts for i in range(20)] == scene_facts("test", 20)


@pytest.mark.parametrize("colour", COLOURS)
def test_the_object_has_its_colour(colour):
    middle = image(colour=colour)[44:52, 44:52].mean((0, 1))
    nearest = min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - middle).sum())
    assert nearest == colour


@pytest.mark.parametrize("ground", GROUND_COLOURS)
def test_the_ground_has_its_colour(ground):
    border = image(ground_colour=ground)[:6].mean((0, 1))
    assert min(GROUND_COLOURS, key=lambda name: np.abs(np.array(GROUND_COLOURS[name]) - border).sum()) == ground


@pytest.mark.parametrize("place", PLACES)
def test_the_object_is_at_its_place(place):
    red = image(place=place)[..., 0] > 0.6
    y, x = np.nonzero(red)
    assert np.abs(x.mean() / 96 - PLACES[place][0]) < 0.05 and np.abs(y.mean() / 96 - PLACES[place][1]) < 0.05


def test_stripes_run_the_way_they_are_called():
    def roughness(texture):
        middle = image(texture=texture, shape="square", seed=3)[36:60, 36:60, 0]
        return np.abs(np.diff(middle, axis=0)).mean(), np.abs(np.diff(middle, axis=1)).mean()

    down, across = roughness("striped")
    assert down > 3 * across
    down, across = roughness("barred")
    assert across > 3 * down


def test_shapes_differ_and_none_is_empty():
    areas = {shape: image(shape=shape)[..., 0] > 0.6 for shape in SHAPES}
    assert all(0.03 < area.mean() < 0.3 for area in areas.values())
    for a in SHAPES:
        assert all(np.logical_xor(areas[a], areas[b]).mean() > 0.01 for b in SHAPES if b != a)


def test_edges_are_antialiased_and_composition_does_not_depend_on_size():
    small, large = image(size=48), image(size=192)
    shrunk = large.reshape(48, 4, 48, 4, 3).mean((1, 3))
    assert np.abs(small - shrunk).mean() < 0.01
    assert len(np.unique(small[..., 0])) > 20


def test_every_caption_word_is_in_the_vocabulary():
    words = set(vocabulary())
    for f in scene_facts("train", 500):
        assert set(f.caption().split()) <= words


def test_accents_and_writing_keep_off_the_object():
    rng = np.random.default_rng(0)
    for f in (sample_facts(rng) for _ in range(500)):
        if f.accent is not None:
            (x, y), (u, v) = PLACES[f.place], PLACES[f.accent.place]
            assert abs(x - u) + abs(y - v) > 0.4 and f.accent.colour != f.colour
        if f.writing is not None:
            assert f.writing not in f.place and (f.accent is None or f.writing not in f.accent.place)


def test_cached_images_are_the_rendered_ones(tmp_path):
    images = scene_images(tmp_path, "test", 3, size=32)
    assert np.array_equal(images[2], render_scene("test", 2, size=32).image)
    assert np.array_equal(scene_images(tmp_path, "test", 3, size=32), images)
    pixels = scene_pixels(images[:2])
    assert pixels.shape == (2, 3, 32, 32) and pixels.is_contiguous()
    torch.testing.assert_close((pixels[1, 2, 3, 4] + 1) * 127.5, torch.tensor(float(images[1, 3, 4, 2])))


def test_labels_are_answers():
    some = scene_facts("test", 50)
    labels = fact_labels(some)
    assert all(FACTS[name][labels[name][k]] == getattr(f, name) for name in FACTS for k, f in enumerate(some))
