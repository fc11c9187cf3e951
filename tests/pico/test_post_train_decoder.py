"""Post-training of pico's decoder: what it trains on, that it resumes exactly, and what it leaves with the weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import dcdd_pico.fresh_scenes as fresh_scenes
import dcdd_pico.post_train_decoder as stage
from dcdd_core.method.sampling import keyed_generator
from dcdd_core.models.bundle import read_card
from dcdd_core.pipelines.images import to_pixels
from dcdd_core.training.examples import proxy_condition
from dcdd_core.training.log import read_log
from dcdd_core.training.stop import TrainingStopped
from dcdd_core.training.trainer import Trainer
from dcdd_core.training.vlm_conditions import VLMConditions
from dcdd_pico.build_context import Recipe
from dcdd_pico.models import load_pico
from dcdd_pico.scene_tokens import scene_facts_of
from tests.tiny import random_pico

pytestmark = pytest.mark.filterwarnings("ignore:the calibration of .* did not converge")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """The shapes of pico with random weights; its decoder is served the logits as they are."""
    made = random_pico(tmp_path_factory.mktemp("pico") / "weights")
    replace(Recipe.load(made), decoder_batch=2).save(made)
    return made


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"_EVALUATED": 2, "_SHOWN": 1, "_WARMUP": 0}.items():
        monkeypatch.setattr(stage, name, value)


def trained(weights: Path, folder: Path, *more: str) -> Path:
    """Post-trains a copy of the weights; the copy."""
    AcceleratorState._reset_state(reset_partial_state=True)
    own = folder / "weights"
    if not own.exists():
        shutil.copytree(weights, own)
    words = ["--folder", str(folder), "--weights", str(own), "--device", "cpu", "--no-compile"]
    stage.main([*words, "--learning-rate", "0.01", *more])
    return own


def test_the_decoder_goes_on_and_takes_its_place_and_a_stopped_training_resumes_exactly(weights, tmp_path, capsys):
    options = ["--updates", "2", "--vlm-conditions", "0.75", "--drop-condition", "0.8"]
    own = trained(weights, tmp_path / "whole", *options)
    path = own / "decoder.safetensors"
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    before, after = load_file(weights / path.name), load_file(path)
    assert set(after) - set(before) == {"adapter.null.token"}
    assert after["adapter.null.token"].abs().max() > 0, "conditions were left out"
    moved = [float((after[name].float() - before[name].float()).abs().max()) for name in before]
    assert 0 < max(moved) < 0.1, "it goes on from what was there"
    card, was = read_card(path), read_card(weights / path.name)
    assert card.condition_dropout == 0.8 and card.calibration == was.calibration
    assert (card.steps, card.reads, card.base_config) == (was.steps, was.reads, was.base_config)
    recipe = Recipe.load(own)
    assert (recipe.post_updates, recipe.post_vlm_share, recipe.compiled) == (2, 0.75, Recipe.load(weights).compiled)
    names = {"loss", "loss_proxies", "loss_vlm", "loss_without_condition", "ssim", "vlm_ssim", "vlm_perceptual"}
    assert names <= {name.removeprefix("eval/") for name in read_log(tmp_path / "whole" / stage.NAME)[-1]}
    said = (own / stage.CARD).read_text()
    for words in ("2 updates of 2", "75% of the examples on Janus'", "guidance 3,", "left out of 80%", "loss_vlm"):
        assert words in said

    folder, real = tmp_path / "stopped", Trainer._signal
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_signal", lambda self, request: 15 if self.step == 1 else real(self, request))
        with pytest.raises(TrainingStopped):
            trained(weights, folder, *options)
    halfway = load_file(folder / "weights" / path.name)
    assert all(torch.equal(value, halfway[name]) for name, value in before.items()), "replaced only when done"
    found = load_file(trained(weights, folder, *options) / path.name)
    assert set(found) == set(after) and all(torch.equal(found[name], after[name]) for name in found)
    with pytest.raises(ValueError, match="vlm_share"):
        trained(weights, folder, *options[:2], "--vlm-conditions", "0.25", "--drop-condition", "0.8")


def test_the_share_and_the_dropped_conditions_are_what_is_trained_on(weights, tmp_path, monkeypatch):
    """Without training: the first example of each, of the same scenes."""

    class Told:
        def __init__(self, folder, task, batches, config, **more):
            batch, generator = next(iter(batches)), keyed_generator(3)
            self.task, self.batch, self.example = task, batch, task.example(batch, generator, None)
            self.shift, self.masks = config.shift, [task.example(batch, generator, None).mask for _ in range(40)]

    told = []
    monkeypatch.setattr(Told, "train", lambda self: told.append(self) or self.task.network, raising=False)
    monkeypatch.setattr(fresh_scenes, "Trainer", Told)
    monkeypatch.setattr(stage, "HeldOut", lambda *_, **__: None)
    for name, share, dropped in ("proxies", "0", "0"), ("own", "1", "0.25"):
        folder = tmp_path / name
        folder.mkdir()
        trained(weights, folder, "--updates", "9", "--vlm-conditions", share, "--drop-condition", dropped)
    proxies, own = told
    assert proxies.batch.captions == own.batch.captions
    first = Recipe.train_scenes
    assert own.batch.captions == tuple(facts.caption() for facts in scene_facts_of("train", (first, first + 1)))
    pico = load_pico(weights=weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = pico.tokenizer.features(to_pixels(own.batch.pixels, "cpu"))
    conditions = VLMConditions(pico.sampler, pico.decoder.card, pico.tokenizer)
    wanted = (
        proxy_condition(features, pico.decoder.card, pico.tokenizer.codebook, (12, 12)),
        conditions(features, own.batch.captions),
    )
    for found, expected in zip((proxies, own), wanted, strict=True):
        torch.testing.assert_close(found.example.condition.uncertainty, expected.uncertainty, rtol=0.05, atol=0.02)
    assert not torch.allclose(wanted[0].uncertainty, wanted[1].uncertainty, atol=0.1)
    assert [one.task.network.card.condition_dropout for one in told] == [0, 0.25]
    assert told[0].task.network.adapter.null is None and told[1].task.network.adapter.null is not None
    said = (tmp_path / "proxies" / "weights" / stage.CARD).read_text()
    assert "proxies alone.\n" in said and "left out" not in said and "vlm_" not in said
    for one in told:
        assert one.shift == Recipe.load(weights).decoder_shift, "times as in the training before"
        parts = sum(float(image.mean()) < 1 for mask in one.masks for image in mask) / 80
        assert 0.08 < parts < 0.35, "a fifth paints only a part"
