"""The report on the embedded models, in the order of the paper's tables: `python -m dcdd_pico.paper_report`.

Writes `report.md`, plots and image grids into `--docs`, from measured sections (`sections`, kept in `--out`). The
discussion of the results is written by hand: `<docs>/causes.md` is included as it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from dcdd_core.evaluation.figures import labelled_grid, save_image, score_lines, statistics_sheet
from dcdd_core.evaluation.tables import markdown_table, statistics_rows
from dcdd_core.files import write_text
from dcdd_core.models.bundle import DecoderOptions, load_decoder
from dcdd_core.models.card import VARIANTS
from dcdd_core.pipelines.condition import condition_for
from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import TokenLogits

from .build_context import Recipe
from .interval_tables import cell
from .results_table import REPORT
from .scenes import scene_facts, scene_pixels
from .sections import (
    ABLATION_SCORES,
    BY_LOGITS,
    DCDD,
    RATIO,
    READ,
    SERVED,
    STEP_COUNTS,
    VQ,
    EvalSetup,
    Measured,
    Rows,
    TableOptions,
    measure,
    parse,
    ratio_name,
    steps_name,
    token_statistics,
)

_SCORES = {
    "frechet": "rFID ↓",
    "frechet, text detector": "rFID, text detector ↓",
    "ssim": "SSIM ↑",
    "perceptual": "perceptual distance ↓",
    "perceptual, text detector": "perceptual, text detector ↓",
}
_TEXT_HEADS = {"frechet": "gFID ↓", "frechet, text detector": "gFID, text detector ↓"}
_TEXT_HEADS |= {f"F1 {fact}": f"F1 {fact} ↑" for fact in READ}
_ABLATION_HEADS = dict(zip(ABLATION_SCORES, (*_SCORES.values(), "gFID ↓", "gFID, text detector ↓"), strict=True))
#: The details of a score that form its interval.
_ENDS = ("lowest", "highest")
#: Section -> command that has to be run first.
_HOW = {"ablation": "python -m dcdd_pico.ablation"}


@dataclass(frozen=True)
class Claim:
    """A ratio in the paper: its name, the paper's two values, and where ours are found: section, two rows, column."""

    words: str
    theirs: tuple[float, float]
    section: str
    row: str
    baseline: str
    column: str


#: Ratios of arXiv 2603.13389, Tables 2 (ImageNet), 3, 4 and 6.
CLAIMS = (
    Claim("rFID, DCDD to VQ-VAE", (0.7535, 2.8511), "reconstruction", DCDD, VQ, "frechet"),
    Claim("SSIM, DCDD to VQ-VAE", (0.5957, 0.5786), "reconstruction", DCDD, VQ, "ssim"),
    Claim("perceptual, DCDD to VQ-VAE", (0.1374, 0.1541), "reconstruction", DCDD, VQ, "perceptual"),
    Claim("gFID, DCDD to VQ-VAE", (9.4160, 14.2888), "readings", BY_LOGITS, VQ, "frechet"),
    Claim("gFID, DCDD as served to VQ-VAE", (9.4160, 14.2888), "text", SERVED, VQ, "frechet"),
    Claim("rFID, LCDM to discrete", (31.2049, 33.5081), "means", "lcdm", "discrete", "frechet"),
    Claim("SSIM, LCDM to discrete", (0.4275, 0.4244), "means", "lcdm", "discrete", "ssim"),
    Claim("perceptual, LCDM to discrete", (0.4009, 0.4132), "means", "lcdm", "discrete", "perceptual"),
    Claim("rFID, LCDM + LC to LCDM", (30.5760, 31.2049), "means", "lcdm+lc", "lcdm", "frechet"),
    Claim("SSIM, LCDM + LC to LCDM", (0.4360, 0.4275), "means", "lcdm+lc", "lcdm", "ssim"),
    Claim("perceptual, LCDM + LC to LCDM", (0.3875, 0.4009), "means", "lcdm+lc", "lcdm", "perceptual"),
    Claim("rFID, 10 steps to 30", (20.8859, 17.6969), "steps", steps_name(10), steps_name(30), "frechet"),
    Claim("SSIM, 10 steps to 30", (0.5995, 0.5954), "steps", steps_name(10), steps_name(30), "ssim"),
)
#: Column of the first network -> the second network's column for the same measure.
_SECOND = {"frechet": "frechet, text detector", "perceptual": "perceptual, text detector"}


def agreement(results: Mapping[str, Rows]) -> str:
    """A Markdown table of the paper's ratios beside ours by both networks.

    The last column says whether both are on the same side of 1, by the scene reader's ratio; if that ratio's interval
    includes 1, it adds that this may be chance.
    """
    lines = [["", "paper", "pico, scene reader", "pico, text detector", ""]]
    for claim in CLAIMS:
        paper = claim.theirs[0] / claim.theirs[1]
        row = results.get(claim.section, {}).get(ratio_name(claim.row, claim.baseline))
        if row is None:
            lines.append([claim.words, f"{paper:.3f}", "not measured", "", ""])
            continue
        low, high = (row[f"{claim.column}: {end}"] - 1 for end in ("lowest", "highest"))
        side = "same" if (paper - 1) * (row[claim.column] - 1) > 0 else "**opposite**"
        verdict = f"{side} direction" + (", may be chance" if low <= 0 <= high else "")
        lines.append(
            [claim.words, f"{paper:.3f}", cell(row, claim.column), cell(row, _SECOND.get(claim.column, "")), verdict]
        )
    return markdown_table(lines)


def report_markdown(results: Measured, *, options: TableOptions, causes: str) -> str:
    """The Markdown of the report, whose plots and images `draw` makes.

    Args:
        causes: the discussion of the results, as Markdown.
    """
    recipe, measured = Recipe.load(options.weights), results.rows
    parts = [
        "# The paper's tables on the embedded models",
        "The tables of *High-Fidelity Text-to-Image Generation from Pre-Trained Vision-Language Models via "
        "Distribution-Conditioned Diffusion Decoding* (arXiv 2603.13389), measured on pico: "
        f"{options.scenes:,} held-out scenes of 96 x 96 pixels, {options.steps} Euler steps unless stated otherwise. "
        "Two networks measure Frechet distances (rFID, gFID) and perceptual distances: the scene reader, where no "
        "other is named, and a text detector that others trained on real images. They can be compared with each "
        "other, but not with distances by Inception or LPIPS. Brackets are 95 % intervals.",
        "## Comparison with the paper",
        "Ratios, since absolute values of the two data sets cannot be compared. The last column only says whether the "
        "paper's ratio and the scene reader's are on the same side of 1, not whether they are equally large. *May be "
        "chance* where the interval includes 1. For Table 4 (LCDM, discrete) brackets are the lowest and the highest "
        "ratio of a seed.",
        agreement(measured),
        causes.strip(),
    ]

    def section(title: str, name: str, *blocks: str, also: Sequence[str] = ()) -> None:
        if name in measured:
            sources = dict.fromkeys(str(results.provenance[one]) for one in (name, *also))
            command = f"Measured by `{options.command(name, *also)}`."
            parts.append("\n\n".join([f"## {title}", *blocks, command, "\n\n".join(sources)]))
        else:
            parts.append(f"## {title}\n\nNot measured: `{_HOW.get(name, options.command(name))}`.")

    rows = measured.get("calibration", {})
    section(
        "Table 1 and Figure 6: the VLM's distributions, raw and calibrated proxies",
        "calibration",
        "For the first 100 captions and scenes.",
        markdown_table(statistics_rows({name: token_statistics(row) for name, row in rows.items()})),
        "![Table 1 and Figure 6](report/table-1.png)",
    )
    section(
        "Table 2: reconstruction",
        "reconstruction",
        _table(_plain(measured.get("reconstruction", {})), _SCORES),
        "![Held-out scenes, reconstructed](report/table-2.png)",
    )
    rows, readings = _plain(measured.get("text", {})), _plain(measured.get("readings", {}))
    chance = {name: row for name, row in measured.get("reader", {}).items() if "frechet" in row}
    rows = rows | chance
    details = [name for name in next(iter(rows.values()), {}) if name.startswith("frechet: ")]
    shapes = {name: name.removeprefix("frechet: ") for name in details if name.split(": ")[1] not in _ENDS}
    section(
        "Table 3: text to image",
        "text",
        "All rows are from the same sampled tokens and logits. The F1 of the facts that the reader "
        "finds in the images takes the place of GenEval."
        + (" The last row is the chance level: other renderings of the same facts." if chance else ""),
        _table(rows, _TEXT_HEADS),
        *(("By how the decoder reads the VLM's output:", _table(readings, _TEXT_HEADS)) if readings else ()),
        "gFID by shape:",
        _table(rows, shapes),
        "![Images of captions](report/table-3.png)",
        also=[*(["readings"] if readings else []), *(["reader"] if chance else [])],
    )
    rows = _plain(measured.get("means", {}))
    section(
        "Table 4: what the decoder is conditioned on",
        "ablation",
        f"Decoders trained from scratch for {recipe.variant_steps:,} steps each (the shipped decoder: "
        f"{recipe.decoder_steps:,}), with {len(measured.get('ablation', {})) // len(VARIANTS)} seeds per variant "
        "(`python -m dcdd_pico.ablation`). The mean over seeds, with the lowest and highest value. gFID is of images "
        "of captions, decoded from the logits as the VLM gave them (beta = 0); the other columns are reconstruction, "
        "as in the paper.",
        _table(rows, _ABLATION_HEADS),
        "![Every seed](report/table-4.png)",
        "![Scenes, reconstructed by the decoders of the first seed](report/table-4-pictures.png)",
        "![Images of captions by the same decoders, from the same tokens and logits](report/table-4-captions.png)",
    )
    latency = _latency(measured["latency"], measured["text"]) if {"latency", "text"} <= set(measured) else ""
    section("Table 5: latency", "latency", latency, also=["text"] if "text" in measured else [])
    section(
        "Table 6: the number of steps",
        "steps",
        "On the first 512 scenes, with the time shift that the decoder is served with, which was chosen at ten steps.",
        _table(_plain(measured.get("steps", {})), _SCORES),
        "![By number of steps](report/table-6.png)",
    )
    return "\n\n".join(parts) + "\n"


def draw(setup: EvalSetup, results: Mapping[str, Rows], folder: Path, *, scenes: int = 5) -> None:
    """Writes the plots and image grids of the measured sections into a folder."""
    captions = [facts.caption() for facts in scene_facts("test", scenes)]
    sampled = setup.pico.sampler.sample(captions, seeds=range(scenes), options=SamplingOptions(guidance=setup.guidance))
    if "calibration" in results:
        columns = {name: token_statistics(row) for name, row in results["calibration"].items()}
        save_image(statistics_sheet(columns), folder / "table-1.png")
    if "reconstruction" in results:
        save_image(_reconstructions(setup, scenes), folder / "table-2.png")
    if "text" in results:
        save_image(_generations(setup, sampled, scenes), folder / "table-3.png")
    if "ablation" in results:
        by_seed = {name: [] for name in VARIANTS}
        for name, row in results["ablation"].items():
            by_seed[name.partition(", ")[0]].append(row)
        panels = {
            head: {
                f"seed {k}": [by_seed[name][k][column] for name in VARIANTS] for k in range(len(by_seed[VARIANTS[0]]))
            }
            for column, head in _plotted(_ABLATION_HEADS).items()
        }
        save_image(score_lines(panels, along=VARIANTS), folder / "table-4.png")
        reconstructed, painted = _ablation_grids(setup, sampled, scenes)
        save_image(reconstructed, folder / "table-4-pictures.png")
        save_image(painted, folder / "table-4-captions.png")
    if "steps" in results:
        rows = results["steps"]
        panels = {
            head: {
                "DCDD": [rows[steps_name(count)][column] for count in STEP_COUNTS],
                VQ: [rows[VQ][column]] * len(STEP_COUNTS),
            }
            for column, head in _plotted(_SCORES).items()
        }
        save_image(score_lines(panels, along=STEP_COUNTS, label="steps"), folder / "table-6.png")


def _reconstructions(setup: EvalSetup, count: int) -> Image.Image:
    pico, part = setup.pico, slice(0, count)
    pixels = scene_pixels(setup.images[part], pico.tokenizer.device)
    grid = pico.tokenizer.encode(pixels)
    condition = condition_for(pico.decoder.card, grid, pico.tokenizer.codebook)
    columns = {
        "scene": pixels,
        VQ: pico.tokenizer.decode_tokens(grid.tokens, grid.grid),
        "DCDD": setup.paint(pico.decoder, condition, part),
    }
    return _grid(columns, count)


def _generations(setup: EvalSetup, sampled: TokenLogits, count: int) -> Image.Image:
    pico = setup.pico
    condition = condition_for(pico.decoder.card, sampled, pico.tokenizer.codebook)
    columns = {
        VQ: pico.tokenizer.decode_tokens(sampled.tokens, sampled.grid),
        "DCDD": setup.paint(pico.decoder, condition, slice(0, count)),
    }
    return _grid(columns, count)


def _ablation_grids(setup: EvalSetup, sampled: TokenLogits, count: int) -> tuple[Image.Image, Image.Image]:
    """Reconstructions, and images of captions, by the first seed's decoder of each variant."""
    vq = setup.pico.tokenizer
    pixels = scene_pixels(setup.images[:count], vq.device)
    scenes = {"scene": pixels}
    captions = {VQ: vq.decode_tokens(sampled.tokens, sampled.grid)}
    for variant in VARIANTS:
        path = next(path for name, path in setup.ablation.items() if name.startswith(f"{variant}, "))
        decoder = load_decoder(path, options=DecoderOptions(device=vq.device, dtype=setup.pico.decoder.dtype))
        for columns, grid in ((scenes, vq.encode(pixels)), (captions, sampled)):
            condition = condition_for(decoder.card, grid, vq.codebook)
            columns[variant] = setup.paint(decoder, condition, slice(0, count))
    return _grid(scenes, count), _grid(captions, count)


def _grid(columns: Mapping[str, torch.Tensor], count: int) -> Image.Image:
    captions = [facts.caption() for facts in scene_facts("test", count)]
    rows = [[pixels[i] for pixels in columns.values()] for i in range(count)]
    return labelled_grid(rows, columns=list(columns), captions=captions)


def _plotted(heads: Mapping[str, str]) -> dict[str, str]:
    """The columns that fit into the plots: those of the scene reader."""
    return {column: head for column, head in heads.items() if "text detector" not in column}


def _plain(rows: Rows) -> Rows:
    """The rows that are not ratios of other rows."""
    return {name: row for name, row in rows.items() if RATIO not in name}


def _latency(stages: Rows, text: Rows) -> str:
    seconds = {name: row["seconds"] for name, row in stages.items()}
    plain = seconds["Janus"] + seconds[VQ]
    ours = sum(value for name, value in seconds.items() if name != VQ)
    split = _table(stages, {"seconds": "seconds"})
    trade = markdown_table(
        [
            ["", "gFID ↓", "seconds ↓"],
            ["Janus + VQ-VAE", f"{text[VQ]['frechet']:.4g}", f"{plain:.4g}"],
            ["Janus + DCDD", f"{text[SERVED]['frechet']:.4g}", f"{ours:.4g}"],
            ["change", f"{text[ratio_name(SERVED, VQ)]['frechet'] - 1:+.1%}", f"{ours / plain - 1:+.1%}"],
        ]
    )
    words = (
        "One image at a time; median of seven, on the machine that wrote this report. In the paper (Janus-Pro 7B and "
        "FLUX.1-Fill on a GPU): 11.86 s with the VQ-VAE, 15.56 s with the decoder, +31.2 %. pico's VLM and decoder are "
        "about a thousand times smaller, so its shares of the time say nothing about those of the real models."
    )
    return f"{words}\n\n{split}\n\n{trade}"


def _table(rows: Rows, heads: Mapping[str, str]) -> str:
    """A table of some columns, with the given headers."""
    return markdown_table(
        [["", *heads.values()], *([name, *(cell(row, c) for c in heads)] for name, row in rows.items())]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the report is written")
    chosen, options = parse(parser)
    sections = [name for name in REPORT if name != "ablation" or options.ablation]
    setup, results = measure(options, sections)
    with torch.no_grad():
        draw(setup, results.rows, chosen.docs / "report")
    causes = chosen.docs / "causes.md"
    text = report_markdown(results, options=options, causes=causes.read_text("utf-8") if causes.exists() else "")
    write_text(chosen.docs / "report.md", text)
    print(text)


if __name__ == "__main__":
    main()
