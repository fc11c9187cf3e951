"""Training of a deeper decoder for pico's autoencoder: the latents stay, a run stops and goes on, and is written."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

import dcdd_pico.train_vae_decoder as stage
from dcdd_core.models.vae import load_vae
from dcdd_core.training.log import read_log
from dcdd_pico import autoencoder_command, gan_finetune, scene_arrays
from dcdd_pico.build_context import BuildContext, Recipe
from dcdd_pico.image_losses import blemishes, fidelity
from dcdd_pico.scene_arrays import FreshImages, rendered
from dcdd_pico.train_autoencoder import deepened
from tests.pico.autoencoders import SIDE, make_often, same, scenes
from tests.pico.stopping import assert_same_logs, stopped_at
from tests.tiny import tiny_vae

SMALL = Recipe(
    size=SIDE, held_out_scenes=3, autoencoder_batch=2, vae_decoder_steps=4, vae_decoder_layers=2, train_scenes=4
)


@pytest.fixture(autouse=True)
def often(monkeypatch):
    make_often(monkeypatch, gan_finetune, stage)


def context_of(folder: Path) -> BuildContext:
    return BuildContext(folder=folder, device=torch.device("cpu"), recipe=SMALL)


@pytest.mark.filterwarnings("ignore:.*")
def test_a_stopped_training_goes_on_exactly_and_moves_the_decoder_alone(vae, reader, tmp_path):
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    whole = stage.train_vae_decoder(context_of(tmp_path / "a"), vae, reader, ahead=False)
    with stopped_at(3, FreshImages):
        stage.train_vae_decoder(context_of(tmp_path / "b"), vae, reader, ahead=False)
    again = stage.train_vae_decoder(context_of(tmp_path / "b"), vae, reader, ahead=False)
    assert same(whole, again)
    assert_same_logs(tmp_path / "a" / stage.FOLDER, tmp_path / "b" / stage.FOLDER)
    first = read_log(tmp_path / "a" / stage.FOLDER)
    assert ["fooling" in line for line in first] == [False, False, False, True], "the discriminator joins at the end"

    start = deepened(vae, SMALL.vae_decoder_layers, seed=SMALL.seed + stage._STAGE)
    assert same(start.encoder, whole.encoder)
    after = whole.decoder.state_dict()
    assert not [name for name, weight in start.decoder.named_parameters() if torch.equal(weight, after[name])]
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())
    with torch.no_grad():
        held_out = scenes(0, 3, "calibration")
        assert torch.equal(vae.encode(held_out).latent_dist.mean, whole.encode(held_out).latent_dist.mean)
        with context_of(tmp_path).autocast():
            means = whole.encode(held_out).latent_dist.mean.float()
            decoded = whole.decode(means).sample.float().clamp(-1, 1)
    expected = fidelity(held_out, decoded, reader) | blemishes(held_out, decoded)
    found = {name: first[-1][f"eval/{name}"] for name in expected}
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


@torch.no_grad()
def test_each_scene_is_shown_once_with_some_share_of_its_posterior_s_noise(vae, reader, tmp_path, monkeypatch):
    kept = {}
    monkeypatch.setattr(stage, "train_with_gan", lambda *given, **options: kept.update(options))
    monkeypatch.setattr(BuildContext, "autocast", lambda _: contextlib.nullcontext())
    stage.train_vae_decoder(context_of(tmp_path), vae, reader, ahead=False)
    shares = []
    for i in range(3):
        pixels, latents = kept["examples"](i)
        assert torch.equal(pixels, scenes(2 * i, 2))
        posterior = vae.encode(pixels).latent_dist
        shares.append(((latents - posterior.mean) / posterior.std).std((1, 2, 3)))
    shares = torch.cat(shares)
    assert (shares < 1.1).all() and shares.std() > 0.1
    assert kept["alone"] == 3 and kept["last"].shape[0] == 3


def test_nothing_is_compiled(vae, reader, tmp_path, monkeypatch):
    """See `train_autoencoder`."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: pytest.fail("compiled"))
    monkeypatch.setattr(stage, "train_with_gan", lambda *_, **__: None)
    context = replace(context_of(tmp_path), recipe=replace(SMALL, compiled=True))
    stage.train_vae_decoder(context, vae, reader, ahead=False)


@pytest.mark.filterwarnings("ignore:.*")
def test_the_command_replaces_the_decoder_and_keeps_the_encoder(vae, reader, tmp_path, monkeypatch, capsys):
    weights, folder = tmp_path / "weights", tmp_path / "weights" / "vae"
    (weights / "janus").mkdir(parents=True)
    tiny_vae().half().save_pretrained(folder)
    older = {"vae_decoder_steps": 7, "vae_decoder_before": 3, "guidance": 2.5}
    Recipe(size=32, held_out_scenes=3, autoencoder_batch=2, train_scenes=4, **older).save(weights)
    before = load_vae(folder, dtype=torch.float32)
    real = stage.train_vae_decoder
    monkeypatch.setattr(autoencoder_command, "train_loss_reader", lambda context: reader)
    monkeypatch.setattr(stage, "train_vae_decoder", lambda *given: real(*given, ahead=False))
    options = {"--folder": tmp_path / "work", "--weights": weights, "--device": "cpu", "--steps": 2, "--layers": 2}
    monkeypatch.setattr(sys, "argv", ["a", *(str(part) for pair in options.items() for part in pair)])
    stage.main()
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)
    after = load_vae(folder, dtype=torch.float32)
    assert after.config.layers_per_block == 2
    plain = dict(AutoencoderKL.from_pretrained(folder).config)
    del plain["_name_or_path"]
    assert plain == dict(after.config)
    for name, value in before.encoder.state_dict().items():
        assert torch.equal(value, after.encoder.state_dict()[name]), name
    assert after.config.scaling_factor == before.config.scaling_factor == 0.5
    with torch.no_grad():
        pixels = scenes(0, 1, "calibration")
        latents = before.encode(pixels).latent_dist.mean
        assert torch.equal(latents, after.encode(pixels).latent_dist.mean)
        assert not torch.equal(before.decode(latents).sample, after.decode(latents).sample)
    recipe = Recipe.load(weights)
    assert (recipe.vae_decoder_steps, recipe.vae_decoder_layers, recipe.guidance) == (2, 2, 2.5)
    assert recipe.vae_decoder_before == 7 + 3, "those of the decoder before, which count as its training too"
    text = (folder / "README.md").read_text("utf-8")
    assert "both sides had 2,400 updates of 2 scenes, and the decoder alone\n10." in text
    assert "trained the decoder alone for 2 updates of as many fresh scenes (4\nin all)" in text
    assert "| tint of greys |" in text and "2 layers a block" in text
    assert "only pass their input on, at each resolution: 1 of 2." in text
    assert (tmp_path / "work" / "vae-decoder-curves.png").exists()
    assert len({path.stat().st_mode & 0o777 for path in folder.iterdir()}) == 1
    # The decoder that was trained is there now: a second training of it is not the first one resumed.
    with pytest.raises(ValueError, match="autoencoder"):
        stage.main()


def test_scenes_come_in_their_order_over_blocks():
    expected = rendered("train", 0, 8, 16)
    for ahead in (False, True):
        images = FreshImages("train", 16, block=3, ahead=ahead)
        try:
            assert np.array_equal(np.concatenate([images.batch(i, 4) for i in (0, 1)]), expected)
            assert np.array_equal(images.batch(0, 4), expected[:4]), "after a later one, as in a resumed run"
        finally:
            images.close()


def test_after_the_last_block_comes_the_first(monkeypatch):
    monkeypatch.setattr(scene_arrays, "SPLIT_SIZE", 6)
    images = FreshImages("train", 16, block=3, ahead=False)
    assert np.array_equal(images.batch(1, 6), rendered("train", 0, 6, 16))
