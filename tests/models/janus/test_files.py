"""Janus folders that are damaged, foreign, quantised or dishonest: one line each, before any weights are read."""

from __future__ import annotations

import codecs
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcdd_core import registry
from dcdd_core.models import checkpoints
from dcdd_core.models.janus import deepseek
from dcdd_core.models.janus.files import JanusFolder
from dcdd_core.models.janus.sampler import JanusSampler
from dcdd_core.models.janus.tokenizer import load_tokenizer
from tests.models.janus.deepseek_layout import TINY_LANGUAGE, TINY_VQ, UNREAD, published_config, write_json
from tests.models.janus.test_deepseek import PRO_1B
from tests.tiny import save_janus, tiny_vq

Weights = dict[str, torch.Tensor]

SAMPLER, TOKENIZER = (JanusSampler.load,), (load_tokenizer,)
BOTH = SAMPLER + TOKENIZER


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers' layout."""
    return save_janus(tmp_path_factory.mktemp("models") / "Janus-Tiny")


@pytest.fixture(scope="module")
def sound_deepseek(tmp_path_factory: pytest.TempPathFactory, sound: Path) -> Path:
    """The same model in DeepSeek's layout."""
    folder = Path(shutil.copytree(sound, tmp_path_factory.mktemp("models") / "Janus-Tiny"))
    weights = load_file(folder / "model.safetensors")
    save_file(
        {deepseek.deepseek_name(name): weights[name] for name in weights if not name.startswith(UNREAD)},
        folder / "model.safetensors",
    )
    write_json(folder / "config.json", published_config(32, TINY_LANGUAGE, side=16, codes=64))
    return folder


@pytest.fixture(params=["transformers", "DeepSeek"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Either layout, to be damaged."""
    monkeypatch.setattr(deepseek, "_VQ_16", {**deepseek._VQ_16, **TINY_VQ})
    kind = "sound" if request.param == "transformers" else "sound_deepseek"
    return Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "Janus-Tiny"))


@pytest.fixture
def plain(sound: Path, tmp_path: Path) -> Path:
    """transformers' layout, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "Janus-Tiny"))


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors whose values were read."""
    read: list[str] = []
    real = checkpoints.check_finite
    monkeypatch.setattr(
        checkpoints, "check_finite", lambda tensor, name, file: read.append(name) or real(tensor, name, file)
    )
    return read


def edit(folder: Path, *where: str, value: object) -> None:
    """Sets an entry of config.json."""
    config = section = json.loads((folder / "config.json").read_text("utf-8"))
    for name in where[:-1]:
        section = section[name]
    section[where[-1]] = value
    write_json(folder / "config.json", config)


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(change(weights), folder / "model.safetensors")


def refused(folder: Path, match: str, *, by: tuple[Callable, ...] = BOTH) -> None:
    """Within 10 s, with little memory, in one line."""
    for reader in by:
        began, most = time.monotonic(), peak()
        with pytest.raises(ValueError, match=match) as caught:
            reader(folder)
        assert time.monotonic() - began < 10 and peak() - most < 2**29
        assert "\n" not in str(caught.value), caught.value


def peak() -> int:
    """The most memory that this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_both_layouts_are_sound(folder):
    assert JanusSampler.load(folder).grid == (4, 4)
    assert load_tokenizer(folder).codebook.size == 64


# --- which files count ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.safetensors", "model-00001-of-00002.safetensors", "z.safetensors"])
@pytest.mark.parametrize("sharded", [False, True])
def test_stray_weights_change_nothing(folder, name, sharded):
    before, codes = JanusSampler.load(folder).fingerprint, load_tokenizer(folder).codebook.fingerprint
    stray = {key: tensor + 1 for key, tensor in load_file(folder / "model.safetensors").items()}
    if sharded:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        write_json(folder / "model.safetensors.index.json", {"weight_map": dict.fromkeys(weights, "part.safetensors")})
    save_file(stray, folder / name)
    assert JanusSampler.load(folder).fingerprint == before
    assert load_tokenizer(folder).codebook.fingerprint == codes


def test_two_files_of_which_none_is_meant_more_are_refused(folder):
    shutil.copy(folder / "model.safetensors", folder / "b.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    refused(folder, r"a\.safetensors, b\.safetensors, and nothing says which is the model")
    (folder / "b.safetensors").unlink()
    assert load_tokenizer(folder).codebook.size == 64 and JanusSampler.load(folder).grid == (4, 4)


def test_an_index_that_leads_out_of_its_folder_is_refused(folder):
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": dict.fromkeys(names, "../other.safetensors")})
    refused(folder, r"index\.json places .* in '\.\./other\.safetensors', outside of its folder")


def test_what_sampling_does_not_use_need_not_be_there(plain):
    """As in models with tied embeddings, whose lm_head no version of transformers saves."""
    unused = ("lm_head.", "model.vision_model.", "model.aligner.", "model.vqmodel.encoder.", "model.vqmodel.decoder.")
    before = JanusSampler.load(plain).fingerprint
    rewrite(plain, lambda weights: {name: weights[name] for name in weights if not name.startswith(unused)})
    for tied in (True, False):
        edit(plain, "tie_word_embeddings", value=tied)
        edit(plain, "text_config", "tie_word_embeddings", value=tied)
        assert JanusSampler.load(plain).fingerprint == before
    refused(plain, r"levels|missing", by=TOKENIZER)


def test_a_model_in_the_hubs_cache_has_its_repositorys_name(sound, tmp_path):
    snapshot = tmp_path / "models--owner--Janus-Tiny" / "snapshots" / "abcd"
    blobs = tmp_path / "models--owner--Janus-Tiny" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(sound.iterdir())):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    assert JanusSampler.load(snapshot).name == load_tokenizer(snapshot).name == "Janus-Tiny"
    (tmp_path / "link").symlink_to(snapshot)
    assert load_tokenizer(tmp_path / "link").name == "Janus-Tiny"


# --- quantised --------------------------------------------------------------------------------------------------------

METHODS = {
    "bitsandbytes, 4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
    "bitsandbytes, 8 bits": {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True},
    "gptq, 4 bits": {"quant_method": "gptq", "bits": 4},
    "awq, 4 bits": {"quant_method": "awq", "bits": 4},
    "torchao": {"quant_method": "torchao", "quant_type": {}},
    "hqq": {"quant_method": "hqq"},
    "quanto": {"quant_method": "quanto", "weights": "int8"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "in a way that it does not name": {"quant_method": 5},
}


@pytest.mark.parametrize("how", METHODS)
def test_a_quantised_model_is_called_so_by_its_config(folder, how, unread):
    edit(folder, "quantization_config", value=METHODS[how])
    refused(
        folder,
        rf"is quantised \(by its config\.json\): {how}, .*folder of the original model$",
        by=SAMPLER,
    )
    assert not unread
    assert load_tokenizer(folder).codebook.size == 64  # which these methods leave as it was


SIGNS = {
    "bitsandbytes, 4 bits": ("weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"),
    "bitsandbytes, 8 bits": ("SCB",),
    "GPTQ": ("qweight", "qzeros", "scales", "g_idx"),
    "AWQ or GPTQ": ("qweight", "qzeros", "scales"),
    "HQQ": ("W_q", "meta"),
    "quanto": ("weight._data", "weight._scale"),
    "torchao": ("_weight_qdata", "_weight_scale"),
    "compressed-tensors": ("weight_packed", "weight_scale"),
}


@pytest.mark.parametrize("how", SIGNS)
def test_a_quantised_model_is_called_so_by_its_tensors(folder, how, unread):
    layer = "model.language_model.layers.1.self_attn.q_proj."
    layer = (
        layer
        if "model.vqmodel.quantize.embedding.weight" in load_file(folder / "model.safetensors")
        else deepseek.deepseek_name(layer)
    )
    signs = {layer + sign: torch.zeros(2, dtype=torch.uint8) for sign in SIGNS[how]}
    rewrite(folder, lambda weights: {name: weights[name] for name in weights if name != f"{layer}weight"} | signs)
    refused(folder, rf"is quantised \(it has {layer}\S+\): {how}, .*folder of the original model$", by=SAMPLER)
    assert not unread
    assert load_tokenizer(folder).codebook.size == 64


def test_int8_without_scales_is_called_so(folder, unread):
    rewrite(folder, lambda weights: {n: w.to(torch.int8) if "q_proj" in n else w for n, w in weights.items()})
    refused(folder, r"is quantised \(it has .*q_proj\.weight\): I8 without scales", by=SAMPLER)
    rewrite(folder, lambda weights: {n: w.to(torch.int8) if "decoder.conv_in" in n else w for n, w in weights.items()})
    refused(folder, r"is quantised \(it has .*decoder\.conv_in\.weight\): I8 without scales", by=TOKENIZER)
    assert not unread


def test_a_gguf_file_is_called_so(folder, tmp_path):
    (tmp_path / "janus.gguf").write_bytes(b"GGUF" + bytes(99))
    with pytest.raises(ValueError, match=r"janus\.gguf is a GGUF file; expected a VLM: the folder of a Janus"):
        registry.sampler_family(tmp_path / "janus.gguf")
    (folder / "model.safetensors").unlink()
    shutil.copy(tmp_path / "janus.gguf", folder)
    refused(folder, r"holds .*janus\.gguf.*; expected one \.safetensors file")


# --- damaged JSON -----------------------------------------------------------------------------------------------------

NO_OBJECT = {
    "empty": b"",
    "list": b"[]",
    "text": b'"x"',
    "null": b"null",
    "half a file": b'{"model_type": "ja',
    "brackets": b"[" * 200_000,
    "nested objects": b'{"a":' * 100_000,
    "LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "HTML": b"<!DOCTYPE html><html><title>Log in</title></html>",
    "Latin-1": b'{"model_type": "\xe9"}',
    "noise": bytes(range(256)),
}
JSONS = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@pytest.mark.parametrize("content", NO_OBJECT)
@pytest.mark.parametrize("name", JSONS)
def test_what_is_no_json_object_is_named_before_weights_are_read(folder, name, content, unread):
    (folder / name).write_bytes(NO_OBJECT[content])
    refused(
        folder, rf"{name} (is|holds|cannot be read).*: (download|fetch) ", by=BOTH if name == "config.json" else SAMPLER
    )
    assert not unread


@pytest.mark.parametrize("name", [*JSONS, "all"])
def test_a_byte_order_mark_is_read_over(folder, name):
    write_json(folder / "special_tokens_map.json", {"cls_token": "red"})
    write_json(folder / "added_tokens.json", {})
    before = JanusSampler.load(folder)
    for file in JSONS if name == "all" else [name]:
        (folder / file).write_bytes(codecs.BOM_UTF8 + (folder / file).read_bytes())
    after = JanusSampler.load(folder)
    assert after.grid == (4, 4) and after.tokenizer.special_tokens_map == before.tokenizer.special_tokens_map
    for prompt in ("a red circle", "", "\ufeffred"):
        assert after.tokenizer(prompt)["input_ids"] == before.tokenizer(prompt)["input_ids"]
    assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab()


def test_a_damaged_tokenizer_is_named_beside_a_byte_order_mark_too(folder, unread):
    (folder / "tokenizer_config.json").write_bytes(codecs.BOM_UTF8 + b"{}")
    (folder / "tokenizer.json").write_bytes(codecs.BOM_UTF8 + b'{"model": 5}')
    refused(folder, r"/tokenizer\.json cannot be read as what a Janus model's tokenizer", by=SAMPLER)
    assert not unread


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"model": 5},
        {"model": {"type": "Unknown"}},
        {"version": "1.0", "model": {"type": "BPE", "vocab": [], "merges": {}}},
    ],
)
def test_a_tokenizer_json_of_other_content_is_named(folder, content, unread):
    write_json(folder / "tokenizer.json", content)
    refused(folder, r"/tokenizer\.json cannot be read as what a Janus model's tokenizer", by=SAMPLER)
    assert not unread


@pytest.mark.parametrize(
    "entry",
    [
        {"bos_token": 5},
        {"bos_token": ["x"]},
        {"pad_token": {"content": 5}},
        {"extra_special_tokens": 5},
        {"added_tokens_decoder": {"x": {"content": "y"}}},
        {"added_tokens_decoder": []},
        {"model_max_length": "many"},
    ],
)
def test_a_tokenizer_config_of_other_types_is_named(folder, entry, unread):
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    write_json(folder / "tokenizer_config.json", config | entry)
    refused(folder, r"tokenizer_config\.json", by=SAMPLER)
    assert not unread


def test_ids_beyond_the_models_words_are_refused(folder):
    words = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    words["model"]["vocab"]["red"] = 10**6
    write_json(folder / "tokenizer.json", words)
    refused(folder, r"id 1,?000,?000.*21.*do not belong together", by=SAMPLER)


@pytest.mark.parametrize("name", [*JSONS, "model.safetensors", "chat_template.jinja"])
def test_a_pipe_is_refused_and_never_waited_for(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    signal.alarm(20)  # kills the tests, which would wait for ever
    refused(
        folder,
        rf"{name} is a device, pipe or socket",
        by=BOTH if name in ("config.json", "model.safetensors") else SAMPLER,
    )
    if name == "config.json":
        for family in (registry.sampler_family, registry.codec_family, registry.base_family):
            with pytest.raises(ValueError, match="config.json is a device, pipe or socket"):
                family(folder)
    signal.alarm(0)


# --- entries of config.json -------------------------------------------------------------------------------------------

WRONG = (None, "32", 3.5, True, -1, 0, [], {}, [32], float("nan"))
TEXT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
CODES = ("embed_dim", "num_embeddings", "num_hidden_layers", "projection_dim", "image_token_embed_dim")
CODEC = ("latent_channels", "base_channels", "in_channels", "out_channels")


@pytest.mark.parametrize("value", WRONG)
def test_wrong_types_of_sizes_are_named(plain, value, unread):
    for section, entries in (
        ("text_config", TEXT),
        ("vq_config", (*CODES, *CODEC)),
        ("vision_config", ("image_size", "patch_size")),
    ):
        for entry in entries:
            was = json.loads((plain / "config.json").read_text("utf-8"))[section][entry]
            edit(plain, section, entry, value=value)
            refused(plain, rf"Janus-Tiny has {entry} .* in its config\.json, expected a whole number", by=SAMPLER)
            if section == "vq_config":
                refused(plain, rf"Janus-Tiny has {entry} ", by=TOKENIZER)
            edit(plain, section, entry, value=was)
    assert not unread


@pytest.mark.parametrize("value", ["x", 5, [], None])
@pytest.mark.parametrize("section", ["text_config", "vq_config", "vision_config"])
def test_sections_of_other_types_are_named(plain, section, value):
    edit(plain, section, value=value)
    refused(plain, rf"Janus-Tiny has {section} .*expected an object", by=SAMPLER)


@pytest.mark.parametrize(
    ("section", "entry", "value"),
    [
        ("text_config", "rms_norm_eps", "x"),
        ("text_config", "rms_norm_eps", float("nan")),
        ("text_config", "rms_norm_eps", -1),
        ("text_config", "hidden_act", 5),
        ("text_config", "hidden_act", "no such function"),
        ("text_config", "attention_bias", "yes"),
        ("text_config", "num_key_value_heads", "2"),
        ("text_config", "num_key_value_heads", 3),
        ("text_config", "head_dim", []),
        ("text_config", "model_type", "qwen2"),
        ("text_config", "rope_parameters", {"rope_type": "no such type"}),
        ("text_config", "rope_parameters", 5),
        ("text_config", "rope_parameters", {"rope_theta": "x"}),
        ("text_config", "rope_parameters", {"rope_theta": float("nan")}),
        ("text_config", "rope_parameters", {"rope_theta": 0}),
        ("vq_config", "channel_multiplier", 5),
        ("vq_config", "channel_multiplier", []),
        ("vq_config", "channel_multiplier", [1, "1"]),
        ("vq_config", "num_res_blocks", -1),
        ("vq_config", "double_latent", 0),
        ("vision_config", "patch_size", 64),
        ("vision_config", "image_size", 10**9),
    ],
)
def test_other_entries_are_named(plain, section, entry, value, unread):
    edit(plain, section, entry, value=value)
    refused(plain, rf"Janus-Tiny.*config\.json|Janus-Tiny has .*{entry}|a language model of type", by=SAMPLER)
    assert not unread


@pytest.mark.parametrize(
    ("section", "entry"),
    [
        (("language_config",), "hidden_size"),
        (("language_config",), "num_key_value_heads"),
        (("language_config",), "vocab_size"),
        (("gen_vision_config", "params"), "n_embed"),
        (("gen_vision_config", "params"), "image_token_size"),
        (("gen_aligner_config", "params"), "depth"),
        (("gen_head_config", "params"), "n_embed"),
        (("vision_config", "params"), "image_size"),
    ],
)
@pytest.mark.parametrize("value", ["32", 3.5, True, -1, 0, [], {}, float("nan")])
def test_wrong_types_in_deepseeks_config_are_named(sound_deepseek, tmp_path, section, entry, value, unread):
    folder = Path(shutil.copytree(sound_deepseek, tmp_path / "Janus-Tiny"))
    edit(folder, *section, entry, value=value)
    refused(folder, rf"Janus-Tiny has {entry} .* in its config\.json, expected a whole number")
    assert not unread


@pytest.mark.parametrize(
    "entries",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
        {"rope_parameters": None, "rope_theta": 500.0},
    ],
)
def test_rotary_settings_of_either_transformers_count(plain, entries):
    for entry, value in entries.items():
        edit(plain, "text_config", entry, value=value)
    expected = 500.0 ** (-torch.arange(0, 8, 2) / 8)
    linear = (entries["rope_parameters"] or {}).get("rope_type") == "linear"
    found = JanusSampler.load(plain).model.model.language_model.rotary_emb.inv_freq
    torch.testing.assert_close(found, expected / 2 if linear else expected)


# --- declared sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "entry", "value", "match"),
    [
        ("text_config", "num_hidden_layers", 10**6, r"num_hidden_layers 1,000,000, and the weights have 2 "),
        ("text_config", "hidden_size", 10**9, r"hidden_size 1,000,000,000, and the weights have 32 "),
        ("text_config", "hidden_size", 10**18, r"hidden_size 1,000,000,000,000,000,000, and the weights have 32 "),
        ("text_config", "vocab_size", 10**12, r"vocab_size 1,000,000,000,000, and the weights have 21 "),
        ("text_config", "intermediate_size", 10**15, r"intermediate_size .* and the weights have 64 "),
        ("text_config", "num_attention_heads", 10**6, r"q_proj\.weight is \[32, 32\], expected|config\.json"),
        ("vq_config", "num_embeddings", 10**12, r"num_embeddings .* and the weights have 64 "),
        ("vq_config", "embed_dim", 10**12, r"embed_dim .* and the weights have 8 "),
        ("vq_config", "num_hidden_layers", 10**6, r"num_hidden_layers 1,000,000, and the weights have 2 "),
        ("vq_config", "projection_dim", 10**9, r"is \[32.*\], expected \[1000000000"),
        ("vq_config", "image_token_embed_dim", 10**9, r"is \[.*32\], expected \[.*1000000000"),
    ],
)
def test_sizes_that_are_not_the_weights_answer_at_once(plain, section, entry, value, match, unread):
    edit(plain, section, entry, value=value)
    refused(plain, match, by=SAMPLER)
    assert not unread


@pytest.mark.parametrize(
    ("entry", "value", "match"),
    [
        ("channel_multiplier", [1] * 10**6, r"channel_multiplier, whose values are 1,000,000, and the weights have 3 "),
        ("num_res_blocks", 10**6, r"num_res_blocks 1,000,000, and the weights have 1 "),
        ("base_channels", 10**12, r"base_channels 1,000,000,000,000, and the weights have 32 "),
        ("latent_channels", 10**12, r"latent_channels 1,000,000,000,000, and the weights have 16 "),
        ("channel_multiplier", [1, 1, 10**12], r"config\.json"),
        ("in_channels", 10**9, r"is \[32, 3, 3, 3\], expected \[32, 1000000000, 3, 3\]"),
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_a_tokenizers_sizes_answer_at_once(plain, tmp_path, entry, value, match, alone, unread):
    if alone:
        plain = tmp_path / "alone"
        tiny_vq().save_pretrained(plain)
        edit(plain, entry, value=value)
    else:
        edit(plain, "vq_config", entry, value=value)
    refused(plain, match, by=TOKENIZER)
    assert not unread


def test_deepseeks_sizes_answer_at_once(sound_deepseek, tmp_path, monkeypatch, unread):
    monkeypatch.setattr(deepseek, "_VQ_16", {**deepseek._VQ_16, **TINY_VQ})
    for *section, entry, match in (
        ("language_config", "num_hidden_layers", r"num_hidden_layers 1,000,000, and the weights have 2 "),
        ("language_config", "hidden_size", r"hidden_size 1,000,000, and the weights have 32 "),
        ("gen_aligner_config", "params", "depth", r"depth 1,000,000, and the weights have 2 "),
        ("gen_vision_config", "params", "image_token_size", r"is \[64, 8\], expected \[1000000, 8\]"),
    ):
        folder = Path(shutil.copytree(sound_deepseek, tmp_path / "Janus-Tiny", dirs_exist_ok=True))
        edit(folder, *section, entry, value=10**6)
        refused(folder, match, by=SAMPLER)
    assert not unread


def test_the_published_sizes_are_named_against_a_tiny_model(sound_deepseek, tmp_path, unread):
    folder = Path(shutil.copytree(sound_deepseek, tmp_path / "Janus-Tiny"))
    write_json(folder / "config.json", PRO_1B)
    refused(folder, r"num_hidden_layers 24, and the weights have 2 ", by=SAMPLER)
    refused(folder, r"missing: gen_vision_model\.", by=TOKENIZER)
    assert not unread


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_where_they_are_used(folder, value):
    def spoil(part: str) -> Callable[[Weights], Weights]:
        def change(weights: Weights) -> Weights:
            (name,) = (name for name in weights if name.endswith(part))
            weights[name].flatten()[3] = value
            return weights

        return change

    rewrite(folder, spoil("decoder.conv_in.weight"))
    assert JanusSampler.load(folder).grid == (4, 4)
    refused(folder, r"model\.safetensors holds values of \S+decoder\.conv_in\.weight that are not finite", by=TOKENIZER)
    rewrite(folder, spoil("layers.1.mlp.up_proj.weight"))
    refused(folder, r"model\.safetensors holds values of \S+layers\.1\.mlp\.up_proj\.weight that are not", by=SAMPLER)


def test_the_folder_says_what_it_is(folder):
    found = JanusFolder(folder)
    assert found.name == "Janus-Tiny" and found.kind in ("janus", "multi_modality")


def test_a_pipe_in_a_folders_place_is_called_so(tmp_path):
    os.mkfifo(tmp_path / "model")
    with pytest.raises(ValueError, match="model is a device, pipe or socket; expected a VLM"):
        registry.sampler_family(tmp_path / "model")


def test_the_published_tokenizer_is_on_the_grid_of_384_pixels():
    family = next(family for family in registry.samplers() if family.name == "janus")
    assert family.published_tokenizer().grid == (24, 24)
