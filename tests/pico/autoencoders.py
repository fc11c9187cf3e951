"""What the tests of both trainings of pico's autoencoder share: small scenes and networks."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from dcdd_pico.reader import SceneReader
from dcdd_pico.scene_arrays import rendered
from dcdd_pico.scenes import Split, scene_pixels
from tests.tiny import fill, tiny_vae

SIDE = 32


@pytest.fixture(scope="module")
def reader() -> SceneReader:
    return fill(SceneReader()).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return tiny_vae().eval().requires_grad_(False)


def make_often(monkeypatch: pytest.MonkeyPatch, module, stage) -> None:
    """`module.train` makes a checkpoint and an evaluation after every update; `stage` reads short blocks of scenes."""
    train = module.train
    every = {"save_every": 1, "evaluate_every": 1, "log_every": 1}
    monkeypatch.setattr(module, "train", lambda *given, **options: train(*given, **options | every))
    monkeypatch.setattr(stage, "_BLOCK", 3)


def scenes(first: int, count: int, split: Split = "train") -> torch.Tensor:
    return scene_pixels(rendered(split, first, count, SIDE), "cpu")


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether the weights are."""
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
