"""The cache of encodings: equal to encoding on the fly, resumed to the byte, refused if it does not fit."""

import builtins
import errno
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import tarfile
import time
import warnings
from itertools import chain, islice
from pathlib import Path

import PIL.Image
import pytest
import torch
from safetensors.torch import load, save

from dcdd_core.models.vae import KLCodec
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.pipelines.image_files import ReadPolicy
from dcdd_core.pipelines.images import to_pixels
from dcdd_core.training import cache_writer
from dcdd_core.training.batches import Batches, DataShard
from dcdd_core.training.cache import CacheCard, EncodingCache
from dcdd_core.training.cache_writer import write_cache
from dcdd_core.training.encoded_batch import encode, geometry_for, normalized_latents
from dcdd_core.training.sources import open_images
from tests.tiny import tiny_vae, tiny_vq

COUNT = 11


@pytest.fixture(scope="module")
def networks():
    return {"tokenizer": VQTokenizer(tiny_vq(), name="tiny"), "codec": KLCodec(tiny_vae())}


@pytest.fixture(scope="module")
def geometry(networks):
    return geometry_for(**networks, patch=2, resolution=32, token_resolution=16)


class NoCodec(KLCodec):
    """Encodes nothing."""

    def __init__(self):
        super().__init__(tiny_vae())

    def encode(self, pixels):
        raise AssertionError("nothing is to be encoded")


def png(number, side=20):
    draw = random.Random(number)
    file = io.BytesIO()
    PIL.Image.frombytes("RGB", (side, side), draw.randbytes(3 * side * side)).save(file, "PNG")
    return file.getvalue()


def folder_of(path, count=COUNT, bad=()):
    path.mkdir()
    for i in range(count):
        (path / f"{i:03}.png").write_bytes(b"no image" if i in bad else png(i))
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory, geometry):
    return open_images(folder_of(tmp_path_factory.mktemp("images") / "folder"), geometry)


def write(folder, source, networks, **options):
    write_cache(folder, source, **networks, **{"shard_size": 4, "batch_size": 3, "report": lambda _: None} | options)
    return folder


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, images, networks):
    """A finished cache of 3 shards. Tests do not write to it."""
    return write(tmp_path_factory.mktemp("whole") / "cache", images, networks)


def together(source, shard=None, count=1, size=COUNT):
    return list(islice(Batches(source, size=size, shard=shard or DataShard(seed=None)), count))


def test_cached_is_on_the_fly_rounded_to_half(whole, images, networks):
    encodings = EncodingCache(whole)
    assert len(encodings) == COUNT and encodings.keys == images.names
    pixels = together(images)[0]
    fresh = encode(pixels, **networks)
    cached = encode(together(encodings)[0], **networks)
    assert cached.features.shape == (COUNT, 16, 8) and cached.latents.shape == (COUNT, 16, 16, 16)
    for name in ("features", "latents"):
        of_cache, of_pixels = getattr(cached, name), getattr(fresh, name)
        assert of_cache.dtype == of_pixels.dtype == torch.float32
        torch.testing.assert_close(of_cache, of_pixels, rtol=2e-3, atol=2e-3)
        assert float(of_pixels.std()) > 0.1
    # Both come of their own size of the image.
    torch.testing.assert_close(fresh.features, networks["tokenizer"].features(to_pixels(pixels.token_pixels, "cpu")))
    raw = networks["codec"].model.encode(to_pixels(pixels.pixels, "cpu")).latent_dist.mean
    torch.testing.assert_close(fresh.latents, (raw - 0.1) * 0.5)
    torch.testing.assert_close(fresh.pixels, to_pixels(pixels.pixels, "cpu"))
    assert cached.pixels is None


def test_batches_of_writing_do_not_matter(tmp_path, whole, images, networks):
    other = EncodingCache(write(tmp_path / "other", images, networks, shard_size=7, batch_size=1))
    for name in ("features", "latents"):
        first, second = (getattr(together(c)[0], name) for c in (EncodingCache(whole), other))
        torch.testing.assert_close(first, second, rtol=1e-2, atol=1e-3)


def test_pixels_are_kept_where_localised_training_needs_them(tmp_path, images, networks, geometry):
    encodings = EncodingCache(write(tmp_path / "cache", images, networks, keep_pixels=True))
    batch = together(encodings)[0]
    fresh = encode(together(images)[0], **networks)
    assert torch.equal(batch.pixels, fresh.pixels)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:20, 4:30] = 1
    masked = normalized_latents(networks["codec"], batch.pixels, mask)
    torch.testing.assert_close(masked, normalized_latents(networks["codec"], fresh.pixels * (1 - mask)))
    assert not torch.allclose(masked, batch.latents, atol=1e-2)
    encodings.require(CacheCard.of(**networks, geometry=geometry, pixels=True))
    with pytest.raises(ValueError, match="holds another cache: it keeps the pixels"):
        write(tmp_path / "cache", images, networks)


def test_a_bar_shows_rate_time_left_and_memory_in_a_terminal_alone(tmp_path, images, networks, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, wanted in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stderr", stream)
        write(tmp_path / f"cache-{wanted}", images, networks)
        last = stream.getvalue().split("\r")[-1].strip()
        assert bool(re.search(rf"^cache: .*{COUNT}/{COUNT} .*image/?s?.* GB of memory", last)) == wanted, last
        assert bool(stream.getvalue()) == wanted
        for rank in (0, 1):
            stream.seek(stream.truncate(0))
            EncodingCache(tmp_path / f"cache-{wanted}").verify(rank=rank, world=2)
            assert ("checksums of the cache: 100%" in stream.getvalue()) == (wanted and rank == 0)


def test_any_item_is_read_alone(whole):
    every = together(EncodingCache(whole))[0]
    for indices in ([10], [3], [4], [0], [7, 2, 2, 9]):
        some = EncodingCache(whole).batch(indices)
        assert torch.equal(some.features, every.features[indices]) and torch.equal(some.latents, every.latents[indices])
    encodings = EncodingCache(whole)
    encodings.batch([5])
    assert list(encodings._open) == [1]  # the other shards stay closed
    for indices in ([-1], [3, COUNT], []):
        with pytest.raises(ValueError, match="expected indices in 0..10, at least one, got"):
            encodings.batch(indices)


@pytest.mark.parametrize("world", [1, 2])
def test_a_cache_is_shuffled_shared_and_resumed_as_images_are(whole, images, world):
    encodings = EncodingCache(whole)
    orders = [
        [
            [entry.data for entry in encodings.entries(DataShard(seed=4, rank=rank, world=world), epoch)]
            for epoch in (0, 1)
        ]
        for rank in range(world)
    ]
    for epoch in (0, 1):
        assert sorted(chain(*(order[epoch] for order in orders))) == list(range(COUNT))
    assert orders[0][0] != orders[0][1] and orders[0][0] != sorted(orders[0][0])
    names = [entry.key for entry in images.entries(DataShard(seed=4, rank=0, world=world), 1)]
    assert names == [encodings.keys[i] for i in orders[0][1]]  # training can take either

    def batches(**options):
        return Batches(EncodingCache(whole), size=3, shard=DataShard(seed=4, rank=world - 1, world=world), **options)

    running, states = batches(), []
    expected = []
    for batch in islice(running, 9):
        states.append(json.loads(json.dumps(running.state_dict())))
        expected.append(batch.features)
    assert states[-1]["epoch"] >= 1
    resumed = batches(workers=2)
    resumed.load_state_dict(states[3])
    for batch, features in zip(islice(resumed, 5), expected[4:]):
        assert torch.equal(batch.features, features)


def test_a_cache_may_be_moved(tmp_path, whole, images, networks, geometry):
    moved = tmp_path / "moved"
    moved.mkdir()
    for name, content in files(whole).items():
        (moved / name).parent.mkdir(exist_ok=True)
        (moved / name).write_bytes(content)
    assert len(EncodingCache(moved)) == COUNT
    folder_of(tmp_path / "images")
    write(moved, open_images(tmp_path / "images", geometry), networks)
    assert {k: v for k, v in files(moved).items() if k != "manifest.json"} == {
        k: v for k, v in files(whole).items() if k != "manifest.json"
    }


def test_a_finished_cache_is_left_as_it_is(tmp_path, images, networks, monkeypatch):
    folder = write(tmp_path / "cache", images, networks)
    before = files(folder)
    monkeypatch.setattr(cache_writer, "encode", None)
    reported = []
    write(folder, images, networks, report=reported.append)
    assert files(folder) == before and reported == [f"{folder}: keeping 3 finished shards"]


def test_workers_write_the_same(tmp_path, whole, images, networks):
    assert files(write(tmp_path / "cache", images, networks, workers=2)) == files(whole)


def in_a_process(work):
    """Runs work in a process of its own (a fork: it needs no imports); returns it."""
    process = multiprocessing.get_context("fork").Process(target=one_threaded, args=(work,))
    process.start()
    return process


def one_threaded(work):
    torch.set_num_threads(1)  # the other threads were not forked
    warnings.simplefilter("ignore")
    work()


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


@needs_fork
def test_killed_at_any_write_it_resumes_to_the_same_bytes(tmp_path, images, networks):
    def run(folder, until=None):
        calls = 0

        def counted(real):
            def call(*args, **options):
                nonlocal calls
                if calls == until:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1
                return real(*args, **options)

            return call

        def work():
            os.fsync, os.replace = counted(os.fsync), counted(os.replace)
            write(folder, images, networks)

        process = in_a_process(work)
        process.join()
        return process.exitcode

    assert run(tmp_path / "expected") == 0
    expected = files(tmp_path / "expected")
    kills = 0
    for until in range(100):
        folder = tmp_path / f"killed-{until}"
        code = run(folder, until)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        if (folder / "manifest.json").exists():
            manifest = json.loads((folder / "manifest.json").read_text())
            lines = [json.loads(path.read_text()) for path in folder.glob("shards/0*.json")]
            for shard in [*manifest["shards"], *lines]:  # what they name is there, and whole
                assert (folder / shard["file"]).read_bytes() == expected[shard["file"]]
            if not manifest["complete"]:
                with pytest.raises(ValueError, match="is not finished"):
                    EncodingCache(folder)
        assert run(folder) == 0
        assert files(folder) == expected, until
    assert kills > 15


@needs_fork
def test_killed_at_any_time_it_resumes_to_the_same_bytes(tmp_path, geometry, networks):
    source = open_images(folder_of(tmp_path / "images", 24), geometry)

    real = os.fsync

    def work(folder):
        def slowly():
            os.fsync = lambda file: (time.sleep(0.02), real(file))
            write(folder, source, networks, shard_size=2, batch_size=1)

        return slowly

    in_a_process(work(tmp_path / "expected")).join()
    expected, draw, kills = files(tmp_path / "expected"), random.Random(), 0
    assert json.loads(expected["manifest.json"])["items"] == 24
    for shards in (1, 5, 9):
        process = in_a_process(work(tmp_path / "killed"))
        while process.exitcode is None and len(list(tmp_path.glob("killed/shards/*.safetensors"))) < shards:
            time.sleep(0.001)
        process.join(draw.uniform(0, 0.1))
        kills += process.exitcode is None
        process.kill()
        process.join()
    assert kills
    last = in_a_process(work(tmp_path / "killed"))
    last.join()
    assert last.exitcode == 0
    assert files(tmp_path / "killed") == expected


@needs_fork
def test_several_processes_write_one_cache(tmp_path, images, networks):
    folder = tmp_path / "cache"
    processes = [
        in_a_process(lambda r=rank: write(folder, images, networks, shard_size=1, rank=r, world=3)) for rank in range(3)
    ]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    alone = in_a_process(lambda: write(tmp_path / "alone", images, networks, shard_size=1))
    alone.join()
    assert files(folder) == files(tmp_path / "alone")
    assert EncodingCache(folder).keys == images.names


def test_the_number_of_processes_may_change(tmp_path, images, networks):
    folder = tmp_path / "cache"
    write(folder, images, networks, rank=1, world=2)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [shard["file"] for shard in manifest["shards"]] == ["shards/00001.safetensors"]
    with pytest.raises(ValueError, match="is not finished, it has 1 shards so far"):
        EncodingCache(folder)
    kept = (folder / "shards/00001.safetensors").stat().st_mtime_ns
    write(folder, images, networks)
    assert (folder / "shards/00001.safetensors").stat().st_mtime_ns == kept
    assert files(folder) == files(write(tmp_path / "alone", images, networks))


def test_the_manifest_misses_no_shard_that_another_process_writes_meanwhile(tmp_path, images, networks, monkeypatch):
    """While one process replaces the manifest, another finishes its shard, and is done."""
    alone = files(write(tmp_path / "alone", images, networks))
    folder, real, others = tmp_path / "cache", os.replace, []

    def replace(source, target):
        # Shards 0 and 2 are there, and the end is known: this manifest would be the last.
        if Path(target).name == "manifest.json" and (folder / "shards/end.json").exists() and not others:
            others.append(target)
            write(folder, images, networks, rank=1, world=2)
            assert json.loads((folder / "manifest.json").read_text())["complete"]
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write(folder, images, networks, rank=0, world=2)
    assert others and files(folder) == alone


def test_shards_stay_in_order_when_their_numbers_grow_longer(tmp_path):
    writer = cache_writer._Writer(tmp_path, None, None, 1, DataShard())
    (tmp_path / "shards").mkdir()
    for number in (100_000, 99_999, 3):
        line = {"file": f"shards/{number:05}.safetensors", "items": 1, "bytes": 1, "sha256": "", "read": 1}
        (tmp_path / f"shards/{number:05}.json").write_text(json.dumps(line | {"unreadable": [], "mark": None}))
    assert list(writer._read_lines()) == [3, 99_999, 100_000]


def test_a_stream_is_entered_where_the_cache_ends(tmp_path, geometry, networks, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="it comes with the 'train' extra")
    assert datasets
    tars = tmp_path / "tars"
    tars.mkdir()
    for i in range(5):
        with tarfile.open(tars / f"{i}.tar", "w") as tar:
            for j in range(3):
                content = png(3 * i + j)
                info = tarfile.TarInfo(f"{i}-{j}.png")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    source = open_images(tars, geometry)
    expected = files(write(tmp_path / "expected", source, networks))
    stopped = tmp_path / "stopped"

    def stop(line):
        if "shard 2 " in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(stopped, source, networks, report=stop)
    opened, real = [], type(source)._open
    monkeypatch.setattr(type(source), "_open", lambda self, *at: opened.append(at[0].name) or real(self, *at))
    write(stopped, source, networks)
    assert files(stopped) == expected
    assert opened == ["2.tar", "3.tar", "4.tar"]  # shard 2 began at image 8
    assert EncodingCache(stopped).keys[4] == "1.tar:1-1.png"


def damage(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_a_damaged_shard_is_found_and_made_again(tmp_path, whole, images, networks):
    folder = write(tmp_path / "cache", images, networks)
    damage(folder / "shards/00001.safetensors")
    encodings = EncodingCache(folder)
    with pytest.raises(ValueError, match="1 of 3 shards .* damaged.*shards/00001.safetensors.*Copy"):
        encodings.verify()
    encodings.verify(rank=0, world=2)  # the other process checks it
    with pytest.raises(ValueError, match="1 of 1 shards"):
        encodings.verify(rank=1, world=2)
    with pytest.warns(UserWarning, match="00001.safetensors is missing or damaged; it is made again"):
        write(folder, images, networks)
    assert files(folder) == files(whole)
    EncodingCache(folder).verify()
    for change, words in (
        (lambda p: p.write_bytes(p.read_bytes()[:-9]), "bytes, expected"),
        (Path.unlink, "is missing"),
    ):
        change(folder / "shards/00000.safetensors")
        with pytest.raises(ValueError, match=f"00000.safetensors .*{words}"):
            EncodingCache(folder)
        with pytest.warns(UserWarning, match="made again"):
            write(folder, images, networks)
        assert files(folder) == files(whole)


def test_a_foreign_cache_is_refused(whole, networks, geometry):
    encodings = EncodingCache(whole)
    wanted = CacheCard.of(**networks, geometry=geometry)
    encodings.require(wanted)
    # Weights in another type are the same weights.
    half = {"tokenizer": VQTokenizer(tiny_vq().bfloat16()), "codec": KLCodec(tiny_vae().bfloat16())}
    encodings.require(CacheCard.of(**half, geometry=geometry))
    # What the encodings do not depend on may differ.
    painter = tiny_vae()
    torch.nn.init.zeros_(painter.decoder.conv_out.weight)
    encodings.require(CacheCard.of(networks["tokenizer"], KLCodec(painter), geometry))

    tuned = tiny_vq()
    torch.nn.init.zeros_(tuned.quant_conv.weight)
    scaled = tiny_vae()
    scaled.register_to_config(scaling_factor=0.6)
    other = geometry_for(**networks, patch=2, resolution=64, token_resolution=16)
    for card, words in (
        (CacheCard.of(VQTokenizer(tiny_vq(1)), networks["codec"], geometry), "its tokenizer has another codebook"),
        (CacheCard.of(VQTokenizer(tuned), networks["codec"], geometry), "its tokenizer has another encoder"),
        (CacheCard.of(networks["tokenizer"], KLCodec(tiny_vae(1)), geometry), "it was made with another autoencoder"),
        (
            CacheCard.of(networks["tokenizer"], KLCodec(scaled), geometry),
            r"another shift and scale \(0.1, 0.5, expected 0.1, 0.6\)",
        ),
        (CacheCard.of(**networks, geometry=other), "does not fit: its resolution is 32, expected 64. Use"),
        (CacheCard.of(**networks, geometry=geometry, pixels=True), "does not keep the images' pixels"),
    ):
        with pytest.raises(ValueError, match=words):
            encodings.require(card)


def test_another_cache_is_not_written_over(tmp_path, whole, images, networks, geometry):
    folder = write(tmp_path / "cache", images, networks)
    before = files(folder)
    fewer = open_images(folder_of(tmp_path / "fewer", 3), geometry)
    larger = open_images(images.folder, geometry_for(**networks, patch=2, resolution=64, token_resolution=16))
    for source, changed, options, words in (
        (fewer, {}, {}, "it is of other images: those of .*folder when it was written"),
        (images, {}, {"shard_size": 5}, "its shard size is 4, expected 5"),
        (images, {"codec": KLCodec(tiny_vae(1))}, {}, "it was made with another autoencoder"),
        (larger, {}, {}, "its resolution is 32, expected 64"),
    ):
        with pytest.raises(ValueError, match=words):
            write(folder, source, networks | changed, **options)
    assert files(folder) == before
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="shards without their manifest"):
        write(folder, images, networks)
    with pytest.raises(ValueError, match=r"is not empty and not a cache \(it holds 00\d.png\): choose a new folder"):
        write(tmp_path / "fewer", images, networks)
    with pytest.raises(ValueError, match="holds no cache of encodings"):
        EncodingCache(tmp_path / "fewer")
    (tmp_path / "fewer" / "manifest.json").write_text('{"format": "dcdd encodings 0"}')
    with pytest.raises(ValueError, match="has the format 'dcdd encodings 0', expected 'dcdd encodings 1'"):
        EncodingCache(tmp_path / "fewer")


def test_a_full_disk_loses_nothing_that_is_finished(tmp_path, whole, images, networks, monkeypatch):
    folder = tmp_path / "cache"
    real = builtins.open

    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_path(self, mode="r", *args, **options):
        if "00001.safetensors" in self.name and "w" in mode:
            real(self, "wb").close()
            return Full()
        return real(self, mode, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", open_path)
        words = r"00001.safetensors could not be written .* GB are free .*make room .*The 1 finished shards are kept"
        with pytest.raises(OSError, match=words):
            write(folder, images, networks)
    assert not list(folder.rglob("*.tmp"))
    assert (folder / "shards/00000.safetensors").read_bytes() == (whole / "shards/00000.safetensors").read_bytes()
    kept = (folder / "shards/00000.safetensors").stat().st_mtime_ns
    assert files(write(folder, images, networks)) == files(whole)
    assert (folder / "shards/00000.safetensors").stat().st_mtime_ns == kept


def test_unreadable_images_are_left_out_and_counted(tmp_path, networks, geometry):
    policy = ReadPolicy(skip_unreadable=0.5)
    source = open_images(folder_of(tmp_path / "some", 10, bad=(2, 4, 5, 6, 7)), geometry, policy=policy)
    said = []
    with pytest.warns(UserWarning, match="002.png of .*some is skipped: UnidentifiedImageError"):
        folder = write(tmp_path / "cache", source, networks, report=said.append)
    names = "002.png, 004.png, 005.png, 006.png, 007.png"
    assert said[-1].endswith(f"5 images are unreadable and left out: {names}")
    write(folder, source, networks, report=said.append)  # Finished: it is said again.
    assert said[-1].endswith(names)
    encodings = EncodingCache(folder)
    assert encodings.keys == ["000.png", "001.png", "003.png", "008.png", "009.png"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["items"], manifest["unreadable"]) == (5, 5)
    assert [shard["items"] for shard in manifest["shards"]] == [3, 0, 2]
    good = open_images(tmp_path / "some", geometry)
    for i in range(len(encodings)):
        (entry,) = [e for e in good.entries(DataShard(seed=None), 0) if e.key == encodings.keys[i]]
        fresh = encode(good.collate([good.load(entry)]), **networks)
        torch.testing.assert_close(encodings.batch([i]).features, fresh.features, rtol=2e-3, atol=2e-3)
    for share, words in ((0.01, "2 of 2 images of .* could not be read"), (1, "none of the 2 images .* can be used")):
        policy = ReadPolicy(skip_unreadable=share)
        none = open_images(folder_of(tmp_path / f"bad-{share}", 2, bad=(0, 1)), geometry, policy=policy)
        with pytest.warns(UserWarning), pytest.raises(ValueError, match=words):
            write(tmp_path / f"nothing-{share}", none, networks)
        with pytest.raises(ValueError, match="holds no images: write it again"):
            EncodingCache(tmp_path / f"nothing-{share}")


def test_too_many_unreadable_images_are_all_named_and_can_be_repaired(tmp_path, networks, geometry):
    folder = folder_of(tmp_path / "many", 110, bad=(10, 20, 106))
    options = {"shard_size": 15, "batch_size": 15}
    named = ["010.png", "020.png", "106.png"]
    with pytest.warns(UserWarning) as warned, pytest.raises(ValueError, match="3 of 110 images") as said:
        write(tmp_path / "cache", open_images(folder, geometry), networks, **options)
    assert [str(warning.message).split(" ")[0] for warning in warned] == named
    assert all(name in str(said.value) for name in named)
    # The same again says the same, without encoding anything again.
    with pytest.raises(ValueError, match="3 of 110 images .*: 010.png, 020.png, 106.png. Check the disk"):
        write(tmp_path / "cache", open_images(folder, geometry), {**networks, "codec": NoCodec()}, **options)
    allowed = open_images(folder, geometry, policy=ReadPolicy(skip_unreadable=0.03))
    write(tmp_path / "cache", allowed, networks, **options)
    assert len(EncodingCache(tmp_path / "cache")) == 107
    (folder / "106.png").write_bytes(png(106))
    with pytest.warns(UserWarning, match="00007.safetensors lacks images that were unreadable and have changed"):
        write(tmp_path / "cache", allowed, networks, **options)
    assert len(EncodingCache(tmp_path / "cache")) == 108


def test_small_images_are_left_out_of_a_cache_and_counted(tmp_path, networks, geometry):
    folder = folder_of(tmp_path / "images", 6)
    for i in (1, 4):
        (folder / f"{i:03}.png").write_bytes(png(i, 15))
    (folder / "notes.txt").write_text("")
    said = []
    with pytest.warns(UserWarning, match="it has 15 x 15 pixels"):
        write(tmp_path / "cache", open_images(folder, geometry), networks, report=said.append)
    assert EncodingCache(tmp_path / "cache").keys == ["000.png", "002.png", "003.png", "005.png"]
    assert [line.split(": ", 1)[1] for line in said[-2:]] == [
        "2 images have a side below 16 pixels (--min-side) and are left out: 001.png, 004.png",
        "1 file is passed over: 1 .txt",
    ]
    for policy in (ReadPolicy(min_side=12), ReadPolicy(min_side=17)):
        with pytest.raises(
            ValueError, match="holds another cache: its images have sides of at least 16 pixels, expected"
        ):
            write(tmp_path / "cache", open_images(folder, geometry, policy=policy), networks)


def test_an_unfinished_cache_of_an_earlier_version_is_continued(tmp_path, networks, geometry):
    folder = folder_of(tmp_path / "images", 6)
    old = write(tmp_path / "cache", open_images(folder, geometry, policy=ReadPolicy(min_side=1)), networks)
    manifest = json.loads((old / "manifest.json").read_text())
    assert manifest.pop("min_side") == 1
    (old / "manifest.json").write_text(json.dumps(manifest))
    (old / "shards/00001.json").unlink()
    write(old, open_images(folder, geometry), networks)
    assert len(EncodingCache(old)) == 6 and "min_side" not in json.loads((old / "manifest.json").read_text())


BAD_JSON = {
    "list": ("[]", "holds a list"),
    "empty": ("", "is empty"),
    "half": ('{"format": "dcdd enco', "cannot be read as .*JSONDecodeError"),
    "nested": ("[" * 200_000, "cannot be read as .*RecursionError"),
    "pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
    "page": ("<!DOCTYPE html><html>", "is an HTML page"),
}


@pytest.mark.parametrize("name", ["manifest.json", "shards/00001.json", "shards/end.json"])
@pytest.mark.parametrize("kind", BAD_JSON)
def test_a_damaged_file_of_a_cache_is_named_in_one_line(tmp_path, whole, images, networks, name, kind):
    folder = shutil.copytree(whole, tmp_path / "cache")
    content, words = BAD_JSON[kind]
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} {words}.*: (copy it again|delete it)") as said:
        write(folder, images, networks)
    assert "\n" not in str(said.value)
    if name == "manifest.json":
        with pytest.raises(ValueError, match=rf"{name} {words}.*: copy it again"):
            EncodingCache(folder)


def test_a_byte_order_mark_does_no_harm(tmp_path, whole):
    folder = shutil.copytree(whole, tmp_path / "cache")
    (folder / "manifest.json").write_bytes(b"\xef\xbb\xbf" + (folder / "manifest.json").read_bytes())
    assert len(EncodingCache(folder)) == COUNT


WRONG_FIELDS = [
    ("manifest.json", lambda m: m.clear(), "has the format None"),
    ("manifest.json", lambda m: m.pop("card"), "it has no 'card'"),
    ("manifest.json", lambda m: m.update(card=[]), "card must be an object"),
    ("manifest.json", lambda m: m["card"].pop("channels"), "card has no channels"),
    ("manifest.json", lambda m: m["card"].update(more=1), "card has the unknown fields"),
    ("manifest.json", lambda m: m["card"].update(channels="16"), "card.channels must be a whole number"),
    ("manifest.json", lambda m: m["card"].update(vae_scale=1e999), "card.vae_scale must be a finite number"),
    ("manifest.json", lambda m: m["card"].update(tokenizer=3), "card.tokenizer must be a text"),
    ("manifest.json", lambda m: m["card"].update(pixels=0), "card.pixels must be true or false"),
    ("manifest.json", lambda m: m["card"].update(geometry=7), "card.geometry must be an object"),
    ("manifest.json", lambda m: m["card"]["geometry"].update(resolution=[]), "resolution must be a whole number"),
    ("manifest.json", lambda m: m.update(source="images"), "source must be an object"),
    ("manifest.json", lambda m: m["source"].update(name=3), "source.name must be a text"),
    ("manifest.json", lambda m: m.update(shard_size=0), "shard_size must be a whole number of at least 1"),
    ("manifest.json", lambda m: m.update(min_side="a"), "min_side must be a whole number of at least 1"),
    ("manifest.json", lambda m: m.update(complete="yes"), "expected complete to be true or false"),
    ("manifest.json", lambda m: m.update(shards={}), "and shards a list"),
    ("manifest.json", lambda m: m.update(shards=[[]]), r"shards\[0\] must be an object"),
    ("manifest.json", lambda m: m["shards"][1].pop("bytes"), r"shards\[1\] has no bytes"),
    (
        "manifest.json",
        lambda m: m["shards"][1].update(items=-1),
        r"shards\[1\].items must be a whole number in 0\.\.",
    ),
    ("manifest.json", lambda m: m["shards"][1].update(items=10**30), r"shards\[1\].items must be a whole number"),
    (
        "manifest.json",
        lambda m: m["shards"][1].update(file="../a.safetensors"),
        r"shards\[1\].file must be of the form",
    ),
    ("manifest.json", lambda m: m["shards"][1].update(sha256=None), r"shards\[1\].sha256 must be a text"),
    ("shards/00001.json", lambda m: m.pop("read"), "the line has no read"),
    ("shards/00001.json", lambda m: m.update(read="4"), "read must be a whole number"),
    ("shards/00001.json", lambda m: m.update(unreadable=[3]), "unreadable must be a list of names"),
    ("shards/00001.json", lambda m: m.update(mark=[1, 2]), "mark must be three whole numbers or null"),
    ("shards/00001.json", lambda m: m.update(file="/etc/passwd"), "the line.file must be of the form"),
    ("shards/end.json", lambda m: m.update(positions=[]), "positions must be a whole number"),
]


@pytest.mark.parametrize(("name", "change", "words"), WRONG_FIELDS)
def test_a_wrong_field_of_a_cache_is_named(tmp_path, whole, images, networks, name, change, words):
    folder = shutil.copytree(whole, tmp_path / "cache")
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{name}.*{words}"):
        write(folder, images, networks)
    if name == "manifest.json":
        with pytest.raises(ValueError, match=f"manifest.json.*{words}"):
            EncodingCache(folder)


def test_a_shard_of_other_tensors_is_named(tmp_path, whole):
    folder = shutil.copytree(whole, tmp_path / "cache")
    path = folder / "shards/00001.safetensors"

    def opened(content):
        path.write_bytes(content)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["shards"][1]["bytes"] = len(content)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return EncodingCache(folder)

    held = load(path.read_bytes())
    for tensors in (
        {"features": held["features"]},
        held | {"latents": held["latents"][:, :, 1:]},
        held | {"features": held["features"][1:]},
        held | {"latents": held["latents"].float()},
    ):
        cache = opened(save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"dcdd": "{}"}))
        with pytest.raises(ValueError, match="00001.safetensors holds .*, expected .*'features': .*: copy it again"):
            cache.batch([5])
        with pytest.raises(ValueError, match="00001.safetensors names None, expected 4 images"):
            _ = cache.keys
    cache = opened(save(held))
    with pytest.raises(ValueError, match="00001.safetensors cannot be read as the header of a shard"):
        _ = cache.keys
    for content, words in (
        (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
        (b"x" * 99, "cannot"),
    ):
        with pytest.raises(ValueError, match=f"00001.safetensors {words}.*: copy it again"):
            opened(content).batch([5])


def test_encodings_that_are_not_finite_are_not_stored(tmp_path, images, networks):
    broken = tiny_vae()
    broken.encoder.conv_out.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="the latents of 000.png hold NaN"):
        write(tmp_path / "cache", images, networks | {"codec": KLCodec(broken)})


def test_networks_that_do_not_fit_the_sizes_are_refused(networks):
    with pytest.raises(ValueError, match="not a multiple of 4 pixels.*use 28 or 32"):
        geometry_for(**networks, patch=2, resolution=30, token_resolution=16)
