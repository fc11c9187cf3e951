"""Image grids and plots: sizes, pixels and labels."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcdd_core.evaluation import figures
from dcdd_core.evaluation.figures import (
    beside,
    grouped_bars,
    heat_map,
    histograms,
    labelled_grid,
    save_image,
    score_lines,
    statistics_sheet,
    to_image,
    top_curve,
    training_curves,
)
from dcdd_core.evaluation.tables import column_names, statistics_table
from dcdd_core.method.statistics import describe
from dcdd_core.types import TokenLogits


def test_pixels_become_their_bytes():
    pixels = torch.tensor([-1.0, 0.0, 1.0])[:, None, None].expand(3, 2, 2)
    assert to_image(pixels).getpixel((0, 0)) == (0, 128, 255)
    assert to_image(pixels, 8).size == (8, 8)


def test_shrunk_images_are_averages():
    """Every second row is white: nearest neighbour would keep the white rows alone, or the black ones."""
    stripes = torch.tensor([1.0, -1.0]).repeat(4)[None, :, None].expand(3, 8, 6)
    small = to_image(stripes, 4)
    assert small.size == (3, 4) and small.getextrema() == ((128, 128),) * 3


def test_a_heat_map_brightens_with_its_values():
    found = heat_map(torch.tensor([[0.0, 1.0]]), (4, 8))
    assert found.shape == (3, 4, 8)
    assert found[:, :, :4].mean() < found[:, :, 4:].mean()
    assert torch.equal(found[:, 0, 0], found[:, 3, 3])


def test_a_sheet_holds_every_image():
    row = [torch.full((3, 4, 4), value) for value in (-0.5, 0.5)]
    sheet = np.asarray(labelled_grid([row, row[::-1]], columns=("a", "b"), captions=("x" * 500, "y"), side=40))
    dark, light = ((sheet == value).all(-1).sum() for value in (64, 191))
    assert dark == light == 2 * 40 * 40
    titled = np.asarray(labelled_grid([row], columns=("a", "b"), captions=("x",), title="H" * 500, side=40))
    assert (titled[:34, -12:] == titled[0, 0]).all(), "a title that is too long is shortened, not cut"
    with pytest.raises(ValueError, match="one per column name"):
        labelled_grid([row], columns=("a",), captions=("x",))


def test_wide_and_tall_images_are_shown_whole():
    for size in ((20, 40), (40, 20), (40, 40)):
        row = [torch.full((3, *size), value) for value in (-0.5, 0.5, 0.0)]
        sheet = np.asarray(labelled_grid([row], columns=("a", "b", "c"), captions=("x",), side=40))
        areas = [(sheet == value).all(-1).sum() for value in (64, 191, 128)]
        assert areas == 3 * [40 * 40 * size[1] // size[0]], size


def test_names_of_columns_stay_above_their_own():
    row = [torch.zeros(3, 40, 40)] * 2
    short, long = (
        np.asarray(labelled_grid([row], columns=(name, "b"), captions=("x",), side=40)) for name in ("", "W" * 50)
    )
    assert (short[:34, 12 + 40 + 6 :] == long[:34, 12 + 40 + 6 :]).all() and (short[:34] != long[:34]).any()


def test_a_text_without_room_is_left_out():
    """Also the dots that stand for what was cut."""
    row = [torch.zeros(3, 400, 10)]
    tall = labelled_grid([row], columns=("VQ-VAE decode",), captions=("x",), side=20)
    assert tall.width == 12 + 20 + 12, "a column is as wide as its images are high, at least"
    font = figures.ImageFont.load_default(size=15)
    assert figures._fitting("some words", font, 2) == "" and figures._fitting("ab", font, 1000) == "ab"


def test_signs_beyond_ascii_are_drawn():
    """A font without a sign draws the same box for each."""

    def drawn(text):
        row = [torch.zeros(3, 40, 400)]
        return np.asarray(labelled_grid([row], columns=(text,), captions=("",), side=40))[:34]

    signs = [drawn(sign) for sign in ("é", "ü", "ж", "×")]
    assert all((a != b).any() for i, a in enumerate(signs) for b in signs[:i])


def test_an_installed_font_is_taken_for_signs_that_others_lack(monkeypatch):
    taken = []
    monkeypatch.setattr(figures, "_has", lambda file, text: taken.append(file.name) or file.name == "second.ttf")
    monkeypatch.setattr(figures, "_installed_fonts", lambda: iter([Path("first.ttf"), Path("second.ttf")]))
    monkeypatch.setattr(figures.ImageFont, "truetype", lambda file, size: (file.name, size))
    assert figures._font("图", 15) == ("second.ttf", 15) and taken == ["DejaVuSans.ttf", "first.ttf", "second.ttf"]
    monkeypatch.setattr(figures, "_installed_fonts", lambda: iter([]))
    assert figures._font("图", 15) == ("DejaVuSans.ttf", 15), "boxes, if nothing better is installed"


def test_installed_fonts_are_found_by_their_files(monkeypatch):
    found = ["/fonts/MSYH.TTC", "/fonts/other.ttf", "/fonts/noto/NotoSansCJK-Regular.ttc"]
    monkeypatch.setattr(figures.font_manager, "findSystemFonts", lambda: found)
    assert [file.as_posix() for file in figures._installed_fonts()] == [found[2], found[0]]


def test_sheets_stand_side_by_side():
    assert beside(Image.new("RGB", (3, 5)), Image.new("RGB", (4, 2))).size == (7, 5)


def test_table_1_and_figure_6():
    columns = {"flat": describe(torch.full((2, 40), 1 / 40)), "sharp": describe(torch.eye(40)[:2])}
    table = statistics_table(columns)
    assert "flat" in table.splitlines()[0] and "1.000000" in table and "0.025000" in table
    assert len({len(line) for line in table.splitlines()}) == 1
    plot = np.asarray(top_curve(columns))
    assert plot.shape[2] == 3 and (plot != 255).any()


def test_curves_have_a_panel_each():
    logs = {
        "one": [{"step": 1, "loss": 2.0, "eval/a": 3.0}, {"step": 2, "loss": 1.0}],
        "two": [{"step": 5, "eval/b": 1.0}],
    }
    wide = training_curves(logs, {"one": "eval/a", "two": "eval/b"})
    assert wide.width > 1.8 * training_curves({"one": logs["one"]}, {"one": "eval/a"}).width
    assert (np.asarray(wide) != 255).any()


FIGURES = {
    "table and curves": lambda names: statistics_sheet({name: describe(torch.eye(4)) for name in names}),
    "curves": lambda names: top_curve({name: describe(torch.eye(4)) for name in names}),
    "bars": lambda names: grouped_bars({"group": dict.fromkeys(names, 1.0)}, title="title"),
    "lines": lambda names: score_lines({"score": dict.fromkeys(names, (1.0, 2.0))}, along=(1, 2)),
    "histograms": lambda names: histograms({"score": {name: torch.arange(3.0) for name in names}}),
}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn."""
    seen = []
    canvas = figures.FigureCanvasAgg
    monkeypatch.setattr(figures, "FigureCanvasAgg", lambda figure: seen.append(figure) or canvas(figure))
    return seen


def texts_of(figure):
    """Of its legend, and of its table."""
    (legend,) = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    cells = [cell for axes in figure.axes for table in axes.tables for cell in table.get_celld().values()]
    return legend.get_texts(), [cell.get_text() for cell in cells]


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_names_are_drawn_as_they_are(draw, drawn):
    """None is a formula, and none is left out of the legend. Of "$a_$", matplotlib could make no formula."""
    names = ["_own", "$a_$", "$x^2$", "plain"]
    draw(names)
    in_legend, in_table = texts_of(drawn[0])
    assert [text.get_text() for text in in_legend] == names
    assert not any(text.get_parse_math() for text in (*in_legend, *in_table))


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_names_in_figures_are_written_in_a_font_that_has_their_signs(draw, drawn, monkeypatch):
    other = figures._OWN_FONT.with_name("DejaVuSerif.ttf")
    monkeypatch.setattr(figures, "_signs", lambda file: frozenset(map(ord, "é" if file == other else "ab")))
    monkeypatch.setattr(figures, "_installed_fonts", lambda: iter([other]))
    draw(["é", "ab"])
    for text in itertools.chain(*texts_of(drawn[0])):
        if text.get_text() in ("é", "ab"):
            assert text.get_fontproperties().get_file() == (str(other) if text.get_text() == "é" else None)


def test_saving_makes_the_folder_and_leaves_no_rest(tmp_path):
    path = save_image(Image.new("RGB", (2, 2)), tmp_path / "new" / "a.png")
    assert Image.open(path).size == (2, 2) and [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_columns_without_a_name_are_called_by_what_they_hold():
    logits, tokens = torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.int64)
    kinds = {"sampled": ("vlm", False), "proxies": ("proxy", False), "calibrated": ("proxy", True)}
    columns = [TokenLogits(logits, tokens, (1, 1), source=s, calibrated=c) for s, c in kinds.values()]
    assert column_names(columns) == list(kinds)
    assert column_names([columns[1]]) == ["proxies"]
    assert column_names([*columns, columns[0]], ["mine"]) == ["mine", "proxies", "calibrated", "sampled"]
    assert column_names([columns[1]] * 3) == ["proxies", "proxies 2", "proxies 3"]
    assert column_names(columns[:1], ["a", "b"]) == ["a"]
    with pytest.raises(ValueError, match="same, same.*give each its own"):
        column_names(columns, ["same", "same"])
