"""What every latent codec must do, whatever its family."""

from __future__ import annotations

import pytest
import torch

from dcdd_core import registry
from dcdd_core.pipelines.load import check_codec
from dcdd_core.protocols import LatentCodec
from tests.contracts.conftest import names
from tests.tiny import tiny_decoder


@pytest.fixture(params=names(registry.codecs), scope="module")
def name(request):
    return request.param


@pytest.fixture
def codec(name, files):
    return registry.load_codec(files(name))


def images(codec, batch=2):
    return torch.rand(batch, 3, 8 * codec.factor, 6 * codec.factor, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_it_is_a_codec(codec):
    assert isinstance(codec, LatentCodec)
    assert (codec.shift is None) == (codec.scale is None)


def test_sizes_and_types(codec):
    latents = codec.encode(images(codec))
    assert latents.shape == (2, codec.channels, 8, 6) and latents.dtype == torch.float32
    painted = codec.decode(latents)
    assert painted.shape == images(codec).shape and painted.dtype == torch.float32 and painted.abs().max() <= 1


def test_a_batch_is_its_singles(codec):
    latents = codec.encode(images(codec))
    torch.testing.assert_close(codec.encode(images(codec)[1:])[0], latents[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(codec.decode(latents[1:])[0], codec.decode(latents)[1], rtol=1e-4, atol=1e-4)


def test_normalising_is_undone(codec):
    latents = codec.encode(images(codec))
    z = codec.normalize(latents)
    assert not torch.equal(z, latents)
    torch.testing.assert_close(codec.denormalize(z), latents, rtol=1e-5, atol=1e-5)
    if codec.shift is not None:
        torch.testing.assert_close(z, (latents - codec.shift) * codec.scale)


def test_hosts_can_plan_and_look(codec, name):
    assert 0 < codec.working_memory(16, 16) < codec.working_memory(64, 64)
    shown = codec.preview(codec.encode(images(codec)))
    assert shown is None or (shown.shape == images(codec).shape and shown.abs().max() <= 1)
    published = next(f for f in registry.codecs() if f.name == name).published()
    assert published.factor >= 1 and all(weight.is_meta for weight in published.model.parameters())


def test_only_its_own_files_are_read(name, files, tmp_path):
    family = next(f for f in registry.codecs() if f.name == name)
    for other in names(registry.codecs):
        assert family.reads(str(files(other))) == (other == name)
    (tmp_path / "config.json").write_text('{"_class_name": "Somebody"}')
    with pytest.raises(ValueError, match=f"{tmp_path} holds a 'Somebody'; expected an autoencoder"):
        registry.codec_family(tmp_path)


def test_a_decoder_of_other_latents_is_refused(codec, name):
    decoder = tiny_decoder(vae_factor=4) if name == "kl" else tiny_decoder()
    with pytest.raises(ValueError, match=r"this autoencoder's latents are not those the decoder paints \(.*expected"):
        check_codec(codec, decoder)
