"""The tables on a few scenes: every section runs, and the verdicts follow from the numbers."""

import json
import sys

import numpy as np
import pytest
import torch

from dcdd_pico import results_table
from dcdd_pico import sections as measured_sections
from dcdd_pico.models import load_pico, load_reader
from dcdd_pico.reader import SceneReader, fact_labels
from dcdd_pico.results_table import MARKS, TABLE, TARGETS, put_between, section_tables, verdicts
from dcdd_pico.scene_arrays import scene_images
from dcdd_pico.scenes import SHAPES, render_scene, scene_pixels
from dcdd_pico.section_keys import NO_KEY, Provenance
from dcdd_pico.sections import (
    DCDD,
    RERENDERED,
    SERVED,
    TITLES,
    VQ,
    EvalSetup,
    Measured,
    RowMetrics,
    TableOptions,
    measure_reader,
)
from tests.tiny import random_pico


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--bf16"]])
def test_the_whole_table_in_small(tmp_path, monkeypatch, capsys, options):
    weights = random_pico(tmp_path / "weights")
    monkeypatch.setattr(measured_sections, "STEP_COUNTS", (1, 2))
    arguments = ["--out", str(tmp_path), "--weights", str(weights), "--scenes", "4", "--steps", "1", "--batch", "2"]
    arguments += ["--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["results_table", *arguments, *options])
    results_table.main()
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert (
        all(TITLES[section] in text for section in TABLE if section != "ablation")
        and SERVED in text
        and "nan" not in text
    )
    assert "times the training FLOPs of the diffusion decoder" in text and "frechet: " not in text
    assert {found.section for found in Provenance.all_in(text)} == {*TABLE, "flops"} - {"ablation"}
    for used in ("RowMetrics", "describe_logits"):  # nothing may be measured a second time
        monkeypatch.setattr(measured_sections, used, None)
    results_table.main()
    stored = json.loads((tmp_path / "reader.json").read_text())
    stored["key"] = "of other weights"
    (tmp_path / "reader.json").write_text(json.dumps(stored))
    with pytest.raises(TypeError):
        results_table.main()


@torch.no_grad()
def test_a_tally_is_the_numbers_of_its_images():
    reader = SceneReader().eval()
    images = scene_pixels(np.stack([render_scene("test", i).image for i in range(6)]))
    facts = [render_scene("test", i).facts for i in range(6)]
    whole, halves = RowMetrics(), RowMetrics()
    whole.add(reader, images, images * 0.9)
    for part in (slice(0, 3), slice(3, 6)):
        halves.add(reader, images[part], images[part] * 0.9)
    labels, real = fact_labels(facts), reader.frechet_features(images)
    assert whole.row(real, labels) == pytest.approx(halves.row(real, labels), rel=1e-4, abs=1e-6)
    assert abs(whole.row(real, labels)["frechet"]) < 1e-6 and whole.row(real, labels)["ssim"] < 1


@torch.no_grad()
def test_details_are_the_distances_of_the_images_with_that_fact():
    reader, row_metrics = SceneReader().eval(), RowMetrics()
    images = torch.rand(12, 3, 96, 96) * 2 - 1
    row_metrics.add(reader, images.flip(-1) * 0.5, None)
    labels = fact_labels([render_scene("test", i).facts for i in range(12)]) | {"shape": torch.arange(12) % 2}
    real = reader.frechet_features(images)
    row, halves = row_metrics.row(real, labels, by="shape"), RowMetrics()
    halves.add(reader, images[1::2].flip(-1) * 0.5, None)
    some = {name: answers[1::2] for name, answers in labels.items()}
    assert row[f"frechet: {SHAPES[1]}"] == pytest.approx(halves.row(real[1::2], some)["frechet"], rel=1e-4)
    assert row["frechet"] == row_metrics.row(real, labels)["frechet"]


@torch.no_grad()
def test_scenes_rendered_again_show_the_same_facts_and_are_not_the_same(tmp_path):
    images = scene_images(tmp_path, "test", 24)
    setup = EvalSetup(
        pico=load_pico(with_sampler=False), reader=load_reader(), images=images, batch=10, steps=1, guidance=1.0
    )
    rows = measure_reader(setup)
    real, rerendered = rows["real scenes"], rows[RERENDERED]
    assert "frechet" not in real and rerendered["frechet"] > 0.1
    assert rerendered["F1 place"] == real["F1 place"] == 1 and rerendered["F1 colour"] > 0.9


def test_verdicts_follow_the_numbers():
    results = {
        "reconstruction": {
            VQ: {"frechet": 1.0, "ssim": 0.9, "perceptual": 1.0},
            DCDD: {"frechet": 0.3, "ssim": 1.0, "perceptual": 0.95},
        },
        "calibration": {"Janus": {"entropy": 0.5}, "calibrated proxies": {"entropy": 0.53}},
    }
    lines = {line.split("|")[1].strip(): line for line in verdicts(results).splitlines() if line.startswith("| ")}
    assert lines[f"reconstruction, {DCDD}: frechet"].endswith(f"| {VQ} | at most 0.4 | 0.300 | met |")
    assert lines[f"reconstruction, {DCDD}: ssim"].endswith("| at least 1.03 | 1.111 | met |")
    assert lines[f"reconstruction, {DCDD}: perceptual"].endswith("| at most 0.89 | 0.950 | MISSED |")
    assert lines["calibrated proxies: mean entropy"].endswith("| within 0.02 | 0.0300 | MISSED |")
    assert lines[f"text to image, {SERVED}: frechet"].endswith("|  | not measured |")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target[0]}-{target[2]}")
def test_each_target_is_met_at_its_bound_and_missed_beyond(target):
    section, row, column, baseline, relation, bound = target
    beyond = bound * (1.001 if relation == "at most" else 0.999)
    for value, verdict in ((bound, "met"), (beyond, "MISSED")):
        rows = {name: {c: 1.0 for _, _, c, _, _, _ in TARGETS} for _, name, _, _, _, _ in TARGETS}
        rows |= {name: {c: 2.0 for _, _, c, _, _, _ in TARGETS} for _, _, _, name, _, _ in TARGETS}
        rows[row][column] = 2.0 * value
        (line,) = [
            line for line in verdicts({section: rows}).splitlines() if f", {row}: {column} | {baseline} |" in line
        ]
        assert line.endswith(f"| {value:.3f} | {verdict} |")


def tables(**rows):
    return section_tables(Measured(rows, {name: Provenance(name, "abc1234", "k-w") for name in rows}))


def test_markdown_holds_every_number():
    text = tables(reader={"real scenes": {"F1 shape": 0.98765}})
    assert text.splitlines()[2:] == [
        "|  | F1 shape ↑ |",
        "|---|---|",
        "| real scenes | 0.9877 |",
        "",
        "Section `reader`, measured at commit `abc1234`, key `k-w`.",
    ]
    assert "| a |  | 1 |" in tables(reader={"a": {"F1 shape": 1.0}, "b": {"frechet": 0.1, "F1 shape": 0.9}})
    spread = {"frechet": 0.25, "frechet: lowest": 0.2, "frechet: highest": 0.3}
    assert "| lcdm | 0.25 (0.2 to 0.3) |" in tables(means={"lcdm": spread})
    ways = {"tokens": {"frechet": 0.2}, "anchored": {"frechet": 0.1}, SERVED: {"frechet": 0.1}}
    assert tables(text=ways).splitlines()[4:6] == ["| tokens | 0.2 |", "| anchored (served) | 0.1 |"]
    assert "seed 0" not in tables(ablation={"lcdm, seed 0": {"frechet": 1.0}})


def test_the_targets_are_those_of_the_paper_s_tables():
    served = [("text", SERVED, f"F1 {fact}", VQ, "at least", 1.0) for fact in ("shape", "colour", "texture", "place")]
    assert list(TARGETS) == [
        ("reconstruction", DCDD, "frechet", VQ, "at most", 0.4),
        ("reconstruction", DCDD, "ssim", VQ, "at least", 1.03),
        ("reconstruction", DCDD, "perceptual", VQ, "at most", 0.89),
        ("means", "lcdm+lc", "frechet", "discrete", "at most", 1),
        ("means", "lcdm+lc", "ssim", "discrete", "at least", 1),
        ("means", "lcdm+lc", "perceptual", "discrete", "at most", 1),
        ("steps", "DCDD, 10 steps", "frechet", VQ, "at most", 1),
        ("steps", "DCDD, 10 steps", "perceptual", VQ, "at most", 1),
        ("steps", "DCDD, 10 steps", "ssim", VQ, "at least", 1),
        ("text", SERVED, "frechet", VQ, "at most", 0.66),
        *served,
    ]


def test_the_calibrated_entropy_may_be_off_by_two_hundredths():
    for entropy, words in ((0.02, "0.0200 | met |"), (0.021, "0.0210 | MISSED |")):
        columns = {"Janus": {"entropy": 0.0}, "calibrated proxies": {"entropy": entropy}}
        assert verdicts({"calibration": columns}).rstrip().endswith(words)
    assert "entropy" not in verdicts({})


def test_a_baseline_of_nothing_has_no_ratio():
    rows = {VQ: {c: 0.0 for _, _, c, _, _, _ in TARGETS}, SERVED: {c: 0.12345 for _, _, c, _, _, _ in TARGETS}}
    lines = verdicts({"text": rows}).splitlines()
    assert f"| text to image, {SERVED}: frechet | {VQ} | at most 0.66 | 0.123 to 0 | MISSED |" in lines
    assert f"| text to image, {SERVED}: F1 shape | {VQ} | at least 1 | 0.123 to 0 | met |" in lines
    assert verdicts({"text": {SERVED: rows[SERVED]}}) == verdicts({"text": {VQ: rows[VQ]}}) == verdicts({})


def test_headings_say_which_way_is_better():
    row = {name: 1.0 for name in ("frechet", "ssim", "psnr", "perceptual", "text frechet", "F1 place", "other")}
    heads = "|  | frechet ↓ | ssim ↑ | psnr ↑ | perceptual ↓ | text frechet ↓ | F1 place ↑ | other |"
    assert tables(reconstruction={"a": row}).splitlines()[2] == heads


def test_tables_of_distributions_have_table_1_s_rows():
    row = {"top_1": 0.5, "top_2": 0.25, "entropy": 0.125, "tail_entropy": 0.0625, "otsu_threshold": 0.001}
    row |= {"rank": 7, "head_mass": 0.75, "curve": [0.5, 0.25], "tokens": 3}
    text = tables(calibration={"Janus": row})
    assert "|  | Janus |\n|---|---|\n| top-1 probability | 0.500000 |\n" in text
    assert f"### {TITLES['calibration']}\n\n|" in text


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """The command on given results; the sections that it asked for."""
    asked = []

    def measure(options, sections):
        asked.append(list(sections))
        rows = {"reader": {"real scenes": {"F1 shape": 0.5}}}
        return None, Measured(rows, {"reader": Provenance("reader", options.commit, "k-w")})

    monkeypatch.setattr(results_table, "measure", measure)
    monkeypatch.setattr(results_table, "flops_of", lambda weights: f"FLOPs of {weights}")
    monkeypatch.setattr(results_table, "flops_key", lambda weights: "f-w")
    return asked


def run_table(monkeypatch, folder, *words):
    arguments = ["--out", str(folder), "--work", str(folder / "work"), "--weights", "w", "--commit", "abc1234"]
    monkeypatch.setattr(sys, "argv", ["results_table", *arguments, *words])
    results_table.main()


def test_the_command_prints_the_tables_and_writes_them_into_files(tmp_path, monkeypatch, capsys, measured):
    page = tmp_path / "page.md"
    page.write_text("<!-- table -->\n<!-- end of the table -->\n")
    run_table(monkeypatch, tmp_path, "--into", str(page))
    rows = {"reader": {"real scenes": {"F1 shape": 0.5}}}
    expected = (
        f"### {TITLES['reader']}\n\n|  | F1 shape ↑ |\n|---|---|\n| real scenes | 0.5 |\n\n"
        f"Section `reader`, measured at commit `abc1234`, key `k-w`.\n\n{verdicts(rows)}\n"
        "### Training FLOPs\n\nFLOPs of w\nSection `flops`, measured at commit `abc1234`, key `f-w`.\n"
    )
    assert (tmp_path / "table.md").read_text("utf-8") == expected and capsys.readouterr().out == expected + "\n"
    assert page.read_text("utf-8") == f"<!-- table -->\n\n{expected.strip()}\n\n<!-- end of the table -->\n"
    assert measured == [[name for name in TABLE if name != "ablation"]]


def test_the_command_measures_the_ablation_if_its_decoders_are_there(tmp_path, monkeypatch, capsys, measured):
    run_table(monkeypatch, tmp_path, "--sections", "text", "reader")
    with pytest.raises(SystemExit):
        run_table(monkeypatch, tmp_path, "--sections", "ablation")
    assert "holds no decoders of the ablation" in capsys.readouterr().err
    monkeypatch.setattr(measured_sections, "ablation_files", lambda folder: {"lcdm": folder})
    run_table(monkeypatch, tmp_path, "--sections", "ablation")
    run_table(monkeypatch, tmp_path)
    assert measured == [["text", "reader"], ["ablation"], list(TABLE)]


def test_the_key_of_the_flops_follows_each_file_that_they_are_counted_from(tmp_path):
    names = ("janus/a", "vae/a", "decoder.safetensors", "recipe.json")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    keys = [results_table.flops_key(tmp_path)]
    for name in names:
        (tmp_path / name).write_text("2")
        keys.append(results_table.flops_key(tmp_path))
    assert len(set(keys)) == 5 and len({key.split("-")[0] for key in keys}) == 1 and keys[0].count("-") == 1


def test_the_key_of_the_flops_ignores_other_files(tmp_path):
    for name in ("janus", "vae", "decoder.safetensors", "recipe.json"):
        (tmp_path / name).write_text(name)
    before = results_table.flops_key(tmp_path)
    (tmp_path / "reader.safetensors").write_text("measures, and was not counted")
    assert results_table.flops_key(tmp_path) == before


def test_a_section_that_there_is_not_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["results_table", "--sections", "nothing"])
    with pytest.raises(SystemExit) as stopped:
        results_table.main()
    assert stopped.value.code == 2 and "invalid choice: 'nothing'" in capsys.readouterr().err


def test_stale_sections_are_listed_once_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(TableOptions, "key", lambda options, section: "c-w-d" if options.ablation else "c-w")
    monkeypatch.setattr(results_table, "flops_key", lambda weights: "f-w")
    found = [("reader", "c-w"), ("text", "old-w"), ("text", "old-w"), ("flops", "f-w"), ("flops", "f-x")]
    found += [("gone", "c-w"), ("steps", NO_KEY), ("ablation", "c-w-d"), ("ablation", "c-x-d")]
    text = "\n".join(f"{Provenance(name, 'abc', key)}\n" for name, key in found)
    assert results_table.stale(TableOptions(out=tmp_path), {"p": text}) == [
        "p: text: measured at abc with key old-w, today c-w",
        "p: flops: measured at abc with key f-x, today f-w",
        "p: gone: there is no such section any more",
        "p: steps: measured at abc before keys were recorded",
        "p: ablation: measured at abc with key c-x-d, today c-w",
    ]
    decoders = TableOptions(out=tmp_path, ablation={"lcdm": tmp_path})
    own = f"{Provenance('ablation', 'abc', 'c-w-d')}\n{Provenance('ablation', 'abc', 'c-w-e')}\n"
    assert results_table.stale(decoders, {"p": own}) == ["p: ablation: measured at abc with key c-w-e, today c-w-d"]


def test_make_stale_fails_while_a_published_section_is_stale(tmp_path, monkeypatch, capsys):
    page = tmp_path / "results.md"
    monkeypatch.setattr(results_table, "ROOT", tmp_path)
    monkeypatch.setattr(results_table, "PUBLISHED", (page,))
    monkeypatch.setattr(sys, "argv", ["results_table", "--stale", "--work", str(tmp_path)])
    for key, status, words in (
        (NO_KEY, 1, "results.md: reader: measured at abc1234 before keys were recorded"),
        (TableOptions(out=tmp_path).key("reader"), 0, "every published section"),
    ):
        page.write_text(f"{Provenance('reader', 'abc1234', key)}\n")
        with pytest.raises(SystemExit) as ended:
            results_table.main()
        assert ended.value.code == status and words in capsys.readouterr().out


def test_a_text_gets_the_table_between_its_marks():
    text = "before\n<!-- table -->\nold\n<!-- end of the table -->\nafter\n"
    assert put_between(MARKS, "\nnew\n\n", text) == text.replace("old", "\nnew\n")
    for broken in ("before", "<!-- table -->\n", "<!-- end of the table -->\n<!-- table -->\n"):
        with pytest.raises(ValueError, match="add them"):
            put_between(MARKS, "new", broken)
