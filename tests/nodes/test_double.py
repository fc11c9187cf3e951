"""The double itself: it takes no other test's modules, and notices nodes that break what ComfyUI relies on."""

from __future__ import annotations

import sys

import pytest

from tests.fake_comfy.double import MODULES
from tests.nodes.cases import PARTS, built


@pytest.fixture(scope="module")
def scenes(double) -> dict:
    return built(double.get("/object_info"), *PARTS["scenes"], {}).prompt


def test_stand_ins_are_gone_between_runs(double, scenes):
    assert double.run(scenes).status == "success"
    tops = {name.partition(".")[0] for name in sys.modules}
    assert not tops & {"comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "server"}
    assert str(MODULES) not in sys.path


def test_node_that_keeps_state_is_refused(double, scenes, monkeypatch):
    node = double.nodes["DCDD_PicoScene"].node
    execute = node.execute.__func__

    def remembering(cls, **inputs):
        cls.last = inputs
        return execute(cls, **inputs)

    monkeypatch.setattr(node, "execute", classmethod(remembering))
    run = double.run(scenes)
    assert run.error_type == "AttributeError" and "keeps no state" in run.error


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda image: image[0], "IMAGE"),
        (lambda image: image + 1, "from 1"),
        (lambda image: image.movedim(-1, 1).contiguous(), "IMAGE"),
    ],
    ids=["no batch", "beyond 1", "channels first"],
)
def test_image_that_is_none_is_noticed(spoil, says, double, scenes, monkeypatch):
    node = double.nodes["DCDD_PicoScene"].node
    execute = node.execute.__func__

    def spoiling(cls, **inputs):
        output = execute(cls, **inputs)
        output.args = (spoil(output.args[0]), *output.args[1:])
        return output

    monkeypatch.setattr(node, "execute", classmethod(spoiling))
    run = double.run(scenes)
    assert run.error_type == "AssertionError" and says in run.error


@pytest.mark.parametrize(
    ("value", "says"), [(0, "smaller than min of 1"), (257, "bigger than max of 256"), (None, "input is missing")]
)
def test_server_refuses_before_it_runs(value, says, double, scenes):
    prompt = {"it": {"class_type": "DCDD_PicoScene", "inputs": {**scenes["it"]["inputs"], "batch_size": value}}}
    if value is None:
        del prompt["it"]["inputs"]["batch_size"]
    run = double.run(prompt)
    assert (run.status, run.executed) == ("rejected", []) and says in run.error
