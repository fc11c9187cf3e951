"""The layers' own forward pass against transformers', slot by slot, and what it refuses. R = 2 rows of 9 embeddings."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model, JanusForConditionalGeneration, LlamaConfig, LlamaModel
from transformers.models.janus.modeling_janus import JanusVQVAE

from dcdd_core.method import sampling
from dcdd_core.models.autoregressive import token_loop
from dcdd_core.models.autoregressive.token_loop import LlamaReader, TokenLoop, check_language
from dcdd_core.models.janus.sampler import JanusSampler
from dcdd_core.protocols import SamplingOptions
from dcdd_pico.train_janus import janus_config, pico_tokenizer
from dcdd_pico.train_tokenizer import tokenizer_config
from tests.tiny import fill, tiny_janus

VARIANTS = {
    "plain": {},
    "shared key heads": {"num_key_value_heads": 2},
    "one key head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 16},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}


def llama(**changes) -> LlamaModel:
    values = {
        "vocab_size": 8,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32,
    }
    return fill(LlamaModel(LlamaConfig(**(values | changes))))


def embeddings(width: int = 32) -> torch.Tensor:
    return torch.randn(2, 9, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def read_in_steps(model: LlamaModel, x: torch.Tensor, prompt: int, known: bool) -> torch.Tensor:
    """Hidden states [R, Q, C] after a prompt that is read at once, then one by one."""
    reader = LlamaReader(model, torch.zeros(len(x), dtype=torch.int64), x.shape[1])
    found = [reader.read(x[:, :prompt], reader.slots[:prompt], prompt)]
    for i in range(prompt, x.shape[1]):
        found.append(reader.read(x[:, i : i + 1], reader.slots[i : i + 1], i + 1 if known else None))
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("known", [True, False], ids=["filled slots", "all slots"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_reads_as_transformers_does(variant: str, known: bool):
    model = llama(**VARIANTS[variant])
    check_language(model)
    with torch.no_grad():
        whole = model(inputs_embeds=embeddings()).last_hidden_state
    found = read_in_steps(model, embeddings(), 4, known)
    torch.testing.assert_close(found, whole[:, 3:], rtol=1e-4, atol=1e-5)


def test_reads_pico_as_transformers_does():
    words = pico_tokenizer()
    model = fill(JanusForConditionalGeneration(janus_config(JanusVQVAE(tokenizer_config()), words)))
    language, x = model.model.language_model, embeddings(model.config.text_config.hidden_size)
    with torch.no_grad():
        whole = language(inputs_embeds=x).last_hidden_state
    torch.testing.assert_close(read_in_steps(language, x, 5, True), whole[:, 4:], rtol=1e-4, atol=1e-4)


def test_half_precision_stays_close_to_transformers():
    model = llama().bfloat16()
    with torch.no_grad():
        whole = model(inputs_embeds=embeddings().bfloat16()).last_hidden_state
    found = read_in_steps(model, embeddings().bfloat16(), 4, True)
    assert found.dtype == torch.bfloat16
    assert (found - whole[:, 3:]).abs().max() < 0.1


def test_other_linear_layers_stay_only_where_the_host_says_so():
    class Streamed(nn.Linear):
        pass

    plain, cpu = nn.Sequential(nn.Linear(2, 2)), torch.device("cpu")
    assert token_loop._stays(plain, cpu, resident=False)
    assert not token_loop._stays(plain, torch.device("meta"), resident=True), "wherever its weights are not"
    foreign = nn.Sequential(Streamed(2, 2))
    assert not token_loop._stays(foreign, cpu, resident=False)
    assert token_loop._stays(foreign, cpu, resident=True)


@torch.no_grad()
def test_padding_is_neither_attended_nor_counted():
    model, x = llama(), embeddings()
    padded = LlamaReader(model, torch.tensor([3, 0]), 9)
    padded.read(x[:, :8], padded.slots[:8], 8)
    found = padded.read(x[:, 8:], padded.slots[8:], 9)
    own = read_in_steps(model, x[:1, 3:], 5, True)[:, -1]
    torch.testing.assert_close(found[:1], own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1:], read_in_steps(model, x[1:], 8, True)[:, -1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_are_spread_with_what_they_have_read():
    model, x = llama(), embeddings()
    reader = LlamaReader(model, torch.tensor([2, 0]), 6)
    reader.read(x[:, :6], reader.slots, 6)
    wide = reader.spread(torch.tensor([1, 0, 1]), 6, 9)
    found = wide.read(x[[1, 0, 1], 6:7], wide.slots[6:7], 7)
    long = LlamaReader(model, torch.tensor([2, 0]), 9)
    long.read(x[:, :6], long.slots[:6], 6)
    torch.testing.assert_close(found, long.read(x[:, 6:7], long.slots[6:7], 7)[[1, 0, 1]], rtol=1e-4, atol=1e-5)


def test_what_it_would_read_otherwise_is_refused():
    with pytest.raises(ValueError, match="'dynamic', whose frequencies follow the length"):
        check_language(llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}))
    with pytest.raises(ValueError, match="GPT2Model, expected a LlamaModel"):
        check_language(GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8, n_positions=8)))
    model, tokenizer = tiny_janus()
    model.model.language_model.rotary_emb.rope_type = "longrope"
    with pytest.raises(ValueError, match="longrope"):
        JanusSampler(model, tokenizer)


def test_equal_prompts_are_read_once(monkeypatch: pytest.MonkeyPatch):
    read, sizes = LlamaReader.read, []

    def counted(self, embeddings: torch.Tensor, *args, **named) -> torch.Tensor:
        sizes.append(tuple(embeddings.shape[:2]))
        return read(self, embeddings, *args, **named)

    monkeypatch.setattr(token_loop.LlamaReader, "read", counted)
    sampler = JanusSampler(*tiny_janus())
    sampler.sample(["a red circle"] * 3 + ["a red square"], seeds=range(4), parallel=1)
    # Two prompts of one length, and the one unconditional row of that length; then 8 rows for each of 15 tokens.
    assert sizes == [(3, 9), *[(8, 1)] * 15]


def test_a_step_that_does_not_know_its_place_is_the_same(monkeypatch: pytest.MonkeyPatch):
    """What a GPU records: the position is in a tensor alone, and all slots are looked at."""
    sampler = JanusSampler(*tiny_janus())
    prompts = ["a red circle", "a blue square and a green circle"]
    expected = sampler.sample(prompts, seeds=[0, 1], options=SamplingOptions(top_k=20))
    step = TokenLoop._step
    monkeypatch.setattr(TokenLoop, "_step", lambda self, seen=None: step(self))
    found = sampler.sample(prompts, seeds=[0, 1], options=SamplingOptions(top_k=20))
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4)


def test_noise_is_drawn_once_and_before_anything_waits_for_the_device(monkeypatch: pytest.MonkeyPatch):
    seen, noise, check = [], sampling.gumbel_noise, TokenLoop.check
    monkeypatch.setattr(sampling, "gumbel_noise", lambda seed, *at: seen.append((seed, at[0])) or noise(seed, *at))
    monkeypatch.setattr(TokenLoop, "check", lambda self: seen.append("check") or check(self))
    sampler = JanusSampler(*tiny_janus())
    run = sampler.sample(["red"], seeds=[7], parallel=1)
    early = [(7, i) for i in range(9)]  # one position beyond the eighth
    assert seen == [*early, "check", *((7, i) for i in range(len(early), 16)), "check"]
    seen.clear()
    resample = (torch.arange(16) >= 3) & (torch.arange(16) < 6)
    sampler.sample(["red"], seeds=[7], previous=run, resample=resample, parallel=1)
    assert seen == [(7, 3), (7, 4), (7, 5), "check"]
    for window in (2, 5, 16):
        seen.clear()
        sampler.sample(["red"], seeds=[7], parallel=window)
        assert [key for key in seen if key != "check"] == [(7, i) for i in range(16)]
    seen.clear()
    sampler.sample(["red"], seeds=[7], options=SamplingOptions(temperature=0.0))
    assert seen == ["check", "check"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_run_is_the_plain_one(monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = tiny_janus()
    sampler = JanusSampler(model.cuda(), tokenizer)
    recorded = sampler.sample(["red", "a blue square"], seeds=[0, 1])
    monkeypatch.setattr(token_loop, "_stays", lambda *_: False)
    plain = sampler.sample(["red", "a blue square"], seeds=[0, 1])
    assert torch.equal(recorded.tokens, plain.tokens)
    torch.testing.assert_close(recorded.logits, plain.logits, rtol=0, atol=1e-3)
