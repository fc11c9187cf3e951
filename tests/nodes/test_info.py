"""What the nodes' schemas become in /object_info."""

from __future__ import annotations

import json

from tests.comfy.snapshot import SNAPSHOT, reduced


def test_object_info_is_that_of_the_real_comfyui(double):
    assert reduced(double.get("/object_info")) == json.loads(SNAPSHOT.read_text("utf-8"))
