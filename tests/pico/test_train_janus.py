"""Training of pico's Janus: its loss, a run that stops, goes on and is written, and what it measures of itself."""

from __future__ import annotations

import copy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dcdd_pico.train_janus as stage
from dcdd_core.models.janus.files import INT8_FILE
from dcdd_core.models.janus.sampler import JanusSampler, prompt_ids
from dcdd_core.models.janus.tokenizer import load_tokenizer
from dcdd_core.training.log import read_log
from dcdd_pico import token_training
from dcdd_pico.build_context import BuildContext, Recipe
from dcdd_pico.embedded import JANUS, WEIGHTS
from dcdd_pico.export import MOST_BYTES
from dcdd_pico.scene_tokens import SceneTokens, encode_scenes
from dcdd_pico.scenes import scene_facts
from dcdd_pico.train_tokenizer import tokens_digest
from tests.pico.stopping import assert_same_logs, stopped_at
from tests.tiny import random_pico

SMALL = Recipe(
    held_out_scenes=4, janus_layers=1, janus_width=64, janus_steps=3, janus_batch=4, janus_held_out=8, janus_uses=2
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return random_pico(tmp_path_factory.mktemp("pico") / "weights")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(token_training, "_BLOCK", 8)
    monkeypatch.setattr(stage, "_SAVE_EVERY", 1)


def context_of(folder: Path) -> BuildContext:
    return BuildContext(folder=folder, device=torch.device("cpu"), recipe=SMALL)


@pytest.mark.filterwarnings("ignore:.*")
def test_a_stopped_training_goes_on_exactly(weights, tmp_path):
    whole, _ = stage.train_janus(context_of(tmp_path / "a"), weights, ahead=False)
    with stopped_at(2, SceneTokens):
        stage.train_janus(context_of(tmp_path / "b"), weights, ahead=False)
    again, _ = stage.train_janus(context_of(tmp_path / "b"), weights, ahead=False)
    for (name, one), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert_same_logs(tmp_path / "a" / "janus", tmp_path / "b" / "janus")

    tokenizer = load_tokenizer(weights / JANUS, dtype=torch.float32)
    fresh = dict(stage.start(tokenizer.model, stage.pico_tokenizer(), SMALL).named_parameters())
    trained = {name for name, weight in fresh.items() if not torch.equal(weight, whole.state_dict()[name])}
    frozen = ("model.vqmodel.", "model.vision_model.", "model.aligner.")
    assert trained == {name for name in fresh if not name.startswith(frozen)}
    check_log(read_log(tmp_path / "a" / "janus")[-1], whole, tokenizer, weights, tmp_path)


@torch.no_grad()
def check_log(line: dict, janus, tokenizer, weights: Path, work: Path) -> None:
    """The last evaluation is of the weights that are kept, on held-out scenes and on as many of those trained on.

    Those of the first and the last of three updates of 4 are as many as 8 held-out scenes.
    """
    words = stage.pico_tokenizer()
    tokens, _ = encode_scenes(tokenizer, "calibration", range(8), size=96)
    scenes = SceneTokens(work / "t", weights, "x", seed=0, size=96, block=8, uses=2, ahead=False)
    batches = [scenes.batch(k, 4) for k in (0, 2)]
    sets = {
        "eval/loss": (scene_facts("calibration", 8), tokens),
        "eval/training loss": ([f for b in batches for f in b.facts], torch.cat([b.tokens for b in batches])),
    }
    for name, (facts, drawn) in sets.items():
        assert len(facts) == 8
        found = stage.next_token_loss(janus, [prompt_ids(words, f.caption()) for f in facts], drawn)
        assert line[name] == pytest.approx(float(found.mean()), abs=2e-3), "bfloat16 there, float32 here"
    assert line["eval/gap"] == pytest.approx(line["eval/loss"] - line["eval/training loss"], abs=1e-6)


def test_the_gap_comes_with_its_standard_error():
    found = stage.gap_of(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 1.5]))
    assert found["loss"] == 2 and found["training loss"] == 1.25 and found["gap"] == 0.75
    assert found["gap, standard error"] == pytest.approx((1 / 3 + 0.125 / 2) ** 0.5)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_language_model_is_compiled_where_the_recipe_says_so(weights, tmp_path, monkeypatch, compiled):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: asked.append((self, options)))
    monkeypatch.setattr(token_training, "train", lambda *_, **__: None)
    context = replace(context_of(tmp_path), recipe=replace(SMALL, compiled=compiled))
    janus, _ = stage.train_janus(context, weights, ahead=False)
    assert asked == [(janus.model.language_model, {"dynamic": False})] * compiled


@torch.no_grad()
def test_padding_changes_no_loss(weights):
    sampler = JanusSampler.load(weights / JANUS)
    prompts = [prompt_ids(sampler.tokenizer, text) for text in ("a red circle", "a large plain red star at the top")]
    tokens = torch.randint(1024, (2, 144), generator=torch.Generator().manual_seed(0))
    both = stage.next_token_loss(sampler.model, prompts, tokens)
    for row in range(2):
        alone = stage.next_token_loss(sampler.model, prompts[row : row + 1], tokens[row : row + 1])
        torch.testing.assert_close(both[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_the_tokenizer_may_be_alone_as_in_the_build(weights, tmp_path):
    whole = load_tokenizer(weights / JANUS, dtype=torch.float32).model
    copy.deepcopy(whole).half().save_pretrained(tmp_path / JANUS)
    alone = load_tokenizer(tmp_path / JANUS, dtype=torch.float32).model
    assert tokens_digest(alone) == tokens_digest(whole)
    words = stage.pico_tokenizer()
    made = [stage.start(vq, words, SMALL) for vq in (whole, alone)]
    for (name, one), other in zip(made[0].state_dict().items(), made[1].state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert made[0].config.text_config.to_dict() == made[1].config.text_config.to_dict()


@pytest.mark.filterwarnings("ignore:.*")
def test_the_command_replaces_janus_and_keeps_its_tokenizer(weights, tmp_path, monkeypatch, capsys):
    weights = Path(shutil.copytree(weights, tmp_path / "weights"))
    Recipe(janus_steps=9, janus_layers=6, guidance=2.5).save(weights)
    older = load_tokenizer(weights / JANUS, dtype=torch.float32).model
    shutil.rmtree(weights / JANUS)  # in transformers' layout, as it once was
    stage.start(older, stage.pico_tokenizer(), replace(SMALL, seed=1)).half().save_pretrained(weights / JANUS)
    before = load_tokenizer(weights / JANUS).model.state_dict()
    asked, real = [], stage.train_janus

    def train(context, folder):
        asked.append(context.recipe)
        return real(replace(context, recipe=SMALL), folder, ahead=False)

    monkeypatch.setattr(stage, "train_janus", train)
    monkeypatch.setattr(sys, "argv", ["a", "--folder", str(tmp_path), "--weights", str(weights), "--steps", "7"])
    stage.main()
    assert asked[-1] == Recipe.load(weights) == Recipe(janus_steps=7, guidance=2.5), (
        "the code's Janus, the rest as it was"
    )
    folder = weights / JANUS
    assert capsys.readouterr().out.splitlines()[-1] == str(folder) and not folder.with_name("janus.new").exists()
    after = load_tokenizer(folder).model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {path.name for path in folder.glob("*.safetensors")} == {INT8_FILE}
    sampler = JanusSampler.load(folder)
    assert sampler.name == "pico" and sampler.model.config.text_config.hidden_size == 64
    assert "| gap, standard error |" in (folder / "README.md").read_text("utf-8")
    assert (tmp_path / "janus-curves.png").exists()
    assert sampler.sample(["a red circle"], seeds=[0]).grid == (12, 12)


def test_a_width_of_no_whole_heads_is_refused(weights):
    vq = load_tokenizer(weights / JANUS).model
    with pytest.raises(ValueError, match="multiple of 64, the width of a head, got 200"):
        stage.janus_config(vq, stage.pico_tokenizer(), width=200)


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the embedded weights are not built: make pico")
def test_the_recipes_janus_fits_beside_the_other_weights(tmp_path):
    vq = load_tokenizer(WEIGHTS / JANUS, dtype=torch.float32).model
    words = stage.pico_tokenizer()
    stage.save_janus(tmp_path / JANUS, stage.start(vq, words, Recipe()), words)
    others = [path for path in WEIGHTS.rglob("*") if WEIGHTS / JANUS not in path.parents]
    size = sum(path.stat().st_size for path in [*others, *tmp_path.rglob("*")] if path.is_file())
    assert size <= MOST_BYTES
    held = load_file(tmp_path / JANUS / INT8_FILE)
    assert held["model.language_model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
