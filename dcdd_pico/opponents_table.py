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
    OF_DISTRIBUTIONS,
    PARAMETERS,
    SECONDS,
    TOKENS,
    TOTAL,
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
#: Opponents, and the columns in which they should equal the diffusion decoder.
_FAIR = (
    *((name, column) for name in (LARGE, LARGE_CONDITION) for column in (PARAMETERS, TOTAL)),
    *((name, column) for name in (FINE, FINE_CONDITION) for column in (TOTAL, SECONDS)),
    (TOKENS, TOTAL),
)


def verdicts(results: Mapping[str, Rows]) -> str:
    """A Markdown table of the targets: met or MISSED if the whole 95 % interval says so, otherwise open.

    First whether the opponents are fair, then how the diffusion decoder compares. Images of captions have no originals,
    and therefore no perceptual distance.
    """
    lines = [[*TARGET_HEADS]]

    def add(section: str, row: str, column: str, *, most: bool) -> None:
        held = results.get(section, {}).get(row, {})
        lines.append(target(f"{section}, {row}", held, column, 1.0, most=most))

    for name, column in _FAIR:
        add("opponents-latency", ratio_name(name, DCDD), column, most=False)
    for other in (LARGE, FINE):
        for column in (*_FRECHET, *_PERCEPTUAL):
            add("opponents-reconstruction", ratio_name(DCDD, other), column, most=True)
        for column in _FRECHET:
            add("opponents-text", ratio_name(DCDD, other), column, most=True)
    for name, other in OF_DISTRIBUTIONS:
        for column in _FRECHET:
            add("opponents-text", ratio_name(name, other), column, most=True)
    return f"### Targets of the diffusion decoder and its opponents\n\n{markdown_table(lines)}\n"


def tables(results: Measured) -> str:
    """The sections' results and the targets, as Markdown."""
    return "\n".join([*section_texts(results, TITLES), verdicts(results.rows)])


def main() -> None:
    run(__doc__, TITLES, MARKS, "opponents.md", tables)


if __name__ == "__main__":
    main()
