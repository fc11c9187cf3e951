"""The table of the README on a handful of scenes: every section runs, and the verdicts say what the numbers say."""

import json
import sys

import numpy as np
import pytest
import torch

from dcdd_core.evaluation import pico_table
from dcdd_core.evaluation.frechet import FrechetStatistics
from dcdd_core.evaluation.pico_table import SECTIONS, SERVED, TITLES, Tally, markdown, verdicts
from dcdd_core.pico.data import to_pixels
from dcdd_core.pico.reader import SceneReader, fact_labels
from dcdd_core.pico.scenes import render_scene
from tests.tiny import random_pico


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--bf16"]])
def test_the_whole_table_in_small(tmp_path, monkeypatch, capsys, options):
    weights = random_pico(tmp_path / "weights")
    monkeypatch.setattr(pico_table, "STEP_COUNTS", (1, 2))
    arguments = ["--out", str(tmp_path), "--weights", str(weights), "--scenes", "4", "--steps", "1", "--batch", "2"]
    monkeypatch.setattr(sys, "argv", ["table", *arguments, *options])
    pico_table.main()
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert all(title in text for title in TITLES.values()) and SERVED in text and "nan" not in text
    monkeypatch.setattr(pico_table, "SECTIONS", dict.fromkeys(SECTIONS))  # nothing may be measured a second time
    pico_table.main()
    stored = json.loads((tmp_path / "reader.json").read_text())
    stored["key"] = "of other weights"
    (tmp_path / "reader.json").write_text(json.dumps(stored))
    with pytest.raises(TypeError):
        pico_table.main()


@torch.no_grad()
def test_a_tally_is_the_numbers_of_its_pictures():
    reader = SceneReader().eval()
    pictures = to_pixels(np.stack([render_scene("test", i).image for i in range(6)]))
    facts = [render_scene("test", i).facts for i in range(6)]
    whole, halves = Tally(), Tally()
    whole.add(reader, pictures, pictures * 0.9)
    for part in (slice(0, 3), slice(3, 6)):
        halves.add(reader, pictures[part], pictures[part] * 0.9)
    labels, real = fact_labels(facts), FrechetStatistics.of([reader.frechet_features(pictures)])
    assert whole.row(real, labels) == pytest.approx(halves.row(real, labels), rel=1e-4, abs=1e-6)
    assert abs(whole.row(real, labels)["frechet"]) < 1e-6 and whole.row(real, labels)["ssim"] < 1


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
    assert "not measured" in lines[f"{SERVED}: frechet"]


def test_markdown_holds_every_number():
    text = markdown({"reader": {"real scenes": {"F1 shape": 0.98765}}})
    assert text.splitlines()[2:] == ["| | F1 shape |", "|---|---|", "| real scenes | 0.9877 |"]
