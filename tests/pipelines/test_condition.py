"""Which condition a decoder is given."""

from dataclasses import replace

import pytest
import torch

from dcdd_core.method.lcdm import map_logits
from dcdd_core.pipelines.condition import condition_for
from dcdd_core.types import Calibration, Codebook, TokenLogits
from tests.tiny import tiny_card, tiny_vq


@pytest.fixture(scope="module")
def codebook():
    return Codebook(tiny_vq().quantize.embedding.weight)


@pytest.fixture(scope="module")
def grid(codebook):
    logits = torch.rand(1, 16, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return TokenLogits(logits, torch.arange(16)[None], (4, 4), source="proxy", codebook=codebook.fingerprint)


def test_the_card_s_calibration_is_used_unless_another_is_given(codebook, grid):
    card, other = tiny_card(), Calibration(scale=2.0)
    for given, expected in ((None, card.calibration), (other, other)):
        found = condition_for(card, grid, codebook, calibration=given)
        assert torch.equal(found.code_vectors, map_logits(grid, codebook, expected).code_vectors)


def test_a_discrete_decoder_sees_the_tokens_alone(codebook, grid):
    found = condition_for(tiny_card(variant="discrete"), grid, codebook)
    assert torch.equal(found.code_vectors, codebook.vectors[grid.tokens])
    assert torch.equal(found.uncertainty, torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(1, 16, 4))


def test_a_decoder_without_calibration_takes_none(codebook, grid):
    card = replace(tiny_card(variant="lcdm"), calibration=None)
    assert torch.equal(condition_for(card, grid, codebook).code_vectors, map_logits(grid, codebook).code_vectors)
    with pytest.raises(ValueError, match="takes no calibration"):
        condition_for(card, grid, codebook, calibration=Calibration(scale=2.0))
