"""What all stages of the build share: work folder, device, recipe and scenes."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dcdd_core.files import write_text
from dcdd_core.method.sampling import keyed_generator

from .embedded import WEIGHTS
from .scene_arrays import rendered, scene_images
from .scenes import SceneFacts, Split, scene_facts, scene_pixels

#: Default work folder of a build. Also where the decoders of the ablation, which are not shipped, are looked for.
WORK = Path.home() / ".cache" / "dcdd" / "pico"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyperparameters of the build. The defaults are for the next build; those of the shipped models are in the
    recipe.json beside them. Tests use smaller values.

    Attributes:
        autoencoder_before: earlier updates of both sides of the autoencoder, before the last `autoencoder_steps`.
        vae_decoder_layers: residual blocks of the autoencoder at each resolution; its decoder has one more.
        vae_decoder_before: earlier updates of that decoder alone, before the last `vae_decoder_steps`.
        janus_uses: how many times Janus' training uses each scene.
        janus_held_out: held-out scenes, and as many training scenes, in Janus' last evaluation; earlier evaluations use
            `held_out_scenes`.
        post_updates, post_vlm_share: updates of the decoder's last post-training (0 for none), and the share of its
            examples with Janus' own conditions.
        progressive_uses: how many times the masked sampler's training uses each scene.
        corruption_steps: updates of each sampler of `train_corruptions`.
        progressive_layers: how many of Janus' first layers the masked sampler starts from; all if Janus has fewer.
        compiled: see `training.config.OptimizationConfig.compile`.
    """

    size: int = 96
    train_scenes: int = 40_000
    held_out_scenes: int = 256
    reader_steps: int = 700
    tokenizer_steps: int = 4_000
    tokenizer_batch: int = 8
    vq_decoder_steps: int = 10_200
    autoencoder_steps: int = 2_400
    autoencoder_before: int = 0
    autoencoder_batch: int = 12
    vae_decoder_layers: int = 3
    vae_decoder_steps: int = 6_000
    vae_decoder_before: int = 0
    guidance: float = 3.0
    calibration_images: int = 100
    janus_layers: int = 6
    janus_width: int = 320
    janus_steps: int = 3_300
    janus_batch: int = 64
    janus_uses: int = 1
    janus_held_out: int = 4_096
    decoder_steps: int = 12_000
    decoder_batch: int = 16
    decoder_learning_rate: float = 2e-3
    decoder_shift: float = 1.5
    post_updates: int = 0
    post_vlm_share: float = 0.5
    choice_scenes: int = 1_024
    prior_steps: int = 1_500
    progressive_layers: int = 4
    progressive_steps: int = 3_200
    progressive_batch: int = 64
    progressive_uses: int = 1
    corruption_steps: int = 600
    llamagen_steps: int = 4_000
    llamagen_batch: int = 32
    llamagen_guidance: float = 1.5
    cheap_steps: int = 1_000
    variant_steps: int = 1_000
    variant_seeds: int = 3
    compiled: bool = False
    seed: int = 0

    @classmethod
    def defaults(cls, beginning: str) -> dict[str, Any]:
        """Defaults of the fields with this prefix; a recipe beside weights holds those the weights were made with."""
        return {field.name: field.default for field in fields(cls) if field.name.startswith(beginning)}

    def save(self, folder: Path) -> None:
        """Writes the recipe into the folder of the weights made with it."""
        write_text(folder / "recipe.json", json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Recipe:
        """Reads the recipe of the weights in a folder.

        Raises:
            ValueError: if it is missing or damaged.
        """
        try:
            return cls(**json.loads((folder / "recipe.json").read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{folder} holds no readable recipe.json ({error}): `make pico` writes one") from error


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """A build: its work folder, device and recipe, and the scenes that these determine."""

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
        """Scenes of the calibration split, used neither for training nor for the tables."""
        return scene_images(self.folder, "calibration", self.recipe.held_out_scenes, size=self.recipe.size)

    @cached_property
    def held_out_facts(self) -> list[SceneFacts]:
        return scene_facts("calibration", self.recipe.held_out_scenes)

    def fresh_pixels(self, split: Split, first: int, count: int) -> torch.Tensor:
        """Renders scenes first..first + count - 1 of a split: [count, 3, S, S] in -1..1."""
        return scene_pixels(rendered(split, first, count, self.recipe.size), self.device)

    def settings(self, *names: str, **more: Any) -> dict[str, Any]:
        """Everything a stage's result depends on, for its checkpoint: named fields of the recipe, and `more`."""
        common = ("size", "train_scenes", "seed")
        return {name: getattr(self.recipe, name) for name in (*common, *names)} | more

    def batch(self, stage: int, step: int, size: int) -> np.ndarray:
        """Sorted indices [size] of the training scenes of a step; they depend on (seed, stage, step) only."""
        drawn = torch.randint(
            self.recipe.train_scenes, (size,), generator=keyed_generator(self.recipe.seed, stage, step)
        )
        return np.sort(drawn.numpy())

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """bfloat16 autocast; on a CPU also PyTorch's math attention, which is faster there for such short sequences."""
        attention = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext()
        with torch.autocast(self.device.type, dtype=torch.bfloat16), attention:
            yield


def stage_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a command that trains a stage for existing weights."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--folder", type=Path, default=WORK, help="work folder")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def stage_context(chosen: argparse.Namespace, **changed: Any) -> BuildContext:
    """The build that made `chosen.weights`, with those recipe fields changed whose new value is not None.

    Raises:
        ValueError: as `Recipe.load`.
    """
    recipe = replace(
        Recipe.load(chosen.weights), **{name: value for name, value in changed.items() if value is not None}
    )
    return BuildContext(folder=chosen.folder, device=torch.device(chosen.device), recipe=recipe)


def digest(module: nn.Module) -> str:
    """Twelve hexadecimal digits of a hash of a module's weights, for the names of files derived from them."""
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]
