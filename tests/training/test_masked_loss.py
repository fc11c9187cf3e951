"""What a masked sampler learns from a batch: hidden positions, wrong tokens, and the losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dcdd_core.method.masked_modelling import CORRUPTIONS
from dcdd_core.models.masked.words import padded
from dcdd_core.training.masked_loss import Corruption, MaskedExample, make_example, masked_losses
from dcdd_core.types import Codebook
from tests.models.masked.tiny_masked import tiny_masked, tiny_network
from tests.tiny import tiny_vq

PROMPTS = ["a red circle on the left", "a blue square"]


@pytest.fixture
def corruption():
    codebook = Codebook(tiny_vq().quantize.embedding.weight)
    usual = tiny_network()
    return lambda kinds=CORRUPTIONS, network=usual: Corruption(kinds, codebook, lambda work: work(network))


def batch_of(sampler, rows: int = 8, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 64, (rows, 16), generator=draw)
    ids = [sampler.words.ids(PROMPTS[k % 2]) for k in range(rows)]
    return ids, tokens, torch.randn(rows, 16, generator=draw)


def test_an_example_hides_and_corrupts(corruption):
    sampler = tiny_masked()
    example = make_example(*batch_of(sampler, 400), corruption(), torch.Generator().manual_seed(1), codes=64)
    visible = ~example.hidden
    assert (example.seen[example.hidden] == 64).all()
    assert torch.equal(example.wrong, visible & (example.seen != example.tokens))
    assert not (example.probe & ~example.hidden).any()
    assert not example.probe[100:].any() and example.probe[:100].any()
    complete = (~example.hidden).all(1).float().mean()
    assert 0.07 < complete < 0.14, "a tenth is complete, a few more by chance"
    share = example.wrong.sum() / visible.sum()
    assert 0.15 < share < 0.21, "a fifth of the visible tokens, less those that happen to be right"
    again = make_example(*batch_of(sampler, 400), corruption(), torch.Generator().manual_seed(1), codes=64)
    assert torch.equal(again.seen, example.seen) and torch.equal(again.probe, example.probe)


def test_wrong_tokens_come_from_where_they_should(corruption):
    ids, tokens, _ = batch_of(tiny_masked(), 6)
    hidden, chosen = torch.zeros(6, 16, dtype=torch.bool), torch.ones(6, 16, dtype=torch.bool)
    hidden[:, :4], chosen[:, :4] = True, False
    found = {
        kind: corruption([kind])(tokens, hidden, chosen, ids, torch.Generator().manual_seed(2)) for kind in CORRUPTIONS
    }
    for kind, wrong in found.items():
        assert torch.equal(wrong[:, :4], tokens[:, :4]), kind
        assert (wrong[:, 4:] != tokens[:, 4:]).float().mean() > 0.8, kind
    for row in range(6):
        assert set(found["shuffled"][row, 4:].tolist()) <= set(tokens[row].tolist())
    made = corruption(["nearest"])
    assert (made.neighbours[tokens] == found["nearest"][..., None]).any(-1)[:, 4:].all()
    network, read = tiny_network(), []
    draws = corruption(["samples"], network)
    with torch.no_grad():
        network.head_out.weight.zero_()
        network.head_out.bias.zero_()
        network.head_out.bias[7] = 99.0
    network.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    assert (draws(tokens, hidden, chosen, ids, torch.Generator())[:, 4:] == 7).all(), "the model's own draws"
    assert (read[0] == 64).all(), "of positions that it does not see"
    assert torch.equal(corruption([])(tokens, hidden, chosen, ids, torch.Generator()), tokens)
    with pytest.raises(ValueError, match=r"unknown corruptions \['noise'\]"):
        corruption(["noise"])


@pytest.mark.parametrize("guidance", [1.0, 0.0])
@torch.no_grad()
def test_the_loss_reads_the_very_logits_that_sampling_draws_from(guidance):
    """Everything hidden, and a single pass: guidance 1 is the prompt alone, 0 the row of dropped captions."""
    sampler = tiny_masked()
    options = replace(sampler.sampling, guidance=guidance, passes=1, revision_passes=0, ramp=False)
    run = sampler.sample(PROMPTS, seeds=[0, 1], options=options)
    ids = [sampler.words.ids(prompt) for prompt in PROMPTS]
    if guidance == 0:
        ids = [sampler.words.unconditional(row) for row in ids]
    nothing = torch.zeros(2, 16, dtype=torch.bool)
    example = MaskedExample(
        ids=ids,
        tokens=run.tokens,
        errors=torch.zeros(2, 16),
        hidden=~nothing,
        wrong=nothing,
        seen=torch.full((2, 16), 64),
        probe=nothing,
    )
    expected = F.cross_entropy(run.logits.transpose(1, 2), run.tokens)
    losses = masked_losses(sampler.model, example)
    torch.testing.assert_close(losses["hidden"], expected, rtol=1e-4, atol=1e-4)
    error, _ = sampler.model.scores(sampler.model(example.seen, sampler.model.prefix(*padded(ids))))
    assert float(losses["error"]) == pytest.approx(float(error.square().mean()), rel=1e-4)
    assert float(losses["wrong"]) == float(losses["importance"]) == 0


def test_clean_tokens_count_a_tenth_and_scores_little(corruption):
    sampler = tiny_masked()
    example = make_example(*batch_of(sampler), corruption(), torch.Generator().manual_seed(1), codes=64)
    losses = masked_losses(sampler.model, example)
    logits = sampler.model.logits(sampler.model(example.seen, sampler.model.prefix(*padded(example.ids))))
    each = F.cross_entropy(logits.transpose(1, 2), example.tokens, reduction="none")
    weights = torch.where(example.hidden | example.wrong, 1.0, 0.1)
    tokens = (each * weights).sum() / weights.sum()
    expected = tokens + 0.05 * losses["error"] + 0.02 * losses["importance"]
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses["wrong"], each[example.wrong].mean(), rtol=1e-4, atol=1e-4)
    # Importance: a second reading with the probed positions revealed.
    more = torch.where(example.probe, example.tokens, example.seen)[:2]
    after = sampler.model.logits(sampler.model(more, sampler.model.prefix(*padded(example.ids)).rows(0, 2)))
    drop = each[:2] - F.cross_entropy(after.transpose(1, 2), example.tokens[:2], reduction="none")
    _, predicted = sampler.model.scores(sampler.model(example.seen, sampler.model.prefix(*padded(example.ids))))
    rows = []
    for row in range(2):
        rest = example.hidden[row] & ~example.probe[row]
        if example.probe[row].any() and rest.any():
            measured = drop[row][rest].sum() / example.probe[row].sum()
            rows.append(F.smooth_l1_loss(predicted[row][example.probe[row]].mean(), measured))
    assert rows
    torch.testing.assert_close(losses["importance"], torch.stack(rows).mean(), rtol=1e-3, atol=1e-3)
