"""The bidirectional network: against transformers' Llama under a mask of its own, and what sees what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaModel

from dcdd_core.models.masked.network import MaskedConfig, MaskedTransformer
from dcdd_core.models.masked.words import padded
from tests.models.masked.tiny_masked import tiny_network
from tests.tiny import fill

IDS = [[0, 3, 6, 7, 9], [0, 3, 8]]
LLAMAS = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def tokens(rows: int = 2, seed: int = 0) -> torch.Tensor:
    """Some of them hidden (64)."""
    draw = torch.Generator().manual_seed(seed)
    found = torch.randint(0, 64, (rows, 16), generator=draw)
    return found.masked_fill(torch.rand(rows, 16, generator=draw) < 0.5, 64)


@torch.no_grad()
def hidden_of(network, ids, image):
    return network(image, network.prefix(*padded(ids)))


@torch.no_grad()
def test_it_is_a_llama_whose_image_attends_to_everything():
    network = tiny_network()
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=network.config.words,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            rms_norm_eps=network.config.norm_eps,
            attn_implementation="eager",
        )
    ).eval()
    own = network.state_dict()
    theirs = {f"layers.{i}.{LLAMAS[part]}.weight": own[f"layers.{i}.{part}.weight"] for i in (0, 1) for part in LLAMAS}
    llama.load_state_dict(theirs | {"embed_tokens.weight": own["words.weight"], "norm.weight": own["norm.weight"]})
    image = tokens(1)
    for ids in IDS:
        length, count = len(ids), 16
        embedded = torch.cat([llama.embed_tokens(torch.tensor([ids])), network._embed(image)], dim=1)
        visible = torch.ones(length + count, length + count, dtype=torch.bool).tril()
        visible[length:] = True
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        expected = llama(inputs_embeds=embedded, attention_mask=mask[None, None]).last_hidden_state[:, length:]
        torch.testing.assert_close(hidden_of(network, [ids], image), expected, rtol=1e-4, atol=1e-4)


def test_padding_is_not_seen():
    network, image = tiny_network(), tokens()
    together = hidden_of(network, IDS, image)
    for row, ids in enumerate(IDS):
        torch.testing.assert_close(together[row], hidden_of(network, [ids], image[row : row + 1])[0])


def test_it_sees_both_sides_and_the_prompt():
    network, image = tiny_network(), tokens(1)
    before = hidden_of(network, IDS[:1], image)
    for changed in (0, 15):
        other = image.clone()
        other[0, changed] = (other[0, changed] + 1) % 64
        assert ((hidden_of(network, IDS[:1], other) - before).abs().amax(-1) > 1e-4).all(), changed
    assert not torch.allclose(hidden_of(network, [[0, 3, 6, 7, 10]], image), before)


def test_a_hidden_position_is_the_mask_and_its_place():
    network = tiny_network()
    image = tokens(1)
    embedded, hidden = network._embed(image)[0], image[0] == 64
    torch.testing.assert_close(embedded[hidden], network.mask + network.positions[hidden])
    code = int(image[0][~hidden][0])
    place = int((~hidden).nonzero()[0])
    found = network.align_out(F.gelu(network.align_in(network.codes.weight[code]))) + network.positions[place]
    torch.testing.assert_close(embedded[place], found)


@torch.no_grad()
def test_embeddings_keep_float32_under_autocast():
    network, image = tiny_network(), tokens()
    expected = network._embed(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network._embed(image), expected)
        assert hidden_of(network, IDS, image).dtype == torch.float32


@torch.no_grad()
def test_logits_and_scores_are_float32_in_half_precision():
    network = tiny_network().bfloat16()
    hidden = hidden_of(network, IDS, tokens())
    logits, (error, importance) = network.logits(hidden), network.scores(hidden)
    assert logits.shape == (2, 16, 64) and logits.dtype == error.dtype == importance.dtype == torch.float32
    inner = F.gelu(F.linear(hidden.float(), network.head_in.weight.float(), network.head_in.bias.float()))
    expected = F.linear(inner, network.head_out.weight.float(), network.head_out.bias.float())
    torch.testing.assert_close(logits, expected)
    assert not torch.equal(error, importance)


@torch.no_grad()
def test_a_hosts_own_linear_layers_are_called():
    class Hosted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    network, hidden = tiny_network(), torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for part in (network.head_in, network.head_out, network.scores_in, network.scores_out):
        part.__class__ = Hosted
    inner = F.gelu(F.linear(hidden, network.head_in.weight, network.head_in.bias) + 1)
    expected = F.linear(inner, network.head_out.weight, network.head_out.bias) + 1
    torch.testing.assert_close(network.logits(hidden), expected)
    inner = F.gelu(F.linear(hidden, network.scores_in.weight, network.scores_in.bias) + 1)
    expected = F.linear(inner, network.scores_out.weight, network.scores_out.bias) + 1
    torch.testing.assert_close(torch.stack(network.scores(hidden), dim=1), expected)


def test_all_weights_learn():
    network = fill(MaskedTransformer(tiny_network().config))
    hidden = network(tokens(), network.prefix(*padded(IDS)))
    loss = network.logits(hidden).square().mean() + sum(part.square().mean() for part in network.scores(hidden))
    loss.backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in network.parameters())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grid": (4,)}, "grid must be two whole numbers"),
        ({"grid": (0, 4)}, "rows of the grid must be a whole number in 1..1,024"),
        ({"codes": 1}, "codes must be a whole number of at least 2"),
        ({"heads": 0}, "heads must be a whole number of at least 1"),
        ({"heads": 32}, "width 32 must be an even multiple of heads 32"),
        ({"code_dim": 0}, "code_dim must be a whole number of at least 1"),
        ({"words": 0}, "words must be a whole number of at least 1"),
        ({"rope_theta": 0}, "rope_theta must be a finite number above 0"),
        ({"norm_eps": 0.0}, "norm_eps must be a finite number above 0"),
    ],
)
def test_sizes_that_make_no_network_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(tiny_network().config, **changes)


def test_sizes_come_from_json():
    config = tiny_network().config
    values = {
        "grid": [4, 4],
        "codes": 64,
        "code_dim": 8,
        "words": 21,
        "width": 32,
        "layers": 2,
        "heads": 2,
        "hidden": 64,
    }
    assert MaskedConfig.of(values) == config
    assert (config.rope_theta, config.norm_eps) == (10_000.0, 1e-6), "Llama's"
    for wrong in ({**values, "depth": 3}, {k: v for k, v in values.items() if k != "grid"}, {**values, "grid": 4}):
        with pytest.raises(ValueError, match="incomplete or unknown"):
            MaskedConfig.of(wrong)
