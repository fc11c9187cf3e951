"""BIGFix's folder: the published names and shapes, and what is refused."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5ForConditionalGeneration
from transformers.models.janus.modeling_janus import JanusVQVAE

from dcdd_core import registry
from dcdd_core.models.llamagen import tokenizer as llamagen
from dcdd_core.models.masked.bigfix_files import BigFixFolder, bigfix_name, network_config
from dcdd_core.models.masked.bigfix_network import BigFixConfig, BigFixTransformer
from dcdd_core.models.t5 import load_text_encoder
from tests.tiny import tiny_tokenizer
from tests.tiny_bigfix import (
    NAME,
    released_shapes,
    save_bigfix,
    save_checkpoint,
    tiny_llamagen,
    tiny_text_encoder,
    tiny_weights,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_bigfix(tmp_path_factory.mktemp("bigfix") / "model")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def load(folder):
    return registry.sampler_family(folder).load_sampler(str(folder))


def on_meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def change_json(path, **changes):
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def test_the_published_xl_has_these_names_and_shapes():
    """512 x 512 pixels, size "xlarge" of the released trainer, flan-t5-xl."""
    held = on_meta(
        released_shapes(side=32, codes=16384, width=1152, layers=28, hidden=3072, text_width=2048, registers=1)
    )
    config = network_config(held, None, "BigFix.pth")
    assert config == BigFixConfig(
        grid=(32, 32),
        codes=16384,
        text_width=2048,
        width=1152,
        layers=28,
        heads=16,
        hidden=3072,
        registers=1,
    )
    with torch.device("meta"):
        network = BigFixTransformer(config)
    found = {bigfix_name(name): tuple(value.shape) for name, value in network.state_dict().items()}
    assert found == {name: tuple(value.shape) for name, value in held.items()}


def test_the_published_image_tokenizer_has_these_names_and_shapes():
    """VQ-16 in LlamaGen's vq_model.py: 128 channels, times 1, 1, 2, 2, 4, two blocks a level on the way down."""
    shapes = {"quantize.embedding.weight": (16384, 8)}

    def conv(name, out, into, side=3):
        shapes.update({f"{name}.weight": (out, into, side, side), f"{name}.bias": (out,)})

    def norm(name, width):
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def block(name, out, into):
        norm(f"{name}.norm1", into), conv(f"{name}.conv1", out, into)
        norm(f"{name}.norm2", out), conv(f"{name}.conv2", out, out)
        if out != into:
            conv(f"{name}.nin_shortcut", out, into, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    conv("encoder.conv_in", 128, 3), conv("encoder.conv_out", 256, 512), norm("encoder.norm_out", 512)
    conv("decoder.conv_in", 512, 256), conv("decoder.conv_out", 3, 128), norm("decoder.norm_out", 128)
    conv("quant_conv", 8, 256, 1), conv("post_quant_conv", 256, 8, 1)
    for side in ("encoder", "decoder"):
        block(f"{side}.mid.0", 512, 512), attention(f"{side}.mid.1", 512), block(f"{side}.mid.2", 512, 512)
    width = 128
    for i, out in enumerate((128, 128, 256, 256, 512)):
        for k in range(2):
            block(f"encoder.conv_blocks.{i}.res.{k}", out, width)
            width = out
            if i == 4:
                attention(f"encoder.conv_blocks.{i}.attn.{k}", out)
        if i < 4:
            conv(f"encoder.conv_blocks.{i}.downsample.conv", out, out)
    for i, out in enumerate((512, 256, 256, 128, 128)):
        for k in range(3):
            block(f"decoder.conv_blocks.{i}.res.{k}", out, width)
            width = out
            if i == 0:
                attention(f"decoder.conv_blocks.{i}.attn.{k}", out)
        if i < 4:
            conv(f"decoder.conv_blocks.{i}.upsample.conv", out, out)
    config = llamagen.vq_config(on_meta(shapes), "vq_ds16_t2i.pt")
    with torch.device("meta"):
        model = JanusVQVAE(config)
    assert {llamagen.llamagen_name(n): tuple(v.shape) for n, v in model.state_dict().items()} == shapes


def test_heads_of_the_released_widths_are_known():
    for width, heads in ((384, 6), (768, 12), (1024, 16), (1536, 24)):
        held = on_meta(released_shapes(side=2, codes=8, width=width, layers=1, hidden=256, text_width=16))
        assert network_config(held, None, "a.pth").heads == heads
    held = on_meta(released_shapes(side=2, codes=8, width=512, layers=1, hidden=256, text_width=16))
    with pytest.raises(ValueError, match=r'a.pth is of width 512, and no tensor says .* "heads": 16'):
        network_config(held, None, "a.pth")
    with pytest.raises(ValueError, match="width 512 must be a multiple of heads 6"):
        network_config(held, 6, "a.pth")


@pytest.mark.parametrize("name", ["text_width", "registers"])
def test_sizes_that_make_no_network_are_refused(folder, name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got 0"):
        replace(BigFixFolder(folder).config(), **{name: 0})


def test_a_folder_needs_no_config(folder):
    assert registry.sampler_family(folder).name == "bigfix"
    (folder / "config.json").unlink()
    assert registry.sampler_family(folder).name == "bigfix", "by the checkpoint's name"
    with pytest.raises(ValueError, match="is of width 32, and no tensor says how many heads"):
        load(folder)
    (folder / f"{NAME}.pth").rename(folder / "bigfix-large.pth")
    assert registry.sampler_family(folder).name == "bigfix", "in any letters"
    (folder / "bigfix-large.pth").rename(folder / "other.pth")
    with pytest.raises(ValueError, match="expected a VLM: .*the folder of BIGFix, with BigFix_XLarge"):
        registry.sampler_family(folder)


def test_only_float_weights_are_taken_and_they_are_copied(folder):
    sampler = load(folder)
    own, weights = sampler.model.state_dict(), tiny_weights()
    for name in own:
        if not name.startswith("text_encoder."):
            assert torch.equal(own[name], weights[bigfix_name(name)]), name
    (folder / f"{NAME}.pth").write_bytes(b"")
    assert torch.equal(sampler.model.codes.weight, weights["tok_emb.weight"])
    assert not sampler.model.training and not any(weight.requires_grad for weight in sampler.model.parameters())


def test_names_of_compiled_and_distributed_models_are_read(folder):
    before = load(folder).fingerprint
    save_checkpoint(folder, {f"module._orig_mod.{name}": value for name, value in tiny_weights().items()})
    assert load(folder).fingerprint == before


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (
            f"{NAME}.pth",
            "has no checkpoint of BIGFix: put BigFix_XLarge_aplha02_res512_MiroFT.pth of llvictorll/BigFIX",
        ),
        ("vq_ds16_t2i.pt", "has no vq_ds16_t2i.pt, its image tokenizer: put that of llvictorll/BigFIX there"),
        ("flan-t5-xl", "has no folder flan-t5-xl, its text encoder: put the files of google/flan-t5-xl there"),
        ("flan-t5-xl/tokenizer.json", r"tokenizer\.json does not exist"),
        ("flan-t5-xl/config.json", r"has no config\.json"),
        ("flan-t5-xl/model.safetensors", "expected one .safetensors file"),
    ],
)
def test_a_missing_part_is_named_with_its_source(folder, part, words):
    path = folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=words):
        load(folder)


def test_what_a_mac_leaves_beside_a_file_is_no_checkpoint(folder):
    (folder / f"._{NAME}.pth").write_bytes(b"Mac OS X")
    assert load(folder).name == NAME


def test_two_checkpoints_are_refused(folder):
    shutil.copy(folder / f"{NAME}.pth", folder / "BigFix_other.pth")
    with pytest.raises(ValueError, match="BigFix_other.pth, BigFix_tiny.pth, and nothing says which"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("last_norm.weight"), r"BigFix_tiny\.pth does not fit .* missing: last_norm\.weight: download"),
        (lambda w: w.pop("tok_emb.weight"), r"no tensor tok_emb\.weight, as a text-to-image checkpoint"),
        (lambda w: w.update({"in_proj.0.weight": torch.zeros(1)}), r"unexpected: in_proj\.0\.weight"),
        (lambda w: w.update({"head.bias": torch.zeros(64)}), r"wrong shape: head\.bias is \[64\], expected \[65\]"),
        (lambda w: w.update({"head.bias": 3}), r"wrong shape: head\.bias is no tensor, expected \[65\]"),
        (lambda w: w.update({"head.bias": torch.zeros(65).int()}), r"is quantised \(it has head\.bias\)"),
        (lambda w: w.update({"head.bias": torch.full((65,), torch.nan)}), r"values of head\.bias that are not finite"),
        (lambda w: w.update({"pos_emb.weight": torch.zeros(15, 32)}), "has 15 tokens an image, expected a square"),
        (lambda w: w.update({"pos_emb.weight": torch.zeros(16)}), r"pos_emb\.weight as \[16\], expected a matrix"),
        (lambda w: w.update({"reward_proj.0.weight": torch.zeros(32, 4)}), "trained with other rewards than 3"),
        (lambda w: w.update({"reg_tokens.weight": torch.zeros(0, 32)}), r"reg_tokens\.weight as \[0, 32\], expected"),
        (
            lambda w: w.update({"transformer.layers.9.ln1.weight": torch.zeros(32)}),
            r"missing: transformer\.layers\.2\..*; unexpected: transformer\.layers\.9\.ln1\.weight",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, change, words):
    weights = tiny_weights()
    change(weights)
    save_checkpoint(folder, weights)
    with pytest.raises(ValueError, match=words):
        load(folder)


def test_files_that_are_no_checkpoints_are_refused(folder):
    file = folder / f"{NAME}.pth"
    whole = file.read_bytes()
    torch.save(tiny_weights(), file)
    with pytest.raises(ValueError, match="has no 'model_state_dict', as BIGFix's trainer saves"):
        load(folder)
    torch.save({"model_state_dict": tiny_weights(), "args": Namespace(vit_size="xlarge")}, file)
    assert load(folder).grid == (4, 4), "a trainer's options are no code"
    torch.save({"model_state_dict": tiny_weights(), "args": SimpleNamespace(vit_size="xlarge")}, file)
    with pytest.raises(ValueError, match=r"holds types\.SimpleNamespace besides tensors, which could run code"):
        load(folder)
    file.write_bytes(whole[:-2000])
    with pytest.raises(ValueError, match="it is cut short, damaged"):
        load(folder)


def test_an_image_tokenizer_that_does_not_fit_is_refused(folder):
    file = folder / "vq_ds16_t2i.pt"
    family = registry.sampler_family(folder)
    for change, words in (
        (lambda w: w.pop("decoder.norm_out.bias"), r"vq_ds16_t2i\.pt does not fit .*missing: decoder\.norm_out\.bias"),
        (lambda w: w.update({"loss.weight": torch.zeros(1)}), r"unexpected: loss\.weight"),
        (lambda w: w.update({"quant_conv.bias": torch.zeros(9)}), r"quant_conv\.bias is \[9\], expected \[8\]"),
        (lambda w: w.pop("encoder.conv_in.weight"), r"has no convolution encoder\.conv_in\.weight"),
        (lambda w: w.update({"encoder.conv_in.weight": torch.zeros(33, 3, 3, 3)}), "an encoder of 33 channels"),
    ):
        weights = tiny_llamagen()
        change(weights)
        torch.save({"model": weights}, file)
        with pytest.raises(ValueError, match=words):
            family.load_tokenizer(str(folder))
    for held in (tiny_llamagen(), {"model": {}}, {"model": 3}):
        torch.save(held, file)
        for read in (family.load_tokenizer, family.load_sampler):
            with pytest.raises(ValueError, match="has no tokenizer of images under 'model'"):
                read(str(folder))
    codes = tiny_llamagen()["quantize.embedding.weight"]
    for wrong, words in (
        (codes[:60], "has 60 codes, and BigFix_tiny.pth was trained with 64: take vq_ds16_t2i.pt of llvictorll"),
        (codes.int(), "expected floats"),
        (codes * torch.nan, "not finite"),
    ):
        torch.save({"model": {"quantize.embedding.weight": wrong}}, file)
        with pytest.raises(ValueError, match=words):
            family.load_sampler(str(folder))


def test_a_text_encoder_that_does_not_fit_is_refused(folder):
    path = folder / "flan-t5-xl" / "config.json"
    whole = path.read_text()
    for changes, words in (
        ({"d_model": 17}, "has a text encoder of width 17, and BigFix_tiny.pth was trained with 16"),
        ({"model_type": "clip"}, "holds a model of type 'clip', expected 't5'"),
        ({"num_layers": 10**9}, "says num_layers 1,000,000,000, and the weights have 2"),
        ({"num_layers": 1}, r"unexpected: encoder\.block\.1\."),
        ({"d_ff": 10**9}, "says d_ff 1,000,000,000, and the weights have 32"),
        ({"d_kv": 10**9}, r"says d_kv \* num_heads 4,000,000,000, and the weights have 16"),
        ({"num_heads": "4"}, "has num_heads '4' in its config.json, expected a whole number"),
        ({"vocab_size": 99}, "says vocab_size 99, and the weights have 18"),
        ({"relative_attention_num_buckets": 31}, "says relative_attention_num_buckets 31, and the weights have 32"),
        ({"is_gated_act": False}, r"unexpected: .*wi_0\.weight"),
    ):
        change_json(path, **changes)
        with pytest.raises(ValueError, match=words):
            load(folder)
        path.write_text(whole)
    weights = folder / "flan-t5-xl" / "model.safetensors"
    held = load_file(weights)
    save_file(held | {"encoder.final_layer_norm.weight": torch.ones(16, dtype=torch.int8)}, weights)
    with pytest.raises(ValueError, match="flan-t5-xl is quantised"):
        load(folder)
    save_file(held, weights)
    tiny_tokenizer().save_pretrained(folder / "flan-t5-xl")
    with pytest.raises(ValueError, match="has a tokenizer of 21 words and an encoder of 18"):
        load(folder)


def test_the_encoder_of_a_whole_t5_is_read(folder, tmp_path):
    """As in google/flan-t5-xl: with a decoder and a head, neither of which is read."""
    encoder = tiny_text_encoder()
    whole = T5ForConditionalGeneration(encoder.config)
    whole.shared.load_state_dict(encoder.shared.state_dict())
    whole.encoder.load_state_dict(encoder.encoder.state_dict())
    whole.save_pretrained(tmp_path / "whole", max_shard_size="10KB")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 1
    config = tmp_path / "whole" / "config.json"
    # As google's says it.
    change_json(config, is_gated_act=None, dense_act_fn=None, tie_word_embeddings=False, n_positions=512)
    loaded, _ = load_text_encoder(tmp_path / "whole")
    ids = torch.tensor([[3, 4, 5, 1, 0]])
    for name, value in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).last_hidden_state, encoder(ids).last_hidden_state)


def test_a_config_says_the_heads_alone(folder):
    change_json(folder / "config.json", heads="two")
    with pytest.raises(ValueError, match="has heads 'two' in its config.json, expected a whole number"):
        load(folder)
    change_json(folder / "config.json", heads=4)
    assert BigFixFolder(folder).config().heads == 4
    change_json(folder / "config.json", layers=2)
    with pytest.raises(ValueError, match=r"has \['layers'\], expected model_type and heads alone"):
        load(folder)


def test_eight_bits_in_memory(saved):
    pytest.importorskip("torchao")
    sampler = registry.sampler_family(saved).load_sampler(str(saved), int8=True)
    assert sampler.fingerprint.startswith(load(saved).fingerprint[:16]) and "in int8" in sampler.fingerprint
    assert sampler.sample(["a red circle"], seeds=[1]).logits.isfinite().all()


def test_the_published_tokenizer_is_on_the_grid_of_512_pixels():
    tokenizer = next(f for f in registry.samplers() if f.name == "bigfix").published_tokenizer()
    assert tokenizer.grid == (32, 32) and tokenizer.factor == 16 and tokenizer.model.quant_conv.weight.is_meta
