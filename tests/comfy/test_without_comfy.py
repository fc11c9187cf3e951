"""What can be said without a ComfyUI: that the tests are skipped with a reason, and that the checks can fail."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest

from tests.comfy.server import locate
from tests.comfy.workflows import opened, problems, to_prompt
from tests.shipped import ROOT

INFO = {
    "Make": {
        "input": {
            "required": {
                "seed": ["INT", {"min": 0, "max": 9, "control_after_generate": True}],
                "kind": ["COMBO", {"options": ["a", "b"]}],
                "file": [["one.safetensors"], {}],
            },
        },
        "output": ["IMAGE", "MASK"],
        "output_name": ["image", "mask"],
    },
    "Show": {
        "input": {"required": {"images": ["IMAGE", {}], "name": ["STRING", {}]}, "optional": {"mask": ["MASK", {}]}},
        "output": [],
        "output_name": [],
    },
}
WORKFLOW = {
    "nodes": [
        {
            "id": 1,
            "type": "Make",
            "inputs": [],
            "outputs": [
                {"name": "image", "type": "IMAGE", "links": [1]},
                {"name": "mask", "type": "MASK", "links": []},
            ],
            "widgets_values": [3, "fixed", "a", "another.safetensors"],
        },
        {
            "id": 2,
            "type": "Show",
            "inputs": [{"name": "images", "type": "IMAGE", "link": 1}, {"name": "mask", "type": "MASK", "link": None}],
            "outputs": [],
            "widgets_values": ["x"],
        },
        {"id": 3, "type": "MarkdownNote", "widgets_values": ["text"]},
    ],
    "links": [[1, 1, 0, 2, 0, "IMAGE"]],
}
BLUEPRINT = {
    "nodes": [
        {
            "id": 1,
            "type": "box",
            "inputs": [{"name": "drawn", "type": "MASK", "link": None}],
            "outputs": [{"name": "picture", "type": "IMAGE", "links": []}],
            "properties": {"proxyWidgets": [["1", "seed"], ["1", "control_after_generate"], ["2", "name"]]},
        }
    ],
    "links": [],
    "definitions": {
        "subgraphs": [
            {
                "id": "box",
                "name": "Box",
                "inputs": [{"name": "drawn", "type": "MASK"}],
                "outputs": [{"name": "picture", "type": "IMAGE"}],
                "nodes": [
                    WORKFLOW["nodes"][0]
                    | {
                        "outputs": [
                            {**WORKFLOW["nodes"][0]["outputs"][0], "links": [1, 3]},
                            WORKFLOW["nodes"][0]["outputs"][1],
                        ]
                    },
                    WORKFLOW["nodes"][1]
                    | {"inputs": [WORKFLOW["nodes"][1]["inputs"][0], {"name": "mask", "type": "MASK", "link": 2}]},
                ],
                "links": [
                    dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link))
                    for link in [(1, 1, 0, 2, 0, "IMAGE"), (2, -10, 0, 2, 1, "MASK"), (3, 1, 0, -20, 0, "IMAGE")]
                ],
            }
        ]
    },
}


def test_missing_comfyui_is_a_skip_that_says_how_to_get_it():
    tests = ["tests/comfy/test_pack.py", "-m", "comfy", "-rs", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *tests],
        cwd=ROOT,
        env=os.environ | {"COMFYUI_DIR": "/nonexistent", "COLUMNS": "1000"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" in done.stdout and "passed" not in done.stdout
    assert "no ComfyUI in /nonexistent" in done.stdout and "set COMFYUI_DIR to the clone" in done.stdout


def test_python_is_looked_for_in_comfyui(tmp_path):
    (tmp_path / "main.py").touch()
    with pytest.raises(LookupError, match="set COMFYUI_PYTHON"):
        locate({"COMFYUI_DIR": str(tmp_path)})
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert locate({"COMFYUI_DIR": str(tmp_path)}) == (tmp_path, python)
    assert locate({"COMFYUI_DIR": str(tmp_path), "COMFYUI_PYTHON": sys.executable})[1].samefile(sys.executable)
    with pytest.raises(LookupError, match="no Python at"):
        locate({"COMFYUI_DIR": str(tmp_path), "COMFYUI_PYTHON": str(tmp_path / "absent")})


def test_sound_workflow_becomes_a_prompt():
    assert problems(WORKFLOW, INFO) == []
    assert to_prompt(WORKFLOW, INFO) == {
        "1": {"class_type": "Make", "inputs": {"seed": 3, "kind": "a", "file": "another.safetensors"}},
        "2": {"class_type": "Show", "inputs": {"images": ("1", 0), "name": "x"}},
    }


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("nodes", 0, "type"), "Bake", "node 1 (Bake): there is no such node"),
        (("nodes", 1, "id"), 1, "two nodes have the same id"),
        (("nodes", 0, "widgets_values"), [3, "a", "x.safetensors"], "3 values for 4 widgets"),
        (("nodes", 0, "widgets_values", 0), 10, "seed is 10, outside of 0..9"),
        (("nodes", 0, "widgets_values", 0), "3", "seed is '3', no INT"),
        (("nodes", 0, "widgets_values", 1), "often", "none of ('fixed'"),
        (("nodes", 0, "widgets_values", 2), "c", "kind is 'c', none of ['a', 'b']"),
        (("nodes", 1, "inputs", 0, "link"), None, "nothing is connected to images"),
        (("nodes", 1, "inputs", 0, "name"), "pictures", "it has no input pictures"),
        (("nodes", 1, "inputs", 1, "type"), "IMAGE", "input mask is MASK, not IMAGE"),
        (("nodes", 1, "inputs", 1, "link"), 7, "node 2 names links that are not there: [7]"),
        (("nodes", 0, "outputs", 0, "links"), [], "link 1 is not among those of output 0"),
        (("nodes", 0, "outputs", 0, "type"), "MASK", "its outputs are"),
        (("links", 0), [1, 1, 1, 2, 0, "MASK"], "link 1 of type MASK goes to IMAGE"),
        (("links", 0), [1, 9, 0, 2, 0, "IMAGE"], "link 1 comes from nowhere"),
        (("links", 0), [1, 1, 0, 9, 0, "IMAGE"], "link 1 goes nowhere"),
    ],
)
def test_broken_workflow_is_told(path, value, problem):
    broken = copy.deepcopy(WORKFLOW)
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert any(problem in found for found in problems(broken, INFO)), problems(broken, INFO)


def test_blueprint_becomes_the_nodes_inside():
    assert problems(BLUEPRINT, INFO) == []
    prompt, outputs = opened(BLUEPRINT, INFO, {"drawn": ("brush", 3)})
    assert prompt == {
        "1:1": {"class_type": "Make", "inputs": {"seed": 3, "kind": "a", "file": "another.safetensors"}},
        "1:2": {"class_type": "Show", "inputs": {"images": ("1:1", 0), "mask": ("brush", 3), "name": "x"}},
    }
    assert outputs == {"picture": ("1:1", 0)}


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("properties", "proxyWidgets", 0), ["1", "steps"], "it shows steps of node 1, which is not inside"),
        (("properties", "proxyWidgets", 0), ["7", "seed"], "it shows seed of node 7, which is not inside"),
        (
            ("properties", "proxyWidgets", 1),
            ["2", "control_after_generate"],
            "it shows control_after_generate of node 2",
        ),
        (("inputs", 0, "name"), "painted", "its inputs are [('drawn', 'MASK')]"),
        (("outputs",), [], "its outputs are [('picture', 'IMAGE')]"),
    ],
)
def test_broken_blueprint_is_told(path, value, problem):
    broken = copy.deepcopy(BLUEPRINT)
    place = broken["nodes"][0]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert any(problem in found for found in problems(broken, INFO)), problems(broken, INFO)
