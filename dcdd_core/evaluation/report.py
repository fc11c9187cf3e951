"""The results of an evaluation as JSON, as Markdown tables like the paper's, and as plots."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..files import write_text
from .decoding import PATHS, guidance_told
from .figures import grouped_bars, histograms, save_image
from .frechet import FrechetSet
from .image_folder import NOTHING_LEFT_OUT, OVERALL, ImageFile, LeftOut
from .tables import markdown_table

#: Scope ("overall" or a category) -> row (a decoder) -> column (a metric) -> value.
Scopes = Mapping[str, Mapping[str, Mapping[str, float]]]
_BETTER = {"frechet": "↓", "ssim": "↑", "psnr": "↑", "perceptual": "↓"}


def results_of(
    scopes: Scopes,
    *,
    images: Sequence[ImageFile],
    real: Mapping[str, FrechetSet],
    settings: Mapping[str, Any],
    networks: Mapping[str, str],
    size: int,
    painted: Mapping[str, int],
    exact: Mapping[str, int],
    left_out: LeftOut = NOTHING_LEFT_OUT,
) -> dict[str, Any]:
    """The content of `results.json`: the values and what they depend on, without times or paths.

    Args:
        real: category -> statistics of the reference images.
        networks: column -> name of the network that measured it.
        size: side in pixels at which images were compared.
        painted: row -> side in pixels of its images before resizing.
        exact: row -> number of its images that equal their originals; empty if there are no originals.
        left_out: images left out of the evaluation, or of the references that it compares with.
    """
    held = Counter(image.category for image in images)
    return {
        "size": size,
        "painted": dict(painted),
        "exact": dict(exact),
        "pictures": {OVERALL: len(images)} | {name: held[name] for name in scopes if name != OVERALL},
        "references": {OVERALL: sum(part.count for part in real.values())}
        | {name: real[name].count for name in scopes if name != OVERALL},
        "networks": dict(networks),
        "settings": dict(settings),
        "left_out": {"unreadable": list(left_out.unreadable), "small": list(left_out.small)},
        "scopes": {scope: {row: dict(values) for row, values in rows.items()} for scope, rows in scopes.items()},
    }


def markdown(results: Mapping[str, Any], *, title: str, heads: Mapping[str, str], command: str) -> str:
    """One table over all images, and for each column a table by category.

    Args:
        results: see `results_of`.
        heads: column -> its heading, such as "rFID".
        command: the command line that made the results.
    """
    scopes = results["scopes"]
    counts = f"{results['pictures'][OVERALL]} images against {results['references'][OVERALL]} references"
    lines = [f"# {title}", "", f"{counts}, measured at {results['size']} x {results['size']} pixels.", ""]
    resized = [f"{row} ({side} pixels)" for row, side in results["painted"].items() if side != results["size"]]
    if resized:
        lines += [f"Resized to that size (bicubic, antialiased): {', '.join(resized)}.", ""]
    exact = [f"{row} ({count} of {results['pictures'][OVERALL]})" for row, count in results["exact"].items() if count]
    if exact:
        lines += [
            f"Images that equal their originals: {', '.join(exact)}. In the means, their PSNR counts as if one channel "
            "of one pixel differed by one level of 8 bits.",
            "",
        ]
    settings = results["settings"]
    if said := guidance_told(settings.get("distribution_guidance", 0.0), settings.get("shift")):
        lines += [f"{PATHS['dcdd']}: {said}.", ""]
    if said := str(LeftOut(**{name: tuple(names) for name, names in results["left_out"].items()})):
        lines += [f"{said}.", ""]
    lines += [f"- {heads[column]}: {name}" for column, name in results["networks"].items()]
    lines += ["", f"`{command}`", ""]
    named = {column: f"{heads[column]} {_BETTER[column]}" for column in next(iter(scopes[OVERALL].values()))}
    rows = {row: list(values.values()) for row, values in scopes[OVERALL].items()}
    lines += _table(list(named.values()), rows)
    if len(scopes) > 1:
        for column, head in named.items():
            by_row = {row: [scopes[scope][row][column] for scope in scopes] for row in rows}
            lines += ["", f"## {head} by category", "", *_table([_capital(scope) for scope in scopes], by_row)]
        counted = {"images": list(results["pictures"].values()), "references": list(results["references"].values())}
        lines += ["", "## Counts", "", *_table([_capital(scope) for scope in scopes], counted)]
    return "\n".join(lines) + "\n"


def write_report(
    folder: Path,
    results: Mapping[str, Any],
    *,
    title: str,
    heads: Mapping[str, str],
    command: str,
    singles: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> str:
    """Writes results.json, report.md, frechet.png and, if `singles` is given, scores.png; returns the Markdown.

    Args:
        singles: column -> row -> values [M], one per image.
    """
    write_text(folder / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    text = markdown(results, title=title, heads=heads, command=command)
    frechet = {
        _capital(scope): {row: values["frechet"] for row, values in rows.items()}
        for scope, rows in results["scopes"].items()
    }
    save_image(grouped_bars(frechet, title=heads["frechet"]), folder / "frechet.png")
    text += f"\n![{heads['frechet']}](frechet.png)\n"
    if singles:
        panels = {heads[column]: rows for column, rows in singles.items()}
        save_image(histograms(panels), folder / "scores.png")
        text += "\n![Scores of individual images](scores.png)\n"
    # File names may not be valid Unicode.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    write_text(folder / "report.md", text)
    return text


def _table(columns: Sequence[str], rows: Mapping[str, Sequence[float]]) -> list[str]:
    def cell(value: float) -> str:
        return str(value) if isinstance(value, int) else f"{value:.5g}"

    return [markdown_table([["", *columns], *([name, *map(cell, values)] for name, values in rows.items())])]


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]
