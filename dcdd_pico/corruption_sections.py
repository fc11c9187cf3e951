"""What wrong tokens in training are good for: a section of docs/results.md on the samplers of `train_corruptions`.

They are sampled, decoded and measured like the orders in `progressive_sections`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dcdd_core.models.masked.sampler import MaskedSampler
from dcdd_core.types import same_codebook

from .corruption_variants import VARIANTS, Variant, trained_variants, variant_folder
from .progressive_sections import ORDERED, TARGET, Samples, load_progressive, seeded_row, without_revision
from .section_keys import files_hash
from .sections import SECTIONS, EvalSetup, Rows, Section

_READ = ("janus", "vae", "decoder.safetensors", "reader.safetensors")


@dataclass(frozen=True, kw_only=True)
class VariantSamples(Samples):
    """`Samples` with a variant in place of the shipped masked sampler.

    Attributes:
        folder: folder of the variant's sampler.
    """

    folder: Path

    @cached_property
    def masked(self) -> MaskedSampler:
        """The variant's sampler.

        Raises:
            ValueError: if it has another codebook than the models measured.
        """
        sampler = load_progressive(self.setup, self.folder)
        if not same_codebook(sampler.codebook.fingerprint, self.setup.pico.tokenizer.codebook.fingerprint):
            raise ValueError(
                f"{self.folder} has another codebook than the models in {self.setup.weights}: move it away, and train "
                "it again with `python -m dcdd_pico.train_corruptions`"
            )
        return sampler

    @cached_property
    def versions(self) -> dict[bool, str]:
        """As in the base class, with a hash of the variant's own files added."""
        own = files_hash([self.folder])
        return {masked: f"{version}-{own}" for masked, version in super().versions.items()}


def measure_corruptions(setup: EvalSetup) -> Rows:
    """Samplers trained with each kind of wrong tokens, all kinds and none, with and without revision.

    Measured at `TARGET` passes with the VQ decoder, on the first `ORDERED` captions at most; cells are as in
    `progressive_sections.measure_orders`. Each variant was trained only once.
    """
    rows, count = {}, min(ORDERED, len(setup.images))
    base = Samples.of(setup)
    for name, folder in trained_variants(setup.work, setup.weights).items():
        samples = VariantSamples(setup=setup, rulers=base.rulers, folder=folder)
        revising = samples.in_passes(TARGET)
        updates = float(Variant.load(folder).updates)
        for what, options in (("revision", revising), ("no revision", without_revision(revising))):
            rows[f"{name}, {what}"] = seeded_row(samples, options, count) | {"updates": updates}
    return rows


SECTIONS["progressive-corruptions"] = Section(measure_corruptions, _READ, tuple(map(variant_folder, VARIANTS)))
