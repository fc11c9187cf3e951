"""Distribution guidance of diffusers pipelines: FLUX.1, SDXL and Stable Diffusion 1.x of tiny random networks."""

import json
import os
import sys
from math import log
from pathlib import Path
from types import ModuleType

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dcdd_core.files import is_finite
from dcdd_core.method.flow import timesteps
from dcdd_core.method.sampling import keyed_generator
from dcdd_core.models.flux2_vae import Flux2Codec
from dcdd_core.models.vae import KLCodec
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.pipelines.condition import discrete_condition
from dcdd_core.pipelines.guided import GuidanceOptions, TokenGuide, token_guide
from dcdd_core.pipelines.guided_pipeline import READ, KleinPrior, PriorPipeline, image_to_image, load_prior_pipeline
from tests.tiny import tiny_vq
from tests.tiny_pipelines import flux, klein, save_klein, save_sd, sd, sdxl

SIZE, SCALE = (32, 48), 20.0
KINDS = {
    "FLUX.1": flux,
    **({"FLUX.2 klein": klein} if hasattr(diffusers, "Flux2KleinPipeline") else {}),
    "SDXL": sdxl,
    "SDXL v": lambda: sdxl("v_prediction"),
    "SD": sd,
    "SD v": lambda: sd("v_prediction"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return VQTokenizer(tiny_vq(), name="tiny")


@pytest.fixture(scope="module")
def condition(tokenizer):
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return discrete_condition(tokenizer.encode(pixels), tokenizer.codebook)


def prior_of(pipe):
    if type(pipe).__name__ == "Flux2KleinPipeline":
        return KleinPrior(pipe, Flux2Codec(pipe.vae.eval().requires_grad_(False)))
    return PriorPipeline(pipe, KLCodec(pipe.vae.eval().requires_grad_(False)))


@pytest.fixture(scope="module", params=KINDS, ids=str)
def prior(request):
    return prior_of(KINDS[request.param]())


def paint(prior, tokenizer, condition, seeds=(1, 2), **options):
    options = {"size": SIZE, "steps": 4, "options": GuidanceOptions(strength=0.3, pull=0)} | options
    return prior.paint(tokenizer, condition, ["a red circle"] * len(seeds), seeds=seeds, scale=SCALE, **options)


def test_guided_images_say_more_of_what_the_condition_says(prior, tokenizer, condition):
    guide = token_guide(tokenizer, prior.codec, condition, scale=SCALE, size=SIZE)
    losses = []
    for strength in (0.0, 0.3):
        options = GuidanceOptions(strength=strength, pull=0)
        painted = paint(prior, tokenizer, condition, options=options)
        assert painted.pixels.shape == (2, 3, *SIZE)
        losses.append(float(guide.loss(prior.codec.normalize(painted.latents)).sum().detach()))
    assert losses[1] < 0.9 * losses[0]


def test_without_strength_and_pull_it_is_the_pipeline_itself(prior, tokenizer, condition):
    """The corrected prediction of nothing is the model's own output, so nothing is corrected at all."""
    off = paint(prior, tokenizer, condition, options=GuidanceOptions(strength=0, pull=0)).latents
    assert torch.equal(off, paint(prior, tokenizer, condition, options=GuidanceOptions(strength=0, pull=0)).latents)
    late = GuidanceOptions(strength=0.3, first=0.001, last=0.0)
    torch.testing.assert_close(off, paint(prior, tokenizer, condition, options=late).latents)


def test_a_prediction_that_is_given_back_unchanged_changes_nothing(prior, tokenizer, condition):
    """The way from the model's output to clean latents and back, at every step."""
    off = paint(prior, tokenizer, condition, options=GuidanceOptions(strength=0, pull=0)).latents
    least = paint(prior, tokenizer, condition, options=GuidanceOptions(strength=1e-9, pull=0)).latents
    torch.testing.assert_close(off, least, rtol=1e-3, atol=1e-3)


def test_a_batch_is_its_singles(prior, tokenizer, condition):
    batch = paint(prior, tokenizer, condition).latents
    alone = paint(prior, tokenizer, condition.part(1, 2), seeds=[2]).latents
    torch.testing.assert_close(batch[1:], alone)


def test_steps_are_counted_and_run_from_the_start_on(prior, tokenizer, condition):
    times, steps = [], []
    original = type(prior)._predicted

    def predicted(self, *given):
        found = original(self, *given)
        times.append(found[1])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(prior), "_predicted", predicted)
        paint(
            prior, tokenizer, condition.part(0, 1), seeds=[1], steps=5, start=0.5,
            on_step=lambda done, total, latents: steps.append((done, total, tuple(latents.shape[2:]))),
        )  # fmt: skip
    assert [done for done, _, _ in steps] == [1, 2, 3, 4, 5] and {total for _, total, _ in steps} == {5}
    assert {size for *_, size in steps} == {(16, 24)}
    assert times == sorted(set(times), reverse=True) and times[0] < 0.95


def repaint(prior, tokenizer, condition, **options):
    """The left half of an image; the image comes back with what was painted."""
    image = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1
    mask = torch.zeros(1, 1, *SIZE)
    mask[..., :24] = 1
    return image, paint(prior, tokenizer, condition, image=image, mask=mask, **options)


def test_under_a_mask_only_that_part_is_painted(prior, tokenizer, condition):
    seen = []
    image, painted = repaint(prior, tokenizer, condition, on_step=lambda done, total, latents: seen.append(latents))
    assert torch.equal(painted.pixels[..., 24:], image[..., 24:].expand(2, -1, -1, -1))
    assert not torch.equal(painted.pixels[0, ..., :24], painted.pixels[1, ..., :24])
    known = prior.codec.encode(image)
    for latents in seen:  # what the schedulers go on from
        torch.testing.assert_close(latents[..., 12:], known[..., 12:])
    # The last step of Stable Diffusion's schedule leaves a little noise.
    away = (painted.latents - known)[..., 12:].square().mean().sqrt() / known.std()
    assert away < (1e-5 if prior.flow else 0.05)


def test_what_is_kept_follows_the_noised_image(prior, tokenizer, condition):
    """Each step's kept latents are the known ones with one and the same noise, less and less of it."""
    found, original = [], type(prior)._predicted

    def predicted(self, output, timestep, sample):
        made = original(self, output, timestep, sample)
        found.append((self._unpacked(sample, latent_size), made[1]))
        return made

    latent_size = prior.codec.normalize(torch.zeros(1, prior.codec.channels, 16, 24)).shape[2:]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(prior), "_predicted", predicted)
        image, _ = repaint(prior, tokenizer, condition.part(0, 1), seeds=[1])
    half = latent_size[1] // 2
    known, noises = prior.codec.normalize(prior.codec.encode(image))[..., half:], []
    for x, time in found:
        clean, spread = 1 - time, time
        if not prior.flow:  # x = sqrt(a) x0 + sqrt(1 - a) n is the flow's divided by the root of (1 - t)^2 + t^2
            clean, spread = (each / (time**2 + (1 - time) ** 2) ** 0.5 for each in (clean, spread))
        noises.append((x[..., half:] - clean * known) / spread)
    whole = torch.randn(prior.codec.normalize(prior.codec.encode(image)).shape, generator=keyed_generator(1))
    assert len(noises) == 4
    for noise in noises:
        torch.testing.assert_close(noise, whole[..., half:], rtol=0, atol=0.01)


def test_a_mask_over_everything_is_no_mask(prior, tokenizer, condition):
    whole = {"image": torch.zeros(1, 3, *SIZE), "mask": torch.ones(1, 1, *SIZE)}
    masked, plain = (paint(prior, tokenizer, condition, **more) for more in (whole, {}))
    assert torch.equal(masked.latents, plain.latents) and torch.equal(masked.pixels, plain.pixels)


@pytest.mark.parametrize(
    ("schedule", "mu"),
    [
        ({"use_dynamic_shifting": True}, 0.5 + 0.65 * (96 - 256) / (4096 - 256)),
        ({"use_dynamic_shifting": True, "base_shift": 0.2, "max_shift": 1.0}, 0.2 + 0.8 * (96 - 256) / (4096 - 256)),
        ({"use_dynamic_shifting": False, "shift": 3.0}, log(3)),
    ],
)
def test_a_flow_starts_at_its_time_and_keeps_the_model_s_shift(tokenizer, condition, schedule, mu):
    """FLUX.1 on 8 x 12 tokens: t0 whatever the shift, and the shifted schedule scaled to it."""
    pipe = flux()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(**schedule)
    prior, samples = prior_of(pipe), []
    original = type(prior)._predicted

    def predicted(self, output, timestep, sample):
        made = original(self, output, timestep, sample)
        samples.append((self._unpacked(sample, (16, 24)), made[1]))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(prior), "_predicted", predicted)
        paint(prior, tokenizer, condition.part(0, 1), seeds=[3], steps=4, start=0.6)
    assert [time for _, time in samples] == pytest.approx((0.6 * timesteps(4, shift=mu))[:-1].tolist(), rel=1e-4)
    soft = token_guide(tokenizer, prior.codec, condition.part(0, 1), scale=SCALE, size=SIZE).soft
    noise = torch.randn(soft.shape, generator=keyed_generator(3))
    torch.testing.assert_close(samples[0][0], 0.4 * soft + 0.6 * noise, rtol=1e-3, atol=1e-3)


def test_the_scheduler_is_its_own_again_afterwards(prior, tokenizer, condition):
    paint(prior, tokenizer, condition)
    assert "step" not in vars(prior.pipe.scheduler)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        paint(prior, tokenizer, condition, on_step=stop)
    assert "step" not in vars(prior.pipe.scheduler)


def test_what_does_not_fit_is_refused(prior, tokenizer, condition):
    with pytest.raises(ValueError, match=r"paints sides of multiples of (2|4) pixels, got 45 x 33: use "):
        paint(prior, tokenizer, condition, size=(33, 45))
    with pytest.raises(ValueError, match="got 2 prompts and 1 seeds for 2 images"):
        prior.paint(tokenizer, condition, ["a", "b"], seeds=[1], scale=SCALE, size=SIZE)
    with pytest.raises(ValueError, match="needs an image and a mask"):
        paint(prior, tokenizer, condition, image=torch.zeros(1, 3, *SIZE))
    with pytest.raises(ValueError, match=r"the mask is \[1, 1, 8, 8\], expected \[2 or 1, 1, 32, 48\]"):
        paint(prior, tokenizer, condition, image=torch.zeros(1, 3, *SIZE), mask=torch.zeros(1, 1, 8, 8))
    for words in ({"steps": 0}, {"start": 0}, {"start": 2}):
        with pytest.raises(ValueError, match=next(iter(words))):
            paint(prior, tokenizer, condition, **words)


def test_latents_that_are_not_finite_are_refused(tokenizer, condition):
    pipe = sd()
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        paint(prior_of(pipe), tokenizer, condition, options=GuidanceOptions(strength=0, pull=0))


def test_a_model_that_predicts_something_else_is_refused():
    pipe = sd()
    pipe.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match="predicts 'sample'; guidance reads models that predict 'epsilon' or"):
        prior_of(pipe)


def test_a_folder_paints_with_its_own_text_encoder(tmp_path, tokenizer, condition):
    prior = load_prior_pipeline(save_sd(tmp_path))
    first = prior.paint(tokenizer, condition, ["a", "red circle"], seeds=[1, 1], scale=SCALE, size=SIZE, steps=2)
    other = prior.paint(tokenizer, condition, ["b", "red circle"], seeds=[1, 1], scale=SCALE, size=SIZE, steps=2)
    assert not torch.equal(first.latents[0], other.latents[0]) and torch.equal(first.latents[1], other.latents[1])


def test_every_kind_but_flux_2_is_painted_from_an_image():
    for name in READ.keys() - {"Flux2KleinPipeline"}:
        kind = image_to_image(name)
        assert hasattr(diffusers, kind) and kind in READ and READ[kind] == READ[name]


@pytest.mark.parametrize("name", ["FluxFillPipeline", "Flux2Pipeline", "JanusPipeline", None, 3])
def test_other_pipelines_are_refused_by_name(tmp_path, name):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ValueError, match=rf"holds a {name!r}; expected a diffusers pipeline of FLUX.1, FLUX"):
        load_prior_pipeline(tmp_path)
    assert name not in READ


def test_a_folder_that_is_none_or_lacks_its_parts_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder; expected a diffusers pipeline of FLUX.1"):
        load_prior_pipeline(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="model_index.json does not exist"):
        load_prior_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(ValueError, match="expected an autoencoder"):
        load_prior_pipeline(tmp_path)
    folder = save_sd(tmp_path / "whole")
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(ValueError, match="cannot be read as a Stable Diffusion 1.x pipeline"):
        load_prior_pipeline(folder)


def test_flux_2_s_latents_are_normalised_as_its_pipeline_has_them():
    pytest.importorskip("diffusers", minversion="0.37")
    pipe = klein()
    codec, pixels = Flux2Codec(pipe.vae), torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(7)) * 2 - 1
    raw, z = codec.encode(pixels), codec.normalize(codec.encode(pixels))
    assert raw.shape == (1, 4, 16, 24) and (codec.factor, codec.channels) == (2, 4)
    torch.testing.assert_close(z, pipe._encode_vae_image(pixels, None))
    torch.testing.assert_close(codec.denormalize(z), raw)
    assert z.shape == (1, 16, 8, 12) and codec.decode(raw).shape == pixels.shape


def test_flux_2_starts_from_the_noised_vq_decode_and_passes_through_its_times(tokenizer, condition):
    pytest.importorskip("diffusers", minversion="0.37")
    prior, given = prior_of(klein()), {}
    call = type(prior.pipe).__call__

    def watched(self, **arguments):
        given.update(arguments)
        return call(self, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(prior.pipe), "__call__", watched)
        paint(prior, tokenizer, condition.part(0, 1), seeds=[3], steps=4, start=0.6)
    soft = token_guide(tokenizer, prior.codec, condition.part(0, 1), scale=SCALE, size=SIZE).soft
    noise = torch.randn(soft.shape, generator=keyed_generator(3))
    torch.testing.assert_close(given["latents"], 0.4 * soft + 0.6 * noise)
    # mu of 96 tokens, on the line through Black Forest Labs' fits for 10 and for 200 steps.
    few, many = 8.73809524e-05 * 96 + 1.89833333, 0.00016927 * 96 + 0.45666666
    mu = few + (4 - 10) * (many - few) / (200 - 10)
    assert given["sigmas"] == pytest.approx((0.6 * timesteps(4, shift=mu))[:-1].tolist(), rel=1e-6)
    torch.testing.assert_close(prior.pipe.scheduler.sigmas, torch.tensor([*given["sigmas"], 0.0]))


def test_a_flux_2_folder_paints_with_its_own_text_encoder(tmp_path, tokenizer, condition):
    pytest.importorskip("diffusers", minversion="0.37")
    prior = load_prior_pipeline(save_klein(tmp_path))
    assert isinstance(prior, KleinPrior)
    layers = {"text_encoder_out_layers": (1, 2, 3), "max_sequence_length": 8}
    asked = {"seeds": [1, 1], "scale": SCALE, "size": SIZE, "steps": 2, **layers}
    first = prior.paint(tokenizer, condition, ["a", "red circle"], **asked)
    other = prior.paint(tokenizer, condition, ["b", "red circle"], **asked)
    assert not torch.equal(first.latents[0], other.latents[0]) and torch.equal(first.latents[1], other.latents[1])


def test_a_diffusers_without_flux_2_klein_is_told_which_has_it(tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Flux2KleinPipeline"}))
    old = ModuleType("diffusers")
    old.__version__ = "0.35.2"
    monkeypatch.setitem(sys.modules, "diffusers", old)
    with pytest.raises(
        ValueError, match=r"'Flux2KleinPipeline', which diffusers has since 0.37, and this is 0.35.2: u"
    ):
        load_prior_pipeline(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("save", [save_sd, save_klein], ids=["SD", "FLUX.2 klein"])
def test_a_folder_whose_name_is_not_utf_8_is_read(save, tmp_path):
    if save is save_klein:
        pytest.importorskip("diffusers", minversion="0.37")
    plain, folder = tmp_path / "plain", Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    plain.mkdir()
    save(plain).rename(folder)
    assert load_prior_pipeline(folder).size_for((32, 32)) == (32, 32)


def test_each_image_is_blended_by_its_own_mask_and_guided_as_often_as_asked(prior, tokenizer, condition):
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(2, 3, *SIZE, generator=generator) * 2 - 1
    mask = torch.tensor([0.0, 0.25, 1.0])[torch.randint(3, (2, 1, *SIZE), generator=generator)]
    options, steps, original = GuidanceOptions(strength=0.1, pull=0, every=2), [], TokenGuide.correct

    def watched(self, clean, time):
        steps.append(round(time, 3))
        return original(self, clean, time)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenGuide, "correct", watched)
        made = paint(prior, tokenizer, condition, image=image, mask=mask, options=options)
    painted = torch.cat([prior.codec.decode(one) for one in made.latents.split(1)])
    torch.testing.assert_close(made.pixels, mask * painted + (1 - mask) * image)
    assert len(steps) == 4 and steps[:2] == steps[2:], "the first and the third of four steps, of each image"


@pytest.mark.parametrize("make", [sd, sdxl])
def test_latents_are_not_clipped_as_pixels_are(make):
    """Also where a scheduler's settings do not say so: DDIM's own default is to clip."""
    scheduler = prior_of(make()).pipe.scheduler
    scheduler.set_timesteps(10)
    noise, sample = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = scheduler.timesteps[3]
    alpha, after = (float(scheduler.alphas_cumprod[int(t) - k]) for k in (0, 100))
    clean = (3 * sample - (1 - alpha) ** 0.5 * noise) / alpha**0.5
    assert clean.abs().max() > 3
    found = scheduler.step(noise, t, 3 * sample).prev_sample
    torch.testing.assert_close(found, after**0.5 * clean + (1 - after) ** 0.5 * noise, rtol=1e-3, atol=1e-3)


def test_a_scheduler_without_betas_is_refused():
    pipe = sdxl()
    pipe.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(ValueError, match="scheduler, EDMEulerScheduler, has no beta_schedule; guidance reads models"):
        prior_of(pipe)


def test_a_schedule_that_begins_with_noise_alone_is_painted(tokenizer, condition):
    """With zero terminal signal to noise (arXiv 2305.08891), the first step's alpha is 0."""
    pipe = sd("v_prediction")
    pipe.scheduler = diffusers.DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    prior = prior_of(pipe)
    assert float(prior.pipe.scheduler.alphas_cumprod[-1]) == 0
    assert is_finite(paint(prior, tokenizer, condition, start=1.0).pixels)


def test_as_many_steps_are_run_as_were_asked_for():
    prior = prior_of(sd())
    for steps in range(1, 51):
        for start in (k / 20 for k in range(1, 21)):
            told = prior._part_of_schedule((8, 8), (16, 16), steps, start)
            assert int(told["num_inference_steps"] * told["strength"]) == steps and told["strength"] <= 1
