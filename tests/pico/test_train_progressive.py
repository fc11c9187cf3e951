"""Training of pico's masked sampler: its start, its examples, its scenes, and a run that stops and goes on."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import dcdd_pico.train_progressive as stage
from dcdd_core import registry
from dcdd_core.models.janus.masked_start import TEMPLATE, start_from_janus
from dcdd_core.models.janus.sampler import JanusSampler
from dcdd_core.models.masked.files import load_masked
from dcdd_core.models.masked.words import padded
from dcdd_core.protocols import SamplingOptions
from dcdd_pico import token_training
from dcdd_pico.ahead import Ahead
from dcdd_pico.build_context import BuildContext, Recipe
from dcdd_pico.progressive import SAMPLING, progressive_folder
from dcdd_pico.scene_tokens import SceneTokens, encode_scenes, scene_facts_of
from dcdd_pico.scenes import scene_facts
from tests.pico.stopping import stopped_at
from tests.tiny import random_pico, tiny_janus

SMALL = Recipe(held_out_scenes=4, progressive_layers=2, progressive_steps=4, progressive_batch=4)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return random_pico(tmp_path_factory.mktemp("pico") / "weights")


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


def test_a_block_that_is_there_does_not_wait_for_the_process(weights, tmp_path, monkeypatch):
    given = {"seed": 5, "size": 96, "block": 3, "uses": 1, "ahead": False}
    scenes = SceneTokens(tmp_path, weights, "x", **given)
    first = scenes.batch(0, 3)
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(Ahead, "ask", lambda self, number: asked.append(number))
        patch.setattr(Ahead, "result", lambda self, number: pytest.fail("it is there"))
        again = SceneTokens(tmp_path, weights, "x", **given)
        assert torch.equal(again.batch(0, 3).tokens, first.tokens)
    assert asked == [1], "the next is asked for, this one is read"


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
    monkeypatch.setattr(token_training, "_BLOCK", 8)
    monkeypatch.setattr(stage, "_SAVE_EVERY", 2)
    contexts = [BuildContext(folder=tmp_path / k, device=torch.device("cpu"), recipe=SMALL) for k in "ab"]
    whole, codebook = stage.train_progressive(contexts[0], weights, ahead=False)
    with stopped_at(3, SceneTokens):
        stage.train_progressive(contexts[1], weights, ahead=False)
    again, _ = stage.train_progressive(contexts[1], weights, ahead=False)
    for (name, one), other in zip(whole.state_dict().items(), again.state_dict().values()):
        assert torch.equal(one, other), name
    janus = registry.sampler_family(weights / "janus").load_sampler(str(weights / "janus")).model
    start = start_from_janus(janus, 9, layers=SMALL.progressive_layers)
    assert whole.config == start.config and whole.config.layers == 2
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


def test_errors_are_in_units_of_what_is_usual_and_wrong_tokens_are_drawn_by_averaged_weights(
    weights, tmp_path, monkeypatch
):
    monkeypatch.setattr(token_training, "_BLOCK", 8)
    read, shown, drawing, learning = [], [], [], []
    batch, make, losses = SceneTokens.batch, stage.make_example, stage.masked_losses

    def weights_of(network):
        return torch.cat([weight.detach().flatten() for weight in network.parameters()])

    def batched(self, *given):
        read.append(batch(self, *given))
        return read[-1]

    def made(ids, tokens, errors, corruption, *given, **options):
        shown.append(errors)
        drawing.append(corruption.run(weights_of))
        return make(ids, tokens, errors, corruption, *given, **options)

    def learned(network, example):
        learning.append(weights_of(network))
        return losses(network, example)

    monkeypatch.setattr(SceneTokens, "batch", batched)
    monkeypatch.setattr(stage, "make_example", made)
    monkeypatch.setattr(stage, "masked_losses", learned)
    context = BuildContext(folder=tmp_path, device=torch.device("cpu"), recipe=replace(SMALL, progressive_steps=3))
    stage.train_progressive(context, weights, ahead=False)
    vlm = str(weights / "janus")
    tokenizer = registry.sampler_family(vlm).load_tokenizer(vlm, dtype=torch.float32)
    _, usual = encode_scenes(tokenizer, "calibration", range(SMALL.held_out_scenes), size=SMALL.size)
    for errors, scenes in zip(shown, read):
        torch.testing.assert_close(errors, (scenes.errors - usual.mean()) / usual.std())
    torch.testing.assert_close(shown[-1].mean(), torch.tensor(0.0), rtol=0, atol=1e-4)  # of all held-out scenes
    # The second update keeps 2/11 of the average, which the first made a copy (`EMA`).
    torch.testing.assert_close(drawing[2], 2 / 11 * learning[1] + 9 / 11 * learning[2])
    assert len(read) == 3 and not torch.equal(drawing[2], learning[2])


@pytest.mark.parametrize("uses, different", [(1, 12), (2, 8)])
def test_scenes_are_drawn_as_often_as_the_recipe_says(weights, tmp_path, monkeypatch, uses, different):
    monkeypatch.setattr(token_training, "_BLOCK", 4)
    drawn, batch = [], SceneTokens.batch

    def batched(self, *given):
        found = batch(self, *given)
        drawn.extend(facts.caption() for facts in found.facts)
        return found

    monkeypatch.setattr(SceneTokens, "batch", batched)
    monkeypatch.setattr(
        token_training,
        "train",
        lambda folder, *, steps, step, settings, **_: (
            [step(i) for i in range(steps)] and drawn.append(settings["progressive_uses"])
        ),
    )
    recipe = replace(SMALL, progressive_layers=1, progressive_steps=3, progressive_uses=uses)
    context = BuildContext(folder=tmp_path, device=torch.device("cpu"), recipe=recipe)
    stage.train_progressive(context, weights, ahead=False)
    assert drawn.pop() == uses, "a checkpoint of another number does not go on"
    assert len(drawn) == 12
    assert len(set(drawn)) == different == stage.different_scenes(12, block=4, uses=uses)


def test_different_scenes_of_a_block_that_was_not_gone_through():
    for steps, different in ((1, 64), (32, 2048), (96, 2048), (97, 2112), (160, 4096)):
        assert stage.different_scenes(64 * steps, block=2048, uses=3) == different
    drawn = Recipe.progressive_steps * Recipe.progressive_batch
    assert stage.different_scenes(drawn, block=2048, uses=Recipe.progressive_uses) == drawn, "never the same"


def test_the_card_says_what_was_drawn_and_how_often():
    network = SimpleNamespace(parameters=lambda: [torch.zeros(1000, 1700)], config=SimpleNamespace(layers=4))
    recipe = Recipe(progressive_steps=128, progressive_batch=64, progressive_uses=2)
    text = stage.card(recipe, network, [{"seconds": 5400.0, "eval/loss": 2.5}], ["nearest", "samples"])
    assert "trained for 128 updates of 64 scenes (8,192 drawn,\n4,096 different ones), 1.50 hours." in text
    assert "1.7 M parameters" in text and "first 4 layers" in text and "| loss | 2.5000 |" in text
    assert "Wrong tokens: nearest, samples." in text
    assert "Wrong tokens: none." in stage.card(recipe, network, [], [])


def test_attention_computes_in_bfloat16_within_alone(tmp_path):
    context = BuildContext(folder=tmp_path, device=torch.device("cpu"), recipe=SMALL)
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed
    before = allowed()
    with pytest.raises(ZeroDivisionError), stage.bfloat16(context):
        assert allowed() and torch.is_autocast_enabled("cpu")
        raise ZeroDivisionError
    assert allowed() is before is False and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_are_compiled_where_the_recipe_says_so(weights, tmp_path, monkeypatch, compiled):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: asked.append((self, options)))
    monkeypatch.setattr(token_training, "train", lambda folder, **_: None)
    context = BuildContext(folder=tmp_path, device=torch.device("cpu"), recipe=replace(SMALL, compiled=compiled))
    network, _ = stage.train_progressive(context, weights, ahead=False)
    assert asked == [(layer, {"dynamic": True}) for layer in network.layers if compiled]


def test_the_command_trains_by_the_numbers_of_the_code_and_the_recipe_tells_them(
    weights, tmp_path, monkeypatch, capsys
):
    mine = tmp_path / "weights"
    mine.mkdir()
    Recipe(progressive_steps=9, progressive_batch=2, progressive_uses=3, janus_width=64, compiled=True).save(mine)
    asked = []

    def trained(context, folder, *, kinds):
        assert folder == mine
        asked.append((context.recipe, kinds))
        return "network", "codebook"

    def saved(context, folder, network, codebook, *, kinds):
        assert (folder, network, codebook) == (mine, "network", "codebook") and (context.recipe, kinds) == asked[-1]
        return folder

    monkeypatch.setattr(stage, "train_progressive", trained)
    monkeypatch.setattr(stage, "save_progressive", saved)
    words = ["a", "--folder", str(tmp_path), "--weights", str(mine), "--steps", "7", "--no-compile"]
    monkeypatch.setattr(sys, "argv", [*words, "--corruptions", "nearest"])
    stage.main()
    assert asked == [(Recipe(progressive_steps=7, janus_width=64), ["nearest"])]
    assert Recipe.load(mine) == asked[0][0]


def test_another_recipe_does_not_go_on(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(token_training, "_BLOCK", 8)
    context = BuildContext(folder=tmp_path, device=torch.device("cpu"), recipe=replace(SMALL, progressive_steps=1))
    stage.train_progressive(context, weights, ahead=False)
    with pytest.raises(ValueError, match="corruptions"):
        stage.train_progressive(context, weights, kinds=["shuffled"], ahead=False)


def test_it_may_start_from_the_first_layers_alone(weights):
    janus = JanusSampler.load(weights / "janus").model
    some, whole = start_from_janus(janus, 0, layers=2), start_from_janus(janus, 0)
    assert some.config.layers == 2 < whole.config.layers
    for name, value in some.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]) or name.startswith("scores"), name
    with pytest.raises(ValueError, match=r"has 6 layers, got 7: take 1 or more of these"):
        start_from_janus(janus, 0, layers=7)


def test_tiny_janus_starts_a_network_only_with_as_many_key_heads():
    with pytest.raises(ValueError, match="2 key heads for 4 heads"):
        start_from_janus(tiny_janus()[0], 0)


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("dropped", [0.0, 1.0])
def test_captions_are_dropped_for_guidance(weights, tmp_path, monkeypatch, dropped):
    monkeypatch.setattr(token_training, "_BLOCK", 8)
    monkeypatch.setattr(stage, "_DROPPED", dropped)
    seen, losses = [], stage.masked_losses
    monkeypatch.setattr(
        stage, "masked_losses", lambda network, example: seen.extend(example.ids) or losses(network, example)
    )
    context = BuildContext(folder=tmp_path / "a", device=torch.device("cpu"), recipe=SMALL)
    stage.train_progressive(context, weights, ahead=False)
    vlm = str(weights / "janus")
    janus = registry.sampler_family(vlm).load_sampler(vlm)
    words = stage.Words(janus.tokenizer, TEMPLATE)
    unconditional = [ids == words.unconditional(ids) for ids in seen]
    assert seen and all(told == bool(dropped) for told in unconditional)
