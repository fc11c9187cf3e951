"""Tables and verdicts of the opponents."""

import pytest

from dcdd_pico import opponents_table
from dcdd_pico.guided_sections import FRECHET, minus
from dcdd_pico.opponents_sections import (
    DCDD,
    FINE,
    FINE_CONDITION,
    LARGE,
    LARGE_CONDITION,
    OF_DIFFUSION,
    OF_DISTRIBUTIONS,
    PARAMETERS,
    SECONDS,
    TOKENS,
    TOTAL,
    VQ,
    WHOLE,
)
from dcdd_pico.opponents_table import MARKS, TITLES, tables, verdicts
from dcdd_pico.results_table import PUBLISHED
from dcdd_pico.section_keys import Provenance
from dcdd_pico.sections import Measured, ratio_name
from tests.pico.table_commands import written_by


def cell(column, low, high):
    return {column: (low + high) / 2, f"{column}: lowest": low, f"{column}: highest": high}


def lines_of(results):
    return {line.split("|")[1].strip(): line for line in verdicts(results).splitlines() if line.startswith("| ")}


@pytest.mark.parametrize(
    ("section", "row", "column", "less"),
    [
        ("opponents-reconstruction", ratio_name(DCDD, LARGE), "frechet", True),
        ("opponents-reconstruction", ratio_name(DCDD, LARGE), "perceptual, text detector", True),
        ("opponents-reconstruction", ratio_name(DCDD, FINE), "perceptual", True),
        ("opponents-text", ratio_name(DCDD, LARGE), "frechet, text detector", True),
        ("opponents-text", ratio_name(DCDD, FINE), "frechet", True),
        ("opponents-text", ratio_name(DCDD, TOKENS), "frechet", True),
        ("opponents-text", ratio_name(LARGE_CONDITION, LARGE), "frechet, text detector", True),
        ("opponents-text", ratio_name(FINE_CONDITION, FINE), "frechet", True),
        ("opponents-latency", ratio_name(LARGE, WHOLE), PARAMETERS, False),
        ("opponents-latency", ratio_name(LARGE, WHOLE), TOTAL, False),
        ("opponents-reconstruction", ratio_name(DCDD, LARGE_CONDITION), "frechet", True),
        ("opponents-reconstruction", ratio_name(TOKENS, LARGE), "perceptual, text detector", True),
        ("opponents-reconstruction", ratio_name(DCDD, FINE_CONDITION), "ssim", False),
        ("opponents-text", ratio_name(TOKENS, FINE), "frechet, text detector", True),
        ("opponents-text", ratio_name(DCDD, LARGE_CONDITION), "F1", False),
        ("opponents-text", ratio_name(DCDD, TOKENS), "F1", False),
        ("opponents-latency", ratio_name(LARGE_CONDITION, DCDD), TOTAL, False),
        ("opponents-latency", ratio_name(FINE, DCDD), SECONDS, False),
        ("opponents-latency", ratio_name(TOKENS, DCDD), TOTAL, False),
    ],
)
def test_verdicts_need_the_whole_interval(section, row, column, less):
    def told(low, high):
        return lines_of({section: {row: cell(column, low, high)}})[f"{section}, {row}: {column}"]

    below, above = told(0.7, 0.9), told(1.1, 1.3)
    met, missed = (below, above) if less else (above, below)
    assert met.endswith("| met |") and missed.endswith("| MISSED |") and told(0.9, 1.1).endswith("| open |")
    assert f"| {'at most' if less else 'at least'} 1 |" in met


def test_every_claim_has_its_verdict():
    lines = list(lines_of({}).values())[1:]  # without the heads
    fair, against, distributions = 6 + 4 + 1, 6 * (5 + 3), 3 * 3
    assert len(lines) == fair + against + distributions
    assert all(line.endswith("| not measured |") for line in lines)


def test_an_opponent_that_was_not_trained_has_one_line_where_others_were_measured():
    rows = {ratio_name(DCDD, LARGE): cell("frechet", 0.5, 0.6)}
    lines = lines_of({"opponents-text": rows})
    text = [name for name in lines if name.startswith("opponents-text")]
    others = [pair for pair in (*OF_DIFFUSION, *OF_DISTRIBUTIONS) if pair != (DCDD, LARGE)]
    assert text == [
        *(f"opponents-text, {ratio_name(DCDD, LARGE)}: {column}" for column in (*FRECHET, "F1")),
        *(f"opponents-text, {ratio_name(*pair)}" for pair in others),
    ]
    assert all(lines[name].endswith("|  |  | opponent not trained |") for name in text[3:])
    other = [line for name, line in lines.items() if name.startswith("opponents-rec")]
    assert len(other) == 6 * 5 and all(line.endswith("| not measured |") for line in other), "they may be published"


def test_what_is_published_of_the_opponents_says_where_it_is_from():
    text = PUBLISHED[0].read_text("utf-8")
    block = text.partition(MARKS[0])[2].partition(MARKS[1])[0]
    parts = [part for part in block.split("\n### ")[1:] if not part.startswith("Targets")]
    assert [part.splitlines()[0] for part in parts] == list(TITLES.values())
    assert [one.section for part in parts for one in Provenance.all_in(part)] == list(TITLES)
    assert "### Targets of the diffusion decoder and its opponents" in block


def test_rows_differences_and_ratios_are_tables_of_their_own():
    names = (VQ, minus(DCDD, LARGE), ratio_name(DCDD, LARGE))
    rows = {name: cell("frechet", 0.25, 0.75) for name in reversed(names)}
    section = "opponents-text"
    text = tables(Measured({section: rows}, {section: Provenance(section, "abc1234", "k-w-o")}))
    heads = ["|  | frechet ↓ |", "|---|---|"]
    first, second, third = (f"| {name} | 0.5 (0.25 to 0.75) |" for name in names)
    assert text.splitlines()[:15] == [
        *(f"### {TITLES[section]}", "", *heads, first, "", *heads, second, "", *heads, third, ""),
        "Section `opponents-text`, measured at commit `abc1234`, key `k-w-o`.",
    ]
    assert f"| {section}, {ratio_name(DCDD, LARGE)}: frechet | at most 1 | 0.5 (0.25 to 0.75) | met |" in text


def test_the_sections_are_measured_and_written_between_their_marks(tmp_path, monkeypatch, capsys):
    text = written_by(opponents_table, tmp_path, monkeypatch, capsys)
    assert [one.section for one in Provenance.all_in(text)] == list(TITLES)
    assert (tmp_path / "opponents.md").exists()
