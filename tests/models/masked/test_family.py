"""What every family of masked samplers loads, in 8 bits too."""

from __future__ import annotations

import sys

import pytest
import torch

from dcdd_core import registry
from dcdd_core.models.masked import sampler as masked_sampler
from tests.models.masked.tiny_masked import save_tiny_masked
from tests.tiny_amused import save_tiny_amused
from tests.tiny_bigfix import save_bigfix

#: By family how a small model is written, and the parts whose linear weights are in 8 bits.
FAMILIES = {
    "masked": (save_tiny_masked, ["layers"]),
    "amused": (save_tiny_amused, ["transformer.transformer_layers"]),
    "bigfix": (save_bigfix, ["layers", "text_encoder.encoder.block"]),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_eight_bits_are_of_the_blocks_and_said_in_the_fingerprint(tmp_path, monkeypatch, name):
    save, parts = FAMILIES[name]
    folder = save(tmp_path / "model")
    family = registry.sampler_family(folder)
    assert family.name == name
    whole = family.load_sampler(str(folder), dtype=torch.bfloat16)
    rounded = []
    monkeypatch.setattr(masked_sampler, "store_in_int8", lambda part, device: rounded.append((part, device)))
    small = family.load_sampler(str(folder), dtype=torch.bfloat16, int8=True)
    assert rounded == [(small.model.get_submodule(part), "cpu") for part in parts]
    assert type(small) is type(whole) and small.sampling == whole.sampling and small.name == whole.name
    weights, plan = whole.fingerprint.rsplit("-", 1)
    assert small.fingerprint == f"{weights} in int8-{plan}"


@pytest.mark.parametrize("name", FAMILIES)
def test_eight_bits_are_read_on_the_cpu_and_moved(tmp_path, monkeypatch, name):
    """A device that is too small for the whole network holds it in 8 bits."""
    folder = FAMILIES[name][0](tmp_path / "model")
    family = registry.sampler_family(folder)
    seen = []
    monkeypatch.setattr(
        masked_sampler, "store_in_int8", lambda part, device: seen.append((next(part.parameters()).device.type, device))
    )
    small = family.load_sampler(str(folder), device="meta", int8=True)
    assert set(seen) == {("cpu", "meta")}
    assert {weight.device.type for weight in small.model.parameters()} == {"meta"}


def test_weights_that_were_not_stored_in_eight_bits_keep_their_fingerprint(tmp_path, monkeypatch):
    folder = save_tiny_masked(tmp_path / "model")
    sampler = registry.sampler_family(folder).load_sampler(str(folder))
    before = sampler.fingerprint
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match="need torchao"):
        sampler.store_in_int8("cpu")
    assert sampler.fingerprint == before


def test_the_published_tokenizer_is_that_of_janus():
    family = next(found for found in registry.samplers() if found.name == "masked")
    assert family.published_tokenizer().grid == (24, 24)
