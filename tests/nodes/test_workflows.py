"""The shipped workflows and blueprints in the double of ComfyUI: their graphs fit the nodes, and run on what ships."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.comfy.workflows import problems
from tests.nodes.cases import RUNNABLE, SUBGRAPHS, WORKFLOWS, psnr, workflow_prompt

by_stem = {"ids": lambda path: path.stem}


@pytest.fixture(scope="module")
def info(double) -> dict:
    return double.get("/object_info")


@pytest.mark.parametrize("path", [*WORKFLOWS, *SUBGRAPHS], **by_stem)
def test_graph_fits_the_nodes(path: Path, info):
    assert problems(json.loads(path.read_text("utf-8")), info) == []


@pytest.mark.parametrize("path", RUNNABLE, **by_stem)
def test_workflow_runs(path: Path, double, info):
    prompt, names = workflow_prompt(path, info)
    run = double.run(prompt)
    assert run.status == "success", f"node {run.node}: {run.error_type} {run.error}"
    assert {*run.executed, *run.cached} == set(prompt) and names
    for name, node in prompt.items():
        if node["class_type"] == "SaveImage":
            shown = run.outputs[name]["images"]
            assert node["inputs"]["filename_prefix"].startswith("DCDD/")
            with Image.open(double.base / "output" / shown[0]["subfolder"] / shown[0]["filename"]) as image:
                assert np.asarray(image).std() > 10, "one colour is no image"


def test_reconstruction_is_the_scene(double, info):
    """Workflow 2's sheet: the scene beside what the two decoders make of its tokens."""
    (path,) = (path for path in WORKFLOWS if path.stem.startswith("2 "))
    prompt, _ = workflow_prompt(path, info)
    columns = {
        name: value
        for node in prompt.values()
        if node["class_type"] == "DCDD_CompareDecoders"
        for name, value in node["inputs"].items()
        if name.startswith("image_")
    }
    for name, (source, slot) in columns.items():
        prompt[f"keep {name}"] = {"class_type": "TEST_Save", "inputs": {"value": (source, slot), "name": name}}
    assert double.run(prompt).status == "success"
    scene, *others = (double.saved(name)["value"] for name in sorted(columns))
    assert len(others) >= 2
    for name, image in zip(sorted(columns)[1:], others):
        assert psnr(scene, image) > 15, name
