"""Choosing the serving options: the joint distance of images and captions, the search, and what is written."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dcdd_core.evaluation.frechet import FrechetStatistics, frechet_distance
from dcdd_core.pipelines.condition import condition_for
from dcdd_core.pipelines.decode import decode
from dcdd_pico import serving
from dcdd_pico.build_context import BuildContext, Recipe
from dcdd_pico.models import load_pico
from dcdd_pico.reader import FACTS, SceneReader, fact_labels
from dcdd_pico.scene_arrays import scene_images
from dcdd_pico.scenes import scene_facts, scene_pixels
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


def test_both_networks_judge_and_neither_by_its_scale():
    """Two candidates that differ for one network alone: the better for it wins, whatever the other's scale."""
    for scale in (1.0, 1000.0):
        better, worse = ({"reader": 0.2, "detector": scale * value} for value in (0.3, 0.31))
        assert serving.overall(better) < serving.overall(worse)
    assert serving.overall({"reader": 0.2, "detector": 0.8}) == pytest.approx(0.4)
    assert serving.overall({"reader": 0.1, "detector": 0.8}) == pytest.approx(
        serving.overall({"reader": 0.2, "detector": 0.4})
    ), "half of one is worth half of the other"
    assert serving.overall({"reader": -1e-12, "detector": 1.0}) == 0, "of equal images, within rounding"


def test_each_network_measures_the_same_images_with_the_captions_facts(tmp_path):
    context = BuildContext(folder=tmp_path, device=torch.device("cpu"), recipe=Recipe(choice_scenes=40))
    networks = {"one": fill(SceneReader(), 1), "two": fill(SceneReader(), 2)}
    judge = serving.JointDistance(context, networks)
    real = scene_pixels(scene_images(tmp_path, "calibration", 40, size=96), context.device)
    samples, drawn = [None] * len(judge.parts), []

    def image(part, grid):
        drawn.append(part)
        return real[part.start : part.stop]

    same = judge.of(image, samples)
    assert list(same) == ["one", "two"] and same == pytest.approx({"one": 0, "two": 0}, abs=1e-2)
    assert drawn == judge.parts == [range(32), range(32, 40)], "painted once, for both"
    pale = 0.5 * real.flip(0)
    other = judge.of(lambda part, _: pale[part.start : part.stop], samples)
    assert all(other[name] > 10 * abs(same[name]) for name in networks), "paler images of other captions"
    for name, network in networks.items():
        features, made = (
            torch.cat([network.frechet_features(part).detach() for part in images.split(32)]) for images in (real, pale)
        )
        facts = fact_features(features, judge.facts)  # the scenes' own, whose scale is no candidate's
        pair = [torch.cat([one, facts], dim=1) for one in (features, made)]
        assert other[name] == pytest.approx(frechet_distance(*(FrechetStatistics.of([one]) for one in pair)))


def test_the_judges_are_the_second_reader_and_the_text_detector(monkeypatch, tmp_path):
    monkeypatch.setattr(serving, "train_loss_reader", lambda context: "second")
    monkeypatch.setattr(serving, "TextDetectorRuler", lambda *, threads: f"detector of {threads} threads")
    context = BuildContext(folder=tmp_path, device=torch.device("cpu"), recipe=Recipe())
    threads = torch.get_num_threads()
    assert serving.judges(context) == {"second reader": "second", "text detector": f"detector of {threads} threads"}


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


def test_guidance_on_the_condition_grows_as_long_as_that_is_better():
    card = tiny_card(reads="anchored", condition_dropout=0.1)
    found = search_condition_guidance(card, lambda one: abs(one.condition_guidance - 1.6), {1.0: 0.6})
    assert list(found) == [1.0, 1.25, 1.5, 2.0] and min(found, key=found.get) == 1.5
    assert list(search_condition_guidance(card, lambda _: 0.7, {1.0: 0.6})) == [1.0, 1.25]


@pytest.mark.filterwarnings("ignore:.*")
@torch.no_grad()
def test_a_candidate_is_painted_as_its_card_says_whatever_the_decoder_was_served_with(tmp_path):
    """A shift of None is FLUX's own, though the decoder's card has another: `serving` runs on decoders that have."""
    pico = load_pico(weights=random_pico(tmp_path / "weights"))
    context = BuildContext(folder=tmp_path, device=torch.device("cpu"), recipe=Recipe())
    grid = pico.sampler.sample(["a red circle"], seeds=[3])
    served = replace(pico.decoder.card, shift=3.0, steps=2)
    pico.decoder.card = served
    for shift, steps in (None, 3), (2.0, 2):
        card = replace(served, shift=shift, steps=steps)
        paint = serving.painter(context, pico.tokenizer, pico.codec.model, pico.decoder, card)
        found = paint(range(3, 4), grid)
        assert pico.decoder.card is served, "the decoder is as it was"
        pico.decoder.card = card
        condition = condition_for(card, grid, pico.tokenizer.codebook)
        with context.autocast():
            expected = decode(pico.decoder, pico.codec, condition, seeds=[3], steps=steps).pixels
            other = decode(pico.decoder, pico.codec, condition, seeds=[3], steps=steps, shift=3.0).pixels
        pico.decoder.card = served
        assert torch.equal(found, expected) and not torch.equal(found, other)


@pytest.mark.filterwarnings("ignore:.*")
def test_the_command_writes_what_it_chose_into_the_card(tmp_path, monkeypatch, capsys):
    weights = random_pico(tmp_path / "weights")
    Recipe(choice_scenes=3, calibration_images=2, guidance=7.0, janus_steps=8).save(weights)
    before = load_file(weights / "decoder.safetensors")
    networks = {"reader": fill(SceneReader(), 9), "other": fill(SceneReader(), 10)}
    monkeypatch.setattr(serving, "judges", lambda context: networks)
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
        rows = found["by network"]
        by_shift = [row for row in rows if row["reads"] == "anchored"]
        assert [[row["shift"], (row["reader"] * row["other"]) ** 0.5] for row in by_shift] == [
            [shift, pytest.approx(value)] for shift, value in found["by shift"]
        ]
        assert len(rows) == len(by_shift) + 2
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
