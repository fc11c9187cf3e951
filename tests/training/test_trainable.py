"""Which weights are trained, and how low-rank updates are merged."""

import pytest
import torch

from dcdd_core.training.trainable import changed_by_training, choose_trained, merge_lora, trained_weights
from tests.tiny import tiny_condition, tiny_decoder


def choose(what, dtype=torch.float32, **options):
    decoder = tiny_decoder().to(dtype)
    choose_trained(decoder, what, **options)
    return decoder


@pytest.mark.parametrize("what", ["attention", "adapter", "lora", "all"])
@pytest.mark.filterwarnings("ignore:.*")
def test_what_is_trained_is_float32_gets_a_gradient_and_is_named_after_what_changes(what):
    decoder = choose(what, dtype=torch.bfloat16)
    weights = trained_weights(decoder)
    adapter = {f"adapter.{name}" for name, _ in decoder.adapter.named_parameters()}
    assert adapter < set(weights) or (what == "adapter" and adapter == set(weights))
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    others = [weight for weight in decoder.parameters() if not weight.requires_grad]
    assert bool(others) and all(weight.dtype == torch.bfloat16 for weight in others)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        condition = decoder.condition_tokens(tiny_condition(), (8, 8))
        packed, context = torch.randn(2, 16, 64), torch.randn(2, 16, 80)
        out = decoder(packed, context, condition, torch.tensor([0.3, 0.7]), (8, 8))
    out.square().mean().backward()
    assert all(weight.grad is not None for weight in weights.values())  # or DDP would wait for ever
    own = {
        "attention": {"attn.to_q.weight", "attn.to_q.bias", "attn.norm_k.weight", "attn.to_out.0.weight"},
        "adapter": set(),
        "lora": {"attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight", "attn.to_out.0.weight"},
        "all": {"attn.to_q.bias", "ff.net.2.weight", "norm1.linear.weight"},
    }[what]
    changed = changed_by_training(decoder)
    assert {f"transformer_blocks.0.{name}" for name in own} <= changed
    assert changed <= set(tiny_decoder().transformer.state_dict())
    assert not any("context" in name or "add_" in name for name in changed)
    assert what == "all" or not any("proj_mlp" in name or ".norm." in name for name in changed)


def test_merged_low_rank_updates_predict_the_same():
    decoder = choose("lora", rank=3, seed=5)
    condition = decoder.condition_tokens(tiny_condition(), (8, 8))
    packed, context, t = torch.randn(2, 16, 64), torch.randn(2, 16, 80), torch.tensor([0.3, 0.7])
    with torch.no_grad():
        plain = tiny_decoder()(packed, context, condition, t, (8, 8))
        torch.testing.assert_close(decoder(packed, context, condition, t, (8, 8)), plain)  # they start as none
        for name, weight in trained_weights(decoder).items():
            if "lora_B" in name:
                assert weight.shape[1] == 3
                weight.normal_(generator=torch.Generator().manual_seed(0))
        trained = decoder(packed, context, condition, t, (8, 8))
        assert not torch.allclose(trained, plain, atol=1e-2)
        merge_lora(decoder)
        torch.testing.assert_close(decoder(packed, context, condition, t, (8, 8)), trained)
    assert set(decoder.state_dict()) == set(tiny_decoder().state_dict())


def test_low_rank_updates_start_the_same_in_every_process_and_leave_the_global_seed():
    decoders = [tiny_decoder() for _ in range(3)]
    before = torch.get_rng_state()
    for decoder, seed in zip(decoders, (1, 1, 2)):
        choose_trained(decoder, "lora", seed=seed)
    assert torch.equal(before, torch.get_rng_state())
    first, second, other = (trained_weights(decoder) for decoder in decoders)
    name = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[name], second[name]) and not torch.equal(first[name], other[name])


def test_anything_else_is_refused():
    with pytest.raises(ValueError, match="must be one of attention, adapter, lora, all, got 'text'"):
        choose("text")
