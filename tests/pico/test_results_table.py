"""The tables on a few scenes: every section runs, and the verdicts follow from the numbers."""

import json
import sys
from functools import partial

import pytest

from dcdd_core.evaluation.intervals import bootstrap
from dcdd_pico import guided_sections, paper_sections, results_table
from dcdd_pico import sections as measured_sections
from dcdd_pico.interval_tables import TARGET_HEADS, put_among, put_between, section_texts
from dcdd_pico.results_table import FLOPS, MARKS, POINT, TABLE, TARGETED, TARGETS, verdicts
from dcdd_pico.section_keys import NO_KEY, Provenance
from dcdd_pico.sections import DCDD, SERVED, TITLES, VQ, Measured, TableOptions, ratio_name, steps_name
from tests.tiny import random_pico


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--bf16"]])
def test_the_whole_table_in_small(tmp_path, monkeypatch, capsys, options):
    weights = random_pico(tmp_path / "weights")
    pytest.importorskip("onnxruntime", reason="the second metric network is the optional `ruler`")
    monkeypatch.setattr(paper_sections, "STEP_COUNTS", (10, 30))
    monkeypatch.setattr(guided_sections, "bootstrap", partial(bootstrap, resamples=10))
    arguments = ["--out", str(tmp_path), "--weights", str(weights), "--scenes", "4", "--steps", "1", "--batch", "2"]
    arguments += ["--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["results_table", *arguments, *options])
    results_table.main()
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert all(TITLES[section] in text for section in TABLE if section != "ablation") and "(served)" in text
    # Of random images the reader may read nothing right, and a ratio to nothing is none.
    assert "nan" not in "".join(line for line in text.splitlines() if "ratio of" not in line)
    assert "times the training FLOPs of the diffusion decoder" in text and "frechet: " not in text
    assert {found.section for found in Provenance.all_in(text)} == {*TABLE, "flops"} - {"ablation"}
    monkeypatch.setattr(paper_sections, "row_of", None)  # nothing may be measured a second time
    monkeypatch.setattr(measured_sections, "describe_logits", None)
    results_table.main()
    stored = json.loads((tmp_path / "reader.json").read_text())
    stored["key"] = "of other weights"
    (tmp_path / "reader.json").write_text(json.dumps(stored))
    with pytest.raises(TypeError):
        results_table.main()


def held(value, low, high, column="frechet"):
    return {column: value, f"{column}: lowest": low, f"{column}: highest": high}


def test_verdicts_follow_the_intervals():
    ours = ratio_name(DCDD, VQ)
    results = {
        "reconstruction": {
            ours: held(0.3, 0.25, 0.39)
            | held(1.05, 1.03, 1.07, "ssim")
            | held(0.9, 0.85, 0.95, "perceptual, text detector")
        },
        "calibration": {"Janus": {"entropy": 0.5}, "calibrated proxies": {"entropy": 0.53}},
    }
    lines = verdicts(results).splitlines()
    assert f"| reconstruction, {ours}: frechet | at most 0.4 | 0.3 (0.25 to 0.39) | met |" in lines
    assert f"| reconstruction, {ours}: ssim | at least 1.035 | 1.05 (1.03 to 1.07) | open |" in lines
    name = f"reconstruction, {ours}: perceptual, text detector"
    assert f"| {name} | at most 0.8 | 0.9 (0.85 to 0.95) | MISSED |" in lines
    assert "| mean entropy of calibrated proxies, minus Janus' | within 0.02 | 0.0300 | MISSED |" in lines
    assert f"| text to image, {ratio_name(SERVED, VQ)}: frechet | at most 0.75 |  | not measured |" in lines
    assert lines[2].count("|") == len(TARGET_HEADS) + 1 and len(lines) == 4 + len(TARGETS) + 2


@pytest.mark.parametrize("aim", TARGETS, ids=lambda aim: f"{aim[0]}-{aim[1]}-{aim[2]}-{aim[3]}")
def test_each_target_is_met_up_to_its_bound_and_missed_beyond(aim):
    section, row, baseline, column, relation, bound = aim
    side = 1 if relation == "at most" else -1
    for worst, best, verdict in ((0, -0.1, "met"), (0.2, 0.1, "MISSED"), (0.1, -0.1, "open")):
        low, high = sorted((bound + side * worst, bound + side * best))
        rows = {ratio_name(row, baseline): held((low + high) / 2, low, high, column)}
        (line,) = [
            line
            for line in verdicts({section: rows}).splitlines()
            if line.startswith(f"| {TARGETED[section]}, {ratio_name(row, baseline)}: {column} |")
        ]
        assert line.endswith(f"| {verdict} |")


def test_the_paper_s_own_ratio_is_to_be_reached_by_one_network():
    section, row, baseline, bound = POINT
    for second, words in ((bound, f"{bound:g} | met |"), (0.7, "0.7 | MISSED |")):
        rows = {ratio_name(row, baseline): held(0.8, 0.7, 0.9) | held(second, 0.5, 0.9, "frechet, text detector")}
        (line,) = [line for line in verdicts({section: rows}).splitlines() if "by one of the networks" in line]
        assert line.endswith(f"| at most {bound:g}, point estimate | {words}")
    assert verdicts({}).count("not measured") == len(TARGETS) + 2


def tables(**rows):
    return "\n".join(section_texts(Measured(rows, {name: Provenance(name, "abc1234", "k-w") for name in rows}), TITLES))


def test_tables_are_in_the_order_of_the_page_however_they_were_measured():
    rows = {name: {"a": {"frechet": 1.0}} for name in ("reader", "text", "means", "reconstruction")}
    told = [line.removeprefix("### ") for line in tables(**rows).splitlines() if line.startswith("### ")]
    assert told == [TITLES[name] for name in ("reconstruction", "text", "reader", "means")]


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
    ways = {SERVED: {"frechet": 0.1}, ratio_name(SERVED, VQ): {"frechet": 0.5}}
    assert [line for line in tables(text=ways).splitlines() if line.startswith("| ")][1:] == [
        "| DCDD as served | 0.1 |",
        "|  | frechet ↓ |",
        "| ratio of DCDD as served to VQ-VAE decode | 0.5 |",
    ]
    assert "seed 0" not in tables(ablation={"lcdm, seed 0": {"frechet": 1.0}})


def test_the_targets_are_those_that_were_set():
    facts = [("text", SERVED, VQ, f"F1 {fact}", "at least", 0.99) for fact in ("shape", "colour", "texture", "place")]
    two = ("DCDD, 2 steps at shift 0.5", "DCDD, 10 steps")
    assert list(TARGETS) == [
        ("reconstruction", DCDD, VQ, "frechet", "at most", 0.4),
        ("reconstruction", DCDD, VQ, "frechet, text detector", "at most", 0.75),
        ("reconstruction", DCDD, VQ, "ssim", "at least", 1.035),
        ("reconstruction", DCDD, VQ, "perceptual, text detector", "at most", 0.8),
        ("text", SERVED, VQ, "frechet", "at most", 0.75),
        ("text", SERVED, VQ, "frechet, text detector", "at most", 0.75),
        *facts,
        ("text", SERVED, VQ, "F1", "at least", 1.02),
        ("steps", steps_name(10), VQ, "frechet", "at most", 1),
        ("steps", steps_name(10), VQ, "perceptual", "at most", 1),
        ("steps", steps_name(10), VQ, "ssim", "at least", 1),
        ("means", "lcdm+lc", "discrete", "frechet", "at most", 1),
        ("means", "lcdm+lc", "discrete", "ssim", "at least", 1),
        ("means", "lcdm+lc", "discrete", "perceptual", "at most", 1),
        ("means", "lcdm", "discrete", "text frechet", "at most", 1),
        ("means", "lcdm+lc", "lcdm", "text frechet", "at most", 1),
        ("few", *two, "frechet", "at most", 1.02),
        ("few", *two, "frechet, text detector", "at most", 1.02),
        ("few", *two, "ssim", "at least", 0.98),
        ("few", *two, "psnr", "at least", 0.98),
        ("few", *two, "perceptual", "at most", 1.02),
        ("few", *two, "perceptual, text detector", "at most", 1.02),
        ("few", *two, "F1", "at least", 0.98),
        ("few-text", *two, "frechet", "at most", 1.02),
        ("few-text", *two, "frechet, text detector", "at most", 1.02),
        ("few-text", *two, "F1", "at least", 0.98),
        *(("few-text", *two, column, "at least", 0.98) for *_, column, _, _ in facts),
    ]
    assert POINT == ("text", SERVED, VQ, 0.66)


def test_the_calibrated_entropy_may_be_off_by_two_hundredths():
    for entropy, words in ((0.02, "0.0200 | met |"), (0.021, "0.0210 | MISSED |")):
        columns = {"Janus": {"entropy": 0.0}, "calibrated proxies": {"entropy": entropy}}
        assert verdicts({"calibration": columns}).rstrip().endswith(words)


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
        f"Section `reader`, measured at commit `abc1234`, key `k-w`.\n\n"
        "### Training FLOPs\n\nFLOPs of w\nSection `flops`, measured at commit `abc1234`, key `f-w`.\n\n"
        f"{verdicts(rows)}"
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


def test_some_tables_leave_the_others_as_they_are_published():
    def targets(*lines):
        return "\n".join(["### Targets of it\n", "|  | target | measured | |", "|---|---|---|---|", *lines])

    old_target, kept_target = "| a | 1 | 5 | met |", "| b | 1 | 6 | met |"
    old = "\n\n".join(["### A\n\nold a", "### B\n\nold b", "### Gone\n\nx", targets(old_target, kept_target)])
    measured = "| a | 1 | 7 | MISSED |"
    new = "\n\n".join(["### B\n\nnew b", "### C\n\nnew c", targets(measured, "| b | 1 |  | not measured |")])
    page = f"before\n{MARKS[0]}\n\n{old}\n{MARKS[1]}\nafter\n"
    expected = "\n\n".join(["### A\n\nold a", "### B\n\nnew b", "### C\n\nnew c", targets(measured, kept_target)])
    assert put_among(MARKS, new, page, ["A", "B", "C"]) == put_between(MARKS, expected, page)
    stricter = new.replace("| b | 1 |  | not measured |", "| b | 2 |  | not measured |")
    assert "| b | 2 |  | not measured |" in put_among(MARKS, stricter, page, ["A", "B", "C"]), "not the old verdict"
    empty = f"{MARKS[0]}\n{MARKS[1]}\n"
    assert put_among(MARKS, new, empty, ["A", "B", "C"]) == put_between(MARKS, new, empty)
    swapped = put_among(MARKS, new, page, ["C", "B", "A"])
    assert swapped.index("new c") < swapped.index("new b") < swapped.index("old a"), "the order is the titles'"


def test_the_command_keeps_what_it_does_not_measure(tmp_path, monkeypatch, measured):
    page = tmp_path / "page.md"
    page.write_text(f"{MARKS[0]}\n\n### {TITLES['text']}\n\nas published\n\n### {FLOPS}\n\nold\n\n{MARKS[1]}\n")
    run_table(monkeypatch, tmp_path, "--sections", "reader", "--into", str(page))
    text = page.read_text("utf-8")
    assert f"### {TITLES['text']}\n\nas published\n" in text and TITLES["reader"] in text
    assert "FLOPs of w" in text and "old" not in text and measured == [["reader"]]
