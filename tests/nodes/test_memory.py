"""What a user is told to do when memory runs out: settings that are there, by the names that they see."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import pytest
import torch

from tests.nodes.cases import DRAW, IT, PAINT, PROXIES, built, of


@pytest.fixture
def nodes(double) -> dict[str, ModuleType]:
    start = f"{double.pack.__name__}.nodes."
    return {name.removeprefix(start): module for name, module in sys.modules.items() if name.startswith(start)}


@pytest.fixture(params=["cpu", "cuda"])
def device(request, double, monkeypatch) -> str:
    """That of ComfyUI; nothing computes there."""
    with double._modules.installed():
        management = sys.modules["comfy.model_management"]
    monkeypatch.setattr(management, "get_torch_device", lambda: torch.device(request.param))
    return request.param


def settings_in(text: str, info: dict) -> set[tuple[str, str, str]]:
    """(node, input, value) of every choice that the text advises, each of which has to be offered."""
    found = set()
    for choices, node in re.findall(r"choose ((?:\w+ '[^']+'(?: or )?)+) in ([A-Z][\w -]+?)(?=,|$)", text):
        (entry,) = (one for one in info.values() if one.get("display_name") == node)
        for name, value in re.findall(r"(\w+) '([^']+)'", choices):
            assert value in _options(entry["input"]["required"][name]), (node, name, value)
            found.add((node, name, value))
    assert text.count("choose ") == len(re.findall(r"choose (?:a smaller model|\w+ ') ?", text)), text
    return found


def _options(given: list) -> list:
    return given[1]["options"] if given[0] == "COMBO" else given[0]


LOADED = {
    "LoadJanus": ({"model": "PICO", "dtype": "auto", "placement": "auto"}, "sampler"),
    "LoadVQVAE": ({"model": "PICO", "placement": "auto"}, "vq_vae"),
    "LoadDecoder": (
        {"bundle": "bundle.safetensors", "base_model": "HELD", "vae": "CONNECTED", "storage": "auto"}
        | {"placement": "auto"},
        "decoder",
    ),
}
ADVISED = {
    ("LoadJanus", "cpu"): {("dtype", "bfloat16")},
    ("LoadJanus", "cuda"): {("dtype", "float16"), ("placement", "low VRAM")},
    ("LoadVQVAE", "cpu"): set(),
    ("LoadVQVAE", "cuda"): {("placement", "CPU")},
    ("LoadDecoder", "cpu"): {("storage", "8-bit")},
    ("LoadDecoder", "cuda"): {("storage", "8-bit"), ("placement", "low VRAM")},
}
NAMES = {"LoadJanus": "Load Janus", "LoadVQVAE": "Load VQ-VAE", "LoadDecoder": "Load DCDD Decoder"}


def loaded(nodes, double, node: str, **changes):
    """The model that a loader gives."""
    load = nodes["load"]
    given, kind = LOADED[node]
    given = {
        name: getattr(load, value) if value.isupper() and len(value) > 3 else value for name, value in given.items()
    }
    with double._modules.installed():
        value = getattr(load, node).execute(**{**given, **changes}).args[0]
    return value if kind == "vq_vae" else getattr(value, kind)


@pytest.mark.parametrize("node", LOADED)
def test_only_settings_that_the_loader_has_and_that_take_less_are_advised(node, device, nodes, double):
    host, info = nodes["host"], double.get("/object_info")
    remedy = host.ComfyHost(loaded(nodes, double, node)).remedy
    advised = {(NAMES[node], *setting) for setting in ADVISED[node, device]}
    assert settings_in(remedy, info) == advised, remedy
    assert remedy.startswith("close other programs that use the GPU, " if device == "cuda" else "close other programs,")
    assert remedy.endswith(", or use a smaller image")


def test_what_is_chosen_already_is_not_advised(device, nodes, double):
    host, info = nodes["host"], double.get("/object_info")
    for placement, left in (("low VRAM", {"CPU"} if device == "cuda" else set()), ("CPU", set())):
        decoder = loaded(nodes, double, "LoadDecoder", storage="8-bit", placement=placement)
        janus = loaded(nodes, double, "LoadJanus", dtype="bfloat16", placement=placement)
        remedy = host.ComfyHost(decoder, janus).remedy
        advised = {(NAMES[node], "placement", value) for node in ("LoadDecoder", "LoadJanus") for value in left}
        assert settings_in(remedy, info) == advised, remedy


def test_8_bits_are_not_advised_where_there_is_no_float8(nodes, double, monkeypatch):
    with double._modules.installed():
        management = sys.modules["comfy.model_management"]
    monkeypatch.setattr(management, "supports_cast", lambda device, dtype: False)
    assert "8-bit" not in nodes["host"].ComfyHost(loaded(nodes, double, "LoadDecoder")).remedy


FULL = {
    "DCDD_JanusLogitSampler": (
        DRAW,
        "tokens",
        "sample",
        "dtype 'bfloat16' in Load Janus, or choose a smaller model in",
    ),
    "DCDD_VQVAEEncode": (
        {"vq_vae": of("vq"), "image": of("scenes")},
        "tokens",
        "encode",
        "set longest_side to -1 or a",
    ),
    "DCDD_VQVAEDecode": (PROXIES, "decode", "decode_tokens", "close other programs, or use a smaller image"),
    "DCDD_FluxDecoder": (PAINT, "decode", "decode", "storage '8-bit' in Load DCDD Decoder, or use a smaller image"),
    "guided": (
        {**PAINT, "vq_vae": of("vq"), "strength": 0.1},
        "decode",
        "decode",
        "Decoder, or set strength to 0, or use",
    ),
}


@pytest.mark.parametrize("node", FULL)
def test_a_node_says_what_to_do_in_its_own_terms(node, nodes, double, monkeypatch):
    inputs, module, name, says = FULL[node]
    given = getattr(nodes[module], name)

    def full(*args, host, **options):
        host.check()
        raise RuntimeError(f"out of memory even for a single image: {host.remedy}")

    assert callable(given)
    monkeypatch.setattr(nodes[module], name, full)
    info = double.get("/object_info")
    graph = built(info, "DCDD_FluxDecoder" if node == "guided" else node, inputs, {})
    graph.add("end", "TEST_Hold", value=IT)
    run = double.run(graph.prompt)
    assert (run.status, run.node, run.error_type) == ("error", "it", "RuntimeError"), run.error
    assert says in run.error, run.error
    settings_in(run.error.partition(": ")[2], info)
