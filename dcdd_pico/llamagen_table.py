"""Tables of what pico's LlamaGen scores: `python -m dcdd_pico.llamagen_table`, with the optional `ruler`.

As in `guided_table`, a section is measured again only if its code, weights or options have changed, and an interrupted
run resumes. Before this, `python -m dcdd_pico.llamagen_calibration` fits LlamaGen's calibration.
"""

from __future__ import annotations

from collections.abc import Mapping

from dcdd_core.evaluation.tables import markdown_table

from .embedded import JANUS, LLAMAGEN
from .guided_sections import F1, minus
from .interval_tables import TARGET_HEADS, run, section_texts, target
from .llamagen_sections import (
    DCDD,
    LOSS,
    NAMES,
    RECONSTRUCTION,
    VQ,
    calibrated_name,
    chosen_guidance,
    gain_name,
    row_name,
)
from .sections import Measured, Rows

#: Lines of a file between which the tables are written.
MARKS = ("<!-- llamagen -->", "<!-- end of llamagen -->")
TITLES = {
    "llamagen-choice": "LlamaGen: guidance, by the VQ decode on calibration captions",
    "llamagen-loss": "LlamaGen and Janus: loss on scenes that no choice has seen",
    "llamagen-reconstruction": "LlamaGen: reconstruction with either VLM's calibration (the paper's Table 7)",
    "llamagen-text": "LlamaGen and Janus: text to image, the same captions (the paper's Table 8)",
}
_FRECHET = ("frechet", "frechet, text detector")
_LESS = (*_FRECHET, "perceptual", "perceptual, text detector")


def verdicts(results: Mapping[str, Rows]) -> str:
    """A Markdown table of the targets: met or MISSED if the whole 95 % interval says so, otherwise open."""
    lines = [[*TARGET_HEADS]]

    def add(section: str, row: str, column: str, bound: float = 0.0, *, most: bool) -> None:
        held = results.get(section, {}).get(row, {})
        lines.append(target(f"{section}, {row}", held, column, bound, most=most))

    for column in RECONSTRUCTION:
        add("llamagen-reconstruction", minus(calibrated_name(LLAMAGEN), VQ), column, most=column in _LESS)
    for vlm in (JANUS, LLAMAGEN):
        for column in (*_FRECHET, *F1):
            row = minus(row_name(vlm, DCDD), row_name(vlm, VQ))
            add("llamagen-text", row, column, most=column in _FRECHET)
    add("llamagen-loss", minus(NAMES[LLAMAGEN], NAMES[JANUS]), LOSS, most=False)
    for column in _FRECHET:
        add("llamagen-text", minus(gain_name(LLAMAGEN), gain_name(JANUS)), column, most=False)
    lines.append(_guidance_line(results))
    return f"### Targets of LlamaGen, and of its differences to Janus\n\n{markdown_table(lines)}\n"


def _guidance_line(results: Mapping[str, Rows]) -> list[str]:
    """Whether the calibration was fitted at the guidance that `llamagen-choice` selects."""
    used = results.get("llamagen-text", {}).get(row_name(LLAMAGEN, DCDD), {}).get("guidance")
    choice = results.get("llamagen-choice")
    what = "llamagen-text: guidance"
    if used is None or choice is None:
        return [what, "that of llamagen-choice", "" if used is None else f"{used:g}", "not measured"]
    chosen = chosen_guidance(choice)
    return [what, f"that of llamagen-choice, {chosen:g}", f"{used:g}", "met" if used == chosen else "MISSED"]


def tables(results: Measured) -> str:
    """The sections' results and the targets, as Markdown."""
    return "\n".join([*section_texts(results, TITLES), verdicts(results.rows)])


def main() -> None:
    run(__doc__, TITLES, MARKS, "llamagen.md", tables)


if __name__ == "__main__":
    main()
