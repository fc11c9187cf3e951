"""Training of pico's small latent decoder: it learns the autoencoder's pixels, stops, goes on and is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import dcdd_pico.train_cheap_decoder as stage
from dcdd_core.models.cheap_decoder import CheapDecoder, load_cheap_decoder
from dcdd_pico.build_context import BuildContext, Recipe
from dcdd_pico.embedded import CHEAP
from dcdd_pico.models import load_pico
from dcdd_pico.scenes import render_scene, scene_pixels
from tests.tiny import random_pico


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return random_pico(tmp_path_factory.mktemp("pico") / "weights")


def context(folder: Path, steps: int = 2) -> BuildContext:
    return BuildContext(folder=folder, device=torch.device("cpu"), recipe=Recipe(cheap_steps=steps))


@torch.no_grad()
def distance(model, weights: Path) -> float:
    """Of its pixels to the autoencoder's, on a scene that it was not trained on."""
    codec = load_pico(weights=weights, with_sampler=False).codec
    latents = codec.encode(scene_pixels(render_scene("test", 3, size=96).image[None]))
    return float(F.l1_loss(CheapDecoder(model)(codec.normalize(latents)), codec.decode(latents)))


def test_it_comes_nearer_to_the_autoencoder(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "_HELD_OUT", 1)
    one, more = (stage.train_cheap_decoder(context(tmp_path / str(n), n), weights) for n in (1, 12))
    assert distance(more, weights) < 0.9 * distance(one, weights)


def test_it_is_shown_latents_with_noise_and_what_the_autoencoder_makes_of_them(weights, tmp_path, monkeypatch):
    """The latents of a batch are those of its scenes with noise of no more than `_NOISE`, each with its own amount."""
    monkeypatch.setattr(stage, "_HELD_OUT", 1)
    codec, seen = load_pico(weights=weights, with_sampler=False).codec, []
    decode = stage.AutoencoderTiny.decode
    monkeypatch.setattr(stage.AutoencoderTiny, "decode", lambda self, z: seen.append(z) or decode(self, z))
    one = context(tmp_path, 1)
    stage.train_cheap_decoder(one, weights)
    clean = codec.normalize(codec.encode(one.fresh_pixels("train", 0, stage._BATCH)))
    amounts = (seen[0] - clean).std(dim=(1, 2, 3))
    assert (amounts > 0).all() and (amounts < 1.1 * stage._NOISE).all() and len(set(amounts.tolist())) == stage._BATCH
    assert torch.equal(seen[1], codec.normalize(codec.encode(one.fresh_pixels("calibration", 0, 1))))


def test_a_stopped_training_goes_on_and_is_written(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "_HELD_OUT", 1)
    train = stage.train
    monkeypatch.setattr(
        stage, "train", lambda *given, **options: train(*given, **options | {"save_every": 1, "evaluate_every": 1})
    )
    whole, render = stage.train_cheap_decoder(context(tmp_path / "a"), weights), BuildContext.fresh_pixels

    def stop(self, split, first, count):
        if (split, first) == ("train", stage._BATCH):
            raise KeyboardInterrupt
        return render(self, split, first, count)

    with monkeypatch.context() as patch:
        patch.setattr(BuildContext, "fresh_pixels", stop)
        with pytest.raises(KeyboardInterrupt):
            stage.train_cheap_decoder(context(tmp_path / "b"), weights)
    again = stage.train_cheap_decoder(context(tmp_path / "b"), weights)
    for (name, value), other in zip(whole.state_dict().items(), again.state_dict().values()):
        assert torch.equal(value, other), name

    folder = stage.save_cheap_decoder(weights, whole)
    assert folder == weights / CHEAP and sum(path.stat().st_size for path in folder.iterdir()) < 150_000
    assert len({path.stat().st_mode & 0o777 for path in folder.iterdir()}) == 1
    loaded = load_cheap_decoder(folder)
    loaded.require_for(load_pico(weights=weights, with_sampler=False).codec)
    z = torch.randn(1, 16, 24, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(z), CheapDecoder(whole.float())(z), atol=1e-2, rtol=1e-2)
