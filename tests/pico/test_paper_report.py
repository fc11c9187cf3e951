"""The report on a handful of scenes and made-up numbers: every table is there, and says what was measured."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dcdd_core.models.bundle import DecoderOptions, load_decoder, save_bundle
from dcdd_core.models.card import VARIANTS
from dcdd_core.types import DCDDWarning
from dcdd_pico import paper_report as pico_report
from dcdd_pico import sections as measures
from dcdd_pico.paper_report import CLAIMS, agreement, report
from dcdd_pico.sections import (
    ABLATION,
    SCORES,
    SECTIONS,
    Choice,
    parse,
    token_statistics,
    variant_files,
    variant_means,
)
from tests.tiny import random_pico


def seeds(**of):
    """Rows of two seeds: a variant's scores, and the same and a tenth more."""
    return {
        f"{name}, seed {seed}": {
            column: value * (1 + seed / 10) for column, value in zip(ABLATION, (*values, 1), strict=True)
        }
        for seed in range(2)
        for name, values in of.items()
    }


def test_means_and_spread_are_those_of_the_seeds():
    means = variant_means(seeds(**{"discrete": (2, 1, 4), "lcdm": (1, 1, 1), "lcdm+lc": (3, 1, 1)}))
    assert list(means) == list(VARIANTS)
    row = means["discrete"]
    assert (row["frechet"], row["frechet: lowest"], row["frechet: highest"]) == pytest.approx((2.1, 2, 2.2))
    assert means["lcdm+lc"]["frechet"] == pytest.approx(3.15)


def test_agreement_compares_directions():
    rows = {"DCDD (LCDM + LC)": dict.fromkeys(SCORES, 0.5), "VQ-VAE decode": dict.fromkeys(SCORES, 1.0)}
    lines = agreement({"reconstruction": rows}).splitlines()[2:]
    assert len(lines) == len(CLAIMS)
    assert lines[0].endswith("| 0.264 | 0.500 | as in the paper |")
    assert lines[1].endswith("| 1.030 | 0.500 | **the other way** |")
    assert lines[3].endswith("| 0.659 | not measured |  |")


def test_agreement_says_where_seeds_differ_more_than_variants():
    rows = {"discrete": (2, 1, 4), "lcdm": (1.9, 1.3, 1), "lcdm+lc": (1, 1.2, 1)}
    lines = agreement({"means": variant_means(seeds(**rows))}).splitlines()[7:]
    assert lines[0].endswith("| 0.950 | as in the paper, within the seeds' spread |")
    assert lines[1].endswith("| 1.300 | as in the paper |")
    assert lines[4].endswith("| 0.923 | **the other way**, within the seeds' spread |")


def test_variants_are_found_seed_by_seed(tmp_path):
    assert variant_files(tmp_path) == {}
    for seed in (1, 0):
        for name in VARIANTS:
            (tmp_path / f"{name}-{seed}.safetensors").touch()
    found = variant_files(tmp_path)
    assert list(found) == [f"{name}, seed {seed}" for seed in (0, 1) for name in VARIANTS]
    assert found["lcdm+lc, seed 1"] == tmp_path / "lcdm+lc-1.safetensors"
    (tmp_path / "lcdm-0.safetensors").unlink()
    with pytest.warns(DCDDWarning, match="not all variants have.*pico.variants"):
        assert list(variant_files(tmp_path)) == [f"{name}, seed 1" for name in VARIANTS]


def test_what_was_not_measured_has_no_table():
    text = report({}, choice=Choice(out=Path()), causes="Because.")
    assert (
        "Because." in text
        and text.count("not measured") == len(CLAIMS)
        and text.count("Not measured: `python -m dcdd_pico.") == 6
    )


def test_the_causes_that_are_written_down_are_a_section_of_the_report():
    causes = (Path(__file__).parents[2] / "docs" / "causes.md").read_text("utf-8")
    lines = report({}, choice=Choice(out=Path()), causes=causes).splitlines()
    heads = [line for line in lines if line.startswith("#")]
    assert heads[1] == "## Beside the paper" and heads[2] == causes.splitlines()[0]
    assert heads[3].startswith("## Table 1") and [head for head in heads if head.startswith("# ")] == heads[:1]


def test_a_section_is_measured_again_when_what_it_depends_on_changed(tmp_path, monkeypatch):
    for name in ("weights/a", "variant"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).with_suffix(".safetensors").write_text(name)
    plain = Choice(out=tmp_path, weights=tmp_path / "weights")
    more = replace(plain, variants={"one": tmp_path / "variant.safetensors"})
    changed = {section for section in SECTIONS if plain.fingerprint(section) != more.fingerprint(section)}
    assert changed == {"variants"}
    assert all(plain.fingerprint(name) != replace(plain, steps=11).fingerprint(name) for name in SECTIONS)
    before = {section: plain.fingerprint(section) for section in SECTIONS}
    (tmp_path / "weights" / "a.safetensors").write_text("others")
    assert all(plain.fingerprint(section) != before[section] for section in SECTIONS)
    before = {section: plain.fingerprint(section) for section in SECTIONS}
    monkeypatch.setitem(SECTIONS, "reader", measures.measure_text)  # as if it measured otherwise than before
    assert {section for section in SECTIONS if plain.fingerprint(section) != before[section]} == {"reader"}


def test_the_printed_command_measures_the_same(tmp_path, monkeypatch):
    choice = Choice(out=Path("out/table"), weights=Path("mine"), scenes=64, steps=3, bf16=True, compiled=True)
    monkeypatch.setattr(sys, "argv", [*choice.command("steps", "text").split()[2:], "--work", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # The device is named, whatever machine reads it.
    parser = argparse.ArgumentParser()
    parser.add_argument("--sections", nargs="+")
    chosen, found = parse(parser)
    assert chosen.sections == ["steps", "text"]
    assert found == choice


@pytest.mark.slow
def test_the_whole_report_in_small(tmp_path, monkeypatch):
    weights = random_pico(tmp_path / "weights")
    decoder = load_decoder(weights / "decoder.safetensors", options=DecoderOptions(dtype=torch.float32, fold=False))
    for name in VARIANTS:
        save_bundle(tmp_path / "variants" / f"{name}-0.safetensors", decoder, dtype=torch.float16)
    monkeypatch.setattr(measures, "STEP_COUNTS", (1, 10, 30))
    monkeypatch.setattr(pico_report, "STEP_COUNTS", (1, 10, 30))
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "causes.md").write_text("Random weights agree with nothing.")
    folders = ["--docs", docs, "--out", tmp_path / "out", "--weights", weights, "--work", tmp_path]
    arguments = [*map(str, folders), "--scenes", "5", "--steps", "1", "--batch", "3"]
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    pico_report.main()
    text = (docs / "report.md").read_text()
    assert all(f"## Table {k}" in text for k in range(1, 7)) and "Random weights agree" in text
    assert "not measured" not in text and "nan" not in text and text.count("drawn anew |") == 2
    pictures = {path.name for path in (docs / "report").iterdir()}
    assert all(f"report/{name}" in text for name in pictures) and len(pictures) == 7


def test_token_statistics_come_back_from_a_row():
    single = dict.fromkeys(("top_1", "top_2", "entropy", "tail_entropy", "otsu_threshold", "head_mass"), 0.25)
    found = token_statistics(single | {"rank": 2.0, "curve: 0": 0.25, "curve: 1": 0.125})
    assert (found.top_1, found.rank, found.curve) == (0.25, 2, (0.25, 0.125))
