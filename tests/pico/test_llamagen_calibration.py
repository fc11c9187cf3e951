"""The calibration of pico's LlamaGen, on random weights."""

import json
import sys

import pytest
import torch

from dcdd_core import registry
from dcdd_core.pipelines.calibrate import Proxies, fit_to_samples
from dcdd_core.types import Calibration
from dcdd_pico import llamagen_calibration
from dcdd_pico.build_context import Recipe
from dcdd_pico.embedded import LLAMAGEN, calibration_name
from dcdd_pico.llamagen_sections import GUIDANCES, guidance_name
from dcdd_pico.models import load_pico
from dcdd_pico.scenes import render_scene, scene_pixels
from dcdd_pico.sections import Measured
from dcdd_pico.train_calibration import sample_captions
from tests.tiny import random_llamagen, random_pico


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = random_pico(tmp_path_factory.mktemp("pico") / "weights")
    random_llamagen(folder)
    Recipe(calibration_images=3).save(folder)
    return folder


@pytest.mark.filterwarnings("ignore:a mean entropy")
def test_it_is_what_dcdd_calibrate_fits_and_is_served_with_the_vlm(weights):
    before = load_pico(weights=weights, vlm=LLAMAGEN)
    janus = load_pico(weights=weights, with_sampler=False).decoder.card
    made = llamagen_calibration.fit_llamagen_calibration(weights, 2.0)
    images = [scene_pixels(render_scene("train", k).image[None]) for k in range(3)]
    expected = fit_to_samples(
        sample_captions(before.sampler, 3, 2.0),
        Proxies(before.tokenizer, images),
        vlm="pico llamagen",
        guidance=2.0,
        temperature=1.0,
        with_anchor=True,
    )
    assert made == expected == Calibration.load(weights / calibration_name(LLAMAGEN))
    after = load_pico(weights=weights, vlm=LLAMAGEN)
    assert after.decoder.card.calibration == made and after.sampler.default_guidance == 2.0
    assert json.loads((weights / LLAMAGEN / "config.json").read_text())["block_size"] == 144
    assert load_pico(weights=weights, with_sampler=False).decoder.card == janus == before.decoder.card
    assert registry.sampler_family(weights / LLAMAGEN).name == "llamagen"


def test_the_command_takes_the_guidance_that_the_section_says(weights, tmp_path, monkeypatch, capsys):
    rows = {guidance_name(g): {"frechet": abs(g - 5), "F1": 0.9, "F1: lowest": 0.8} for g in GUIDANCES}
    asked = []

    def measure(options, sections):
        asked.append((options.scenes, options.weights, list(sections)))
        return None, Measured({"llamagen-choice": rows})

    monkeypatch.setattr(llamagen_calibration, "measure", measure)
    monkeypatch.setattr(
        llamagen_calibration,
        "fit_llamagen_calibration",
        lambda path, guidance, device: fitted.append((path, guidance)) or told,
    )
    told, fitted = load_pico(weights=weights, with_sampler=False).decoder.card.calibration, []
    told = Calibration.load(weights / calibration_name(LLAMAGEN)) if told.target is None else told
    for more in ([], ["--guidance", "1.5"]):
        monkeypatch.setattr(
            sys, "argv", ["a", "--weights", str(weights), "--scenes", "9", "--out", str(tmp_path), *more]
        )
        llamagen_calibration.main()
    assert asked == [(9, weights, ["llamagen-choice"])] and fitted == [(weights, 5.0), (weights, 1.5)]
    out = capsys.readouterr().out
    assert "guidance 5\n" in out and "guidance 1.5\n" in out and "mean entropy" in out


def test_features_are_those_of_the_tokenizer(weights):
    pico = load_pico(weights=weights, vlm=LLAMAGEN, with_sampler=False)
    image = scene_pixels(render_scene("train", 0).image[None])
    assert torch.equal(pico.tokenizer.features(image), load_pico(weights=weights).tokenizer.features(image))
