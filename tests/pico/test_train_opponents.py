"""Training of the opponents: what they read, how long, and a run that stops, goes on and is written."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dcdd_pico.train_opponents as stage
from dcdd_core.models.bundle import read_card
from dcdd_core.training.vlm_conditions import VLMConditions
from dcdd_core.types import DCDDWarning
from dcdd_pico import feed_forward, gan_finetune
from dcdd_pico.build_context import BuildContext, Recipe
from dcdd_pico.feed_forward import DIFFUSION, FEED_FORWARD, load_feed_forward, opponent_file
from dcdd_pico.flops import dcdd_flops, feed_forward_flops, load_dcdd, parameters
from dcdd_pico.models import load_pico
from dcdd_pico.reader import SceneReader
from dcdd_pico.scenes import scene_facts, scene_pixels
from tests.tiny import fill, random_pico, tiny_decoder

SMALL = Recipe(train_scenes=8, held_out_scenes=2, decoder_steps=3, post_updates=2, decoder_batch=2)
NAME = "feed-forward-condition"
SHAPES = {
    "feed-forward": {"width": 16, "blocks": 1, "channels": (16, 8, 8, 8)},
    "fine-feed-forward": {"width": 24, "blocks": 1, "channels": (24, 8, 8, 8)},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return random_pico(tmp_path_factory.mktemp("pico") / "weights")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for module in (feed_forward, stage):
        monkeypatch.setattr(module, "SHAPES", SHAPES)
    monkeypatch.setattr(stage, "train_loss_reader", lambda context: fill(SceneReader(), 9).requires_grad_(False))


def context(folder: Path, **changes) -> BuildContext:
    return BuildContext(folder=folder, device=torch.device("cpu"), recipe=replace(SMALL, **changes))


def test_each_trains_with_at_least_the_diffusion_decoder_s_flops(weights, tmp_path):
    ours = dcdd_flops(load_dcdd(weights / "decoder.safetensors"))
    budget = stage.dcdd_budget(context(tmp_path), weights)
    assert budget == ours * 5 * 2
    decoder = stage.start(NAME, load_pico(weights=weights, with_sampler=False), 0)
    each = feed_forward_flops(decoder)
    for operations in (1.0, 0.5):
        plan = stage.Plan.of(decoder, budget, 2, operations)
        assert plan.images == 2 * plan.steps and plan.each == each
        assert plan.steps * 2 * each >= operations * budget > (plan.steps - 1) * 2 * each
        assert plan.share == pytest.approx(plan.images * each / budget)


def test_the_plan_names_every_decoder_with_its_share(weights, tmp_path):
    text = stage.planned(context(tmp_path), weights, operations=2.0)
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines()}
    assert set(rows) >= {"DCDD", *FEED_FORWARD}
    whole = load_dcdd(weights / "decoder.safetensors")
    assert rows["DCDD"][0] == f"{parameters(whole) / 1e6:.2f} M" and rows["DCDD"][3] == "5"
    for name in FEED_FORWARD:
        assert 2 <= float(rows[name][-1]) < 2.05
        flops, images = float(rows[name][1]), 2 * int(rows[name][3].replace(",", ""))
        assert float(rows[name][4]) == pytest.approx(flops * images, rel=0.01)


def test_decoders_on_tokens_and_on_the_condition_see_the_same_scenes(weights, tmp_path):
    models, run = load_pico(weights=weights), context(tmp_path)
    tokens, given = (stage._Data(run, models, reads, 2, 0.0) for reads in ("tokens", "condition"))
    pixels, one_hot = tokens.examples(3)
    same, condition = given.examples(3)
    index = run.batch(stage._STAGE, 3, 2)
    assert torch.equal(pixels, same) and torch.equal(pixels, scene_pixels(run.train_images[index]))
    codebook, grid = models.tokenizer.codebook, models.tokenizer.encode(pixels)
    assert (one_hot.code_vectors == codebook.vectors[grid.tokens]).all(-1).float().mean() > 0.95  # cached in float16
    assert torch.equal(one_hot.uncertainty, torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(2, 144, 4))
    expected = given.proxies(pixels)
    torch.testing.assert_close(condition.code_vectors, expected.code_vectors, atol=0.05, rtol=0)
    assert not torch.allclose(condition.code_vectors, one_hot.code_vectors, atol=0.05)
    assert given.card == models.decoder.card and (tokens.card.variant, tokens.card.calibration) == ("discrete", None)


def test_conditions_of_the_vlm_are_those_of_the_scenes_captions(weights, tmp_path):
    models, run = load_pico(weights=weights), context(tmp_path)
    data = stage._Data(run, models, "condition", 2, 1.0)
    _, condition = data.examples(0)
    index, facts = run.batch(stage._STAGE, 0, 2), scene_facts("train", 8)
    features = torch.stack([torch.tensor(data.scenes.encodings.features[k]).float() for k in index])
    make = VLMConditions(models.sampler, models.decoder.card, models.tokenizer)
    expected = make(features, [facts[k].caption() for k in index])
    torch.testing.assert_close(condition.code_vectors, expected.code_vectors)
    torch.testing.assert_close(condition.uncertainty, expected.uncertainty)
    assert stage._Data(run, models, "tokens", 2, 1.0).vlm_share == 0


@pytest.mark.filterwarnings("ignore:.*")
def test_a_stopped_training_goes_on_and_is_written(weights, tmp_path, monkeypatch):
    decoder = stage.start(NAME, load_pico(weights=weights, with_sampler=False), 0)
    monkeypatch.setattr(stage, "dcdd_budget", lambda *_: 4 * 2 * feed_forward_flops(decoder) - 1)
    train, settings = gan_finetune.train, []

    def every_step(folder, **options):
        settings.append(options["settings"])
        return train(folder, **options | {"save_every": 1, "log_every": 1, "evaluate_every": 2})

    monkeypatch.setattr(gan_finetune, "train", every_step)
    whole, examples = stage.train_feed_forward(context(tmp_path / "a"), weights, NAME), stage._Data.examples
    assert settings[0]["alone"] == 3, "the last of four updates is with the discriminator"

    def stop(self, i):
        if i == 2:
            raise KeyboardInterrupt
        return examples(self, i)

    with monkeypatch.context() as patch:
        patch.setattr(stage._Data, "examples", stop)
        with pytest.raises(KeyboardInterrupt):
            stage.train_feed_forward(context(tmp_path / "b"), weights, NAME)
    again = stage.train_feed_forward(context(tmp_path / "b"), weights, NAME)
    for (name, value), other in zip(whole.state_dict().items(), again.state_dict().values()):
        assert torch.equal(value, other), name
    for name, value in decoder.state_dict().items():
        trained = not torch.equal(value, whole.state_dict()[name])
        assert trained or name.endswith("to_k.bias"), f"{name} was not trained"  # attention does not depend on that one

    loaded = load_feed_forward(tmp_path / "a" / opponent_file(NAME))
    assert loaded.card.images == 8 and loaded.card.calibration is not None
    assert torch.equal(loaded.places, whole.places.half().float())
    log = stage.read_log(tmp_path / "a" / "opponents" / NAME)
    assert [("fooling" in line, "eval/perceptual" in line) for line in log] == [
        (False, False),
        (False, True),
        (False, False),
        (True, True),
    ]
    assert stage.save_curves(tmp_path / "a", stage.NAMES).exists()
    with pytest.raises(ValueError, match="made with other settings"):
        stage.train_feed_forward(context(tmp_path / "a"), weights, NAME, vlm_share=0.5)


@pytest.mark.parametrize(
    "told, fall",
    [
        ({2: 20.0, 4: 26.3, 6: 26.25, 8: 26.0, 10: 27.0}, 0.3),  # after the discriminator joined at update 5
        ({2: 27.0, 4: 26.3, 6: 26.4, 8: 26.5}, 0.0),
        ({2: 20.0, 4: 26.3}, 0.0),
        ({6: 26.0, 8: 25.0}, 0.0),
        ({2: 26.0, 5: 27.0, 6: 26.5}, 0.5),  # the evaluation after update 5 is still without it
    ],
)
def test_the_fall_of_psnr_is_from_before_the_discriminator_to_the_lowest_after(told, fall):
    log = [{"step": step, "loss": 1.0} | ({"eval/psnr": told[step]} if step in told else {}) for step in range(1, 11)]
    assert stage.fall_of_psnr(log, 5) == pytest.approx(fall)


@pytest.mark.filterwarnings("ignore:.*")
def test_a_discriminator_that_harms_is_said(weights, tmp_path, monkeypatch):
    decoder = stage.start(NAME, load_pico(weights=weights, with_sampler=False), 0)
    monkeypatch.setattr(stage, "dcdd_budget", lambda *_: 4 * 2 * feed_forward_flops(decoder) - 1)
    asked = []
    monkeypatch.setattr(stage, "train_with_gan", lambda *_, **__: None)
    monkeypatch.setattr(stage, "fall_of_psnr", lambda log, alone: asked.append(alone) or 0.11)
    with pytest.warns(DCDDWarning, match=r"up to 0\.11 dB lower after the discriminator joined at update 3 "):
        stage.train_feed_forward(context(tmp_path), weights, NAME)
    assert asked == [3] and (tmp_path / opponent_file(NAME)).exists()


def test_diffusion_on_tokens_is_trained_as_the_diffusion_decoder(weights, tmp_path, monkeypatch):
    asked = {}

    def train_pico_decoder(context, name, variant, encodings, vq, vae, calibration, reader):
        asked.update(steps=context.recipe.decoder_steps, name=name, variant=variant, scenes=len(encodings.features))
        return tiny_decoder(variant="discrete", calibration=None)

    monkeypatch.setattr(stage, "train_pico_decoder", train_pico_decoder)
    stage.train_diffusion_on_tokens(context(tmp_path), weights)
    assert asked == {"steps": 5, "name": "opponents/diffusion-tokens", "variant": "discrete", "scenes": 8}
    assert read_card(tmp_path / opponent_file(DIFFUSION)).variant == "discrete"
    stage.train_diffusion_on_tokens(context(tmp_path), weights, operations=1.5)
    assert asked["steps"] == 8


def test_numbers_out_of_range_are_refused(weights, tmp_path):
    for train in (stage.train_feed_forward, stage.train_diffusion_on_tokens):
        named = (NAME,) if train is stage.train_feed_forward else ()
        with pytest.raises(ValueError, match="operations must be a finite number"):
            train(context(tmp_path), weights, *named, operations=0)


def test_the_command_trains_what_it_is_asked_for(weights, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(stage, "planned", lambda context, weights, operations: f"the plan of {operations}")
    monkeypatch.setattr(stage, "train_feed_forward", lambda context, weights, name, **more: asked.append((name, more)))
    monkeypatch.setattr(stage, "train_diffusion_on_tokens", lambda *_, **more: asked.append((DIFFUSION, more)))
    monkeypatch.setattr(stage, "save_curves", lambda folder, names: folder / "curves.png")
    options = ["--folder", str(tmp_path), "--weights", str(weights)]
    monkeypatch.setattr(sys, "argv", ["train", *options, "--plan"])
    stage.main()
    assert asked == [] and "the plan of 1.0" in capsys.readouterr().out
    more = ["--only", "feed-forward-tokens", DIFFUSION, "--operations", "2", "--vlm-conditions", "0.5"]
    monkeypatch.setattr(sys, "argv", ["train", *options, *more])
    stage.main()
    assert asked == [
        ("feed-forward-tokens", {"operations": 2.0, "vlm_share": 0.5}),
        (DIFFUSION, {"operations": 2.0}),
    ]
    asked.clear()
    monkeypatch.setattr(sys, "argv", ["train", *options])
    stage.main()
    assert [name for name, _ in asked] == list(stage.NAMES)
