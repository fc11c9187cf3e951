"""Strict reading: shards, prefixes, and errors that name what is wrong."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dcdd_core.models.checkpoints import fingerprint_of, load_strictly, read_config, read_tensors


def test_shards_are_read_together_and_prefixes_cut(tmp_path):
    save_file({"m.a": torch.ones(2), "n.b": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"m.c": torch.ones(1, dtype=torch.int64)}, tmp_path / "model-00002-of-00002.safetensors")
    tensors = read_tensors(tmp_path, prefix="m.", dtype=torch.float16)
    assert set(tensors) == {"a", "c"}
    assert tensors["a"].dtype == torch.float16 and tensors["c"].dtype == torch.int64


def test_empty_folders_strange_prefixes_and_cut_files_are_explained(tmp_path):
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        read_tensors(tmp_path)
    save_file({"a": torch.ones(100)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="no tensor named b"):
        read_tensors(tmp_path, prefix="b")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-50])
    with pytest.raises(ValueError, match="cut short or damaged"):
        read_tensors(tmp_path)


def test_configs_are_explained(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        read_config(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_config(tmp_path)


def test_loading_is_strict_and_fills_meta_modules():
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    weights = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
    load_strictly(module, weights, "file")
    assert module.weight.device.type == "cpu" and torch.equal(module.weight, torch.ones(2, 2))
    for change, words in (
        ({"bias": None}, "missing: bias"),
        ({"more": torch.ones(1)}, "unexpected: more"),
        ({"bias": torch.zeros(3)}, r"wrong shape: bias is \[3\], expected \[2\]"),
    ):
        tensors = {k: v for k, v in (weights | change).items() if v is not None}
        with pytest.raises(ValueError, match=words):
            load_strictly(nn.Linear(2, 2), tensors, "file")


def test_a_fingerprint_is_of_names_shapes_and_values():
    tensors = {"a": torch.arange(5000.0), "b": torch.zeros(2, 3)}
    same = fingerprint_of(dict(reversed(tensors.items())))
    assert fingerprint_of(tensors) == same == fingerprint_of(tensors | {"m": torch.zeros(2, device="meta")})
    others = [{"a": tensors["a"]}, tensors | {"b": torch.zeros(3, 2)}, tensors | {"a": tensors["a"] + 1}]
    assert len({same, *map(fingerprint_of, others)}) == 4
