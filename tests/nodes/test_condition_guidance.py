"""Guidance on the condition in the FLUX decoder node: what is asked for, and by default what the bundle says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from dcdd_core.models.bundle import DecoderOptions, load_decoder, save_bundle
from dcdd_pico.embedded import model_paths
from tests.fake_comfy.double import Double
from tests.nodes.cases import PAINT, built, of

NAME = "dropped.safetensors"


@pytest.fixture
def dropped(double: Double) -> Iterator[None]:
    """pico's decoder as if it had been trained with dropped conditions, served with a guidance of 2.5 on them."""
    path = double.base / "models" / "dcdd" / NAME
    decoder = load_decoder(model_paths()["decoder"], options=DecoderOptions(dtype=torch.float32, fold=False))
    decoder.adapter.keep_null(True)
    token = decoder.adapter.null.token
    with torch.no_grad():
        token.copy_(torch.randn(token.shape, generator=torch.Generator().manual_seed(0)))
    decoder.card = replace(decoder.card, condition_dropout=0.1, condition_guidance=2.5)
    save_bundle(path, decoder, dtype=torch.float16)
    yield
    path.unlink()


def test_the_image_follows_the_guidance_that_is_asked_for_and_else_the_bundle_s(double, dropped):
    def painted(name: str, **inputs: float) -> np.ndarray:
        more = {"dropped": ("DCDD_LoadDecoder", {"bundle": NAME, "vae": "pico/"})}
        graph = built(
            double.get("/object_info"), "DCDD_FluxDecoder", {**PAINT, "decoder": of(name), "steps": 2, **inputs}, more
        )
        graph.keep(of("it"), "it")
        run = double.run(graph.prompt)
        assert run.status == "success", (run.node, run.error)
        return double.saved("it")["value"]

    plain = painted("decoder")
    assert np.array_equal(painted("dropped", guidance=1.0), plain), "1 is off, whatever the bundle says"
    served = painted("dropped")
    assert np.array_equal(painted("dropped", guidance=-1.0), served)
    assert np.array_equal(painted("dropped", guidance=2.5), served)
    stronger = painted("dropped", guidance=4.0)
    assert np.abs(served - plain).max() > 0.01 and np.abs(stronger - served).max() > 0.01
