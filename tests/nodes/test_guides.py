"""What guidance does in ComfyUI that no graph shows: weights of inference mode, and memory that runs out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch

from tests.nodes.cases import GUIDED, IT, built, of, sampler


@pytest.fixture(scope="module")
def nodes(double) -> Iterator[dict[str, ModuleType]]:
    """The pack's node modules by name, with the double's modules in their places."""
    with double._modules.installed():
        start = f"{double.pack.__name__}.nodes."
        yield {name.removeprefix(start): module for name, module in sys.modules.items() if name.startswith(start)}


@pytest.mark.parametrize("buffered", [False, True])
def test_gradients_pass_weights_that_were_made_in_inference_mode(buffered, nodes):
    """What ComfyUI's memory manager moves comes out as inference tensors, of which autograd saves nothing."""
    host = nodes["host"]
    with torch.inference_mode():
        network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3), torch.nn.BatchNorm2d(1)).eval().requires_grad_(False)
        managed = host.Managed(network)
    x = torch.ones(1, 1, 3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        network(x).sum().backward()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    if buffered:  # asked for within a node, which runs in inference mode
        with torch.inference_mode():
            host.let_gradients_pass(managed)
    else:
        host.let_gradients_pass(managed)
    network(x).sum().backward()
    torch.testing.assert_close(x.grad, network[0].weight / (1 + network[1].eps) ** 0.5)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    kept = network[0].weight
    host.let_gradients_pass(managed)
    assert network[0].weight is kept, "weights that are fine are not copied again"


def test_a_copy_is_made_once_and_goes_with_its_model(nodes):
    guides = nodes["guides"]
    network = torch.nn.Linear(2, 2)
    count = len(guides._copies)
    copy = guides._copy_of(network, network, torch.device("cpu"))
    assert guides._copy_of(network, network, torch.device("cpu")) is copy and copy.idle is not network
    assert torch.equal(copy.idle.weight, network.weight)
    del network
    assert len(guides._copies) == count


@pytest.mark.parametrize("dtype, kept", [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_a_copy_in_float16_becomes_float32(dtype, kept, nodes):
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3), torch.nn.BatchNorm2d(1)).to(dtype)
    copy = nodes["host"].copied(network).idle
    assert {value.dtype for value in copy.state_dict().values() if value.is_floating_point()} == {kept}
    assert network[0].weight.dtype == dtype


def test_memory_that_runs_out_is_told_and_the_image_is_guided_all_the_same(double, nodes, monkeypatch):
    guides = nodes["guides"]
    decode, sizes = guides._Codec.decode, []

    def scarce(codec: object, latents: torch.Tensor) -> torch.Tensor:
        """Memory for the gradient of 16 latent positions a side."""
        sizes.append(max(latents.shape[2:]))
        if latents.requires_grad and sizes[-1] > 16:
            raise torch.OutOfMemoryError("out of memory")
        return decode(codec, latents)

    info = double.get("/object_info")
    graph = built(
        info,
        "DCDD_DistributionGuidance",
        GUIDED,
        {"k": sampler(IT, steps=3), "plain": sampler(of("pico model"), steps=3)},
    )
    graph.keep(of("k"), "scarce")
    graph.keep(of("plain"), "plain")
    monkeypatch.setattr(guides._Codec, "decode", scarce)
    run = double.run(graph.prompt)
    assert run.status == "success", run.error
    assert any("tiles of" in text for text in run.notices["k"]), run.notices
    guided, plain = (double.saved(name)["samples"] for name in ("scarce", "plain"))
    assert np.abs(guided - plain).mean() > 0.05


def test_guided_sampling_stops_within_a_step(double, nodes, monkeypatch):
    """The stop button between the model's prediction and the gradient."""
    guides = nodes["guides"]
    management = guides.comfy.model_management
    correct, seen = guides.TokenGuide.correct, []

    def stopping(guide: object, clean: torch.Tensor, time: float) -> torch.Tensor:
        seen.append(time)
        management.interrupt_current_processing()
        return correct(guide, clean, time)

    monkeypatch.setattr(guides.TokenGuide, "correct", stopping)
    graph = built(double.get("/object_info"), "DCDD_DistributionGuidance", GUIDED, {"k": sampler(IT, steps=5)})
    graph.add("end", "TEST_Hold", value=of("k"))
    run = double.run(graph.prompt)
    assert (run.status, run.node) == ("interrupted", "k") and len(seen) == 1
