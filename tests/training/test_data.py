"""Sources of images: each image once an epoch, reproducible order, exact resume, all kinds of files."""

import gzip
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import tarfile
import warnings
import zlib
from collections import Counter
from itertools import chain, islice

import numpy as np
import PIL.features
import PIL.Image
import pytest
import torch
from PIL.PngImagePlugin import PngInfo

from dcdd_core.pipelines import images as image_module
from dcdd_core.pipelines.image_files import FolderListing, ReadPolicy
from dcdd_core.pipelines.images import UnreadableImage, read_rgb, square, to_pixels
from dcdd_core.training import batches as batches_module
from dcdd_core.training import folders, shards
from dcdd_core.training.batches import Batches, DataShard, Entry, Wrapped, load_in_order
from dcdd_core.training.folders import ImageFolder
from dcdd_core.training.held_out import Without
from dcdd_core.training.image_batch import Geometry
from dcdd_core.training.sources import open_images
from dcdd_core.training.tabular import SavedDataset, ShardStream
from tests.tiny import tiny_card

datasets = pytest.importorskip("datasets", reason="it comes with the 'train' extra")

COUNT = 23
SIZES = Geometry(resolution=32, token_resolution=16, token_factor=4, vae_factor=2)
KINDS = ("folder", "saved", "parquet", "webdataset")


def png(number, size=(20, 18)):
    """A image of one colour, which says its number."""
    return encoded(PIL.Image.new("RGB", size, (number, 2 * number, 255 - number)), "PNG")


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def number_of(pixels):
    assert bool((pixels[0] == pixels[0, 0, 0]).all())
    return int(pixels[0, 0, 0])


def write(kind, folder, images, files=3):
    """Stores the images (bytes by name) and returns the path for `open_images`."""
    folder.mkdir(parents=True)
    names = sorted(images)
    parts = [names[i::files] for i in range(files)]
    if kind == "folder":
        for i, name in enumerate(names):
            (folder / ("a", "test", "b/c")[i % 3]).mkdir(parents=True, exist_ok=True)
            (folder / ("a", "test", "b/c")[i % 3] / f"{name}.png").write_bytes(images[name])
    elif kind == "saved":
        rows = {"n": list(range(len(names))), "image": [{"bytes": images[n], "path": None} for n in names]}
        features = datasets.Features({"n": datasets.Value("int64"), "image": datasets.Image()})
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder)
    elif kind == "parquet":
        for i, part in enumerate(parts):
            rows = {"n": list(range(len(part))), "image": [{"bytes": images[n], "path": f"{n}.png"} for n in part]}
            features = datasets.Features({"n": datasets.Value("int64"), "image": datasets.Image()})
            datasets.Dataset.from_dict(rows, features=features).to_parquet(
                folder / f"train-{i:05}.parquet", batch_size=3
            )
    else:
        for i, part in enumerate(parts):
            with tarfile.open(folder / f"shard-{i:03}.tar", "w") as tar:
                for name in part:
                    for suffix, content in (("png", images[name]), ("json", b'{"n": 1}')):
                        info = tarfile.TarInfo(f"{name}.{suffix}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """All kinds of the same COUNT images; streams in 3 files."""
    top = tmp_path_factory.mktemp("sources")
    images = {f"{i:03}": png(i) for i in range(COUNT)}
    return {kind: write(kind, top / kind, images) for kind in KINDS}


def source(paths, kind):
    return open_images(paths[kind], SIZES)


def shard(**options):
    return DataShard(**{"window": 5} | options)


def epoch(images, part, number, start=0, mark=None):
    return [number_of(images.load(e).pixels) for e in images.entries(part, number, start, mark)]


def take(batches, count):
    return [[number_of(pixels) for pixels in batch.pixels] for batch in islice(batches, count)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_holds_every_image_once_and_has_an_order_of_its_own(paths, kind):
    images = source(paths, kind)
    orders = [epoch(images, shard(seed=seed), number) for seed in (0, 1) for number in (0, 1)]
    assert all(sorted(order) == list(range(COUNT)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert epoch(source(paths, kind), shard(seed=1), 1) == orders[3]
    stored = epoch(images, shard(seed=None), 0)
    assert stored == epoch(images, shard(seed=None), 7) and sorted(stored) == list(range(COUNT))
    assert len({entry.key for entry in images.entries(shard(), 0)}) == COUNT


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_an_epoch_of_a_stream_has_its_own_order_of_files(paths, kind):
    first = [epoch(source(paths, kind), shard(window=1), number)[0] % 3 for number in range(8)]
    assert set(first) == {0, 1, 2}  # a image's number modulo 3 is that of its file


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3])  # 3 files: by rows in turn, and by files
@pytest.mark.parametrize("seed", [0, None])
def test_processes_share_an_epoch_without_overlap_or_gap(paths, kind, world, seed):
    shares = [epoch(source(paths, kind), shard(seed=seed, rank=rank, world=world), 3) for rank in range(world)]
    assert sorted(chain(*shares)) == list(range(COUNT))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
@pytest.mark.parametrize(("files", "world", "read"), [(1, 2, 1), (3, 2, 3), (4, 2, 2), (2, 3, 2)])
def test_files_that_do_not_divide_among_processes_are_read_by_all_and_nothing_is_left_out(
    tmp_path, kind, files, world, read
):
    path = write(kind, tmp_path / kind, {f"{i:03}": png(i) for i in range(COUNT)}, files=files)
    opened, seen = [], []
    for rank in range(world):
        images = open_images(path, SIZES)
        own, rows = set(), images._open
        images._open = lambda file, start, own=own, rows=rows: own.add(file.name) or rows(file, start)
        seen += epoch(images, shard(seed=2, rank=rank, world=world), 1)
        opened.append(len(own))
    assert sorted(seen) == list(range(COUNT)) and opened == [read] * world


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2), (2, 3)])
def test_resumed_is_uninterrupted(paths, kind, rank, world):
    def batches():
        return Batches(source(paths, kind), size=4, shard=shard(seed=5, rank=rank, world=world))

    count = -(-5 * COUNT // (2 * world * 4))  # two and a half epochs
    running = batches()
    states, whole = [running.state_dict()], []
    for batch in islice(running, count):
        states.append(json.loads(json.dumps(running.state_dict())))
        whole.append([number_of(pixels) for pixels in batch.pixels])
    assert {state["epoch"] for state in states} == {0, 1, 2}
    whole += take(running, 3)
    for done, state in enumerate(states):
        resumed = batches()
        resumed.load_state_dict(state)
        assert take(resumed, 3) == whole[done : done + 3]
        # A resumed run can be resumed in its turn.
        if done + 3 <= count:
            assert resumed.state_dict() == states[done + 3]


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2), (0, 3)])
def test_a_stream_continues_the_same_with_and_without_its_mark(paths, kind, seed, rank, world):
    images, part = source(paths, kind), shard(seed=seed, rank=rank, world=world)
    entries = list(images.entries(part, 1))
    for start in range(len(entries)):
        rest = [entry.key for entry in entries[start:]]
        assert [entry.key for entry in images.entries(part, 1, start)] == rest
        for mark in (entries[start].mark, entries[max(0, start - 1)].mark):
            assert [entry.key for entry in images.entries(part, 1, start, mark)] == rest


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_decodes_nothing_again_and_opens_no_file_again(paths, kind, monkeypatch):
    running = Batches(source(paths, kind), size=4, shard=shard())
    take(running, 5)
    decoded, opened = [], []
    read, open_file = folders.read_rgb, ShardStream._open
    monkeypatch.setattr(
        folders, "read_rgb", lambda *content, **least: decoded.append(content) or read(*content, **least)
    )
    resumed = Batches(source(paths, kind), size=4, shard=shard())
    monkeypatch.setattr(ShardStream, "_open", lambda self, *at: opened.append(at[0].name) or open_file(self, *at))
    resumed.load_state_dict(running.state_dict())
    expected = epoch(resumed.source, shard(), 0)[20:]
    decoded.clear(), opened.clear()
    assert take(resumed, 1)[0][:3] == expected
    assert len(decoded) <= 8  # a chunk
    assert kind not in ("parquet", "webdataset") or len(opened) <= 3  # of 2 epochs, without the first file


@pytest.mark.parametrize("kind", KINDS)
def test_workers_change_nothing(paths, kind):
    expected, state = None, None
    for workers in (0, 2):
        batches = Batches(source(paths, kind), size=3, shard=shard(), workers=workers)
        found = take(batches, 9)
        pickle.loads(pickle.dumps(batches.source))  # as for workers that are not forked
        assert expected in (None, found) and state in (None, batches.state_dict())
        expected, state = found, batches.state_dict()


def test_the_global_generator_is_left_alone(paths):
    before = torch.get_rng_state()
    take(Batches(source(paths, "folder"), size=3), 2)
    assert torch.equal(before, torch.get_rng_state())


def small(paths):
    return open_images(paths["folder"], SIZES, policy=ReadPolicy(min_side=1))


def test_a_position_of_other_data_is_refused(paths):
    state = Batches(source(paths, "folder"), size=4, shard=shard(seed=1)).state_dict()
    for other, words in (
        (Batches(source(paths, "folder"), size=4, shard=shard(seed=2)), "seed 1 -> 2"),
        (Batches(source(paths, "folder"), size=4, shard=shard(seed=1, rank=1, world=2)), "rank 0 -> 1, world 1 -> 2"),
        (Batches(small(paths), size=4, shard=shard(seed=1)), "min_side 16 -> 1"),
        (Batches(Wrapped(small(paths)), size=4, shard=shard(seed=1)), "min_side 16 -> 1"),
        (Batches(source(paths, "saved"), size=4, shard=shard(seed=1)), "saved does not hold the same images"),
    ):
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(state)
    Batches(Wrapped(source(paths, "folder")), size=4, shard=shard(seed=1)).load_state_dict(state)
    del state["min_side"]
    Batches(small(paths), size=4, shard=shard(seed=1)).load_state_dict(state)  # of older runs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", [lambda images: images, lambda images: Without(images, frozenset("a"))])
def test_another_window_is_refused_only_where_it_changes_the_order(paths, kind, wrap):
    images = wrap(source(paths, kind))
    before, after = (Batches(images, size=4, shard=shard(seed=1, window=window)) for window in (5, 6))
    take(before, 2)
    state = before.state_dict()
    if kind in ("parquet", "webdataset"):
        with pytest.raises(ValueError, match="window 5 -> 6.*number of processes and, of a stream, window, or start"):
            after.load_state_dict(state)
        return
    assert "window" not in state
    after.load_state_dict(state | {"window": 5})  # as older runs say
    assert take(after, 3) == take(before, 3)


def test_resumed_without_an_image_that_can_be_used_it_ends(tmp_path):
    """Images become too small for it after a part of them was read."""
    path = write("folder", tmp_path / "folder", {f"{i}": png(i) for i in range(3)})
    before = Batches(open_images(path, SIZES), size=2, shard=shard())
    take(before, 1)
    state = {name: value for name, value in before.state_dict().items() if name != "min_side"}
    after = Batches(open_images(path, SIZES, policy=ReadPolicy(min_side=97)), size=2, shard=shard())
    after.load_state_dict(state)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="none of the images of .* any more.*--min-side"):
        take(after, 1)


def test_nothing_is_asked_of_the_network(paths, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: asked.append(args) or [][0])
    for kind in KINDS:
        epoch(source(paths, kind), shard(), 0)
    assert not asked
    with pytest.raises(ValueError, match="nothing is downloaded"):
        open_images("https://example.com/shard.tar", SIZES)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_writes_nothing(tmp_path, kind, monkeypatch):
    path = write(kind, tmp_path / kind, {f"{i}": png(i) for i in range(5)})
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "unwanted")

    def found():
        return {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}

    before = found()
    assert len(epoch(open_images(path, SIZES), shard(), 0)) == 5
    assert found() == before and not (tmp_path / "unwanted").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_the_same_names_in_the_working_directory_are_not_read(paths, tmp_path, monkeypatch, kind):
    for i in range(COUNT):
        (tmp_path / f"{i:03}.png").write_bytes(png(200))
    monkeypatch.chdir(tmp_path)
    assert sorted(epoch(source(paths, kind), shard(), 0)) == list(range(COUNT))


def test_a_image_stored_as_an_address_is_not_fetched(tmp_path):
    rows = {"image": [{"bytes": None, "path": "https://example.com/a.png"}]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    images = open_images(tmp_path, SIZES)
    with pytest.raises(UnreadableImage, match="nothing is downloaded"):
        images.load(next(images.entries(shard(), 0)))


@pytest.mark.parametrize("kind", KINDS)
def test_unreadable_images_are_skipped_and_named(tmp_path, kind):
    contents = {f"{i:03}": png(i) for i in range(10)} | {"004": png(4)[:60], "007": b"no image"}
    path = write(kind, tmp_path / kind, contents)

    def batches():
        return Batches(open_images(path, SIZES, policy=ReadPolicy(skip_unreadable=0.2)), size=4, shard=shard(window=4))

    def quiet(batches, count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return take(batches, count)

    with pytest.warns(UserWarning, match=r"(007|row 7|00001.parquet:2).* is skipped: UnidentifiedImageError"):
        whole = take(running := batches(), 4)
    assert [len(batch) for batch in whole] == [4, 4, 4, 4]
    assert sorted(chain(*whole[:2])) == [0, 1, 2, 3, 5, 6, 8, 9]
    assert running.counter.unreadable in (3, 4)
    for done in range(4):
        resumed = batches()
        first = batches()
        quiet(first, done)
        resumed.load_state_dict(first.state_dict())
        assert quiet(resumed, 4 - done) == whole[done:]
        assert resumed.state_dict() == running.state_dict()


def spoilt(folder, count, bad, **policy):
    """Batches of one image, in the stored order, of which some are unreadable."""
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:03}.png").write_bytes(b"" if i in bad else png(i % 200))
    return Batches(open_images(folder, SIZES, policy=ReadPolicy(**policy)), size=1, shard=shard(seed=None))


def test_too_many_unreadable_images_stop_the_run_and_are_all_named(tmp_path):
    with pytest.warns(UserWarning):  # 1 % exactly
        assert len(take(spoilt(tmp_path / "few", 300, {3, 199, 250}), 297 * 2)) == 297 * 2
    with pytest.warns(UserWarning) as warned, pytest.raises(ValueError, match="4 of 300 images of .*many could not"):
        for number, _ in enumerate(spoilt(tmp_path / "many", 300, {1, 150, 208, 299}), 1):
            assert number <= 206  # no image after the one that is too much
    named = [str(warning.message).split()[0] for warning in warned]
    assert named == ["001.png", "150.png", "208.png", "299.png"]
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="or allow them with --skip-unreadable 0.014") as said,
    ):
        take(spoilt(tmp_path / "again", 300, {1, 150, 208, 299}), 300)
    assert all(name in str(said.value) for name in named)
    with pytest.warns(UserWarning):
        assert len(take(spoilt(tmp_path / "allowed", 300, {1, 150, 208, 299}, skip_unreadable=0.014), 320)) == 320


def test_a_few_unreadable_images_do_not_make_it_read_the_whole_epoch(tmp_path, monkeypatch):
    # 2 of the first 121, but of 200 just 1 %; then 3 of 251, 4 of 252 and 5 of 253, but of 500 just 1 %
    batches = spoilt(tmp_path / "images", 900, {10, 120, 250, 251, 252})
    loaded, load = [], type(batches.source).load
    monkeypatch.setattr(type(batches.source), "load", lambda self, entry: loaded.append(entry.key) or load(self, entry))
    with pytest.warns(UserWarning):
        assert len(take(batches, 330)) == 330
    assert len(set(loaded)) < 550
    assert max(Counter(loaded).values()) == 2, "what was searched is not searched again for the next of them"


def test_a_share_of_few_images_is_that_of_all_of_them(tmp_path):
    with pytest.warns(UserWarning):
        assert len(take(spoilt(tmp_path / "small", 99, {1, 2, 3}), 96)) == 96
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="3 of 99 images"):
        take(spoilt(tmp_path / "whole", 99, {1, 2, 3}), 97)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="2 of 2 images"):
        take(spoilt(tmp_path / "none", 2, {0, 1}), 1)
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="none of the 2 images .* can be used: 2 cannot be read, and 0 are too small"),
    ):
        take(spoilt(tmp_path / "all", 2, {0, 1}, skip_unreadable=1.0), 1)


@pytest.mark.parametrize("policy", [{"min_side": 0}, {"skip_unreadable": -0.1}, {"skip_unreadable": float("nan")}])
def test_a_policy_has_numbers_in_range(policy):
    with pytest.raises(ValueError, match="--min-side must be|--skip-unreadable must lie in 0..1"):
        ReadPolicy(**policy)


@pytest.mark.parametrize("kind", KINDS)
def test_small_images_are_named_and_left_out_not_enlarged(tmp_path, kind):
    contents = {f"{i:03}": png(i, (40, 16 if i % 2 else 15)) for i in range(6)}
    path = write(kind, tmp_path / kind, contents)
    with pytest.warns(UserWarning, match=r"is skipped: it has 40 x 15 pixels .* needs at least 16"):
        found = take(Batches(open_images(path, SIZES), size=1, shard=shard(seed=None)), 6)
    assert sorted(set(chain(*found))) == [1, 3, 5]  # half of the images, and no error
    every = open_images(path, SIZES, policy=ReadPolicy(min_side=1))
    assert sorted(epoch(every, shard(), 0)) == list(range(6))
    larger = Batches(open_images(path, SIZES, policy=ReadPolicy(min_side=17)), size=1)
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"none of the 6 .* 6 are too small \(see --min-side"),
    ):
        take(larger, 1)


def test_there_have_to_be_images(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images and no other files"):
        open_images(tmp_path / "empty", SIZES)
    (tmp_path / "empty" / "notes.txt").write_text("")
    (tmp_path / "empty" / ".hidden.png").write_bytes(png(0))
    with pytest.raises(ValueError, match=r"no images \(1 file is passed over: 1 .txt\); give a folder with .bmp"):
        open_images(tmp_path / "empty", SIZES)
    with pytest.raises(ValueError, match="is not a folder"):
        ImageFolder(tmp_path / "nowhere", SIZES)
    with pytest.raises(ValueError, match="there is no file .*nowhere"):
        open_images(tmp_path / "nowhere", SIZES)
    with pytest.raises(ValueError, match=r"expected .tar shards or .parquet files, got \S+notes.txt: give files"):
        open_images(tmp_path / "empty" / "notes.txt", SIZES)
    with pytest.raises(ValueError, match="no image for process 30 of 40"):
        next(
            iter(
                Batches(
                    ImageFolder(write("folder", tmp_path / "few", {"a": png(1)}), SIZES),
                    size=1,
                    shard=shard(rank=30, world=40),
                )
            )
        )
    (tmp_path / "halfway").mkdir()
    (tmp_path / "halfway" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="halfway cannot be read as a saved dataset"):
        open_images(tmp_path / "halfway", SIZES)


def test_a_pattern_of_folders_is_told_apart_from_nothing(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="image. matches folders alone, and patterns are of .tar shards"):
        open_images(str(tmp_path / "image?"), SIZES)


def test_saved_datasets_that_would_hang_or_have_no_name_are_refused(tmp_path):
    rows = {"image": [{"bytes": png(1), "path": None}]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    unnamed = tmp_path / "\udcff"
    try:
        shutil.copytree(tmp_path / "saved", unnamed)
    except (OSError, UnicodeError):
        pytest.skip("this system has only names that are UTF-8")
    with pytest.raises(ValueError, match="the name of a saved dataset's folder must be UTF-8; rename it"):
        open_images(unnamed, SIZES)
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.unlink()
    os.mkfifo(arrow)
    with pytest.raises(ValueError, match=f"{arrow.name} is a device, pipe or socket; expected a part of a saved"):
        open_images(tmp_path / "saved", SIZES)


def test_a_folder_of_images_has_no_column(paths):
    with pytest.raises(ValueError, match="is a folder of images, which has no columns: leave out --column up"):
        open_images(paths["folder"], SIZES, column="up")


def test_columns_are_found_or_named(tmp_path, paths):
    rows = {"n": [1], "left": [{"bytes": png(1), "path": None}], "right": [{"bytes": png(2), "path": None}]}
    features = datasets.Features({"n": datasets.Value("int64"), "left": datasets.Image(), "right": datasets.Image()})
    two = datasets.Dataset.from_dict(rows, features=features)
    two.save_to_disk(tmp_path / "saved")
    two.to_parquet(tmp_path / "two.parquet")
    for path in (tmp_path / "saved", tmp_path / "two.parquet"):
        with pytest.raises(ValueError, match=r"several columns of images \(left, right\); name the one to use"):
            open_images(path, SIZES)
        assert epoch(open_images(path, SIZES, column="right"), shard(), 0) == [2]
        with pytest.raises(ValueError, match="has no column 'up'; it has n, left, right"):
            open_images(path, SIZES, column="up")
        images = open_images(path, SIZES, column="n")
        with pytest.raises(UnreadableImage, match="expected an image, got int"):
            images.load(next(images.entries(shard(), 0)))
    datasets.Dataset.from_dict({"n": [1]}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="has no column of images; name the one to use, of n"):
        open_images(tmp_path / "none.parquet", SIZES)
    with pytest.raises(ValueError, match="has no column 'jpg'; it has .*png, json"):
        open_images(paths["webdataset"], SIZES, column="jpg")
    # Written without datasets: plain bytes, or bytes and path.
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, column in (("plain", [png(3)]), ("struct", [{"bytes": png(3), "path": "3.png"}])):
        pq.write_table(pa.table({"n": [1], "image": column}), tmp_path / f"{name}.parquet")
        assert epoch(open_images(tmp_path / f"{name}.parquet", SIZES), shard(), 0) == [3]


def test_splits_are_not_mixed(tmp_path, paths):
    parquet = write("parquet", tmp_path / "splits", {f"{i}": png(i) for i in range(6)})
    (parquet / "train-00002.parquet").rename(parquet / "test-00000.parquet")
    with pytest.raises(
        ValueError, match=r"several splits \(test, train\): choose one with a pattern, such as .*train\*.parquet"
    ):
        open_images(parquet, SIZES)
    assert sorted(epoch(open_images(f"{parquet}/train-*.parquet", SIZES), shard(), 0)) == [0, 1, 3, 4]
    saved = datasets.load_from_disk(paths["saved"])
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(tmp_path / "dict")
    assert len(epoch(open_images(tmp_path / "dict", SIZES), shard(), 0)) == COUNT
    datasets.DatasetDict({"a": saved}).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match=r"splits \['a'\], but no 'train'"):
        SavedDataset(tmp_path / "other", SIZES)


def test_patterns(tmp_path, paths):
    tars = paths["webdataset"]
    files = [file.name for file in open_images(f"{tars}/shard-{{000..002}}.tar", SIZES).files]
    assert files == ["shard-000.tar", "shard-001.tar", "shard-002.tar"]
    assert [file.name for file in open_images(f"{tars}/*1.tar", SIZES).files] == ["shard-001.tar"]
    with pytest.raises(ValueError, match="there is no file .*shard-003.tar"):
        open_images(f"{tars}/shard-{{000..003}}.tar", SIZES)
    odd = write("webdataset", tmp_path / "set [1]*", {"a": png(9)}, files=1)
    assert epoch(open_images(odd, SIZES), shard(), 0) == [9]
    (odd / "b.png").write_bytes(png(1))
    with pytest.raises(ValueError, match=r"holds both images and shard-000.tar: give the sub-folder"):
        open_images(odd, SIZES)


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target, target_is_directory=True)


def test_linked_folders_are_followed_once_and_not_in_circles(tmp_path):
    root, other = tmp_path / "top", tmp_path / "other"
    for path, number in ((root / "a/1.png", 1), (other / "2.png", 2), (other / "deep/3.png", 3)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    link(root / "a/up", root)  # a circle
    link(root / "a/self", root / "a")
    link(root / "linked", other)
    link(other / "back", root)
    link(root / "twice", other)
    images = open_images(root, SIZES)
    assert images.names == ["a/1.png", "linked/2.png", "linked/deep/3.png"]
    assert sorted(epoch(images, shard(), 0)) == [1, 2, 3]


def test_patterns_follow_linked_folders_once(tmp_path, monkeypatch):
    write("webdataset", tmp_path / "top/a", {"x": png(1)}, files=1)
    write("webdataset", tmp_path / "other", {"y": png(2)}, files=1)
    write("webdataset", tmp_path / "top/.hidden", {"z": png(3)}, files=1)
    link(tmp_path / "top/linked", tmp_path / "other")
    for i in range(8):  # `glob` lists 8 ** 40 paths here
        link(tmp_path / f"top/a/up{i}", tmp_path / "top")
    expected = ["a/shard-000.tar", "linked/shard-000.tar"]
    for pattern in ("**/*.tar", "**/shard-{000..000}.tar", "**"):
        files = open_images(f"{tmp_path}/top/{pattern}", SIZES).files
        assert [str(file.relative_to(tmp_path / "top")) for file in files] == expected
    monkeypatch.chdir(tmp_path / "top")
    assert [str(file) for file in open_images("**/*.tar", SIZES).files] == expected
    assert [str(file) for file in open_images("a/**/*.tar", SIZES).files] == [
        "a/shard-000.tar",
        "a/up0/linked/shard-000.tar",
    ]


def test_a_range_of_files_has_a_bound(tmp_path):
    for pattern, count in (("{000..99999999}.tar", "100,000,000"), ("{0..999}-{0..999}.tar", "1,000,000")):
        with pytest.raises(ValueError, match=f"stands for {count} files, more than 100,000: write the numbers"):
            open_images(f"{tmp_path}/{pattern}", SIZES)
    with pytest.raises(ValueError, match="{5..2} in .* counts down"):
        open_images(f"{tmp_path}/{{5..2}}.tar", SIZES)


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_not_the_working_directory(path, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(1))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the path of the images is empty"):
        open_images(path, SIZES)


def test_files_that_are_passed_over_are_counted_and_named(tmp_path, monkeypatch):
    for name in ("a.png", "b.txt", "c.txt", "d.heic", "e.HEIF", "f", ".hidden"):
        (tmp_path / name).write_bytes(png(1))
    monkeypatch.setattr(image_module, "_heif", lambda: None)
    image_module.suffixes.cache_clear(), image_module.missing_readers.cache_clear()
    words = "5 files are passed over: 2 .txt, 1 .heic (pillow_heif reads them), 1 .heif (pillow_heif reads them), "
    with pytest.warns(UserWarning) as warned:
        images = open_images(tmp_path, SIZES)
    assert images.passed_over == words + "1 without a suffix" and images.names == ["a.png"]
    assert [str(warning.message) for warning in warned] == [f"{tmp_path}: {images.passed_over}"]


def test_a_folder_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    (tmp_path / "shut").mkdir()
    (tmp_path / "a.png").write_bytes(png(1))
    real = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert FolderListing.of(tmp_path).passed_over() == "1 folders cannot be opened: shut"


def test_avif_is_read(tmp_path):
    if "avif" not in PIL.features.modules or not PIL.features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    PIL.Image.new("RGB", (40, 20), (200, 30, 40)).save(tmp_path / "a.avif", quality=95)
    assert np.allclose(read_rgb(tmp_path / "a.avif").getpixel((5, 5)), (200, 30, 40), atol=6)
    assert open_images(tmp_path, SIZES).names == ["a.avif"]


def test_heic_is_read_where_pillow_heif_is(monkeypatch):
    content = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(64)

    class Reader:
        @staticmethod
        def open_heif(file):
            assert file.read() == content
            return Reader

        @staticmethod
        def to_pillow():
            return PIL.Image.new("RGB", (4, 6), (1, 2, 3))

    monkeypatch.setattr(image_module, "_heif", lambda: Reader)
    assert read_rgb(content).size == (4, 6)
    monkeypatch.setattr(image_module, "_heif", lambda: None)
    with pytest.raises(UnreadableImage, match="it is a HEIC image: install pillow_heif to read it"):
        read_rgb(content)


@pytest.mark.parametrize("files", [3, 1])
@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_empty_shards_among_good_ones_are_passed_over_with_a_line(tmp_path, kind, files):
    path = write(kind, tmp_path / kind, {f"{i}": png(i) for i in range(6)}, files)
    suffix = "tar" if kind == "webdataset" else "parquet"
    (path / f"a.{suffix}").write_bytes(b"")  # the first, whose columns those of the others would be
    if kind == "webdataset":
        tarfile.open(path / "z.tar", "w").close()
        tarfile.open(path / "y.tar", "w:gz").close()
    else:
        datasets.Dataset.from_dict(
            {"n": [], "image": []},
            features=datasets.Features({"n": datasets.Value("int64"), "image": datasets.Image()}),
        ).to_parquet(path / "z.parquet")
    with pytest.warns(UserWarning) as warned:
        images = open_images(path, SIZES)
        assert sorted(epoch(images, shard(), 0)) == list(range(6))
    said = {str(warning.message) for warning in warned}
    lines = ["a.parquet is empty and passed over", "z.parquet has no rows and is passed over"]
    if suffix == "tar":
        lines = [f"{name}.tar is empty and passed over" for name in "ayz"]
    assert said == {f"{path / line}" for line in lines}
    for file in path.glob(f"*.{suffix}"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty, and so are all"):
        open_images(path, SIZES)


def parquet_of(path, column, **options):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": column}), path, **options)
    return path


def test_a_parquet_file_may_not_declare_far_more_than_it_holds(tmp_path):
    import pyarrow as pa

    zeros = parquet_of(tmp_path / "zeros.parquet", [bytes(80_000_000)], compression="zstd", use_dictionary=False)
    nulls = parquet_of(tmp_path / "nulls.parquet", pa.nulls(20_000_000, pa.binary()), row_group_size=20_000_000)
    for path in (zeros, nulls):
        assert path.stat().st_size < 100_000
        with pytest.raises(
            ValueError, match=r"cannot be read beyond row 0 .*, but declares \d+,\d+,\d+ bytes of images"
        ):
            epoch(open_images(path, SIZES), shard(), 0)
    lists = parquet_of(tmp_path / "lists.parquet", pa.array([[1] * 10]))
    with pytest.raises(ValueError, match=r"'image' holds list<.*>, expected images"):
        epoch(open_images(lists, SIZES, column="image"), shard(), 0)


def test_a_repeated_value_of_a_parquet_file_is_not_held_in_every_row(tmp_path):
    import pyarrow as pa

    path = parquet_of(tmp_path / "a.parquet", [png(7, (300, 300)) + bytes(10_000_000)] * 60, compression="zstd")
    assert path.stat().st_size < 10_000
    rows = shards.parquet_rows(path, ["image"], 0)
    assert number_of(square(read_rgb(next(rows)[0]), 16)) == 7
    assert pa.total_allocated_bytes() < 150e6  # 60 of them have 600 MB
    rows.close()


def tar_of(path, mode="w", **members):
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name.replace("_", "."))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_compressed_shards_are_read(tmp_path, mode):
    tar_of(tmp_path / "a.tar", mode, a_png=png(3), a_json=b"{}", b_png=png(4), b_json=b"{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = open_images(tmp_path, SIZES)
        assert epoch(images, shard(seed=None), 0) == [3, 4]
        assert [entry.key for entry in images.entries(shard(seed=None), 0, 1)] == ["a.tar:b.png"]


def test_what_a_tar_unpacks_to_has_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST_BYTES", 100_000)
    good = {"b_png": png(2)}
    plain = tar_of(tmp_path / "plain.tar", a_png=bytes(200_000), **good)
    with pytest.warns(UserWarning, match="plain.tar:a.png .* is skipped: it has 200,000 bytes, more than 100,000"):
        policy = ReadPolicy(skip_unreadable=0.5)
        assert take(Batches(open_images(plain, SIZES, policy=policy), size=1, shard=shard(seed=None)), 1) == [[2]]
    # What is not read may be of any size, unless it has to be unpacked.
    assert epoch(open_images(tar_of(tmp_path / "big.tar", b_mp4=bytes(200_000), **good), SIZES), shard(), 0) == [2]
    with pytest.raises(ValueError, match=r"b.mp4 has 200,000 bytes when unpacked, more than 100,000"):
        open_images(tar_of(tmp_path / "gz.tar", "w:gz", b_mp4=bytes(200_000), **good), SIZES)
    # tarfile itself reads long names at once.
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 200_000
    (tmp_path / "name.tar").write_bytes(gzip.compress(name.tobuf(tarfile.GNU_FORMAT) + bytes(300_000)))
    with pytest.raises(ValueError, match=r"it declares 200,192 bytes at once, more than 100,000"):
        open_images(tmp_path / "name.tar", SIZES)


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="file names there are Unicode")
@pytest.mark.parametrize("kind", ["folder", "parquet", "webdataset"])
def test_names_that_are_not_utf_8_work(tmp_path, kind):
    folder = tmp_path / os.fsdecode(b"n\xe4me")
    path = write(kind, folder, {f"{i}": png(i) for i in range(6)})
    for file in list(path.rglob("*.*")):
        file.rename(file.with_name(os.fsdecode(b"\xff") + file.name))
    images = open_images(path, SIZES)
    assert len(images.fingerprint) == 16
    batches = Batches(images, size=3, shard=shard(), workers=1)
    assert sorted(chain(*take(batches, 2))) == list(range(6))
    assert json.loads(json.dumps(batches.state_dict())) == batches.state_dict()
    if kind != "folder":
        assert len(open_images(f"{path}/**/*.*", SIZES).files) == 3


def test_a_damaged_shard_is_named(tmp_path):
    path = write("webdataset", tmp_path / "tars", {f"{i:02}": png(i, (300, 300)) for i in range(40)})
    broken = path / "shard-001.tar"
    whole = broken.read_bytes()
    with tarfile.open(broken) as tar:
        members = tar.getmembers()
    broken.write_bytes(whole[: members[14].offset_data + 100])  # in a image
    with (
        pytest.warns(UserWarning, match="shard-001.tar has no end"),
        pytest.raises(ValueError, match=r"shard-001.tar cannot be read beyond row 7 .*: it is damaged or"),
    ):
        epoch(open_images(path, SIZES), shard(seed=None), 0)
    broken.write_bytes(whole[: members[14].offset + 100])  # between two: tarfile takes that for the end
    with pytest.warns(UserWarning, match="shard-001.tar has no end"):
        assert len(epoch(open_images(path, SIZES), shard(seed=None), 0)) == 40 - 6
    broken.write_bytes(b"x" * 5000)
    with pytest.raises(ValueError, match=r"shard-001.tar cannot be read beyond row 0 .*: it is damaged"):
        epoch(open_images(path, SIZES), shard(seed=None), 0)
    (path / "shard-002.tar").unlink()
    with pytest.raises(ValueError, match="does not exist"):
        ShardStream([path / "shard-002.tar"], SIZES)


def test_both_sizes_show_the_same_square_of_the_image(tmp_path):
    values = np.zeros((60, 100, 3), np.uint8)
    values[:, :20], values[:, 80:], values[:30, 20:50] = (255, 0, 0), (0, 0, 255), 255
    (tmp_path / "a.png").write_bytes(encoded(PIL.Image.fromarray(values), "PNG"))
    images = open_images(tmp_path, SIZES)
    batch = images.collate([images.load(entry) for entry in images.entries(shard(), 0)])
    assert batch.keys == ("a.png",)
    for pixels, side in ((batch.pixels, 32), (batch.token_pixels, 16)):
        assert pixels.shape == (1, 3, side, side) and pixels.dtype == torch.uint8
        quarter = side // 2 - 2  # away from the edges, which are blurred
        assert bool((pixels[0, :, :quarter, 2:quarter] == 255).all()) and bool(
            (pixels[0, :, -quarter:, 2:-2] == 0).all()
        )
    same = open_images(tmp_path, Geometry(resolution=16, token_resolution=16, token_factor=4, vae_factor=2))
    image = same.load(next(same.entries(shard(), 0)))
    assert torch.equal(image.pixels, batch.token_pixels[0]) and torch.equal(image.pixels, image.token_pixels)


def test_images_of_the_right_size_are_not_touched():
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(square(PIL.Image.fromarray(values), 16).permute(1, 2, 0).numpy(), values)
    wide = np.concatenate([values[:, :2], values, values[:, :1]], axis=1)  # an odd margin: no half pixels
    assert np.array_equal(square(PIL.Image.fromarray(wide), 16).permute(1, 2, 0).numpy(), wide[:, 1:17])
    pixels = to_pixels(torch.tensor([0, 51, 255], dtype=torch.uint8), "cpu")
    torch.testing.assert_close(pixels, torch.tensor([-1, -0.6, 1]))


def test_shrinking_is_antialiased():
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    small = square(PIL.Image.fromarray(stripes), 16)[:, :, 2:-2]
    assert int(small.min()) >= 120 and int(small.max()) <= 135


def grey(values, mode="I;16"):
    return PIL.Image.frombytes(mode, values.shape[::-1], values.tobytes())


def test_odd_formats():
    red = PIL.Image.new("RGB", (4, 6), (200, 30, 40))

    def corner(content, at=(0, 0)):
        image = read_rgb(content)
        assert image.mode == "RGB"
        return image.getpixel(at)

    assert corner(encoded(red.quantize(4), "PNG")) == (200, 30, 40)
    assert corner(encoded(red.convert("L"), "PNG")) == (red.convert("L").getpixel((0, 0)),) * 3
    assert corner(encoded(PIL.Image.new("1", (4, 4), 1), "PNG")) == (255, 255, 255)
    assert np.allclose(corner(encoded(red.convert("CMYK"), "JPEG", quality=95)), (200, 30, 40), atol=6)
    assert corner(encoded(red, "BMP")) == corner(encoded(red, "WEBP", lossless=True)) == (200, 30, 40)
    assert corner(encoded(PIL.Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")) == (1, 2, 3)
    assert square(read_rgb(encoded(PIL.Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")), 32)[:, 31, 0].tolist() == [1, 2, 3]
    # 16 bits: levels are rounded, not cut off at 255.
    levels = np.array([[0, 128, 257 * 100, 65535]], dtype="<u2")
    deep = [corner(encoded(grey(levels), kind), (x, 0))[0] for kind in ("PNG", "TIFF") for x in range(4)]
    assert deep == [0, 0, 100, 255] * 2
    # Transparency becomes white.
    half = PIL.Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    half.putpixel((1, 0), (200, 100, 0, 128))
    content = encoded(half, "PNG")
    assert corner(content) == (255, 255, 255)
    assert np.allclose(corner(content, (1, 0)), (227, 177, 127), atol=1)
    assert corner(encoded(half.convert("LA"), "PNG")) == (255, 255, 255)
    palette = PIL.Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert corner(encoded(palette, "PNG", transparency=0)) == (255, 255, 255)
    assert corner(encoded(palette, "GIF", transparency=0), (1, 0)) == (40, 50, 60)


def test_a_png_with_large_texts_is_read():
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    texts = PngInfo()
    texts.add_text("prompt", "a" * 3_000_000, zip=True)
    texts.add_itxt("workflow", "b" * 3_000_000, zip=True)
    content = encoded(image, "PNG", pnginfo=texts, exif=exif)
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        PIL.Image.open(io.BytesIO(content)).load()
    for end in (None, content.index(b"IDAT") - 4):  # the texts before and after the pixels
        if end is not None:
            start = content.index(b"zTXt") - 4
            content = content[:start] + content[end:-12] + content[start:end] + content[-12:]
        assert np.array_equal(read_rgb(content), image.transpose(PIL.Image.Transpose.ROTATE_270))
    profiled = encoded(image, "PNG", icc_profile=bytes(3_000_000))
    assert np.array_equal(read_rgb(profiled), image)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch):
    def header(width, height):
        content = bytearray(encoded(PIL.Image.new("L", (1, 1)), "PNG"))
        content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
        return bytes(content)

    with pytest.raises(UnreadableImage, match="it has 12000 x 12000 pixels, more than 134,217,728: shrink it"):
        read_rgb(header(12000, 12000))
    with pytest.raises(UnreadableImage, match="200000 x 200000|40000000000 pixels"):
        read_rgb(header(200_000, 200_000))
    monkeypatch.setattr(image_module, "MOST_BYTES", 10)
    with pytest.raises(UnreadableImage, match=r"it has \d+ bytes, more than 10: shrink it"):
        read_rgb(png(1))


def test_strips_are_the_whole_image(monkeypatch):
    values = np.random.default_rng(0).integers(0, 256, (11, 7, 4), dtype=np.uint8)
    levels = np.random.default_rng(0).integers(0, 65536, (11, 7)).astype("<u2")
    contents = (encoded(PIL.Image.fromarray(values), "PNG"), encoded(grey(levels), "PNG"))
    whole = [np.asarray(read_rgb(content)) for content in contents]
    monkeypatch.setattr(image_module, "_STRIP", 4)
    assert all(np.array_equal(read_rgb(content), before) for content, before in zip(contents, whole))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match="a.png is a device, pipe or socket; expected an image"):
        read_rgb(tmp_path / "a.png")


def test_rotation_in_exif_is_obeyed():
    image = PIL.Image.new("RGB", (8, 4), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 4, 4))  # its left half is black
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise: then the upper half is black
    upright = read_rgb(encoded(image, "JPEG", exif=exif, quality=95))
    assert upright.size == (4, 8) and upright.getpixel((1, 0))[0] < 20 and upright.getpixel((1, 7))[0] > 235


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "UnidentifiedImageError"),
        (encoded(PIL.Image.new("RGB", (64, 64)), "JPEG")[:400], "[Tt]runcated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "UnidentifiedImageError"),  # would start Ghostscript
        (encoded(PIL.Image.new("F", (2, 2), 0.5), "TIFF"), "no known white"),
        (encoded(PIL.Image.new("I", (2, 2), 70_000), "TIFF"), "not 16-bit grey levels"),
    ],
)
def test_what_cannot_be_read_says_why(content, words):
    with pytest.raises(UnreadableImage, match=words):
        read_rgb(content)


def test_a_file_that_went_away_is_unreadable(tmp_path):
    with pytest.raises(UnreadableImage, match="gone.png does not exist"):
        read_rgb(tmp_path / "gone.png")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token_resolution": 390}, "16-pixel tokens: use 384 or 400"),
        ({"resolution": 500}, "not a multiple of 16 pixels, .* use 496 or 512"),
        ({"resolution": 0}, "resolution must be a whole number of pixels >= 1, got 0"),
        ({"vae_factor": 8.0}, "vae_factor must be a whole number"),
        ({"resolution": 8}, "not a multiple of 16 pixels, .* use 16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(changes, words):
    janus = {"resolution": 384, "token_resolution": 384, "token_factor": 16, "vae_factor": 8}
    assert Geometry(**janus).grid == (24, 24) and Geometry(**janus).pixels_per_token == 16
    assert Geometry(**janus | {"resolution": 768}).pixels_per_token == 32
    for resolution in (256, 512, 1024):
        shown = Geometry(**janus | {"resolution": resolution})
        card = tiny_card(resolution=resolution, pixels_per_token=shown.pixels_per_token, vae_factor=8)
        assert card.painted_size(shown.grid) == (resolution, resolution)
    with pytest.raises(ValueError, match=words):
        Geometry(**janus | changes, patch=2)


@pytest.mark.parametrize(("rank", "world"), [(1, 1), (-1, 2), (0, 0)])
def test_a_shard_has_a_rank_in_the_world(rank, world):
    with pytest.raises(ValueError, match="rank must lie in"):
        DataShard(rank=rank, world=world)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        DataShard(window=0)


class Interrupted:
    """A source whose images interrupt the process that loads them, as a terminal's Ctrl-C does."""

    def load(self, entry):
        os.kill(os.getpid(), signal.SIGINT)
        return entry.key


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_an_interrupt_leaves_the_workers_at_their_work(start, monkeypatch):
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip("the system has no such processes")
    real = batches_module.DataLoader
    monkeypatch.setattr(
        batches_module, "DataLoader", lambda *args, **more: real(*args, multiprocessing_context=start, **more)
    )
    entries = [(i, Entry(f"{i}", None)) for i in range(20)]
    found = list(load_in_order(Interrupted(), entries, workers=2))
    assert found == [(i, f"{i}") for i in range(20)]
