"""Training of both sides of pico's autoencoder: deeper at first without a change, stopped, resumed, and written."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

import dcdd_pico.train_autoencoder as stage
from dcdd_core.models.vae import load_vae
from dcdd_core.training.log import read_log
from dcdd_pico import autoencoder_command
from dcdd_pico.build_context import BuildContext, Recipe
from dcdd_pico.export import MOST_BYTES
from dcdd_pico.image_losses import blemishes, fidelity
from dcdd_pico.scene_arrays import FreshImages
from dcdd_pico.train_autoencoder import autoencoder_config, deepened
from tests.pico.autoencoders import SIDE, make_often, same, scenes
from tests.pico.stopping import assert_same_logs, stopped_at
from tests.tiny import tiny_vae

SMALL = Recipe(
    size=SIDE, held_out_scenes=3, autoencoder_batch=2, autoencoder_steps=4, vae_decoder_layers=2, train_scenes=4
)


@pytest.fixture(autouse=True)
def often(monkeypatch):
    make_often(monkeypatch, stage, stage)


def context_of(folder: Path) -> BuildContext:
    return BuildContext(folder=folder, device=torch.device("cpu"), recipe=SMALL)


@pytest.mark.parametrize("half", [False, True])
@torch.no_grad()
def test_a_deeper_autoencoder_is_the_same_function_to_the_bit(vae, half):
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    deeper, pixels = deepened(vae, 3), scenes(0, 2)
    precision = torch.autocast("cpu", dtype=torch.bfloat16) if half else contextlib.nullcontext()
    with precision:
        one, other = (model.encode(pixels).latent_dist for model in (vae, deeper))
        assert torch.equal(one.mean, other.mean) and torch.equal(one.logvar, other.logvar)
        assert torch.equal(vae.decode(one.mean).sample, deeper.decode(one.mean).sample)
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())
    assert not deeper.training and not any(weight.requires_grad for weight in deeper.parameters())


def test_new_blocks_can_learn_in_the_decoder_and_are_empty_in_the_encoder(vae):
    deeper = deepened(vae, 2, seed=1)
    assert [len(block.resnets) for block in deeper.decoder.up_blocks] == [3, 3]
    assert [len(block.resnets) for block in deeper.encoder.down_blocks] == [2, 2]
    for block in deeper.decoder.up_blocks:
        assert block.resnets[-1].conv1.weight.std() > 0 and not block.resnets[-1].conv2.weight.any()
    for block in deeper.encoder.down_blocks:
        assert not block.resnets[-1].conv1.weight.any() and not block.resnets[-1].conv2.weight.any()
    assert same(deepened(deeper, 2), deeper) and same(deepened(vae, 2, seed=1), deeper)
    assert not same(deepened(vae, 2, seed=2), deeper)
    with pytest.raises(ValueError, match="has 2 layers a block and cannot get 1: choose at least as many"):
        deepened(deeper, 1)


@torch.no_grad()
def test_an_encoder_that_was_made_deeper_before_can_learn_later(vae):
    pixels, empty = scenes(0, 2), deepened(vae, 2)
    for start in (vae, empty):
        learning = deepened(start, 2, seed=3, encoder_learns=True)
        for block in learning.encoder.down_blocks:
            assert block.resnets[-1].conv1.weight.std() > 0 and not block.resnets[-1].conv2.weight.any()
        assert torch.equal(vae.encode(pixels).latent_dist.mean, learning.encode(pixels).latent_dist.mean)
        again = deepened(learning, 2, encoder_learns=True)
        assert same(again, learning), "blocks that have been drawn stay"


@pytest.mark.filterwarnings("ignore:.*")
def test_a_stopped_training_goes_on_exactly_and_moves_both_sides(vae, reader, tmp_path):
    start = deepened(vae, 2, encoder_learns=True)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    whole = stage.train_autoencoder(context_of(tmp_path / "a"), start, reader, ahead=False)
    with stopped_at(3, FreshImages):
        stage.train_autoencoder(context_of(tmp_path / "b"), start, reader, ahead=False)
    again = stage.train_autoencoder(context_of(tmp_path / "b"), start, reader, ahead=False)
    assert same(whole, again)
    assert_same_logs(tmp_path / "a" / stage.FOLDER, tmp_path / "b" / stage.FOLDER)
    after = whole.state_dict()
    assert all(torch.equal(before[name], value) for name, value in start.state_dict().items())
    still = [name for name, _ in start.named_parameters() if torch.equal(before[name], after[name])]
    # Behind a convolution that was zero at the first update nothing has a gradient until the second.
    assert not [name for name in still if ".resnets.1." not in name and ".resnets.2." not in name], still
    line = read_log(tmp_path / "a" / stage.FOLDER)[-1]
    with torch.no_grad():
        held_out = scenes(0, 3, "calibration")
        with context_of(tmp_path).autocast():
            mean = whole.encode(held_out).latent_dist.mean
            decoded = whole.decode(mean).sample.float().clamp(-1, 1)
        drift = (mean - start.encode(held_out).latent_dist.mean).square().mean().sqrt()
    expected = fidelity(held_out, decoded, reader) | blemishes(held_out, decoded)
    found = {name: line[f"eval/{name}"] for name in expected}
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert line["eval/drift of latents"] == pytest.approx(float(drift), rel=1e-2) and drift > 0
    with pytest.raises(ValueError, match="start"):  # another to begin with
        stage.train_autoencoder(context_of(tmp_path / "a"), deepened(vae, 2), reader, ahead=False)


def test_the_posterior_is_sampled_and_its_divergence_is_a_part_of_the_loss(vae, reader, tmp_path, monkeypatch):
    """A heavy divergence widens the posterior and pulls its mean to zero; without one it does neither as much."""
    monkeypatch.setattr(BuildContext, "autocast", lambda _: contextlib.nullcontext())
    pixels, found = scenes(0, 3, "calibration"), {}
    for weight in (0.0, 1e3):
        monkeypatch.setattr(stage, "_DIVERGENCE", weight)
        trained = stage.train_autoencoder(context_of(tmp_path / str(weight)), vae, reader, ahead=False)
        with torch.no_grad():
            posterior = trained.encode(pixels).latent_dist
        found[weight] = stage.kl_divergence(posterior.mean, posterior.logvar)
    assert found[1e3] < found[0.0]
    seen, decode = [], AutoencoderKL.decode

    def decoded(self, latents):
        seen.append(latents)
        return decode(self, latents)

    monkeypatch.setattr(AutoencoderKL, "decode", decoded)
    monkeypatch.setattr(stage, "train", lambda *_, step, **__: step(0))
    narrow = deepened(vae, 1)
    narrow.encoder.conv_out.bias[vae.config.latent_channels :] -= 4  # a posterior that is not as wide as its prior
    stage.train_autoencoder(context_of(tmp_path / "c"), narrow, reader, ahead=False)
    with torch.no_grad():
        posterior = narrow.encode(scenes(0, 2)).latent_dist
    noise = (seen[0].detach() - posterior.mean) / posterior.std
    assert noise.std() == pytest.approx(1, abs=0.1) and noise.mean() == pytest.approx(0, abs=0.1)


def test_nothing_is_compiled(vae, reader, tmp_path, monkeypatch):
    """A compiled `UpDecoderBlock2D` gave all layers before it a gradient of zero."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: pytest.fail("compiled"))
    monkeypatch.setattr(stage, "train", lambda *_, **__: None)
    context = replace(context_of(tmp_path), recipe=replace(SMALL, compiled=True))
    stage.train_autoencoder(context, vae, reader, ahead=False)


def test_latents_of_training_scenes_are_normalised(vae, tmp_path):
    model = deepened(vae, 1)
    stage.normalise(context_of(tmp_path), model)
    with torch.no_grad():
        latents = model.encode(scenes(0, 4)).latent_dist.mean
    scaled = (latents - model.config.shift_factor) * model.config.scaling_factor
    assert scaled.mean() == pytest.approx(0, abs=1e-4) and scaled.std() == pytest.approx(1, abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*")
def test_the_command_trains_on_what_is_there(vae, reader, tmp_path, monkeypatch, capsys):
    weights, folder = tmp_path / "weights", tmp_path / "weights" / "vae"
    (weights / "janus").mkdir(parents=True)
    deepened(tiny_vae(), 2).half().save_pretrained(folder)
    older = {"autoencoder_before": 5, "autoencoder_steps": 7, "vae_decoder_before": 2, "vae_decoder_steps": 9}
    Recipe(size=32, held_out_scenes=3, autoencoder_batch=2, train_scenes=4, guidance=2.5, **older).save(weights)
    before = load_vae(folder, dtype=torch.float32)
    real = stage.train_autoencoder
    monkeypatch.setattr(autoencoder_command, "train_loss_reader", lambda context: reader)
    monkeypatch.setattr(stage, "train_autoencoder", lambda *given, **options: real(*given, **options, ahead=False))
    options = {"--folder": tmp_path / "work", "--weights": weights, "--device": "cpu", "--steps": 4, "--layers": 2}
    monkeypatch.setattr(sys, "argv", ["a", *(str(part) for pair in options.items() for part in pair)])
    stage.main()
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)
    after = load_vae(folder, dtype=torch.float32)
    assert (after.config.layers_per_block, after.config.scaling_factor) == (2, before.config.scaling_factor)
    assert all(block.resnets[-1].conv2.weight.any() for block in after.encoder.down_blocks), "new blocks learn"
    recipe = Recipe.load(weights)
    assert (recipe.autoencoder_before, recipe.autoencoder_steps, recipe.guidance) == (5 + 7, 4, 2.5)
    assert (recipe.vae_decoder_before, recipe.vae_decoder_steps) == (2, 9)
    text = (folder / "README.md").read_text("utf-8")
    assert "both sides had 12 updates of 2 scenes, and the decoder alone\n11." in text
    assert "trained both sides for 4 updates of as many fresh scenes (8\nin all)" in text
    assert "train_autoencoder`" in text and "pass their input on" not in text and "| drift of latents |" in text
    assert (tmp_path / "work" / "autoencoder-curves.png").exists()


def test_the_recipes_autoencoder_is_small_and_begins_with_its_seed():
    one, other = stage.untrained(Recipe()), stage.untrained(Recipe(seed=1))
    assert one.config.layers_per_block == Recipe.vae_decoder_layers
    assert 2 * sum(weight.numel() for weight in one.parameters()) < 4e6 < MOST_BYTES
    assert same(one, stage.untrained(Recipe())) and not same(one, other)
    assert autoencoder_config()["layers_per_block"] == 1
