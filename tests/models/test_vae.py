"""Autoencoders that are not the decoder's: configurations, headers and weights are compared before one is built."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from dcdd_core import registry
from dcdd_core.models import bundle as bundles
from dcdd_core.models.bundle import save_bundle
from dcdd_core.models.vae import FLUX_VAE_CONFIG, KLCodec, load_vae
from dcdd_core.pipelines.load import ModelPaths, check_codec, load_models
from dcdd_core.training.plan import Plan
from tests.tiny import fill, save_janus, tiny_decoder, tiny_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def change(folder, **values):
    """Writes other values into a folder's config.json; None takes one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))
    return path


WRONG = {
    "latent_channels": ([], {}, "16", 0, -1, 1.5, None, True, 10**9),
    "in_channels": ([], 0, 10**9),
    "out_channels": ({}, 0, 10**9),
    "layers_per_block": ([], "1", 0, 10**6),
    "norm_num_groups": ("4", 0, None),
    "block_out_channels": (8, [], {}, "88", [8, None], [8, "8"], [8, -8], [8, 10**9], [8] * 10**5, None),
    "down_block_types": ("DownEncoderBlock2D", [], [1, 2], {}, ["DownEncoderBlock2D"], None),
    "up_block_types": ([], 5, ["UpDecoderBlock2D"] * 3),
    "act_fn": (5, [], None),
    "scaling_factor": ([], "0.5", 0, -1, None, float("nan"), float("inf"), True, 10**400),
    "shift_factor": ([], "0.1", float("nan"), -float("inf"), True),
    "use_quant_conv": ("no", 1, None),
    "mid_block_add_attention": ([], 0),
    "force_upcast": ("yes",),
    "latents_mean": ([0.0] * 16,),
    "latents_std": ([1.0] * 16, "x"),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_wrong_value_in_a_configuration_is_named_at_once(folder, field, value):
    path, began = change(folder, **{field: value}), time.monotonic()
    with pytest.raises(ValueError, match=f"^{path}: {field} ") as caught:
        load_vae(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("down_block_types", ["Nothing", "Nothing"]),
        ("up_block_types", ["", ""]),
        ("act_fn", "nothing"),
        ("norm_num_groups", 3),
    ],
)
def test_what_diffusers_refuses_is_named(folder, field, value):
    path = change(folder, **{field: value})
    with pytest.raises(ValueError, match=f"^{path} cannot be read as the configuration of an AutoencoderKL") as caught:
        load_vae(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"latent_channels": 4}, "the weights have latent_channels 16, expected 4"),
        ({"block_out_channels": [8, 16]}, r"block_out_channels \[8, 8\], expected \[8, 16\]"),
        (
            {"block_out_channels": [8] * 3, "down_block_types": ["x"] * 3, "up_block_types": ["x"] * 3},
            r"block_out_channels \[8, 8\], expected \[8, 8, 8\]",
        ),
        ({"layers_per_block": 32}, "layers_per_block 1, expected 32"),
        ({"in_channels": 4}, "in_channels 3, expected 4"),
        ({"out_channels": 1}, "out_channels 3, expected 1"),
    ],
)
def test_sizes_that_are_not_the_weights_are_refused_before_it_is_built(folder, changes, says, monkeypatch):
    path = change(folder, **changes)
    monkeypatch.setattr(AutoencoderKL, "from_config", lambda *args: pytest.fail("a network was built"))
    with pytest.raises(ValueError, match=f"{folder} is not the autoencoder of {path}: .*{says}.*: use the autoencoder"):
        load_vae(folder)


def test_defaults_that_a_configuration_leaves_out_count(folder):
    change(folder, shift_factor="absent", scaling_factor="absent", latents_mean="absent", act_fn="absent")
    codec = KLCodec(load_vae(folder))
    assert (codec.shift, codec.scale) == (0.0, 0.18215)


@pytest.mark.parametrize("name", [WEIGHTS, "diffusion_pytorch_model.fp16.safetensors"])
def test_the_configuration_beside_a_file_counts(folder, name):
    change(folder, shift_factor=0.0609, scaling_factor=1.5305)
    (folder / WEIGHTS).rename(folder / name)
    codec = KLCodec(load_vae(folder / name))
    assert (codec.shift, codec.scale) == (0.0609, 1.5305)
    with pytest.raises(
        ValueError, match=r"shift 0.0609, scale 1.5305; expected .* shift 0.1, scale 0.5\): use the auto"
    ):
        check_codec(codec, tiny_decoder())
    change(folder, _class_name="AutoencoderTiny")
    with pytest.raises(ValueError, match="holds a 'AutoencoderTiny'; expected an AutoencoderKL"):
        load_vae(folder / name)


def test_a_configuration_beside_another_file_does_not_count(folder):
    (folder / WEIGHTS).rename(folder / "ae.safetensors")
    change(folder, _class_name="Somebody")
    load_vae(folder / "ae.safetensors", config=tiny_vae().config)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"scaling_factor": "1.5305"}, "its header says scaling_factor 1.5305, expected 0.5"),
        ({"shift_factor": "0.0609"}, "shift_factor 0.0609, expected 0.1"),
        ({"latent_channels": "4"}, "latent_channels 4.0, expected 16"),
        ({"scaling_factor": "much"}, "scaling_factor 'much', expected 0.5"),
        ({"scaling_factor": "nan"}, "scaling_factor nan, expected 0.5"),
        ({"config": json.dumps({"scaling_factor": 0.13})}, "scaling_factor 0.13, expected 0.5"),
        ({"config": json.dumps({"vae": {"shift_factor": 0.2}})}, "shift_factor 0.2, expected 0.1"),
        ({"config": json.dumps({"scaling_factor": []})}, r"scaling_factor \[\], expected 0.5"),
        ({"config": "[]"}, "holds a list, expected a header with the configuration as JSON"),
        ({"config": "[" * 200_000}, "cannot be read as a header with the configuration as JSON"),
    ],
)
def test_what_a_header_says_is_compared(tmp_path, metadata, says):
    path = tmp_path / "ae.safetensors"
    save_file(tiny_vae().state_dict(), path, metadata=metadata)
    with pytest.raises(ValueError, match=f"^{path}.*{says}") as caught:
        load_vae(path, config=tiny_vae().config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"scaling_factor": "0.5", "shift_factor": "0.1", "latent_channels": "16"},
        {"config": json.dumps({"vae": {"scaling_factor": 0.50001}})},
        {"scaling_factor": "0.5", "title": "scaling_factor 7"},
    ],
)
def test_a_header_that_agrees_is_accepted(tmp_path, metadata):
    save_file(tiny_vae().state_dict(), tmp_path / "ae.safetensors", metadata=metadata)
    assert KLCodec(load_vae(tmp_path / "ae.safetensors", config=tiny_vae().config)).scale == 0.5


def test_the_published_configuration_is_one():
    with torch.device("meta"):
        assert KLCodec(AutoencoderKL.from_config(dict(FLUX_VAE_CONFIG))).scale == 0.3611


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(folder, value):
    tensors = load_file(folder / WEIGHTS)
    tensors["decoder.conv_in.weight"][0, 0, 0, 0] = value
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match="holds values of decoder.conv_in.weight that are not finite"):
        load_vae(folder)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "device.safetensors").symlink_to("/dev/zero")
    for name in ("pipe.safetensors", "device.safetensors"):
        with pytest.raises(ValueError, match=f"{name} is a device, pipe or socket"):
            registry.load_codec(tmp_path / name)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "config.json")
    with pytest.raises(ValueError, match="config.json is a device, pipe or socket"):
        registry.load_codec(tmp_path / "folder")


# --- against the card -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def janus(tmp_path_factory):
    return save_janus(tmp_path_factory.mktemp("janus") / "tiny")


def vae_of(folder, **changes):
    """An autoencoder's folder with other values than `tiny_vae`."""
    config = {name: value for name, value in tiny_vae().config.items() if not name.startswith("_")}
    fill(AutoencoderKL(**(config | changes))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shift_factor": 0.2}, "shift 0.2, scale 0.5; expected .* shift 0.1, scale 0.5"),
        ({"shift_factor": None}, "shift 0.0, scale 0.5; expected .* shift 0.1, scale 0.5"),
        ({"scaling_factor": 0.3611}, "shift 0.1, scale 0.3611; expected .* shift 0.1, scale 0.5"),
        (
            {
                "block_out_channels": [8] * 3,
                "down_block_types": ["DownEncoderBlock2D"] * 3,
                "up_block_types": ["UpDecoderBlock2D"] * 3,
            },
            "at 1/4 of the image size.*; expected at 1/2 of",
        ),
        ({"latent_channels": 4}, "4 channels at .*; expected 16 channels at"),
    ],
)
def test_another_autoencoder_is_refused_with_the_values_of_both(tmp_path, janus, monkeypatch, changes, says):
    save_bundle(tmp_path / "d.safetensors", tiny_decoder(), dtype=torch.float32)
    paths = {"vlm": janus, "decoder": tmp_path / "d.safetensors"}
    if "latent_channels" not in changes:  # The card says nothing of these: they are known when the decoder is built.
        monkeypatch.setattr(bundles, "fill_decoder", lambda *args, **options: pytest.fail("the decoder was read"))
    with pytest.raises(ValueError, match=rf"this autoencoder's latents are not .*{says}.*use the autoencoder that"):
        load_models(ModelPaths(**paths, vae=vae_of(tmp_path / "vae", **changes)), with_sampler=False)


def test_the_cards_own_autoencoder_is_loaded(tmp_path, janus):
    save_bundle(tmp_path / "d.safetensors", tiny_decoder(), dtype=torch.float32)
    rounded = float(torch.tensor(0.1))  # through float32
    paths = {"vlm": janus, "decoder": tmp_path / "d.safetensors"}
    models = load_models(ModelPaths(**paths, vae=vae_of(tmp_path / "vae", shift_factor=rounded)), with_sampler=False)
    assert models.codec.scale == 0.5


def test_numbers_that_went_through_float32_are_the_same():
    class Rounded:
        channels, factor, shift, scale = 16, 2, float(torch.tensor(0.1)), float(torch.tensor(13.0254))

    assert abs(Rounded.scale - 13.0254) > 1e-7
    check_codec(Rounded(), tiny_decoder(vae_scale=13.0254))


def test_an_autoencoder_of_another_kind_is_told_by_its_numbers():
    class Other:
        channels, factor, shift, scale = 16, 2, None, None

    with pytest.raises(ValueError, match="shift None, scale None; .*autoencoders of a kind without these two numbers"):
        check_codec(Other(), tiny_decoder())


# --- in training ------------------------------------------------------------------------------------------------------


def plan_of(tmp_path, janus, *, bundle=False, **changes):
    """What trains a decoder over `tiny_decoder`'s base, or from its bundle, with an autoencoder of other values."""
    decoder = tiny_decoder()
    decoder.transformer.save_pretrained(tmp_path / "base")
    save_bundle(tmp_path / "d.safetensors", decoder, dtype=torch.float32)
    start = {"bundle": tmp_path / "d.safetensors"} if bundle else {"base": tmp_path / "base"}
    return Plan(vlm=janus, vae=vae_of(tmp_path / "vae", **changes), variant="lcdm", **start)


@pytest.mark.parametrize("bundle", [False, True])
def test_training_takes_the_right_autoencoder(tmp_path, janus, bundle):
    plan = plan_of(tmp_path, janus, bundle=bundle)
    card = plan.decoder(plan.encoders("cpu")).card
    assert (card.vae_shift, card.vae_scale, card.vae_factor) == (0.1, 0.5, 2)


THREE = {
    "block_out_channels": [8] * 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}


@pytest.mark.parametrize(
    ("bundle", "changes", "says"),
    [
        (
            True,
            {"shift_factor": 0.2},
            "shift 0.2, scale 0.5; expected .* shift 0.1, scale 0.5.*d.safetensors was trained",
        ),
        (True, {"scaling_factor": 0.3611}, "scale 0.3611; expected .* scale 0.5.*d.safetensors was trained with"),
        (True, {"latent_channels": 4}, "4 channels at .*; expected 16 channels at.*d.safetensors was trained with"),
        (True, THREE, "at 1/4 of .*; expected 16 channels at 1/2.*d.safetensors was trained with"),
        (False, {"latent_channels": 4}, "4 channels at .*; expected 16 channels at.*whose latents base paints"),
        (False, THREE, "144 input channels, expected 128 of latents and 64 of a mask at 4 pixels a latent"),
    ],
)
def test_training_refuses_another_autoencoder(tmp_path, janus, bundle, changes, says):
    plan = plan_of(tmp_path, janus, bundle=bundle, **changes)
    with pytest.raises(ValueError, match=says):
        plan.decoder(plan.encoders("cpu"))


def test_a_network_with_another_input_for_masks_is_refused_when_it_is_loaded():
    codec = KLCodec(fill(AutoencoderKL.from_config(dict(tiny_vae().config) | THREE)))
    with pytest.raises(ValueError, match="144 input channels, expected .* 64 of a mask.*base_config and vae_factor"):
        check_codec(codec, tiny_decoder(vae_factor=4))
