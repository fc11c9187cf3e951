"""Strict reading: shards, prefixes, and errors that name what is wrong."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dcdd_core.models import checkpoints, layouts
from dcdd_core.models.checkpoints import (
    find_tensors,
    fingerprint_of,
    load_strictly,
    read_config,
    read_headers,
    read_tensors,
    read_wanted,
)

Tensors = dict[str, torch.Tensor]


def write_shards(folder: Path, *shards: Tensors, stem: str = "model") -> list[Path]:
    """Shards with their index, named as transformers and diffusers name them."""
    files, placed = [], {}
    for i, tensors in enumerate(shards, 1):
        files.append(folder / f"{stem}-{i:05}-of-{len(shards):05}.safetensors")
        save_file(tensors, files[-1])
        placed |= dict.fromkeys(tensors, files[-1].name)
    write_index(folder, placed, stem)
    return files


def write_index(folder: Path, placed: object, stem: str = "model") -> None:
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def test_shards_are_read_together_and_prefixes_cut(tmp_path):
    first = {"m.a": torch.ones(2), "n.b": torch.zeros(1)}
    write_shards(tmp_path, first, {"m.c": torch.ones(1, dtype=torch.int64)})
    tensors = read_tensors(tmp_path, prefix="m.", dtype=torch.float16)
    assert set(tensors) == {"a", "c"}
    assert tensors["a"].dtype == torch.float16 and tensors["c"].dtype == torch.int64


def test_empty_folders_strange_prefixes_and_cut_files_are_explained(tmp_path):
    with pytest.raises(ValueError, match=r"holds nothing; expected one \.safetensors file or pytorch_model\.bin"):
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
    with pytest.raises(ValueError, match=r"config\.json cannot be read as a model's configuration"):
        read_config(tmp_path)


# --- which files count ------------------------------------------------------------------------------------------------

MEANT, STRAY = {"a": torch.full((2,), 1.0)}, {"a": torch.full((2,), 2.0)}


def fill(folder: Path, name: str, tensors: Tensors) -> None:
    if name == "shards":
        write_shards(folder, tensors, {"b": torch.zeros(1)})
    elif name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name)


def read_in_every_way(folder: Path) -> list[float]:
    """By the loaders of Janus folders, and by those of autoencoders and transformers."""
    with layouts.opened(folder, "a model") as found:
        there = found["a"].part[:]
    return [read_wanted(folder, "a".__eq__)["a"].tolist(), there.tolist()]


@pytest.mark.parametrize(
    ("meant", "stray"),
    [
        ("model.safetensors", "a_stray.safetensors"),
        ("model.safetensors", "z_stray.safetensors"),
        ("model.safetensors", "model-00001-of-00002.safetensors"),
        ("model.safetensors", "pytorch_model.bin"),
        ("diffusion_pytorch_model.safetensors", "z_stray.safetensors"),
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
        ("shards", "a_stray.safetensors"),
        ("shards", "z_stray.safetensors"),
        ("shards", "model.safetensors"),
        ("shards", "pytorch_model.bin"),
        ("lone.safetensors", "._lone.safetensors"),
    ],
)
def test_the_index_decides_then_the_canonical_name(tmp_path, meant, stray):
    fill(tmp_path, meant, MEANT)
    fill(tmp_path, stray, STRAY)
    assert read_in_every_way(tmp_path) == [[1.0, 1.0]] * 2


@pytest.mark.parametrize("stray", ["stray.safetensors", "pytorch_model.old.bin", "training_args.bin"])
def test_the_canonical_bin_counts_where_no_safetensors_has_such_a_name(tmp_path, stray):
    fill(tmp_path, "pytorch_model.bin", MEANT)
    fill(tmp_path, stray, STRAY)
    assert read_wanted(tmp_path, "a".__eq__)["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "names",
    [
        ("first.safetensors", "second.safetensors"),
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        ("model.safetensors", "diffusion_pytorch_model.safetensors"),
        ("first.safetensors.index.json", "second.safetensors.index.json"),
        ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json"),
    ],
)
def test_files_of_which_none_is_meant_more_are_refused_by_name(tmp_path, names):
    for name in names:
        if name.endswith(".json"):
            write_index(tmp_path, {"a": "x.safetensors"}, name.removesuffix(".safetensors.index.json"))
        else:
            fill(tmp_path, name, MEANT)
    for read in (read_tensors, read_headers, layout_of):
        with pytest.raises(ValueError, match="nothing says which is the model") as caught:
            read(tmp_path)
        assert all(name in str(caught.value) for name in names)


def layout_of(folder: Path) -> object:
    with layouts.opened(folder, "a model") as found:
        return found


def test_a_lone_file_beside_a_bin_that_is_not_read_is_refused(tmp_path):
    fill(tmp_path, "stray.safetensors", STRAY)
    fill(tmp_path, "diffusion_pytorch_model.bin", MEANT)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin, stray\.safetensors, and nothing says"):
        layout_of(tmp_path)


def test_the_index_says_which_of_two_tensors_of_one_name_counts(tmp_path):
    first, second = write_shards(tmp_path, MEANT, {**STRAY, "b": torch.zeros(1)})
    write_index(tmp_path, {"a": first.name, "b": second.name})
    assert read_in_every_way(tmp_path) == [[1.0, 1.0]] * 2
    save_file({"a": torch.zeros(1), "c": torch.zeros(1)}, first)
    save_file({"b": torch.zeros(1), "c": torch.zeros(1)}, second)
    for read in (read_tensors, layout_of):
        with pytest.raises(ValueError, match=r"00001-of-00002\.safetensors and .*00002.* both hold c"):
            read(tmp_path)
    write_index(tmp_path, {"a": second.name, "b": second.name})
    for read in (read_tensors, layout_of):
        with pytest.raises(ValueError, match=r"index\.json places a in .*00002.*, which has no such tensor"):
            read(tmp_path)


@pytest.mark.parametrize("outside", ["../x.safetensors", "sub/../../x.safetensors", "..\\x.safetensors", "C:x", "{}/x"])
def test_an_index_never_leads_out_of_its_folder(tmp_path, outside):
    folder = tmp_path / "model"
    folder.mkdir()
    fill(tmp_path, "x.safetensors", MEANT)
    write_index(folder, {"a": outside.format(tmp_path)})
    for read in (read_tensors, read_headers, layout_of):
        with pytest.raises(ValueError, match=r"index\.json places a in '.*', outside of its folder"):
            read(folder)


def test_the_hubs_cache_keeps_its_files_elsewhere(tmp_path):
    """models--OWNER--NAME/snapshots/REVISION holds links into blobs, beside the snapshots."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0a1b"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, file in enumerate([*write_shards(blobs, MEANT, {"b": torch.zeros(1)}), *blobs.glob("*.json")]):
        blob = file.rename(blobs / f"{i:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    assert read_in_every_way(snapshot) == [[1.0, 1.0]] * 2


@pytest.mark.parametrize("value", [None, [], {}, "x", {"a": 5}, {"a": None}, {"a": ["x"]}, {"a": ""}])
def test_an_index_of_other_types_is_named(tmp_path, value):
    write_index(tmp_path, value)
    for read in (read_tensors, layout_of):
        with pytest.raises(
            ValueError, match=r"model\.safetensors\.index\.json (has no weight_map|places a in .*a file's)"
        ):
            read(tmp_path)


# --- what is in them --------------------------------------------------------------------------------------------------

DAMAGED = {
    "empty": (b"", "empty"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    "HTML": (b"<!DOCTYPE html><title>Log in</title>", "an HTML page"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(99), "a GGUF file"),
    "noise": (bytes(range(200)), "cut short or damaged"),
    "a header of 2^60 bytes": ((2**60).to_bytes(8, "little") + b"{}", "cut short or damaged"),
    "brackets": ((200_000).to_bytes(8, "little") + b"[" * 200_000, "cut short or damaged"),
}


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_what_is_no_weights_file_is_called_by_its_name(tmp_path, name, kind):
    content, words = DAMAGED[kind]
    (tmp_path / name).write_bytes(content)
    words = (
        words if name != "pytorch_model.bin" or kind in ("empty", "LFS", "HTML") else "pytorch_model.bin (cannot|holds)"
    )
    for read in (read_tensors, layout_of) if name == "model.safetensors" else (read_tensors,):
        with pytest.raises(ValueError, match=words) as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "config.json"]
)
def test_a_pipe_is_refused_and_never_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    signal.alarm(10)  # kills the tests, which would wait for ever
    for read in (read_config,) if name == "config.json" else (read_tensors, read_headers):
        with pytest.raises(ValueError, match=f"{name} is a device, pipe or socket"):
            read(tmp_path)
    with pytest.raises(ValueError, match="device, pipe or socket"):
        read_tensors(tmp_path / name)
    signal.alarm(0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_values_that_are_not_finite_are_refused_where_they_are_read(tmp_path, name, dtype, value):
    weights = torch.zeros(3, 5)
    weights[1, 2] = value
    fill(tmp_path, name, {"layer.weight": weights.to(dtype), "sound": torch.ones(1)})
    read = torch.bfloat16 if dtype.itemsize == 1 else dtype
    read_wanted(tmp_path, "sound".__eq__)
    with pytest.raises(
        ValueError, match=rf"{name} holds values of layer\.weight that are not finite in {read}".replace("torch.", "")
    ):
        read_tensors(tmp_path)
    if name == "model.safetensors":
        stored = find_tensors(
            tmp_path / name, {"layer.weight": torch.Size([3, 5]), "sound": torch.Size([1])}, "a model"
        )
        stored.read(["sound"])
        for options in ({}, {"dtype": torch.float64}):
            with pytest.raises(ValueError, match=r"values of layer\.weight that are not finite"):
                stored.read(**options)


def test_values_beyond_the_asked_for_type_are_refused(tmp_path):
    save_file({"a": torch.tensor([1e6])}, tmp_path / "model.safetensors")
    assert read_tensors(tmp_path)["a"].item() == 1e6
    with pytest.raises(ValueError, match="not finite in float16.*needs bfloat16 or float32"):
        read_tensors(tmp_path, dtype=torch.float16)


def test_large_files_that_stay_mapped_are_not_read_through(tmp_path, monkeypatch):
    save_file({"a": torch.tensor([float("nan")])}, tmp_path / "model.safetensors")
    monkeypatch.setattr(checkpoints, "_MAPPED_AND_CHECKED", 8)
    stored = find_tensors(tmp_path / "model.safetensors", {"a": torch.Size([1])}, "a model")
    assert stored.read()["a"].isnan()
    with pytest.raises(ValueError, match="not finite"):
        stored.read(dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("unexpected", "dtypes", "how"),
    [
        (["a.weight.absmax", "a.weight.quant_state.bitsandbytes__nf4"], {}, "bitsandbytes, 4 bits"),
        (["a.SCB"], {"a.weight": "I8"}, "bitsandbytes, 8 bits"),
        (["a.qweight", "a.qzeros", "a.scales", "a.g_idx"], {}, "GPTQ"),
        (["a.qweight", "a.qzeros", "a.scales"], {}, "AWQ or GPTQ"),
        (["a.W_q", "a.scale"], {}, "HQQ"),
        (["a.weight._data", "a.weight._scale"], {}, "quanto"),
        (["a.weight:qdata", "a.weight:scale"], {}, "torchao"),
        (["a.weight_packed", "a.weight_scale"], {}, "compressed-tensors"),
        (["scaled_fp8"], {"a.weight": "F8_E4M3"}, "scaled float8"),
        (["a.scale_weight"], {"a.weight": "F8_E4M3"}, "scaled float8"),
        (["a.weight_scale"], {"a.weight": "I8"}, "values with scales"),
        ([], {"a.weight": "I8"}, "I8 without scales"),
    ],
)
def test_ways_of_quantising_are_told_apart(unexpected, dtypes, how):
    found = checkpoints.quantised({"b.weight": "BF16", **dtypes}, unexpected)
    assert found.endswith(f": {how}") and found.startswith("(it has ")


def test_names_that_sound_like_quantising_are_not():
    """Those of Stable Diffusion's autoencoders and of a VQ model."""
    names = ["quant_conv.weight", "quantize.embedding.weight", "norm.scale", "position_ids"]
    names += ["absmax_pool.weight", "my_qweights", "weight_scale_of.bias"]  # the signs, within longer words
    assert checkpoints.quantised({"quant_conv.weight": "F16", "float8": "F8_E4M3"}, names) is None


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


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_weights_are_cast_before_they_are_moved(tmp_path, monkeypatch, suffix):
    """Some devices have no float8."""
    file, moved = tmp_path / ("model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"), []
    held = {"a": torch.ones(4, 4).to(torch.float8_e4m3fn), "b": torch.ones(2), "n": torch.arange(3)}
    save_file(held, file) if suffix == ".safetensors" else torch.save(held, file)
    to = torch.Tensor.to

    def watched(self, *args, **options):
        if args and str(args[0]) == "meta":
            moved.append(self.dtype)
        return to(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    for dtype in (torch.float16, None):
        moved.clear()
        found = read_wanted(tmp_path, lambda name: True, dtype=dtype, device="meta")
        assert sorted(map(str, moved)) == sorted(str(value.dtype) for value in found.values())
        assert [found[name].dtype for name in "abn"] == [
            dtype or torch.bfloat16, dtype or torch.float32, torch.int64
        ]  # fmt: skip
