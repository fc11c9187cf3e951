"""The task of training a masked sampler, and its losses on held-out images."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from dcdd_core.method.sampling import keyed_generator
from dcdd_core.models.janus.masked_start import TEMPLATE
from dcdd_core.models.masked.words import Words
from dcdd_core.training.batches import Batches, DataShard
from dcdd_core.training.captions import Captions
from dcdd_core.training.config import OptimizationConfig, RunConfig
from dcdd_core.training.held_out import Listed
from dcdd_core.training.image_batch import Geometry
from dcdd_core.training.log import read_log
from dcdd_core.training.masked_loss import MaskedExample, masked_losses
from dcdd_core.training.masked_plan import MaskedPlan
from dcdd_core.training.masked_task import (
    CaptionedTokens,
    CaptionReader,
    ErrorScale,
    MaskedHeldOut,
    MaskedTask,
    MaskingConfig,
    TokenEncoder,
)
from dcdd_core.training.sources import open_images
from dcdd_core.training.trainer import Trainer
from dcdd_pico.train_janus import pico_tokenizer
from tests.tiny import fill, save_janus, tiny_tokenizer
from tests.training.runs import accelerator, caption_of, captioned_folder, forked

pytestmark = pytest.mark.filterwarnings("ignore:.*")


@pytest.fixture(scope="module")
def janus(tmp_path_factory) -> Path:
    return save_janus(tmp_path_factory.mktemp("models") / "janus")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """24 images with captions."""
    return captioned_folder(tmp_path_factory.mktemp("images") / "folder")


def task_of(janus: Path, **masking) -> MaskedTask:
    plan = MaskedPlan(vlm=janus, width=32, layers=1, heads=2)
    tokenizer = plan.tokenizer("cpu")
    sampler = plan.sampler(tokenizer, plan.geometry(tokenizer))
    scale = ErrorScale(mean=-1.0, deviation=0.5)
    return MaskedTask(sampler, TokenEncoder(tokenizer), scale, MaskingConfig(**masking))


def test_an_example_has_the_captions_the_units_and_the_masks_that_were_asked_for(janus):
    count = 200
    batch = CaptionedTokens(
        tokens=torch.randint(64, (count, 16), generator=torch.Generator().manual_seed(0)),
        errors=torch.full((count, 16), -0.5),
        captions=tuple(map(caption_of, range(count))),
    )
    for dropped in (0.0, 0.3, 1.0):
        task = task_of(janus, dropped=dropped, corruptions=(), schedule="linear")
        example = task.masked(batch, torch.Generator().manual_seed(1))
        words = task.reader.words
        full = [words.ids(caption) for caption in batch.captions]
        found = [ids == row for ids, row in zip(example.ids, full)]
        assert 1 - sum(found) / count == pytest.approx(dropped, abs=0.1 * (0 < dropped < 1))
        gone = [(ids, row) for ids, row, kept in zip(example.ids, full, found) if not kept]
        assert all(ids == words.unconditional(row) for ids, row in gone)
        assert (example.errors == 1).all() and not example.wrong.any()
        # Of "linear" the mean is a half, a tenth of the images being complete.
        assert float(example.hidden.float().mean()) == pytest.approx(0.45, abs=0.05)


def test_sharded_weights_are_refused(janus):
    task = task_of(janus)
    with pytest.raises(ValueError, match="trained with DDP: .* choose configs/accelerate/ddp.yaml"):
        task.optimizers(OptimizationConfig(steps=1), sharded=True)


def test_errors_are_predicted_in_units_of_what_is_usual(janus, images):
    plan = MaskedPlan(vlm=janus, width=32, layers=1, heads=2)
    tokenizer = plan.tokenizer("cpu")
    source, encode = open_images(images, plan.geometry(tokenizer), captions=Captions()), TokenEncoder(tokenizer)
    scale = ErrorScale.of(source, encode, batch=5)
    everything = encode(source.collate([source.load(entry) for entry in source.entries(DataShard(seed=None), 0)]))
    found = scale.standardised(everything.errors)
    assert abs(float(found.mean())) < 0.01 and float(found.std()) == pytest.approx(1, abs=0.01)
    assert scale == ErrorScale(mean=round(scale.mean, 3), deviation=round(scale.deviation, 3))


def test_long_captions_are_cut_at_their_end():
    words = Words(tiny_tokenizer(), TEMPLATE)
    around = len(words.ids("a")) - 1
    reader = CaptionReader(words, around + 3)
    with pytest.warns(UserWarning, match=f"captions of more than {around + 3} tokens are cut"):
        assert reader.ids("a red circle on the left") == words.ids("a red circle")
    assert reader.ids("a blue square") == words.ids("a blue square")
    with pytest.raises(ValueError, match="the template alone takes"):
        CaptionReader(words, around)
    byte_pairs = Words(pico_tokenizer(), TEMPLATE)
    assert len(CaptionReader(byte_pairs, around + 4).ids("a large plain red star at the top")) <= around + 4


def captioned(images: Path):
    geometry = Geometry(resolution=16, token_resolution=16, token_factor=4, vae_factor=1)
    return open_images(images, geometry, captions=Captions())


def test_wrong_tokens_are_draws_of_the_averaged_weights(janus, images):
    task = task_of(janus, corruptions=("samples",))
    source, drawn = captioned(images), []

    def averaged(work):
        drawn.append(work(task.network))
        return torch.eye(64)[7].expand_as(drawn[0])

    batch = source.collate([source.load(entry) for entry in source.entries(DataShard(seed=None), 0)])
    example = task.example(batch, torch.Generator().manual_seed(0), averaged)
    assert len(drawn) == 1 and example.wrong.any() and (example.seen[example.wrong] == 7).all()


def test_adamw_has_the_betas_and_the_decay_and_muon_the_matrices_of_the_blocks(janus):
    task = task_of(janus)
    (adamw,) = task.optimizers(OptimizationConfig(steps=1, weight_decay=0.25), sharded=False)
    assert all(group["betas"] == (0.9, 0.95) and group["weight_decay"] == 0.25 for group in adamw.param_groups)
    _, muon = task.optimizers(OptimizationConfig(steps=1, optimizer="muon"), sharded=False)
    names = {id(weight): name for name, weight in task.network.named_parameters()}
    found = {names[id(weight)] for group in muon.param_groups for weight in group["params"]}
    assert found == {f"layers.0.{part}.weight" for part in ("q", "k", "v", "out", "gate", "up", "down")}


def means_over_positions(task, parts):
    """The means that these held-out batches give together, from each batch's own."""
    sums = dict.fromkeys(("loss", "hidden", "wrong", "error", "importance"), 0.0)
    weights = dict.fromkeys(sums, 0.0)
    for key, batch in parts:
        example = task.masked(batch, keyed_generator(3, 67, *key))
        found = {name: float(value) for name, value in masked_losses(task.network, example).items()}
        found["loss"] -= 0.05 * found["error"] + 0.02 * found["importance"]
        hidden, wrong = int(example.hidden.sum()), int(example.wrong.sum())
        measured = example.probe.any(1) & (example.hidden & ~example.probe).any(1)
        clean = example.tokens.numel() - hidden - wrong
        own = {"loss": hidden + wrong + 0.1 * clean, "hidden": hidden, "wrong": wrong, "error": hidden}
        for name, weight in (own | {"importance": int(measured.sum())}).items():
            sums[name] += weight * found[name]
            weights[name] += weight
    means = {name: sums[name] / weights[name] for name in sums}
    return means | {"loss": means["loss"] + 0.05 * means["error"] + 0.02 * means["importance"]}


def test_held_out_losses_are_means_over_positions_that_are_always_the_same(janus, images):
    task = task_of(janus)
    source = captioned(images)
    entries = list(source.entries(DataShard(seed=None), 0))[:3]
    encoded = task.encode(source.collate([source.load(entry) for entry in entries]))
    options = {"seed": 3, "batch": 4, "rank": 0, "world": 1, "total": lambda sums: sums}
    held_out = MaskedHeldOut(Listed(source, entries), task, **options)
    with torch.no_grad():
        found = held_out(task.network)
        assert held_out(task.network) == found
        # At least 64 examples: each image 22 times, in batches of 4 and a last one of 2.
        pairs = [(image, draw) for draw in range(22) for image in range(3)]
        parts = []
        for start in range(0, len(pairs), 4):
            part = pairs[start : start + 4]
            index = [image for image, _ in part]
            batch = CaptionedTokens(
                tokens=encoded.tokens[index],
                errors=encoded.errors[index],
                captions=tuple(encoded.captions[i] for i in index),
            )
            parts.append((part[0], batch))
        assert found == pytest.approx(means_over_positions(task, parts), rel=1e-4)


def test_held_out_losses_of_two_processes_are_means_over_the_positions_of_both(janus, images):
    task = task_of(janus)
    source = captioned(images)
    entries = list(source.entries(DataShard(seed=None), 0))[:3]
    told = []  # what both processes gave at each call so far

    def of_rank(rank):
        own = []

        def total(sums):
            own.append(sums)
            return told[len(own) - 1] if len(own) <= len(told) else sums

        held_out = MaskedHeldOut(Listed(source, entries), task, seed=3, batch=4, rank=rank, world=2, total=total)
        return held_out(task.network), own, held_out._parts

    with torch.no_grad():
        for call in range(3):  # the images, the positions, the losses
            both = [of_rank(rank)[1][call] for rank in range(2)]
            told.append(both[0] + both[1])
        first, second = of_rank(0), of_rank(1)
        assert told[0].tolist() == [3] and [len(own[2]) for own in (first, second)] == [11, 6]
        assert first[0] == second[0]
        assert first[0] == pytest.approx(means_over_positions(task, [*first[2], *second[2]]), rel=1e-4)


def test_a_process_without_a_held_out_image_sees_the_others_means(janus, images):
    task = task_of(janus)
    source = captioned(images)
    totals = iter([torch.ones(1), torch.full((4,), 2.0), torch.arange(5.0)])
    options = {"seed": 3, "batch": 4, "rank": 1, "world": 2, "total": lambda sums: next(totals)}
    entries = list(source.entries(DataShard(seed=None), 0))[:1]
    found = MaskedHeldOut(Listed(source, entries), task, **options)(task.network)
    assert found == {"loss": 0, "hidden": 1, "wrong": 2, "error": 3, "importance": 4}


class Sliced(MaskedTask):
    """A task whose example of some images are their rows of one example of all."""

    whole: MaskedExample

    def example(self, batch, generator, averaged):
        rows = [int(Path(key).stem) for key in batch.keys]
        held = {
            name: getattr(self.whole, name)[rows] for name in ("tokens", "errors", "hidden", "wrong", "seen", "probe")
        }
        return MaskedExample(ids=[self.whole.ids[row] for row in rows], **held)


def updated(folder: Path, janus: Path, images: Path, size: int, accumulation: int) -> None:
    """Makes an update on four images, which hide 15, 1, 0 and 8 of their 16 tokens; leaves the gradient and the log."""
    task = task_of(janus)
    task.__class__ = Sliced
    fill(task.network)
    draw = torch.Generator().manual_seed(4)
    tokens, places = torch.randint(64, (4, 16), generator=draw), torch.arange(16)
    hidden = places < torch.tensor([15, 1, 0, 8])[:, None]
    seen = torch.where(places >= torch.tensor([16, 14, 12, 16])[:, None], (tokens + 1) % 64, tokens)
    task.whole = MaskedExample(
        ids=[task.reader.ids(caption_of(row)) for row in range(4)],
        tokens=tokens,
        errors=torch.randn(4, 16, generator=draw),
        hidden=hidden,
        wrong=~hidden & (seen != tokens),
        seen=seen.masked_fill(hidden, 64),
        probe=(places < 3) & (torch.arange(4) == 0)[:, None],
    )
    workers = accelerator()
    clip = workers.clip_grad_norm_

    def kept(weights, norm):
        weights = list(weights)
        torch.save([weight.grad.clone() for weight in weights], folder / f"gradient-{workers.process_index}.pt")
        return clip(weights, norm)

    workers.clip_grad_norm_ = kept
    shard = DataShard(seed=None, rank=workers.process_index, world=workers.num_processes)
    Trainer(
        folder,
        task,
        Batches(captioned(images), size=size, shard=shard),
        OptimizationConfig(steps=1, accumulation=accumulation, warmup=0),
        accelerator=workers,
        settings={},
        run=RunConfig(samples=0, log_every=1),
        report=lambda _: None,
    ).train()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
def test_an_update_is_the_same_however_its_images_are_divided(janus, images, tmp_path):
    """Each position weighs alike, in micro-batches of any size and in two processes."""
    folders = []
    for world, size, accumulation in ((1, 4, 1), (1, 2, 2), (1, 1, 4), (2, 2, 1), (2, 1, 2)):
        folders.append(tmp_path / f"{world}-{size}-{accumulation}")
        folders[-1].mkdir()
        work = partial(updated, folders[-1], janus, images, size, accumulation)
        if world == 1:
            work()
        else:
            assert forked(work, world=world, clean=True) == [0] * world
    (expected,) = read_log(folders[0])
    gradient = torch.load(folders[0] / "gradient-0.pt")
    assert min(expected[name] for name in ("loss", "hidden", "wrong", "error", "importance")) > 0
    for folder in folders[1:]:
        (found,) = read_log(folder)
        assert found == pytest.approx(expected | {"seconds": found["seconds"]}, rel=1e-5), folder.name
        for own in folder.glob("gradient-*.pt"):
            for part, whole in zip(torch.load(own), gradient, strict=True):
                torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("width", [32, 96])
def test_a_new_network_starts_with_the_codes_and_without_an_opinion(janus, width):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    plan = MaskedPlan(vlm=janus, width=width, layers=1, heads=2, seed=3)
    tokenizer = plan.tokenizer("cpu")
    sampler = plan.sampler(tokenizer, plan.geometry(tokenizer))
    network = sampler.model
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(network.codes.weight, tokenizer.codebook.vectors.float())
    assert not network.scores_out.weight.any() and not network.scores_out.bias.any()
    for weight in (network.words.weight, network.positions):
        assert float(weight.std()) == pytest.approx(0.02, rel=0.15)
    # 8/3 of the width, up to a multiple of 64, as gated blocks have it.
    assert network.config.hidden == {32: 128, 96: 256}[width]
    assert sampler.sampling.guidance == 3.0 and all(weight.requires_grad for weight in network.parameters())
    again = plan.sampler(tokenizer, plan.geometry(tokenizer)).model
    assert all(map(torch.equal, network.parameters(), again.parameters()))
    other = MaskedPlan(vlm=janus, width=width, layers=1, heads=2, seed=4).sampler(tokenizer, plan.geometry(tokenizer))
    assert not torch.equal(network.words.weight, other.model.words.weight)


def test_a_new_network_has_a_row_for_every_id_of_its_words(janus, tmp_path):
    folder = tmp_path / "words"
    tiny_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer.json"
    words = json.loads(path.read_text("utf-8"))
    words["model"]["vocab"]["red"] = 50  # ids may have gaps
    path.write_text(json.dumps(words), "utf-8")
    plan = MaskedPlan(vlm=janus, text=folder)
    tokenizer = plan.tokenizer("cpu")
    assert plan.config(tokenizer, plan.geometry(tokenizer)).words == 51


def test_images_of_too_many_tokens_are_refused_with_the_option_to_change(janus):
    plan = MaskedPlan(vlm=janus, side=4100)
    with pytest.raises(ValueError, match=r"4100 pixels have 1025 x 1025 tokens, .* take smaller ones \(--side\)"):
        plan.geometry(plan.tokenizer("cpu"))
    plan = MaskedPlan(vlm=janus, side=4096)
    tokenizer = plan.tokenizer("cpu")
    assert plan.config(tokenizer, plan.geometry(tokenizer)).grid == (1024, 1024)
