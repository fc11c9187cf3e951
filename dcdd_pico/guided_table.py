"""Tables of what distribution guidance scores: `python -m dcdd_pico.guided_table`, with the optional `ruler`.

As in `results_table`, a section is measured again only if its code, weights or options have changed. Images and scores
are kept part by part below `<out>/guided`: an interrupted run resumes, and a run with more scenes adds to them.
"""

from __future__ import annotations

from collections.abc import Mapping

from dcdd_core.evaluation.tables import markdown_table

from .guided_sections import ABOVE, BOTH, F1, GUIDED, MEANS, SDEDIT, STRONGER, TRAINED, VQ, minus, share_name
from .interval_tables import TARGET_HEADS, run, section_texts, target
from .sections import Measured, Rows

#: Lines of a file between which the tables are written.
MARKS = ("<!-- guidance -->", "<!-- end of guidance -->")
TITLES = {
    "guided-reconstruction": "Distribution guidance: reconstruction of scenes that no choice has seen",
    "guided-text": "Distribution guidance: text to image, all rows from the same sampled tokens and distributions",
    "guided-photographs": "Distribution guidance: tiles of photographs",
    "guided-robustness": "Distribution guidance: token agreement after small changes of the images",
    "guided-ablation": "Distribution guidance: one setting at a time, reconstruction of calibration scenes",
    "guided-choice": "Distribution guidance: settings for text to image, on calibration captions",
    "rulers": "Both metric networks on calibration scenes that are damaged more and more",
}
_LESS = ("frechet", "frechet, text detector", "perceptual", "perceptual, text detector")


def verdicts(results: Mapping[str, Rows]) -> str:
    """A Markdown table of the targets: met or MISSED if the whole 95 % interval says so, otherwise open."""
    lines = [[*TARGET_HEADS]]

    def add(section: str, row: str, column: str, bound: float, *, most: bool = False) -> None:
        held = results.get(section, {}).get(row, {})
        lines.append(target(f"{section}, {row}", held, column, bound, most=most))

    gain = results.get("guided-reconstruction", {}).get(minus(TRAINED, VQ), {})
    for row in (GUIDED, STRONGER):
        for column in (*_LESS, "ssim"):
            add("guided-reconstruction", share_name(row), column, 0.85)
            if column in gain and (gain[column] >= 0) == (column in _LESS):
                lines[-1][-1] = "no gain to share"
        for column in F1:
            add("guided-text", minus(row, VQ), column, 0.0)
        for other in (VQ, SDEDIT):
            for column in _LESS[:2]:
                add("guided-text", minus(row, other), column, 0.0, most=True)
    for column in (*_LESS, *MEANS[:2], "F1"):
        add("guided-reconstruction", minus(BOTH, TRAINED), column, 0.0, most=column in _LESS)
    for column in (*_LESS[:2], *F1):
        add("guided-text", minus(BOTH, TRAINED), column, 0.0, most=column in _LESS)
    share = results.get("guided-photographs", {}).get(GUIDED, {}).get(ABOVE)
    verdict = "not measured" if share is None else "met" if share >= 0.9 else "MISSED"
    told = "" if share is None else f"{share:.3g}"
    lines.append([f"guided-photographs, {GUIDED}: {ABOVE}", "at least 0.9", told, verdict])
    return f"### Targets of distribution guidance\n\n{markdown_table(lines)}\n"


def tables(results: Measured) -> str:
    """The sections' results and the targets, as Markdown."""
    return "\n".join([*section_texts(results, TITLES), verdicts(results.rows)])


def main() -> None:
    run(__doc__, TITLES, MARKS, "guided.md", tables, steps=False)


if __name__ == "__main__":
    main()
