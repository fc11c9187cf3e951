"""The cases of tests/nodes in the real ComfyUI: as good there, and the same as in the test double."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.comfy.snapshot import inputs
from tests.comfy.workflows import to_prompt
from tests.fake_comfy.double import Double
from tests.fake_comfy.fixture import double
from tests.nodes.cases import (
    CASES,
    INTERRUPTIONS,
    REFUSALS,
    RUNNABLE,
    WORKFLOWS,
    Case,
    Interruption,
    Refusal,
    assert_reported,
    check,
    notices,
    run_case,
    run_interruption,
    run_refusal,
    workflow_prompt,
)

pytestmark = pytest.mark.comfy

__all__ = ["double"]


@pytest.fixture(scope="module")
def told(double: Double) -> dict:
    """/object_info of the double."""
    return double.get("/object_info")


def assert_alike(here: np.ndarray, there: np.ndarray, name: str) -> None:
    """Whole numbers and texts are the same; others to a thousandth of their size, for torch differs."""
    assert here.shape == there.shape and here.dtype.kind == there.dtype.kind, (name, here.shape, there.shape)
    if here.dtype.kind == "f":
        off = np.abs(here - there).mean()
        assert off <= 1e-3 * np.abs(here).mean() + 1e-6, f"{name}: {off} apart"
    else:
        np.testing.assert_array_equal(here, there, name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_node_does_the_same(case: Case, server, info, double, told):
    server.free()
    there = run_case(case, server, info)
    check(case, there)
    here = run_case(case, double, told)
    assert notices(here.run) == [text.replace(str(server.base), str(double.base)) for text in notices(there.run)]
    assert here.run.previews["it"] == there.run.previews["it"]
    assert_reported(there.run.progress["it"], [step for step in here.run.progress["it"] if step[0] > 0])
    for name, arrays in here.arrays.items():
        assert arrays.keys() == there.arrays[name].keys()
        for key, value in arrays.items():
            other = there.arrays[name][key]
            if name in case.loose:
                assert (value.shape, value.dtype.kind) == (other.shape, other.dtype.kind), name
            else:
                assert_alike(value, other, f"{name}: {key}")


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case.name)
def test_node_refuses_the_same(case: Refusal, server, info, double, told):
    there = run_refusal(case, server, info)
    assert server.get("/system_stats") and server.alive
    if there.status == "rejected" and case.listed:
        assert re.search("not in list", there.error, re.IGNORECASE), there.error
        return
    here = run_refusal(case, double, told)
    assert (there.status, there.node, there.error_type) == (here.status, here.node, here.error_type), there.error
    assert _comparable(there.error.replace(str(server.base), str(double.base))) == _comparable(here.error)


@pytest.mark.parametrize("case", INTERRUPTIONS, ids=lambda case: case.node)
def test_node_is_interrupted_after_the_same_report(case: Interruption, server, info, double, told):
    there, here = run_interruption(case, server, info), run_interruption(case, double, told)
    assert (there.status, there.node) == (here.status, here.node) == ("interrupted", "it"), there.error
    told = [step for step in here.progress["it"] if step[0] > 0]
    assert [step for step in there.progress["it"] if step[0] > 0 and step not in told] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_becomes_the_same_prompt(path: Path, info, told):
    """Holds what the double says of ComfyUI's own nodes to what ComfyUI does."""
    workflow = json.loads(path.read_text("utf-8"))
    prompt = to_prompt(workflow, info)
    assert prompt == to_prompt(workflow, told)
    for kind in {node["class_type"] for node in prompt.values()}:
        outputs = told[kind]["output"]
        assert outputs == info[kind]["output"][: len(outputs)], kind
        for name, spec in inputs(told[kind]).items():
            real = inputs(info[kind])[name]
            assert _type(spec) == _type(real), f"{kind}.{name}"


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_workflow_does_the_same(path: Path, server, info, double, told):
    results = []
    for host, known in ((server, info), (double, told)):
        prompt, names = workflow_prompt(path, known)
        run = host.run(prompt)
        assert run.status == "success", f"node {run.node}: {run.error}"
        results.append({name: host.saved(name) for name in names})
    for name, arrays in results[0].items():
        for key, value in arrays.items():
            assert_alike(results[1][name][key], value, f"{name}: {key}")


def _comparable(error: str) -> str:
    """Without what is measured on a network that the double has a simpler one for."""
    return re.sub(r"a spread of [\d.]+", "a spread", error)


def _type(spec: list) -> str:
    return "COMBO" if isinstance(spec[0], list) else spec[0]
