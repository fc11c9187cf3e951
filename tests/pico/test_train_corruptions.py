"""Masked samplers that differ in the wrong tokens of their training: what each learns from, and which compare."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dcdd_pico.train_corruptions as stage
import dcdd_pico.train_progressive as training
from dcdd_core.method.masked_modelling import CORRUPTIONS
from dcdd_core.models.masked.files import load_masked
from dcdd_pico import token_training
from dcdd_pico.build_context import BuildContext, Recipe
from dcdd_pico.corruption_variants import VARIANTS, Variant, trained_variants, variant_folder
from tests.tiny import random_pico

TINY = Recipe(held_out_scenes=4, progressive_layers=1, progressive_steps=2, progressive_batch=4)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return random_pico(tmp_path_factory.mktemp("pico") / "weights")


@pytest.mark.filterwarnings("ignore:.*")
def test_variants_differ_in_their_wrong_tokens_alone(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(token_training, "_BLOCK", 8)
    context = BuildContext(folder=tmp_path, device=torch.device("cpu"), recipe=TINY)
    learned, losses = {}, training.masked_losses

    def seen(network, example):
        state = [value.clone() for value in network.state_dict().values()]
        learned[name].append((example, state))
        return losses(network, example)

    monkeypatch.setattr(training, "masked_losses", seen)
    folders = {}
    for name in ("none", "nearest"):
        learned[name] = []
        folders[name] = stage.train_variant(context, weights, name, ahead=False)
    none, near = learned.values()
    assert all(torch.equal(a, b) for a, b in zip(none[0][1], near[0][1], strict=True)), "the same start"
    assert len(none) == len(near) == 3, "two updates and an evaluation"
    for (one, _), (other, _) in zip(none, near):
        assert torch.equal(one.tokens, other.tokens) and one.ids == other.ids, "the same scenes"
        assert torch.equal(one.hidden, other.hidden)
        assert not one.wrong.any() and other.wrong.any()
    assert (
        trained_variants(tmp_path, weights)
        == folders
        == {name: tmp_path / "corruptions" / name / "sampler" for name in ("none", "nearest")}
    )
    for name, folder in folders.items():
        assert load_masked(folder).name == f"pico progressive, {name}"
        held = Variant.load(folder)
        assert held == Variant.of(TINY, weights, name) and held.kinds == VARIANTS[name]
        assert (held.layers, held.updates, held.batch, held.uses, held.seed) == (1, 2, 4, 1, 0)
        assert (folder.parent / "log.jsonl").exists()
    monkeypatch.setattr(training, "masked_losses", lambda *_: 1 / 0)
    assert stage.train_variant(context, weights, "none", ahead=False) == folders["none"], "what is finished is restored"


def test_there_is_one_for_each_kind_one_for_all_and_one_for_none():
    assert dict(VARIANTS) == {"none": (), **{kind: (kind,) for kind in CORRUPTIONS}, "all": CORRUPTIONS}


def written(work: Path, weights: Path, name: str, **changed) -> None:
    folder = work / variant_folder(name)
    folder.mkdir(parents=True)
    replace(Variant.of(TINY, weights, name), **changed).save(folder)


@pytest.mark.parametrize(
    "changed, match",
    [
        (
            {"kinds": ("nearest",)},
            r"all.sampler was trained with nearest, expected shuffled, nearest, samples: move it",
        ),
        ({"start": "0"}, r"all.sampler started from another Janus than that of "),
        (
            {"updates": 3},
            r"all.sampler and .*none.sampler cannot be compared .*updates=3.*updates=2.*: train all alike",
        ),
        ({"seed": 1}, "cannot be compared"),
    ],
)
def test_variants_that_cannot_be_compared_are_refused(weights, tmp_path, changed, match):
    written(tmp_path, weights, "none")
    written(tmp_path, weights, "all", **changed)
    with pytest.raises(ValueError, match=match):
        trained_variants(tmp_path, weights)


def test_none_and_damaged_ones_are_told(weights, tmp_path):
    with pytest.raises(ValueError, match=r"holds none of none, shuffled, nearest, samples, all: .*train_corruptions"):
        trained_variants(tmp_path, weights)
    written(tmp_path, weights, "none")
    (tmp_path / variant_folder("none") / "variant.json").write_text("{}")
    with pytest.raises(ValueError, match=r"sampler holds no readable variant.json .*: move it away"):
        trained_variants(tmp_path, weights)


def test_the_command_trains_all_alike(weights, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        stage, "train_variant", lambda context, folder, name: asked.append((context.recipe, folder, name)) or name
    )
    monkeypatch.setattr(stage, "save_curves", lambda folder, names: folder)
    monkeypatch.setattr(sys, "argv", ["a", "--folder", str(tmp_path), "--weights", str(weights), "--no-compile"])
    Recipe(progressive_steps=9, progressive_batch=2, guidance=2.5, compiled=True).save(weights)
    stage.main()
    recipe = Recipe(progressive_steps=Recipe.corruption_steps, guidance=2.5)
    assert asked == [(recipe, weights, name) for name in VARIANTS], "the code's sizes, the rest as it was"
