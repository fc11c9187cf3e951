"""The embedded prior: pico's decoder without its condition."""

from __future__ import annotations

from pathlib import Path

import torch

from dcdd_core.models import prior
from dcdd_core.models.bundle import DecoderOptions
from dcdd_core.models.decoder import DistributionConditionedDecoder

from .embedded import PRIOR, WEIGHTS, model_paths


def load_prior(
    *, device: torch.device | str = "cpu", weights: Path | None = None, dtype: torch.dtype = torch.float32
) -> DistributionConditionedDecoder:
    """The decoder as an unconditional prior, which paints scenes of no caption in particular.

    Raises:
        ValueError: if its weights are missing or damaged.
    """
    options = DecoderOptions(device=device, dtype=dtype)
    return prior.load_prior(model_paths(weights)["decoder"], (weights or WEIGHTS) / PRIOR, options=options)
