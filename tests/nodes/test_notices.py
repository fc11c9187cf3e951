"""What a node shows while it runs: ComfyUI's page keeps only the text that was sent last."""

from __future__ import annotations

import sys

import pytest

from tests.nodes.cases import PARTS, built


@pytest.fixture(scope="module")
def scenes(double) -> dict:
    return built(double.get("/object_info"), *PARTS["scenes"], {}).prompt


def test_notices_stay_and_a_text_takes_the_place_of_the_one_before(double, scenes, monkeypatch):
    node = double.nodes["DCDD_PicoScene"].node
    execute = node.execute.__func__

    def telling(cls, **inputs):
        host = sys.modules[f"{double.pack.__name__}.nodes.host"]
        host.notice("first")
        host.tell("1 of 2")
        host.notice("second")
        host.notice("first")
        host.tell("2 of 2")
        return execute(cls, **inputs)

    monkeypatch.setattr(node, "execute", classmethod(telling))
    for _ in range(2):  # what an earlier run of the node said is gone
        run = double.run(scenes)
        assert run.status == "success", run.error
        assert run.notices["it"][-5:] == [
            "first",
            "first\n1 of 2",
            "first\nsecond\n1 of 2",
            "first\nsecond\n1 of 2",
            "first\nsecond\n2 of 2",
        ]
