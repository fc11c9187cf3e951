"""Tables compared with their text, character by character."""

import pytest
import torch

from dcdd_core.evaluation.tables import (
    column_names,
    markdown_table,
    stages_table,
    statistics_rows,
    statistics_table,
)
from dcdd_core.method.progressive import Stage
from dcdd_core.method.statistics import TokenStatistics
from dcdd_core.types import TokenLogits

FIRST = TokenStatistics(
    top_1=0.5, top_2=0.25, entropy=0.125, tail_entropy=0.0625, otsu_threshold=0.00123456, rank=7, head_mass=0.9876543,
    curve=(0.5, 0.25), tokens=3,
)  # fmt: skip
SECOND = TokenStatistics(
    top_1=1.0, top_2=0.0, entropy=0.0, tail_entropy=0.0, otsu_threshold=0.5, rank=1234, head_mass=1.0,
    curve=(1.0, 0.0), tokens=3,
)  # fmt: skip


def logits(source="vlm", calibrated=False):
    return TokenLogits(
        torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64), (1, 1), source=source, calibrated=calibrated
    )


def test_columns_are_named_by_what_they_hold_and_numbered_if_repeated():
    kinds = [("vlm", False), ("vlm", True), ("proxy", False), ("proxy", True)]
    columns = [logits(source, calibrated) for source, calibrated in (*kinds, *kinds, kinds[0])]
    names = ["sampled", "sampled, calibrated", "proxies", "calibrated"]
    assert column_names(columns) == [*names, *(f"{name} 2" for name in names), "sampled 3"]


def test_given_names_come_first_and_are_not_given_again():
    columns = [logits(), logits(), logits("proxy")]
    assert column_names(columns, ["sampled"]) == ["sampled", "sampled 2", "proxies"]
    assert column_names(columns, ["a", "b", "c", "d"]) == ["a", "b", "c"]
    assert column_names(columns[:1], ["a", "a"]) == ["a"]
    assert column_names(columns, ["a", "", "c"]) == ["a", "sampled", "c"], "an empty name keeps its place"
    assert column_names(columns, ["", "sampled"]) == ["sampled 2", "sampled", "proxies"]
    with pytest.raises(ValueError, match=r"same name \(a, a\)"):
        column_names(columns, ["a", "a"])


def test_the_cells_of_table_1():
    assert statistics_rows({"x": FIRST, "y": SECOND}) == [
        ["", "x", "y"],
        ["top-1 probability", "0.500000", "1.000000"],
        ["top-2 probability", "0.250000", "0.000000"],
        ["normalised entropy", "0.125000", "0.000000"],
        ["tail entropy", "0.062500", "0.000000"],
        ["Otsu threshold", "1.235e-03", "5.000e-01"],
        ["Otsu rank", "7", "1234"],
        ["head mass", "0.987654", "1.000000"],
    ]


def test_table_1_as_aligned_text():
    assert statistics_table({"x": FIRST, "calibrated proxies": SECOND}).splitlines() == [
        "                            x  calibrated proxies",
        "top-1 probability    0.500000            1.000000",
        "top-2 probability    0.250000            0.000000",
        "normalised entropy   0.125000            0.000000",
        "tail entropy         0.062500            0.000000",
        "Otsu threshold      1.235e-03           5.000e-01",
        "Otsu rank                   7                1234",
        "head mass            0.987654            1.000000",
    ]


def test_a_markdown_table():
    cells = [["", "a", "b"], ["x", "1", "2"], ["y", "", "3"]]
    assert markdown_table(cells) == "|  | a | b |\n|---|---|---|\n| x | 1 | 2 |\n| y |  | 3 |"


def test_a_markdown_table_is_as_wide_as_its_heading():
    assert markdown_table([["", "a"]]) == "|  | a |\n|---|---|"
    assert markdown_table([["", "a"], ["x"]]) == "|  | a |\n|---|---|\n| x |"


def test_passes_as_aligned_text():
    """Means of three images."""

    def flags(*counts):
        return torch.arange(9) < torch.tensor(counts)[:, None]

    passes = [((9, 9, 9), (0, 0, 0), (0, 0, 0)), ((0, 0, 0), (9, 8, 9), (4, 0, 0))]
    stages = [
        Stage(
            guidance=1.0,
            tokens=torch.zeros(3, 9, dtype=torch.int64),
            known=flags(9, 9, 9),
            revealed=flags(*revealed),
            redrawn=flags(*redrawn),
            changed=flags(*changed),
        )
        for revealed, redrawn, changed in passes
    ]
    assert stages_table(stages).splitlines() == [
        "pass  revealed  drawn again  changed",
        "1            9            0        0",
        "2            0        8.667    1.333",
    ]
