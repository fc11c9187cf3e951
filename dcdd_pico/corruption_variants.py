"""Masked samplers trained with different wrong tokens: which ones exist, where they lie, how they were trained.

`train_corruptions` trains them, `corruption_sections` measures them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

from dcdd_core.files import write_text
from dcdd_core.method.masked_modelling import CORRUPTIONS

from .build_context import Recipe
from .embedded import model_paths
from .section_keys import files_hash

#: Name -> the corruptions that the sampler learns to undo.
VARIANTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"none": (), **{kind: (kind,) for kind in CORRUPTIONS}, "all": CORRUPTIONS}
)
_AGAIN = "`python -m dcdd_pico.train_corruptions` trains it again"


def variant_folder(name: str) -> str:
    """Folder of a variant's sampler, relative to the work folder."""
    return f"corruptions/{name}/sampler"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How a variant was trained; saved beside its sampler as variant.json.

    Attributes:
        kinds: the corruptions.
        start: hash of the files of the Janus that the training started from.
        layers, updates, batch, uses, seed: as the recipe's fields for the masked sampler.
    """

    kinds: tuple[str, ...]
    start: str
    layers: int
    updates: int
    batch: int
    uses: int
    seed: int

    @classmethod
    def of(cls, recipe: Recipe, weights: Path, name: str) -> Variant:
        """The variant called `name`, one of `VARIANTS`, for the models in `weights`."""
        return cls(
            kinds=VARIANTS[name],
            start=janus_hash(weights),
            layers=recipe.progressive_layers,
            updates=recipe.progressive_steps,
            batch=recipe.progressive_batch,
            uses=recipe.progressive_uses,
            seed=recipe.seed,
        )

    def save(self, folder: Path) -> None:
        """Writes variant.json."""
        write_text(folder / "variant.json", json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Variant:
        """Reads variant.json.

        Raises:
            ValueError: if it is missing or damaged.
        """
        try:
            held = json.loads((folder / "variant.json").read_text("utf-8"))
            return cls(**held | {"kinds": tuple(held["kinds"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{folder} holds no readable variant.json ({error}): move it away, {_AGAIN}") from error


def janus_hash(weights: Path) -> str:
    """Hash of the files of the Janus in `weights`."""
    return files_hash([model_paths(weights)["vlm"]])


def trained_variants(work: Path, weights: Path) -> dict[str, Path]:
    """The trained samplers in a work folder, by variant name.

    Raises:
        ValueError: if there are none, if one was trained with other corruptions or from another Janus, or if they were
            not all trained alike.
    """
    found = {name: folder for name in VARIANTS if (folder := work / variant_folder(name)).is_dir()}
    if not found:
        raise ValueError(
            f"{work / 'corruptions'} holds none of {', '.join(VARIANTS)}: `python -m dcdd_pico.train_corruptions` "
            "trains them, and --work names another folder"
        )
    held = {name: Variant.load(folder) for name, folder in found.items()}
    start, first = janus_hash(weights), next(iter(held))
    for name, own in held.items():
        if own.kinds != VARIANTS[name]:
            raise ValueError(
                f"{found[name]} was trained with {', '.join(own.kinds) or 'no corruption'}, expected "
                f"{', '.join(VARIANTS[name]) or 'none'}: move it away, {_AGAIN}"
            )
        if own.start != start:
            raise ValueError(f"{found[name]} started from another Janus than that of {weights}: move it away, {_AGAIN}")
        if replace(own, kinds=()) != replace(held[first], kinds=()):
            raise ValueError(
                f"{found[name]} and {found[first]} cannot be compared ({own} and {held[first]}): train all alike"
            )
    return found
