"""DeepSeek's layout of Janus: the same samples and pictures as from transformers' layout, and every way to go wrong.

The tiny checkpoints have the published keys; what the keys mean is held against DeepSeek's VQ model written as plain
functions of its names. B batch, K = 64 codes.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import JanusForConditionalGeneration

from dcdd_core.models.janus import deepseek
from dcdd_core.models.janus.deepseek import deepseek_name, janus_config
from dcdd_core.models.janus.sampler import JanusSampler, unconditional_ids
from dcdd_core.models.janus.tokenizer import load_tokenizer
from dcdd_core.types import TokenLogits
from tests.models.janus.deepseek_layout import (
    TINY_VQ,
    UNREAD,
    Weights,
    published_config,
    tiny_weights,
    write_all_but_weights,
    write_json,
    write_weights,
)
from tests.tiny import save_janus

PROMPTS = ("a red circle on the left", "a blue square and a green circle on the ground , red on the right")
SEEDS = (3, 2**40 + 1)


PRO_7B = published_config(4096, {"max_position_embeddings": 16384, "num_hidden_layers": 30, "vocab_size": 102400})
PRO_1B = published_config(
    2048,
    {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 16384,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "vocab_size": 102400,
    },
)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return tiny_weights()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in transformers' layout."""
    return save_janus(tmp_path_factory.mktemp("models") / "Janus-Tiny")


@pytest.fixture(scope="module")
def run(converted: Path) -> TokenLogits:
    return JanusSampler.load(converted).sample(PROMPTS, seeds=SEEDS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """DeepSeek's folder without weights."""
    monkeypatch.setattr(deepseek, "_VQ_16", {**deepseek._VQ_16, **TINY_VQ})
    return write_all_but_weights(tmp_path / "Janus-Tiny")


# --- the same model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [".bin", ".safetensors"])
@pytest.mark.parametrize("shards", [1, 2])
def test_samples_are_those_of_the_transformers_layout(folder, weights, run, kind, shards):
    write_weights(folder, weights, kind, shards)
    before = torch.get_rng_state()
    sampler = JanusSampler.load(folder)
    assert torch.equal(torch.get_rng_state(), before)
    sample = sampler.sample(PROMPTS, seeds=SEEDS)
    assert torch.equal(sample.tokens, run.tokens) and torch.equal(sample.logits, run.logits)
    assert (sample.grid, sample.model, sample.codebook) == (run.grid, run.model, run.codebook)
    assert not hasattr(sampler.model.model, "vision_model")


@pytest.mark.parametrize("kind", [".bin", ".safetensors"])
@pytest.mark.parametrize("shards", [1, 2])
def test_the_tokenizer_is_that_of_the_transformers_layout(folder, weights, converted, kind, shards):
    write_weights(folder, weights, kind, shards)
    theirs, ours = load_tokenizer(folder), load_tokenizer(converted)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    first, second = theirs.encode(pixels), ours.encode(pixels)
    assert torch.equal(first.logits, second.logits) and torch.equal(first.tokens, second.tokens)
    assert first.codebook == second.codebook and theirs.factor == ours.factor
    assert torch.equal(theirs.decode_tokens(first.tokens, (4, 4)), ours.decode_tokens(second.tokens, (4, 4)))


def test_half_precision_stays_with_the_tokenizer_and_is_widened_for_sampling(folder, weights):
    write_weights(folder, {name: tensor.bfloat16() for name, tensor in weights.items()})
    assert load_tokenizer(folder).dtype == torch.bfloat16
    assert load_tokenizer(folder, dtype=torch.float32).dtype == torch.float32
    for asked in (torch.float32, torch.bfloat16):
        assert {weight.dtype for weight in JanusSampler.load(folder, dtype=asked).model.parameters()} == {asked}


def test_only_what_is_needed_leaves_the_file(folder, weights, monkeypatch):
    write_weights(folder, weights)
    load = torch.load

    def spoiled(spoils):
        # What is no tensor is refused by whoever takes it.
        def opened(file, **how):
            assert how["weights_only"] and how["mmap"]
            return {name: None if spoils(name) else tensor for name, tensor in load(file, **how).items()}

        monkeypatch.setattr(torch, "load", opened)

    spoiled(lambda name: not name.startswith("gen_vision_model.") or name.endswith("codebook_used"))
    load_tokenizer(folder)
    with pytest.raises(ValueError, match="a NoneType as .*, expected a tensor"):
        JanusSampler.load(folder)
    unread = ("vision_model.", "aligner.", "language_model.lm_head.", "gen_vision_model.")
    spoiled(lambda name: name.startswith(unread) and name != "gen_vision_model.quantize.embedding.weight")
    JanusSampler.load(folder)


def test_a_model_outlives_its_file(folder, weights):
    (file,) = write_weights(folder, weights)
    vq = load_tokenizer(folder)
    before = vq.model.quant_conv.weight.clone()
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert torch.equal(vq.model.quant_conv.weight, before)


def test_the_undeclared_pad_token_fills_the_unconditional_row(folder, weights):
    write_weights(folder, weights)
    tokenizer = JanusSampler.load(folder).tokenizer
    assert tokenizer.pad_token is None
    assert unconditional_ids([0, 9, 9, 5], tokenizer) == [0, 1, 1, 5]


# --- what the names mean ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("model.language_model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        (
            "model.language_model.layers.23.self_attn.q_proj.weight",
            "language_model.model.layers.23.self_attn.q_proj.weight",
        ),
        ("model.language_model.norm.weight", "language_model.model.norm.weight"),
        ("model.generation_embeddings.weight", "gen_embed.weight"),
        ("model.generation_aligner.fc1.bias", "gen_aligner.layers.0.bias"),
        ("model.generation_aligner.hidden_layers.0.weight", "gen_aligner.layers.2.weight"),
        ("model.generation_aligner.hidden_layers.1.weight", "gen_aligner.layers.4.weight"),
        ("model.generation_head.proj_out.weight", "gen_head.output_mlp_projector.weight"),
        ("model.generation_head.vision_head.bias", "gen_head.vision_head.bias"),
        ("model.vqmodel.quantize.embedding.weight", "gen_vision_model.quantize.embedding.weight"),
        ("model.vqmodel.post_quant_conv.weight", "gen_vision_model.post_quant_conv.weight"),
        (
            "model.vqmodel.decoder.up.0.attn.1.norm.weight",
            "gen_vision_model.decoder.conv_blocks.0.attn.1.norm.weight",
        ),
        (
            "model.vqmodel.encoder.down.2.block.0.nin_shortcut.bias",
            "gen_vision_model.encoder.conv_blocks.2.res.0.nin_shortcut.bias",
        ),
        ("model.vqmodel.encoder.mid.attn_1.proj_out.bias", "gen_vision_model.encoder.mid.1.proj_out.bias"),
        ("model.vqmodel.decoder.mid.block_2.conv1.weight", "gen_vision_model.decoder.mid.2.conv1.weight"),
    ],
)
def test_names(ours, theirs):
    assert deepseek_name(ours) == theirs


def test_the_vision_tower_has_no_name():
    for name in ("model.vision_model.post_layernorm.bias", "model.aligner.fc1.weight", "lm_head.weight"):
        with pytest.raises(ValueError, match="no DeepSeek name"):
            deepseek_name(name)


def conv(weights: Weights, name: str, x: torch.Tensor, **how: int) -> torch.Tensor:
    return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **how)


def norm(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.group_norm(x, 32, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)


def residual(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    h = conv(weights, f"{name}.conv1", F.silu(norm(weights, f"{name}.norm1", x)), padding=1)
    return x + conv(weights, f"{name}.conv2", F.silu(norm(weights, f"{name}.norm2", h)), padding=1)


def attention(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    h = norm(weights, f"{name}.norm", x)
    q, k, v = (conv(weights, f"{name}.{part}", h).flatten(2).transpose(1, 2) for part in "qkv")
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
    return x + conv(weights, f"{name}.proj_out", mixed)


def middle(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    x = attention(weights, f"{name}.1", residual(weights, f"{name}.0", x))
    return residual(weights, f"{name}.2", x)


def levels(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    for level in count():
        at = f"{name}.conv_blocks.{level}"
        if f"{at}.res.0.conv1.weight" not in weights:
            return x
        for block in count():
            if f"{at}.res.{block}.conv1.weight" not in weights:
                break
            x = residual(weights, f"{at}.res.{block}", x)
            if f"{at}.attn.{block}.q.weight" in weights:
                x = attention(weights, f"{at}.attn.{block}", x)
        if f"{at}.downsample.conv.weight" in weights:
            x = conv(weights, f"{at}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        if f"{at}.upsample.conv.weight" in weights:
            x = conv(weights, f"{at}.upsample.conv", F.interpolate(x, scale_factor=2.0), padding=1)


def end(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return conv(weights, f"{name}.conv_out", F.silu(norm(weights, f"{name}.norm_out", x)), padding=1)


def test_the_tokenizer_computes_what_deepseeks_names_say(folder, weights):
    """vq_model.py: the encoder's levels, then its middle; the decoder's middle, then its levels in their order."""
    write_weights(folder, weights)
    vq = load_tokenizer(folder)
    its = {name.removeprefix("gen_vision_model."): tensor for name, tensor in weights.items()}
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1
    h = levels(its, "encoder", conv(its, "encoder.conv_in", pixels, padding=1))
    features = conv(its, "quant_conv", end(its, "encoder", middle(its, "encoder.mid", h)))
    torch.testing.assert_close(vq.features(pixels), features.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)

    tokens = torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(6))
    codes = F.normalize(its["quantize.embedding.weight"], dim=1)[tokens].transpose(1, 2).reshape(1, 8, 4, 4)
    h = conv(its, "decoder.conv_in", conv(its, "post_quant_conv", codes), padding=1)
    drawn = end(its, "decoder", levels(its, "decoder", middle(its, "decoder.mid", h)))
    torch.testing.assert_close(vq.decode_tokens(tokens, (4, 4)), drawn.clamp(-1, 1), rtol=1e-4, atol=1e-4)


def linear(name: str, rows: int, columns: int, *window: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns, *window), f"{name}.bias": (rows,)}


def published_vq() -> dict[str, tuple[int, ...]]:
    """Every tensor of VQ-16 but the used codes: width 128 times 1, 1, 2, 2, 4, attention at the lowest resolution."""
    shapes = {"quantize.embedding.weight": (16384, 8)}
    shapes |= linear("quant_conv", 8, 256, 1, 1) | linear("post_quant_conv", 256, 8, 1, 1)

    def block(name: str, before: int, after: int) -> None:
        shapes.update({f"{name}.{part}": (before,) for part in ("norm1.weight", "norm1.bias")})
        shapes.update({f"{name}.{part}": (after,) for part in ("norm2.weight", "norm2.bias")})
        shapes.update(linear(f"{name}.conv1", after, before, 3, 3) | linear(f"{name}.conv2", after, after, 3, 3))
        if before != after:
            shapes.update(linear(f"{name}.nin_shortcut", after, before, 1, 1))

    def attend(name: str, width: int) -> None:
        shapes.update({f"{name}.norm.weight": (width,), f"{name}.norm.bias": (width,)})
        for part in ("q", "k", "v", "proj_out"):
            shapes.update(linear(f"{name}.{part}", width, width, 1, 1))

    def ends(name: str, first: tuple[int, int], last: tuple[int, int]) -> None:
        shapes.update(linear(f"{name}.conv_in", *first, 3, 3) | linear(f"{name}.conv_out", *last, 3, 3))
        shapes.update({f"{name}.norm_out.weight": (last[1],), f"{name}.norm_out.bias": (last[1],)})
        block(f"{name}.mid.0", 512, 512)
        attend(f"{name}.mid.1", 512)
        block(f"{name}.mid.2", 512, 512)

    ends("encoder", (128, 3), (256, 512))
    ends("decoder", (512, 256), (3, 128))
    for name, before, widths, blocks, step, with_attention in (
        ("encoder", 128, (128, 128, 256, 256, 512), 2, "downsample", 4),
        ("decoder", 512, (512, 256, 256, 128, 128), 3, "upsample", 0),
    ):
        width = before
        for level, after in enumerate(widths):
            at = f"{name}.conv_blocks.{level}"
            for i in range(blocks):
                block(f"{at}.res.{i}", width, after)
                width = after
                if level == with_attention:
                    attend(f"{at}.attn.{i}", width)
            if level < 4:
                shapes.update(linear(f"{at}.{step}.conv", width, width, 3, 3))
    return {f"gen_vision_model.{name}": shape for name, shape in shapes.items()}


def published_language(hidden: int, inner: int, layers: int) -> dict[str, tuple[int, ...]]:
    shapes = {"embed_tokens.weight": (102400, hidden), "norm.weight": (hidden,)}
    for i in range(layers):
        for part in "qkvo":
            shapes[f"layers.{i}.self_attn.{part}_proj.weight"] = (hidden, hidden)
        for part in ("gate", "up"):
            shapes[f"layers.{i}.mlp.{part}_proj.weight"] = (inner, hidden)
        shapes[f"layers.{i}.mlp.down_proj.weight"] = (hidden, inner)
        for part in ("input", "post_attention"):
            shapes[f"layers.{i}.{part}_layernorm.weight"] = (hidden,)
    return {f"language_model.model.{name}": shape for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("config", "hidden", "inner", "layers", "heads"),
    [(PRO_1B, 2048, 5632, 24, 16), (PRO_7B, 4096, 11008, 30, 32)],
    ids=["Janus-Pro-1B", "Janus-Pro-7B"],
)
def test_the_published_models_have_these_tensors(config, hidden, inner, layers, heads):
    translated = janus_config(config, "Janus-Pro")
    with torch.device("meta"):
        model = JanusForConditionalGeneration(translated)
    found = {
        deepseek_name(name): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.startswith(UNREAD)
    }
    expected = published_vq() | published_language(hidden, inner, layers)
    expected |= {"gen_embed.weight": (16384, 8)}
    expected |= linear("gen_aligner.layers.0", hidden, 8) | linear("gen_aligner.layers.2", hidden, hidden)
    expected |= linear("gen_head.output_mlp_projector", hidden, hidden)
    expected |= linear("gen_head.vision_head", 16384, hidden)
    assert found == expected
    text = translated.text_config
    assert (text.num_attention_heads, text.num_key_value_heads, text.rms_norm_eps) == (heads, heads, 1e-6)
    assert (text.hidden_act, text.max_position_embeddings) == ("silu", 16384)
    assert translated.vq_config.num_patches == 24
    rotary = type(model.model.language_model.rotary_emb)(text)
    turns = 10000.0 ** (-torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(rotary.inv_freq, turns)


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(folder: Path, match: str, *, by: tuple[Callable, ...] = (JanusSampler.load, load_tokenizer)) -> None:
    for reader in by:
        with pytest.raises(ValueError, match=match):
            reader(folder)


@pytest.mark.parametrize("kind", [".bin", ".safetensors"])
def test_missing_weights_are_named(folder, weights, kind):
    absent = {"gen_vision_model.quantize.embedding.weight", "gen_head.vision_head.bias"}
    write_weights(folder, {name: weights[name] for name in weights if name not in absent}, kind)
    both = r"missing: gen_head\.vision_head\.bias, gen_vision_model\.quantize\.embedding\.weight: fetch the whole"
    refused(folder, both, by=(JanusSampler.load,))
    refused(folder, r"missing: gen_vision_model\.quantize\.embedding\.weight: fetch", by=(load_tokenizer,))


@pytest.mark.parametrize("shards", [1, 2])
def test_strange_weights_are_named(folder, weights, shards):
    one = torch.ones(1)
    strange = {"model.vqmodel.quant_conv.bias": one, "stray": one, "gen_vision_model.stray": one}
    write_weights(folder, weights | strange, shards=shards)
    refused(folder, r"unexpected: gen_vision_model\.stray, model\.vqmodel\.quant_conv\.bias, stray: fetch")


def test_strange_weights_within_a_part_are_named_by_its_reader(folder, weights):
    within = {"language_model.model.layers.2.stray": torch.ones(1), "gen_vision_model.decoder.stray": torch.ones(1)}
    write_weights(folder, weights | within)
    refused(folder, r"; unexpected: language_model\.model\.layers\.2\.stray: fetch", by=(JanusSampler.load,))
    refused(folder, r"; unexpected: gen_vision_model\.decoder\.stray: fetch", by=(load_tokenizer,))


def test_a_wrong_shape_is_named(folder, weights):
    wrong = {"gen_head.vision_head.weight": torch.ones(5, 32), "gen_vision_model.quant_conv.bias": torch.ones(9)}
    write_weights(folder, weights | wrong)
    refused(folder, r"gen_head\.vision_head\.weight is \[5, 32\], expected \[64, 32\]", by=(JanusSampler.load,))
    refused(folder, r"gen_vision_model\.quant_conv\.bias is \[9\], expected \[8\]", by=(load_tokenizer,))


@pytest.mark.parametrize("kind", [".bin", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_file_cut_short_is_refused(folder, weights, kind, kept):
    (file,) = write_weights(folder, weights, kind)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole))])
    refused(folder, rf"model\{kind} (cannot be read|is empty).*cut short")


class Intruder:
    """Asks whoever unpickles it to make a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f'echo > "{self.trace}"',)


def test_code_in_a_file_is_refused_and_never_run(folder, weights, tmp_path):
    trace = tmp_path / "trace"
    torch.save({**weights, "extra": Intruder(trace)}, folder / "pytorch_model.bin")
    refused(
        folder, r"pytorch_model\.bin holds \w+\.system besides tensors, which could run code on loading; none was run"
    )
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({**weights, "extra": Intruder(trace)}, file)
    refused(folder, r"pytorch_model\.bin cannot be read as weights")
    assert not trace.exists()
    os.system(Intruder(trace).__reduce__()[1][0])
    assert trace.exists()  # It would have been.


def test_other_things_in_a_file_are_refused(folder, weights):
    torch.save(nn.Linear(2, 2), folder / "pytorch_model.bin")
    refused(folder, r"holds torch\.nn\.modules\.linear\.Linear besides tensors")
    torch.save([*weights.values()], folder / "pytorch_model.bin")
    refused(folder, "holds a list, expected tensors by name")
    torch.save({"state_dict": weights}, folder / "pytorch_model.bin")
    refused(folder, "holds a dict as state_dict, expected a tensor")


@pytest.mark.parametrize("kind", [".bin", ".safetensors"])
def test_a_shard_that_the_index_names_must_be_there(folder, weights, kind):
    _, second = write_weights(folder, weights, kind, shards=2)
    second.unlink()
    refused(folder, rf"lacks \S+-00002-of-00002\{kind}, which \S+\{kind}\.index\.json names: its download has not")


def test_the_tokenizer_does_without_shards_of_other_parts(folder, weights):
    write_weights(folder, weights)
    rest = folder / "pytorch_model-00002-of-00002.bin"
    placed = {name: "pytorch_model.bin" if name.startswith("gen_vision_model.") else rest.name for name in weights}
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": placed})
    load_tokenizer(folder)
    refused(folder, f"lacks {rest.name}", by=(JanusSampler.load,))
    write_json(folder / "pytorch_model.bin.index.json", {})
    refused(folder, "no weight_map")


def test_files_must_be_there(folder, weights):
    refused(folder, r"expected one \.safetensors file or pytorch_model\.bin, or shards")
    write_weights(folder, weights)
    (folder / "tokenizer.json").unlink()
    refused(folder, r"tokenizer\.json does not exist", by=(JanusSampler.load,))
    shutil.rmtree(folder)
    refused(folder, "not a folder")


def test_other_models_of_the_same_type_are_refused(folder):
    config = json.loads((folder / "config.json").read_text("utf-8"))

    def with_(match: str, **changes: dict | None) -> None:
        write_json(folder / "config.json", {k: v for k, v in (config | changes).items() if v is not None})
        refused(folder, rf"Janus-Tiny has {match}.*: choose a folder with a Janus")

    with_("no gen_vision_config", gen_vision_config=None)  # JanusFlow and DeepSeek-VL
    with_("no language_config", language_config=None)
    with_("a gen_vision_config of class 'VQ-8', expected 'VQ-16'", gen_vision_config={"cls": "VQ-8", "params": {}})
    with_("n_embed None in its config.json", gen_vision_config={"cls": "VQ-16", "params": {"image_token_size": 64}})
    with_("no params", gen_head_config={"cls": "vision_head"})
    with_("a language model of type 'qwen2'", language_config={"model_type": "qwen2"})
    with_("hidden_size '32'", language_config={"hidden_size": "32"})
    linear_aligner = {"cls": "MlpProjector", "params": {"projector_type": "linear", "n_embed": 32}}
    with_("projector_type 'linear'", gen_aligner_config=linear_aligner)
