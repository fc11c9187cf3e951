"""The table of the README on a handful of scenes: every section runs, and the verdicts say what the numbers say."""

import json
import sys

import numpy as np
import pytest
import torch

from dcdd_pico import results_table as table
from dcdd_pico import sections as measures
from dcdd_pico.models import load_pico, load_reader
from dcdd_pico.reader import SceneReader, fact_labels
from dcdd_pico.results_table import MARKS, TABLE, markdown, put_between, verdicts
from dcdd_pico.scene_arrays import scene_images
from dcdd_pico.scenes import SHAPES, render_scene, scene_pixels
from dcdd_pico.sections import SERVED, TITLES, Bench, Tally, measure_reader
from tests.tiny import random_pico


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--bf16"]])
def test_the_whole_table_in_small(tmp_path, monkeypatch, capsys, options):
    weights = random_pico(tmp_path / "weights")
    monkeypatch.setattr(measures, "STEP_COUNTS", (1, 2))
    arguments = ["--out", str(tmp_path), "--weights", str(weights), "--scenes", "4", "--steps", "1", "--batch", "2"]
    arguments += ["--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["table", *arguments, *options])
    table.main()
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert (
        all(TITLES[section] in text for section in TABLE if section != "variants")
        and SERVED in text
        and "nan" not in text
    )
    assert "times the diffusion decoder's" in text and "frechet: " not in text
    for used in ("Tally", "describe_logits"):  # nothing may be measured a second time
        monkeypatch.setattr(measures, used, None)
    table.main()
    stored = json.loads((tmp_path / "reader.json").read_text())
    stored["key"] = "of other weights"
    (tmp_path / "reader.json").write_text(json.dumps(stored))
    with pytest.raises(TypeError):
        table.main()


@torch.no_grad()
def test_a_tally_is_the_numbers_of_its_pictures():
    reader = SceneReader().eval()
    pictures = scene_pixels(np.stack([render_scene("test", i).image for i in range(6)]))
    facts = [render_scene("test", i).facts for i in range(6)]
    whole, halves = Tally(), Tally()
    whole.add(reader, pictures, pictures * 0.9)
    for part in (slice(0, 3), slice(3, 6)):
        halves.add(reader, pictures[part], pictures[part] * 0.9)
    labels, real = fact_labels(facts), reader.frechet_features(pictures)
    assert whole.row(real, labels) == pytest.approx(halves.row(real, labels), rel=1e-4, abs=1e-6)
    assert abs(whole.row(real, labels)["frechet"]) < 1e-6 and whole.row(real, labels)["ssim"] < 1


@torch.no_grad()
def test_details_are_the_distances_of_the_pictures_with_that_fact():
    reader, tally = SceneReader().eval(), Tally()
    pictures = torch.rand(12, 3, 96, 96) * 2 - 1
    tally.add(reader, pictures.flip(-1) * 0.5, None)
    labels = fact_labels([render_scene("test", i).facts for i in range(12)]) | {"shape": torch.arange(12) % 2}
    real = reader.frechet_features(pictures)
    row, halves = tally.row(real, labels, by="shape"), Tally()
    halves.add(reader, pictures[1::2].flip(-1) * 0.5, None)
    some = {name: answers[1::2] for name, answers in labels.items()}
    assert row[f"frechet: {SHAPES[1]}"] == pytest.approx(halves.row(real[1::2], some)["frechet"], rel=1e-4)
    assert row["frechet"] == tally.row(real, labels)["frechet"]


@torch.no_grad()
def test_scenes_drawn_anew_show_the_same_facts_and_are_not_the_same(tmp_path):
    images = scene_images(tmp_path, "test", 24)
    bench = Bench(
        pico=load_pico(with_sampler=False), reader=load_reader(), images=images, batch=10, steps=1, guidance=1.0
    )
    rows = measure_reader(bench)
    real, anew = rows["real scenes"], rows["the same facts, drawn anew"]
    assert "frechet" not in real and anew["frechet"] > 0.1
    assert anew["F1 place"] == real["F1 place"] == 1 and anew["F1 colour"] > 0.9


def test_verdicts_follow_the_numbers():
    ours = {"frechet": 0.3, "ssim": 1.0, "perceptual": 0.95}
    results = {
        "reconstruction": {"VQ-VAE decode": {"frechet": 1.0, "ssim": 0.9, "perceptual": 1.0}, "DCDD (LCDM + LC)": ours},
        "calibration": {"Janus": {"entropy": 0.5}, "calibrated proxies": {"entropy": 0.53}},
    }
    lines = {line.split("|")[1].strip(): line for line in verdicts(results).splitlines() if line.startswith("| ")}
    assert "0.300 | met" in verdicts(results)
    assert "1.111 | met" in verdicts(results) and "0.950 | MISSED" in verdicts(results)
    assert "0.0300 | MISSED" in lines["calibrated proxies: mean entropy"]
    assert "not measured" in lines[f"text to image, {SERVED}: frechet"]


def test_markdown_holds_every_number():
    text = markdown({"reader": {"real scenes": {"F1 shape": 0.98765}}})
    assert text.splitlines()[2:] == ["|  | F1 shape ↑ |", "|---|---|", "| real scenes | 0.9877 |"]
    assert "| a |  | 1 |" in markdown({"reader": {"a": {"F1 shape": 1.0}, "b": {"frechet": 0.1, "F1 shape": 0.9}}})
    spread = {"frechet": 0.25, "frechet: lowest": 0.2, "frechet: highest": 0.3}
    assert "| lcdm | 0.25 (0.2 to 0.3) |" in markdown({"means": {"lcdm": spread}})
    ways = {"tokens": {"frechet": 0.2}, "anchored": {"frechet": 0.1}, SERVED: {"frechet": 0.1}}
    assert markdown({"text": ways}).splitlines()[-2:] == ["| tokens | 0.2 |", "| anchored (served) | 0.1 |"]


def test_a_text_gets_the_table_between_its_marks():
    text = "before\n<!-- table -->\nold\n<!-- end of the table -->\nafter\n"
    assert put_between(MARKS, "\nnew\n\n", text) == text.replace("old", "\nnew\n")
    for broken in ("before", "<!-- table -->\n", "<!-- end of the table -->\n<!-- table -->\n"):
        with pytest.raises(ValueError, match="add them"):
            put_between(MARKS, "new", broken)
