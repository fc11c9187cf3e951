"""The report on a few scenes and made-up numbers: every table shows the rows of its own section."""

import argparse
import itertools
import re
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dcdd_core.evaluation.intervals import bootstrap
from dcdd_core.models.bundle import DecoderOptions, load_decoder, save_bundle
from dcdd_core.models.card import VARIANTS
from dcdd_core.types import DCDDWarning
from dcdd_pico import guided_sections, paper_report, paper_sections
from dcdd_pico import sections as measured_sections
from dcdd_pico.paper_report import CLAIMS, agreement, draw, report_markdown
from dcdd_pico.results_table import REPORT
from dcdd_pico.scenes import scene_facts, scene_pixels
from dcdd_pico.section_keys import Provenance
from dcdd_pico.sections import (
    ABLATION_SCORES,
    BY_LOGITS,
    DCDD,
    READ,
    RERENDERED,
    SECTIONS,
    SERVED,
    STEP_COUNTS,
    VQ,
    Measured,
    Section,
    TableOptions,
    ablation_files,
    ablation_means,
    measure,
    parse,
    ratio_name,
    steps_name,
    token_statistics,
)
from tests.stub_pico import OFFSETS, pixels, stub_setup
from tests.tiny import random_pico, tiny_card

SCORES = ("frechet", "frechet, text detector", "ssim", "perceptual", "perceptual, text detector")


def seeds(**of):
    """Rows of two seeds: a variant's scores, 1 where none is given, and 1.1 times these."""
    return {
        f"{name}, seed {seed}": {column: values.get(column, 1.0) * (1 + seed / 10) for column in ABLATION_SCORES}
        for seed in range(2)
        for name, values in of.items()
    }


def test_means_and_spread_are_those_of_the_seeds():
    rows = seeds(**{"discrete": {"frechet": 2}, "lcdm": {"frechet": 1}, "lcdm+lc": {"frechet": 3}})
    rows["lcdm, seed 1"]["frechet"] = 2.2
    means = ablation_means(rows)
    ratios = [ratio_name(*pair) for pair in (("lcdm", "discrete"), ("lcdm+lc", "lcdm"), ("lcdm+lc", "discrete"))]
    assert list(means) == [*VARIANTS, *ratios]

    def spread(name):
        row = means[name]
        return pytest.approx((row["frechet"], row["frechet: lowest"], row["frechet: highest"]))

    assert spread("discrete") == (2.1, 2, 2.2) and spread("lcdm+lc") == (3.15, 3, 3.3)
    assert spread(ratios[0]) == (1.6 / 2.1, 0.5, 1.0)
    assert spread(ratios[1]) == (3.15 / 1.6, 1.5, 3.0) and spread(ratios[2]) == (1.5, 1.5, 1.5)


def ratios(value, low, high, columns=SCORES):
    return {k: v for c in columns for k, v in ((c, value), (f"{c}: lowest", low), (f"{c}: highest", high))}


def test_agreement_compares_directions():
    lines = agreement({"reconstruction": {ratio_name(DCDD, VQ): ratios(0.5, 0.4, 0.6)}}).splitlines()
    assert lines[0] == "|  | paper | pico, scene reader | pico, text detector |  |"
    lines = lines[2:]
    assert len(lines) == len(CLAIMS)
    assert lines[0].endswith("| 0.264 | 0.5 (0.4 to 0.6) | 0.5 (0.4 to 0.6) | same direction |")
    assert lines[1].endswith("| 1.030 | 0.5 (0.4 to 0.6) |  | **opposite** direction |")
    assert lines[3].endswith("| 0.659 | not measured |  |  |")


@pytest.mark.parametrize(
    "value, low, high, verdict",
    [
        (0.9, 0.8, 0.99, "same direction"),
        (0.9, 0.8, 1.0, "same direction, may be chance"),
        (1.1, 0.9, 1.3, "**opposite** direction, may be chance"),
        (1.1, 1.01, 1.3, "**opposite** direction"),
        (1.0, 1.0, 1.0, "**opposite** direction, may be chance"),
    ],
)
def test_agreement_says_where_the_interval_includes_no_change(value, low, high, verdict):
    line = agreement({"means": {ratio_name("lcdm", "discrete"): ratios(value, low, high)}}).splitlines()[7]
    assert line.startswith("| rFID, LCDM to discrete | 0.931 |") and line.endswith(f"| {verdict} |")


def test_each_claim_compares_the_rows_and_the_column_that_it_names():
    rows = {
        ("DCDD", "rFID"): ("reconstruction", DCDD),
        ("VQ-VAE", "rFID"): ("reconstruction", VQ),
        ("DCDD", "gFID"): ("readings", BY_LOGITS),
        ("DCDD as served", "gFID"): ("text", SERVED),
        ("VQ-VAE", "gFID"): (None, VQ),  # in both sections
        **{(name, "rFID"): ("means", name.lower().replace(" + ", "+")) for name in ("LCDM", "LCDM + LC", "discrete")},
        **{(f"{count} steps", "rFID"): ("steps", steps_name(count)) for count in (10, 30)},
    }
    columns = {"rFID": "frechet", "gFID": "frechet", "SSIM": "ssim", "perceptual": "perceptual"}
    second = {"frechet": "frechet, text detector", "perceptual": "perceptual, text detector"}
    # arXiv 2603.13389: Tables 2, 3 (twice), 4 and 6
    paper = (0.264, 1.030, 0.892, 0.659, 0.659, 0.931, 1.007, 0.970, 0.980, 1.020, 0.967, 1.180, 1.007)
    for claim, ratio in zip(CLAIMS, paper, strict=True):
        metric, _, both = claim.words.partition(", ")
        names = both.replace("to 30", "to 30 steps").split(" to ")
        kind = "gFID" if metric == "gFID" else "rFID"
        (section, row), (other, baseline) = (rows[name, kind] for name in names)
        column = columns[metric]
        assert (claim.section, claim.row, claim.baseline, claim.column) == (section, row, baseline, column)
        assert other in (section, None)
        held = ratios(9, 8, 10) | ratios(1.5, 1.4, 1.6, [column])
        if column in second:
            held |= ratios(1.7, 1.6, 1.8, [second[column]])
        table = agreement({section: {ratio_name(row, baseline): held}}).splitlines()
        line = next(line for line in table if line.startswith(f"| {claim.words} |"))
        shown = "1.7 (1.6 to 1.8)" if column in second else ""
        assert line.startswith(f"| {claim.words} | {ratio:.3f} | 1.5 (1.4 to 1.6) | {shown} | ")
        assert line.endswith("| same direction |") == (ratio > 1)


TEXT = ("frechet", "frechet, text detector", *(f"F1 {fact}" for fact in READ))


def everything():
    """Results of all sections, no two numbers the same."""
    numbers = itertools.count(1)

    def row(*columns):
        """With an interval, except for details."""
        found = {column: next(numbers) + 0.5 for column in columns}
        plain = {column: value for column, value in found.items() if ":" not in column}
        ends = (("lowest", -0.1), ("highest", 0.1))
        return found | {f"{column}: {end}": value + by for column, value in plain.items() for end, by in ends}

    facts = [f"F1 {fact}" for fact in READ]
    rows = {
        "reconstruction": {name: row(*SCORES) for name in (VQ, DCDD)},
        "text": {name: row(*TEXT, "frechet: heart") for name in (VQ, SERVED)},
        "readings": {name: row(*TEXT) for name in (VQ, BY_LOGITS)},
        "reader": {"real scenes": row(*facts), RERENDERED: row(*TEXT, "frechet: heart")},
        "steps": {name: row(*SCORES) for name in (VQ, *(f"DCDD, {count} steps" for count in STEP_COUNTS))},
        "ablation": {f"{name}, seed 0": row(*ABLATION_SCORES) for name in VARIANTS},
        "latency": {name: row("seconds") for name in ("Janus", VQ, "LCDM", "DCDD, 10 steps")},
    }
    rows["means"] = ablation_means(rows["ablation"])
    rows["text"][ratio_name(SERVED, VQ)] = ratios(0.75, 0.7, 0.8, TEXT)
    return Measured(rows, {name: Provenance(name, "abc1234", f"key-{name}") for name in rows})


def test_each_table_shows_its_own_section():
    results = everything()
    text = report_markdown(results, options=TableOptions(out=Path()), causes="")
    parts = {part[:7]: part for part in text.split("\n## ")}

    def lines(rows, columns):
        shown = [(name, row) for name, row in rows if "ratio of" not in name]
        return [" | ".join([f"| {name}", *(told(row, column) for column in columns)]) + " |" for name, row in shown]

    def told(row, column):
        value, low, high = (row.get(name) for name in (column, f"{column}: lowest", f"{column}: highest"))
        return f"{value:.4g}" + ("" if low is None else f" ({low:.4g} to {high:.4g})")

    rows = results.rows
    chance = (RERENDERED, rows["reader"][RERENDERED])
    expected = {
        "Table 2": lines(rows["reconstruction"].items(), SCORES),
        "Table 3": lines([*rows["text"].items(), chance], TEXT)
        + lines(rows["readings"].items(), TEXT)
        + lines([*rows["text"].items(), chance], ["frechet: heart"]),
        "Table 5": lines(rows["latency"].items(), ["seconds"]),
        "Table 6": lines(rows["steps"].items(), SCORES),
    }
    for table, shown in expected.items():
        assert all(line in parts[table].splitlines() for line in shown), table
    assert all(line in parts["Table 4"].splitlines() for line in lines(rows["means"].items(), ABLATION_SCORES))
    assert "| ratio of" not in text and "| heart |" in text and "lowest |" not in text
    sources = {"Table 2": "reconstruction", "Table 3": "text", "Table 4": "ablation", "Table 6": "steps"}
    assert all(str(results.provenance[section]) in parts[table] for table, section in sources.items())
    assert str(results.provenance["readings"]) in parts["Table 3"]
    assert "real scenes" not in text


def test_table_5_sums_the_stages_of_each_path():
    results = everything()
    seconds = {"Janus": 0.5, VQ: 0.1, "LCDM": 0.05, "DCDD, 10 steps": 0.25}
    results.rows["latency"] = {name: {"seconds": value} for name, value in seconds.items()}
    results.rows["text"][VQ]["frechet"], results.rows["text"][SERVED]["frechet"] = 0.2, 0.15
    results.rows["latency"] = {name: {"seconds": value} for name, value in seconds.items()}
    text = report_markdown(results, options=TableOptions(out=Path()), causes="")
    for line in ("| Janus + VQ-VAE | 0.2 | 0.6 |", "| Janus + DCDD | 0.15 | 0.8 |", "| change | -25.0% | +33.3% |"):
        assert line in text.splitlines()


def test_variants_are_found_seed_by_seed(tmp_path):
    assert ablation_files(tmp_path) == {}
    for seed in (1, 0):
        for name in VARIANTS:
            (tmp_path / f"{name}-{seed}.safetensors").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ablation_files(tmp_path)
    assert list(found) == [f"{name}, seed {seed}" for seed in (0, 1) for name in VARIANTS]
    assert found["lcdm+lc, seed 1"] == tmp_path / "lcdm+lc-1.safetensors"
    (tmp_path / "lcdm-0.safetensors").unlink()
    with pytest.warns(DCDDWarning, match="some variant lacks.*pico.ablation"):
        assert list(ablation_files(tmp_path)) == [f"{name}, seed 1" for name in VARIANTS]


def test_what_was_not_measured_has_no_table():
    text = report_markdown(Measured(), options=TableOptions(out=Path()), causes="Because.")
    assert (
        "Because." in text
        and text.count("not measured") == len(CLAIMS)
        and text.count("Not measured: `python -m dcdd_pico.") == 6
    )


def test_the_causes_that_are_written_down_are_a_section_of_the_report():
    causes = (Path(__file__).parents[2] / "docs" / "causes.md").read_text("utf-8")
    lines = report_markdown(Measured(), options=TableOptions(out=Path()), causes=causes).splitlines()
    heads = [line for line in lines if line.startswith("#")]
    assert heads[1] == "## Comparison with the paper" and heads[2] == causes.splitlines()[0]
    assert heads[3].startswith("## Table 1") and [head for head in heads if head.startswith("# ")] == heads[:1]


def test_a_section_is_measured_again_when_what_it_depends_on_changed(tmp_path, monkeypatch):
    measured = []
    section = "calibration"
    monkeypatch.setattr(TableOptions, "setup", lambda self: self)
    monkeypatch.setattr(TableOptions, "key", lambda self, name: f"key of {name}")
    own = Section(lambda setup: measured.append(setup.steps) or {"row": {"top_1": 0.5}}, ())
    monkeypatch.setitem(SECTIONS, section, own)
    plain = TableOptions(out=tmp_path, commit="abc1234")
    _, first = measure(plain, [section])
    _, again = measure(replace(plain, commit="later"), [section])
    assert measured == [10] and first == again and first.rows == {section: {"row": {"top_1": 0.5}}}
    assert first.provenance[section] == Provenance(section, "abc1234", "key of calibration")
    measure(replace(plain, steps=11), [section])
    monkeypatch.setattr(TableOptions, "key", lambda self, name: "another key")
    _, other = measure(replace(plain, steps=11), [section])
    assert measured == [10, 11, 11] and other.provenance[section].key == "another key"


def test_times_belong_to_a_machine(monkeypatch):
    options = TableOptions(out=Path())
    before = {name: options.settings(name) for name in REPORT}
    monkeypatch.setattr(measured_sections.platform, "node", lambda: "another machine")
    assert {name for name in REPORT if options.settings(name) != before[name]} == {"latency"}
    changes = ({"scenes": 1}, {"steps": 1}, {"bf16": True}, {"compiled": True}, {"device": "cuda"})
    assert all(replace(options, **change).settings("text") != before["text"] for change in changes)


def test_the_printed_command_measures_the_same(tmp_path, monkeypatch):
    options = TableOptions(
        out=Path("out/table"), weights=Path("mine"), work=tmp_path, scenes=64, steps=3, bf16=True, compiled=True
    )
    monkeypatch.setattr(sys, "argv", [*options.command("steps", "text").split()[2:], "--work", str(tmp_path)])
    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: True
    )  # the command names the device, so it does not depend on the machine
    parser = argparse.ArgumentParser()
    parser.add_argument("--sections", nargs="+")
    chosen, found = parse(parser)
    assert chosen.sections == ["steps", "text"]
    assert found == options


@pytest.mark.slow
def test_the_whole_report_in_small(tmp_path, monkeypatch):
    weights = random_pico(tmp_path / "weights")
    decoder = load_decoder(weights / "decoder.safetensors", options=DecoderOptions(dtype=torch.float32, fold=False))
    for name in VARIANTS:
        save_bundle(tmp_path / "variants" / f"{name}-0.safetensors", decoder, dtype=torch.float16)
    monkeypatch.setattr(paper_sections, "STEP_COUNTS", (1, 10, 30))
    monkeypatch.setattr(guided_sections, "bootstrap", partial(bootstrap, resamples=10))
    pytest.importorskip("onnxruntime", reason="the second metric network is the optional `ruler`")
    monkeypatch.setattr(paper_report, "STEP_COUNTS", (1, 10, 30))
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "causes.md").write_text("Random weights agree with nothing.")
    folders = ["--docs", docs, "--out", tmp_path / "out", "--weights", weights, "--work", tmp_path]
    arguments = [*map(str, folders), "--scenes", "5", "--steps", "1", "--batch", "3"]
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    paper_report.main()
    text = (docs / "report.md").read_text()
    assert all(f"## Table {k}" in text for k in range(1, 7)) and "Random weights agree" in text
    assert "not measured" not in text and "nan" not in text and text.count("rendered again |") == 2
    images = {path.name for path in (docs / "report").iterdir()}
    assert all(f"report/{name}" in text for name in images) and len(images) == 7


def test_token_statistics_come_back_from_a_row():
    single = dict.fromkeys(("top_1", "top_2", "entropy", "tail_entropy", "otsu_threshold", "head_mass"), 0.25)
    found = token_statistics(single | {"rank": 2.0, "curve: 0": 0.25, "curve: 1": 0.125})
    assert (found.top_1, found.rank, found.curve, found.tokens) == (0.25, 2, (0.25, 0.125), 0)


@pytest.fixture
def drawn(monkeypatch):
    """Images by file name; each is a list of what it was made from."""
    saved = {}
    monkeypatch.setattr(paper_report, "save_image", lambda image, path: saved.update({path: image}))
    monkeypatch.setattr(paper_report, "statistics_sheet", lambda columns: ["sheet", columns])
    monkeypatch.setattr(paper_report, "score_lines", lambda panels, **options: ["lines", panels, options])
    monkeypatch.setattr(
        paper_report, "labelled_grid", lambda rows, *, columns, captions: ["grid", rows, columns, captions]
    )
    return saved


def test_nothing_is_drawn_of_sections_that_were_not_measured(drawn, monkeypatch):
    draw(stub_setup(monkeypatch, paper_report), {"reader": {}, "latency": {}}, Path("f"))
    assert drawn == {}


def test_plots_show_their_own_section(drawn, monkeypatch):
    single = dict.fromkeys(("top_1", "top_2", "entropy", "tail_entropy", "otsu_threshold", "head_mass"), 0.25)
    calibration = {"Janus": single | {"rank": 2.0, "curve: 0": 0.25}, "raw proxies": single | {"rank": 3.0}}
    results = everything().rows | {"calibration": calibration}
    results["ablation"] |= {
        f"{name}, seed 1": {column: value + 100 for column, value in results["ablation"][f"{name}, seed 0"].items()}
        for name in VARIANTS
    }
    setup = stub_setup(monkeypatch, paper_report)
    monkeypatch.setattr(paper_report, "_ablation_grids", lambda *given: (["scenes", *given], ["captions", *given]))
    draw(setup, results, Path("f"))
    assert [path.parent for path in drawn] == [Path("f")] * 7
    sources = {name: Provenance(name, "abc1234", "a key") for name in results}
    text = report_markdown(Measured(results, sources), options=TableOptions(out=Path()), causes="")
    assert sorted(re.findall(r"!\[.+\]\(report/(.+)\)", text)) == sorted(path.name for path in drawn)
    found = {path.name: image for path, image in drawn.items()}
    assert found["table-1.png"] == ["sheet", {name: token_statistics(row) for name, row in calibration.items()}]
    heads = ("rFID ↓", "SSIM ↑", "perceptual distance ↓", "gFID ↓")
    ablation = {
        head: {
            f"seed {seed}": [results["ablation"][f"{name}, seed {seed}"][column] for name in VARIANTS]
            for seed in (0, 1)
        }
        for head, column in zip(heads, ("frechet", "ssim", "perceptual", "text frechet"), strict=True)
    }
    assert found["table-4.png"] == ["lines", ablation, {"along": VARIANTS}]
    steps = {
        head: {
            "DCDD": [results["steps"][f"DCDD, {count} steps"][column] for count in STEP_COUNTS],
            VQ: [results["steps"][VQ][column]] * 7,
        }
        for head, column in zip(heads, ("frechet", "ssim", "perceptual"))
    }
    assert found["table-6.png"] == ["lines", steps, {"along": STEP_COUNTS, "label": "steps"}]
    for name, kind in (("table-4-pictures.png", "scenes"), ("table-4-captions.png", "captions")):
        assert found[name][:2] == [kind, setup] and found[name][3] == 5
        assert torch.equal(found[name][2].tokens, pixels(range(5)))


def assert_grid(image, columns):
    """Five rows of images: the scenes' greys and the offset of each column."""
    kind, rows, names, captions = image
    assert kind == "grid" and names == list(columns) and len(rows) == 5
    assert captions == [facts.caption() for facts in scene_facts("test", 5)]
    for k, row in enumerate(rows):
        for cell, offset in zip(row, columns.values(), strict=True):
            torch.testing.assert_close(cell, pixels([k])[0] + offset)


def test_image_grids_show_what_their_columns_say(drawn, monkeypatch):
    asked = []

    def load(path, *, options):
        asked.append(options)
        return SimpleNamespace(card=tiny_card(base="of the ablation", variant=path, reads="logits", calibration=None))

    monkeypatch.setattr(paper_report, "load_decoder", load)
    monkeypatch.setattr(paper_report, "DecoderOptions", lambda **options: options)
    monkeypatch.setattr(paper_report, "scene_pixels", lambda images, device: scene_pixels(images, device))
    setup = stub_setup(monkeypatch, paper_report)
    ablation = {f"{variant}, seed {seed}": f"{variant}{'!' * seed}" for seed in (0, 1) for variant in VARIANTS}
    object.__setattr__(setup, "ablation", ablation)
    results = everything().rows
    draw(setup, results, Path("f"))
    found = {path.name: image for path, image in drawn.items()}
    assert_grid(found["table-2.png"], {"scene": 0, VQ: OFFSETS["vq"], "DCDD": OFFSETS["proxy"]})
    assert_grid(found["table-3.png"], {VQ: OFFSETS["vq"], "DCDD": OFFSETS["anchored"]})
    variants = {name: OFFSETS[name] for name in VARIANTS}
    assert_grid(found["table-4-pictures.png"], {"scene": 0} | variants)
    assert_grid(found["table-4-captions.png"], {VQ: OFFSETS["vq"]} | variants)
    assert asked == [{"device": "cpu", "dtype": torch.float32}] * 3


def test_the_command_describes_itself_and_writes_into_docs(monkeypatch):
    class Parsed(Exception):
        pass

    def parse(parser):
        assert parser.description == paper_report.__doc__ and parser.get_default("docs") == Path("docs")
        assert all(action.help for action in parser._actions)
        raise Parsed

    monkeypatch.setattr(paper_report, "parse", parse)
    with pytest.raises(Parsed):
        paper_report.main()


@pytest.mark.parametrize("ablation, sections", [({}, 7), ({"lcdm, seed 0": Path("b")}, 8)])
def test_the_command_writes_the_report_and_its_images(tmp_path, monkeypatch, capsys, ablation, sections):
    called = {}
    results = everything()

    def parse(parser):
        chosen = parser.parse_args(["--docs", str(tmp_path)] if called.setdefault("given", True) else [])
        return chosen, TableOptions(out=tmp_path, ablation=ablation)

    def draw(*given):
        called["draw"] = given
        assert not torch.is_grad_enabled()

    monkeypatch.setattr(paper_report, "parse", parse)
    monkeypatch.setattr(
        paper_report, "measure", lambda options, names: (called.update(names=names) or "setup", results)
    )
    monkeypatch.setattr(paper_report, "draw", draw)
    options = TableOptions(out=tmp_path, ablation=ablation)
    paper_report.main()
    without = report_markdown(results, options=options, causes="")
    assert (tmp_path / "report.md").read_text("utf-8") == without == capsys.readouterr().out[:-1]
    (tmp_path / "causes.md").write_text("Wegen Käse.", "utf-8")
    paper_report.main()
    assert "Wegen Käse." in (tmp_path / "report.md").read_text("utf-8")
    assert called["draw"] == ("setup", results.rows, tmp_path / "report")
    assert len(called["names"]) == sections and ("ablation" in called["names"]) == bool(ablation)


def test_the_chance_level_and_the_seeds_are_said_if_they_were_measured():
    results = everything()
    first = dict(results.rows["ablation"])
    results.rows["ablation"] |= {name.replace("seed 0", "seed 1"): row for name, row in first.items()}
    options = TableOptions(out=Path())
    with_chance = report_markdown(results, options=options, causes="")
    assert "The last row is the chance level" in with_chance and "with 2 seeds per variant" in with_chance
    sources = with_chance.split("\n## Table 3")[1].split("\n## Table 4")[0]
    assert str(results.provenance["reader"]) in sources and options.command("text", "readings", "reader") in sources
    latency = with_chance.split("\n## Table 5")[1].split("\n## Table 6")[0]
    assert str(results.provenance["text"]) in latency and options.command("latency", "text") in latency
    del results.rows["reader"]
    without = report_markdown(results, options=options, causes="")
    assert "chance level" not in without
    sources = without.split("\n## Table 3")[1].split("\n## Table 4")[0]
    assert str(results.provenance["reader"]) not in sources and f"`{options.command('text', 'readings')}`" in sources
    results.rows.pop("text")
    latency = report_markdown(results, options=options, causes="").split("\n## Table 5")[1].split("\n## Table 6")[0]
    assert f"`{options.command('latency')}`" in latency and "| change |" not in latency


def test_latency_and_text_alone_make_table_5():
    whole = everything()
    results = Measured({name: whole.rows[name] for name in ("latency", "text")}, whole.provenance)
    text = report_markdown(results, options=TableOptions(out=Path()), causes="")
    assert "| change |" in text
