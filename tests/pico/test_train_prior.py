"""Training of pico's prior: it learns scenes without their condition, stops, goes on and is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dcdd_pico.train_prior as stage
from dcdd_core.method.flow import sample_times
from dcdd_core.method.sampling import keyed_generator
from dcdd_core.models.adapter import NullCondition
from dcdd_core.models.bundle import DecoderOptions, load_decoder
from dcdd_pico.build_context import BuildContext, Recipe
from dcdd_pico.embedded import PRIOR
from dcdd_pico.models import load_pico
from dcdd_pico.prior import load_prior
from tests.tiny import random_pico


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return random_pico(tmp_path_factory.mktemp("pico") / "weights")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(stage, "_BATCH", 2)
    monkeypatch.setattr(stage, "_EVALUATED", 2)
    monkeypatch.setattr(stage, "_RANK", 3)


def context(folder: Path, steps: int = 3) -> BuildContext:
    return BuildContext(folder=folder, device=torch.device("cpu"), recipe=Recipe(prior_steps=steps))


def test_it_is_shown_scenes_on_a_blank_canvas_and_no_condition(weights, tmp_path, monkeypatch):
    seen, losses = [], stage.velocity_losses

    def watched(decoder, example, t, noise, weighting):
        seen.append((decoder.adapter, example, t, noise, weighting))
        return losses(decoder, example, t, noise, weighting)

    monkeypatch.setattr(stage, "velocity_losses", watched)
    one = context(tmp_path, 1)
    difference = stage.train_prior(one, weights)
    codec = load_pico(weights=weights, with_sampler=False).codec
    for (adapter, example, t, noise, weighting), (split, key) in zip(seen, (("train", (0,)), ("calibration", ()))):
        assert isinstance(adapter, NullCondition) and adapter.token is difference.token and weighting == "uniform"
        torch.testing.assert_close(example.latents, codec.normalize(codec.encode(one.fresh_pixels(split, 0, 2))))
        torch.testing.assert_close(example.masked_latents, codec.normalize(codec.encode(torch.zeros(1, 3, 96, 96))))
        assert example.mask.shape == (1, 1, 96, 96) and (example.mask == 1).all()
        draw = keyed_generator(one.recipe.seed, stage._STAGE, *key)
        assert torch.equal(t, sample_times(2, generator=draw))
        assert torch.equal(noise, torch.randn(noise.shape, generator=draw))
    assert len(seen) == 2


def test_a_stopped_training_goes_on_and_is_written(weights, tmp_path, monkeypatch):
    train, evaluated = stage.train, []

    def often(*given, **options):
        evaluate = options["evaluate"]
        options |= {
            "save_every": 1,
            "evaluate_every": 1,
            "evaluate": lambda i: evaluated.append(evaluate(i)) or evaluated[-1],
        }
        return train(*given, **options)

    monkeypatch.setattr(stage, "train", often)
    whole, render = stage.train_prior(context(tmp_path / "a"), weights), BuildContext.fresh_pixels
    assert len({one["loss"] for one in evaluated}) == 3

    def stop(self, split, first, count):
        if (split, first) == ("train", 2 * stage._BATCH):
            raise KeyboardInterrupt
        return render(self, split, first, count)

    with monkeypatch.context() as patch:
        patch.setattr(BuildContext, "fresh_pixels", stop)
        with pytest.raises(KeyboardInterrupt):
            stage.train_prior(context(tmp_path / "b"), weights)
    again = stage.train_prior(context(tmp_path / "b"), weights)
    for (name, value), other in zip(whole.state_dict().items(), again.state_dict().values()):
        assert torch.equal(value, other), name

    # Merged into the decoder of these weights, and no other: the difference alone was trained.
    before = load_decoder(weights / "decoder.safetensors", options=DecoderOptions(dtype=torch.float32, fold=False))
    whole.save(weights / PRIOR)
    after = load_prior(weights=weights)
    changed = {
        name
        for name, layer in after.transformer.named_modules()
        if isinstance(layer, torch.nn.Linear)
        and not torch.equal(layer.weight, before.transformer.get_submodule(name).weight)
    }
    assert changed == {name.replace("/", ".") for name in whole.layers}
    torch.testing.assert_close(after.adapter.token, whole.token, rtol=1e-3, atol=1e-3)


def test_another_decoder_does_not_go_on(weights, tmp_path, monkeypatch):
    stage.train_prior(context(tmp_path, 1), weights)
    monkeypatch.setattr(stage, "digest", lambda module: "another")
    with pytest.raises(ValueError, match="decoder"):
        stage.train_prior(context(tmp_path, 1), weights)
