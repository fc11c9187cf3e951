"""The decoder against diffusers' own forward pass, and its bundles."""

import json
import os
import time
from dataclasses import asdict, fields
from math import inf, nan

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dcdd_core.method.latents import position_ids
from dcdd_core.models.backbones.flux_fill.backbone import FluxFill
from dcdd_core.models.backbones.flux_fill.inference import of_text_stream
from dcdd_core.models.bundle import DecoderOptions, load_decoder, read_card, save_bundle
from dcdd_core.models.card import DecoderCard, ServedGuidance
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.types import Calibration, DCDDWarning
from dcdd_pico.embedded import model_paths
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
    with pytest.raises(ValueError, match="d.safetensors cannot be read as a decoder's card"):
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


#: What may stand in a damaged card in the place of a value, by a name.
WRONG = {
    "list": [],
    "object": {},
    "text": "5",
    "true": True,
    "null": None,
    "NaN": nan,
    "infinity": inf,
    "-infinity": -inf,
    "negative": -1,
    "zero": 0,
    "fraction": 2.5,
    "long number": 10**400,
    "nested": [[[[]]]],
}
#: Where it is a value that a card may have.
FINE = {
    "base": {"text"},
    "tokenizer": {"text"},
    "codebook": {"text"},
    "licence": {"text"},
    "calibration": {"null"},
    "vae_shift": {"negative", "zero", "fraction"},
    "vae_scale": {"fraction"},
    "pixels_per_token": {"fraction"},
    "shift": {"null", "negative", "zero", "fraction"},
    "guidance": {"zero", "fraction"},
    "distribution_guidance": {"null"},
    "condition_dropout": {"zero"},
    "distilled": {"null"},
}


CARD = asdict(tiny_card())


def with_card(path, values, tensors=None):
    """A bundle with these values in its card, or this text as its card."""
    card = values if isinstance(values, str) else json.dumps(values)
    save_file(tensors or {"a": torch.zeros(1)}, path, metadata={"format": "dcdd decoder 1", "card": card})
    return path


@pytest.mark.parametrize("field", [field.name for field in fields(DecoderCard)])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_value_in_a_card_is_named(tmp_path, field, wrong):
    path = with_card(tmp_path / "d.safetensors", CARD | {field: WRONG[wrong]})
    if wrong in FINE.get(field, ()):
        assert getattr(read_card(path), field) == WRONG[wrong]
        return
    if (field, wrong) == ("base_config", "object"):
        with pytest.raises(
            ValueError,
            match="card of .*d.safetensors .*: base_config is not a FLUX transformer's: it lacks .*num_.*again",
        ):
            load_decoder(path)
        return
    with pytest.raises(ValueError, match=f"d.safetensors .*{field}.*(got|and).*; download the bundle again") as caught:
        read_card(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("shift", [None, 1.5])
def test_a_card_keeps_its_distribution_guidance(tmp_path, shift):
    served = ServedGuidance(strength=0.2, shift=shift)
    save_bundle(tmp_path / "d.safetensors", tiny_decoder(distribution_guidance=served))
    assert read_card(tmp_path / "d.safetensors") == tiny_card(distribution_guidance=served)


def test_a_card_without_distribution_guidance_is_written_as_before(tmp_path):
    path = tmp_path / "d.safetensors"
    save_bundle(path, tiny_decoder())
    with safe_open(path, "pt") as file:
        assert "distribution_guidance" not in json.loads(file.metadata()["card"])
    assert read_card(path) == tiny_card() and read_card(path).distribution_guidance is None


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"strength": 0.2},
        {"strength": 0.2, "shift": 1, "every": 2},
        {"strength": -1, "shift": None},
        {"strength": 11, "shift": None},
        {"strength": nan, "shift": 1},
        {"strength": 0.1, "shift": 1000},
        0.2,
    ],
    ids=str,
)
def test_wrong_distribution_guidance_in_a_card_is_named(tmp_path, wrong):
    path = with_card(tmp_path / "d.safetensors", CARD | {"distribution_guidance": wrong})
    with pytest.raises(ValueError, match=r"card of .*distribution_guidance .* got .*; download the bundle again"):
        read_card(path)


def test_a_card_keeps_its_condition_guidance(tmp_path):
    served = {"condition_dropout": 0.1, "condition_guidance": 2.5}
    save_bundle(tmp_path / "d.safetensors", tiny_decoder(**served))
    assert read_card(tmp_path / "d.safetensors") == tiny_card(**served)
    assert tiny_card(condition_dropout=0.1).condition_guidance == 1


def test_a_card_of_a_decoder_that_saw_all_conditions_is_written_as_before(tmp_path):
    path = tmp_path / "d.safetensors"
    save_bundle(path, tiny_decoder())
    with safe_open(path, "pt") as file:
        assert not [name for name in json.loads(file.metadata()["card"]) if name.startswith("condition_")]
        assert not [name for name in file.keys() if "null" in name]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"condition_dropout": 1}, r"condition_dropout .* of at least 0 and below 1, got 1"),
        ({"condition_guidance": 2.0}, "condition_guidance must be 1, which is off, got 2: .*without its condition"),
        ({"condition_dropout": 0.1, "condition_guidance": 20.5}, r"condition_guidance .* in 0\.\.20.*, got 20.5"),
    ],
    ids=str,
)
def test_wrong_condition_guidance_in_a_card_is_named(tmp_path, wrong, words):
    path = with_card(tmp_path / "d.safetensors", CARD | wrong)
    with pytest.raises(ValueError, match=f"card of .*{words}.*; download the bundle again"):
        read_card(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bundle_keeps_its_null_condition(tmp_path, dtype):
    decoder, path = tiny_decoder(condition_dropout=0.1), tmp_path / "d.safetensors"
    save_bundle(path, decoder, dtype=dtype)
    again = load_decoder(path)
    tokens = decoder.null_tokens(tiny_condition(2), SIZE)
    assert tokens.shape == (2, 16, 32) and tokens.abs().min() > 0.1
    assert torch.equal(again.null_tokens(tiny_condition(2), SIZE), tokens.to(dtype))
    tensors = load_file(path)
    del tensors["adapter.null.token"]
    with_card(path, asdict(decoder.card), tensors)
    with pytest.raises(ValueError, match=r"d.safetensors does not fit .*; missing: adapter.null.token"):
        load_decoder(path)
    with_card(path, asdict(tiny_card()), load_file(path) | {"adapter.null.token": torch.zeros(32)})
    with pytest.raises(ValueError, match=r"unexpected: adapter.null.token"):
        load_decoder(path)


@pytest.mark.parametrize("field", ["scale", "target", "converged", "vlm", "guidance"])
@pytest.mark.parametrize("wrong", ["list", "object", "NaN", "infinity", "long number"])
def test_a_wrong_value_in_a_cards_calibration_is_named(tmp_path, field, wrong):
    values = asdict(tiny_card())
    values["calibration"][field] = WRONG[wrong]
    path = with_card(tmp_path / "d.safetensors", values)
    with pytest.raises(ValueError, match=f"d.safetensors .*calibration {field} must .*; download the bundle again"):
        read_card(path)


@pytest.mark.parametrize("card", ["", "[]", "5", "null", "{", '{"base": ', "[" * 200_000, '{"a":' * 200_000, "{}"])
def test_a_damaged_card_is_named(tmp_path, card):
    path = with_card(tmp_path / "d.safetensors", card)
    with pytest.raises(ValueError, match="d.safetensors") as caught:
        read_card(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert "update" not in str(caught.value)


@pytest.mark.parametrize("read", [read_card, load_decoder])
def test_a_pipe_as_a_bundle_is_refused(tmp_path, read):
    os.mkfifo(tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="d.safetensors is a device, pipe or socket; expected a DCDD decoder bundle"):
        read(tmp_path / "d.safetensors")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_layers": 10**6}, r"num_layers must be a whole number in 0\.\.64, got 1000000"),
        ({"num_single_layers": 10**6}, "num_single_layers must be a whole number in"),
        ({"num_layers": "2"}, "num_layers must be a whole number in .*got '2'"),
        ({"num_layers": 1.0}, "num_layers must be a whole number"),
        ({"num_layers": True}, "num_layers must be a whole number"),
        ({"num_layers": None}, "num_layers must be a whole number"),
        ({"num_attention_heads": 10**9}, "num_attention_heads must be"),
        ({"attention_head_dim": 0}, "attention_head_dim must be"),
        ({"attention_head_dim": [16]}, "attention_head_dim must be"),
        ({"in_channels": 10**12}, "in_channels must be"),
        ({"out_channels": 2**40}, "out_channels must be"),
        ({"out_channels": 62}, "out_channels must be a multiple of 4, got 62"),
        ({"joint_attention_dim": 10**9}, "joint_attention_dim must be"),
        ({"pooled_projection_dim": -1}, "pooled_projection_dim must be"),
        ({"patch_size": 0}, "patch_size must be"),
        ({"guidance_embeds": "yes"}, "guidance_embeds must be true or false, got 'yes'"),
        ({"axes_dims_rope": [4, 6]}, "axes_dims_rope must be three even numbers.*attention_head_dim, 16, got"),
        ({"axes_dims_rope": [5, 5, 6]}, "axes_dims_rope must be"),
        ({"axes_dims_rope": [4, 6, 8]}, "axes_dims_rope must be"),
        ({"axes_dims_rope": ["4", 6, 6]}, "axes_dims_rope must be"),
        ({"axes_dims_rope": {}}, "axes_dims_rope must be"),
        ({"strange": 1}, "it lacks nothing and has .*strange.* more"),
    ],
)
def test_sizes_that_no_network_has_are_refused_at_once(tmp_path, changes, says):
    values = asdict(tiny_card())
    values["base_config"] |= changes
    path = with_card(tmp_path / "d.safetensors", values)
    began = time.monotonic()
    with pytest.raises(
        ValueError, match=f"card of .*d.safetensors cannot be used: base_config.*{says}.*; download the bundle again"
    ):
        load_decoder(path)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_layers": 64, "num_single_layers": 128}, "needs its base model tiny"),
        ({"num_layers": 0}, "unexpected: transformer.transformer_blocks.0"),
        ({"in_channels": 192}, r"x_embedder.weight is \[32, 144\], expected \[32, 192\]"),
    ],
)
def test_sizes_that_are_not_the_files_are_refused(tmp_path, changes, says):
    path = tmp_path / "d.safetensors"
    save_bundle(path, tiny_decoder())
    values = asdict(tiny_card())
    values["base_config"] |= changes
    with pytest.raises(ValueError, match=f"d.safetensors.*{says}"):
        load_decoder(with_card(path, values, load_file(path)))


@pytest.mark.parametrize(
    ("changes", "name"), [({"width": 2**16}, "adapter.fuse"), ({"code_dim": 9}, "adapter.project")]
)
def test_an_adapter_of_other_sizes_is_refused(tmp_path, changes, name):
    path = tmp_path / "d.safetensors"
    save_bundle(path, tiny_decoder())
    with pytest.raises(ValueError, match=f"d.safetensors.*wrong shape: .*{name}"):
        load_decoder(with_card(path, asdict(tiny_card()) | changes, load_file(path)))


def test_a_mask_of_another_scale_is_refused_in_words():
    decoder = tiny_decoder(vae_factor=4)
    with pytest.raises(ValueError, match="144 input channels, expected 128 of latents and 64 of a mask at 4 pixels"):
        decoder.backbone.context(torch.zeros(1, 16, 4, 4), torch.ones(1, 1, 16, 16), 4)


# --- damage -----------------------------------------------------------------------------------------------------------


def offset_of(path, name):
    """Where in a safetensors file a tensor begins."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return 8 + length + json.loads(content[8 : 8 + length])[name]["data_offsets"][0]


@pytest.mark.parametrize(
    "name", ["adapter.fuse.weight", "transformer.proj_out.bias", "transformer.norm_out.linear.bias"]
)
def test_a_flipped_bit_in_a_bundle_is_named(tmp_path, name):
    path = tmp_path / "d.safetensors"
    save_bundle(path, tiny_decoder())
    load_decoder(path)
    place, content = offset_of(path, name), bytearray(path.read_bytes())
    for bit in (0, 3):
        content[place + 2] ^= 1 << bit
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"d.safetensors is damaged: {name} is not what was written.*another copy"
        ):
            load_decoder(path)
        content[place + 2] ^= 1 << bit
    path.write_bytes(content)
    load_decoder(path)


def test_a_bundle_from_before_the_checksums_loads(tmp_path):
    decoder, path = tiny_decoder(), tmp_path / "d.safetensors"
    save_bundle(path, decoder, dtype=torch.float32)
    with_card(path, asdict(decoder.card), load_file(path))
    assert_same_without_text(decoder, load_decoder(path, options=DecoderOptions(fold=False)))
    load_decoder(model_paths()["decoder"])


def test_a_tensor_that_was_taken_out_of_a_bundle_is_named(tmp_path):
    decoder, path = tiny_decoder(), tmp_path / "d.safetensors"
    decoder.transformer.save_pretrained(tmp_path / "base")
    save_bundle(path, decoder)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    del tensors["transformer.proj_out.bias"]  # The base has one too.
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match="d.safetensors is damaged: it lacks .*transformer.proj_out.bias"):
        load_decoder(path, tmp_path / "base")


@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("name", ["adapter.fuse.weight", "transformer.norm_out.linear.weight"])
def test_weights_that_are_not_finite_are_refused(tmp_path, name, value):
    decoder, path = tiny_decoder(), tmp_path / "d.safetensors"
    save_bundle(path, decoder)
    tensors = load_file(path)
    tensors[name][0, 1] = value
    with_card(path, asdict(decoder.card), tensors)
    with pytest.raises(ValueError, match=f"d.safetensors holds NaN or infinity in {name}: its training diverged"):
        load_decoder(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", ["adapter.fuse.weight", "transformer.transformer_blocks.0.attn.to_q.weight"])
def test_weights_that_are_no_floats_are_refused(tmp_path, name, dtype):
    path = tmp_path / "d.safetensors"
    save_bundle(path, tiny_decoder())
    tensors = load_file(path)
    tensors[name] = tensors[name].to(dtype)
    try:
        with_card(path, asdict(tiny_card()), tensors)
    except KeyError:
        pytest.skip(f"this safetensors cannot write {dtype}")
    with pytest.raises(ValueError, match=f"d.safetensors holds {name} in {str(dtype)[6:]}, expected floating-point"):
        load_decoder(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e4m3fn])
def test_every_float_is_read(tmp_path, dtype):
    path = tmp_path / "d.safetensors"
    save_bundle(path, tiny_decoder(), dtype=dtype)
    assert load_decoder(path, options=DecoderOptions(dtype=torch.float32)).dtype == torch.float32


def test_weights_that_diverged_are_not_written(tmp_path):
    decoder, path = tiny_decoder(), tmp_path / "d.safetensors"
    with torch.no_grad():
        decoder.adapter.fuse.weight[0, 0] = 1e6
    save_bundle(path, decoder)
    path.unlink()
    with pytest.raises(
        ValueError, match="was not written: .*adapter.fuse.weight.*infinity in float16: the training div"
    ):
        save_bundle(path, decoder, dtype=torch.float16)
    assert not path.exists()


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


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_it_computes_where_its_resident_weights_are(dropout):
    """A host may keep any linear layer elsewhere until its turn, also the adapter's first one, and in other dtypes."""
    decoder, seen = tiny_decoder(condition_dropout=dropout), []
    for layer in decoder.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight = torch.nn.Parameter(layer.weight.to("meta", torch.float8_e4m3fn), requires_grad=False)
    assert (decoder.device, decoder.dtype) == (torch.device("cpu"), torch.float32)
    decoder.backbone.prepare = lambda times, like, on_layer: seen.append(like.device.type)
    decoder.prepare([1.0, 0.5])
    assert seen == ["cpu"]


def test_a_base_that_is_not_used_is_said(tmp_path):
    path = tmp_path / "whole.safetensors"
    save_bundle(path, tiny_decoder())
    with pytest.warns(DCDDWarning, match=f"whole.safetensors holds all weights: {tmp_path / 'base'} is not used"):
        load_decoder(path, tmp_path / "base")
