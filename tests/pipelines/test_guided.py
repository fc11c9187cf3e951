"""Distribution guidance on random tiny networks: what moves, what stays, and what is refused."""

from copy import copy
from dataclasses import replace

import pytest
import torch

from dcdd_core.method.flow import timesteps
from dcdd_core.method.guidance import noise_share
from dcdd_core.method.latents import pack
from dcdd_core.method.lcdm import map_logits
from dcdd_core.method.sampling import keyed_generator
from dcdd_core.models.vae import KLCodec
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.pipelines.condition import discrete_condition
from dcdd_core.pipelines.condition_guidance import ConditionedVelocity
from dcdd_core.pipelines.decode import decode
from dcdd_core.pipelines.guided import (
    Fallback,
    GuidanceOptions,
    TokenGuide,
    sharpen,
    soft_latents,
    token_guide,
)
from dcdd_core.pipelines.host import Host
from dcdd_core.types import Codebook, DCDDWarning, TokenLogits
from tests.tiny import tiny_decoder, tiny_vae, tiny_vq

SEEDS = [3, 4]


@pytest.fixture(scope="module")
def tokenizer():
    return VQTokenizer(tiny_vq(), name="tiny")


@pytest.fixture(scope="module")
def codec():
    return KLCodec(tiny_vae().requires_grad_(False))


@pytest.fixture(scope="module")
def condition(tokenizer):
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return discrete_condition(tokenizer.encode(pixels), tokenizer.codebook)


@pytest.fixture(scope="module")
def decoder(tokenizer):
    return tiny_decoder(codebook=tokenizer.codebook.fingerprint, code_dim=tokenizer.codebook.dim)


@pytest.fixture
def guide(tokenizer, codec, condition):
    return token_guide(tokenizer, codec, condition, scale=20.0)


def with_options(guide, **options):
    return replace(guide, options=GuidanceOptions(**options))


def test_a_step_against_the_gradient_lowers_the_loss(guide):
    before = guide.loss(guide.soft)
    after = guide.loss(with_options(guide, strength=0.002, pull=0).correct(guide.soft, 1.0))
    assert before.shape == (2,) and (after < before).all()


def test_the_gradient_is_that_of_the_loss(guide):
    """By finite differences, in the direction of the gradient and in a random one."""
    z = guide.soft
    gradient = guide.gradient(z)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    for way in (gradient, direction):
        way = way / way.norm()
        found = (guide.loss(z + 0.01 * way) - guide.loss(z - 0.01 * way)).sum() / 0.02
        assert float(found) == pytest.approx(float((gradient * way).sum()), rel=0.05, abs=0.05)


def by_autograd(guide, latents):
    """The gradient of the loss in one piece, of the whole batch."""
    x = latents.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(guide.loss(x).sum(), x)
    return gradient


def test_the_gradient_in_parts_is_that_in_one_piece(tokenizer, codec, condition):
    for size in (None, (32, 48)):
        guide = token_guide(tokenizer, codec, condition, scale=20.0, size=size)
        found, expected = guide.gradient(guide.soft), by_autograd(guide, guide.soft)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_one_tile_that_covers_everything_changes_no_bit(tokenizer, codec, condition):
    guide, tiled = (token_guide(tokenizer, codec, condition, scale=20.0, size=(32, 48), tile=t) for t in (None, 24))
    assert torch.equal(guide.gradient(guide.soft), tiled.gradient(guide.soft))
    assert not torch.equal(guide.gradient(guide.soft), replace(tiled, tile=16).gradient(guide.soft))


def test_gradients_work_in_inference_mode(tokenizer, codec, guide):
    """Also for conditions and codebooks that were made in it, which autograd would not save."""
    with torch.inference_mode():
        own = copy(tokenizer)
        own.codebook = Codebook(tokenizer.codebook.vectors)
        pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        made = discrete_condition(own.encode(pixels), own.codebook)
        inside = token_guide(own, codec, made, scale=20.0).gradient(guide.soft + 0)
    assert made.code_vectors.is_inference() and own.codebook.vectors.is_inference()
    torch.testing.assert_close(inside.clone(), guide.gradient(guide.soft))


def out_of_memory_above(decode, side, *, forward=False):
    """A decoder whose activations for the way back, or with `forward` its image as well, do not fit above a side."""

    def fails(latents):
        if max(latents.shape[2:]) > side and (forward or torch.is_grad_enabled()):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(latents)

    return fails


@pytest.fixture
def large(tokenizer, codec, condition):
    """On 64 x 40 latents."""
    return token_guide(tokenizer, codec, condition, scale=20.0, size=(128, 80))


def test_out_of_memory_the_decoder_works_in_smaller_and_smaller_tiles(large):
    short = replace(large, decode=out_of_memory_above(large.decode, 20))
    with pytest.warns(DCDDWarning) as told:
        found = short.gradient(large.soft)
    assert [str(one.message).removeprefix("out of memory: distribution guidance ") for one in told] == [
        "decodes each image twice",
        "continues in tiles of 32 x 32 latents",
        "continues in tiles of 16 x 16 latents",
    ]
    assert torch.equal(found, replace(large, tile=16, fallback=Fallback()).gradient(large.soft))


def test_out_of_memory_the_image_is_decoded_twice_first(large):
    """The decoder's activations fit alone, not beside those of the encoder."""
    held = []

    class Alone(torch.autograd.Function):
        @staticmethod
        def forward(ctx, pixels):
            held.append("decoder")
            return pixels.clone()

        @staticmethod
        def backward(ctx, gradient):
            held.remove("decoder")
            return gradient

    class Crowded(VQTokenizer):
        def features(self, pixels):
            if held:
                held.clear()
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().features(pixels)

    alone = large.part(0, 1)
    tokenizer = Crowded(alone.tokenizer.model, name="tiny")
    crowded = replace(alone, tokenizer=tokenizer, decode=lambda z: grown(large.decode(z)), fallback=Fallback())

    def grown(pixels):
        return Alone.apply(pixels) if pixels.requires_grad else pixels

    with pytest.warns(DCDDWarning, match="decodes each image twice") as told:
        found = crowded.gradient(alone.soft)
    assert len(told) == 1 and torch.equal(found, replace(alone, fallback=Fallback()).gradient(alone.soft))
    assert torch.equal(crowded.gradient(alone.soft), found)  # at once, as before


def test_what_was_given_up_is_not_tried_again(large):
    calls, short = [], replace(large, decode=out_of_memory_above(large.decode, 20))
    with pytest.warns(DCDDWarning):
        short.gradient(large.soft)
    counted = replace(short, decode=lambda z: calls.append(max(z.shape[2:])) or large.decode(z))
    counted.gradient(large.soft)
    counted.part(1, 2).gradient(large.soft[1:])
    assert max(calls) == 64 and sorted(set(calls)) == [16, 64]  # 64: the image itself, without gradients


def test_an_image_that_does_not_fit_is_decoded_in_tiles_too(large):
    short = replace(large, decode=out_of_memory_above(large.decode, 32, forward=True))
    with pytest.warns(DCDDWarning) as told:
        found = short.gradient(large.soft)
    assert [str(one.message).removeprefix("out of memory: distribution guidance ") for one in told] == [
        "decodes each image twice",
        "continues in tiles of 32 x 32 latents",
        "looks at images that are decoded in tiles",
    ]
    assert found.any() and not torch.equal(found, replace(large, tile=32, fallback=Fallback()).gradient(large.soft))


def test_where_tiles_are_not_enough_every_second_step_is_left_out(large):
    told = []

    class Told(Host):
        def on_fallback(self, change):
            told.append(change)

    room = {"side": 10}
    short = replace(large, host=Told(), decode=lambda z: out_of_memory_above(large.decode, room["side"])(z), tile=32)
    assert not short.gradient(large.soft).any()
    assert [change.split(" guidance ")[1] for change in told] == [
        "continues in tiles of 16 x 16 latents",
        "leaves this step out, and continues with every second one",
    ]
    room["side"] = 20
    pattern = [bool(short.gradient(large.soft).any()) for _ in range(5)]
    assert pattern == [True, False, True, False, True] and len(told) == 2
    room["side"] = 10
    assert not short.gradient(large.soft).any()  # the one that is left out
    with pytest.raises(RuntimeError, match=r"out of memory .* in tiles of 16 x 16 latents: use a smaller image"):
        short.gradient(large.soft)


def test_other_failures_are_not_taken_for_want_of_memory(large):
    def fails(latents):
        raise RuntimeError("sizes do not fit")

    with pytest.raises(RuntimeError, match="sizes do not fit"):
        replace(large, decode=fails, tile=16).gradient(large.soft)


def test_tiles_that_are_too_small_to_overlap_are_refused(guide):
    with pytest.raises(ValueError, match="tile must be .* 4"):
        replace(guide, tile=3)


def test_no_strength_and_no_pull_paint_the_unguided_images_to_the_last_bit(decoder, codec, condition, guide):
    plain = decode(decoder, codec, condition, seeds=SEEDS, steps=3)
    guided = decode(decoder, codec, condition, seeds=SEEDS, steps=3, guide=with_options(guide, strength=0, pull=0))
    assert torch.equal(plain.pixels, guided.pixels) and torch.equal(plain.latents, guided.latents)


def test_steps_outside_its_times_are_not_guided(decoder, codec, condition, guide):
    plain = decode(decoder, codec, condition, seeds=SEEDS, steps=3)
    late = with_options(guide, strength=0.3, first=0.01, last=0.0)
    assert torch.equal(plain.latents, decode(decoder, codec, condition, seeds=SEEDS, steps=3, guide=late).latents)
    calls = []

    class Counted(TokenGuide):
        def correct(self, clean, time):
            calls.append(round(time, 4))
            return super().correct(clean, time)

    def count(**options):
        calls.clear()
        made = Counted(**{**vars(guide), "options": GuidanceOptions(**options)})
        decode(decoder, codec, condition, seeds=SEEDS, steps=4, shift=0.0, guide=made)
        return list(calls)

    assert count() == [1.0, 0.75, 0.5, 0.25]
    assert count(first=0.75, last=0.5) == [0.75, 0.5]
    assert count(every=3) == [1.0, 0.25]


def test_guided_images_say_more_of_what_the_condition_says(decoder, codec, condition, guide):
    """The loss of the painted latents falls with the strength."""
    losses = []
    for strength in (0.0, 0.1, 0.3):
        own = with_options(guide, strength=strength, pull=0)
        latents = decode(decoder, codec, condition, seeds=SEEDS, steps=6, guide=own).latents
        losses.append(float(guide.loss(codec.normalize(latents)).sum().detach()))
    assert losses[0] > losses[1] > losses[2]


def test_a_batch_is_its_singles(decoder, codec, condition, guide):
    batch = decode(decoder, codec, condition, seeds=SEEDS, steps=3, guide=guide, start=0.6).latents
    for k, seed in enumerate(SEEDS):
        alone = decode(
            decoder, codec, condition.part(k, k + 1), seeds=[seed], steps=3, guide=guide.part(k, k + 1), start=0.6
        )
        torch.testing.assert_close(batch[k : k + 1], alone.latents, rtol=1e-3, atol=1e-3)


def test_painting_that_starts_late_starts_from_the_vq_decode(decoder, codec, condition, guide):
    """With the whole pull and almost no noise, what comes out is the soft VQ decode."""
    own = with_options(guide, strength=0)
    close = decode(decoder, codec, condition, seeds=SEEDS, steps=1, guide=own, start=1e-4).latents
    torch.testing.assert_close(codec.normalize(close), guide.soft, rtol=0, atol=0.05)
    pulled = decode(decoder, codec, condition, seeds=SEEDS, steps=1, guide=own).latents
    torch.testing.assert_close(codec.normalize(pulled), guide.soft, rtol=1e-4, atol=1e-4)


def test_soft_latents_are_those_of_the_vq_decode(tokenizer, codec, condition):
    pixels = tokenizer.decode_vectors(condition.code_vectors, condition.grid)
    expected = codec.normalize(codec.encode(pixels))
    torch.testing.assert_close(soft_latents(tokenizer, codec, condition), expected)
    assert soft_latents(tokenizer, codec, condition, (32, 24)).shape[2:] == (32 // codec.factor, 24 // codec.factor)


def test_images_of_another_size_are_read_at_the_token_grid_s_own(tokenizer, codec, condition):
    guide = token_guide(tokenizer, codec, condition, scale=20.0, size=(32, 48))
    assert guide.features(torch.zeros(2, 3, 32, 48)).shape == condition.code_vectors.shape
    gradient = guide.gradient(guide.soft)
    assert gradient.shape == guide.soft.shape and gradient.any()
    flat = torch.full((2, 3, 32, 48), 0.25)
    torch.testing.assert_close(guide.features(flat), guide.features(torch.full((2, 3, 16, 16), 0.25)))


def test_free_positions_do_not_pull(guide, condition):
    everything = torch.ones(1, condition.code_vectors.shape[1], dtype=torch.bool)
    assert not replace(guide, free=everything).gradient(guide.soft).any()
    one = everything.clone()
    one[0, 0] = False
    alone = replace(guide, free=one).gradient(guide.soft)
    assert alone.any() and (alone - guide.gradient(guide.soft)).abs().max() > 0


def test_sharpening_lowers_the_loss_step_by_step(guide):
    own, seen = with_options(guide, strength=0.05), []
    made = sharpen(own, guide.soft, steps=4, on_step=lambda done, steps, z: seen.append((done, steps, z)))
    assert [(done, steps) for done, steps, _ in seen] == [(k, 4) for k in (1, 2, 3, 4)]
    assert torch.equal(seen[-1][2], made) and (guide.loss(made) < guide.loss(guide.soft)).all()
    first = (seen[0][2] - guide.soft).square().mean((1, 2, 3)).sqrt()
    last = (seen[3][2] - seen[2][2]).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(first, torch.full((2,), 0.05 * noise_share(1.0)))
    torch.testing.assert_close(last, torch.full((2,), 0.05 / 4))


def test_agreement_counts_the_positions_that_say_the_condition_s_code(guide, tokenizer, condition):
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1  # the condition's own
    assert guide.agreement(pixels).tolist() == [1.0, 1.0]
    wanted, found = tokenizer.tokens(condition.code_vectors), tokenizer.tokens(tokenizer.features(-pixels))
    torch.testing.assert_close(guide.agreement(-pixels), (wanted == found).float().mean(-1))


def test_another_tokenizer_s_condition_is_refused(tokenizer, codec, condition):
    other = replace(condition, codebook="0" * 16)
    with pytest.raises(ValueError, match="condition is of codebook 0000.* guide with the tokenizer of the VLM"):
        token_guide(tokenizer, codec, other, scale=20.0)


def test_a_late_start_without_a_guide_is_refused(decoder, codec, condition):
    with pytest.raises(ValueError, match=r"painting from t = 0.5 starts from the VQ decode: give a guide"):
        decode(decoder, codec, condition, seeds=SEEDS, start=0.5)
    for start in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="start"):
            decode(decoder, codec, condition, seeds=SEEDS, start=start)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"strength": -1}, "strength"),
        ({"pull": 2}, "pull"),
        ({"first": 0.2, "last": 0.4}, "swap them"),
        ({"every": 0}, "every"),
        ({"gradients": 1.5}, "gradients"),
        ({"weight": "margin"}, "weight must be one of confidence, uniform"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        GuidanceOptions(**options)


def test_a_gradient_that_is_not_finite_is_refused(guide):
    broken = replace(guide, decode=lambda clean: guide.decode(clean) * torch.nan)
    with pytest.raises(ValueError, match="gradient of distribution guidance holds NaN .* float32"):
        broken.gradient(guide.soft)


def half_mask(size=16):
    """The left half is painted."""
    mask = torch.zeros(1, 1, size, size)
    mask[..., : size // 2] = 1
    return mask


def test_under_a_mask_what_is_kept_is_free_and_not_corrected(guide):
    """A 4 x 4 grid of tokens on 8 x 8 latents."""
    own = with_options(guide, strength=0.2).under(half_mask())
    assert own.free.reshape(4, 4).tolist() == [[False, False, True, True]] * 4
    assert own.area.reshape(8, 8).tolist() == [[1.0] * 4 + [0.0] * 4] * 8
    z = torch.randn(guide.soft.shape, generator=torch.Generator().manual_seed(2))
    moved = own.correct(z, 0.8) - z
    assert not moved[..., 4:].any() and moved[..., :4].abs().min() > 0
    step = with_options(own, strength=0.2, pull=0).correct(z, 0.8) - z
    expected = torch.full((2,), 0.2 * noise_share(0.8))
    torch.testing.assert_close(step[..., :4].square().mean((1, 2, 3)).sqrt(), expected, rtol=1e-3, atol=0)


def test_positions_count_by_the_share_of_them_that_is_painted(guide):
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :4, :4] = 1  # all of the first position,
    mask[..., :4, 4:6] = 0.5  # half of the second: any value above 0 is painted
    mask[..., :4, 8:9] = 1  # a quarter of the third
    assert guide.under(mask).free[0, :4].tolist() == [False, False, True, True]
    thin = torch.zeros(1, 1, 16, 16)
    thin[..., 5, :] = 1
    assert guide.under(thin).free.reshape(4, 4).all(1).tolist() == [True, False, True, True]
    first = torch.zeros(1, 16, dtype=torch.bool)
    first[0, 0] = True
    assert replace(guide, free=first).under(mask).free[0, :3].tolist() == [True, False, True]
    assert guide.under(torch.full((1, 1, 16, 16), 0.1)) is guide


def test_a_masked_guide_s_parts_are_those_of_its_images(guide):
    masks = torch.cat([half_mask(), half_mask().flip(3)])
    own = guide.under(masks)
    z = guide.soft + 0.1
    both = own.correct(z, 0.7)
    for k in range(2):
        alone = guide.part(k, k + 1).under(masks[k : k + 1]).correct(z[k : k + 1], 0.7)
        torch.testing.assert_close(both[k : k + 1], alone)
        torch.testing.assert_close(own.part(k, k + 1).correct(z[k : k + 1], 0.7), alone)


def test_a_part_of_an_image_is_painted_and_guided_under_its_mask(decoder, codec, condition, guide):
    image, mask = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1, half_mask()
    own = with_options(guide, strength=0.3, pull=0)
    asked = {"seeds": SEEDS, "steps": 4, "image": image, "mask": mask}
    plain, guided = (decode(decoder, codec, condition, guide=one, **asked) for one in (None, own))
    for painted in (plain, guided):
        assert torch.equal(painted.pixels[..., 8:], image[..., 8:].expand(2, -1, -1, -1))
    seen = []

    class Watched(TokenGuide):
        def correct(self, clean, time):
            seen.append((self.free, self.area))
            return super().correct(clean, time)

    within = own.under(mask)
    decode(decoder, codec, condition, guide=Watched(**vars(own)), **asked)
    assert len(seen) == 4 and all(torch.equal(f, within.free) and torch.equal(a, within.area) for f, a in seen)
    before, after = (within.loss(codec.normalize(one.latents)).sum() for one in (plain, guided))
    assert float(after) < float(before) and not torch.equal(plain.latents[..., :4], guided.latents[..., :4])


def test_the_first_and_last_times_are_those_that_are_asked_for(decoder, codec, condition, guide):
    """Times are float32: that of the first step from .6 is larger than .6."""
    seen = []

    class Watched(TokenGuide):
        def correct(self, clean, time):
            seen.append(time)
            return super().correct(clean, time)

    def times(start=1.0, **options):
        seen.clear()
        made = Watched(**{**vars(guide), "options": GuidanceOptions(strength=0, **options)})
        decode(decoder, codec, condition, seeds=SEEDS, steps=10, shift=0.0, guide=made, start=start)
        return list(seen)

    assert times(start=0.6, first=0.6) == pytest.approx([0.6 - 0.06 * k for k in range(10)])
    for first in (0.9, 0.8, 0.7, 0.6, 0.4, 0.3, 0.2, 0.1):
        assert times(first=first, last=first) == pytest.approx([first])


def test_a_corrected_estimate_is_the_formula_s(tokenizer, codec):
    """`docs/embedded.md`: the gradient steps, each from the one before, and then the pull; in float64."""
    logits = 3 * torch.randn(2, 16, tokenizer.codebook.size, generator=torch.Generator().manual_seed(8))
    soft = map_logits(TokenLogits(logits, logits.argmax(-1), (4, 4)), tokenizer.codebook)
    options = GuidanceOptions(strength=0.2, pull=0.7, gradients=2)
    guide = replace(token_guide(tokenizer, codec, soft, scale=1.0, options=options), scale=(15.0, 30.0))
    t, z = 0.6, torch.randn(guide.soft.shape, generator=torch.Generator().manual_seed(9))

    def loss(clean):
        features = torch.nn.functional.normalize(guide.features(guide.decode(clean)).double(), dim=-1)
        scale = torch.tensor([15.0, 30.0], dtype=torch.float64)[:, None, None]
        q = (scale * features @ tokenizer.codebook.vectors.double().T).log_softmax(-1)
        return -(soft.uncertainty[..., 0].double() * (logits.double().softmax(-1) * q).sum(-1)).sum()

    expected = z.double()
    for _ in range(2):
        x = expected.float().requires_grad_()
        (g,) = torch.autograd.grad(loss(x), x)
        size = g.double().square().mean((1, 2, 3), keepdim=True).sqrt()
        expected = expected - 0.2 * t / (t**2 + (1 - t) ** 2) ** 0.5 * g.double() / size
    expected = expected + 0.7 * t**2 * (guide.soft.double() - expected)
    torch.testing.assert_close(guide.correct(z, t).double(), expected, rtol=0, atol=2e-4)
    alone = guide.part(1, 2).correct(z[1:], t)
    torch.testing.assert_close(alone.double(), expected[1:], rtol=0, atol=2e-4)


def test_painting_runs_its_times_from_the_start_on(decoder, codec, condition, guide, monkeypatch):
    seen = []
    original = ConditionedVelocity.__call__

    def watched(self, x, context, t):
        seen.append((x.clone(), t[0].item()))
        return original(self, x, context, t)

    monkeypatch.setattr(ConditionedVelocity, "__call__", watched)
    own = with_options(guide, strength=0, pull=0)
    decode(decoder, codec, condition, seeds=SEEDS, steps=4, shift=0.8, guide=own, start=0.6)
    assert [t for _, t in seen] == pytest.approx((0.6 * timesteps(4, shift=0.8))[:-1].tolist())
    noise = torch.cat([torch.randn(1, *guide.soft.shape[1:], generator=keyed_generator(seed)) for seed in SEEDS])
    torch.testing.assert_close(seen[0][0], pack(0.4 * guide.soft + 0.6 * noise))


def test_every_second_gradient_begins_anew_with_each_image(decoder, codec, condition, guide):
    """So that images in parts are those of a batch."""
    fallback = Fallback(alternating=True)
    seen = []

    class Watched(TokenGuide):
        def gradient(self, clean):
            found = super().gradient(clean)
            seen.append(bool(found.any()))
            return found

    for k in range(2):
        alone = guide.part(k, k + 1)
        own = Watched(**{**vars(alone), "options": GuidanceOptions(strength=0.1, pull=0), "fallback": fallback})
        decode(decoder, codec, condition.part(k, k + 1), seeds=[SEEDS[k]], steps=3, guide=own)
    assert seen == [True, False, True] * 2
    seen.clear()
    for k in range(2):
        alone = guide.part(k, k + 1)
        own = Watched(**{**vars(alone), "options": GuidanceOptions(strength=0.1, pull=0), "fallback": fallback})
        sharpen(own, alone.soft, steps=3)
    assert seen == [True, False, True] * 2
