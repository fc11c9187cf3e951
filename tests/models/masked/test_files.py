"""A masked sampler's folder: written, read back, and refused where it does not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from unittest.mock import ANY

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcdd_core import registry
from dcdd_core.models.masked.files import load_masked, save_sampling
from tests.models.masked.tiny_masked import SAMPLING, save_tiny_masked, tiny_masked


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny_masked(tmp_path_factory.mktemp("masked") / "model")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def change_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_it_comes_back_as_it_was(saved):
    loaded, made = load_masked(saved), tiny_masked()
    for name, value in made.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    assert torch.equal(loaded.codebook.vectors, made.codebook.vectors)
    assert (loaded.sampling, loaded.default_guidance, loaded.name) == (SAMPLING, 3.0, "tiny")
    assert loaded.fingerprint == made.fingerprint
    assert not loaded.model.training and not any(weight.requires_grad for weight in loaded.model.parameters())


def test_a_schedule_that_is_a_list_comes_back(folder):
    sampling = json.loads((folder / "config.json").read_text())["sampling"]
    change_config(folder, sampling=sampling | {"schedule": [1, 2.5, 0, 4]})
    assert load_masked(folder).sampling == replace(SAMPLING, schedule=(1, 2.5, 0, 4))


def test_how_it_samples_can_be_changed_alone(folder):
    def others():
        files = (path for path in folder.rglob("*") if path.is_file() and path != folder / "config.json")
        return {path: path.read_bytes() for path in files}

    before, config = others(), json.loads((folder / "config.json").read_text())
    sampling = replace(SAMPLING, guidance=4.5, ramp=False, schedule=(1, 2.5, 0, 4))
    save_sampling(folder, sampling)
    assert load_masked(folder).sampling == sampling
    assert json.loads((folder / "config.json").read_text()) == config | {"sampling": ANY}
    assert others() == before
    change_config(folder, template=None)
    with pytest.raises(ValueError, match=r"config.json lacks \['template'\]"):
        save_sampling(folder, SAMPLING)


def test_weights_take_the_dtype_that_is_asked_for(saved):
    loaded = load_masked(saved, dtype=torch.bfloat16)
    assert {value.dtype for value in loaded.model.state_dict().values()} == {torch.bfloat16}
    assert torch.equal(loaded.codebook.vectors, tiny_masked().codebook.vectors), "in float32"


def test_eight_bits_are_read_back_to_half_a_step(tmp_path):
    folder, made = save_tiny_masked(tmp_path / "small", int8=True), tiny_masked()
    stored, loaded = load_file(folder / "model.safetensors"), load_masked(folder).model.state_dict()
    rounded = {name for name, value in stored.items() if value.dtype == torch.int8}
    assert rounded == {f"layers.{i}.down.weight" for i in (0, 1)}, "rows of at least 64"
    for name, value in made.model.state_dict().items():
        if name in rounded:
            step = value.abs().amax(1, keepdim=True) / 127
            assert ((loaded[name] - value).abs() <= 0.5 * step * 1.0001).all()
            assert (loaded[name] != value).any()
        else:
            assert torch.equal(loaded[name], value.half().float())
    assert load_masked(folder).model.mask.dtype == torch.float32


def test_the_image_tokenizer_lies_where_the_configuration_says(folder, tmp_path):
    inside = registry.sampler_family(folder).load_tokenizer(str(folder))
    (folder / "tokenizer").rename(tmp_path / "elsewhere")
    change_config(folder, tokenizer="../elsewhere")
    outside = registry.sampler_family(folder).load_tokenizer(str(folder))
    assert outside.codebook.fingerprint == inside.codebook.fingerprint == load_masked(folder).codebook.fingerprint
    for wrong in ("", 3, str(tmp_path / "elsewhere")):
        change_config(folder, tokenizer=wrong)
        with pytest.raises(ValueError, match="tokenizer must be the image tokenizer's folder relative to this one"):
            registry.sampler_family(folder).load_tokenizer(str(folder))
    change_config(folder, tokenizer=".")
    with pytest.raises(ValueError, match="is a masked sampler and has none of its own"):
        registry.sampler_family(folder).load_tokenizer(str(folder))


def test_eight_bits_in_memory(saved):
    pytest.importorskip("torchao")
    sampler = registry.sampler_family(saved).load_sampler(str(saved), int8=True)
    assert sampler.fingerprint.startswith(load_masked(saved).fingerprint[:16]) and "in int8" in sampler.fingerprint
    run = sampler.sample(["a red circle"], seeds=[1])
    assert run.logits.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"extra": 1}, r"has \['extra'\], which is unknown"),
        ({"template": None}, r"lacks \['template'\]"),
        ({"template": "red"}, "template must hold"),
        ({"name": 3}, "name must be a text"),
        ({"sampling": {"passes": 0}}, "passes must be a whole number"),
        ({"sampling": {"speed": 3}}, "sampling has an unknown entry"),
        ({"sampling": 3}, "sampling must be an object"),
        ({"network": {"grid": [4, 4]}}, "incomplete or unknown"),
        ({"network": 3}, "incomplete or unknown"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(folder, changes, words):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=words):
        load_masked(folder)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"layers": 10**9}, "says network.layers 1,000,000,000, and the weights have 2"),
        ({"layers": 1}, r"unexpected: layers\.1\."),
        ({"codes": 65}, "has a codebook of 64 x 8, and config.json says 65 x 8"),
        ({"hidden": 65}, "wrong shape: layers.0"),
        ({"words": 20}, "wrong shape: words.weight"),
    ],
)
def test_sizes_that_are_not_the_weights_are_refused(folder, sizes, words):
    network = json.loads((folder / "config.json").read_text())["network"]
    change_config(folder, network=network | sizes)
    with pytest.raises(ValueError, match=words):
        load_masked(folder)


def test_weights_that_do_not_fit_are_refused(folder):
    for change, words in (
        (lambda t: t.pop("mask"), "missing: mask"),
        (lambda t: t.update(mask=torch.zeros(32), other=torch.zeros(1)), "unexpected: other"),
        (lambda t: (t.pop("other"), t.update(mask=torch.zeros(32).int())), "has mask as torch.int32"),
        (lambda t: t.update({"mask": torch.zeros(32), "mask_scale": torch.zeros(1)}), "no int8 tensor for it"),
        (lambda t: (t.pop("mask_scale"), t.update({"layers.0.q.weight": torch.zeros(32, 32).char()})), "one scale"),
        (lambda t: t.pop("codebook"), "has no tensor 'codebook'"),
    ):
        change_weights(folder, change)
        with pytest.raises(ValueError, match=words):
            load_masked(folder)


def test_words_that_do_not_fit_are_refused(folder):
    path = folder / "tokenizer.json"
    before = path.read_text()
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read as a text tokenizer"):
        load_masked(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist"):
        load_masked(folder)
    words = json.loads(before)
    words["model"]["vocab"]["zebra"] = len(words["model"]["vocab"])
    path.write_text(json.dumps(words))
    with pytest.raises(ValueError, match="a tokenizer of 22 words and a network of 21"):
        load_masked(folder)
    words["model"]["vocab"] = json.loads(before)["model"]["vocab"]
    words["model"]["vocab"]["red"] = 50  # as many words as before, but an id that the network lacks
    path.write_text(json.dumps(words))
    with pytest.raises(ValueError, match="a tokenizer of 51 words and a network of 21"):
        load_masked(folder)
