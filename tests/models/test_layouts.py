"""Autoencoders of other models: refused by what they are, in their own names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from dcdd_core.models.vae import FLUX_VAE_CONFIG, load_vae
from tests.tiny import tiny_vae

#: Stable Diffusion 1.5's and SDXL's: quant_conv, post_quant_conv and 4 channels.
STABLE_DIFFUSION = {**FLUX_VAE_CONFIG, "latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True}


def zeros(config: dict) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = AutoencoderKL.from_config(config)
    return {name: torch.zeros(value.shape, dtype=torch.bfloat16) for name, value in model.state_dict().items()}


def test_stable_diffusions_autoencoder_is_of_another_model_and_not_quantised(tmp_path: Path):
    save_file(zeros(STABLE_DIFFUSION), tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=r"vae\.safetensors .* 4, expected 16") as caught:
        load_vae(tmp_path / "vae.safetensors")
    assert "quantised" not in str(caught.value)


def test_a_convolution_called_quant_is_unexpected_and_not_quantised(tmp_path: Path):
    with_it = AutoencoderKL.from_config({**tiny_vae().config, "use_quant_conv": True, "use_post_quant_conv": True})
    save_file(with_it.state_dict(), tmp_path / "vae.safetensors")
    expected = "unexpected: post_quant_conv.bias, post_quant_conv.weight, quant_conv.bias, quant_conv.weight: give the"
    with pytest.raises(ValueError, match=expected):
        load_vae(tmp_path / "vae.safetensors", config=tiny_vae().config)


@pytest.mark.parametrize(
    ("change", "how"),
    [
        ({"encoder.conv_in.scale_weight": torch.ones(())}, r"\(it has encoder\.conv_in\.scale_weight\): scaled float8"),
        ({"scaled_fp8": torch.ones(2)}, r"\(it has scaled_fp8\): scaled float8"),
        (
            {"encoder.conv_in.bias": torch.ones(8, dtype=torch.int8)},
            r"\(it has encoder\.conv_in\.bias\): I8 without scales",
        ),
        (
            {"encoder.conv_in.weight.absmax": torch.ones(2)},
            r"\(it has encoder\.conv_in\.weight\.absmax\): bitsandbytes, 4 bits",
        ),
    ],
)
def test_a_quantised_autoencoder_is_called_so(tmp_path: Path, change: dict, how: str):
    vae = tiny_vae()
    save_file(vae.state_dict() | change, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=rf"vae\.safetensors is quantised {how}, which is not read; plain bfloat16"):
        load_vae(tmp_path / "vae.safetensors", config=vae.config)


def test_a_folder_is_read_by_its_index_and_strays_change_nothing(tmp_path: Path):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    save_file({name: value + 1 for name, value in vae.state_dict().items()}, tmp_path / "zz.safetensors")
    loaded = load_vae(tmp_path)
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in loaded.state_dict().items())
