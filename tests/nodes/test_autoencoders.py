"""An autoencoder that fails: the decoder's own, or ComfyUI's VAE in its place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from tests.comfy.server import Run
from tests.nodes.cases import FLUX, IT, PAINT, built, of

CONNECTED = {**FLUX, "vae": of("flux vae")}


@pytest.fixture
def decode(double) -> ModuleType:
    return sys.modules[f"{double.pack.__name__}.nodes.decode"]


@pytest.fixture
def painted(double) -> Callable[[dict], Run]:
    def run(inputs: dict) -> Run:
        graph = built(double.get("/object_info"), "DCDD_FluxDecoder", inputs, {})
        graph.add("end", "TEST_Hold", value=IT)
        return double.run(graph.prompt)

    return run


def test_nan_of_a_connected_vae_is_its_own(decode, painted, monkeypatch):
    whole = decode.comfy.sd.VAE.decode
    monkeypatch.setattr(decode.comfy.sd.VAE, "decode", lambda vae, latents: whole(vae, latents) * torch.nan)
    run = painted(CONNECTED)
    assert (run.status, run.node, run.error_type) == ("error", "it", "ValueError")
    assert "the autoencoder decodes the latents to NaN" in run.error and "--fp32-vae" in run.error


@pytest.mark.parametrize("connected", [False, True])
def test_a_vae_with_tiles_is_advised_where_none_is_connected(connected, decode, painted, monkeypatch):
    def scarce(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    owner = decode.comfy.sd.VAE if connected else decode.ManagedCodec
    monkeypatch.setattr(owner, "decode", scarce)
    run = painted(CONNECTED if connected else PAINT)
    assert (run.status, run.node, run.error_type) == ("error", "it", "RuntimeError")
    assert "use a smaller image" in run.error and ("Load VAE" in run.error) == (not connected), run.error
