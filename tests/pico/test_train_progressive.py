"""Training of pico's masked sampler: its start, its examples, its scenes, and a run that stops and goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import dcdd_pico.train_progressive as stage
from dcdd_core import registry
from dcdd_core.method.masked_modelling import CORRUPTIONS
from dcdd_core.models.masked.files import load_masked
from dcdd_core.models.masked.words import padded
from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import Codebook
from dcdd_pico.build_context import BuildContext, Recipe
from dcdd_pico.progressive import SAMPLING, TEMPLATE, progressive_folder, start_from_janus
from dcdd_pico.scene_tokens import SceneTokens, encode_scenes, scene_facts_of
from dcdd_pico.scenes import scene_facts
from dcdd_pico.train_progressive import Corruption, Example, losses_of, make_example
from tests.models.masked.tiny_masked import tiny_masked, tiny_network
from tests.tiny import random_pico, tiny_janus, tiny_vq

SMALL = Recipe(held_out_scenes=4, progressive_steps=4, progressive_batch=4)
PROMPTS = ["a red circle on the left", "a blue square"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return random_pico(tmp_path_factory.mktemp("pico") / "weights")


@pytest.fixture
def corruption():
    return lambda kinds=CORRUPTIONS: Corruption(kinds, Codebook(tiny_vq().quantize.embedding.weight), tiny_network())


def batch_of(sampler, rows: int = 8, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 64, (rows, 16), generator=draw)
    ids = [sampler.words.ids(PROMPTS[k % 2]) for k in range(rows)]
    return ids, tokens, torch.randn(rows, 16, generator=draw)


@torch.no_grad()
def test_it_starts_with_what_janus_knows(weights):
    vlm = str(weights / "janus")
    sampler = registry.sampler_family(vlm).load_sampler(vlm)
    network, model = start_from_janus(sampler.model, 0), sampler.model.model
    ids = sampler.tokenizer(TEMPLATE.replace("{prompt}", "a red circle"), add_special_tokens=False)["input_ids"]
    prefix = network.prefix(*padded([ids]))
    cache = model.language_model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    for layer in range(network.config.layers):
        torch.testing.assert_close(prefix.values[layer], cache.layers[layer].values, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(prefix.keys[layer], cache.layers[layer].keys, rtol=1e-4, atol=1e-4)
    tokens = torch.arange(144)[None]
    embedded = sampler.model.prepare_embeddings_for_image_generation(tokens)
    torch.testing.assert_close(network._embed(tokens), embedded, rtol=1e-4, atol=1e-4)
    hidden = torch.randn(3, network.config.width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network.logits(hidden), model.generation_head(hidden), rtol=1e-4, atol=1e-4)
    everything = torch.arange(network.config.codes)[None]
    torch.testing.assert_close(
        network.mask, sampler.model.prepare_embeddings_for_image_generation(everything)[0].mean(0), rtol=1e-4, atol=1e-4
    )
    assert not any(part.any() for part in network.scores(hidden))


def test_an_example_hides_and_corrupts(corruption):
    sampler = tiny_masked()
    example = make_example(*batch_of(sampler, 400), corruption(), torch.Generator().manual_seed(1))
    visible = ~example.hidden
    assert (example.seen[example.hidden] == 64).all()
    assert torch.equal(example.wrong, visible & (example.seen != example.tokens))
    assert not (example.probe & ~example.hidden).any()
    assert not example.probe[100:].any() and example.probe[:100].any()
    complete = (~example.hidden).all(1).float().mean()
    assert 0.07 < complete < 0.14, "a tenth is complete, a few more by chance"
    share = example.wrong.sum() / visible.sum()
    assert 0.15 < share < 0.21, "a fifth of the visible tokens, less those that happen to be right"
    again = make_example(*batch_of(sampler, 400), corruption(), torch.Generator().manual_seed(1))
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
    draws = corruption(["samples"])
    with torch.no_grad():
        draws.model.head_out.weight.zero_()
        draws.model.head_out.bias.zero_()
        draws.model.head_out.bias[7] = 99.0
    read = []
    draws.model.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
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
    example = Example(
        ids=ids,
        tokens=run.tokens,
        errors=torch.zeros(2, 16),
        hidden=~nothing,
        wrong=nothing,
        seen=torch.full((2, 16), 64),
        probe=nothing,
    )
    expected = F.cross_entropy(run.logits.transpose(1, 2), run.tokens)
    losses = losses_of(sampler.model, example)
    torch.testing.assert_close(losses["hidden"], expected, rtol=1e-4, atol=1e-4)
    error, _ = sampler.model.scores(sampler.model(example.seen, sampler.model.prefix(*padded(ids))))
    assert float(losses["error"]) == pytest.approx(float(error.square().mean()), rel=1e-4)
    assert float(losses["wrong"]) == float(losses["importance"]) == 0


def test_clean_tokens_count_a_tenth_and_scores_little(corruption):
    sampler = tiny_masked()
    example = make_example(*batch_of(sampler), corruption(), torch.Generator().manual_seed(1))
    losses = losses_of(sampler.model, example)
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


def test_scenes_come_in_blocks_each_gone_through_a_few_times(weights, tmp_path):
    scenes = SceneTokens(tmp_path, weights, "x", seed=5, size=96, block=6, uses=2, ahead=False)
    batches = [scenes.batch(step, 4) for step in range(6)]
    captions = [facts.caption() for batch in batches for facts in batch.facts]
    known = [facts.caption() for facts in scene_facts("train", 12)]
    for block in range(2):
        for use in range(2):
            first = 12 * block + 6 * use
            assert sorted(captions[first : first + 6]) == sorted(known[6 * block : 6 * block + 6])
    assert captions[:6] != captions[6:12], "in a new order"
    vlm = str(weights / "janus")
    tokenizer = registry.sampler_family(vlm).load_tokenizer(vlm, dtype=torch.float32)
    tokens, errors = encode_scenes(tokenizer, "train", range(12), size=96)
    for batch in batches:
        for facts, row, error in zip(batch.facts, batch.tokens, batch.errors):
            index = known.index(facts.caption())
            assert torch.equal(row, tokens[index])
            torch.testing.assert_close(error, errors[index].half().float())
    again = SceneTokens(tmp_path, weights, "x", seed=5, size=96, block=6, uses=2, ahead=False).batch(4, 4)
    assert torch.equal(again.tokens, batches[4].tokens) and again.facts == batches[4].facts
    assert len(list(tmp_path.iterdir())) == 2


def test_a_process_of_its_own_prepares_the_same_blocks(weights, tmp_path):
    scenes = SceneTokens(tmp_path / "a", weights, "x", seed=5, size=96, block=3, uses=1)
    try:
        found = scenes.batch(0, 4)
    finally:
        scenes.close()
    inline = SceneTokens(tmp_path / "b", weights, "x", seed=5, size=96, block=3, uses=1, ahead=False).batch(0, 4)
    assert torch.equal(found.tokens, inline.tokens) and found.facts == inline.facts


def test_facts_are_those_of_the_scenes():
    assert scene_facts_of("calibration", [3, 0]) == [scene_facts("calibration", 4)[k] for k in (3, 0)]


@pytest.mark.filterwarnings("ignore:.*")
def test_a_stopped_training_goes_on_and_is_written(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "_BLOCK", 8)
    monkeypatch.setattr(stage, "_SAVE_EVERY", 2)
    contexts = [BuildContext(folder=tmp_path / k, device=torch.device("cpu"), recipe=SMALL) for k in "ab"]
    whole, codebook = stage.train_progressive(contexts[0], weights, ahead=False)
    batch = SceneTokens.batch

    def stop(self, step, size):
        if step == 3:
            raise KeyboardInterrupt
        return batch(self, step, size)

    with monkeypatch.context() as patch:
        patch.setattr(SceneTokens, "batch", stop)
        with pytest.raises(KeyboardInterrupt):
            stage.train_progressive(contexts[1], weights, ahead=False)
    again, _ = stage.train_progressive(contexts[1], weights, ahead=False)
    for (name, one), other in zip(whole.state_dict().items(), again.state_dict().values()):
        assert torch.equal(one, other), name
    start = start_from_janus(registry.sampler_family(weights / "janus").load_sampler(str(weights / "janus")).model, 9)
    assert all(not torch.equal(one, other) for one, other in zip(start.parameters(), whole.parameters()))

    folder = stage.save_progressive(contexts[0], weights, whole, codebook)
    assert folder == progressive_folder(weights)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6 * 10**6
    assert "| loss |" in (folder / "README.md").read_text() and (tmp_path / "a" / "progressive-curves.png").exists()
    stored = load_file(folder / "model.safetensors")
    assert stored["layers.0.q.weight"].dtype == torch.int8
    sampler = load_masked(folder)
    run = sampler.sample(["a large plain red star at the top"], seeds=[0], options=SamplingOptions(guidance=3.0))
    assert run.grid == (12, 12) and sampler.sampling == SAMPLING
    tokenizer = registry.sampler_family(folder).load_tokenizer(str(folder))
    assert tokenizer.codebook.fingerprint == run.codebook
    assert tokenizer.decode_tokens(run.tokens, run.grid).shape == (1, 3, 96, 96)


def test_another_recipe_does_not_go_on(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "_BLOCK", 8)
    context = BuildContext(folder=tmp_path, device=torch.device("cpu"), recipe=replace(SMALL, progressive_steps=1))
    stage.train_progressive(context, weights, ahead=False)
    with pytest.raises(ValueError, match="corruptions"):
        stage.train_progressive(context, weights, kinds=["shuffled"], ahead=False)


def test_tiny_janus_starts_a_network_only_with_as_many_key_heads():
    with pytest.raises(ValueError, match="2 key heads for 4 heads"):
        start_from_janus(tiny_janus()[0], 0)
