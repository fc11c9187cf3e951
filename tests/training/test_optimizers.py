"""Which optimiser updates which weight, and how."""

import numpy as np
import pytest
import torch
from torch import nn

from dcdd_core.training.config import OptimizationConfig
from dcdd_core.training.optimizers import adamw_with_muon, muon
from dcdd_core.training.trainable import (
    TRAINED,
    check_optimizer,
    choose_trained,
    decoder_optimizers,
    muon_matrices,
    trained_weights,
)
from tests.tiny import tiny_decoder

#: The matrices of a joint block without its text stream, and of a single one.
JOINT = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2")
SINGLE = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")


def named(decoder, optimizer):
    names = {id(weight): name for name, weight in decoder.named_parameters()}
    return [names[id(weight)] for group in optimizer.param_groups for weight in group["params"]]


@pytest.mark.parametrize("mode", ["all", "attention"])
def test_muon_updates_the_matrices_inside_the_blocks_and_adamw_the_rest(mode):
    decoder = tiny_decoder()
    choose_trained(decoder, mode)
    blocks = [
        (f"transformer.transformer_blocks.{k}", JOINT) for k in range(len(decoder.transformer.transformer_blocks))
    ]
    singles = decoder.transformer.single_transformer_blocks
    blocks += [(f"transformer.single_transformer_blocks.{k}", SINGLE) for k in range(len(singles))]
    expected = {f"{block}.{layer}.weight" for block, layers in blocks for layer in layers}
    expected &= set(trained_weights(decoder))
    assert set(muon_matrices(decoder)) == expected and bool(expected)
    optimizers = decoder_optimizers(decoder, OptimizationConfig(steps=1, optimizer="muon"))
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.AdamW, torch.optim.Muon]
    groups = [named(decoder, optimizer) for optimizer in optimizers]
    assert sorted(name for group in groups for name in group) == sorted(trained_weights(decoder))
    assert set(groups[1]) == expected


def test_muon_without_a_matrix_to_update_is_refused():
    decoder = tiny_decoder()
    choose_trained(decoder, "adapter")
    with pytest.raises(ValueError, match="muon would update nothing: .* take adamw, or train attention, lora or all"):
        decoder_optimizers(decoder, OptimizationConfig(steps=1, optimizer="muon"))
    for optimizer in ("adamw", "muon"):
        for mode in TRAINED:
            if (optimizer, mode) != ("muon", "adapter"):
                check_optimizer(optimizer, mode)
    (adamw,) = decoder_optimizers(decoder, OptimizationConfig(steps=1))
    assert sorted(named(decoder, adamw)) == sorted(trained_weights(decoder))


def test_their_numbers_are_those_of_the_configuration():
    decoder = tiny_decoder()
    choose_trained(decoder, "all")
    adamw, with_muon = decoder_optimizers(decoder, OptimizationConfig(steps=1, optimizer="muon", weight_decay=0.07))
    assert adamw.defaults["betas"] == (0.9, 0.99) and adamw.defaults["fused"]
    for optimizer in (adamw, with_muon):
        assert optimizer.defaults["weight_decay"] == 0.07 and optimizer.defaults["lr"] == 0
    (only,) = decoder_optimizers(decoder, OptimizationConfig(steps=1))
    assert sorted(named(decoder, only)) == sorted(trained_weights(decoder))


def test_adamw_is_loshchilov_and_hutter_s_in_float64():
    draw = np.random.default_rng(0)
    value, gradients = draw.normal(size=(4, 3)), draw.normal(size=(5, 4, 3))
    weight = nn.Parameter(torch.tensor(value, dtype=torch.float32))
    optimizer = adamw_with_muon({"w": weight}, (), betas=(0.9, 0.99), weight_decay=0.1)["optimizer"]
    optimizer.param_groups[0]["lr"] = 0.02
    mean, square = np.zeros_like(value), np.zeros_like(value)
    for n, gradient in enumerate(gradients, 1):
        weight.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
        mean, square = 0.9 * mean + 0.1 * gradient, 0.99 * square + 0.01 * gradient**2
        value = value * (1 - 0.02 * 0.1)
        value -= 0.02 * (mean / (1 - 0.9**n)) / (np.sqrt(square / (1 - 0.99**n)) + 1e-8)
    np.testing.assert_allclose(weight.detach().double().numpy(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 96), (64, 64), (96, 24)])
def test_muon_s_updates_have_the_size_of_adamw_s_whatever_the_shape(shape):
    """0.2 times the rate, root mean square (Liu et al. 2025, section 2.2), but for Newton-Schulz' singular values."""
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    optimizer = muon([weight], weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.5 * 0.2, rel=0.2)
