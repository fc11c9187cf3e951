"""Figures: labelled image grids, heat maps, plots of scores, the paper's Figure 6.

Shapes: H W pixels, h w token grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain, cycle
from pathlib import Path

import matplotlib
import numpy as np
import torch
from einops import rearrange
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.table import Cell
from matplotlib.text import Text
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ..files import whole_file
from ..method.statistics import TokenStatistics
from .tables import statistics_rows

_TEXT = "prompt"  # the PNG text chunk that other image generators use for it
#: Files of fonts with Chinese, Japanese or Korean signs, as systems install them.
_WIDER_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "msyh.ttc",
    "simhei.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "STHeiti Medium.ttc",
    "Arial Unicode.ttf",
)
_OWN_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
_INK, _PAPER = (24, 24, 28), (250, 249, 246)


def to_image(pixels: torch.Tensor, side: int | None = None) -> Image.Image:
    """Pixels [3, H, W] in -1..1 as a PIL image of height `side`: enlarged by nearest neighbour, which flatters no small
    image, or shrunk by averages."""
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    image = Image.fromarray(rearrange(array, "c h w -> h w c").numpy())
    if side is None or side == image.height:
        return image
    method = Image.Resampling.NEAREST if side > image.height else Image.Resampling.BOX
    return image.resize((_width(pixels, side), side), method)


def _width(pixels: torch.Tensor, side: int) -> int:
    """The width of an image that is resized to height `side`."""
    return max(1, round(pixels.shape[2] * side / pixels.shape[1]))


def heat_map(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Values [h, w] in 0..1 as blocks of colour, dark at 0: pixels [3, H, W] in -1..1, with (H, W) = `size`."""
    colours = matplotlib.colormaps["inferno"](values.clamp(0, 1).cpu().numpy())[..., :3]
    pixels = torch.from_numpy(rearrange(colours, "h w c -> 1 c h w")).float() * 2 - 1
    return torch.nn.functional.interpolate(pixels, size=size, mode="nearest")[0]


def labelled_grid(
    rows: Sequence[Sequence[torch.Tensor]],
    *,
    columns: Sequence[str],
    captions: Sequence[str],
    title: str = "",
    side: int = 240,
) -> Image.Image:
    """A grid of images with a title, a name above each column and a caption below each row.

    Args:
        rows: pixels [3, H, W] in -1..1, one image per column in each row.
        side: height in pixels of each image in the grid; columns are as wide, or as the widest image if that is wider.

    Raises:
        ValueError: if a row does not have one image per column, or there is not one caption per row.
    """
    if any(len(row) != len(columns) for row in rows) or len(captions) != len(rows):
        raise ValueError(
            f"expected {len(columns)} images in each of {len(captions)} rows (one per column name, one row per "
            f"caption), got rows of {[len(row) for row in rows]}"
        )
    gap, head, line = 12, 66 if title else 34, 26
    wide = max([side, *(_width(pixels, side) for row in rows for pixels in row)])
    width = gap + len(columns) * (wide + gap)
    sheet = Image.new("RGB", (width, head + len(rows) * (side + line + gap)), _PAPER)
    pen = ImageDraw.Draw(sheet)

    def write(text: str, left: int, top: int, room: int, size: int = 15, fill: tuple[int, int, int] = _INK) -> None:
        font = _font(text, size)
        pen.text((left, top), _fitting(text, font, room), fill=fill, font=font)

    write(title, gap, 8, width - 2 * gap, size=20)
    for c, name in enumerate(columns):
        write(name, gap + c * (wide + gap), head - 24, wide)
    for r, (row, caption) in enumerate(zip(rows, captions)):
        top = head + r * (side + line + gap)
        for c, pixels in enumerate(row):
            sheet.paste(to_image(pixels, side), (gap + c * (wide + gap), top))
        write(caption, gap, top + side + 4, width - 2 * gap, fill=(96, 96, 104))
    return sheet


def beside(*sheets: Image.Image) -> Image.Image:
    """Images side by side, tops aligned."""
    joined = Image.new("RGB", (sum(s.width for s in sheets), max(s.height for s in sheets)), _PAPER)
    left = 0
    for sheet in sheets:
        joined.paste(sheet, (left, 0))
        left += sheet.width
    return joined


def top_curve(columns: Mapping[str, TokenStatistics]) -> Image.Image:
    """The paper's Figure 6: mean of the 30 largest probabilities, one curve for each kind of logits."""
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    _draw_curves(figure.subplots(), columns)
    return _drawn(figure)


def statistics_sheet(columns: Mapping[str, TokenStatistics]) -> Image.Image:
    """The paper's Table 1 beside its Figure 6."""
    figure = Figure(figsize=(7.5 + 1.3 * len(columns), 4.2), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.6 + 1.2 * len(columns), 5))
    head, *rows = statistics_rows(columns)
    left.axis("off")
    table = left.table(cellText=rows, colLabels=head, cellLoc="right", bbox=(0, 0.08, 1, 0.84), edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(10)
    for (row, column), cell in table.get_celld().items():
        cell.set_edgecolor("#cccccc")
        if column == 0:
            cell.set_text_props(ha="left")
        if row == 0:
            cell.set_text_props(weight="bold")
    _draw_curves(right, columns)
    return _drawn(figure)


def _draw_curves(axes: Axes, columns: Mapping[str, TokenStatistics]) -> None:
    lines = [
        axes.plot(np.arange(1, len(found.curve) + 1), found.curve, marker=marker, markersize=3.5)[0]
        for found, marker in zip(columns.values(), cycle("osv^D"))
    ]
    axes.set(xlabel="rank of the code", ylabel="mean probability", title="Mean of the largest token probabilities")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _add_legend(axes, lines, columns)


def training_curves(logs: Mapping[str, Sequence[Mapping[str, float]]], quantities: Mapping[str, str]) -> Image.Image:
    """Held-out metrics over steps, one panel per training.

    Args:
        logs: name of the training -> lines of its log, each with a "step".
        quantities: name of the training -> key of the metric to draw.
    """
    figure = Figure(figsize=(3.6 * len(logs), 3.0), dpi=110, layout="constrained")
    for axes, (name, lines) in zip(np.ravel(figure.subplots(1, len(logs))), logs.items()):
        key = quantities[name]
        points = [(line["step"], line[key]) for line in lines if key in line]
        axes.plot(*zip(*points), marker="o", markersize=3)
        axes.set(title=name, xlabel="step", ylabel=f"held-out {key.removeprefix('eval/')}")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return _drawn(figure)


def grouped_bars(groups: Mapping[str, Mapping[str, float]], *, title: str) -> Image.Image:
    """A grouped bar chart: group (along the axis) -> row (by colour) -> value."""
    names, rows = list(groups), list(next(iter(groups.values())))
    width = 0.8 / len(rows)
    figure = Figure(figsize=(max(4.0, 1.6 + 0.9 * len(names)), 3.4), dpi=120, layout="constrained")
    axes, bars = figure.subplots(), []
    for i, row in enumerate(rows):
        where = np.arange(len(names)) + (i - (len(rows) - 1) / 2) * width
        bars.append(axes.bar(where, [groups[name][row] for name in names], width))
    axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 3 else 0)
    axes.set(title=title)
    axes.grid(alpha=0.3, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    _add_legend(axes, bars, rows)
    return _drawn(figure)


def score_lines(
    panels: Mapping[str, Mapping[str, Sequence[float]]], *, along: Sequence[str | float], label: str = ""
) -> Image.Image:
    """Line charts, one panel per score: score -> row (by colour) -> a value for each position in `along`."""
    figure = Figure(figsize=(3.8 * len(panels), 3.2), dpi=120, layout="constrained")
    for axes, (score, rows) in zip(np.ravel(figure.subplots(1, len(panels))), panels.items()):
        lines = [
            axes.plot(along, values, marker=marker, markersize=4)[0]
            for values, marker in zip(rows.values(), cycle("osv^D"))
        ]
        axes.set(title=score, xlabel=label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        _add_legend(axes, lines, rows)
    return _drawn(figure)


def histograms(panels: Mapping[str, Mapping[str, torch.Tensor]]) -> Image.Image:
    """Histograms over images, one panel per score: score -> row -> values [M]; infinite values are left out."""
    figure = Figure(figsize=(3.6 * len(panels), 3.0), dpi=110, layout="constrained")
    for axes, (score, rows) in zip(np.ravel(figure.subplots(1, len(panels))), panels.items()):
        finite = {row: values[values.isfinite()].cpu().numpy() for row, values in rows.items()}
        edges = np.histogram_bin_edges(np.concatenate(list(finite.values())), bins=30)
        shapes = [axes.hist(values, edges, histtype="stepfilled", alpha=0.5)[2][0] for values in finite.values()]
        axes.set(title=score, ylabel="images")
        axes.spines[["top", "right"]].set_visible(False)
        _add_legend(axes, shapes, finite)
    return _drawn(figure)


def save_image(image: Image.Image, path: str | Path, *, text: str = "") -> Path:
    """Writes a PNG atomically and creates its folder.

    Args:
        text: the prompt, stored in the file; `text_of` reads it back.
    """
    path, told = Path(path), PngInfo()
    if text:
        told.add_text(_TEXT, text)
    with whole_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=told)
    return path


def text_of(path: Path) -> str | None:
    """The prompt stored in a PNG by `save_image`, "" if there is none; None if the file is missing or damaged."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get(_TEXT, "")
    except (OSError, SyntaxError, ValueError):  # missing, truncated, or with a text that Pillow refuses
        return None


def _add_legend(axes: Axes, handles: Sequence[Artist | Container], names: Iterable[str]) -> None:
    """Matplotlib itself leaves out names that begin with "_", so they are written afterwards."""
    legend = axes.legend(handles, [""] * len(handles), frameon=False)
    for text, name in zip(legend.get_texts(), names):
        text.set_text(name)


def _drawn(figure: Figure) -> Image.Image:
    for text in (*figure.findobj(Text), *(cell.get_text() for cell in figure.findobj(Cell))):
        text.set_parse_math(False)  # a name is no formula
        if (file := _font_file(text.get_text())) != _OWN_FONT:
            font = text.get_fontproperties().copy()
            font.set_file(file)
            text.set_fontproperties(font)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _font(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, or for a text with signs that it lacks, that of `_font_file`."""
    return ImageFont.load_default(size=size) if text.isascii() else ImageFont.truetype(_font_file(text), size)


def _font_file(text: str) -> Path:
    """Matplotlib's own font, or for a text with signs that it lacks, an installed one that has them all."""
    return next((file for file in chain([_OWN_FONT], _installed_fonts()) if _has(file, text)), _OWN_FONT)


def _installed_fonts() -> Iterator[Path]:
    # Looked up each time: matplotlib's own list is that of its first run, and lacks what was installed since.
    fonts = {Path(file).name.lower(): Path(file) for file in font_manager.findSystemFonts()}
    yield from (fonts[name.lower()] for name in _WIDER_FONTS if name.lower() in fonts)


@cache
def _signs(file: Path) -> frozenset[int]:
    return frozenset(FT2Font(str(file)).get_charmap())


def _has(file: Path, text: str) -> bool:
    """Whether a font has all signs of a text."""
    return all(ord(sign) in _signs(file) for sign in text if not sign.isspace())


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    while text and font.getlength(text) > width:
        shorter = text[:-2].rstrip(" …")
        text = shorter and shorter + "…"
    return text
