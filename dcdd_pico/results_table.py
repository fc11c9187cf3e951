"""Tables of what the embedded models score: `python -m dcdd_pico.results_table`.

Each section is kept in `<out>/<section>.json` and measured again only if its code, weights or options have changed.
The tables are written to `<out>/table.md`, and between the marks of the files given with `--into`. With `--stale`,
nothing is measured; it lists the published sections whose key differs from the current one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dcdd_core.evaluation.tables import markdown_table
from dcdd_core.files import write_text

from . import llamagen_sections, opponents_sections, progressive_sections  # noqa: F401  add to SECTIONS
from .embedded import WEIGHTS
from .flops import flops_of
from .interval_tables import BETTER, TARGET_HEADS, section_texts, target, write_into
from .paper_sections import RECONSTRUCTION, TEXT, few_name
from .section_keys import NO_KEY, ROOT, Provenance, code_hash, files_hash
from .sections import (
    DCDD,
    READ,
    SECTIONS,
    SERVED,
    TITLES,
    VQ,
    Measured,
    Rows,
    TableOptions,
    measure,
    parse,
    ratio_name,
    steps_name,
)

#: The sections of the tables (the ablation only if its decoders have been trained).
TABLE = ("reconstruction", "text", "readings", "steps", "few", "few-text", "ablation", "calibration", "reader")
#: The sections of the report.
REPORT = (*(name for name in TABLE if name not in ("few", "few-text")), "latency")
#: Title of the table that is not a section.
FLOPS = "Training FLOPs"

#: The files in which sections are published.
PUBLISHED = (ROOT / "docs" / "results.md", ROOT / "docs" / "report.md", WEIGHTS / "README.md")

#: Lines of a file between which the tables are written.
MARKS = ("<!-- table -->", "<!-- end of the table -->")

TARGETED = {
    "reconstruction": "reconstruction",
    "means": "Table 4",
    "steps": "Table 6",
    "text": "text to image",
    "few": "few steps, reconstruction",
    "few-text": "few steps, text to image",
}
#: Within 2 % of the baseline, by which scores are better.
_WITHIN = {"↓": ("at most", 1.02), "↑": ("at least", 0.98)}

#: Section, row, the baseline's row, column, and the bound on the ratio of the two rows.
TARGETS = (
    ("reconstruction", DCDD, VQ, "frechet", "at most", 0.40),
    ("reconstruction", DCDD, VQ, "frechet, text detector", "at most", 0.75),
    ("reconstruction", DCDD, VQ, "ssim", "at least", 1.035),
    ("reconstruction", DCDD, VQ, "perceptual, text detector", "at most", 0.80),
    ("text", SERVED, VQ, "frechet", "at most", 0.75),
    ("text", SERVED, VQ, "frechet, text detector", "at most", 0.75),
    *(("text", SERVED, VQ, f"F1 {fact}", "at least", 0.99) for fact in READ),
    ("text", SERVED, VQ, "F1", "at least", 1.02),
    ("steps", steps_name(10), VQ, "frechet", "at most", 1.0),
    ("steps", steps_name(10), VQ, "perceptual", "at most", 1.0),
    ("steps", steps_name(10), VQ, "ssim", "at least", 1.0),
    ("means", "lcdm+lc", "discrete", "frechet", "at most", 1.0),
    ("means", "lcdm+lc", "discrete", "ssim", "at least", 1.0),
    ("means", "lcdm+lc", "discrete", "perceptual", "at most", 1.0),
    ("means", "lcdm", "discrete", "text frechet", "at most", 1.0),
    ("means", "lcdm+lc", "lcdm", "text frechet", "at most", 1.0),
    *(
        (section, few_name(2), steps_name(10), column, *_WITHIN[BETTER[column]])
        for section, columns in (("few", RECONSTRUCTION), ("few-text", TEXT))
        for column in columns
    ),
)
#: The paper's own ratio, which the point estimate of at least one of the networks must not exceed.
POINT = ("text", SERVED, VQ, 0.66)


def verdicts(results: Mapping[str, Rows]) -> str:
    """A Markdown table of the targets: met or MISSED if the whole interval of the ratio says so, otherwise open.

    For Table 4, the lowest and highest ratio of a seed take the place of an interval.
    """
    lines = [[*TARGET_HEADS]]
    for section, row, baseline, column, relation, bound in TARGETS:
        held = results.get(section, {}).get(ratio_name(row, baseline), {})
        name = f"{TARGETED[section]}, {ratio_name(row, baseline)}"
        lines.append(target(name, held, column, bound, most=relation == "at most"))
    section, row, baseline, bound = POINT
    held = results.get(section, {}).get(ratio_name(row, baseline), {})
    found = [held[column] for column in ("frechet", "frechet, text detector") if column in held]
    told, verdict = ("", "not measured") if not found else (f"{min(found):.3g}", "MISSED")
    if found and min(found) <= bound:
        verdict = "met"
    name = f"{TARGETED[section]}, {ratio_name(row, baseline)}: frechet by one of the networks"
    lines.append([name, f"at most {bound:g}, point estimate", told, verdict])
    columns = results.get("calibration", {})
    told, verdict = "", "not measured"
    if columns:
        gap = abs(columns["Janus"]["entropy"] - columns["calibrated proxies"]["entropy"])
        told, verdict = f"{gap:.4f}", "met" if gap <= 0.02 else "MISSED"
    lines.append(["mean entropy of calibrated proxies, minus Janus'", "within 0.02", told, verdict])
    return f"### Targets (ratios, from the tables above)\n\n{markdown_table(lines)}\n"


def flops_key(weights: Path) -> str:
    """The key of the table of training FLOPs."""
    names = ("janus", "vae", "decoder.safetensors", "recipe.json")
    return f"{code_hash(flops_of)}-{files_hash(weights / name for name in names)}"


def results_markdown(options: TableOptions, sections: Sequence[str] | None = None) -> str:
    """Measures what needs to be measured, writes all tables to `<out>/table.md`, and returns them as Markdown.

    Args:
        sections: any of `TABLE` (the default: all of them) and "latency".
    """
    _, results = measure(options, sections or [name for name in TABLE if name != "ablation" or options.ablation])
    flops = Provenance("flops", options.commit, flops_key(options.weights))
    text = all_tables(results, flops_of(options.weights), flops)
    write_text(options.out / "table.md", text)
    return text


def all_tables(results: Measured, flops: str, flops_provenance: Provenance) -> str:
    """The sections' tables, the targets and the training FLOPs."""
    training = f"### {FLOPS}\n\n{flops}\n{flops_provenance}\n"
    return "\n".join([*section_texts(results, TITLES), training, verdicts(results.rows)])


def stale(options: TableOptions, published: Mapping[Path, str]) -> list[str]:
    """The published sections that were measured with other code or weights than the current ones, one line each.

    Args:
        options: with the weights and, if they are on this machine, the decoders of the work folder. Without these,
            sections that depend on them are compared by code and shipped weights only.
        published: file -> its text.
    """
    keys = {name: options.key(name) for name in SECTIONS} | {"flops": flops_key(options.weights)}
    lines = []
    for path, text in published.items():
        for found in Provenance.all_in(text):
            today = keys.get(found.section)
            # The key's third part is a hash of decoders in the work folder.
            more = today is not None and found.key.count("-") > today.count("-")
            compared = found.key.rsplit("-", 1)[0] if more else found.key
            if today is None:
                lines.append(f"{path}: {found.section}: there is no such section any more")
            elif compared != today:
                of = "before keys were recorded" if found.key == NO_KEY else f"with key {found.key}, today {today}"
                lines.append(f"{path}: {found.section}: measured at {found.commit} {of}")
    return list(dict.fromkeys(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--sections", nargs="+", choices=(*TABLE, "latency"), help="only these; others stay as published"
    )
    parser.add_argument("--into", nargs="+", type=Path, default=(), help="files to write the tables into")
    parser.add_argument("--stale", action="store_true", help="list the published sections to measure again; 1 if any")
    chosen, options = parse(parser)
    if chosen.stale:
        lines = stale(options, {path.relative_to(ROOT): path.read_text("utf-8") for path in PUBLISHED})
        print("\n".join(lines) or "every published section was measured with today's code and weights")
        sys.exit(1 if lines else 0)
    if "ablation" in (chosen.sections or ()) and not options.ablation:
        parser.error(f"{chosen.work} holds no decoders of the ablation: `python -m dcdd_pico.ablation` trains them")
    text = results_markdown(options, chosen.sections)
    write_into(chosen.into, MARKS, text, None if chosen.sections is None else [*TITLES.values(), FLOPS])
    print(text)


if __name__ == "__main__":
    main()
