"""Tables and verdicts of guidance."""

import sys

import pytest

from dcdd_pico import guided_table, results_table, sections
from dcdd_pico.guided_sections import ABOVE, BOTH, GUIDED, SDEDIT, TRAINED, VQ, minus, share_name
from dcdd_pico.guided_table import MARKS, TITLES, tables, verdicts
from dcdd_pico.results_table import PUBLISHED
from dcdd_pico.section_keys import Provenance
from dcdd_pico.sections import SECTIONS, EvalSetup, Measured, TableOptions
from tests.pico.table_commands import written_by


def cell(column, value, low, high):
    return {column: value, f"{column}: lowest": low, f"{column}: highest": high}


def lines_of(results):
    return {line.split("|")[1].strip(): line for line in verdicts(results).splitlines() if line.startswith("| ")}


def test_verdicts_need_the_whole_interval():
    name = share_name(GUIDED)
    lines = lines_of(
        {
            "guided-reconstruction": {
                name: cell("ssim", 0.95, 0.9, 1.0)
                | cell("perceptual", 0.87, 0.8, 0.9)
                | cell("frechet", 0.7, 0.6, 0.8),
                minus(BOTH, TRAINED): cell("perceptual", -0.1, -0.2, 0.0) | cell("ssim", -0.1, -0.2, -0.01),
            },
            "guided-text": {minus(GUIDED, VQ): cell("frechet", 0.1, -0.1, 0.3), minus(GUIDED, SDEDIT): {}},
            "guided-photographs": {GUIDED: {ABOVE: 0.9}},
        }
    )
    reconstruction = f"guided-reconstruction, {name}"
    assert lines[f"{reconstruction}: ssim"].endswith("| at least 0.85 | 0.95 (0.9 to 1) | met |")
    assert lines[f"{reconstruction}: perceptual"].endswith("| open |")
    assert lines[f"{reconstruction}: frechet"].endswith("| MISSED |")
    assert lines[f"{reconstruction}: frechet, text detector"].endswith("|  | not measured |")
    both = f"guided-reconstruction, {minus(BOTH, TRAINED)}"
    assert lines[f"{both}: perceptual"].endswith("| at most 0 | -0.1 (-0.2 to 0) | met |")
    assert lines[f"{both}: ssim"].endswith("| at least 0 | -0.1 (-0.2 to -0.01) | MISSED |")
    assert lines[f"guided-text, {minus(GUIDED, VQ)}: frechet"].endswith("| open |")
    assert lines[f"guided-text, {minus(GUIDED, SDEDIT)}: frechet"].endswith("| not measured |")
    assert lines[f"guided-photographs, {GUIDED}: {ABOVE}"].endswith("| at least 0.9 | 0.9 | met |")


def test_there_is_no_share_of_a_trained_decoder_that_gains_nothing():
    name, trained = share_name(GUIDED), minus(TRAINED, VQ)
    shares = cell("ssim", 0.9, 0.9, 1.0) | cell("frechet", 0.9, 0.9, 1.0)
    for sign, verdict in ((1, "met"), (-1, "no gain to share")):
        rows = {name: shares, trained: {"ssim": 0.1 * sign, "frechet": -0.1 * sign}}
        lines = lines_of({"guided-reconstruction": rows})
        for column in ("ssim", "frechet"):
            assert lines[f"guided-reconstruction, {name}: {column}"].endswith(f"| {verdict} |")


def test_photographs_miss_below_nine_of_ten():
    lines = lines_of({"guided-photographs": {GUIDED: {ABOVE: 0.89}}})
    assert lines[f"guided-photographs, {GUIDED}: {ABOVE}"].endswith("| MISSED |")


def test_rows_differences_and_shares_are_tables_of_their_own():
    rows = {name: cell("ssim", 0.5, 0.25, 0.75) for name in (VQ, minus(GUIDED, VQ), share_name(GUIDED))}
    text = tables(Measured({"guided-text": rows}, {"guided-text": Provenance("guided-text", "abc1234", "k-w")}))
    assert text.splitlines()[:15] == [
        f"### {TITLES['guided-text']}",
        "",
        "|  | ssim ↑ |",
        "|---|---|",
        f"| {VQ} | 0.5 (0.25 to 0.75) |",
        "",
        "|  | ssim ↑ |",
        "|---|---|",
        f"| {minus(GUIDED, VQ)} | 0.5 (0.25 to 0.75) |",
        "",
        "|  | ssim ↑ |",
        "|---|---|",
        f"| {share_name(GUIDED)} | 0.5 (0.25 to 0.75) |",
        "",
        "Section `guided-text`, measured at commit `abc1234`, key `k-w`.",
    ]


def test_the_sections_are_measured_kept_and_written_between_their_marks(tmp_path, monkeypatch, capsys):
    text = written_by(guided_table, tmp_path, monkeypatch, capsys)
    found = {one.section: one for one in Provenance.all_in(text)}
    assert set(found) == set(TITLES) and found["rulers"] == Provenance("rulers", "abc", "key of rulers")
    assert (tmp_path / "guided.md").exists()


def test_steps_are_not_an_option_where_rows_say_them(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["guided_table", "--steps", "5"])
    with pytest.raises(SystemExit):
        guided_table.main()
    assert "unrecognized arguments: --steps" in capsys.readouterr().err


def test_every_published_table_says_where_it_is_from():
    text = PUBLISHED[0].read_text("utf-8")
    block = text.partition(MARKS[0])[2].partition(MARKS[1])[0]
    sections = [part for part in block.split("\n### ")[1:] if not part.startswith("Targets")]
    found = [one.section for part in sections for one in Provenance.all_in(part)]
    assert sections and found == [name for name in TITLES if name in found]
    assert [part.splitlines()[0] for part in sections] == [TITLES[name] for name in found]
    assert "### Targets of distribution guidance" in block


def test_stale_knows_the_sections(monkeypatch, tmp_path):
    options = TableOptions(out=tmp_path)
    today = Provenance("guided-text", "abc1234", options.key("guided-text"))
    other = Provenance("guided-ablation", "abc1234", "1-2")
    lines = results_table.stale(options, {tmp_path / "a.md": f"{today}\n{other}\n"})
    assert len(lines) == 1 and "guided-ablation: measured at abc1234 with key 1-2" in lines[0]


def test_a_key_is_of_the_code_and_of_the_weights_that_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sections, "code_hash", lambda function: function.__name__)
    names = {name for section in TITLES for name in SECTIONS[section].weights}
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    options = TableOptions(out=tmp_path, weights=tmp_path)
    before = {name: options.key(name) for name in TITLES}
    (tmp_path / "prior.safetensors").write_bytes(b"other")
    changed = {name for name in TITLES if options.key(name) != before[name]}
    assert changed == set(TITLES) - {"rulers"}
    assert len(set(before.values())) == len(TITLES)


@pytest.mark.parametrize("field", ["out", "weights"])
def test_measurements_know_their_folders(field):
    assert field in EvalSetup.__dataclass_fields__
