"""A student of pico's decoder: its scenes, its training from the weights that are there, its numbers and its bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

import dcdd_pico.train_student as stage
from dcdd_core.models.bundle import read_card
from dcdd_core.models.card import Distilled
from dcdd_core.training.batches import Batches, DataShard
from dcdd_core.training.log import read_log
from dcdd_pico.build_context import Recipe
from dcdd_pico.scenes import render_scene
from tests.tiny import random_pico


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    made = random_pico(tmp_path_factory.mktemp("pico") / "weights")
    replace(Recipe.load(made), decoder_batch=2).save(made)
    return made


def test_every_scene_comes_once_with_its_caption_whatever_the_number_of_processes():
    for world in (1, 2):
        seen = {}
        for rank in range(world):
            source = stage.FreshScenes("train", 32)
            stream = iter(Batches(source, size=2, shard=DataShard(rank=rank, world=world)))
            for _ in range(4 // world):
                batch = next(stream)
                seen |= dict(zip(batch.captions, batch.pixels, strict=True))
                assert batch.token_pixels is batch.pixels and batch.pixels.dtype == torch.uint8
        scenes = [render_scene("train", k, size=32) for k in range(8)]
        assert set(seen) == {scene.caption for scene in scenes}
        for scene in scenes:
            np.testing.assert_array_equal(seen[scene.caption].permute(1, 2, 0).numpy(), scene.image)


@pytest.mark.filterwarnings("ignore:the calibration of .* did not converge")
def test_it_learns_from_the_decoder_that_is_there_and_is_written(weights, tmp_path, monkeypatch, capsys):
    for name, value in {"_EVALUATED": 2, "_SHOWN": 1}.items():
        monkeypatch.setattr(stage, name, value)
    words = ["--folder", str(tmp_path), "--weights", str(weights), "--device", "cpu", "--no-compile"]

    def made(*more: str) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        stage.main([*words, "--updates", "1", *more])
        return Path(capsys.readouterr().out.splitlines()[-1])

    path = made()
    assert path == tmp_path / "student-2-trajectory.safetensors"
    card = read_card(path)
    assert (card.steps, card.shift) == (2, 1.0)
    assert card.distilled == Distilled(objective="trajectory", teacher_steps=4)
    (line,) = (line for line in read_log(tmp_path / "student-2-trajectory") if "eval/ssim" in line)
    names = {f"eval/{kind}{name}" for kind in ("", "vlm_") for name in ("to_teacher", "ssim", "teacher_perceptual")}
    assert names <= set(line) and line["eval/to_teacher"] < 1
    path = made("--student-steps", "1", "--objective", "consistency", "--vlm-conditions", "0", "--shift", "2")
    assert path.name == "student-1-consistency.safetensors" and read_card(path).shift == 2
    assert not [name for line in read_log(tmp_path / "student-1-consistency") for name in line if "vlm_" in name]
