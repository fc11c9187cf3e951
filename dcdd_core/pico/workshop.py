"""What every stage of the pico build shares: where it works, on which device, and its recipe."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ..training.loop import generator
from .data import scene_images
from .scenes import SceneFacts, scene_facts


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Numbers of the build. The defaults make the shipped models; tests shrink them."""

    size: int = 96
    train_scenes: int = 40_000
    held_out_scenes: int = 256
    reader_steps: int = 700
    tokenizer_steps: int = 4_000
    tokenizer_batch: int = 8
    vq_decoder_steps: int = 2_500
    autoencoder_steps: int = 1_800
    autoencoder_batch: int = 12
    guidance: float = 3.0
    calibration_images: int = 100
    janus_steps: int = 2_000
    janus_batch: int = 16
    decoder_steps: int = 6_000
    decoder_batch: int = 16
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """One build: its folder, device and recipe, and the scenes they imply."""

    folder: Path
    device: torch.device
    recipe: Recipe

    @cached_property
    def train_images(self) -> np.ndarray:
        return scene_images(self.folder, "train", self.recipe.train_scenes, size=self.recipe.size)

    @cached_property
    def train_facts(self) -> list[SceneFacts]:
        return scene_facts("train", self.recipe.train_scenes)

    @cached_property
    def held_out_images(self) -> np.ndarray:
        """Calibration scenes: held out from training, and not the test scenes that the tables are made of."""
        return scene_images(self.folder, "calibration", self.recipe.held_out_scenes, size=self.recipe.size)

    @cached_property
    def held_out_facts(self) -> list[SceneFacts]:
        return scene_facts("calibration", self.recipe.held_out_scenes)

    def batch(self, stage: int, step: int, size: int) -> np.ndarray:
        """Sorted indices [size] of the training scenes of one step, a function of (seed, stage, step)."""
        drawn = torch.randint(self.recipe.train_scenes, (size,), generator=generator(self.recipe.seed, stage, step))
        return np.sort(drawn.numpy())

    def autocast(self) -> torch.autocast:
        """bfloat16 autocast: 1.8 x faster than float32 for convolutions on CPUs with AVX-512 BF16."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16)
