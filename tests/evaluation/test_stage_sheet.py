"""The contact sheet of passes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import rearrange, repeat

from dcdd_core.evaluation.stage_sheet import CHANGED, REVEALED, stage_sheet
from dcdd_core.method.progressive import Stage


def flags(*rows):
    return torch.tensor([rows, [1, 1, 1, 1]], dtype=torch.bool)


def decode(tokens):
    """A token as a flat square of 4 x 4 pixels: 0 black, 1 white."""
    grey = rearrange(2.0 * tokens.float() - 1, "p (h w) -> p 1 h w", h=2)
    return repeat(grey, "p c h w -> p (c k) (h a) (w b)", k=3, a=4, b=4)


STAGES = [
    Stage(
        guidance=1.0,
        tokens=torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]),
        known=flags(1, 1, 0, 0),
        revealed=flags(1, 1, 0, 0),
        redrawn=flags(0, 0, 0, 0),
        changed=flags(0, 0, 0, 0),
    ),
    Stage(
        guidance=3.0,
        tokens=torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0]]),
        known=flags(1, 1, 1, 1),
        revealed=flags(0, 0, 1, 1),
        redrawn=flags(1, 1, 0, 0),
        changed=flags(0, 1, 0, 0),
    ),
]


def test_what_is_revealed_and_rewritten_is_in_colour():
    sheet = np.asarray(stage_sheet(STAGES, decode, (2, 2), side=80)).astype(int)
    # labelled_grid: margins of 12, a head of 34 without a title, 26 for a caption.
    left, top = (12, 12 + 80 + 12), (34, 34 + 80 + 26 + 12)
    centre = {0: (20, 20), 1: (20, 60), 2: (60, 20), 3: (60, 60)}

    def cell(row, column, position):
        y, x = centre[position]
        return sheet[top[row] + y, left[column] + x].tolist()

    def mixed(colour, grey):
        return [round(0.45 * grey + 0.55 * 255 * part) for part in colour]

    assert [cell(0, 0, k) for k in range(4)] == [[255] * 3, [255] * 3, [57] * 3, [57] * 3], "hidden ones are grey"
    assert [cell(0, 1, k) for k in range(4)] == [[255] * 3, [0] * 3, [255] * 3, [255] * 3]
    for position, expected in enumerate((mixed(REVEALED, 255), mixed(REVEALED, 255), [57] * 3, [57] * 3)):
        assert np.abs(np.subtract(cell(1, 0, position), expected)).max() <= 1
    for position, expected in enumerate(([255] * 3, mixed(CHANGED, 0), mixed(REVEALED, 255), mixed(REVEALED, 255))):
        assert np.abs(np.subtract(cell(1, 1, position), expected)).max() <= 1


def test_another_image_of_the_batch():
    first, second = (np.asarray(stage_sheet(STAGES, decode, (2, 2), row=row)) for row in (0, 1))
    assert first.shape == second.shape and (first != second).any()
    assert second[34 + 20, 12 + 20].tolist() == [0, 0, 0], "its own tokens"


def test_a_hidden_position_is_decoded_as_its_nearest_known_one():
    """Which is what neighbours of it are decoded beside."""
    read = []
    stage_sheet(STAGES, lambda tokens: read.append(tokens) or decode(tokens), (2, 2))
    assert read[0].tolist() == [[1, 1, 1, 1], [1, 0, 1, 1]]
    hidden = replace(STAGES[0], known=flags(0, 0, 0, 0))
    stage_sheet([hidden], lambda tokens: read.append(tokens) or decode(tokens), (2, 2))
    assert read[1].tolist() == [[0, 0, 0, 0]]


def test_many_passes_go_on_below():
    """Lines of 12 passes; the title is on the first alone."""
    passes = [STAGES[0]] * 13 + [STAGES[1]]
    sheet = np.asarray(stage_sheet(passes, decode, (2, 2), side=40, title="title"))
    lines = stage_sheet(passes, decode, (2, 2), side=40, title="a\n  title")
    assert lines == stage_sheet(passes, decode, (2, 2), side=40, title="a title"), "a single line"
    # labelled_grid: margins of 12, a head of 66 with a title and 34 without, 26 for a caption.
    line = 2 * (40 + 26 + 12)
    assert sheet.shape == (66 + line + 34 + line, 12 + 12 * (40 + 12), 3)
    top, paper = 66 + line + 34, sheet[0, 0]
    last = sheet[top : top + 40, 12 + 52 : 12 + 52 + 40]
    assert last[5, 5].tolist() == [255] * 3 and last[30, 30].tolist() == [255] * 3, "the 14th, all of it known"
    assert last[5, 30].tolist() == [0] * 3
    assert (sheet[66 + line :, 12 + 2 * 52 + 120 :] == paper).all(), "nothing is beside it"


def test_no_passes_are_refused():
    with pytest.raises(ValueError, match="no passes to show"):
        stage_sheet([], decode, (2, 2))
