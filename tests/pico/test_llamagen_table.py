"""Tables and verdicts of LlamaGen."""

import pytest

from dcdd_pico import llamagen_table
from dcdd_pico.embedded import JANUS, LLAMAGEN
from dcdd_pico.guided_sections import F1, minus
from dcdd_pico.llamagen_sections import (
    DCDD,
    GUIDANCES,
    LOSS,
    RECONSTRUCTION,
    VQ,
    calibrated_name,
    gain_name,
    guidance_name,
    row_name,
)
from dcdd_pico.llamagen_table import MARKS, TITLES, tables, verdicts
from dcdd_pico.results_table import PUBLISHED
from dcdd_pico.section_keys import Provenance
from dcdd_pico.sections import Measured
from tests.pico.table_commands import written_by

RECONSTRUCTED = minus(calibrated_name(LLAMAGEN), VQ)
GAINS = {vlm: minus(row_name(vlm, DCDD), row_name(vlm, VQ)) for vlm in (JANUS, LLAMAGEN)}
APART = minus(gain_name(LLAMAGEN), gain_name(JANUS))


def cell(column, low, high):
    return {column: (low + high) / 2, f"{column}: lowest": low, f"{column}: highest": high}


def lines_of(results):
    return {line.split("|")[1].strip(): line for line in verdicts(results).splitlines() if line.startswith("| ")}


@pytest.mark.parametrize(
    ("section", "row", "column", "less"),
    [
        ("llamagen-reconstruction", RECONSTRUCTED, "frechet", True),
        ("llamagen-reconstruction", RECONSTRUCTED, "perceptual, text detector", True),
        ("llamagen-reconstruction", RECONSTRUCTED, "ssim", False),
        ("llamagen-reconstruction", RECONSTRUCTED, "psnr", False),
        ("llamagen-text", GAINS[JANUS], "frechet, text detector", True),
        ("llamagen-text", GAINS[LLAMAGEN], "frechet", True),
        ("llamagen-text", GAINS[LLAMAGEN], "F1 shape", False),
        ("llamagen-text", APART, "frechet", False),
        ("llamagen-text", APART, "frechet, text detector", False),
        ("llamagen-loss", "LlamaGen, minus Janus", LOSS, False),
    ],
)
def test_verdicts_need_the_whole_interval(section, row, column, less):
    def told(low, high):
        return lines_of({section: {row: cell(column, low, high)}})[f"{section}, {row}: {column}"]

    below, above = told(-0.3, -0.1), told(0.1, 0.3)
    met, missed = (below, above) if less else (above, below)
    assert met.endswith("| met |") and missed.endswith("| MISSED |") and told(-0.1, 0.1).endswith("| open |")
    assert f"| {'at most' if less else 'at least'} 0 |" in met


def test_every_column_has_its_verdict():
    lines = list(lines_of({}).values())[1:]  # without the heads
    assert len(lines) == len(RECONSTRUCTION) + 2 * (2 + len(F1)) + 1 + 2 + 1
    assert all(line.endswith("| not measured |") for line in lines)


def test_the_guidance_is_that_of_the_choice():
    rows = {guidance_name(g): {"frechet": abs(g - 2), "F1": 0.9, "F1: lowest": 0.8} for g in GUIDANCES}
    for used, verdict in ((2.0, "met"), (3.0, "MISSED")):
        text = {row_name(LLAMAGEN, DCDD): {"guidance": used}}
        line = lines_of({"llamagen-choice": rows, "llamagen-text": text})["llamagen-text: guidance"]
        assert line.endswith(f"| that of llamagen-choice, 2 | {used:g} | {verdict} |")


def test_rows_differences_and_ratios_are_tables_of_their_own():
    names = (calibrated_name(LLAMAGEN), RECONSTRUCTED, gain_name(LLAMAGEN), APART)
    rows = {name: cell("frechet", 0.25, 0.75) for name in reversed(names)}
    section = "llamagen-text"
    text = tables(Measured({section: rows}, {section: Provenance(section, "abc1234", "k-w")}))
    heads = ["|  | frechet ↓ |", "|---|---|"]
    first, second, third, fourth = (f"| {name} | 0.5 (0.25 to 0.75) |" for name in names)
    assert text.splitlines()[:16] == [
        *(f"### {TITLES[section]}", "", *heads, first, "", *heads, second, "", *heads, fourth, third, ""),
        "Section `llamagen-text`, measured at commit `abc1234`, key `k-w`.",
    ]


def test_the_sections_are_measured_and_written_between_their_marks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(llamagen_table, "chosen_guidance", lambda rows: 2.0)
    text = written_by(llamagen_table, tmp_path, monkeypatch, capsys)
    assert [one.section for one in Provenance.all_in(text)] == list(TITLES)
    assert (tmp_path / "llamagen.md").exists()


def test_the_results_have_a_place_for_them():
    text = PUBLISHED[0].read_text("utf-8")
    before, block = text.partition(MARKS[0])[::2]
    block, end, _ = block.partition(MARKS[1])
    assert end and "## LlamaGen, a second VLM" in before and "python -m dcdd_pico.llamagen_table" in before
    found = [one.section for one in Provenance.all_in(block)]
    assert found == [name for name in TITLES if name in found]
