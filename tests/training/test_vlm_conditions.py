"""Conditions from the VLM's own distributions of training images: what they are, in caches and in trainings."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from dcdd_core.cli.train import main
from dcdd_core.method.sampling import keyed_generator
from dcdd_core.models.bundle import read_card
from dcdd_core.models.janus.sampler import JanusSampler
from dcdd_core.pipelines.condition import condition_for
from dcdd_core.training.batches import Batches, DataShard
from dcdd_core.training.cache import CacheCard, EncodingCache
from dcdd_core.training.cache_writer import write_cache
from dcdd_core.training.captions import Captions
from dcdd_core.training.config import OptimizationConfig
from dcdd_core.training.encoded_batch import VLM_TENSORS, encode
from dcdd_core.training.examples import ExampleMaker, proxy_condition
from dcdd_core.training.held_out import HeldOutLoss, split
from dcdd_core.training.log import read_log
from dcdd_core.training.sources import open_images
from dcdd_core.training.vlm_conditions import Served, VLMConditions, choice, with_conditions
from dcdd_core.types import Calibration
from dcdd_pico import embedded
from tests.tiny import random_pico, tiny_card, tiny_decoder, tiny_janus
from tests.training.runs import CAPTIONS, caption_of, captioned_folder, encoders, forked, losses
from tests.training.test_progressive import parquet_of, tar_of

pytestmark = pytest.mark.filterwarnings("ignore:.*")
OPTIONAL = Captions(required=False)
BARE = ("03.png", "11.png")
CALIBRATION = Calibration(scale=25.0, smoothing=0.01, anchor=2.0, guidance=3.0, temperature=0.8)


def card(**changes):
    return tiny_card(**{"calibration": CALIBRATION, "reads": "anchored"} | changes)


@pytest.fixture(scope="module")
def sampler() -> JanusSampler:
    return JanusSampler(*tiny_janus(), name="tiny")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """24 images, two of them without a caption."""
    folder = captioned_folder(tmp_path_factory.mktemp("images") / "folder")
    (folder / BARE[0]).with_suffix(".txt").unlink()
    (folder / BARE[1]).with_suffix(".txt").write_text(" \n")
    return folder


def conditions(sampler, **changes) -> VLMConditions:
    return VLMConditions(sampler, card(**changes), encoders()[0])


def opened(path, captions=OPTIONAL):
    return open_images(path, encoders()[2], captions=captions)


def first(source, size=24):
    return next(iter(Batches(source, size=size, shard=DataShard(seed=None))))


def encoded(images, size=24):
    return encode(first(opened(images), size), *encoders()[:2])


@pytest.mark.parametrize("reads", ["logits", "anchored"])
def test_what_is_trained_is_what_the_vlm_is_served_with(sampler, reads):
    """Of tokens that the VLM sampled itself: its own logits, mapped as the decoder's card says."""
    make = conditions(sampler, reads=reads)
    options = make.options
    assert (options.guidance, options.temperature) == (3.0, 0.8)
    run = sampler.sample(CAPTIONS, seeds=[1, 2, 3], options=options)
    codebook = encoders()[0].codebook
    served = condition_for(card(reads=reads), run, codebook)
    found = make(2.5 * codebook.vectors[run.tokens], CAPTIONS)
    torch.testing.assert_close(found.code_vectors, served.code_vectors, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.uncertainty, served.uncertainty, rtol=1e-3, atol=1e-3)
    proxies = proxy_condition(codebook.vectors[run.tokens], card(), codebook, (4, 4))
    assert float((found.code_vectors - proxies.code_vectors).norm(dim=-1).mean()) > 0.05
    for other in ({"guidance": 1.0}, {"temperature": 2.0}, {"smoothing": 0.3}):
        changed = conditions(sampler, reads=reads, calibration=replace(CALIBRATION, **other))
        assert changed.served.misfits(make.served) and len(changed.served.misfits(make.served)) == 1
        assert not torch.allclose(changed(codebook.vectors[run.tokens], CAPTIONS).uncertainty, found.uncertainty, 1e-2)


def test_the_anchor_acts_only_where_the_card_reads_it(sampler):
    features = encoders()[0].codebook.vectors[torch.arange(16)][None]
    plain, anchored = (conditions(sampler, reads=reads) for reads in ("logits", "anchored"))
    assert (plain.served.anchor, anchored.served.anchor) == (0.0, 2.0)
    vectors, tokens = encoders()[0].codebook.vectors, torch.arange(16)
    nearer = [(m(features, CAPTIONS[:1]).code_vectors[0] * vectors[tokens]).sum(-1).mean() for m in (plain, anchored)]
    assert nearer[0] < nearer[1]


def test_images_without_a_caption_have_none_and_the_others_those_of_their_own(sampler, images):
    make, batch = conditions(sampler), encoded(images)
    assert batch.captions[3] is None and batch.captions[11] is None and batch.captions[0] == caption_of(0)
    found = with_conditions(batch, make)
    assert [i for i, known in enumerate(found.vlm_known.tolist()) if not known] == [3, 11]
    assert not found.vlm_vectors[[3, 11]].any() and not found.vlm_uncertainty[[3, 11]].any()
    for i in (0, 4, 23):
        single = make(batch.features[i : i + 1], [caption_of(i)])
        torch.testing.assert_close(found.vlm_vectors[i], single.code_vectors[0], rtol=1e-3, atol=1e-4)
        other = make(batch.features[i : i + 1], [caption_of(i + 1)])
        assert not torch.allclose(found.vlm_vectors[i], other.code_vectors[0], atol=1e-2)
    part = with_conditions(batch, make, torch.arange(24) % 2 == 0)
    assert part.vlm_known.tolist() == [i % 2 == 0 for i in range(24)], "only what is needed is computed"
    none = with_conditions(batch, None, torch.zeros(24, dtype=torch.bool))
    assert not none.vlm_known.any()


def test_a_caption_that_the_vlm_cannot_read_is_named(images):
    model, words = tiny_janus()
    model.model.language_model.config.max_position_embeddings = 16 + 30
    make, features = VLMConditions(JanusSampler(model, words), card(), encoders()[0]), encoded(images, 3).features
    make(features, CAPTIONS)
    long = "green " + "circle " * 40
    with pytest.raises(
        ValueError, match="the caption 'green circle .* a prompt has .* Change the caption, or remove it"
    ):
        make(features, [CAPTIONS[0], long, CAPTIONS[1]])


def test_a_share_is_chosen_by_seed_micro_batch_and_place_and_moves_no_other_draw():
    draws = [choice(0.3, 500, keyed_generator(7, step)) for step in range(8)]
    assert abs(float(torch.stack(draws).float().mean()) - 0.3) < 0.03
    assert torch.equal(draws[2], choice(0.3, 500, keyed_generator(7, 2)))
    assert not torch.equal(draws[2], choice(0.3, 500, keyed_generator(8, 2)))
    assert not torch.equal(draws[2], draws[3])
    assert bool((draws[1] <= choice(0.6, 500, keyed_generator(7, 1))).all()), "a larger share adds to it"
    generator = keyed_generator(7, 1)
    state = generator.get_state()
    choice(0.5, 9, generator)
    assert torch.equal(generator.get_state(), state)
    assert choice(1.0, 50, generator).all() and not choice(0.0, 50, generator).any()


def test_an_example_takes_the_vlm_s_condition_where_it_is_chosen_and_known(sampler, images):
    make, batch = conditions(sampler), first(opened(images))
    whole = with_conditions(encode(batch, *encoders()[:2]), make)
    proxies = proxy_condition(whole.features, card(), encoders()[0].codebook, (4, 4))
    examples = partial(ExampleMaker, card(), *encoders(), localised=0.5, conditions=make)
    plain, mixed, every = (examples(vlm_share=share)(batch, keyed_generator(5, 1)) for share in (0.0, 0.5, 1.0))
    chosen = choice(0.5, 24, keyed_generator(5, 1)) & whole.vlm_known
    assert 5 < int(chosen.sum()) < 19
    for example, taken in ((plain, torch.zeros(24, dtype=torch.bool)), (mixed, chosen), (every, whole.vlm_known)):
        for name, own in (("code_vectors", whole.vlm_vectors), ("uncertainty", whole.vlm_uncertainty)):
            found, wanted = getattr(example.condition, name), getattr(proxies, name).clone()
            wanted[taken] = own[taken]
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
        assert torch.equal(example.latents, plain.latents) and torch.equal(example.mask, plain.mask)
    held = ExampleMaker(card(), *encoders(), vlm_share=0.5)(whole, keyed_generator(5, 1)).condition
    torch.testing.assert_close(held.code_vectors, mixed.condition.code_vectors, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="need captions and the VLM"):
        ExampleMaker(card(), *encoders(), vlm_share=0.5)(batch, keyed_generator(5, 1))


def write(folder, source, make, **options):
    options = {"shard_size": 7, "batch_size": 3, "report": lambda _: None} | options
    write_cache(folder, source, *encoders()[:2], conditions=make, **options)
    return EncodingCache(folder)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_cache_holds_them_in_half_precision_and_counts_images_without(sampler, images, tmp_path):
    said, make = [], conditions(sampler)
    cache = write(tmp_path / "cache", opened(images), make, report=said.append)
    assert len(cache) == 24 and cache.known == 22 and not cache.captioned
    assert said[-1] == f"{tmp_path / 'cache'}: 2 images have no caption and keep proxies: 03.png, 11.png"
    fresh, held = with_conditions(encoded(images), make), first(cache)
    assert torch.equal(held.vlm_known, fresh.vlm_known) and held.vlm_vectors.dtype == torch.float32
    for name in VLM_TENSORS[:2]:
        torch.testing.assert_close(getattr(held, name), getattr(fresh, name), rtol=2e-3, atol=2e-3)
    sizes = sum(path.stat().st_size for path in (tmp_path / "cache").glob("shards/*.safetensors"))
    without = tmp_path / "without"
    write_cache(without, opened(images, None), *encoders()[:2], shard_size=7, report=lambda _: None)
    assert sizes - sum(path.stat().st_size for path in without.glob("shards/*.safetensors")) < 24 * 16 * 12 * 2 + 4000
    told = json.loads((tmp_path / "cache" / "manifest.json").read_text())["card"]["vlm"]
    assert Served.from_dict(told) == make.served and told["sampler"] == sampler.fingerprint
    for plain in (without / "manifest.json", without / "shards" / "00000.safetensors"):
        assert b"vlm" not in plain.read_bytes(), "caches without are as they were"


@pytest.mark.parametrize("kind", ["folder", "parquet", "tar"])
def test_any_captioned_source_and_number_of_processes_write_the_same(sampler, images, tmp_path, kind):
    source = tmp_path / "source"
    if kind == "folder":
        source = images
    else:
        source.mkdir()
        (parquet_of if kind == "parquet" else tar_of)(images, source / f"part.{kind}")
    make = conditions(sampler)
    whole = write(tmp_path / "one", opened(source), make)
    assert whole.known == (22 if kind == "folder" else 24)
    for rank in (1, 0):
        write_cache(
            tmp_path / "two",
            opened(source),
            *encoders()[:2],
            conditions=make,
            shard_size=7,
            batch_size=3,
            rank=rank,
            world=2,
            report=lambda _: None,
        )
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_an_image_that_got_its_caption_is_read_again(sampler, images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    make = conditions(sampler)
    assert write(tmp_path / "cache", opened(tmp_path / "images"), make).known == 22
    (tmp_path / "images" / "03.txt").write_text(CAPTIONS[0])
    with pytest.warns(UserWarning, match="00000.safetensors lacks images that had no caption and have changed"):
        assert write(tmp_path / "cache", opened(tmp_path / "images"), make).known == 23


def test_a_cache_of_other_conditions_is_refused(sampler, images, tmp_path):
    make = conditions(sampler)
    cache = write(tmp_path / "cache", opened(images), make)
    wanted = CacheCard.of(*encoders(), vlm=Served.of(card()))
    cache.require(wanted)
    cache.require(replace(wanted, vlm=None))
    for changes, words in (
        ({"calibration": replace(CALIBRATION, guidance=5.0)}, "the guidance 3.0, expected 5.0"),
        ({"calibration": replace(CALIBRATION, temperature=1.0)}, "the temperature 0.8, expected 1.0"),
        ({"calibration": replace(CALIBRATION, smoothing=0.0)}, "the smoothing 0.01, expected 0.0"),
        ({"calibration": replace(CALIBRATION, anchor=9.0)}, "the anchor 2.0, expected 9.0"),
        ({"reads": "logits"}, "the reads 'anchored', expected 'logits'"),
    ):
        with pytest.raises(ValueError, match=f"does not fit: its VLM's conditions have {words}"):
            cache.require(replace(wanted, vlm=Served.of(card(**changes))))
        with pytest.raises(ValueError, match=f"holds another cache: its VLM's conditions have {words}"):
            write(tmp_path / "cache", opened(images), conditions(sampler, **changes))
    other = JanusSampler(*tiny_janus(1), name="tiny")
    with pytest.raises(ValueError, match="its VLM's conditions have the sampler"):
        write(tmp_path / "cache", opened(images), VLMConditions(other, card(), encoders()[0]))
    with pytest.raises(ValueError, match="it holds a VLM's conditions"):
        write(tmp_path / "cache", opened(images, None), None)
    with pytest.raises(ValueError, match="need captions: open the images with them"):
        write(tmp_path / "bare", opened(images, None), make)
    plain = write(tmp_path / "plain", opened(images, None), None)
    with pytest.raises(ValueError, match="no conditions of a VLM, as it was written without --vlm-conditions"):
        plain.require(wanted)
    manifest = tmp_path / "cache" / "manifest.json"
    for changes, words in (({"guidance": "x"}, "guidance must be a finite number"), ({"reads": "x"}, "reads must be")):
        told = json.loads(manifest.read_text())
        told["card"]["vlm"] |= changes
        manifest.with_name("other").mkdir(exist_ok=True)
        (manifest.with_name("other") / "manifest.json").write_text(json.dumps(told))
        with pytest.raises(ValueError, match=f"card.vlm: {words}"):
            EncodingCache(manifest.with_name("other"))


@torch.no_grad()
def test_the_held_out_loss_is_told_for_both_kinds(sampler, images):
    make, decoder = conditions(sampler), tiny_decoder()
    decoder.card = card()
    examples = ExampleMaker(card(), *encoders())
    parts = split(opened(images), 0.5)
    names = [entry.key for entry in parts.held_out.listed]
    assert set(BARE) & set(names), "one without a caption is among them"

    def loss(share, encoding, rank=0, world=1, total=lambda own: own):
        return HeldOutLoss(
            parts.held_out,
            encoding,
            examples,
            OptimizationConfig(steps=1),
            batch=5,
            rank=rank,
            world=world,
            total=total,
            vlm_share=share,
        )

    def with_vlm(batch):
        return with_conditions(encode(batch, *encoders()[:2]), make)

    def as_if(vectors):
        """Held-out images whose VLM's conditions are something else."""
        return lambda batch: replace(with_vlm(batch), vlm_vectors=vectors(with_vlm(batch).vlm_vectors))

    plain = loss(0.0, lambda batch: encode(batch, *encoders()[:2])).numbers(decoder)
    found = loss(0.25, with_vlm).numbers(decoder)
    assert list(plain) == ["loss"] and list(found) == ["loss", "loss_proxies", "loss_vlm"]
    assert found["loss_proxies"] == plain["loss"] and found["loss_vlm"] != plain["loss"]
    # In "loss" images without a caption count with their proxies.
    known, count = len(set(names) - set(BARE)), len(names)
    bare = [entry for entry in parts.held_out.listed if entry.key in BARE]
    assert found["loss"] != pytest.approx(0.75 * found["loss_proxies"] + 0.25 * found["loss_vlm"], rel=1e-7)
    every = loss(1.0, with_vlm).numbers(decoder)
    assert found["loss"] == pytest.approx(0.75 * plain["loss"] + 0.25 * every["loss"], rel=1e-6)
    rest = (every["loss"] * count - every["loss_vlm"] * known) / len(bare)
    assert 0 < rest < 10 * plain["loss"]
    zeros = loss(0.25, as_if(torch.zeros_like)).numbers(decoder)
    assert zeros["loss_proxies"] == plain["loss"] and zeros["loss_vlm"] != found["loss_vlm"]
    sums = []
    for rank in range(3):
        loss(0.25, with_vlm, rank, 3, lambda own: sums.append(own) or torch.ones_like(own)).numbers(decoder)
    totals = [sum(sums[i::2]) for i in range(2)]
    given = iter(totals)
    assert loss(0.25, with_vlm, 2, 3, lambda own: next(given)).numbers(decoder) == pytest.approx(found, rel=1e-5)


@pytest.fixture(scope="module")
def pico(tmp_path_factory):
    return random_pico(tmp_path_factory.mktemp("pico") / "weights")


@pytest.fixture
def run(pico, images, tmp_path, monkeypatch):
    """`train.py` on the embedded models, anchored, half of it on the VLM's conditions; a None takes an option away."""
    monkeypatch.setattr(embedded, "WEIGHTS", pico)

    def call(*words, **changes):
        AcceleratorState._reset_state(reset_partial_state=True)
        return main(command(images, tmp_path, *words, **changes))

    return call


def command(images, folder, *words, **changes) -> list[str]:
    options = {"vlm": "pico", "data": images, "out": folder / "run", "reads": "anchored", "min-side": 16}
    if words[:1] == ("cache",):
        words = (*words, "--vlm-conditions")
    else:
        options |= {"steps": 4, "batch": 2, "log-every": 1, "samples": 0, "precision": "no", "save-every": 2}
        options |= {"warmup": 1, "learning-rate": 1e-3, "localised": 0, "vlm-conditions": 0.5, "sample-every": 4}
        options |= {"held-out": 0.1}
    options = {name: value for name, value in (options | changes).items() if value is not None}
    return [*words, "--cpu", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def test_a_decoder_is_trained_on_them_from_images_as_from_a_cache(run, tmp_path, capsys):
    assert run("cache", out=tmp_path / "cache") == 0
    said = capsys.readouterr().out
    assert "cache: the VLM's own conditions: guidance 3, temperature 1, anchored with beta 2, smoothing 0.01" in said
    assert "cache: 2 images have no caption and keep proxies: 03.png, 11.png" in said
    assert run() == 0
    said = capsys.readouterr().out
    assert (
        "run: the VLM's own conditions in a share of 0.5 of the examples: guidance 3, temperature 1, anchored" in said
    )
    cached = {"data": None, "min-side": None, "cache": tmp_path / "cache", "out": tmp_path / "cached"}
    assert run(**cached) == 0
    assert "cached: 22 of 24 images have the VLM's conditions, the others keep proxies" in capsys.readouterr().out
    assert run(out=tmp_path / "proxies", **{"vlm-conditions": 0}) == 0
    direct, other, proxies = (read_log(tmp_path / name) for name in ("run", "cached", "proxies"))
    for mine, theirs in zip(direct, other, strict=True):
        assert list(mine) == list(theirs)
        assert {k: v for k, v in theirs.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in mine.items() if k != "seconds"}, rel=1e-2
        )
    assert {"eval/loss", "eval/loss_proxies", "eval/loss_vlm"} <= set(direct[-1])
    assert "eval/loss_vlm" not in proxies[-1] and proxies[0]["loss"] != direct[0]["loss"]
    bundle = read_card(tmp_path / "run" / "decoder.safetensors")
    assert bundle.reads == "anchored" and (tmp_path / "run" / "best.safetensors").exists()
    newest = tmp_path / "run" / "checkpoints" / "step-00000004" / "training.json"
    told = json.loads(newest.read_text())["settings"]["vlm_conditions"]
    assert (told["share"], told["guidance"], told["anchor"], told["reads"]) == (0.5, 3.0, 2.0, "anchored")
    assert told["sampler"]
    for changes, words in (
        ({"vlm-conditions": 0.4}, "made with other settings (vlm_conditions.share 0.5 -> 0.4"),
        ({"vlm-conditions": 0}, "made with other settings (vlm_conditions"),
    ):
        assert run(**changes) == 1
        assert words in capsys.readouterr().err


def test_resumed_is_uninterrupted(run, tmp_path):
    assert run() == 0
    shutil.copytree(tmp_path / "run", tmp_path / "later")
    shutil.rmtree(tmp_path / "later" / "checkpoints" / "step-00000004")
    assert run(out=tmp_path / "later") == 0
    assert losses(tmp_path / "later") == losses(tmp_path / "run")
    weights = [tmp_path / name / "checkpoints/step-00000004/average.safetensors" for name in ("run", "later")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def launched(weights: Path, words: list[str]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    embedded.WEIGHTS = weights
    assert main(words) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
def test_two_processes_train_on_them(pico, images, tmp_path):
    cached = {"data": None, "min-side": None, "cache": tmp_path / "cache", "out": tmp_path / "cached"}
    for words in (
        command(images, tmp_path, "cache", out=tmp_path / "cache"),
        command(images, tmp_path),
        command(images, tmp_path, **cached),
    ):
        assert forked(partial(launched, pico, words), world=2, clean=True) == [0, 0]
    assert EncodingCache(tmp_path / "cache").known == 22
    direct, cached = ([line["loss"] for line in read_log(tmp_path / name)] for name in ("run", "cached"))
    assert len(direct) == 4 and cached == pytest.approx(direct, rel=1e-2)
    evaluated = [read_log(tmp_path / name)[-1] for name in ("run", "cached")]
    for name in ("eval/loss", "eval/loss_proxies", "eval/loss_vlm"):
        assert evaluated[0][name] == pytest.approx(evaluated[1][name], rel=1e-2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vlm-conditions": 1.5}, "vlm-conditions must be a finite number in 0..1, got 1.5"),
        ({"variant": "discrete"}, "--reads anchored would do nothing with --variant discrete: leave it out"),
        (
            {"variant": "discrete", "reads": None},
            "needs a decoder with a calibration, which says how the VLM is guided",
        ),
        ({"reads": "tokens"}, "is served the sampled tokens alone (its card reads 'tokens')"),
        ({"calibration": "unguided"}, "does not say with which guidance the VLM was sampled"),
        ({"vlm-conditions": 0, "caption-column": "text"}, "without --vlm-conditions no captions are read"),
        ({"data": "bare"}, "has no captions, which this training needs"),
        ({"vlm": "masked", "vae": "vae", "bundle": "decoder"}, "decides many tokens a pass in an order of its own"),
    ],
)
def test_what_cannot_be_is_refused_in_words(run, pico, images, tmp_path, capsys, options, words):
    places = {"unguided": tmp_path / "c.safetensors", "bare": tmp_path / "bare", "masked": pico / "progressive"}
    places |= {"vae": pico / "vae", "decoder": pico / "decoder.safetensors"}
    Calibration(scale=20.0).save(places["unguided"])
    places["bare"].mkdir()
    shutil.copy(images / "00.png", places["bare"])
    assert run(**{name: places.get(value, value) for name, value in options.items()}) == 1
    assert words in capsys.readouterr().err


def test_a_cache_of_conditions_asks_for_what_it_needs(run, tmp_path, capsys, pico):
    janus = pico / "janus"
    for words, changes, said in (
        (("cache", "--captions"), {"vlm": janus, "reads": None}, "--vlm-conditions are for decoders"),
        (("cache",), {"vlm": janus, "vae": pico / "vae"}, "make one for this VLM with `dcdd calibrate`"),
    ):
        assert run(*words, **changes) == 1
        assert said in capsys.readouterr().err
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["cache", "--vlm", "pico", "--data", "x", "--out", str(tmp_path / "c"), "--reads", "logits"]) == 1
    assert "--reads would do nothing: without --vlm-conditions a cache belongs to no decoder" in capsys.readouterr().err
