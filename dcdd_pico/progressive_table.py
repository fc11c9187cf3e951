"""Tables of what the masked sampler scores: `python -m dcdd_pico.progressive_table`, with the optional `ruler`.

As in `guided_table`, a section is measured again only if its code, weights or options have changed, and an interrupted
run resumes. `python -m dcdd_pico.train_corruptions` first trains the samplers of `progressive-corruptions`; without
them that section stays as published.
"""

from __future__ import annotations

from collections.abc import Mapping

from dcdd_core.evaluation.tables import markdown_table

from . import corruption_sections  # noqa: F401, which adds its section
from .guided_sections import F1, minus
from .interval_tables import TARGET_HEADS, run, section_texts, target
from .progressive_sections import AR, DCDD, TARGET, VQ, passes_name
from .sections import Measured, Rows

#: Lines of a file between which the tables are written.
MARKS = ("<!-- progressive -->", "<!-- end of progressive -->")
TITLES = {
    "progressive-target": f"Progressive sampling: {TARGET} passes against the autoregressive sampler",
    "progressive-passes": "Progressive sampling: the number of passes, against the autoregressive sampler",
    "progressive-orders": f"Progressive sampling: order and revision at {TARGET} passes, mean over three seeds",
    "progressive-corruptions": (
        f"Progressive sampling: wrong tokens in training, at {TARGET} passes, one short training each, mean over three "
        "seeds"
    ),
    "progressive-seconds": "Progressive sampling: wall time an image; passes are not seconds",
}


def verdicts(results: Mapping[str, Rows]) -> str:
    """A Markdown table of the targets: met or MISSED if the whole 95 % interval says so, otherwise open."""
    lines = [[*TARGET_HEADS]]
    section = "progressive-target"
    for decoder in (VQ, DCDD):
        row = minus(f"{passes_name(TARGET)}, {decoder}", f"{AR}, {decoder}")
        held = results.get(section, {}).get(row, {})
        for column in ("frechet", "frechet, text detector", *F1):
            most = column not in F1
            lines.append(target(row, held, column, 0.0, most=most))
    return f"### Targets of progressive sampling\n\n{markdown_table(lines)}\n"


def tables(results: Measured) -> str:
    """The sections' results and the targets, as Markdown."""
    return "\n".join([*section_texts(results, TITLES), verdicts(results.rows)])


def main() -> None:
    run(__doc__, TITLES, MARKS, "progressive.md", tables)


if __name__ == "__main__":
    main()
