"""Training of pico's LlamaGen: its loss, and a run that stops, goes on and is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dcdd_pico.train_llamagen as stage
from dcdd_core import registry
from dcdd_core.models.t5 import T5Words
from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import Codebook
from dcdd_pico import token_training
from dcdd_pico.build_context import BuildContext, Recipe
from dcdd_pico.scene_tokens import SceneTokens
from dcdd_pico.scenes import scene_facts
from tests.pico.stopping import stopped_at
from tests.tiny import fill, random_pico

SMALL = Recipe(held_out_scenes=4, llamagen_steps=2, llamagen_batch=4)
PROMPTS = ["a large plain red star at the top", "a red circle"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return random_pico(tmp_path_factory.mktemp("pico") / "weights")


def test_its_words_are_those_of_captions():
    words = T5Words(stage.pico_words())
    for facts in scene_facts("train", 20):
        assert words.unknown(facts.caption()) == []
    assert words.unknown("a red unicorn") == ["unicorn"]
    assert words.ids("a red circle")[-1] == words.tokenizer.eos_token_id == 1


@torch.no_grad()
def test_its_loss_is_that_of_what_it_samples_from(weights, tmp_path):
    """Captions of two lengths, and with none of them: cross-entropies of the logits that its sampler keeps."""
    codebook = Codebook(torch.randn(1024, 8, generator=torch.Generator().manual_seed(0)))
    network = fill(stage.start(codebook, (12, 12), len(stage.pico_words()), 0))
    words = T5Words(stage.pico_words())
    sampler = registry.sampler_family(written(network, weights, tmp_path)).load_sampler(str(weights / "llamagen"))
    sampler.model.text_encoder = sampler.text.encoder  # where training has it
    for guidance in (1.0, 0.0):
        run = sampler.sample(PROMPTS, seeds=[0, 1], options=SamplingOptions(guidance=guidance))
        expected = torch.nn.functional.cross_entropy(run.logits.mT, run.tokens, reduction="none")
        dropped = torch.full((2,), guidance == 0)
        found = stage.next_token_loss(sampler.model, [words.ids(p) for p in PROMPTS], run.tokens, dropped)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def written(network, weights: Path, work: Path) -> Path:
    context = BuildContext(folder=work, device=torch.device("cpu"), recipe=SMALL)
    return stage.save_llamagen(context, weights, network)


@pytest.mark.filterwarnings("ignore:.*")
def test_a_stopped_training_goes_on_and_is_written(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(token_training, "_BLOCK", 8)
    monkeypatch.setattr(stage, "_SAVE_EVERY", 1)
    contexts = [BuildContext(folder=tmp_path / k, device=torch.device("cpu"), recipe=SMALL) for k in "ab"]
    whole = stage.train_llamagen(contexts[0], weights, ahead=False)
    with stopped_at(1, SceneTokens):
        stage.train_llamagen(contexts[1], weights, ahead=False)
    again = stage.train_llamagen(contexts[1], weights, ahead=False)
    for (name, one), other in zip(whole.state_dict().items(), again.state_dict().values()):
        assert torch.equal(one, other), name

    folder = stage.save_llamagen(contexts[0], weights, whole)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 6 * 10**6
    assert len({path.stat().st_mode for path in folder.rglob("*.safetensors")}) == 1, "all can be read by all"
    assert "| without caption |" in (folder / "README.md").read_text()
    assert (tmp_path / "a" / "llamagen-curves.png").exists()
    family = registry.sampler_family(folder)
    sampler, tokenizer = family.load_sampler(str(folder)), family.load_tokenizer(str(folder))
    run = sampler.sample(PROMPTS[:1], seeds=[0])
    assert run.grid == tokenizer.grid == (12, 12) and run.model == tokenizer.name == "pico llamagen"
    assert tokenizer.codebook.fingerprint == run.codebook
    assert tokenizer.decode_tokens(run.tokens, run.grid).shape == (1, 3, 96, 96)
    assert sampler.unknown_words("a red unicorn") == ["unicorn"]
