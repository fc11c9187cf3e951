"""The decoder's loss and its training."""

import contextlib
import shutil

import pytest
import torch

from dcdd_core.method.flow import interpolate, velocity
from dcdd_core.method.latents import pack
from dcdd_core.method.sampling import keyed_generator
from dcdd_core.training.decoder import DecoderTraining, Example, decoder_loss, train_decoder
from tests.tiny import tiny_condition, tiny_decoder


def example(batch=2):
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 16, 8, 8, generator=draw)
    return Example(
        latents=latents,
        condition=tiny_condition(batch),
        masked_latents=torch.zeros(1, 16, 8, 8),
        mask=torch.ones(1, 1, 16, 16),
    )


def test_the_loss_is_zero_for_the_true_velocity_and_its_square_for_none(monkeypatch):
    decoder, data, recipe = tiny_decoder(), example(), DecoderTraining(steps=1)
    seen = {}

    def truth(packed, condition, t, size):
        # z_t and z0 give the noise: n = (z_t - (1 - t) z0) / t
        z0, z_t, t = pack(data.latents), packed[..., :64], t[:, None, None]
        noise = (z_t - (1 - t) * z0) / t
        seen["target"] = noise - z0
        return seen["target"]

    monkeypatch.setattr(decoder, "forward", truth)
    assert float(decoder_loss(decoder, data, keyed_generator(1), recipe)) < 1e-8
    monkeypatch.setattr(decoder, "forward", lambda packed, *rest: torch.zeros_like(packed[..., :64]))
    zero = float(decoder_loss(decoder, data, keyed_generator(1), recipe))
    assert zero == pytest.approx(float(seen["target"].square().mean()), rel=1e-5)


def test_path_and_target_agree():
    z0, n = torch.randn(2, 4), torch.randn(2, 4)
    step = interpolate(z0, n, 0.75) - interpolate(z0, n, 0.25)
    torch.testing.assert_close(step / 0.5, velocity(z0, n))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_lowers_the_loss_on_one_batch(tmp_path, optimizer):
    decoder, data = tiny_decoder(), example()
    recipe = DecoderTraining(steps=60, learning_rate=3e-3, warmup=5, average_decay=0.5, optimizer=optimizer)
    fixed = DecoderTraining(steps=1)

    def loss(model):
        with torch.no_grad():
            return float(torch.stack([decoder_loss(model, data, keyed_generator(k), fixed) for k in range(8)]).mean())

    before = loss(decoder)
    trained = train_decoder(
        tmp_path, decoder, lambda i, draw: data, recipe, settings={}, autocast=contextlib.nullcontext
    )
    assert loss(trained) < 0.7 * before
    assert not any(p.requires_grad for p in trained.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, optimizer):
    recipe = DecoderTraining(steps=500, warmup=2, optimizer=optimizer)

    def run(folder, until):
        def examples(i, draw):
            if i == until:
                raise KeyboardInterrupt
            return example(1)

        with contextlib.suppress(KeyboardInterrupt):
            train_decoder(
                folder, tiny_decoder(), examples, recipe, settings={}, autocast=contextlib.nullcontext, save_every=4
            )

    for until in (6, 9):  # The first leaves the checkpoint of step 4.
        run(tmp_path / "resumed", until)
    run(tmp_path / "whole", 9)
    saved = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("resumed", "whole")]
    assert saved[0]["step"] == saved[1]["step"] == 8
    for part in ("model", "average"):
        for name, value in saved[0]["parts"][part].items():
            assert torch.equal(value, saved[1]["parts"][part][name]), name


def test_frozen_weights_stay(tmp_path):
    decoder = tiny_decoder()
    decoder.requires_grad_(False)
    decoder.adapter.requires_grad_(True)
    before = {k: v.clone() for k, v in decoder.state_dict().items()}
    trained = train_decoder(
        tmp_path,
        decoder,
        lambda i, draw: example(),
        DecoderTraining(steps=2, warmup=1),
        settings={},
        autocast=contextlib.nullcontext,
    )
    moved = {k for k, v in trained.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(name.startswith("adapter.") for name in moved)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile wants a C++ compiler on a CPU")
def test_compiled_training_is_the_plain_one_to_rounding(tmp_path):
    def train(compiled):
        recipe = DecoderTraining(steps=6, learning_rate=1e-3, warmup=1, compiled=compiled)
        folder = tmp_path / str(compiled)
        trained = train_decoder(
            folder, tiny_decoder(), lambda i, draw: example(), recipe, settings={}, autocast=contextlib.nullcontext
        )
        return trained.state_dict()

    plain, compiled = train(False), train(True)
    assert list(plain) == list(compiled)  # Names of a checkpoint do not depend on it.
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=2e-4, msg=name)
