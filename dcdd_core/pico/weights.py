"""The network that measures, as shipped."""

from __future__ import annotations

from pathlib import Path

import torch

from ..models.checkpoints import load_strictly, read_tensors
from ..pipelines.models import PICO_WEIGHTS
from .reader import SceneReader


def load_reader(*, device: torch.device | str = "cpu", weights: Path = PICO_WEIGHTS) -> SceneReader:
    """The scene reader: reads facts, gives Frechet features and perceptual distances.

    Raises:
        ValueError: if its weights are not where they were shipped.
    """
    with torch.device("meta"):
        reader = SceneReader()
    path = weights / "reader.safetensors"
    load_strictly(reader, read_tensors(path, dtype=torch.float32, device=device), str(path))
    return reader.eval().requires_grad_(False)
