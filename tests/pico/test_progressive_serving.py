"""Choosing how the masked sampler samples: the search, what judges, what is written, and an interrupted choice."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from dcdd_core import registry
from dcdd_core.method.progressive import ProgressiveOptions
from dcdd_core.types import Calibration
from dcdd_pico import progressive_serving as stage
from dcdd_pico.build_context import BuildContext, Recipe
from dcdd_pico.embedded import PROGRESSIVE
from dcdd_pico.models import load_pico
from dcdd_pico.progressive import progressive_folder
from dcdd_pico.reader import SceneReader
from dcdd_pico.serving import JointDistance, overall
from dcdd_pico.train_calibration import fit_sampler, scene_features
from dcdd_pico.train_progressive import save_sampler, train_progressive
from tests.tiny import fill, random_pico


def test_each_field_is_searched_with_the_best_of_those_before():
    tried = []

    def distance(options):
        tried.append(options)
        ramp = 0.1 if options.ramp == (options.guidance == 4) else 0.0  # no ramp, but only at the guidance that is best
        return abs(options.guidance - 4) + ramp + abs(options.revision_passes - 2) + (options.schedule != "cosine")

    start = ProgressiveOptions(guidance=3.0)
    found = stage.search_sampling(start, distance)
    assert list(found) == tried and len(tried) == len(set(tried)), "none twice"
    best = replace(start, guidance=4.0, ramp=False, revision_passes=2, schedule="cosine")
    assert min(found, key=found.get) == best and found[best] == 0
    assert tried[0] == start and {options.guidance for options in tried[:6]} == set(stage.GUIDANCES)
    assert all(options.guidance == 4 for options in tried[6:]) and not any(one.ramp for one in tried[6:])
    assert len(tried) == 6 + 1 + 4 + 2


def test_of_equals_what_was_there_stays():
    start = ProgressiveOptions(guidance=2.5, ramp=False, revision_passes=4, schedule="linear")
    found = stage.search_sampling(start, lambda _: 1.0)
    assert min(found, key=found.get) == start


@pytest.mark.filterwarnings("ignore:.*")
def test_the_command_writes_its_choice_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    weights = random_pico(tmp_path / "weights")
    recipe = Recipe(
        choice_scenes=3,
        calibration_images=2,
        held_out_scenes=4,
        progressive_layers=1,
        progressive_steps=1,
        progressive_batch=2,
    )
    recipe.save(weights)
    context = BuildContext(folder=tmp_path / "work", device=torch.device("cpu"), recipe=recipe)
    network, codebook = train_progressive(
        replace(context, recipe=replace(recipe, train_scenes=4)), weights, ahead=False
    )
    folder = progressive_folder(weights)
    save_sampler(folder, weights, network, codebook, name="pico progressive")
    networks = {"reader": fill(SceneReader(), 9), "other": fill(SceneReader(), 10)}
    monkeypatch.setattr(stage, "judges", lambda _: networks)
    monkeypatch.setattr(stage, "CANDIDATES", {"guidance": (1.0, 2.0), "revision_passes": (3, 5)})
    asked, real, distances = [], JointDistance.samples, JointDistance.of

    def samples(judge, sampler, options):
        if len(asked) == broken:
            raise KeyboardInterrupt
        asked.append(options)
        return real(judge, sampler, options)

    def of(judge, image, samples):
        # Which of random samplers is the best differs between CPUs: the one that is there already is made the worst.
        worse = 1000.0 if asked[-1].guidance == 3.0 else 0.0
        return {name: worse + value for name, value in distances(judge, image, samples).items()}

    monkeypatch.setattr(JointDistance, "samples", samples)
    monkeypatch.setattr(JointDistance, "of", of)
    monkeypatch.setattr(sys, "argv", ["a", "--folder", str(tmp_path / "work"), "--weights", str(weights)])
    before, broken = (folder / "config.json").read_text(), 2
    with pytest.raises(KeyboardInterrupt):
        stage.main()
    assert (folder / "config.json").read_text() == before, "nothing is chosen yet"
    broken = -1
    stage.main()
    assert len(asked) == len(set(asked)) == 4, "3, 1, 2, and the best of these with 5 revision passes; none again"
    measured = json.loads((tmp_path / "work" / "progressive-serving.json").read_text())["measured"]
    assert [row["options"]["guidance"] for row in measured[:3]] == [3.0, 1.0, 2.0]
    best = min(measured, key=lambda row: overall(row["distances"]))
    load = registry.sampler_family(folder).load_sampler
    chosen = load(str(folder)).sampling
    assert chosen == ProgressiveOptions(**best["options"]) != ProgressiveOptions(guidance=3.0)
    assert f"chosen: {stage.told(chosen)}" in capsys.readouterr().out

    # It is calibrated for what it then samples, and served with that.
    pico = load_pico(weights=weights, vlm=PROGRESSIVE)
    fitted = fit_sampler(pico.sampler, scene_features(recipe, pico.tokenizer), chosen.guidance)
    assert pico.decoder.card.calibration == fitted == Calibration.load(weights / "progressive-calibration.safetensors")
    assert (fitted.vlm, fitted.guidance) == ("pico progressive", chosen.guidance)
    assert load_pico(weights=weights, with_sampler=False).decoder.card.calibration != fitted, "Janus' stays"

    # The distance of one of them, made by hand: of the VQ decode's images, in the table's precision.
    judge, options = JointDistance(context, networks), ProgressiveOptions(**measured[1]["options"])
    sampler, vq = load(str(folder), dtype=torch.bfloat16), registry.sampler_family(folder).load_tokenizer(str(folder))
    with torch.no_grad():
        made = sampler.sample([one.caption() for one in judge.facts], seeds=range(3), options=options)
        expected = judge.of(lambda *_: vq.decode_tokens(made.tokens, made.grid), [made])
    assert measured[1]["distances"] == pytest.approx(expected, rel=1e-2), "of three images, and so hardly conditioned"

    # For another sampler everything is measured anew.
    other = fill(network, 5)
    save_sampler(folder, weights, other, codebook, name="pico progressive")
    stage.main()
    assert len(asked) == 8
