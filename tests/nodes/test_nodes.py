"""Every node's work, in the double of ComfyUI: results, progress, refusals, interrupts."""

from __future__ import annotations

import ast
import os
import re
import sys
import time
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

from tests.comfy.server import PACK, Run
from tests.nodes.cases import (
    CASES,
    INTERRUPTIONS,
    REFUSALS,
    SCHEMAS,
    Case,
    Interruption,
    Refusal,
    built,
    check,
    of,
    run_case,
    run_interruption,
    run_refusal,
)

by_name = {"ids": lambda case: case.name}


@pytest.fixture(scope="session")
def info(double) -> dict:
    return double.get("/object_info")


@pytest.mark.parametrize("case", CASES, **by_name)
def test_node(case: Case, double, info):
    found = run_case(case, double, info)
    check(case, found)
    if case.reports is not None:
        assert [told for told in found.run.progress["it"] if told[0] > 0] == case.reports


def test_every_node_has_a_case():
    assert {case.node for case in CASES} | {"DCDD_LoadJanus", "DCDD_LoadVQVAE", "DCDD_LoadCalibration"} == set(SCHEMAS)


@pytest.mark.parametrize("file", ["models/janus/masked/config.json", f"custom_nodes/{PACK}/dcdd_pico/weights/janus"])
def test_masked_sampler_is_loaded_again_when_its_files_change(file, double, info):
    """Also those of its image tokenizer, which config.json names elsewhere."""
    prompt = built(info, "TEST_Hold", {"value": of("masked")}, {}).prompt
    assert "masked" in double.run(prompt).executed + double.run(prompt).cached
    assert "masked" in double.run(prompt).cached
    path = double.base / file
    path = path / "config.json" if path.is_dir() else path
    now = time.time_ns()
    os.utime(path, ns=(now, now))
    assert "masked" in double.run(prompt).executed


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def refused(double, info) -> Callable[[Refusal], tuple[Run, set[tuple[str, int]]]]:
    """Runs each refusal once: how it ended, and the lines that its exception came through."""

    @cache
    def run(number: int) -> tuple[Run, set[tuple[str, int]]]:
        double.raised_at = set()
        return run_refusal(REFUSALS[number], double, info), double.raised_at

    return lambda case: run(REFUSALS.index(case))


@pytest.mark.parametrize("case", REFUSALS, **by_name)
def test_refusal(case: Refusal, refused):
    run, _ = refused(case)
    assert (run.status, run.node, run.error_type) == ("error", "it", "ValueError"), (run.status, run.error)
    for pattern in case.says:
        assert re.search(pattern, run.error, re.IGNORECASE), f"{pattern!r} is not in: {run.error}"


@pytest.fixture(scope="session")
def without_float8(double, info) -> tuple[Run, set[tuple[str, int]]]:
    """How loading a decoder in 8 bits ends on a device that has no float8, as a Mac's, and where."""
    with double._modules.installed():
        management = sys.modules["comfy.model_management"]
    double.raised_at = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(management, "supports_cast", lambda device, dtype: dtype != torch.float8_e4m3fn)
        graph = built(info, "DCDD_LoadDecoder", {"storage": "8-bit"}, {})
        graph.add("end", "TEST_Hold", value=of("it"))
        return double.run(graph.prompt), double.raised_at


def test_8_bit_storage_is_refused_without_float8(without_float8):
    run, _ = without_float8
    assert (run.status, run.node, run.error_type) == ("error", "it", "ValueError"), run.error
    assert "storage '8-bit' needs float8, which cpu does not have: choose 'float16', or" in run.error


def test_a_whole_model_that_is_there_is_downloaded_without_a_network(double, info, tmp_path, monkeypatch):
    """Janus-Pro's weights may be one file or many, which only the hub could list."""
    folder = tmp_path / "janus" / "Janus-Pro-1B"
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (folder / name).write_bytes(b"{}")
    model_folders = sys.modules[f"{double.pack.__name__}.nodes.model_folders"]
    monkeypatch.setattr(model_folders, "model_folder", lambda key: tmp_path / key)
    (model,) = (one for one in info["DCDD_DownloadModel"]["input"]["required"]["model"][1]["options"] if "1B" in one)
    prompt = built(info, "DCDD_DownloadModel", {"model": model}, {}).prompt
    run = double.run(prompt)
    assert run.status == "success", run.error
    assert any(str(folder) in text for text in run.notices["it"])
    (folder / "tokenizer.json").unlink()
    run = double.run(prompt)
    assert (run.status, run.error_type) == ("error", "ValueError")
    assert re.search(r"HF_HUB_OFFLINE .*is set: unset it .*Missing in .*Janus-Pro-1B: tokenizer\.json$", run.error)


def test_every_refusal_of_the_nodes_has_a_case(refused, without_float8, double):
    reached = set().union(without_float8[1], *(refused(case)[1] for case in REFUSALS))
    nodes = double.base / "custom_nodes" / PACK / "nodes"
    missed = [
        f"{file.name}:{statement.lineno}"
        for file in sorted(nodes.glob("*.py"))
        for statement in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(statement, ast.Raise)
        and not any((str(file), line) in reached for line in range(statement.lineno, statement.end_lineno + 1))
    ]
    assert not missed, f"write a Refusal for what is raised at {missed}"


# --- interrupts and previews ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", INTERRUPTIONS, ids=lambda case: case.node)
def test_interrupt_stops_the_node(case: Interruption, double, info):
    run = run_interruption(case, double, info)
    assert (run.status, run.node) == ("interrupted", "it"), (run.status, run.error)
    assert len([told for told in run.progress["it"] if told[0] > 0]) == case.report


def test_previews_show_what_is_made(double, info):
    """The last one is the image, the right way round; a sampler's is dark where no token is yet."""
    scenes = built(info, "DCDD_VQVAEDecode", {"token_logits": of("proxies"), "vq_vae": of("vq")}, {})
    scenes.keep(("it", 0), "decoded")
    assert double.run(scenes.prompt).status == "success"
    for shown, image in zip(double.shown["it"], double.saved("decoded")["value"], strict=True):
        np.testing.assert_allclose(np.asarray(shown) / 255, image, atol=0.01)

    drawn = built(info, "DCDD_JanusLogitSampler", {"janus": of("janus"), "guidance": 1.0}, {})
    drawn.add("end", "DCDD_VQVAEDecode", token_logits=("it", 0), vq_vae=of("janus", 1))
    drawn.keep(("end", 0), "drawn")
    assert double.run(drawn.prompt).status == "success"
    first, *_, last = (np.asarray(image) / 255 for image in double.shown["it"])
    np.testing.assert_allclose(last, double.saved("drawn")["value"][0], atol=0.01)
    assert (first[16:] < 0.15).all() and first[:8].std() > 0.01

    painted = built(info, "DCDD_FluxDecoder", {"decoder": of("decoder"), "condition": of("condition"), "steps": 3}, {})
    painted.keep(("it", 0), "painted")
    assert double.run(painted.prompt).status == "success"
    both = np.concatenate(double.saved("painted")["value"], axis=1)
    np.testing.assert_allclose(np.asarray(double.shown["it"][-1]) / 255, both, atol=0.02)
