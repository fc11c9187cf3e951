"""The task of training a masked sampler, and its losses on held-out images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dcdd_core.method.sampling import keyed_generator
from dcdd_core.models.janus.masked_start import TEMPLATE
from dcdd_core.models.masked.words import Words
from dcdd_core.training.batches import DataShard
from dcdd_core.training.captions import Captions
from dcdd_core.training.config import OptimizationConfig
from dcdd_core.training.held_out import Listed
from dcdd_core.training.image_batch import Geometry
from dcdd_core.training.masked_loss import masked_losses
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
from dcdd_pico.train_janus import pico_tokenizer
from tests.tiny import save_janus, tiny_tokenizer
from tests.training.runs import caption_of, captioned_folder

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


def test_held_out_losses_are_means_over_images_that_are_always_hidden_in_the_same_places(janus, images):
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
        sums = dict.fromkeys(found, 0.0)
        for start in range(0, len(pairs), 4):
            part = pairs[start : start + 4]
            index = [image for image, _ in part]
            batch = CaptionedTokens(
                tokens=encoded.tokens[index],
                errors=encoded.errors[index],
                captions=tuple(encoded.captions[i] for i in index),
            )
            losses = masked_losses(task.network, task.masked(batch, keyed_generator(3, 67, *part[0])))
            for name, value in losses.items():
                sums[name] += float(value) * len(part) / len(pairs)
        assert found == pytest.approx(sums, rel=1e-4)
        # Of two processes the first holds two of the images; both see the same means.
        said = []
        for rank in range(2):
            of_rank = []
            options |= {"rank": rank, "world": 2, "total": lambda sums, of_rank=of_rank: of_rank.append(sums) or sums}
            MaskedHeldOut(Listed(source, entries), task, **options)(task.network)
            said.append(of_rank)
        (first, first_sums), (second, second_sums) = said
        assert (first.tolist(), second.tolist()) == ([2], [1])
        together = first_sums + second_sums
        assert float(first_sums[-1]) == 44 and float(together[-1]) == 66
        both = MaskedHeldOut(Listed(source, entries), task, **options | {"total": lambda _: together})
        assert list(both(task.network).values()) == pytest.approx((together[:-1] / 66).tolist())


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
