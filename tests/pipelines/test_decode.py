"""Condition -> image: seeds, localised decoding, stopping, and refusals."""

import warnings
from dataclasses import replace

import pytest
import torch

from dcdd_core.method.flow import resolution_shift
from dcdd_core.method.latents import pack, pack_mask, scale_latents
from dcdd_core.models.card import Distilled
from dcdd_core.models.vae import KLCodec
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.pipelines.decode import _require_finite, decode, pixels_of
from dcdd_core.pipelines.guided import GuidanceOptions, token_guide
from dcdd_core.types import Condition, DCDDWarning
from tests.streamed import stream
from tests.tiny import tiny_condition, tiny_decoder, tiny_vae, tiny_vq


@pytest.fixture(scope="module")
def models():
    return tiny_decoder(), KLCodec(tiny_vae())


def one(condition, k):
    return Condition(
        condition.code_vectors[k : k + 1], condition.uncertainty[k : k + 1], condition.grid, codebook=condition.codebook
    )


def test_a_batch_is_its_singles(models):
    condition = tiny_condition(3)
    batch = decode(*models, condition, seeds=[5, 6, 5]).pixels
    assert batch.shape == (3, 3, 16, 16) and batch.abs().max() <= 1
    for k, seed in enumerate([5, 6, 5]):
        torch.testing.assert_close(batch[k : k + 1], decode(*models, one(condition, k), seeds=[seed]).pixels)
    assert (batch[0] - decode(*models, one(condition, 0), seeds=[9]).pixels[0]).abs().max() > 0.01


def test_images_go_through_the_autoencoder_one_by_one(models):
    decoder, vae = models
    sizes = []

    class Watched:
        def encode(self, pixels):
            sizes.append(len(pixels))
            return vae.encode(pixels)

        def decode(self, latents):
            sizes.append(len(latents))
            return vae.decode(latents)

        normalize, denormalize = vae.normalize, vae.denormalize

    image, mask = torch.zeros(3, 3, 16, 16), torch.ones(1, 1, 16, 16)
    decode(decoder, Watched(), tiny_condition(3), seeds=[5, 6, 7], steps=1, image=image, mask=mask)
    assert sizes == [1] * 6


def test_the_global_generator_is_left_alone(models):
    condition, state = tiny_condition(1), torch.random.get_rng_state()
    decode(*models, condition, seeds=[1])
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_shift_comes_from_the_card(models):
    decoder, vae = models
    condition = tiny_condition(1)

    def painted(shift=None):
        return decode(decoder, vae, condition, seeds=[0], shift=shift).latents

    torch.testing.assert_close(painted(), painted(resolution_shift(16)), rtol=0, atol=0)
    card = decoder.card
    try:
        decoder.card = replace(card, shift=2.0)
        torch.testing.assert_close(painted(), painted(2.0), rtol=0, atol=0)
        assert (painted() - painted(resolution_shift(16))).abs().max() > 1e-3
    finally:
        decoder.card = card


def test_steps_come_from_the_card_and_are_reported(models):
    seen = []
    decode(*models, tiny_condition(1), seeds=[0], on_step=lambda i, n, z: seen.append((i, n, tuple(z.shape))))
    assert seen == [(i, 3, (1, 16, 8, 8)) for i in (1, 2, 3)]


@pytest.mark.parametrize("shift", [None, 1.5])
def test_a_student_paints_in_the_steps_it_was_made_for_and_warns_of_others(models, shift):
    vae, condition = models[1], tiny_condition(2)
    student = tiny_decoder(steps=2, shift=shift, distilled=Distilled(objective="trajectory", teacher_steps=10))
    own = resolution_shift(16) if shift is None else shift

    def painted(**options):
        seen = []
        decode(student, vae, condition, seeds=[0, 1], on_step=lambda i, n, z: seen.append((i, n)), **options)
        return seen

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({}, {"steps": 2}, {"shift": own}):
            assert painted(**options) == [(1, 2), (2, 2)]
        decode(*models, condition, seeds=[0, 1], steps=7, shift=9.0)  # of another decoder
    for options, words in (
        ({"steps": 3}, f"made for 2 steps from noise at shift {own:g}, and is to paint with 3 steps: its images"),
        ({"shift": 0.0}, "to paint with shift 0: its images will be worse"),
        ({"steps": 1, "shift": -1.0}, "to paint with 1 steps, shift -1: its"),
    ):
        with pytest.warns(DCDDWarning, match=words) as told:
            assert len(painted(**options)) == options.get("steps", 2)
        assert len(told) == 1 and told[0].filename == __file__


def test_a_student_warns_of_another_start(models):
    student = tiny_decoder(steps=2, distilled=Distilled(objective="trajectory", teacher_steps=10))
    condition, vae = tiny_condition(1), models[1]
    tokenizer, options = VQTokenizer(tiny_vq(), name="tiny"), GuidanceOptions(strength=0.1)
    guide = token_guide(tokenizer, vae, condition, scale=25.0, options=options, size=(16, 16))
    with pytest.warns(DCDDWarning, match="to paint with start 0.5: its"):
        decode(student, vae, condition, seeds=[0], guide=guide, start=0.5)


def test_the_last_estimate_is_the_result(models):
    seen = []
    result = decode(*models, tiny_condition(1), seeds=[0], steps=4, on_step=lambda i, n, z: seen.append(z))
    torch.testing.assert_close(seen[-1], result.latents)
    torch.testing.assert_close(models[1].decode(result.latents), result.pixels)


def test_a_callback_stops_it_and_the_next_run_works(models):
    class Stop(Exception):
        pass

    def on_step(i, n, z):
        if i == 2:
            raise Stop

    with pytest.raises(Stop):
        decode(*models, tiny_condition(1), seeds=[0], on_step=on_step)
    assert decode(*models, tiny_condition(1), seeds=[0]).pixels.shape == (1, 3, 16, 16)


def test_localised_decoding_keeps_the_rest_to_the_last_bit(models):
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    mask[..., 4, 4] = 0.5
    result = decode(*models, tiny_condition(2), seeds=[0, 1], image=image, mask=mask).pixels
    outside = (mask == 0).expand_as(result)
    assert torch.equal(result[outside], image.expand_as(result)[outside])
    assert (result - image)[..., 5:11, 5:11].abs().mean() > 0.01


def test_the_masked_picture_reaches_the_model_blank_where_it_is_painted(models, monkeypatch):
    decoder, vae = models
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8, :] = 1
    seen = []
    forward = type(decoder).forward

    def watch(packed, context, *rest):
        seen.append(context)
        return forward(decoder, packed, context, *rest)

    monkeypatch.setattr(decoder, "forward", watch)
    decode(decoder, vae, tiny_condition(1), seeds=[0], steps=1, image=image, mask=mask)
    decode(decoder, vae, tiny_condition(1), seeds=[0], steps=1)
    for context, area, canvas in zip(
        seen, (mask, torch.ones_like(mask)), (image * (1 - mask), torch.zeros_like(image))
    ):
        given = pack(scale_latents(vae.encode(canvas), 0.1, 0.5))
        torch.testing.assert_close(context[..., :64], given)
        torch.testing.assert_close(context[..., 64:], pack_mask(area, 2))


def test_what_does_not_fit_is_refused(models):
    condition = tiny_condition(2)
    image, mask = torch.zeros(1, 3, 16, 16), torch.ones(1, 1, 16, 16)
    for arguments, words in (
        ({"seeds": [1]}, "1 seeds for 2 images"),
        ({"seeds": [1, 2], "image": image}, "both, or neither"),
        ({"seeds": [1, 2], "image": image, "mask": mask[..., :8]}, r"expected \[2 or 1, 1, 16, 16\]"),
        ({"seeds": [1, 2], "steps": 0}, r"steps must be a whole number in 1\.\.1,000, got 0"),
        ({"seeds": [1, 2], "steps": 10**9}, r"steps must be a whole number in 1\.\.1,000, got 1000000000"),
        ({"seeds": [1, 2], "image": image + torch.nan, "mask": mask}, "the image holds NaN or infinity: give one of"),
        ({"seeds": [1, 2], "image": image, "mask": mask * torch.inf}, "the mask holds NaN or infinity: give one of"),
    ):
        with pytest.raises(ValueError, match=words):
            decode(*models, condition, **arguments)
    foreign = Condition(
        condition.code_vectors, condition.uncertainty, condition.grid, codebook="64x8:" + "+9.000," * 7 + "+9.000"
    )
    with pytest.raises(ValueError, match="use the tokenizer and VLM"):
        decode(*models, foreign, seeds=[1, 2])
    narrow = Condition(condition.code_vectors[..., :4], condition.uncertainty, condition.grid)
    with pytest.raises(ValueError, match="4-dimensional"):
        decode(*models, narrow, seeds=[1, 2])


class Breaking(torch.nn.Module):
    """A decoder whose velocity is wrong in one step."""

    def __init__(self, decoder, step, value):
        super().__init__()
        self.decoder, self.step, self.value, self.calls = decoder, step, value, 0

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "decoder" else getattr(self.decoder, name)

    def forward(self, *args):
        self.calls += 1
        v = self.decoder(*args)
        if self.calls == self.step:
            v[0, 3, 5] = self.value
        return v


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("step", [1, 2, 4])
def test_latents_that_are_not_finite_end_with_the_step(models, step, value):
    decoder, codec = models
    breaking = Breaking(decoder, step, value)
    with pytest.raises(ValueError, match=f"latents became NaN or infinite in step {step}: its weights are damaged"):
        decode(breaking, codec, tiny_condition(2), seeds=[1, 2], steps=4)
    assert breaking.calls == step


def test_half_precision_that_overflows_is_told_of_float32(models):
    weak = tiny_decoder().half()
    with torch.no_grad():
        weak.transformer.proj_out.weight.mul_(1e4)
        weak.transformer.proj_out.bias.fill_(6e4)
    with pytest.raises(ValueError, match="in step 1: it computes in float16: load it in float32; or else its weights"):
        decode(weak, models[1], tiny_condition(1), seeds=[1], steps=4)


def test_on_a_device_that_computes_ahead_the_first_step_is_named():
    finite = [torch.tensor(x) for x in (True, True, False, True, False)]
    with pytest.raises(ValueError, match="in step 3"):
        _require_finite(finite, torch.float32)
    _require_finite(finite[:2], torch.float32)


def test_an_autoencoder_that_overflows_is_named(models):
    decoder, _ = models
    for value in (torch.nan, torch.inf):
        vae = tiny_vae()
        with torch.no_grad():
            vae.decoder.conv_out.bias[1] = value
        with pytest.raises(ValueError, match="autoencoder decodes .* NaN or infinity.*load it in float32"):
            decode(decoder, KLCodec(vae), tiny_condition(1), seeds=[1], steps=1)
        seen = KLCodec(vae).preview(torch.zeros(1, 16, 8, 8))  # A preview is no result.
        assert seen.shape == (1, 3, 16, 16)
        vae = tiny_vae()
        with torch.no_grad():
            vae.encoder.conv_out.bias[1] = value
        with pytest.raises(ValueError, match="latents of the image to keep hold NaN or infinity.*float32"):
            decode(decoder, KLCodec(vae), tiny_condition(1), seeds=[1], steps=1)


def test_a_codec_of_a_host_is_checked_too(models):
    class Broken:
        def decode(self, latents):
            return torch.full((1, 3, 16, 16), torch.nan)

    with pytest.raises(ValueError, match="decodes the latents to NaN or infinity: load it in float32"):
        pixels_of(Broken(), torch.zeros(1, 16, 8, 8))
    with pytest.raises(ValueError, match="latents hold NaN or infinity, and cannot become an image"):
        pixels_of(models[1], torch.full((1, 16, 8, 8), torch.inf))


def test_each_image_is_blended_by_its_own_mask(models):
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    mask = torch.tensor([0.0, 0.25, 1.0])[torch.randint(3, (2, 1, 16, 16), generator=generator)]
    made = decode(*models, tiny_condition(2), seeds=[0, 1], image=image, mask=mask)
    painted = models[1].decode(made.latents)
    torch.testing.assert_close(made.pixels, mask * painted + (1 - mask) * image)
    assert torch.equal(made.pixels[(mask == 0).expand_as(image)], image[(mask == 0).expand_as(image)])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_host_may_keep_linear_layers_elsewhere(models, dropout):
    options = {"condition_dropout": dropout, "condition_guidance": 1.5 if dropout else 1.0}
    decoder, condition = tiny_decoder(**options), tiny_condition(2)
    plain = decode(decoder, models[1], condition, seeds=[5, 6])
    stream(decoder)
    torch.testing.assert_close(decode(decoder, models[1], condition, seeds=[5, 6]).pixels, plain.pixels)
