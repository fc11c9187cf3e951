"""Tables of what the opponents of the diffusion decoder score: `python -m dcdd_pico.opponents_table`, with the optional
`ruler`.

As in `guided_table`, a section is measured again only if its code, weights, opponents or options have changed, and an
interrupted run resumes. Before this, `python -m dcdd_pico.train_opponents` trains the opponents.
"""

from __future__ import annotations

from collections.abc import Mapping

from dcdd_core.evaluation.tables import markdown_table

from .interval_tables import TARGET_HEADS, run, section_texts, target
from .opponents_sections import (
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
    WHOLE,
)
from .sections import Measured, Rows, ratio_name

#: Lines of a file between which the tables are written.
MARKS = ("<!-- opponents -->", "<!-- end of opponents -->")
TITLES = {
    "opponents-latency": "Opponents: size, training, and time for an image",
    "opponents-reconstruction": "Opponents: reconstruction of scenes that no choice has seen",
    "opponents-text": "Opponents: text to image, all rows from the same sampled tokens and distributions",
}
_FRECHET = ("frechet", "frechet, text detector")
_PERCEPTUAL = ("perceptual", "perceptual, text detector")
#: The other cells of a target whose opponent was not trained.
_UNTRAINED = ("", "", "opponent not trained")
#: Opponents, what they are compared with, and the columns in which they should be its equals.
_FAIR = (
    *(
        (name, *other)
        for name in (LARGE, LARGE_CONDITION)
        for other in ((WHOLE, PARAMETERS), (DCDD, TOTAL), (WHOLE, TOTAL))
    ),
    *((name, DCDD, column) for name in (FINE, FINE_CONDITION) for column in (TOTAL, SECONDS)),
    (TOKENS, DCDD, TOTAL),
)


def verdicts(results: Mapping[str, Rows]) -> str:
    """A Markdown table of the targets: met or MISSED if the whole 95 % interval says so, otherwise open.

    First whether the opponents are fair, then what diffusion and what distributions contribute. An image of a caption
    need not resemble the caption's scene, so it has no perceptual distance and no SSIM. A measured section without an
    opponent's row, which was not trained, has one line for all its targets.
    """
    lines = [[*TARGET_HEADS]]

    def add(section: str, row: str, column: str, *, most: bool) -> None:
        rows, name = results.get(section, {}), f"{section}, {row}"
        if not rows or row in rows:
            lines.append(target(name, rows.get(row, {}), column, 1.0, most=most))
        elif [name, *_UNTRAINED] not in lines:
            lines.append([name, *_UNTRAINED])

    for name, other, column in _FAIR:
        add("opponents-latency", ratio_name(name, other), column, most=False)
    for name, other in OF_DIFFUSION:
        for column in (*_FRECHET, *_PERCEPTUAL, "ssim"):
            add("opponents-reconstruction", ratio_name(name, other), column, most=column != "ssim")
    for name, other in (*OF_DIFFUSION, *OF_DISTRIBUTIONS):
        for column in (*_FRECHET, "F1"):
            add("opponents-text", ratio_name(name, other), column, most=column != "F1")
    return f"### Targets of the diffusion decoder and its opponents\n\n{markdown_table(lines)}\n"


def tables(results: Measured) -> str:
    """The sections' results and the targets, as Markdown."""
    return "\n".join([*section_texts(results, TITLES), verdicts(results.rows)])


def main() -> None:
    run(__doc__, TITLES, MARKS, "opponents.md", tables)


if __name__ == "__main__":
    main()
