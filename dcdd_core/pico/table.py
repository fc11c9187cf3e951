"""The table of the embedded models: `python -m dcdd_core.pico.table`.

Every section is written to `<out>/<section>.json` when it is done and not measured again while the weights stay the
same; `<out>/table.md` holds them all.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch

from ..evaluation.kept import write_text
from ..models.flux import load_decoder
from ..models.vq import VQTokenizer
from .compute import training_operations
from .measures import READ, SECTIONS, SERVED, TITLES, Choice, Rows, measured, parse
from .workshop import Recipe

#: The sections of the table, besides "variants" where these were trained; the report has more.
TABLE = ("reader", "calibration", "reconstruction", "text", "steps")

#: Section, row, column, what the row is held against, and what must hold of their ratio or value.
TARGETS = (
    ("reconstruction", "DCDD (LCDM + LC)", "frechet", "VQ-VAE decode", "at most", 0.40),
    ("reconstruction", "DCDD (LCDM + LC)", "ssim", "VQ-VAE decode", "at least", 1.03),
    ("reconstruction", "DCDD (LCDM + LC)", "perceptual", "VQ-VAE decode", "at most", 0.89),
    ("means", "lcdm+lc", "frechet", "discrete", "at most", 1.0),
    ("means", "lcdm+lc", "ssim", "discrete", "at least", 1.0),
    ("means", "lcdm+lc", "perceptual", "discrete", "at most", 1.0),
    ("steps", "DCDD, 10 steps", "frechet", "VQ-VAE decode", "at most", 1.0),
    ("steps", "DCDD, 10 steps", "perceptual", "VQ-VAE decode", "at most", 1.0),
    ("steps", "DCDD, 10 steps", "ssim", "VQ-VAE decode", "at least", 1.0),
    ("text", SERVED, "frechet", "VQ-VAE decode", "at most", 0.66),
    *(("text", SERVED, f"F1 {fact}", "VQ-VAE decode", "at least", 1.0) for fact in READ),
)


def verdicts(results: Mapping[str, Rows]) -> str:
    """A Markdown table of the targets: the ratio that was measured, and whether it is met, missed or not measured."""
    lines = ["### Targets (ratios)", "", "| | of | target | measured | |", "|---|---|---|---|---|"]
    for section, row, column, rival, relation, bound in TARGETS:
        rows = results.get(section, {})
        ratio, verdict = "", "not measured"
        if row in rows and rival in rows:
            ours, theirs = rows[row][column], rows[rival][column]
            kept = ours <= bound * theirs if relation == "at most" else ours >= bound * theirs
            ratio, verdict = f"{ours / theirs:.3f}" if theirs else f"{ours:.3g} to 0", "met" if kept else "MISSED"
        lines.append(f"| {row}: {column} | {rival} | {relation} {bound:g} | {ratio} | {verdict} |")
    columns = results.get("calibration", {})
    if columns:
        gap = abs(columns["Janus"]["entropy"] - columns["calibrated proxies"]["entropy"])
        verdict = "met" if gap <= 0.02 else "MISSED"
        lines.append(f"| calibrated proxies: mean entropy | Janus | within 0.02 | {gap:.4f} | {verdict} |")
    return "\n".join(lines) + "\n"


def markdown(results: Mapping[str, Rows]) -> str:
    """The sections' results as Markdown tables."""
    blocks = []
    for section, rows in results.items():
        columns = [column for column in next(iter(rows.values())) if ":" not in column]
        lines = [f"### {TITLES[section]}", "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name, row in rows.items():
            lines.append(f"| {name} | " + " | ".join(f"{row[column]:.4g}" for column in columns) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def compute(choice: Choice) -> str:
    """A Markdown table of what the trainings of the two decoders computed."""
    vq = VQTokenizer.load(choice.weights / "janus", dtype=torch.float32)
    decoder = load_decoder(choice.weights / "decoder.safetensors", dtype=torch.float32, fold=False)
    return "### Operations of the trainings\n\n" + training_operations(vq.model, decoder, Recipe.load(choice.weights))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS))
    chosen, choice = parse(parser)
    sections = chosen.sections or [*TABLE, *(["variants"] if choice.variants else [])]
    if "variants" in sections and not choice.variants:
        parser.error(
            f"{chosen.work} holds no ablation: `python -m dcdd_core.pico.build --until variants` trains its decoders"
        )
    _, results = measured(choice, sections)
    text = markdown(results) + "\n" + verdicts(results) + "\n" + compute(choice)
    write_text(choice.out / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
