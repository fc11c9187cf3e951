"""What the nodes do in ComfyUI: progress, previews, caching, interrupts, and what painting a part leaves alone."""

from __future__ import annotations

import json
import os
import time
from itertools import pairwise

import numpy as np
import pytest
import torch

from dcdd_core.method.flow import resolution_shift
from dcdd_core.pipelines.decode import decode
from dcdd_core.types import Condition
from dcdd_pico.models import load_pico
from tests.comfy.graphs import everything, options
from tests.comfy.server import PACK
from tests.comfy.snapshot import SNAPSHOT
from tests.nodes.cases import assert_reported

pytestmark = pytest.mark.comfy


def test_every_node_runs_with_progress_and_previews(server, graph):
    server.free()
    prompt = everything(graph).prompt
    used = {node["class_type"] for node in prompt.values()} | {"DCDD_DownloadModel"}
    assert used >= set(json.loads(SNAPSHOT.read_text("utf-8"))), "the prompt is to use every node but the download"
    run = server.run(prompt)
    assert run.status == "success", f"node {run.node}: {run.error}"
    assert set(run.executed) == set(prompt)
    tokens = 144
    assert_reported(run.progress["sample"], [(k, tokens) for k in range(1, tokens + 1)])
    assert run.previews["sample"] >= 3 and run.previews["edit"] >= 3
    assert_reported(run.progress["sample_in_passes"], [(k, 4) for k in range(1, 5)])
    assert run.previews["sample_in_passes"] == 4, "one preview a pass"
    assert_reported(run.progress["paint"], [(k, 4) for k in range(1, 5)])
    assert run.progress["paint"][-4:] == [(k, 4) for k in range(1, 5)], "one report a step, for each has a preview"
    assert run.previews["paint"] == 4 and run.previews["repaint"] == 4, "one preview a step"
    for node, count in {"scene": 2, "encode": 2, "map": 2, "decode": 2, "statistics": 6}.items():
        assert run.progress[node][-1] == (count, count)
    assert run.progress["map"] == run.progress["decode"] == [(1, 2), (2, 2)], "one report an image"
    assert run.previews["encode"] == 2 and run.previews["decode"] == 2
    assert run.notices["save"][-1].startswith("saved fitted")
    assert_reported(run.progress["sharpen"], [(k, 4) for k in range(1, 5)])
    assert run.previews["sharpen"] == 4 and run.previews["sample_guided"] >= 1
    assert "of the tokens are read in the image" in run.notices["agree"][-1]


def test_cache_runs_only_what_changed(server, graph):
    prompt = everything(graph).prompt
    assert server.run(prompt).status == "success"
    again = server.run(prompt)
    assert again.status == "success" and again.executed == []
    prompt["paint"]["inputs"]["seed"] = 5
    painted = server.run(prompt)
    assert set(painted.executed) == {"paint", "repaint", "compare", "look_compare_0"}


@pytest.mark.parametrize("kind", ["calibration", "bundle", "janus", "vq_vae"])
def test_file_that_changed_is_loaded_again(kind, server, graph):
    models = server.base / "models"
    vq = graph.add("vq_vae", "DCDD_LoadVQVAE", model="another")
    graph.add("janus", "DCDD_LoadJanus", model="another")
    graph.add("bundle", "DCDD_LoadDecoder", bundle="bundle.safetensors", vae="pico/")
    graph.add("calibration", "DCDD_LoadCalibration", file="good.safetensors")
    for name in ("janus", "bundle", "calibration"):
        graph.add(f"end_{name}", "TEST_Hold", value=(name, 0))
    graph.add("end_vq_vae", "TEST_Hold", value=vq)
    file = {
        "calibration": models / "dcdd" / "calibrations" / "good.safetensors",
        "bundle": models / "dcdd" / "bundle.safetensors",
        "janus": models / "janus" / "another" / "config.json",
        "vq_vae": models / "janus" / "another" / "config.json",
    }[kind]
    assert server.run(graph.prompt).status == "success"
    assert server.run(graph.prompt).executed == []
    now = time.time_ns()
    os.utime(file, ns=(now, now))
    rerun = set(server.run(graph.prompt).executed)
    shared = {"janus", "vq_vae"} if kind in ("janus", "vq_vae") else {kind}
    assert rerun == shared | {f"end_{name}" for name in shared}


def long_sampler(graph):
    janus = graph.add("load", "DCDD_LoadJanus")
    graph.keep(graph.add("long", "DCDD_JanusLogitSampler", janus=janus, seed=time.time_ns() % 10**9), "long")


def long_decoder(graph):
    vq = graph.add("load", "DCDD_LoadVQVAE")
    decoder = graph.add("load_decoder", "DCDD_LoadDecoder")
    image = graph.add("image", "TEST_Picture", fill="noise", batch=2)
    proxies = graph.add("encode", "DCDD_VQVAEEncode", vq_vae=vq, image=image)
    condition = graph.add("map", "DCDD_LCDMEncoder", token_logits=proxies, vq_vae=vq, decoder=decoder)
    graph.keep(graph.add("long", "DCDD_FluxDecoder", decoder=decoder, condition=condition, steps=60), "long")


def long_encode(graph):
    vq = graph.add("load", "DCDD_LoadVQVAE")
    image = graph.add("image", "TEST_Picture", fill="noise", batch=64)
    graph.keep(graph.add("long", "DCDD_VQVAEEncode", vq_vae=vq, image=image), "long")


def long_decode(graph):
    vq = graph.add("load", "DCDD_LoadVQVAE")
    image = graph.add("image", "TEST_Picture", fill="noise", batch=64)
    proxies = graph.add("encode", "DCDD_VQVAEEncode", vq_vae=vq, image=image)
    graph.keep(graph.add("long", "DCDD_VQVAEDecode", vq_vae=vq, token_logits=proxies), "long")


def short(graph):
    """Of the same nodes, what takes no time."""
    for inputs in (node["inputs"] for node in graph.prompt.values()):
        inputs |= {"steps": 2} if "steps" in inputs else {}
        inputs |= {"batch": 1} if "batch" in inputs else {}
    return graph.prompt


def long_fit(graph):
    janus = graph.add("load", "DCDD_LoadJanus")
    image = graph.add("image", "TEST_Picture", fill="noise", batch=32)
    of = {"vq_vae": ("load", 1)}
    proxies = graph.add("encode", "DCDD_VQVAEEncode", image=image, **of)
    sampled = graph.add("sample", "DCDD_JanusLogitSampler", janus=janus, guidance=1.0)
    fitted = graph.add("long", "DCDD_LogitCalibrator", token_logits=proxies, reference=sampled, anchored=True, **of)
    graph.keep(fitted, "long")


@pytest.mark.parametrize("build", [long_sampler, long_decoder, long_encode, long_decode, long_fit])
def test_interrupt_stops_within_a_step(build, server, graph):
    build(graph)
    told = []

    def on_progress(node, value, total):
        if node == "long" and value >= 5 and not told:
            server.interrupt()
            told.append(value)
            told.extend(data["value"] for kind, data in server.waiting() if kind == "progress")

    run = server.run(graph.prompt, on_progress=on_progress)
    assert (run.status, run.node) == ("interrupted", "long"), (run.status, run.error)
    last, total = run.progress["long"][-1]
    assert {of for _, of in run.progress["long"]} == {total}, "the bar is of one thing alone"
    # One report may have been on its way.
    late = [value for value, _ in run.progress["long"] if value > max(told)]
    assert len(late) <= 1, f"{late} came after the interrupt"
    assert last < total - 10, "it was nearly done: make it longer"
    after = server.run(short(graph))
    assert after.status == "success", after.error


def test_notice_of_unknown_words_is_shown_on_the_node(server, graph):
    janus = graph.add("load", "DCDD_LoadJanus")
    sampled = graph.add("sample", "DCDD_JanusLogitSampler", janus=janus, prompt="a red zebra", guidance=1.0)
    graph.keep(sampled, "zebra")
    run = server.run(graph.prompt)
    assert run.status == "success"
    assert any("does not know zebra" in text for text in run.notices["sample"]), dict(run.notices)


def test_every_schedule_paints_what_the_library_paints_with_its_shift(server, graph):
    vq = graph.add("load", "DCDD_LoadVQVAE")
    decoder = graph.add("load_decoder", "DCDD_LoadDecoder")
    image = graph.add("image", "TEST_Picture", fill="noise")
    proxies = graph.add("encode", "DCDD_VQVAEEncode", vq_vae=vq, image=image)
    condition = graph.add("map", "DCDD_LCDMEncoder", token_logits=proxies, vq_vae=vq, decoder=decoder)
    graph.keep(condition, "condition")
    schedules = ("as measured best for the decoder", "FLUX: by resolution", "uniform")
    for k, schedule in enumerate(schedules):
        of = {"decoder": decoder, "condition": condition, "seed": 4, "steps": 3, "schedule": schedule}
        graph.add(f"paint_{k}", "DCDD_FluxDecoder", **of)
        graph.keep((f"paint_{k}", 0), f"painted_{k}")
    run = server.run(graph.prompt)
    assert run.status == "success", run.error

    pico = load_pico(weights=server.base / "custom_nodes" / PACK / "dcdd_pico" / "weights", with_sampler=False)
    saved = {name: torch.from_numpy(value) for name, value in server.saved("condition").items()}
    known = Condition(**saved, grid=(12, 12), codebook=pico.decoder.card.codebook)
    for k, shift in enumerate((None, resolution_shift(144), 0.0)):
        pixels = decode(pico.decoder, pico.codec, known, seeds=[4], steps=3, shift=shift).pixels
        expected = ((pixels + 1) / 2).movedim(1, -1).numpy()
        found = server.saved(f"painted_{k}")["value"]
        assert np.abs(found - expected).mean() < 0.02 * expected.std(), schedules[k]


def test_schedule_that_takes_long_to_read_is_told(server, graph):
    long_decoder(graph)
    server.free()
    usual = server.post("/test/patience", {"seconds": -1})[1]
    try:
        run = server.run(short(graph))
    finally:
        server.post("/test/patience", {"seconds": usual})
    assert run.status == "success", run.error
    told = run.notices["long"]
    assert "loading modulation weights for a new schedule: 1 of " in told[0]
    assert told[-1] == "modulation weights loaded"
    layers = int(told[0].rpartition(" ")[2])
    assert layers > 1
    assert_reported(run.progress["long"], [(1, 2), (2, 2)])
    assert run.progress["long"][0] == (0, 2), "the bar is there while it reads"


def test_edit_keeps_the_tokens_outside_of_the_mask(server, graph):
    janus = graph.add("load", "DCDD_LoadJanus")
    first = graph.add("first", "DCDD_JanusLogitSampler", janus=janus, guidance=2.0, seed=1, batch_size=2)
    mask = graph.add("mask", "TEST_Mask", top=32, left=16, bottom=72, right=56, value=1.0)
    edit = {"token_logits": first, "mask": mask, "guidance": 2.0}
    graph.keep(first, "first")
    graph.keep(graph.add("edit", "DCDD_JanusLogitSampler", janus=janus, seed=77, **edit), "edit")
    run = server.run(graph.prompt)
    assert run.status == "success", run.error
    before, after = server.saved("first"), server.saved("edit")
    inside = np.zeros((12, 12), bool)
    inside[4:9, 2:7] = True
    inside = inside.ravel()
    for name in ("tokens", "logits"):
        np.testing.assert_array_equal(after[name][:, ~inside], before[name][:, ~inside])
    changed = (after["tokens"] != before["tokens"])[:, inside]
    assert changed.mean() > 0.25


def test_mask_of_another_shape_is_cropped_as_the_picture_is(server, graph):
    janus = graph.add("load", "DCDD_LoadJanus")
    draw = {"janus": janus, "guidance": 1.0}
    first = graph.add("first", "DCDD_JanusLogitSampler", seed=1, **draw)
    # Of its 128 columns the middle 96 are the picture, of 12 tokens of 8.
    mask = graph.add("mask", "TEST_Mask", width=128, left=100, right=128, bottom=96, value=1.0)
    graph.keep(first, "first")
    graph.keep(graph.add("edit", "DCDD_JanusLogitSampler", seed=77, token_logits=first, mask=mask, **draw), "edit")
    run = server.run(graph.prompt)
    assert run.status == "success", run.error
    changed = server.saved("edit")["tokens"] != server.saved("first")["tokens"]
    changed = changed.reshape(12, 12).any(axis=0)
    assert not changed[:10].any() and changed[10:].all()


@pytest.mark.parametrize("vae", ["own", "core"])
def test_painting_a_part_keeps_the_rest_to_the_last_bit(vae, server, graph):
    vq = graph.add("load", "DCDD_LoadVQVAE")
    decoder = graph.add("load_decoder", "DCDD_LoadDecoder", bundle="flux.safetensors", vae="flux/")
    image = graph.add("image", "TEST_Picture", fill="noise", batch=2, seed=3)
    proxies = graph.add("encode", "DCDD_VQVAEEncode", vq_vae=vq, image=image)
    condition = graph.add("map", "DCDD_LCDMEncoder", token_logits=proxies, vq_vae=vq, decoder=decoder)
    mask = graph.add("mask", "TEST_Mask", top=11, left=30, bottom=50, right=77, value=0.75)
    part = {"image": image, "mask": mask}
    if vae == "core":
        part["vae"] = graph.add("vae", "TEST_RandomVAE", factor=8)
    painted = graph.add("paint", "DCDD_FluxDecoder", decoder=decoder, condition=condition, steps=2, **part)
    graph.keep(image, "given")
    graph.keep(painted, "painted")
    graph.keep(("paint", 1), "latent")
    run = server.run(graph.prompt)
    assert run.status == "success", run.error
    assert run.previews["paint"] == 2
    given, painted = server.saved("given")["value"], server.saved("painted")["value"]
    inside = np.zeros((96, 96), bool)
    inside[11:50, 30:77] = True
    assert painted.dtype == np.float32 and painted.shape == given.shape
    np.testing.assert_array_equal(painted[:, ~inside], given[:, ~inside])
    assert (painted != given)[:, inside].mean() > 0.9
    latent = server.saved("latent")
    assert latent["samples"].shape == (2, 16, 12, 12) and np.isfinite(latent["samples"]).all()
    assert latent["noise_mask"].max() == 0.75


@pytest.mark.parametrize(("channels", "height", "width"), [(4, 96, 96), (1, 96, 96), (3, 1, 1), (3, 50, 131)])
def test_odd_pictures_pass(channels, height, width, server, graph):
    vq = graph.add("load", "DCDD_LoadVQVAE")
    decoder = graph.add("load_decoder", "DCDD_LoadDecoder")
    image = graph.add("image", "TEST_Picture", fill="noise", channels=channels, height=height, width=width)
    proxies = graph.add("encode", "DCDD_VQVAEEncode", vq_vae=vq, image=image, longest_side=1024)
    condition = graph.add("map", "DCDD_LCDMEncoder", token_logits=proxies, vq_vae=vq, decoder=decoder)
    doubt = graph.add("doubt", "DCDD_UncertaintyMask", condition=condition, image=image, blur=0.5)
    paint = {"decoder": decoder, "condition": condition, "steps": 1}
    painted = graph.add("paint", "DCDD_FluxDecoder", **paint)
    mask = graph.add("mask", "TEST_Mask", top=0, bottom=4, left=0, right=4, height=8, width=8, value=1.0)
    local = graph.add("local", "DCDD_FluxDecoder", image=("encode", 1), mask=mask, **paint)
    graph.keep(graph.add("compare", "DCDD_CompareDecoders", image_a=image, image_b=painted, image_c=local), "compare")
    graph.keep(painted, "painted")
    graph.keep(doubt, "doubt")
    run = server.run(graph.prompt)
    assert run.status == "success", f"node {run.node}: {run.error}"
    sides = [max(8, round(side / 8) * 8) for side in (height, width)]
    assert server.saved("painted")["value"].shape == (1, *sides, 3)
    assert server.saved("doubt")["value"].shape == (1, height, width)


@pytest.mark.parametrize("prompt", ["red " * 50, "a\n\tred\0 heart ❤ 心", "<|Assistant|>:<begin_of_image> red"])
def test_odd_prompts_pass(prompt, server, graph):
    janus = graph.add("load", "DCDD_LoadJanus")
    draw = {"prompt": prompt, "guidance": 2.0, "seed": 2**63 - 1, "batch_size": 2, "temperature": 0.0}
    graph.keep(graph.add("sample", "DCDD_JanusLogitSampler", janus=janus, top_k=3, top_p=0.5, **draw), "odd")
    run = server.run(graph.prompt)
    assert run.status == "success", f"node {run.node}: {run.error}"
    assert server.saved("odd")["tokens"].shape == (2, 144)


def test_a_prompt_beyond_the_model_s_positions_is_refused(server, graph):
    janus = graph.add("load", "DCDD_LoadJanus")
    graph.keep(graph.add("sample", "DCDD_JanusLogitSampler", janus=janus, prompt="red " * 300), "odd")
    run = server.run(graph.prompt)
    assert run.status == "error" and "pico has positions for 64 before an image: shorten it" in run.error


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_janus_in_half_precision(dtype, server, graph):
    janus = graph.add("load", "DCDD_LoadJanus", dtype=dtype)
    graph.keep(graph.add("sample", "DCDD_JanusLogitSampler", janus=janus, guidance=2.0), "half")
    run = server.run(graph.prompt)
    assert run.status == "success", f"node {run.node}: {run.error}"
    assert server.saved("half")["logits"].dtype == np.float32


def test_masks_of_doubt(server, graph, info):
    vq = graph.add("load", "DCDD_LoadVQVAE")
    image = graph.add("image", "TEST_Picture", fill="noise", batch=2)
    proxies = graph.add("encode", "DCDD_VQVAEEncode", vq_vae=vq, image=image)
    calibration = graph.add("file", "DCDD_LoadCalibration", file="good.safetensors")
    of = {"token_logits": proxies, "vq_vae": vq, "calibration": calibration}
    calibrated = graph.add("calibrate", "DCDD_LogitCalibrator", **of)
    condition = graph.add("map", "DCDD_LCDMEncoder", token_logits=calibrated, vq_vae=vq)
    features = options(info["DCDD_UncertaintyMask"]["input"]["required"]["feature"])
    sizes = (-16, -1, 0, 1, 16)
    for k, feature in enumerate(features):
        for edge in ("hard", "soft"):
            for grow in sizes:
                shape = {"feature": feature, "edge": edge, "grow": grow, "blur": 0.4 * k, "token_size": 8}
                mask = graph.add(f"{k}{edge}{grow}", "DCDD_UncertaintyMask", condition=condition, **shape)
                graph.keep(mask, f"{k}{edge}{grow}")
    run = server.run(graph.prompt)
    assert run.status == "success", f"node {run.node}: {run.error}"
    for k in range(len(features)):
        for edge in ("hard", "soft"):
            grown = [server.saved(f"{k}{edge}{grow}")["value"] for grow in sizes]
            for mask in grown:
                assert mask.shape == (2, 96, 96) and mask.min() >= 0 and mask.max() <= 1
            assert all((less <= more + 1e-6).all() for less, more in pairwise(grown))


def test_saved_calibration_is_numbered_and_offered(server, graph):
    found = graph.add("read", "DCDD_LoadCalibration", file="good.safetensors")
    graph.add("save", "DCDD_SaveCalibration", calibration=found, name="twice")
    for _ in range(2):
        os.utime(server.base / "models" / "dcdd" / "calibrations" / "good.safetensors")  # or the second is cached
        assert server.run(graph.prompt).executed == ["read", "save"]
    files = {f"twice{number}.safetensors" for number in ("", "_2")}
    assert {path.name for path in server.base.glob("models/dcdd/calibrations/twice*")} == files
    now = server.get("/object_info/DCDD_LoadCalibration")["DCDD_LoadCalibration"]
    assert files <= set(options(now["input"]["required"]["file"]))


@pytest.mark.parametrize("channels", [1, 4])
def test_part_of_a_picture_with_other_channels(channels, server, graph):
    vq = graph.add("load", "DCDD_LoadVQVAE")
    decoder = graph.add("load_decoder", "DCDD_LoadDecoder")
    image = graph.add("image", "TEST_Picture", fill="noise", channels=channels)
    proxies = graph.add("encode", "DCDD_VQVAEEncode", vq_vae=vq, image=image)
    condition = graph.add("map", "DCDD_LCDMEncoder", token_logits=proxies, vq_vae=vq, decoder=decoder)
    mask = graph.add("mask", "TEST_Mask", bottom=40, right=40, value=1.0)
    part = {"image": image, "mask": mask, "steps": 1}
    graph.keep(graph.add("paint", "DCDD_FluxDecoder", decoder=decoder, condition=condition, **part), "painted")
    graph.keep(image, "given")
    run = server.run(graph.prompt)
    assert run.status == "success", f"node {run.node}: {run.error}"
    given, painted = server.saved("given")["value"], server.saved("painted")["value"]
    assert painted.shape == (1, 96, 96, 3)
    np.testing.assert_array_equal(painted[:, 40:], np.broadcast_to(given[:, 40:, :, :3], (1, 56, 96, 3)))


@pytest.mark.parametrize(
    ("storage", "placement"),
    [("bfloat16", "auto"), ("float16", "CPU"), ("8-bit", "auto"), ("8-bit", "low VRAM"), ("auto", "low VRAM")],
)
def test_storage_and_placement(storage, placement, server, graph):
    vq = graph.add("load", "DCDD_LoadVQVAE", placement=placement)
    image = graph.add("image", "TEST_Picture", fill="noise")
    proxies = graph.add("encode", "DCDD_VQVAEEncode", vq_vae=vq, image=image)
    for name, kept, place in (("exact", "float32", "auto"), ("stored", storage, placement)):
        decoder = graph.add(f"load_{name}", "DCDD_LoadDecoder", storage=kept, placement=place)
        condition = graph.add(f"map_{name}", "DCDD_LCDMEncoder", token_logits=proxies, vq_vae=vq, decoder=decoder)
        painted = graph.add(f"paint_{name}", "DCDD_FluxDecoder", decoder=decoder, condition=condition)
        graph.keep(painted, name)
    run = server.run(graph.prompt)
    assert run.status == "success", f"node {run.node}: {run.error}"
    exact, stored = server.saved("exact")["value"], server.saved("stored")["value"]
    assert np.abs(stored - exact).mean() < (0.25 if storage == "8-bit" else 0.05) * exact.std()
