"""Choosing the serving options: the joint distance of images and captions, the search, and what is written."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dcdd_core.evaluation.frechet import FrechetStatistics, frechet_distance
from dcdd_pico import serving
from dcdd_pico.build_context import BuildContext, Recipe
from dcdd_pico.models import load_pico
from dcdd_pico.reader import FACTS, SceneReader, fact_labels
from dcdd_pico.scenes import scene_facts
from dcdd_pico.serving import fact_features, search_condition_guidance, search_serving
from dcdd_pico.train_calibration import fit_sampler, scene_features
from tests.tiny import fill, random_pico, tiny_card


def test_images_of_other_captions_are_farther_off():
    facts = scene_facts("calibration", 600)
    shapes = fact_labels(facts)["shape"]
    features = torch.randn(600, 4, generator=torch.Generator().manual_seed(0))
    features[:, 0] += shapes
    said = fact_features(features, facts)
    assert said.shape == (600, sum(map(len, FACTS.values())))
    assert float(said.norm(dim=1).mean()) == pytest.approx(float(features.norm(dim=1).mean()))

    def distance(made, *beside):
        pairs = [torch.cat([one, *beside], dim=1) for one in (features, made)]
        return frechet_distance(*(FrechetStatistics.of([pair]) for pair in pairs))

    assert distance(features, said) == pytest.approx(0, abs=1e-3)
    assert distance(features.flip(0)) == pytest.approx(0, abs=1e-3)
    assert distance(features.flip(0), said) > 0.1


def test_the_shift_grows_as_long_as_that_is_better_and_each_reading_is_tried_with_the_best():
    tried = []

    def distance(card):
        tried.append((card.shift, card.reads))
        return {"anchored": 0.5, "logits": 0.4, "tokens": 0.6}[card.reads] + abs((card.shift or 0.0) - 2.2)

    by_shift, by_reading = search_serving(tiny_card(reads="anchored"), distance)
    assert list(by_shift) == [None, 1.0, 1.5, 2.0, 2.5] and min(by_shift, key=by_shift.get) == 2.0
    assert by_reading == pytest.approx({"anchored": 0.7, "logits": 0.6, "tokens": 0.8})
    assert tried[-2:] == [(2.0, "logits"), (2.0, "tokens")] and len(tried) == 7
    by_shift, _ = search_serving(tiny_card(reads="anchored"), lambda card: card.shift or 0.0)
    assert list(by_shift) == [None, 1.0]


def test_no_shift_is_tried_whose_last_step_begins_later_than_asked():
    def tried(latest: float, steps: int) -> list:
        card = tiny_card(reads="anchored", steps=steps)
        return list(search_serving(card, lambda one: -(one.shift or 0.0), latest=latest)[0])

    assert tried(0.5, 10) == [None, 1.0, 1.5, 2.0], "2 begins it at .451, 2.5 at .575"
    assert tried(0.57, 10) == tried(0.5, 10) and tried(0.58, 10)[-1] == 2.5
    assert tried(0.5, 20)[-1] == 2.5 and tried(0.1, 10) == [None]
    assert tried(1.0, 10) == [None, *serving.SHIFTS]


def test_guidance_on_the_condition_grows_as_long_as_that_is_better_and_is_painted_with(monkeypatch):
    card = tiny_card(reads="anchored", condition_dropout=0.1)
    found = search_condition_guidance(card, lambda one: abs(one.condition_guidance - 1.6), {1.0: 0.6})
    assert list(found) == [1.0, 1.25, 1.5, 2.0] and min(found, key=found.get) == 1.5
    assert list(search_condition_guidance(card, lambda _: 0.7, {1.0: 0.6})) == [1.0, 1.25]

    class Asked(Exception):
        pass

    def decode(*_, seeds, **served):
        raise Asked(served)

    monkeypatch.setattr(serving, "decode", decode)
    for name in ("condition_for", "KLCodec"):
        monkeypatch.setattr(serving, name, lambda *_: None)
    context = BuildContext(folder=Path(), device=torch.device("cpu"), recipe=Recipe())
    paint = serving.painter(
        context, SimpleNamespace(codebook=None), None, None, replace(card, shift=2.0, condition_guidance=1.5)
    )
    with pytest.raises(Asked) as told:
        paint(range(2), None)
    assert told.value.args[0] == {"steps": card.steps, "shift": 2.0, "condition_guidance": 1.5}


@pytest.mark.filterwarnings("ignore:.*")
def test_the_command_writes_what_it_chose_into_the_card(tmp_path, monkeypatch, capsys):
    weights = random_pico(tmp_path / "weights")
    Recipe(choice_scenes=3, calibration_images=2, guidance=7.0, janus_steps=8).save(weights)
    before = load_file(weights / "decoder.safetensors")
    monkeypatch.setattr(serving, "train_loss_reader", lambda context: fill(SceneReader(), 9))
    monkeypatch.setattr(serving, "GUIDANCES", (1.0, 2.0))
    monkeypatch.setattr(serving, "SHIFTS", (1.0,))
    monkeypatch.setattr(serving, "_STEPS", 2)
    told, real = {}, serving.choose_guidance

    def choose(*given, **options):
        told.update(real(*given, **options))
        return told

    monkeypatch.setattr(serving, "choose_guidance", choose)
    arguments = ["a", "--folder", str(tmp_path / "work"), "--weights", str(weights)]
    for more, chosen in (
        ([], lambda: min(told, key=lambda one: told[one]["decoder"])),
        (["--guidance", "4"], lambda: 4.0),
    ):
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        serving.main()
        pico, guidance = load_pico(weights=weights), chosen()
        card = pico.decoder.card
        expected = fit_sampler(pico.sampler, scene_features(Recipe.load(weights), pico.tokenizer), guidance)
        assert card.calibration == expected and card.calibration.guidance == guidance and card.steps == 2
        found = json.loads((tmp_path / "work" / "serving.json").read_text())
        assert (card.shift, card.reads) == (found["shift"], found["reads"])
        assert Recipe.load(weights) == Recipe(choice_scenes=3, calibration_images=2, guidance=guidance, janus_steps=8)
        assert f"guidance {guidance:g}, shift {card.shift}, reads {card.reads}" in capsys.readouterr().out
    assert list(told) == [1.0, 2.0] and all(set(row) == {"VQ-VAE", "decoder"} for row in told.values())
    assert json.loads((tmp_path / "work" / "guidance.json").read_text()) == {str(k): row for k, row in told.items()}
    after = load_file(weights / "decoder.safetensors")
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)

    both = fit_sampler(pico.sampler, scene_features(Recipe.load(weights), pico.tokenizer), 4.0, with_temperature=True)
    assert both.unanchored == expected.unanchored and both != expected

    # Only calibrated: what was chosen stays, at the recipe's guidance or the one that is given.
    monkeypatch.setattr(serving, "serve", lambda *_, **__: pytest.fail("nothing is to be chosen"))
    for more, guidance in (["--guidance", "2"], 2.0), ([], 2.0):
        kept = load_pico(weights=weights).decoder.card
        monkeypatch.setattr(sys, "argv", [*arguments, "--only-calibrate", *more])
        serving.main()
        card = load_pico(weights=weights).decoder.card
        expected = fit_sampler(pico.sampler, scene_features(Recipe.load(weights), pico.tokenizer), guidance)
        assert card == replace(kept, calibration=expected) and expected.guidance == guidance
        assert Recipe.load(weights).guidance == guidance
    monkeypatch.setattr(sys, "argv", [*arguments, "--only-calibrate", "--guidance", "4", "--fit-anchor-temperature"])
    serving.main()
    assert load_pico(weights=weights).decoder.card.calibration == both
    monkeypatch.setattr(sys, "argv", [*arguments, "--only-calibrate", "--last-step", "0.5"])
    with pytest.raises(SystemExit):
        serving.main()
    assert "--last-step would do nothing with --only-calibrate" in capsys.readouterr().err
