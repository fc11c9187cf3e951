"""What a masked sampler's training takes, from shapes alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dcdd_core.models.masked.network import MaskedConfig, MaskedTransformer
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.training.dry_run import Meter
from dcdd_core.training.image_batch import Geometry
from dcdd_core.training.masked_cost import MaskedSetup, masked_cost
from dcdd_core.training.masked_loss import MaskedExample, masked_losses
from tests.tiny import fill, tiny_vq

SETUP = MaskedSetup(
    config=MaskedConfig(grid=(4, 4), codes=64, code_dim=8, words=21, width=32, layers=3, heads=2, hidden=64),
    geometry=Geometry(resolution=16, token_resolution=16, token_factor=4, vae_factor=1),
    words=10,
    drawn=0.0,
    cached=True,
    batch=8,
    accumulate=1,
    optimizer="adamw",
    precision="no",
    checkpointing=False,
    gpus=1,
)


@pytest.fixture(scope="module")
def tokenizer():
    return VQTokenizer(tiny_vq())


def real_flops() -> int:
    """Of a step on the CPU, as PyTorch counts them."""
    network, some = fill(MaskedTransformer(SETUP.config)), torch.zeros(8, 16, dtype=torch.bool)
    tokens = torch.zeros(8, 16, dtype=torch.int64)
    hidden = some.clone()
    hidden[:, :8] = True
    example = MaskedExample(
        ids=[[1] * 9, *[[1] * 10] * 7],
        tokens=tokens,
        errors=torch.zeros(8, 16),
        hidden=hidden,
        wrong=some,
        seen=tokens.masked_fill(hidden, 64),
        probe=some,
    )
    # PyTorch's own counts of each operation; its FlopCounterMode cannot enter a forward pass without gradients.
    with sdpa_kernel(SDPBackend.MATH), Meter() as counter:
        masked_losses(network, example)["loss"].backward()
    return counter.flops


def test_the_flops_of_a_step_are_those_that_pytorch_counts_of_the_real_one(tokenizer):
    # Flash attention, which is counted, computes the scores again in its backward pass; nothing that is trained follows
    # the last block's attention of the text.
    again = 2 * 8 * 32 * (2 * 10 * 10 + 3 * 16 * (10 + 16))
    assert masked_cost(SETUP, tokenizer).flops == real_flops() + again


def test_what_is_held_and_what_more_takes(tokenizer):
    plain = masked_cost(SETUP, tokenizer)
    count = sum(weight.numel() for weight in MaskedTransformer(SETUP.config).parameters())
    assert plain.weights["trained"] == count
    assert plain.memory["trained weights"] == plain.memory["EMA"] == 4 * count
    assert plain.memory["optimiser's states"] == 8 * count and plain.memory["communication"] == 0
    assert plain.gradients == 4 * count and plain.encoding == 0
    more = masked_cost(replace(SETUP, cached=False, drawn=0.5, gpus=2), tokenizer)
    assert more.memory["communication"] == 4 * count and more.encoding > 0
    assert plain.flops < more.flops < 1.5 * plain.flops
    half, whole = (masked_cost(replace(SETUP, drawn=drawn), tokenizer) for drawn in (0.5, 1.0))
    assert whole.flops - plain.flops == pytest.approx(2 * (half.flops - plain.flops), abs=2)
    encoded = masked_cost(replace(SETUP, cached=False), tokenizer).encoding
    assert more.encoding == max(encoded, whole.encoding) and encoded != whole.encoding
    several = masked_cost(replace(SETUP, drawn=1.0, accumulate=3), tokenizer)
    assert several.encoding == whole.encoding + 4 * count, "beside the gradients of the micro-batches before"
    held = sum(weight.numel() * weight.element_size() for weight in tokenizer.model.parameters())
    assert plain.memory["tokenizer, in float32"] == held > 0
    assert masked_cost(replace(SETUP, checkpointing=True), tokenizer).activations < plain.activations
    assert masked_cost(replace(SETUP, accumulate=3), tokenizer).flops == 3 * plain.flops
    assert masked_cost(replace(SETUP, precision="bf16"), tokenizer).activations < plain.activations
    assert masked_cost(replace(SETUP, optimizer="muon"), tokenizer).flops > plain.flops
    assert tokenizer.model.post_quant_conv.weight.device.type == "cpu", "it is as it was"
