"""Small latent decoders in the place of an autoencoder's: scale, gradients, and what is refused."""

import json

import pytest
import torch

from dcdd_core.models.cheap_decoder import load_cheap_decoder
from dcdd_core.models.vae import KLCodec
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.pipelines.condition import discrete_condition
from dcdd_core.pipelines.guided import sharpen, token_guide
from tests.tiny import tiny_vae, tiny_vq
from tests.tiny_pipelines import tiny_autoencoder


@pytest.fixture
def folder(tmp_path):
    tiny_autoencoder(16).save_pretrained(tmp_path / "taef1")
    return tmp_path / "taef1"


def test_it_decodes_normalised_latents_in_its_own_scale(folder):
    decoder, model = load_cheap_decoder(folder), tiny_autoencoder(16)
    z = torch.randn(2, 16, 5, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.decode(z / 2 + 0.25).sample.clamp(-1, 1)  # scaling_factor 2, shift_factor .25
    torch.testing.assert_close(decoder(z), expected)
    assert decoder(z).shape == (2, 3, 10, 14) and expected.std() > 0.05
    half = load_cheap_decoder(folder, dtype=torch.bfloat16)(z)
    assert half.dtype == torch.float32 and (half - expected).abs().max() < 0.1


def test_guidance_sees_through_it(folder):
    tokenizer, codec = VQTokenizer(tiny_vq(), name="tiny"), KLCodec(tiny_vae().requires_grad_(False))
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    condition = discrete_condition(tokenizer.encode(pixels), tokenizer.codebook)
    exact, cheap = (
        token_guide(tokenizer, codec, condition, scale=20.0, decode=decode)
        for decode in (None, load_cheap_decoder(folder))
    )
    assert torch.equal(exact.soft, cheap.soft)
    assert not torch.equal(exact.gradient(exact.soft), cheap.gradient(cheap.soft))
    assert (cheap.loss(sharpen(cheap, cheap.soft, steps=3)) < cheap.loss(cheap.soft)).all()


def test_latents_of_other_channels_are_refused_with_both_numbers(folder, tmp_path):
    decoder = load_cheap_decoder(folder)
    decoder.require_for(KLCodec(tiny_vae()))
    with pytest.raises(ValueError, match="reads 16 channels, but the latents have 4: use the one of this autoencoder"):
        decoder(torch.zeros(1, 4, 8, 8))
    tiny_autoencoder(4).save_pretrained(tmp_path / "taesd")
    with pytest.raises(ValueError, match="reads 4 channels, but the latents have 16"):
        load_cheap_decoder(tmp_path / "taesd").require_for(KLCodec(tiny_vae()))


def test_what_is_none_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        load_cheap_decoder(tmp_path / "nowhere")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"decoder_block_out_channels": [8, 4]}))
    with pytest.raises(ValueError, match="taef1 "):
        load_cheap_decoder(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_decoder_blocks": [2, 1]}))
    with pytest.raises(ValueError, match="does not fit AutoencoderTiny"):
        load_cheap_decoder(folder)
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKL"}))
    with pytest.raises(ValueError, match="taef1 holds a 'AutoencoderKL'; expected a small latent decoder"):
        load_cheap_decoder(folder)


def test_pixels_that_are_not_finite_are_refused(folder):
    decoder = load_cheap_decoder(folder)
    with torch.no_grad():
        decoder.model.decoder.layers[-1].bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="small latent decoder makes NaN"):
        decoder(torch.zeros(1, 16, 4, 4))
