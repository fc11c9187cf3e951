"""Where a node computes that has no model of its own to place."""

from __future__ import annotations

import sys

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
