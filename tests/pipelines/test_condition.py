"""Which condition a decoder is given."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dcdd_core.method.calibration import apply_calibration
from dcdd_core.method.lcdm import map_logits, map_probabilities
from dcdd_core.pipelines.condition import condition_for, condition_of_tokens, serving
from dcdd_core.types import Calibration, Codebook, TokenLogits
from tests.tiny import tiny_card, tiny_vq


@pytest.fixture(scope="module")
def codebook():
    return Codebook(tiny_vq().quantize.embedding.weight)


@pytest.fixture(scope="module")
def grid(codebook):
    logits = torch.rand(1, 16, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return TokenLogits(logits, torch.arange(16)[None], (4, 4), source="proxy", codebook=codebook.fingerprint)


def test_the_card_s_calibration_is_used_unless_another_is_served(codebook, grid):
    card, other = tiny_card(), Calibration(scale=2.0)
    for served, expected in ((card, card.calibration), (serving(card, calibration=other), other)):
        found = condition_for(served, grid, codebook)
        assert torch.equal(found.code_vectors, map_logits(grid, codebook, expected).code_vectors)


def test_a_discrete_decoder_sees_the_tokens_alone(codebook, grid):
    found = condition_for(tiny_card(variant="discrete"), grid, codebook)
    certain = map_probabilities(F.one_hot(grid.tokens, 64).float(), codebook)
    assert torch.equal(found.code_vectors, certain[0]) and torch.equal(found.uncertainty, certain[1])
    without_logits = condition_of_tokens(grid.tokens, grid.grid, codebook)
    assert torch.equal(without_logits.code_vectors, found.code_vectors)
    assert torch.equal(without_logits.uncertainty, found.uncertainty)
    assert (without_logits.grid, without_logits.codebook) == (found.grid, found.codebook)


@pytest.mark.parametrize("variant", ["discrete", "lcdm", "lcdm+lc"])
def test_tokens_of_another_codebook_are_refused(codebook, grid, variant):
    other = Codebook(torch.randn(64, 8, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(ValueError, match="codebook"):
        condition_for(tiny_card(variant=variant), grid, other)


def test_a_decoder_without_calibration_takes_none(codebook, grid):
    card = tiny_card(variant="lcdm", calibration=None)
    assert torch.equal(condition_for(card, grid, codebook).code_vectors, map_logits(grid, codebook).code_vectors)
    with pytest.raises(ValueError, match="takes no calibration"):
        serving(card, calibration=Calibration(scale=2.0))
    with pytest.raises(ValueError, match="has none"):
        serving(card, anchor=1.0)


def test_a_reading_that_would_do_nothing_is_refused():
    bare, discrete = tiny_card(variant="lcdm", calibration=None), tiny_card(variant="discrete", calibration=None)
    assert serving(bare, reads="logits").reads == "logits" and serving(discrete, reads="tokens").reads == "tokens"
    for card, reads, words in (
        (bare, "anchored", "has no calibration"),
        (discrete, "anchored", "tokens alone"),
        (discrete, "logits", "tokens alone"),
    ):
        with pytest.raises(ValueError, match=f"reads='{reads}' would do nothing: this decoder .*{words}"):
            serving(card, reads=reads)


def test_an_anchor_and_the_tokens_alone_exclude_each_other():
    with pytest.raises(ValueError, match="exclude"):
        serving(tiny_card(), anchor=1.0, reads="tokens")
    assert serving(tiny_card(), anchor=1.0).reads == "anchored"


def test_reading_the_logits_is_the_paper_whatever_anchor_was_fitted(codebook):
    logits = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(1))
    sampled = TokenLogits(logits, logits.argmax(-1), (4, 4), codebook=codebook.fingerprint)
    plain, anchored = Calibration(scale=25.0, smoothing=0.01), Calibration(scale=25.0, smoothing=0.01, anchor=3.0)
    found = condition_for(tiny_card(calibration=anchored), sampled, codebook)
    assert torch.equal(found.code_vectors, map_logits(sampled, codebook, plain).code_vectors)
    found = condition_for(tiny_card(calibration=anchored, reads="anchored"), sampled, codebook)
    assert torch.equal(found.code_vectors, map_logits(sampled, codebook, anchored).code_vectors)


def test_what_a_vlm_gives_is_read_as_the_card_says(codebook, grid):
    logits = 4 * torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(1))
    sampled = TokenLogits(logits, grid.tokens, (4, 4), codebook=codebook.fingerprint)
    card = tiny_card()
    as_logits = condition_for(card, sampled, codebook)
    as_tokens = condition_for(serving(card, reads="tokens"), sampled, codebook)
    assert torch.equal(as_logits.code_vectors, map_logits(sampled, codebook, card.calibration).code_vectors)
    vectors = codebook.vectors[grid.tokens]
    chances = 0.99 * (25 * (vectors @ codebook.vectors.T)).softmax(-1) + 0.01 / 64
    expected = map_probabilities(chances, codebook)  # the card's calibration: s = 25, eps = .01
    torch.testing.assert_close(as_tokens.code_vectors, expected[0])
    torch.testing.assert_close(as_tokens.uncertainty, expected[1])
    nearness = F.cosine_similarity(as_tokens.code_vectors, codebook.vectors[grid.tokens], dim=-1)
    assert nearness.mean() > F.cosine_similarity(as_logits.code_vectors, codebook.vectors[grid.tokens], dim=-1).mean()
    # Proxies are the training's own: the way of reading does not touch them.
    assert torch.equal(
        condition_for(serving(card, reads="tokens"), grid, codebook).code_vectors,
        condition_for(card, grid, codebook).code_vectors,
    )


def test_the_anchor_leads_to_the_sampled_token(codebook, grid):
    logits = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(1))
    sampled = TokenLogits(logits, grid.tokens, (4, 4), codebook=codebook.fingerprint)
    near = [
        F.cosine_similarity(
            condition_for(serving(tiny_card(), anchor=beta), sampled, codebook).code_vectors,
            codebook.vectors[grid.tokens],
            dim=-1,
        ).mean()
        for beta in (0.0, 2.0, 8.0)
    ]
    assert near[0] < near[1] < near[2]


def test_calibrated_logits_are_mapped_as_they_are(codebook, grid):
    card = tiny_card()
    made = apply_calibration(grid, codebook, card.calibration)
    for reads in ("logits", "tokens"):
        found = condition_for(serving(card, reads=reads), made, codebook)
        torch.testing.assert_close(found.code_vectors, condition_for(card, grid, codebook).code_vectors)


@pytest.mark.parametrize("reads", ["logits", "anchored", "tokens"])
def test_what_an_edit_kept_of_an_image_is_calibrated_once(codebook, grid, reads):
    """Kept positions are mapped as in the image, new ones as in what was sampled whole."""
    card = serving(tiny_card(calibration=Calibration(scale=25.0, smoothing=0.01, anchor=3.0)), reads=reads)
    image = apply_calibration(grid, codebook, card.calibration)
    new = torch.zeros(1, 16, dtype=torch.bool)
    new[0, 3:9] = True
    drawn = 4 * torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(1))
    tokens = torch.where(new, drawn.argmax(-1), image.tokens)
    logits = torch.where(new[..., None], drawn, image.logits)
    edited = TokenLogits(logits, tokens, (4, 4), codebook=codebook.fingerprint, calibrated_at=~new)
    found = condition_for(card, edited, codebook)
    kept = condition_for(card, image, codebook)
    sampled = condition_for(card, replace(edited, logits=drawn, calibrated_at=None), codebook)
    for name in ("code_vectors", "uncertainty"):
        ours, before, fresh = (getattr(one, name) for one in (found, kept, sampled))
        assert torch.equal(ours[~new], before[~new])
        torch.testing.assert_close(ours[new], fresh[new])
