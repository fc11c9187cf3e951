"""Trains masked samplers that differ in the wrong tokens they learn from: `python -m dcdd_pico.train_corruptions`.

There is one for each kind of corruption, one for all kinds together and one for none (`corruption_variants`). All start
from pico's Janus and train on the same scenes in the same order for the same number of updates, far fewer than the
shipped sampler's. A stopped run can be resumed. Samplers and logs are in `<work folder>/corruptions`; they are not
shipped. `python -m dcdd_pico.progressive_table --sections progressive-corruptions` measures them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dcdd_core.evaluation.figures import save_image, training_curves
from dcdd_core.training.log import read_log

from .build_context import BuildContext, Recipe, stage_context, stage_parser
from .corruption_variants import VARIANTS, Variant, variant_folder
from .train_progressive import save_sampler, train_progressive


def train_variant(context: BuildContext, weights: Path, name: str, *, ahead: bool = True) -> Path:
    """Trains (or restores) one of `VARIANTS` for the models in `weights`, and saves it; returns its folder.

    Args:
        ahead: see `SceneTokens`.
    """
    folder = context.folder / variant_folder(name)
    log = folder.parent.relative_to(context.folder).as_posix()
    network, codebook = train_progressive(context, weights, kinds=VARIANTS[name], name=log, ahead=ahead)
    folder.mkdir(parents=True, exist_ok=True)
    save_sampler(folder, weights, network, codebook, name=f"pico progressive, {name}")
    Variant.of(context.recipe, weights, name).save(folder)
    return folder


def save_curves(folder: Path, names: Sequence[str]) -> Path:
    """Plots the held-out cross-entropy of hidden tokens over updates into `<folder>/corruptions/curves.png`."""
    logs = {name: read_log((folder / variant_folder(name)).parent) for name in names}
    path = folder / "corruptions" / "curves.png"
    save_image(training_curves(logs, dict.fromkeys(logs, "eval/hidden")), path)
    return path


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument(
        "--steps", type=int, default=Recipe.corruption_steps, help="updates of each (default %(default)s)"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: as the recipe says")
    chosen = parser.parse_args()
    changed = Recipe.defaults("progressive_") | {"progressive_steps": chosen.steps, "compiled": chosen.compile}
    context = stage_context(chosen, **changed)
    for name in chosen.only:
        print(train_variant(context, chosen.weights, name), flush=True)
    print(save_curves(context.folder, chosen.only))


if __name__ == "__main__":
    main()
