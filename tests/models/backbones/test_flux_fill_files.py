"""FLUX files in every layout against the weights that they were written from; nothing here may reach the network."""

import json
import re
import socket
from collections import Counter

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import save_file

from dcdd_core.models.backbones.flux_fill.files import (
    FLUX_FILL_CONFIG,
    find_transformer,
    transformer_layout,
)
from dcdd_core.models.bundle import DecoderOptions, load_decoder, save_bundle
from dcdd_core.models.vae import FLUX_VAE_CONFIG, autoencoder_layout, load_vae, read_autoencoder
from tests.tiny import assert_same_without_text, fill, tiny_condition, tiny_decoder, tiny_flux_config, tiny_vae


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("loading a file reached for the network")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.fixture(scope="module")
def decoder():
    return tiny_decoder()


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


@pytest.fixture
def bundle(tmp_path, decoder):
    """A bundle of the adapter alone: every weight of the transformer comes from its base."""
    path = tmp_path / "bundle" / "decoder.safetensors"
    save_bundle(path, decoder, trained=lambda name: False, dtype=torch.float32)
    return path


def bfl_transformer(state):
    """The inverse of what is tested: diffusers' tensors under BFL's names, stacked as BFL stacks them."""
    out = {}

    def put(theirs, *ours):
        for leaf in ("weight", "bias"):
            if f"{ours[0]}.{leaf}" in state:
                out[f"{theirs}.{leaf}"] = torch.cat([state[f"{module}.{leaf}"] for module in ours])

    put("img_in", "x_embedder")
    put("txt_in", "context_embedder")
    for theirs, ours in (("time_in", "timestep"), ("guidance_in", "guidance"), ("vector_in", "text")):
        put(f"{theirs}.in_layer", f"time_text_embed.{ours}_embedder.linear_1")
        put(f"{theirs}.out_layer", f"time_text_embed.{ours}_embedder.linear_2")
    put("final_layer.linear", "proj_out")
    for leaf in ("weight", "bias"):
        scale, shift = state[f"norm_out.linear.{leaf}"].chunk(2)
        out[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat([shift, scale])
    for i in range(tiny_flux_config()["num_layers"]):
        block, a = f"double_blocks.{i}", f"transformer_blocks.{i}"
        put(f"{block}.img_mod.lin", f"{a}.norm1.linear")
        put(f"{block}.txt_mod.lin", f"{a}.norm1_context.linear")
        put(f"{block}.img_attn.qkv", f"{a}.attn.to_q", f"{a}.attn.to_k", f"{a}.attn.to_v")
        put(f"{block}.txt_attn.qkv", f"{a}.attn.add_q_proj", f"{a}.attn.add_k_proj", f"{a}.attn.add_v_proj")
        put(f"{block}.img_attn.proj", f"{a}.attn.to_out.0")
        put(f"{block}.txt_attn.proj", f"{a}.attn.to_add_out")
        for theirs, ours in (("img_mlp", "ff"), ("txt_mlp", "ff_context")):
            put(f"{block}.{theirs}.0", f"{a}.{ours}.net.0.proj")
            put(f"{block}.{theirs}.2", f"{a}.{ours}.net.2")
        for theirs, ours in (("img_attn", "norm"), ("txt_attn", "norm_added")):
            out[f"{block}.{theirs}.norm.query_norm.scale"] = state[f"{a}.attn.{ours}_q.weight"]
            out[f"{block}.{theirs}.norm.key_norm.scale"] = state[f"{a}.attn.{ours}_k.weight"]
    for i in range(tiny_flux_config()["num_single_layers"]):
        block, a = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        put(f"{block}.modulation.lin", f"{a}.norm.linear")
        put(f"{block}.linear1", f"{a}.attn.to_q", f"{a}.attn.to_k", f"{a}.attn.to_v", f"{a}.proj_mlp")
        put(f"{block}.linear2", f"{a}.proj_out")
        out[f"{block}.norm.query_norm.scale"] = state[f"{a}.attn.norm_q.weight"]
        out[f"{block}.norm.key_norm.scale"] = state[f"{a}.attn.norm_k.weight"]
    return {name: tensor.clone() for name, tensor in out.items()}


def bfl_autoencoder(state, resolutions=2, blocks=1):
    """The inverse of what is tested: diffusers' tensors under BFL's names, attention as convolutions."""
    out = {}

    def put(theirs, ours):
        for leaf in ("weight", "bias"):
            if f"{ours}.{leaf}" in state:
                out[f"{theirs}.{leaf}"] = state[f"{ours}.{leaf}"].clone()

    def put_block(theirs, ours):
        for part in ("norm1", "conv1", "norm2", "conv2"):
            put(f"{theirs}.{part}", f"{ours}.{part}")
        put(f"{theirs}.nin_shortcut", f"{ours}.conv_shortcut")

    for half in ("encoder", "decoder"):
        put(f"{half}.conv_in", f"{half}.conv_in")
        put(f"{half}.norm_out", f"{half}.conv_norm_out")
        put(f"{half}.conv_out", f"{half}.conv_out")
        put_block(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0")
        put_block(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1")
        attention = f"{half}.mid_block.attentions.0"
        put(f"{half}.mid.attn_1.norm", f"{attention}.group_norm")
        for theirs, ours in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            put(f"{half}.mid.attn_1.{theirs}", f"{attention}.{ours}")
            weight = f"{half}.mid.attn_1.{theirs}.weight"
            out[weight] = out[weight][:, :, None, None]
    for i in range(resolutions):
        for j in range(blocks):
            put_block(f"encoder.down.{i}.block.{j}", f"encoder.down_blocks.{i}.resnets.{j}")
        for j in range(blocks + 1):
            put_block(f"decoder.up.{i}.block.{j}", f"decoder.up_blocks.{resolutions - 1 - i}.resnets.{j}")
        put(f"encoder.down.{i}.downsample.conv", f"encoder.down_blocks.{i}.downsamplers.0.conv")
        put(f"decoder.up.{i}.upsample.conv", f"decoder.up_blocks.{resolutions - 1 - i}.upsamplers.0.conv")
    return out


def published_transformer():
    """Every tensor of flux1-fill-dev.safetensors and its shape, from BFL's `model.py` and `layers.py`."""
    width, head, mlp = 3072, 128, 4 * 3072
    shapes = {}

    def linear(name, rows, columns):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    linear("img_in", width, 384)
    linear("txt_in", width, 4096)
    for name, columns in (("time_in", 256), ("guidance_in", 256), ("vector_in", 768)):
        linear(f"{name}.in_layer", width, columns)
        linear(f"{name}.out_layer", width, width)
    for i in range(19):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            linear(f"{block}_mod.lin", 6 * width, width)
            linear(f"{block}_attn.qkv", 3 * width, width)
            linear(f"{block}_attn.proj", width, width)
            linear(f"{block}_mlp.0", mlp, width)
            linear(f"{block}_mlp.2", width, mlp)
            shapes[f"{block}_attn.norm.query_norm.scale"] = shapes[f"{block}_attn.norm.key_norm.scale"] = (head,)
    for i in range(38):
        block = f"single_blocks.{i}"
        linear(f"{block}.modulation.lin", 3 * width, width)
        linear(f"{block}.linear1", 3 * width + mlp, width)
        linear(f"{block}.linear2", width, width + mlp)
        shapes[f"{block}.norm.query_norm.scale"] = shapes[f"{block}.norm.key_norm.scale"] = (head,)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    linear("final_layer.linear", 64, width)
    return shapes


def published_autoencoder():
    """Every tensor of ae.safetensors and its shape, from BFL's `autoencoder.py` with channels 128 x (1, 2, 4, 4)."""
    channels = (128, 256, 512, 512)
    shapes = {}

    def convolution(name, to, of, size=3):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (to, of, size, size), (to,)

    def norm(name, of):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (of,)

    def block(name, of, to):
        norm(f"{name}.norm1", of)
        convolution(f"{name}.conv1", to, of)
        norm(f"{name}.norm2", to)
        convolution(f"{name}.conv2", to, to)
        if of != to:
            convolution(f"{name}.nin_shortcut", to, of, 1)

    for half, (first, start, last, end) in {"encoder": (3, 128, 512, 32), "decoder": (16, 512, 128, 3)}.items():
        convolution(f"{half}.conv_in", start, first)
        block(f"{half}.mid.block_1", 512, 512)
        block(f"{half}.mid.block_2", 512, 512)
        norm(f"{half}.mid.attn_1.norm", 512)
        for part in ("q", "k", "v", "proj_out"):
            convolution(f"{half}.mid.attn_1.{part}", 512, 512, 1)
        norm(f"{half}.norm_out", last)
        convolution(f"{half}.conv_out", end, last)
    for i, to in enumerate(channels):
        for j in range(2):
            block(f"encoder.down.{i}.block.{j}", to if j else channels[max(i - 1, 0)], to)
        for j in range(3):
            block(f"decoder.up.{i}.block.{j}", to if j else channels[min(i + 1, 3)], to)
        if i < 3:
            convolution(f"encoder.down.{i}.downsample.conv", to, to)
        if i > 0:
            convolution(f"decoder.up.{i}.upsample.conv", to, to)
    return shapes


def assert_one_to_one(layout, published, state):
    assert set(layout) == set(published)
    assert Counter(name for names in layout.values() for name in names) == Counter(state.keys())
    for source, names in layout.items():
        rows = sum(state[name].shape[0] for name in names)
        assert all(state[name].shape[1:] == state[names[0]].shape[1:] for name in names)
        assert published[source][: state[names[0]].ndim] == (rows, *state[names[0]].shape[1:]), source


def test_the_published_transformer_maps_one_to_one():
    with torch.device("meta"):
        model = FluxTransformer2DModel(**FLUX_FILL_CONFIG)
    published = published_transformer()
    assert len(published) == 780
    assert sum(torch.Size(shape).numel() for shape in published.values()) == pytest.approx(11.90e9, rel=1e-3)
    assert_one_to_one(transformer_layout(model), published, model.state_dict())


def test_the_published_autoencoder_maps_one_to_one():
    with torch.device("meta"):
        model = AutoencoderKL(**FLUX_VAE_CONFIG)
    assert (model.config.shift_factor, model.config.scaling_factor) == (0.1159, 0.3611)
    published = published_autoencoder()
    assert len(published) == 244
    assert sum(torch.Size(shape).numel() for shape in published.values()) == pytest.approx(83.8e6, rel=1e-3)
    assert_one_to_one(autoencoder_layout(model), published, model.state_dict())


def test_rows_are_stacked_as_diffusers_own_conversion_cuts_them():
    """One block of each kind at the published width, which diffusers' function is bound to, one column a weight."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(**{**FLUX_FILL_CONFIG, "num_layers": 1, "num_single_layers": 1})
    layout, state = transformer_layout(model), model.state_dict()
    source = {name: torch.randn(sum(state[part].shape[0] for part in parts), 1) for name, parts in layout.items()}
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(source))
    assert set(theirs) == set(state)
    for name, parts in layout.items():
        stacked = torch.cat([theirs[part] for part in parts])
        if name.startswith("final_layer.adaLN"):
            stacked = torch.cat(stacked.chunk(2)[::-1])
        assert torch.equal(stacked, source[name]), name


def test_the_autoencoder_is_what_diffusers_own_conversion_makes_of_it(tmp_path, vae):
    source = bfl_autoencoder(vae.state_dict())
    save_file(source, tmp_path / "ae.safetensors")
    theirs = convert_ldm_vae_checkpoint(source, vae.config)
    ours = read_autoencoder(tmp_path / "ae.safetensors", vae)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def as_checkpoint(state):
    """A whole ComfyUI checkpoint: the transformer between an autoencoder and a text encoder."""
    return {f"model.diffusion_model.{name}": tensor for name, tensor in bfl_transformer(state).items()} | {
        "vae.decoder.mid.attn_1.q.weight": torch.zeros(1),
        "text_encoders.t5xxl.transformer.shared.weight": torch.zeros(1),
    }


BASES = ("folder", "sharded", "pipeline", "file", "BFL", "old extension", "with a prefix", "checkpoint")


def write_base(where, kind, transformer):
    state = transformer.state_dict()
    if kind in ("folder", "sharded", "pipeline"):
        folder = where / "transformer" if kind == "pipeline" else where
        transformer.save_pretrained(folder, max_shard_size="40KB" if kind == "sharded" else "1GB")
        assert (len(list(folder.glob("*.safetensors"))) > 2) == (kind == "sharded")
        return where
    where.mkdir()
    path = where / ("flux1-fill-dev.sft" if kind == "old extension" else "flux1-fill-dev.safetensors")
    if kind == "file":
        tensors = state
    elif kind == "checkpoint":
        tensors = as_checkpoint(state)
    else:
        prefix = "model.diffusion_model." if kind == "with a prefix" else ""
        tensors = {prefix + name: tensor for name, tensor in bfl_transformer(state).items()}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("kind", BASES)
@torch.no_grad()
def test_a_base_in_any_layout_is_the_same_decoder(tmp_path, decoder, bundle, kind):
    base = write_base(tmp_path / "base", kind, decoder.transformer)
    loaded = load_decoder(bundle, base, options=DecoderOptions(fold=False))
    assert_same_without_text(decoder, loaded)
    channels = decoder.transformer.config.in_channels
    given = torch.randn(2, 16, channels, generator=torch.Generator().manual_seed(1)).split([64, channels - 64], dim=2)
    condition, t = decoder.condition_tokens(tiny_condition(), (8, 8)), torch.tensor([0.3, 0.9])
    exact = decoder(*given, condition, t, (8, 8))
    assert torch.equal(exact, loaded(*given, condition, t, (8, 8)))
    painting = load_decoder(bundle, base)(*given, condition, t, (8, 8))
    torch.testing.assert_close(exact, painting, rtol=1e-5, atol=1e-5)


def test_float8_is_read_in_the_type_asked_for_and_else_in_bfloat16(tmp_path, decoder, bundle):
    stored = {name: t.to(torch.float8_e4m3fn) for name, t in bfl_transformer(decoder.transformer.state_dict()).items()}
    save_file(stored, tmp_path / "fp8.safetensors")
    loaded = load_decoder(bundle, tmp_path / "fp8.safetensors", options=DecoderOptions(dtype=torch.float32, fold=False))
    for name, value in loaded.transformer.state_dict().items():
        stored = decoder.transformer.state_dict()[name].to(torch.float8_e4m3fn)
        assert torch.equal(value, stored.float()), name
    plain = find_transformer(tmp_path / "fp8.safetensors", decoder.transformer).read()
    assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16}


def test_what_the_bundle_trained_goes_over_a_bfl_base_and_is_not_read_from_it(tmp_path, decoder):
    trained = tiny_decoder(seed=5)
    state = decoder.transformer.state_dict()
    own = {name for name in state if ".attn." in name}
    trained.transformer.load_state_dict(state | {k: v for k, v in trained.transformer.state_dict().items() if k in own})
    save_bundle(tmp_path / "d.safetensors", trained, trained=own.__contains__, dtype=torch.float32)
    stored = bfl_transformer(state)
    del stored["double_blocks.0.img_attn.qkv.weight"]  # all three parts are the bundle's
    save_file(stored, tmp_path / "base.safetensors")
    assert not own & set(find_transformer(tmp_path / "base.safetensors", decoder.transformer, without=own).read())
    loaded = load_decoder(tmp_path / "d.safetensors", tmp_path / "base.safetensors", options=DecoderOptions(fold=False))
    for name, value in loaded.transformer.state_dict().items():
        assert torch.equal(value, trained.transformer.state_dict()[name]), name


def damaged(stored, change):
    """BFL's tensors with one thing wrong, and what the error must say."""
    if change == "missing":
        del stored["single_blocks.0.linear1.weight"]
        return r"missing: single_blocks\.0\.linear1\.weight"
    if change == "unexpected":
        stored["single_blocks.1.norm.query_norm.scale"] = torch.zeros(16)
        return r"unexpected: single_blocks\.1\.norm\.query_norm\.scale"
    if change == "shape":
        stored["double_blocks.0.img_attn.qkv.weight"] = torch.zeros(95, 32)
        return r"double_blocks\.0\.img_attn\.qkv\.weight is \[95, 32\], expected \[96, 32\]"
    if change == "scalar":
        stored["img_in.weight"] = torch.zeros(())
        return r"img_in\.weight is \[\], expected \[32, 144\]"
    if change == "FLUX.1-dev":
        stored["img_in.weight"] = torch.zeros(32, 64)
        return r"this is FLUX\.1-dev.*Kontext.*64 input channels; the decoder needs tiny, with 144"
    if change == "FLUX.1-Depth-dev":
        stored["img_in.weight"] = torch.zeros(32, 128)
        return r"this is .*FLUX\.1-Depth-dev.* the decoder needs tiny"
    if change == "scaled float8":
        stored["double_blocks.0.img_mod.lin.scale_weight"] = torch.ones(())
        return r"quantised \(it has double_blocks\.0\.img_mod\.lin\.scale_weight\)"
    stored["img_in.weight"] = torch.zeros(32, 144, dtype=torch.int8)
    return r"quantised \(it has img_in\.weight\)"


CHANGES = ("missing", "unexpected", "shape", "scalar", "FLUX.1-dev", "FLUX.1-Depth-dev", "scaled float8", "int8")


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_that_does_not_fit_is_refused_in_its_own_names(tmp_path, decoder, bundle, change):
    stored = bfl_transformer(decoder.transformer.state_dict())
    message = damaged(stored, change)
    save_file(stored, tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match=message) as refused:
        load_decoder(bundle, tmp_path / "base.safetensors")
    assert "give the diffusers folder or the .safetensors file of tiny" in str(refused.value)


def test_flux_dev_as_a_diffusers_folder_is_refused_as_well(tmp_path, bundle):
    transformer = fill(FluxTransformer2DModel(**{**tiny_flux_config(), "in_channels": 64}))
    transformer.save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match=r"this is FLUX\.1-dev.* the decoder needs tiny"):
        load_decoder(bundle, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("flux1-fill-dev-Q4.gguf", b"GGUF\x03\x00\x00\x00" + bytes(99), "a GGUF file; only safetensors"),
        ("model.ckpt", b"PK\x03\x04" + bytes(99), "a PyTorch checkpoint"),
        ("model.pt", b"\x80\x02}q\x00." + bytes(99), "a pickled PyTorch checkpoint"),
        ("flux1-fill-dev.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("flux1-fill-dev.safetensors", b"<!doctype html><title>Log in</title>", "an HTML page"),
        ("flux1-fill-dev.sft", b"nothing known", "cut short or damaged, download it again"),
        ("flux1-fill-dev.safetensors", b"", "cut short or damaged, download it again"),
    ],
)
def test_other_formats_are_called_by_their_names(tmp_path, bundle, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_decoder(bundle, tmp_path / name)


def test_a_file_cut_short_is_refused(tmp_path, decoder, bundle):
    path = write_base(tmp_path / "base", "BFL", decoder.transformer)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"flux1-fill-dev\.safetensors cannot be read.*download it again"):
        load_decoder(bundle, path)


def test_folders_that_hold_no_or_several_models_are_refused(tmp_path, decoder, bundle):
    with pytest.raises(ValueError, match="none does not exist"):
        load_decoder(bundle, tmp_path / "none")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"holds nothing; expected one \.safetensors file"):
        load_decoder(bundle, folder)
    (folder / "model.bin").touch()
    with pytest.raises(ValueError, match=r"holds model\.bin; .* file of tiny"):
        load_decoder(bundle, folder)
    save_file({"a": torch.zeros(1)}, folder / "a.safetensors")
    with pytest.raises(ValueError, match="folder does not fit tiny; .*unexpected: a"):
        load_decoder(bundle, folder)
    save_file({"b": torch.zeros(1)}, folder / "b.safetensors")
    with pytest.raises(ValueError, match="name one of its 2 files"):
        load_decoder(bundle, folder)


def test_an_unfinished_download_names_the_shards_that_lack(tmp_path, decoder, bundle):
    folder = write_base(tmp_path / "base", "sharded", decoder.transformer)
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ValueError, match=f"lacks {gone.name}"):
        load_decoder(bundle, folder)
    (index,) = folder.glob("*.index.json")
    index.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(ValueError, match="names no shards"):
        load_decoder(bundle, folder)


AUTOENCODERS = ("folder", "pipeline", "file", "BFL", "first_stage_model.", "vae.")


def write_autoencoder(where, kind, vae):
    if kind in ("folder", "pipeline"):
        vae.save_pretrained(where / "vae" if kind == "pipeline" else where)
        return where
    where.mkdir()
    tensors = vae.state_dict() if kind == "file" else bfl_autoencoder(vae.state_dict())
    prefix = kind if kind.endswith(".") else ""
    around = {"model.diffusion_model.img_in.weight": torch.zeros(1)} if prefix else {}
    save_file({prefix + name: tensor for name, tensor in tensors.items()} | around, where / "ae.safetensors")
    return where / "ae.safetensors"


@pytest.mark.parametrize("kind", AUTOENCODERS)
@torch.no_grad()
def test_an_autoencoder_in_any_layout_is_the_same(tmp_path, vae, kind):
    loaded = load_vae(write_autoencoder(tmp_path / "vae", kind, vae), config=vae.config)
    assert (loaded.config.shift_factor, loaded.config.scaling_factor) == (0.1, 0.5)
    for name, value in vae.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    pixels = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(vae.encode(pixels).latent_dist.mode(), loaded.encode(pixels).latent_dist.mode())


def test_a_single_file_is_taken_for_flux_own_autoencoder(tmp_path, vae):
    path = write_autoencoder(tmp_path / "vae", "BFL", vae)
    with pytest.raises(
        ValueError, match=r"ae.safetensors is not the autoencoder of FLUX.1.*\[8, 8\], expected \[128, 256"
    ):
        load_vae(path)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_an_autoencoder_that_does_not_fit_is_refused_in_its_own_names(tmp_path, vae, change):
    stored = bfl_autoencoder(vae.state_dict())
    name = "decoder.mid.attn_1.q.weight"
    if change == "missing":
        del stored[name]
    elif change == "unexpected":
        name = "encoder.strange.weight"
        stored[name] = torch.zeros(1)
    else:
        stored[name] = torch.zeros(8, 8, 3, 3)
    save_file(stored, tmp_path / "ae.safetensors")
    label = "wrong shape" if change == "shape" else change
    with pytest.raises(ValueError, match=f"{label}: {re.escape(name)}"):
        load_vae(tmp_path / "ae.safetensors", config=vae.config)


def test_what_is_no_autoencoder_is_refused(tmp_path, decoder, vae):
    decoder.transformer.save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match="holds a 'FluxTransformer2DModel'; expected an AutoencoderKL"):
        load_vae(tmp_path / "transformer")
    (tmp_path / "ae.ckpt").write_bytes(b"PK\x03\x04" + bytes(99))
    with pytest.raises(ValueError, match="a PyTorch checkpoint"):
        load_vae(tmp_path / "ae.ckpt")
    with pytest.raises(ValueError, match="none does not exist"):
        load_vae(tmp_path / "none")
