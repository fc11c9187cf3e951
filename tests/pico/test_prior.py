"""The unconditional prior: a low-rank difference of the decoder's weights, attached, merged, stored and loaded."""

import os
from dataclasses import replace

import pytest
import torch

from dcdd_core.models.bundle import DecoderOptions, load_decoder
from dcdd_core.models.prior import SHIFT, NullCondition, PriorDifference
from dcdd_core.pipelines.decode import decode
from dcdd_core.types import Condition
from dcdd_pico import embedded
from dcdd_pico.embedded import PRIOR
from dcdd_pico.models import load_pico
from dcdd_pico.prior import load_prior
from tests.tiny import fill, random_pico

NOTHING = Condition(torch.zeros(2, 1, 1), torch.zeros(2, 1, 4), (1, 1))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return random_pico(tmp_path_factory.mktemp("pico") / "weights")


def whole_decoder(weights):
    options = DecoderOptions(dtype=torch.float32, fold=False)
    return load_decoder(weights / "decoder.safetensors", options=options).requires_grad_(False)


def inputs(decoder, batch=2):
    draw = torch.Generator().manual_seed(0)
    packed = decoder.backbone.pack(torch.randn(batch, 16, 24, 24, generator=draw))
    blank = torch.zeros(batch, 16, 24, 24)
    context = decoder.backbone.context(blank, torch.ones(batch, 1, 96, 96), 4)
    return packed, context, torch.full((batch,), 0.5)


def velocity(decoder, tokens):
    packed, context, t = inputs(decoder)
    decoder.prepare([0.5])
    with torch.no_grad():
        return decoder(packed, context, tokens, t, (24, 24))


def test_a_difference_that_starts_changes_nothing(weights):
    decoder = whole_decoder(weights)
    tokens = torch.zeros(2, 144, decoder.backbone.token_width)
    before = velocity(decoder, tokens)
    difference = PriorDifference(decoder, 3)
    difference.start(seed=0)
    difference.attach(decoder, merge=False)
    assert torch.equal(velocity(decoder, tokens), before)
    # Yet every layer learns: the gradient reaches each `up`.
    packed, context, t = inputs(decoder)
    loss = decoder(packed, context, decoder.condition_tokens(NOTHING, (24, 24)), t, (24, 24)).square().mean()
    loss.backward()
    assert all(layer.up.grad is not None and layer.up.grad.any() for layer in difference.layers.values())
    assert difference.token.grad.any()


def test_merged_and_attached_differences_are_the_same_network(weights):
    attached, merged = whole_decoder(weights), whole_decoder(weights)
    difference = fill(PriorDifference(attached, 3), 7)
    tokens = NullCondition(difference.token, attached.backbone.patch)(NOTHING, (24, 24)).detach()
    before = velocity(attached, tokens)
    difference.attach(attached, merge=False)
    difference.attach(merged, merge=True)
    found = velocity(merged, tokens)
    torch.testing.assert_close(found, velocity(attached, tokens), rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 1e-3


def test_the_loaded_prior_paints_the_same_whatever_the_condition(weights):
    models = load_pico(weights=weights, with_sampler=False)
    prior = load_prior(weights=weights)
    assert prior.card == replace(models.decoder.card, shift=SHIFT)
    draw = torch.Generator().manual_seed(1)
    first, second = (
        Condition(
            torch.rand(1, 144, 8, generator=draw), torch.rand(1, 144, 4, generator=draw), (12, 12),
            codebook=models.tokenizer.codebook.fingerprint,
        )
        for _ in range(2)
    )  # fmt: skip
    images = [decode(prior, models.codec, condition, seeds=[3], steps=2).latents for condition in (first, second)]
    assert torch.equal(*images)
    own = [decode(models.decoder, models.codec, condition, seeds=[3], steps=2).latents for condition in (first, second)]
    assert not torch.equal(*own) and not torch.equal(own[0], images[0])


def test_the_difference_comes_back_from_its_file(weights, tmp_path):
    decoder = whole_decoder(weights)
    difference = fill(PriorDifference(decoder, 3), 8)
    difference.save(tmp_path / PRIOR)
    again = PriorDifference.load(tmp_path / PRIOR, decoder)
    assert all(not weight.requires_grad for weight in again.parameters())
    for name, value in difference.state_dict().items():
        read = again.state_dict()[name]
        if value.ndim == 2:
            step = value.abs().amax(1, keepdim=True) / 127
            assert ((read - value).abs() <= 0.5 * step * 1.0001).all(), name
        else:
            assert torch.equal(read, value.half().float()), name


def test_the_token_is_repeated_over_the_latent_tokens():
    null = NullCondition(torch.nn.Parameter(torch.arange(3.0)), patch=2)
    condition = Condition(torch.zeros(2, 4, 8), torch.zeros(2, 4, 4), (2, 2))
    tokens = null(condition, (6, 4))
    assert tokens.shape == (2, 6, 3) and torch.equal(tokens[1, 5], torch.arange(3.0))


def test_a_missing_prior_is_named(weights, tmp_path):
    with pytest.raises(ValueError, match=rf"{PRIOR} does not exist"):
        load_prior(weights=_without(weights, tmp_path))


def _without(weights, folder):
    for path in weights.iterdir():
        if path.name != PRIOR:
            (folder / path.name).symlink_to(path)
    return folder


def test_the_shipped_prior_is_small_and_fits_the_shipped_decoder():
    path = embedded.WEIGHTS / PRIOR
    assert path.stat().st_size <= 4 * 10**6
    assert load_prior().card.shift == SHIFT


def test_exported_weights_can_be_read_by_others(tmp_path):
    before = os.umask(0o022)
    try:
        weights = random_pico(tmp_path / "weights")
    finally:
        os.umask(before)
    modes = {
        str(path.relative_to(weights)): path.stat().st_mode & 0o777 for path in weights.rglob("*") if path.is_file()
    }
    assert len(modes) > 8 and set(modes.values()) == {0o644}, modes
