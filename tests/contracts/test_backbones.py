"""What every diffusion backbone must do, whatever its family."""

from __future__ import annotations

import json

import pytest
import torch

from dcdd_core import registry
from dcdd_core.models.bundle import DecoderOptions, load_decoder, save_bundle
from dcdd_core.models.card import DecoderCard
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.protocols import Backbone, BackboneFamily
from tests.contracts.conftest import names
from tests.tiny import fill, tiny_condition

SIZE, FACTOR = (8, 8), 2


@pytest.fixture(params=names(registry.backbones), scope="module")
def name(request):
    return request.param


@pytest.fixture
def family(name):
    return next(f for f in registry.backbones() if f.name == name)


@pytest.fixture
def decoder(family, files, name):
    config = family.config_of(str(files(name)))
    card = DecoderCard(
        base=family.published_name,
        base_config=config,
        tokenizer="tiny",
        codebook=tiny_condition().codebook,
        code_dim=8,
        width=16,
        resolution=16,
        pixels_per_token=4,
        vae_factor=FACTOR,
    )
    return fill(DistributionConditionedDecoder.build(card))


def latents(backbone, batch=2, seed=0):
    return torch.randn(batch, backbone.latent_channels, *SIZE, generator=torch.Generator().manual_seed(seed))


def mask(batch=1):
    area = torch.zeros(batch, 1, SIZE[0] * FACTOR, SIZE[1] * FACTOR)
    area[..., : SIZE[0]] = 1
    return area


@torch.no_grad()
def velocity(decoder, t=(0.3, 0.8), *, x=None, area=None, given=None, condition=None):
    backbone = decoder.backbone
    x = latents(backbone) if x is None else x
    area, given = mask() if area is None else area, latents(backbone, 1, 1) if given is None else given
    condition = tiny_condition(len(x)) if condition is None else condition
    decoder.prepare(sorted(set(t), reverse=True))
    found = decoder(
        backbone.pack(x),
        backbone.context(given, area, FACTOR),
        decoder.condition_tokens(condition, SIZE),
        torch.tensor(t),
        SIZE,
    )
    return backbone.unpack(found, SIZE)


def test_it_is_a_backbone_of_its_family(decoder, family):
    assert isinstance(decoder.backbone, Backbone) and isinstance(family, BackboneFamily)
    assert registry.backbone_family(decoder.card.base_config) is family
    assert decoder.transformer is decoder.backbone.model
    found = [block for name in decoder.backbone.block_names for block in getattr(decoder.transformer, name)]
    assert list(decoder.backbone.blocks) == found and found


def test_packing_is_undone(decoder):
    backbone = decoder.backbone
    packed = backbone.pack(latents(backbone))
    assert packed.shape[1] == SIZE[0] * SIZE[1] // backbone.patch**2
    assert torch.equal(backbone.unpack(packed, SIZE), latents(backbone))
    assert decoder.condition_tokens(tiny_condition(), SIZE).shape == (2, packed.shape[1], backbone.token_width)


def test_velocity_has_the_latents_shape_and_reads_everything(decoder):
    found = velocity(decoder)
    assert found.shape == latents(decoder.backbone).shape and bool(found.isfinite().all())
    backbone = decoder.backbone
    for changed in (
        {"x": latents(backbone, seed=7)},
        {"t": (0.4, 0.9)},
        {"area": torch.ones_like(mask())},
        {"given": latents(backbone, 1, 9)},
        {"condition": tiny_condition(seed=3)},
    ):
        assert (velocity(decoder, **changed) - found).abs().max() > 1e-4, changed.keys()


def test_a_batch_is_its_singles(decoder):
    found = velocity(decoder)
    for k in range(2):
        condition = tiny_condition().part(k, k + 1)
        single = velocity(decoder, (0.3, 0.8)[k : k + 1], x=latents(decoder.backbone)[k : k + 1], condition=condition)
        torch.testing.assert_close(single[0], found[k], rtol=1e-4, atol=1e-5)


def test_an_untrained_adapter_adds_nothing(decoder):
    torch.nn.init.zeros_(decoder.adapter.fuse.weight)
    torch.nn.init.zeros_(decoder.adapter.fuse.bias)
    assert torch.equal(velocity(decoder), velocity(decoder, condition=tiny_condition(seed=3)))


@torch.no_grad()
def test_a_null_condition_starts_as_the_base_model_and_is_read(decoder, monkeypatch):
    def without():
        with monkeypatch.context() as patch:
            patch.setattr(decoder, "condition_tokens", decoder.null_tokens)
            return velocity(decoder)

    decoder.adapter.keep_null(True)
    with_it, new = velocity(decoder), without()
    assert decoder.null_tokens(tiny_condition(), SIZE).shape == decoder.condition_tokens(tiny_condition(), SIZE).shape
    decoder.adapter.null.token.copy_(torch.linspace(-1, 1, decoder.backbone.token_width))  # norms take a mean away
    assert (without() - new).abs().max() > 1e-4 and (with_it - new).abs().max() > 1e-4
    torch.nn.init.zeros_(decoder.adapter.fuse.weight)
    torch.nn.init.zeros_(decoder.adapter.fuse.bias)
    assert torch.equal(velocity(decoder), new)


def test_what_is_unused_cannot_reach_the_output(decoder):
    before, reached = velocity(decoder), []
    for name, weight in decoder.transformer.named_parameters():
        kept = weight.clone()
        with torch.no_grad():
            weight.fill_(torch.nan)
            if bool(velocity(decoder).isnan().any()) == decoder.backbone.unused(name):
                reached.append(name)
            weight.copy_(kept)
    assert not reached, f"of these, `unused` says the opposite of what is so: {reached}"
    decoder.backbone.drop_unused()
    assert torch.equal(velocity(decoder), before)
    assert not any(decoder.backbone.unused(name) for name, _ in decoder.transformer.named_parameters())


def test_what_is_trained(decoder):
    backbone, everything = decoder.backbone, set(dict(decoder.transformer.named_parameters()))
    some, most = set(backbone.trained_names("attention")), set(backbone.trained_names("all"))
    assert some and some < most <= everything
    assert most == {name for name in everything if not backbone.unused(name)}
    layers = dict(decoder.transformer.named_modules())
    assert all(isinstance(layers[name], torch.nn.Linear) for name in backbone.lora_layers())
    assert backbone.lora_layers()
    with pytest.raises(ValueError, match="'nothing'"):
        backbone.trained_names("nothing")


def test_a_bundle_brings_it_back(decoder, tmp_path):
    save_bundle(tmp_path / "d.safetensors", decoder, dtype=torch.float32)
    exact = velocity(decoder)
    whole = load_decoder(tmp_path / "d.safetensors", options=DecoderOptions(fold=False))
    assert torch.equal(velocity(whole), exact)
    painting = load_decoder(tmp_path / "d.safetensors")
    torch.testing.assert_close(velocity(painting), exact, rtol=1e-4, atol=1e-5)
    half = load_decoder(tmp_path / "d.safetensors", options=DecoderOptions(dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    if painting.backbone.folded:
        with pytest.raises(ValueError, match="fold=False"):
            save_bundle(tmp_path / "never.safetensors", painting)


def test_a_bundle_may_leave_the_base_in_its_own_files(decoder, family, files, name, tmp_path):
    save_bundle(tmp_path / "d.safetensors", decoder, trained=lambda name: False, dtype=torch.float32)
    with pytest.raises(ValueError, match=f"needs its base model {family.published_name}"):
        load_decoder(tmp_path / "d.safetensors")
    over = load_decoder(tmp_path / "d.safetensors", files(name))
    assert bool(velocity(over).isfinite().all())
    with pytest.raises(ValueError, match=r"none|no model"):
        load_decoder(tmp_path / "d.safetensors", tmp_path / "none")


def test_hosts_can_plan(decoder):
    backbone = decoder.backbone
    assert 0 < backbone.working_memory(1, SIZE) < backbone.working_memory(2, SIZE)
    assert isinstance(backbone.default_shift(576, 30), float)


def test_the_published_configuration_builds_on_meta(family):
    with torch.device("meta"):
        backbone = registry.build_backbone(family.config_of(None))
    assert all(weight.is_meta for weight in backbone.model.parameters())
    assert family.published_name and family.codec


def test_an_unknown_network_is_named():
    with pytest.raises(ValueError, match=r"'Somebody'; known are .*FluxTransformer2DModel"):
        registry.backbone_family({"_class_name": "Somebody"})


def test_a_base_is_found_by_its_configuration(family, files, name, tmp_path):
    assert registry.base_family(files(name)) is family
    with pytest.raises(ValueError, match="none does not exist: give the folder or file"):
        registry.base_family(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"_class_name": "Somebody"}')
    with pytest.raises(ValueError, match="config.json: the decoder's network is a 'Somebody'; known are"):
        registry.base_family(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "x" * 10**6}))
    with pytest.raises(ValueError, match="config.json: .*xxx") as caught:
        registry.base_family(tmp_path)
    assert len(str(caught.value)) < 1000


def test_the_codec_of_a_backbone_must_be_known(family, monkeypatch):
    config = family.config_of(None)
    assert registry.codec_of(config).name == family.codec
    monkeypatch.setattr(type(family), "codec", "nobody's")
    with pytest.raises(ValueError, match="codec \"nobody's\"; known are .*'kl'"):
        registry.codec_of(config)
