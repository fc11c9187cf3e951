"""What a masked sampler learns from a batch: hidden positions, wrong tokens, and the losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dcdd_core.method.masked_modelling import CORRUPTIONS
from dcdd_core.models.masked.words import padded
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.training.masked_loss import (
    Corruption,
    MaskedExample,
    make_example,
    masked_losses,
    tokens_and_errors,
)
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
    assert not example.probe[100:].any()
    counts = (0.08 * example.hidden[:100].sum(1) + 0.5).floor()
    assert torch.equal(example.probe[:100].sum(1).float(), counts) and counts.any(), "a twelfth of the hidden ones"
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


def test_each_image_has_wrong_tokens_of_one_source_and_the_model_reads_its_own_caption(corruption):
    ids, tokens, _ = batch_of(tiny_masked(), 40)
    hidden, chosen = torch.zeros(40, 16, dtype=torch.bool), torch.zeros(40, 16, dtype=torch.bool)
    hidden[:, :3], chosen[:, 8:] = True, True
    network, read, prompts = tiny_network(), [], []
    network.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    prefix = network.prefix
    network.prefix = lambda *given: prompts.append(given) or prefix(*given)
    with torch.no_grad():
        network.head_out.weight.zero_()
        network.head_out.bias.zero_()
        network.head_out.bias[7] = 99.0
    made = corruption(CORRUPTIONS, network)
    wrong = made(tokens, hidden, chosen, ids, torch.Generator().manual_seed(3))
    assert torch.equal(wrong[~chosen], tokens[~chosen])
    drawn = (wrong[:, 8:] == 7).all(1)
    near = (made.neighbours[tokens] == wrong[..., None]).any(-1)[:, 8:].all(1)
    own = torch.stack([torch.isin(row[8:], image).all() for row, image in zip(wrong, tokens)])
    assert (drawn | near | own).all() and min(drawn.sum(), (near & ~own).sum(), (own & ~near).sum()) > 4
    # What stays visible is seen, hidden and replaced positions are not.
    expected = tokens[drawn].masked_fill((hidden | chosen)[drawn], 64)
    assert torch.equal(read[0], expected)
    for found, held in zip(prompts[0], padded([row for row, took in zip(ids, drawn) if took])):
        assert torch.equal(found, held)


def test_codes_have_eight_neighbours_or_all_that_there_are(corruption):
    assert corruption(["nearest"]).neighbours.shape == (64, 8)
    few = Codebook(F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1))
    made = Corruption(["nearest"], few, lambda work: work(None))
    assert made.neighbours.sort(1).values.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]


def test_another_model_may_draw(corruption):
    made, other = corruption(), lambda work: work(None)
    assert made.drawing(other).run is other and made.drawing(other).kinds == made.kinds and made.run is not other


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_small_batch_measures_importance_too(corruption, rows):
    sampler = tiny_masked()
    for seed in range(20):
        example = make_example(*batch_of(sampler, rows), corruption(), torch.Generator().manual_seed(seed), codes=64)
        assert not example.probe[1:].any()
        if example.probe.any():
            break
    assert example.probe[0].any() and float(masked_losses(sampler.model, example)["importance"]) > 0


def test_tokens_come_with_the_logarithm_of_their_error():
    class Nearest(VQTokenizer):
        codebook = Codebook(torch.eye(3))

        def __init__(self):
            pass

        def tokens(self, features):
            return features.argmax(-1)

    # At cosines .8, .64 and 1 of the nearest code, whatever the length.
    features = torch.tensor([[[4.0, 3.0, 0.0], [0.48, 0.6, 0.64], [0.0, 0.0, 5.0]]])
    tokens, errors = tokens_and_errors(Nearest(), features)
    assert tokens.tolist() == [[0, 2, 2]]
    torch.testing.assert_close(errors, torch.tensor([[0.2, 1 - 0.64, 1e-4]]).log(), rtol=1e-4, atol=1e-4)


def test_importance_is_learned_and_what_was_measured_is_not(corruption):
    """The target's gradient would teach the tokens' logits to make positions matter."""
    sampler = tiny_masked()
    network = sampler.model.requires_grad_(True)
    example = make_example(*batch_of(sampler), corruption(), torch.Generator().manual_seed(1), codes=64)
    assert example.probe.any()
    losses = masked_losses(network, example)
    losses["loss"].backward()
    found = network.head_out.weight.grad.clone()
    network.zero_grad()
    logits = network.logits(network(example.seen, network.prefix(*padded(example.ids))))
    each = F.cross_entropy(logits.transpose(1, 2), example.tokens, reduction="none")
    weights = torch.where(example.hidden | example.wrong, 1.0, 0.1)
    ((each * weights).sum() / weights.sum()).backward()
    torch.testing.assert_close(found, network.head_out.weight.grad, rtol=1e-4, atol=1e-6)
    assert {name for name, value in losses.items() if value.requires_grad} == {"loss"}


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
    torch.testing.assert_close(losses["hidden"], each[example.hidden].mean(), rtol=1e-4, atol=1e-4)
    error, _ = sampler.model.scores(sampler.model(example.seen, sampler.model.prefix(*padded(example.ids))))
    squared = (error - example.errors).square()[example.hidden].mean()
    torch.testing.assert_close(losses["error"], squared, rtol=1e-4, atol=1e-4)
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
