"""GAN fine-tuning: the losses by hand, the adaptive weight, and which way a step moves each network."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

from dcdd_pico import gan_finetune
from dcdd_pico.build_context import BuildContext, Recipe
from dcdd_pico.gan_finetune import (
    PatchDiscriminator,
    adaptive_weight,
    adversarial_ramp,
    discriminator_loss,
    finetune_with_gan,
    generator_loss,
    train_with_gan,
)


def test_the_discriminator_s_hinge_loss_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert float(discriminator_loss(real, fake)) == pytest.approx((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3)
    assert float(discriminator_loss(torch.full((4,), 1.5), torch.full((4,), -1.5))) == 0  # right by the margin
    assert float(discriminator_loss(torch.full((4,), -1.0), torch.full((4,), 1.0))) == 4  # wrong both times


def test_the_generator_wants_high_scores():
    fake = torch.tensor([-3.0, 1.0], requires_grad=True)
    loss = generator_loss(fake)
    loss.backward()
    assert float(loss.detach()) == 1 and fake.grad.tolist() == [-0.5, -0.5]


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms():
    last = nn.Parameter(torch.tensor([3.0, 4.0]))
    first, second = (last * torch.tensor([3.0, 4.0])).sum(), (last * torch.tensor([0.0, 0.5])).sum()
    assert float(adaptive_weight(first, second, last)) == pytest.approx(5 / 0.5, rel=1e-5)
    assert float(adaptive_weight(first, 0 * second, last)) == 1000


def test_the_ramp_reaches_a_quarter_after_a_twentieth_of_the_steps():
    assert [adversarial_ramp(i, 100) for i in (0, 1, 4, 5, 99)] == pytest.approx([0, 0.05, 0.2, 0.25, 0.25])
    assert adversarial_ramp(1, 2) == 0.25 and adversarial_ramp(0, 2) == 0


def test_the_discriminator_scores_patches():
    assert PatchDiscriminator()(torch.zeros(2, 3, 96, 96)).shape == (2, 1, 12, 12)


class Brightness(nn.Module):
    """A discriminator whose score of an image is a multiple of its mean value."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, pixels):
        return self.scale * pixels.mean((1, 2, 3))


def test_steps_move_the_decoder_to_higher_scores_and_the_discriminator_to_tell_images_apart(tmp_path, monkeypatch):
    kept = {}
    monkeypatch.setattr(gan_finetune, "PatchDiscriminator", Brightness)
    monkeypatch.setattr(gan_finetune, "train", lambda folder, *, step, state, **_: kept.update(step=step, **state))
    # It pulls on the first two channels alone, in opposite directions: the third moves by the GAN loss.
    monkeypatch.setattr(gan_finetune, "reconstruction_loss", lambda _, y, *rest: ((y[:, 0] - y[:, 1]).mean(), {}))
    monkeypatch.setattr(BuildContext, "train_images", np.full((8, 96, 96, 3), 255, np.uint8))
    monkeypatch.setattr(BuildContext, "autocast", lambda _: contextlib.nullcontext())
    context = BuildContext(folder=tmp_path, device=torch.device("cpu"), recipe=Recipe(train_scenes=8))
    decoder = nn.Conv2d(3, 3, 1)
    nn.init.zeros_(decoder.weight)
    nn.init.zeros_(decoder.bias)
    finetune_with_gan(
        context,
        "gan",
        1,
        decoder,
        last=decoder.weight,
        encode=lambda pixels, _: pixels,
        decode=lambda network, encoded: network(encoded),
        steps=1000,
        batch=2,
        settings={},
        loss_reader=None,
        evaluate=lambda _: {},
    )
    logs = kept["step"](500)
    assert float(logs["fooling"]) == 0  # decoded images are 0
    assert float(logs["adversary"]) == pytest.approx(0.5 + 1, abs=1e-3)  # scores 0.5 of real images, 0 of decoded ones
    assert float(kept["adversary"].scale.detach()) > 0.5
    assert decoder.bias[0] < 0 < decoder.bias[2] and decoder.bias[2] < decoder.bias[1] * 1.01
    assert float(kept["step"](501)["fooling"]) < 0


def test_the_discriminator_joins_after_a_number_of_updates(tmp_path, monkeypatch):
    kept, asked = {}, []
    monkeypatch.setattr(gan_finetune, "PatchDiscriminator", Brightness)

    def train(folder, *, step, state, **_):
        for i in (100, 101):
            step(i)
        kept.update(step=step, **state)
        kept["raw"] = [weight.detach().clone() for weight in state["model"].parameters()]

    monkeypatch.setattr(gan_finetune, "train", train)
    monkeypatch.setattr(
        gan_finetune, "reconstruction_loss", lambda x, y, *rest: ((y - x).square().mean(), {"l": y.sum()})
    )
    monkeypatch.setattr(BuildContext, "autocast", lambda _: contextlib.nullcontext())
    ramp = gan_finetune.adversarial_ramp
    monkeypatch.setattr(gan_finetune, "adversarial_ramp", lambda i, steps: asked.append((i, steps)) or ramp(i, steps))
    context = BuildContext(folder=tmp_path, device=torch.device("cpu"), recipe=Recipe())
    decoder, target = nn.Conv2d(1, 3, 1), torch.full((1, 3, 4, 4), 0.5)
    optimizers = {
        "optimizer": torch.optim.SGD([decoder.bias], lr=0.0),
        "muon": torch.optim.SGD([decoder.weight], lr=0.0),
    }
    train_with_gan(
        context,
        "gan",
        1,
        decoder,
        last=decoder.weight,
        examples=lambda i: (target, (torch.full((1, 1, 4, 4), float(i)), "more")),
        decode=lambda network, given: network(given[0]),
        optimizers=optimizers,
        peak=0.1,
        steps=1000,
        alone=300,
        settings={},
        loss_reader=None,
        evaluate=lambda _: {},
    )
    raw = kept.pop("raw")
    assert set(kept) == {"step", "model", "adversary", "ema", "adversary_optimizer", *optimizers}
    average = kept["ema"].full()
    assert all(torch.equal(weight, average[name]) for name, weight in decoder.named_parameters())
    assert all(not torch.equal(weight, last) for weight, last in zip(decoder.parameters(), raw)), (
        "not the last update's"
    )
    weights = [weight.detach().clone() for weight in decoder.parameters()]
    logs = kept["step"](299)
    assert set(logs) == {"l"} and not asked and float(kept["adversary"].scale.detach()) == 0.5
    assert all(not torch.equal(a, b) for a, b in zip(weights, decoder.parameters()))
    rates = {optimizer.param_groups[0]["lr"] for optimizer in optimizers.values()}
    assert rates == {gan_finetune.warmup_cosine(299, 1000, peak=0.1, warmup=100)}
    logs = kept["step"](300)
    assert set(logs) == {"l", "fooling", "adversary"} and asked == [(0, 1000)]
    assert float(kept["adversary"].scale.detach()) != 0.5
