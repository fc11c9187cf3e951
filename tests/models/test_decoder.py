"""The decoder against diffusers' own forward pass, and its bundles."""

from math import nan

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from dcdd_core.method.latents import position_ids
from dcdd_core.models.backbones.flux_fill.backbone import FluxFill
from dcdd_core.models.backbones.flux_fill.inference import of_text_stream
from dcdd_core.models.bundle import DecoderOptions, load_decoder, read_card, save_bundle
from dcdd_core.models.card import DecoderCard
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.types import Calibration
from tests.tiny import assert_same_without_text, fill, tiny_card, tiny_condition, tiny_decoder, tiny_flux_config

SIZE = (8, 8)  # latent grid of tiny_condition: 4 x 4 tokens of 2 x 2 latents


def packed(decoder, batch=2):
    """Random [B, L, F] latents and [B, L, G] context of the backbone's input channels."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(batch, 16, decoder.transformer.config.in_channels, generator=draw).split([64, 80], dim=2)


def by_diffusers(transformer, x, t, guidance):
    return transformer(
        hidden_states=x,
        encoder_hidden_states=x.new_zeros(len(x), 0, transformer.config.joint_attention_dim),
        pooled_projections=x.new_zeros(len(x), transformer.config.pooled_projection_dim),
        timestep=t,
        img_ids=position_ids(*SIZE),
        txt_ids=x.new_zeros(0, 3),
        guidance=torch.full_like(t, guidance),
        return_dict=False,
    )[0]


@torch.no_grad()
def test_an_untrained_adapter_leaves_the_base_exactly_as_it_was():
    transformer = fill(FluxTransformer2DModel(**tiny_flux_config()))
    decoder = DistributionConditionedDecoder(FluxFill(transformer), tiny_card())
    (x, kept), t = packed(decoder), torch.tensor([0.3, 0.9])
    condition = decoder.condition_tokens(tiny_condition(), SIZE)
    whole = torch.cat([x, kept], dim=2)
    assert torch.equal(decoder(x, kept, condition, t, SIZE), by_diffusers(transformer, whole, t, 1.0))


@torch.no_grad()
def test_the_condition_enters_after_the_input_projection():
    decoder = tiny_decoder()
    (x, kept), t = packed(decoder), torch.tensor([0.3, 0.9])
    condition = decoder.condition_tokens(tiny_condition(), SIZE)
    assert condition.abs().max() > 0.1
    plain = decoder(x, kept, torch.zeros_like(condition), t, SIZE)
    seen = decoder(x, kept, condition, t, SIZE)
    assert (seen - plain).abs().max() > 0.01
    handle = decoder.transformer.x_embedder.register_forward_hook(lambda module, inputs, output: output + condition)
    base = by_diffusers(decoder.transformer, torch.cat([x, kept], dim=2), t, 1.0)
    torch.testing.assert_close(seen, base, rtol=0, atol=0)
    handle.remove()


@torch.no_grad()
def test_text_weights_cannot_reach_the_output():
    decoder = tiny_decoder()
    (x, context), t = packed(decoder), torch.tensor([0.5, 0.5])
    condition = decoder.condition_tokens(tiny_condition(), SIZE)
    before = decoder(x, context, condition, t, SIZE)
    for name, parameter in decoder.transformer.named_parameters():
        kept = parameter.clone()
        parameter.fill_(torch.nan)
        reached = bool(decoder(x, context, condition, t, SIZE).isnan().any())
        assert reached != of_text_stream(name), name
        parameter.copy_(kept)
    assert torch.equal(before, decoder(x, context, condition, t, SIZE))


def test_a_bundle_round_trips(tmp_path):
    decoder = tiny_decoder()
    save_bundle(tmp_path / "d.safetensors", decoder, dtype=torch.float32)
    again = load_decoder(tmp_path / "d.safetensors", options=DecoderOptions(fold=False))
    assert again.card == decoder.card
    assert again.card.calibration == Calibration(scale=25.0, smoothing=0.01)
    assert_same_without_text(decoder, again)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_bundle_of_attention_and_adapter_goes_over_its_base(tmp_path):
    decoder = tiny_decoder()
    decoder.transformer.save_pretrained(tmp_path / "base")
    trained = tiny_decoder(seed=5)
    trained.transformer.load_state_dict(
        decoder.transformer.state_dict() | {k: v for k, v in trained.transformer.state_dict().items() if ".attn." in k}
    )
    path = tmp_path / "d.safetensors"
    save_bundle(path, trained, trained=lambda name: ".attn." in name, dtype=torch.float32)
    assert not any("ff" in name for name in load_file(path))
    assert_same_without_text(trained, load_decoder(path, tmp_path / "base", options=DecoderOptions(fold=False)))
    with pytest.raises(ValueError, match="needs its base model tiny"):
        load_decoder(path)


def test_a_base_of_another_kind_is_refused(tmp_path):
    decoder = tiny_decoder()
    save_bundle(tmp_path / "d.safetensors", decoder, trained=lambda name: False)
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"does not fit tiny; .*unexpected: model\.embed_tokens\.weight"):
        load_decoder(tmp_path / "d.safetensors", tmp_path / "other.safetensors")


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_bundle_that_does_not_fit_names_the_tensor(tmp_path, change):
    decoder = tiny_decoder()
    path = tmp_path / "d.safetensors"
    save_bundle(path, decoder)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    name = "adapter.refine.weight"
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        name = "adapter.strange"
        tensors[name] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(3)
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match=name):
        load_decoder(path)


def test_what_is_no_bundle_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="no DCDD decoder bundle"):
        read_card(tmp_path / "a.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "d.safetensors", metadata={"format": "dcdd decoder 1", "card": "{"})
    with pytest.raises(ValueError, match="damaged"):
        read_card(tmp_path / "d.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"not a file")
    with pytest.raises(ValueError, match="cannot be read"):
        read_card(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="does not exist"):
        read_card(tmp_path / "c.safetensors")


@pytest.mark.parametrize("changes", [{"variant": "x"}, {"steps": 0}, {"pixels_per_token": 0}, {"shift": nan}])
def test_a_card_checks_itself(changes):
    with pytest.raises(ValueError):
        tiny_card(**changes)


def test_a_grid_is_painted_at_the_nearest_size_of_whole_packed_latents():
    card = tiny_card(resolution=22 * 4, pixels_per_token=88 / 24, vae_factor=2)
    assert card.painted_size((24, 24)) == (88, 88)
    assert card.painted_size((12, 36)) == (44, 132)
    assert card.painted_size((1, 5)) == (4, 20)  # 3.7 and 18.3 pixels
    assert tiny_card().painted_size((3, 5)) == (12, 20)


def test_the_published_shape_fits_the_card():
    """FLUX.1-Fill's own configuration on the meta device: 384 input channels, 11.90 B parameters, and our adapter."""
    config = tiny_flux_config() | {
        "in_channels": 384,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "axes_dims_rope": [16, 56, 56],
    }
    card = DecoderCard(base="x", base_config=config, tokenizer="x", codebook="x", code_dim=8, width=128)
    with torch.device("meta"):
        decoder = DistributionConditionedDecoder.build(card)
    assert sum(p.numel() for p in decoder.transformer.parameters()) == pytest.approx(11.90e9, rel=1e-3)
    assert decoder.adapter.fuse.out_features == 3072
