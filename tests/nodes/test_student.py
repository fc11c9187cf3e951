"""A student of few steps in the FLUX decoder node: its own steps by default, and a notice if others are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from json import dumps, loads
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dcdd_core.models.card import Distilled
from dcdd_pico.embedded import model_paths
from tests.fake_comfy.double import Double
from tests.nodes.cases import PAINT, built, notices, of

NAME = "student.safetensors"


@pytest.fixture
def student(double: Double) -> Iterator[None]:
    """A bundle of one that paints in two steps, beside the others."""
    path, pico = double.base / "models" / "dcdd" / NAME, model_paths()["decoder"]
    with safe_open(pico, "pt") as file:
        header = file.metadata()
    card = loads(header["card"]) | {
        "steps": 2,
        "distilled": asdict(Distilled(objective="trajectory", teacher_steps=10)),
    }
    save_file(load_file(pico), path, header | {"card": dumps(card)})
    yield
    path.unlink()


def painted(double: Double, **inputs: Any):
    """The run of a decoder node that is "it"."""
    info = double.get("/object_info")
    more = {"student": ("DCDD_LoadDecoder", {"bundle": NAME, "vae": "pico/"})}
    graph = built(info, "DCDD_FluxDecoder", {**PAINT, "decoder": of("student"), **inputs}, more)
    graph.add("end", "TEST_Hold", value=of("it"))
    run = double.run(graph.prompt)
    assert run.status == "success", (run.node, run.error)
    return run


@pytest.mark.parametrize(
    ("inputs", "steps", "said"),
    [
        ({"steps": 0}, 2, None),
        ({"steps": 2}, 2, None),
        ({"steps": 3}, 3, "made for 2 steps from noise at shift 3, and is to paint with 3 steps"),
        ({"steps": 0, "schedule": "uniform"}, 2, "and is to paint with shift 0"),
    ],
    ids=str,
)
def test_it_paints_in_its_own_steps_and_says_so_where_others_are_asked_for(double, student, inputs, steps, said):
    run = painted(double, **inputs)
    assert [told for told in run.progress["it"] if told[0] > 0] == [(k + 1, steps) for k in range(steps)]
    told = [text for text in notices(run) if "student" in text]
    assert len(told) == (said is not None) and all(said in text for text in told)
