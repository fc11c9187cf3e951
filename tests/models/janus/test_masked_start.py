"""A masked sampler that starts from a Janus: its sizes, what is taken, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import JanusForConditionalGeneration

from dcdd_core.models.janus.masked_start import TEMPLATE, masked_start, network_config, start_from_janus
from dcdd_core.models.janus.sampler import JanusSampler, prompt_ids, unconditional_ids
from tests.tiny import fill, tiny_janus


def janus_of(seed: int = 0, **changes) -> JanusForConditionalGeneration:
    """`tiny_janus` with as many key heads as heads, and other changes of its language model."""
    config = tiny_janus()[0].config
    for name, value in ({"num_key_value_heads": 4} | changes).items():
        setattr(config.text_config, name, value)
    return fill(JanusForConditionalGeneration(config), seed)


def test_the_sizes_are_janus_own():
    janus = janus_of(rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, rms_norm_eps=1e-5)
    config = network_config(janus)
    assert (config.grid, config.codes, config.code_dim, config.words) == ((4, 4), 64, 8, 21)
    assert (config.width, config.layers, config.heads, config.hidden) == (32, 2, 4, 64)
    assert (config.rope_theta, config.norm_eps) == (500_000.0, 1e-5)
    other = network_config(janus, (8, 6), 1)
    assert (other.grid, other.layers) == ((8, 6), 1)
    assert start_from_janus(janus, 0, grid=(8, 6)).positions.shape == (48, 32)


def change(part: str, **changes):
    def changed():
        janus = janus_of()
        for name, value in changes.items():
            setattr(getattr(janus.config, part), name, value)
        return janus

    return changed


def deeper():
    janus = janus_of()
    layers = janus.model.generation_aligner.hidden_layers
    layers.append(copy.deepcopy(layers[0]))
    return janus


@pytest.mark.parametrize(
    ("janus", "words"),
    [
        (lambda: tiny_janus()[0], "2 key heads for 4 heads: start from one with as many of each"),
        (deeper, "aligns codes in 3 layers, expected 2"),
        (change("text_config", rope_parameters={"rope_type": "linear", "factor": 2.0}), "scales its rotary embeddings"),
        (change("text_config", head_dim=16), "has heads of 16 in a width of 32, or biases"),
        (change("text_config", attention_bias=True), "has heads of 8 in a width of 32, or biases"),
        (change("text_config", mlp_bias=True), "or biases: start from one without"),
    ],
)
def test_blocks_that_the_network_has_not_are_refused(janus, words):
    with pytest.raises(ValueError, match=words):
        network_config(janus())


@pytest.mark.parametrize("layers", [0, 3, -1])
def test_layers_that_janus_has_not_are_refused(layers):
    with pytest.raises(ValueError, match=f"this Janus has 2 layers, got {layers}: take 1 or more of these"):
        network_config(janus_of(), None, layers)


def test_the_seed_decides_what_is_new_and_the_global_one_is_left_alone():
    janus = janus_of()
    before = torch.get_rng_state()
    one, again, other = (start_from_janus(janus, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert {name for name in one if not torch.equal(one[name], other[name])} == {"scores_in.weight", "scores_in.bias"}


def test_from_half_precision_it_is_float32_and_janus_stays_as_it_was():
    janus = janus_of().bfloat16()
    before = {name: value.clone() for name, value in janus.state_dict().items()}
    network = start_from_janus(janus, 0)
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}
    for name, value in janus.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name
    aligned = janus.float().prepare_embeddings_for_image_generation(torch.arange(64)[None])[0]
    torch.testing.assert_close(network.mask, aligned.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network._embed(torch.arange(16)[None])[0], aligned[:16], rtol=1e-4, atol=1e-5)


def test_a_sampler_has_janus_prompts_and_codes():
    janus = JanusSampler(janus_of(), tiny_janus()[1], name="tiny")
    janus.tokenizer.pad_token = None  # As DeepSeek's file, whose pad token goes by its usual name.
    janus.tokenizer.add_special_tokens({"additional_special_tokens": ["<\uff5c\u2581pad\u2581\uff5c>"]})
    ids = prompt_ids(janus.tokenizer, " a red circle ")
    without = unconditional_ids(ids, janus.tokenizer)
    sampler = masked_start(janus, 3, grid=(4, 2))
    assert sampler.grid == (4, 2) and sampler.name == "tiny" and sampler.words.template == TEMPLATE
    assert sampler.words.ids(" a red circle ") == ids and sampler.words.unconditional(ids) == without
    assert torch.equal(sampler.codebook.vectors, janus.codebook.vectors)
    expected = start_from_janus(janus.model, 3, grid=(4, 2)).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in sampler.model.state_dict().items())
