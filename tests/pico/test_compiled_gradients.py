"""What the trainings compile has the gradients of what it was compiled from, for pico's own networks and shapes.

A compiler that loses gradients goes unnoticed: losses still fall, by the layers that learn (`train_autoencoder`). Each
network is compiled here as its training does, and compared in bfloat16, as on a CPU.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import nn

from dcdd_core import registry
from dcdd_core.models.bundle import DecoderOptions, load_decoder
from dcdd_core.models.janus.masked_start import start_from_janus
from dcdd_core.models.masked.words import padded
from dcdd_core.types import Condition
from dcdd_pico.embedded import WEIGHTS, model_paths
from dcdd_pico.feed_forward import SHAPES, FeedForwardCard, FeedForwardDecoder
from tests.tiny import fill

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile wants a C++ compiler on a CPU"),
]
GRID, LATENTS = (12, 12), (24, 24)
Case = tuple[nn.Module, Callable[[nn.Module], torch.Tensor], Callable[[nn.Module], None]]


def condition() -> Condition:
    return Condition(torch.randn(2, 144, 8), torch.rand(2, 144, 4), GRID, codebook=None)


def diffusion() -> Case:
    decoder = load_decoder(model_paths(WEIGHTS)["decoder"], options=DecoderOptions(dtype=torch.float32, fold=False))
    packed, given, t = torch.randn(2, 144, 64), condition(), torch.tensor([0.2, 0.8])

    def output(network: nn.Module) -> torch.Tensor:
        context = network.backbone.context(torch.zeros(1, 16, *LATENTS), torch.ones(1, 1, 96, 96), 4)
        return network(packed, context, network.condition_tokens(given, LATENTS), t, LATENTS)

    def compiled(network: nn.Module) -> None:
        for block in network.backbone.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True)

    return decoder, output, compiled


def janus() -> Case:
    sampler = registry.sampler_family(model_paths(WEIGHTS)["vlm"]).load_sampler(str(model_paths(WEIGHTS)["vlm"]))
    model = sampler.model.model.language_model
    model.set_attn_implementation("eager")
    given = torch.randn(2, 160, model.config.hidden_size)
    return (
        model,
        lambda network: network(inputs_embeds=given, use_cache=False).last_hidden_state,
        lambda network: network.compile(dynamic=False),
    )


def masked() -> Case:
    sampler = registry.sampler_family(model_paths(WEIGHTS)["vlm"]).load_sampler(str(model_paths(WEIGHTS)["vlm"]))
    tokens, words = torch.randint(0, 1024, (3, 144)), padded([[1] * 20, [1] * 17, [1] * 20])

    def compiled(network: nn.Module) -> None:
        for layer in network.layers:
            layer.compile(dynamic=True)

    return (
        start_from_janus(sampler.model, 0, layers=2),
        lambda network: network.logits(network(tokens, network.prefix(*words))),
        compiled,
    )


def feed_forward(kind: str) -> Case:
    given = condition()

    def compiled(network: nn.Module) -> None:
        for block in network.blocks:
            block.compile(dynamic=False)

    card = FeedForwardCard(reads="tokens", codebook="1024x8:", **SHAPES[kind])
    return fill(FeedForwardDecoder(card)), lambda network: network(given), compiled


def gradients(network: nn.Module, output: Callable[[nn.Module], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a fixed random direction of the output."""
    network.train().requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = output(network).float()
    (found * torch.randn(found.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}


CASES: Sequence[Callable[[], Case]] = (diffusion, janus, masked, *(partial(feed_forward, kind) for kind in SHAPES))


@pytest.mark.parametrize("case", CASES, ids=["diffusion", "janus", "masked", *SHAPES])
def test_compiled_networks_have_the_plain_gradients(case):
    torch.manual_seed(0)
    torch._dynamo.reset()
    network, output, compile_as_trained = case()
    other = copy.deepcopy(network)
    plain = gradients(network, output)
    compile_as_trained(other)
    found = gradients(other, output)
    torch._dynamo.reset()
    assert list(found) == list(plain) and plain
    norms = {name: float(gradient.norm()) for name, gradient in plain.items()}
    least = 1e-4 * max(norms.values())  # what is left of zero is rounding; that of attention goes to 0.13
    off = {name: float((found[name] - plain[name]).norm()) / norms[name] for name in plain if norms[name] > least}
    assert len(off) > len(plain) / 2
    assert {name: value for name, value in off.items() if value > 0.3} == {}
