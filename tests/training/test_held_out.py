"""Held-out images: which they are, and the loss on them."""

import io
import json
import os
import re
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dcdd_core.method.flow import interpolate, loss_weight, sample_times, velocity
from dcdd_core.method.sampling import keyed_generator
from dcdd_core.pipelines.image_files import ReadPolicy
from dcdd_core.training import held_out
from dcdd_core.training.batches import Batches, DataShard
from dcdd_core.training.cache import EncodingCache
from dcdd_core.training.cache_writer import write_cache
from dcdd_core.training.checkpoints import load_best
from dcdd_core.training.config import DataConfig, OptimizationConfig, RunConfig
from dcdd_core.training.decoder_task import DecoderTask
from dcdd_core.training.encoded_batch import encode
from dcdd_core.training.examples import ExampleMaker
from dcdd_core.training.held_out import HeldOutLoss, count_images, split
from dcdd_core.training.log import read_log
from dcdd_core.training.plan import Encoders
from dcdd_core.training.run import _evaluation, split_for_run, summary
from dcdd_core.training.sources import open_images
from dcdd_core.training.trainable import choose_trained
from dcdd_core.training.trainer import Trainer
from tests.tiny import tiny_decoder
from tests.training.runs import accelerator, encoders, forked, png_folder
from tests.training.test_data import KINDS, paths, png, source, write  # noqa: F401  a fixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return png_folder(tmp_path_factory.mktemp("images") / "folder", count=30)


def keys(images, part=None):
    return [entry.key for entry in images.entries(part or DataShard(seed=None), 0)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2])
def test_held_out_images_are_never_trained_on_and_all_others_are(paths, kind, world):  # noqa: F811
    images = source(paths, kind)
    parts = split(images, 0.2)
    apart = keys(parts.held_out)
    assert len(apart) == 5 and apart != sorted(apart)
    for epoch in (0, 1):
        shards = [DataShard(seed=7, rank=rank, world=world, window=5) for rank in range(world)]
        trained = [entry.key for part in shards for entry in parts.training.entries(part, epoch)]
        assert sorted(trained + apart) == sorted(keys(images))
    assert keys(split(source(paths, kind), 0.2).held_out) == apart
    assert parts.fingerprint != split(images, 0.3).fingerprint
    assert set(apart) < set(keys(split(images, 0.3).held_out))


def test_the_share_is_rounded_bounded_and_nothing_of_a_few_images(folder, tmp_path, monkeypatch):
    images = open_images(folder, encoders()[2])
    assert [len(keys(split(images, share).held_out)) for share in (0.01, 0.049, 0.06, 0.5)] == [1, 1, 2, 15]
    monkeypatch.setattr(held_out, "MOST", 4)
    assert len(keys(split(images, 0.5).held_out)) == 4
    geometry = encoders()[2]
    assert split(open_images(png_folder(tmp_path / "few", count=19), geometry), 0.5) is None
    assert len(keys(split(open_images(png_folder(tmp_path / "enough", count=20), geometry), 0.5).held_out)) == 4


def test_a_stream_is_read_until_it_gave_enough(paths, monkeypatch):  # noqa: F811
    monkeypatch.setattr(held_out, "MOST", 3)
    images, read = source(paths, "parquet"), []
    entries = images.entries

    def watched(*args):
        for entry in entries(*args):
            read.append(entry.key)
            yield entry

    monkeypatch.setattr(images, "entries", watched)
    monkeypatch.setattr(held_out, "FEWEST_SPLIT", 1)
    parts = split(images, 0.5)
    assert len(keys(parts.held_out)) == 3 and len(read) < 20
    assert count_images(images) is None and count_images(source(paths, "saved")) == 23


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_read_with_a_progress_bar_in_the_first_process(paths, kind, monkeypatch):  # noqa: F811
    for shown in (True, False):
        monkeypatch.setattr("sys.stderr", stream := Terminal())
        expected = split(source(paths, kind), 0.2, shown=shown).fingerprint
        said = re.findall(r"choosing held-out images: (\d+)image [^\r\n]*\n", stream.getvalue())
        assert said == (["23"] if shown and kind in ("parquet", "webdataset") else [])
    monkeypatch.undo()
    assert split(source(paths, kind), 0.2).fingerprint == expected


def said_of(images, world, **data):
    """What a run says at its start about the images."""
    workers = SimpleNamespace(num_processes=world, device=torch.device("cpu"))
    settings = OptimizationConfig(steps=1, warmup=0), DataConfig(images=images.name, **data), None, images, workers
    return "\n".join(summary(nn.Linear(1, 1), *settings))


@pytest.mark.parametrize(("files", "world", "words"), [(3, 2, "3 files"), (1, 2, "1 file"), (4, 3, "4 files")])
def test_a_run_says_that_its_files_do_not_divide_among_the_processes(tmp_path, files, world, words):
    images = {f"{i:03}": png(i) for i in range(12)}
    stream = open_images(write("parquet", tmp_path / "parquet", images, files=files), encoders()[2])
    said = said_of(stream, world)
    assert f"{words} of images, which is no multiple of the {world} processes: each of them reads all files" in said
    assert f"one image in {world}, so that none is left out" in said
    fewer = "one process" if files == 1 else f"a number of processes that divides {files}"
    assert f"give a multiple of {world} files, or {fewer}\n" in said
    for fits in (1, files):
        assert "no multiple" not in said_of(stream, fits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_that_does_nothing_is_said(paths, kind):  # noqa: F811
    images = source(paths, kind)
    assert "window" not in said_of(images, 1) and "no multiple" not in said_of(images, 3)
    assert ("--window 7 does nothing: " in said_of(images, 1, window=7)) == (kind in ("folder", "saved"))


def test_a_split_that_is_never_evaluated_is_said(folder):
    images, said = open_images(folder, encoders()[2]), []
    for share in (0, RunConfig.held_out, 0.2):
        run = RunConfig(samples=0, sample_every=0, held_out=share)
        assert split_for_run(images, run, None, said.append, shown=False) is None
    assert said == ["--held-out 0.2 does nothing: with --sample-every 0 there are no evaluations to hold out for"]


def test_a_cache_holds_out_the_images_that_the_folder_does(folder, tmp_path):
    tokenizer, codec, geometry = encoders()
    images = open_images(folder, geometry)
    write_cache(tmp_path, images, tokenizer, codec, shard_size=7, batch_size=4, report=lambda _: None)
    cache = EncodingCache(tmp_path)
    found = [cache.keys[int(key)] for key in keys(split(cache, 0.2).held_out)]
    assert found == keys(split(images, 0.2).held_out)


def losses_on(images, decoder, *, world=1, batch=2, seed=0, fraction=0.1, **options):
    """The loss on held-out images, by so many processes one after the other."""
    tokenizer, codec, geometry = encoders()
    parts, sums, value = split(images, fraction), [], None
    for last in (False, True):
        for rank in range(world):
            loss = HeldOutLoss(
                parts.held_out,
                lambda batch: encode(batch, tokenizer, codec),
                ExampleMaker(decoder.card, tokenizer, codec, geometry),
                OptimizationConfig(steps=1, seed=seed, weighting="sigma_sqrt", shift=0.3),
                batch=batch,
                rank=rank,
                world=world,
                total=(lambda own: sum(sums)) if last else (lambda own: sums.append(own) or torch.ones(2)),
            )
            value = loss(decoder, **options)
    return value


@torch.no_grad()
def test_the_loss_is_the_mean_over_the_held_out_images_at_fixed_times_and_noises(folder):
    decoder, images = tiny_decoder(), open_images(folder, encoders()[2])
    found = losses_on(images, decoder)
    assert losses_on(images, decoder) == found  # the same draws
    assert losses_on(images, decoder, seed=1) != found
    for world in (2, 3, 4):  # for 3 images: with one of no weight, and with a process that has none
        assert losses_on(images, decoder, world=world, batch=1) == pytest.approx(found, rel=1e-5)

    tokenizer, codec, geometry = encoders()
    make = ExampleMaker(decoder.card, tokenizer, codec, geometry)
    parts, expected = split(images, 0.1), []
    for number, batch in enumerate(one for one, _ in zip(ordered(parts), range(3))):
        example = make(batch, keyed_generator(0))
        for draw in range(22):  # 3 images, 64 draws at least
            generator = keyed_generator(0, held_out._KEY, number, draw)
            t = sample_times(1, generator=generator, density="logit_normal", shift=0.3)
            z0, noise = example.latents, torch.randn(example.latents.shape, generator=generator)
            backbone, size = decoder.backbone, tuple(z0.shape[2:])
            context = backbone.context(example.masked_latents, example.mask, decoder.card.vae_factor)
            tokens = decoder.condition_tokens(example.condition, size)
            v = decoder(backbone.pack(interpolate(z0, noise, t)), context, tokens, t, size)
            error = (v - backbone.pack(velocity(z0, noise))).double().square().mean()
            expected.append(float(loss_weight(t, "sigma_sqrt") * error))
    assert found == pytest.approx(np.mean(expected), rel=1e-5)


@torch.no_grad()
def test_the_loss_without_the_condition_is_the_loss_of_the_null_one(folder):
    """At the same times and noises: with the null condition's token in the adapter's place it is the same number."""
    decoder, images = tiny_decoder(condition_dropout=0.1), open_images(folder, encoders()[2])
    found = losses_on(images, decoder, dropped=True)
    assert found == losses_on(images, decoder, dropped=True)
    assert losses_on(images, decoder, world=2, dropped=True) == pytest.approx(found, rel=1e-5)
    with_it = losses_on(images, decoder)
    assert with_it == losses_on(images, decoder, dropped=False) != pytest.approx(found, rel=1e-3)
    decoder.adapter = decoder.adapter.null
    assert losses_on(images, decoder) == pytest.approx(found, rel=1e-6)


def ordered(parts):
    return Batches(parts.held_out, size=1, shard=DataShard(seed=None))


def test_an_unreadable_held_out_image_is_left_out_and_named(folder, tmp_path):
    decoder = tiny_decoder()
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    images = open_images(tmp_path, encoders()[2])
    whole = losses_on(images, decoder)
    broken, *others = keys(split(images, 0.1).held_out)
    (tmp_path / broken).write_bytes(b"no image")
    with pytest.warns(UserWarning, match=f"{broken} of the held-out images of .* is skipped"):
        rest = losses_on(images, decoder)
    assert rest != whole
    with pytest.warns(UserWarning):  # Of three processes one has that image alone.
        assert losses_on(images, decoder, world=3) == pytest.approx(rest, rel=1e-5)
    for other in others:
        (tmp_path / other).write_bytes(b"no image")
    for world in (1, 4):
        with pytest.warns(UserWarning), pytest.raises(ValueError, match="no held-out image of .* can be read"):
            losses_on(images, decoder, world=world)


def train_and_evaluate(folder, images, world):
    """A training whose weights stay as they are, and its loss on held-out images, as a run sets them up."""
    tokenizer, codec, geometry = encoders()
    decoder, shared = tiny_decoder(), accelerator()
    choose_trained(decoder, "all", rank=2)
    source = open_images(images, geometry, policy=ReadPolicy(skip_unreadable=1.0))
    settings = RunConfig(samples=0, sample_every=1, save_every=9, log_every=1, held_out=0.1)
    recipe = OptimizationConfig(steps=2, learning_rate=1e-30, weight_decay=0.0, seed=5)
    parts = split(source, settings.held_out)
    assert shared.num_processes == world and len(parts.held_out.listed) == 3
    given = Encoders(tokenizer=tokenizer, codec=codec, geometry=geometry)
    data = DataConfig(images=images, batch=2)
    evaluate, counter = _evaluation(given, decoder.card, source, parts, settings, data, recipe, shared)
    seen = []

    def scored(decoder):
        seen.append(evaluate(decoder))
        return seen[-1]

    Trainer(
        folder,
        DecoderTask(decoder, ExampleMaker(decoder.card, tokenizer, codec, geometry)),
        Batches(parts.training, size=2, shard=DataShard(rank=shared.process_index, world=world)),
        recipe,
        accelerator=shared,
        settings={},
        run=settings,
        evaluate=scored,
        report=lambda _: None,
    ).train()
    (folder / f"scores-{shared.process_index}.json").write_text(json.dumps([one.score for one in seen]))
    (folder / f"left-out-{shared.process_index}.json").write_text(json.dumps(list(counter.reasons)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
@pytest.mark.parametrize("broken", [0, 1])
def test_two_processes_of_a_training_find_the_loss_that_one_does(folder, tmp_path, broken):
    shutil.copytree(folder, tmp_path / "images")
    gone = [entry.key for entry in split(open_images(folder, encoders()[2]), 0.1).held_out.listed[1:][:broken]]
    for name in gone:  # All that the second process has.
        (tmp_path / "images" / name).write_bytes(b"no image")
    for world in (1, 2):
        (tmp_path / f"{world}").mkdir()
        target = partial(train_and_evaluate, tmp_path / f"{world}", tmp_path / "images", world)
        assert forked(target, world=world, clean=True) == [0] * world
    first, one, two = (
        json.loads((tmp_path / name).read_text()) for name in ("1/scores-0.json", "2/scores-0.json", "2/scores-1.json")
    )
    assert len(one) == 2 and one == two and one == pytest.approx(first, rel=1e-5)
    logged = [line["eval/loss"] for line in read_log(tmp_path / "2")]
    assert logged == pytest.approx(first, rel=1e-5)
    assert load_best(tmp_path / "2").loss == pytest.approx(min(one)) and load_best(tmp_path / "2").step in (1, 2)
    assert [json.loads((tmp_path / "2" / f"left-out-{rank}.json").read_text()) for rank in (0, 1)] == [[], gone]
