"""Guidance on the condition against its formula, step by step; what each branch is given, and what it costs."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from dcdd_core.method.flow import timesteps
from dcdd_core.models.vae import KLCodec
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.pipelines.decode import decode
from dcdd_core.pipelines.guided import GuidanceOptions, token_guide
from dcdd_core.pipelines.host import Host
from tests.tiny import tiny_condition, tiny_decoder, tiny_vae, tiny_vq

SIZE, STEPS, SHIFT = (8, 8), 3, 0.7


@pytest.fixture(scope="module")
def codec():
    return KLCodec(tiny_vae())


@pytest.fixture
def decoder():
    """One that was trained with dropped conditions, with a null condition that matters."""
    return tiny_decoder(condition_dropout=0.1)


def painted(decoder, codec, condition=None, seeds=(5, 6), **options):
    condition = tiny_condition(len(seeds)) if condition is None else condition
    return decode(decoder, codec, condition, seeds=list(seeds), steps=STEPS, shift=SHIFT, **options)


def watched(decoder, monkeypatch):
    """The arguments of every forward pass, as they come."""
    seen, forward = [], decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda *given: seen.append(given) or forward(*given))
    return seen


def noise_of(seed):
    found = []
    # The first estimate of a decoder whose velocity is zero is the noise itself.
    still = tiny_decoder()
    still.forward = lambda packed, *_: torch.zeros_like(packed)
    decode(
        still,
        KLCodec(tiny_vae()),
        tiny_condition(1),
        seeds=[seed],
        steps=1,
        on_step=lambda i, n, latents: found.append(latents),
    )
    return found[0]


@torch.no_grad()
@pytest.mark.parametrize("w", [0.0, 0.5, 2.0, 7.5])
def test_it_is_the_formula_at_every_step(decoder, codec, w):
    """Euler steps in float64, the two velocities taken one by one from the network."""
    found = painted(decoder, codec, condition_guidance=w).latents
    condition, backbone = tiny_condition(2), decoder.backbone
    context = backbone.context(codec.normalize(codec.encode(torch.zeros(1, 3, 16, 16))), torch.ones(1, 1, 16, 16), 2)
    null = decoder.adapter.null.token
    assert null.abs().min() > 0.1
    times = timesteps(STEPS, shift=SHIFT).double().tolist()
    for k, seed in enumerate((5, 6)):
        x = backbone.pack(codec.normalize(noise_of(seed))).double().numpy()
        fused = decoder.condition_tokens(condition.part(k, k + 1), SIZE)
        for now, after in pairwise(times):
            given, t = torch.from_numpy(x).float(), torch.tensor([now]).float()
            with_it, without = (
                decoder(given, context, tokens, t, SIZE).double().numpy() for tokens in (fused, null.expand(1, 16, -1))
            )
            assert np.abs(with_it - without).max() > 1e-2
            x = x + (after - now) * (without + w * (with_it - without))
        expected = codec.denormalize(backbone.unpack(torch.from_numpy(x), SIZE))
        np.testing.assert_allclose(found[k : k + 1].numpy(), expected.numpy(), atol=2e-4, rtol=1e-4)


def test_each_branch_gets_what_it_should(decoder, codec, monkeypatch):
    """One batch of two rows an image: the same latents, times and masked image; the condition, and the null one."""
    seen = watched(decoder, monkeypatch)
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(2, 1, 16, 16)
    mask[0, :, 4:12], mask[1, :, 2:] = 1, 1
    painted(decoder, codec, condition_guidance=3.0, image=image, mask=mask)
    assert len(seen) == STEPS
    for packed, context, tokens, t, size in seen:
        assert len(packed) == len(context) == len(tokens) == len(t) == 4 and size == SIZE
        for given in (packed, context, t):
            assert torch.equal(given[:2], given[2:])
        assert (context[0] - context[1]).abs().max() > 0.1
        torch.testing.assert_close(tokens[:2], decoder.condition_tokens(tiny_condition(2), SIZE))
        assert torch.equal(tokens[2:], decoder.adapter.null.token.expand(2, 16, -1))


def test_a_weight_of_one_is_the_unguided_decoder_to_the_last_bit_and_costs_nothing(decoder, codec, monkeypatch):
    plain = tiny_decoder()
    plain.load_state_dict({k: v for k, v in decoder.state_dict().items() if not k.startswith("adapter.null.")})
    expected = painted(plain, codec)
    seen = watched(decoder, monkeypatch)
    monkeypatch.setattr(decoder, "null_tokens", None)
    for asked in (None, 1, 1.0):
        seen.clear()
        found = painted(decoder, codec, condition_guidance=asked)
        assert torch.equal(found.latents, expected.latents) and torch.equal(found.pixels, expected.pixels)
        assert [len(packed) for packed, *_ in seen] == [2] * STEPS
    assert torch.equal(painted(plain, codec, condition_guidance=1).latents, expected.latents)


def test_the_card_s_own_weight_is_served(decoder, codec):
    served = tiny_decoder(condition_dropout=0.1, condition_guidance=2.5)
    asked = painted(decoder, codec, condition_guidance=2.5).latents
    assert torch.equal(painted(served, codec).latents, asked)
    assert torch.equal(painted(served, codec, condition_guidance=1).latents, painted(decoder, codec).latents)
    assert (asked - painted(decoder, codec).latents).abs().max() > 0.01


def test_a_batch_is_its_singles(decoder, codec):
    batch = painted(decoder, codec, seeds=(5, 6, 5), condition_guidance=3.0).pixels
    for k, seed in enumerate((5, 6, 5)):
        single = painted(decoder, codec, tiny_condition(3).part(k, k + 1), (seed,), condition_guidance=3.0).pixels
        torch.testing.assert_close(batch[k : k + 1], single, atol=1e-4, rtol=1e-4)
    assert (batch[0] - batch[1]).abs().max() > 0.01


def test_localised_decoding_keeps_the_rest_to_the_last_bit(decoder, codec):
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    kept = (mask == 0).expand(2, 3, 16, 16)
    plain, guided = (painted(decoder, codec, condition_guidance=w, image=image, mask=mask).pixels for w in (1.0, 4.0))
    assert torch.equal(guided[kept], image.expand(2, -1, -1, -1)[kept])
    assert (guided - plain)[~kept].abs().max() > 1e-3


@torch.no_grad()
def test_distribution_guidance_comes_after_it(decoder, codec, monkeypatch):
    """The guide corrects the image that the guided velocity leads to."""
    condition, tokenizer = tiny_condition(1), VQTokenizer(tiny_vq(), name="tiny")
    options = {"scale": 25.0, "options": GuidanceOptions(strength=0.3), "size": (16, 16)}
    guide, corrected = token_guide(tokenizer, codec, condition, **options), []
    correct = type(guide).correct
    monkeypatch.setattr(
        type(guide), "correct", lambda self, clean, t: corrected.append((clean, t)) or correct(self, clean, t)
    )
    seen = watched(decoder, monkeypatch)
    both = painted(decoder, codec, condition, (5,), condition_guidance=3.0, guide=guide).latents
    for (packed, context, _, t, _), (clean, time) in zip(list(seen), corrected, strict=True):
        tokens = decoder.condition_tokens(condition, SIZE), decoder.adapter.null.token.expand(1, 16, -1)
        with_it, without = (decoder(packed[:1], context[:1], one, t[:1], SIZE) for one in tokens)
        expected = packed[:1] - time * (without + 3.0 * (with_it - without))
        torch.testing.assert_close(clean, decoder.backbone.unpack(expected, SIZE), atol=1e-4, rtol=1e-4)
    for other in ({"condition_guidance": 3.0}, {"guide": guide}):
        assert (painted(decoder, codec, condition, (5,), **other).latents - both).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("room", "rows", "told"),
    [
        (3, [4, 2, 2, 2, 2, 2, 2], ["two passes"]),  # of two images: 4 rows once, then 2 at a time to the end
        (1, [4, 2, *2 * [2, 1, 1, 1, 1, 1, 1]], ["two passes", 1, "two passes", "two passes"]),  # one image at a time
    ],
)
def test_where_memory_is_short_the_branches_are_two_passes_with_the_same_result(
    decoder, codec, monkeypatch, room, rows, told
):
    expected, forward, tried = painted(decoder, codec, condition_guidance=3.0).latents, decoder.forward, []
    host, said = Host(), []
    host.on_split = said.append
    host.on_fallback = lambda change: said.append("two passes" if "two passes" in change else change)

    def short(packed, *rest):
        tried.append(len(packed))
        if len(packed) > room:
            raise torch.OutOfMemoryError("out of memory")
        return forward(packed, *rest)

    monkeypatch.setattr(decoder, "forward", short)
    found = painted(decoder, codec, condition_guidance=3.0, host=host).latents
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert tried == rows and said == told
    room = 0
    with pytest.raises(RuntimeError, match="out of memory even for a single image"):
        painted(decoder, codec, condition_guidance=3.0, host=host)


def test_a_host_makes_room_for_both_rows(decoder, codec):
    host, asked = Host(), []
    host.bring = asked.append
    for w in (1.0, 2.0):
        painted(decoder, codec, condition_guidance=w, host=host)
    one, two = (decoder.backbone.working_memory(count, SIZE) for count in (2, 4))
    assert asked == [one, two]


def test_a_decoder_that_never_saw_an_image_without_its_condition_is_not_guided(codec):
    for w in (0.0, 0.5, 2.0):
        with pytest.raises(ValueError, match=rf"must be 1, which is off, got {w:g}: .*train.py --drop-condition 0.1"):
            painted(tiny_decoder(), codec, condition_guidance=w)


@pytest.mark.parametrize("w", [-1.0, 21, float("nan"), "2", True])
def test_a_weight_out_of_range_is_named(decoder, codec, w):
    with pytest.raises(ValueError, match=r"condition_guidance must be a finite number in 0\.\.20.*: 1 is off"):
        painted(decoder, codec, condition_guidance=w)
