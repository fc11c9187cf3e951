"""Pico's masked sampler: how it samples, and where its files are."""

from __future__ import annotations

from pathlib import Path

from dcdd_core.method.progressive import ProgressiveOptions

from .embedded import PROGRESSIVE

TOKENIZER = "../janus"
"""Its image tokenizer, Janus' own, as seen from there."""
SAMPLING = ProgressiveOptions(guidance=3.0)


def progressive_folder(weights: Path) -> Path:
    """Folder of the masked sampler among the embedded weights."""
    return weights / PROGRESSIVE
