"""Where a node computes that has no model of its own to place."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.nodes.cases import IT, PROXIES, built


def test_a_condition_is_mapped_where_its_tokenizer_is(double, monkeypatch):
    """ComfyUI's device is one on which no number comes out; the tokenizer stays on the CPU."""
    with double._modules.installed():
        management = sys.modules["comfy.model_management"]
    monkeypatch.setattr(management, "get_torch_device", lambda: torch.device("meta"))
    more = {"vq": ("DCDD_LoadVQVAE", {"placement": "CPU"})}
    graph = built(double.get("/object_info"), "DCDD_LCDMEncoder", PROXIES, more)
    graph.keep(IT, "mapped")
    run = double.run(graph.prompt)
    assert run.status == "success", (run.node, run.error)
    assert double.saved("mapped")["uncertainty"].any()


@pytest.mark.parametrize("placement", ["CPU", "auto"])
def test_a_decoder_in_8_bits_is_never_whole_in_another_precision(placement, double, monkeypatch):
    """In float32, in which a CPU computes the rest, FLUX.1-Fill would take 26 GB until it is rounded."""
    of = {name: sys.modules[f"{double.pack.__name__}.{name}"] for name in ("nodes.load", "dcdd_core.models.bundle")}
    load, read, came = of["nodes.load"], of["dcdd_core.models.bundle"].StoredTensors.read, []

    def recording(stored, *args, **options):
        found = read(stored, *args, **options)
        came.extend(found.values())
        return found

    monkeypatch.setattr(of["dcdd_core.models.bundle"].StoredTensors, "read", recording)
    with double._modules.installed():
        given = {"bundle": "bundle.safetensors", "base_model": load.HELD, "vae": load.CONNECTED, "placement": placement}
        held = load.LoadDecoder.execute(**given, storage="8-bit").args[0].decoder.network
    blocks = tuple(f"transformer.{name}." for name in held.backbone.block_names)
    inside = {
        f"{name}.weight": part
        for name, part in held.named_modules()
        if isinstance(part, torch.nn.Linear) and name.startswith(blocks)
    }
    assert inside and all(part.comfy_cast_weights for part in inside.values())
    assert {name for name, weight in held.named_parameters() if weight.dtype == torch.float8_e4m3fn} == set(inside)
    assert held.dtype == torch.float32 and held.device.type == "cpu"
    assert sum(value.dtype == torch.float8_e4m3fn for value in came) == len(inside)
    assert len(came) == len(held.state_dict()), "a matrix was read in another precision too"


def test_pico_s_model_and_vae_are_loaded_whole_however_little_room_there_is(double, monkeypatch):
    """Of a part, as under --novram, ComfyUI loads only layers of its own, and these have none."""
    with double._modules.installed():
        patchers = sys.modules["comfy.model_patcher"]
        model, vae, _ = double.nodes["DCDD_LoadPicoModel"].run({})[0]
    asked = []

    def partially_load(patcher, device, extra_memory=0, force_patch_weights=False):
        asked.append((patcher, device, extra_memory, force_patch_weights))
        return "loaded"

    monkeypatch.setattr(patchers.ModelPatcher, "partially_load", partially_load, raising=False)
    for patcher in (model, model.clone(), vae.patcher):
        assert patcher.partially_load(torch.device("meta"), 0.1, force_patch_weights=True) == "loaded"
        assert asked.pop() == (patcher, torch.device("meta"), 1e32, True)
