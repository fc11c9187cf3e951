"""Loads the embedded models: those of the generation pipeline, and the scene reader as a metric network."""

from __future__ import annotations

from pathlib import Path

import torch

from dcdd_core.evaluation.networks import FeatureNetwork, PerceptualNetwork
from dcdd_core.files import in_file
from dcdd_core.int8_rows import restored
from dcdd_core.models.checkpoints import fingerprint_of, load_strictly, read_tensors
from dcdd_core.pipelines.condition import serving
from dcdd_core.pipelines.load import LoadOptions, ModelPaths, Models, load_models
from dcdd_core.types import Calibration

from . import embedded
from .reader import SceneReader


def load_pico(
    *,
    device: torch.device | str = "cpu",
    weights: Path | None = None,
    with_sampler: bool = True,
    compiled: bool = False,
    vlm: str = embedded.JANUS,
) -> Models:
    """The embedded models, in float32. The decoder's card holds the calibration for the VLM.

    Args:
        weights: their folder; by default the shipped one.
        with_sampler, compiled: see `load_models`.
        vlm: see `embedded.model_paths`.

    Raises:
        ValueError: if the weights are missing.
    """
    paths = embedded.model_paths(weights, vlm=vlm)
    models = load_models(
        ModelPaths(**paths),
        LoadOptions(device=device, compiled=compiled),
        name=embedded.NAME if vlm == embedded.JANUS else None,  # the others' files name them
        with_sampler=with_sampler,
    )
    if (own := embedded.own_calibration(weights, vlm=vlm)) is not None:
        models.decoder.card = serving(models.decoder.card, calibration=Calibration.load(own))
    return models


def load_reader(*, device: torch.device | str = "cpu", weights: Path | None = None) -> SceneReader:
    """The scene reader, which classifies the facts of scenes and gives Frechet features and perceptual distances.

    Raises:
        ValueError: if its weights are missing.
    """
    with torch.device("meta"):
        reader = SceneReader()
    path = (weights or embedded.WEIGHTS) / "reader.safetensors"
    with in_file(path):
        tensors = restored(read_tensors(path, dtype=torch.float32, device=device), remedy="install the pack again")
    load_strictly(reader, tensors, str(path))
    return reader.eval().requires_grad_(False)


def feature_network(*, device: torch.device | str = "cpu") -> FeatureNetwork:
    """The scene reader's features, for Frechet distances between images of scenes.

    Raises:
        ValueError: as `load_reader`.
    """
    reader = load_reader(device=device)
    return FeatureNetwork(
        measure="Frechet",
        name="pico's scene reader",
        fingerprint=f"scene-reader-{fingerprint_of(reader.state_dict())}",
        features=torch.no_grad()(reader.frechet_features),
    )


def perceptual_network(*, device: torch.device | str = "cpu") -> PerceptualNetwork:
    """The scene reader's perceptual distance.

    Raises:
        ValueError: as `load_reader`.
    """
    reader = load_reader(device=device)
    return PerceptualNetwork(
        measure="perceptual",
        name="pico's scene reader",
        fingerprint=f"scene-reader-{fingerprint_of(reader.state_dict())}",
        distance=torch.no_grad()(reader.perceptual_distance),
    )
