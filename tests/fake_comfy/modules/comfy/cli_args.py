"""What the command line sets, as far as the pack reads it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class LatentPreviewMethod(Enum):
    NoPreviews = "none"
    Auto = "auto"
    Latent2RGB = "latent2rgb"
    TAESD = "taesd"


@dataclass
class _Arguments:
    preview_method: LatentPreviewMethod = LatentPreviewMethod.NoPreviews


args = _Arguments()
