"""Image folders: which files count, their order and categories, and how files become squares."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcdd_core.evaluation.image_folder import (
    as_measured,
    at_most,
    check_categories,
    list_images,
    open_image,
    read_pixels,
)
from dcdd_core.pipelines.images import to_pixels
from dcdd_core.training.batches import DataShard
from dcdd_core.training.folders import ImageFolder
from dcdd_core.training.image_batch import Geometry


def draw(path, size=(8, 8), colour=(10, 20, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ("b/2.png", "a/1.jpg", "b/1.JPEG", "a/deep/3.webp"):
        draw(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    draw(tmp_path / "a" / "._1.png")  # macOS leaves such files, which are no images
    draw(tmp_path / "a" / ".ipynb_checkpoints" / "1-checkpoint.png")  # and Jupyter leaves copies
    return tmp_path


def test_images_come_in_the_order_of_their_names(folder):
    found = list_images(folder)
    assert [p.name for p in found] == ["a/1.jpg", "a/deep/3.webp", "b/1.JPEG", "b/2.png"]
    assert {p.category for p in found} == {""} and len({p.key for p in found}) == 4


def test_sub_folders_are_categories_on_demand(folder):
    assert [p.category for p in list_images(folder, by_category=True)] == ["a", "a", "b", "b"]
    assert [p.name for p in list_images(folder, by_category=True, limit=1)] == ["a/1.jpg", "b/1.JPEG"]
    assert [p.name for p in list_images(folder, limit=3)] == ["a/1.jpg", "a/deep/3.webp", "b/1.JPEG"]
    draw(folder / "loose.png")
    with pytest.raises(ValueError, match=r"loose.png is not in a sub-folder"):
        list_images(folder, by_category=True)


def test_a_replaced_image_has_another_key(folder):
    def key_and_size(colour):
        path = draw(folder / "a" / "0.bmp", colour=colour)
        return list_images(folder)[0].key, path.stat().st_size

    (before, size), (after, same) = key_and_size((10, 20, 30)), key_and_size((11, 20, 30))
    assert before != after and size == same


def test_a_file_is_read_once_and_only_for_its_key(folder, monkeypatch):
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or read_bytes(path))
    first, *_ = list_images(folder)
    assert not read
    assert first.key == first.key and read == ["1.jpg"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "is not a folder"),
        (lambda p: p.mkdir(), "holds no images"),
        (lambda p: p.write_text("a file"), "is not a folder"),
    ],
)
def test_no_images_are_explained(tmp_path, make, words):
    make(tmp_path / "x")
    with pytest.raises(ValueError, match=words):
        list_images(tmp_path / "x")


def test_limits_and_categories_are_checked():
    with pytest.raises(ValueError, match="--limit"):
        at_most([], 0, by_category=False)
    with pytest.raises(ValueError, match="got one in art"):
        check_categories(["food", "food", "art"])
    with pytest.raises(ValueError, match="overall"):
        check_categories(["overall", "overall"])
    check_categories(["", ""])


def test_images_of_many_sizes_make_one_batch(tmp_path):
    for i, size in enumerate([(10, 30), (64, 64), (200, 90)]):
        draw(tmp_path / f"{i}.png", size, colour=(255, 0, 0))
    pixels = read_pixels(list_images(tmp_path), 16)
    assert pixels.shape == (3, 3, 16, 16)
    assert torch.equal(pixels, torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand_as(pixels))


def test_images_stand_upright_and_in_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    assert open_image(draw(tmp_path / "a.jpg", (20, 10), exif=exif)).size == (10, 20)
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.png")
    assert open_image(tmp_path / "grey.png").getpixel((0, 0)) == (7, 7, 7)


def test_they_are_read_as_training_reads_them(tmp_path):
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((16, 16), 257 * 100, np.uint16)).save(tmp_path / "deep.png")
    Image.new("P", (16, 16)).save(tmp_path / "other.gif")
    geometry = Geometry(resolution=16, token_resolution=16, token_factor=4, vae_factor=2)
    trained = ImageFolder(tmp_path, geometry)
    items = [trained.load(entry) for entry in trained.entries(DataShard(seed=None), 0)]
    assert torch.equal(read_pixels(list_images(tmp_path), 16), to_pixels(trained.collate(items).pixels, "cpu"))


@pytest.mark.parametrize("cut", [0, 20, 300])
def test_a_damaged_image_is_named(tmp_path, cut):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"a.png cannot be read as an image"):
        open_image(path)


def test_what_is_measured_is_what_a_file_holds():
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = as_measured(pixels, 16)
    assert (found - pixels).abs().max() <= 1 / 255 + 1e-6 and torch.equal(as_measured(found, 16), found)
    assert as_measured(pixels, 8).shape == (2, 3, 8, 8)


@pytest.mark.skipif(os.name == "nt", reason="links need a permission there")
def test_a_link_into_a_hidden_folder_is_followed(tmp_path):
    draw(tmp_path / ".store" / "v1" / "a.png")
    (tmp_path / "current").symlink_to(tmp_path / ".store" / "v1")
    assert [image.name for image in list_images(tmp_path)] == ["current/a.png"]
