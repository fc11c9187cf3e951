"""Sampling in passes in ComfyUI: caching, cancelling, memory, and what the decoders make of it."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from tests.comfy.graphs import Graph, Link, output
from tests.comfy.server import PACK

pytestmark = pytest.mark.comfy

NODE = "DCDD_ProgressiveTokenSampler"


@pytest.fixture
def masked(graph: Graph) -> Link:
    return graph.add("load", "DCDD_LoadJanus", model="masked")


def test_tokens_go_on_to_both_decoders(server, graph, masked):
    """An image, calibrated, drawn again under a mask, decoded and painted."""
    vq, decoder = output(masked, 1), graph.add("decoder", "DCDD_LoadDecoder")
    scene = graph.add("scene", "DCDD_PicoScene", seed=4)
    proxies = graph.add("encode", "DCDD_VQVAEEncode", vq_vae=vq, image=scene)
    shared = {"vq_vae": vq, "decoder": decoder}
    calibrated = graph.add("calibrate", "DCDD_LogitCalibrator", token_logits=proxies, **shared)
    mask = graph.add("mask", "TEST_Mask", left=48, bottom=96, right=96, value=1.0)
    drawn = graph.add("draw", NODE, janus=masked, passes=5, token_logits=calibrated, mask=mask)
    condition = graph.add("map", "DCDD_LCDMEncoder", token_logits=drawn, **shared)
    painted = graph.add("paint", "DCDD_FluxDecoder", decoder=decoder, condition=condition, steps=2)
    plain = graph.add("decode", "DCDD_VQVAEDecode", token_logits=drawn, vq_vae=vq)
    kept = {"painted": painted, "plain": plain, "stages": output(drawn, 1), "drawn": drawn, "given": calibrated}
    for name, link in kept.items():
        graph.keep(link, name)
    run = server.run(graph.prompt)
    assert run.status == "success", f"node {run.node}: {run.error}"
    assert [told for told in run.progress["draw"] if told[0]] == [(k, 5) for k in range(1, 6)]
    assert run.previews["draw"] == 5
    differ = (server.saved("drawn")["tokens"] != server.saved("given")["tokens"]).reshape(12, 12)
    assert not differ[:, :6].any() and differ[:, 6:].mean() > 0.5, "outside the mask it is as it was"
    for name in ("painted", "plain"):
        image = server.saved(name)["value"]
        assert image.shape == (1, 96, 96, 3) and image.std() > 0.05, name
    sheets = server.saved("stages")["value"]
    assert sheets.shape[0] == 1 and sheets.shape[2] == 12 + 5 * (160 + 12)


def test_only_what_changed_runs_again(server, graph, masked):
    graph.keep(graph.add("draw", NODE, janus=masked, seed=1), "drawn")
    assert server.run(graph.prompt).status == "success"
    assert server.run(graph.prompt).executed == []
    graph.prompt["draw"]["inputs"]["passes"] = 4
    assert server.run(graph.prompt).executed == ["draw", "save_drawn"]


@pytest.mark.parametrize("place", ["the sampler", "its image tokenizer"])
def test_folder_that_changed_is_loaded_again(place, server, graph, masked):
    """Also the tokenizer's, which config.json names elsewhere."""
    vq = graph.add("vq", "DCDD_LoadVQVAE", model="masked")
    for name, link in {"janus": masked, "vq": vq}.items():
        graph.add(f"end_{name}", "TEST_Hold", value=link)
    own, elsewhere = server.base / "models" / "janus" / "masked", server.base / "custom_nodes" / PACK / "dcdd_pico"
    folder = own if place == "the sampler" else elsewhere / "weights" / "janus"
    assert server.run(graph.prompt).status == "success"
    assert server.run(graph.prompt).executed == []
    now = time.time_ns()
    os.utime(folder / "config.json", ns=(now, now))
    assert set(server.run(graph.prompt).executed) == {"load", "vq", "end_janus", "end_vq"}


def test_cancelled_within_one_pass(server, graph, masked):
    graph.keep(graph.add("long", NODE, janus=masked, passes=100, batch_size=8, seed=time.time_ns() % 10**9), "long")
    told = []

    def on_progress(node, value, total):
        if node == "long" and value >= 3 and not told:
            server.interrupt()
            told.append(value)
            told.extend(data["value"] for kind, data in server.waiting() if kind == "progress")

    run = server.run(graph.prompt, on_progress=on_progress)
    assert (run.status, run.node) == ("interrupted", "long"), (run.status, run.error)
    late = [value for value, _ in run.progress["long"] if value > max(told)]
    assert len(late) <= 1 and run.progress["long"][-1][0] < 90, f"{late} came after the interrupt"
    graph.prompt["long"]["inputs"] |= {"passes": 2, "batch_size": 1}
    assert server.run(graph.prompt).status == "success"


def test_batch_that_does_not_fit_is_split(server, graph, masked):
    draw = {"janus": masked, "passes": 3, "guidance": 1.0}
    graph.keep(graph.add("draw", NODE, seed=60, batch_size=3, **draw), "batch")
    graph.keep(("draw", 1), "batch sheets")
    server.post("/test/out_of_memory", {"above": 1})
    try:
        run = server.run(graph.prompt)
        raised = server.post("/test/out_of_memory", {"above": 1})[1]["raised"]
    finally:
        server.post("/test/out_of_memory", {"above": None})
    assert run.status == "success", run.error
    assert raised == 2, "three images, then two, did not fit"
    assert run.notices["draw"][-1] == "144 tokens for each of 3 images in 9 passes"
    for k in range(3):
        graph.keep(graph.add(f"draw_{k}", NODE, seed=60 + k, **draw), f"one_{k}")
        graph.keep((f"draw_{k}", 1), f"sheet_{k}")
    assert server.run(graph.prompt).status == "success"
    for k in range(3):
        for name in ("tokens", "logits"):
            np.testing.assert_array_equal(server.saved("batch")[name][k : k + 1], server.saved(f"one_{k}")[name])
        np.testing.assert_array_equal(
            server.saved("batch sheets")["value"][k : k + 1], server.saved(f"sheet_{k}")["value"]
        )


def test_network_is_loaded_with_its_tokenizer_and_room_to_work_in(server, graph, masked):
    server.free()
    server.post("/test/loads", {})
    graph.keep(graph.add("draw", NODE, janus=masked, passes=2), "drawn")
    assert server.run(graph.prompt).status == "success"
    loads = server.post("/test/loads", {})[1]
    assert {tuple(sorted(names)) for names, _ in loads} == {("JanusVQVAE", "MaskedTransformer"), ("JanusVQVAE",)}
    logits = 144 * 1024 * 4
    assert all(memory >= 3 * logits for names, memory in loads if len(names) == 2), loads
