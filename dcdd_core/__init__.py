"""Distribution-conditioned diffusion decoding: keep the distribution that a VLM predicts for every image token, and
paint the image from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .types import Calibration, CalibrationStatistics, Codebook, Condition, TokenLogits

__all__ = ["Calibration", "CalibrationStatistics", "Codebook", "Condition", "TokenLogits"]


def __getattr__(name: str) -> Any:
    """Imports the types of `__all__` when they are asked for: torch takes seconds, which a help text does not need."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import types

    return getattr(types, name)
