"""LlamaGen's folder: the published names and shapes, the layouts it is copied in, and what is refused."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcdd_core import registry
from dcdd_core.models.llamagen import tokenizer as images
from dcdd_core.models.llamagen.captions import Captions, save_captions
from dcdd_core.models.llamagen.files import (
    LlamaGenFolder,
    network_config,
    reads,
    released_name,
    save_network,
    split_qkv,
    transformers_name,
)
from dcdd_core.models.llamagen.network import LlamaGenConfig, LlamaGenTransformer
from tests.tiny import save_janus
from tests.tiny_bigfix import tiny_llamagen
from tests.tiny_llamagen import NAME, released_shapes, save_llamagen, tiny_weights

#: 256 pixels (stage 1) and 512 (stage 2) have the same tensors.
XL = released_shapes(codes=16384, width=1280, layers=36, hidden=3584, text_width=2048, slots=120)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_llamagen(tmp_path_factory.mktemp("llamagen") / "model")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def load(folder):
    return registry.sampler_family(folder).load_sampler(str(folder))


def save(folder: Path, weights, **besides) -> None:
    torch.save({"model": weights, **besides}, folder / f"{NAME}.pt")


def change_json(path: Path, **changes) -> None:
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def as_transformers(weights) -> dict[str, torch.Tensor]:
    """As the copies for transformers have them: a Llama's names, queries, keys and values apart."""
    with torch.device("meta"):
        names = LlamaGenTransformer(
            network_config(
                {name: tuple(value.shape) for name, value in weights.items()}, heads=2, tokens=16, file=Path("tiny")
            )
        ).state_dict()
    apart = split_qkv(weights)
    return {transformers_name(name): apart[released_name(name)].clone() for name in names}


def same(a, b) -> bool:
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("tokens", "side"), [(256, 16), (1024, 32)])
def test_the_published_xl_has_these_names_and_shapes(tokens, side):
    config = network_config(XL, heads=None, tokens=tokens, file=Path("t2i.pt"))
    assert config == LlamaGenConfig(
        grid=(side, side),
        codes=16384,
        text_width=2048,
        text_slots=120,
        width=1280,
        layers=36,
        heads=20,
        hidden=3584,
    )
    with torch.device("meta"):
        model = LlamaGenTransformer(config)
    held = split_qkv({name: torch.empty(shape, device="meta") for name, shape in XL.items()})
    assert {released_name(n): v.shape for n, v in model.state_dict().items()} == {n: v.shape for n, v in held.items()}
    assert sum(weight.numel() for weight in model.parameters()) == 777_923_840


@pytest.mark.parametrize(("name", "side"), [("t2i_XL_stage1_256", 16), ("t2i_XL_stage2_512", 32)])
def test_the_published_names_say_the_side(folder, name, side):
    (folder / f"{NAME}.pt").rename(folder / f"{name}.pt")
    change_json(folder / "config.json", block_size=None)
    found = LlamaGenFolder(folder)
    assert found.config.grid == (side, side) and found.name == name
    for other in ("mine", "portraits_4096"):
        change_json(folder / "config.json", dcdd_name=other)
        found = LlamaGenFolder(folder)
        assert found.config.grid == (side, side) and found.name == other


def test_every_way_of_saving_holds_the_same_model(folder):
    expected, weights, file = load(folder), tiny_weights(), folder / f"{NAME}.pt"
    for saved in (
        {"module": weights},
        {"state_dict": {f"module.{name}": value for name, value in weights.items()}},
        {"model": {f"_orig_mod.{name}": value for name, value in weights.items()}, "args": Namespace(gpt_model="XL")},
        weights,
    ):
        torch.save(saved, file)
        assert same(load(folder), expected), list(saved)[:1]
    file.unlink()
    save_file(weights, file.with_suffix(".safetensors"))
    assert same(load(folder), expected) and load(folder).name == NAME
    file.with_suffix(".safetensors").unlink()
    save_file(as_transformers(weights), folder / "model.safetensors")
    assert same(load(folder), expected) and load(folder).name == folder.name


def test_a_copy_for_transformers_is_read_with_its_own_configuration(folder):
    expected = load(folder)
    (folder / f"{NAME}.pt").unlink()
    save_file(as_transformers(tiny_weights()), folder / "model.safetensors")
    config = {"model_type": "llama", "num_attention_heads": 2, "block_size": 16, "caption_dim": 16, "rms_norm_eps": 1}
    (folder / "config.json").write_text(json.dumps(config))
    assert same(load(folder), expected) and load(folder).name == folder.name
    change_json(folder / "config.json", block_size=None)
    with pytest.raises(ValueError, match="nothing says how many tokens an image of .*model.safetensors has"):
        load(folder)
    change_json(folder / "config.json", caption_dim=None)
    assert not reads(folder)
    with pytest.raises(ValueError, match="holds a 'llama'; expected a VLM"):
        load(folder)


def test_a_saved_network_is_the_same(folder):
    expected = load(folder)
    (folder / f"{NAME}.pt").unlink()
    save_network(folder / f"{NAME}.safetensors", expected.model)
    assert set(load_file(folder / f"{NAME}.safetensors")) == set(tiny_weights())
    assert same(load(folder), expected)


def test_a_network_in_eight_bits_is_the_same_to_half_a_step(folder):
    expected = load(folder)
    (folder / f"{NAME}.pt").unlink()
    save_network(folder / f"{NAME}.safetensors", expected.model, int8=True)
    stored, found = load_file(folder / f"{NAME}.safetensors"), load(folder)
    assert stored["layers.0.attention.wqkv.weight"].dtype == torch.int8
    assert found.model.config == expected.model.config
    for name, value in expected.model.state_dict().items():
        if not name.startswith("text_encoder."):
            step = value.abs().amax(-1, keepdim=True) / 127 if value.ndim == 2 else value.abs() / 2**10
            assert ((found.model.state_dict()[name] - value).abs() <= 0.5001 * step).all(), name


def test_the_image_tokenizer_of_another_model_is_taken(folder, tmp_path):
    family = registry.sampler_family(folder)
    (folder / "vq_ds16_t2i.pt").unlink()
    save_janus(tmp_path / "janus")
    change_json(folder / "config.json", tokenizer="../janus", dcdd_name="tiny", block_size=36)
    tokenizer, sampler = family.load_tokenizer(str(folder)), load(folder)
    # Janus' own images are of 4 x 4 tokens.
    assert tokenizer.name == sampler.name == "tiny" and tokenizer.grid == sampler.grid == (6, 6)
    assert tokenizer.codebook.fingerprint == sampler.codebook.fingerprint
    for said, words in (
        ("/x", "relative to this one"),
        (3, "relative to this one"),
        (".", "this very folder"),
        ("../no", r"config\.json: tokenizer is '\.\./no', which does not exist"),
    ):
        change_json(folder / "config.json", tokenizer=said)
        with pytest.raises(ValueError, match=words):
            family.load_tokenizer(str(folder))


def test_a_tokenizer_as_safetensors_is_the_same(folder):
    family = registry.sampler_family(folder)
    expected = family.load_tokenizer(str(folder))
    (folder / "vq_ds16_t2i.pt").unlink()
    save_file(tiny_llamagen(), folder / "vq_ds16_t2i.safetensors")
    found = family.load_tokenizer(str(folder))
    assert found.codebook.fingerprint == expected.codebook.fingerprint == load(folder).codebook.fingerprint
    tokens = torch.arange(16)[None]
    assert torch.equal(found.decode_tokens(tokens, (4, 4)), expected.decode_tokens(tokens, (4, 4)))
    save_file({"other": torch.ones(1)}, folder / "vq_ds16_t2i.safetensors")
    with pytest.raises(ValueError, match="has no tokenizer of images, as LlamaGen's files have"):
        images.load_codebook(folder / "vq_ds16_t2i.safetensors")


def test_a_folder_without_configuration_is_known_by_its_files_name(folder):
    (folder / "config.json").unlink()
    assert reads(folder)
    (folder / f"{NAME}.pt").rename(folder / "other.pt")
    assert not reads(folder)
    assert not reads(folder / "vq_ds16_t2i.pt") and not reads(folder / "nothing")


def test_half_precision_is_widened_where_it_is_asked_for(folder):
    save(folder, {name: value.half() for name, value in tiny_weights().items()})
    assert {weight.dtype for weight in load(folder).model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("layers.1.ffn_norm.weight"), r"missing: layers\.1\.ffn_norm\.weight: download it again"),
        (lambda w: w.update(stray=torch.ones(1)), "unexpected: stray"),
        (lambda w: w.update({"output.weight": torch.ones(3, 32)}), r"output\.weight is \[3, 32\], expected \[64, 32\]"),
        (
            lambda w: w.update({"layers.0.attention.wqkv.weight": torch.ones(64, 32)}),
            r"missing: layers\.0\.attention\.wqkv\.weight \(k\), .*unexpected: layers\.0\.attention\.wqkv\.weight",
        ),
        (
            lambda w: w.update({"layers.0.attention.wqkv.weight": torch.ones(48, 32)}),
            r"layers\.0\.attention\.wqkv\.weight \(k\) is \[16, 32\], expected \[32, 32\]",
        ),
        (lambda w: w.pop("tok_embeddings.weight"), r"has no tensor tok_embeddings\.weight, as a text-to-image"),
        (lambda w: w.update({"tok_embeddings.weight": torch.ones(3)}), r"as \[3\], expected a matrix"),
        (lambda w: w["norm.weight"].fill_(torch.nan), r"values of norm\.weight that are not finite"),
        (lambda w: w.update({"norm.weight": torch.ones(32, dtype=torch.int8)}), "is quantised .*I8|int8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, words):
    weights = tiny_weights()
    change(weights)
    save(folder, weights)
    with pytest.raises(ValueError, match=words):
        load(folder)


def test_parts_that_are_missing_are_named_with_where_they_come_from(folder):
    (folder / "flan-t5-xl").rename(folder / "text")
    with pytest.raises(ValueError, match="no folder flan-t5-xl, its text encoder: put the files of google/flan-t5-xl"):
        load(folder)
    (folder / "text").rename(folder / "flan-t5-xl")
    (folder / "vq_ds16_t2i.pt").rename(folder / "kept")
    with pytest.raises(ValueError, match=r"no vq_ds16_t2i\.pt, its image tokenizer: put that of peizesun/llamagen_t2i"):
        load(folder)
    (folder / "kept").rename(folder / "vq_ds16_t2i.pt")
    shutil.copy(folder / f"{NAME}.pt", folder / "t2i_other.pt")
    with pytest.raises(ValueError, match=rf"holds t2i_other\.pt, {NAME}\.pt, and nothing says which is the model"):
        load(folder)
    (folder / "t2i_other.pt").unlink()
    (folder / f"{NAME}.pt").unlink()
    with pytest.raises(ValueError, match=r"has no checkpoint of LlamaGen: take t2i_XL_stage1_256\.pt or"):
        load(folder)


def test_parts_that_do_not_belong_together_are_refused(folder):
    weights = tiny_weights()
    save(folder, weights | {name: weights[name][:32].clone() for name in ("tok_embeddings.weight", "output.weight")})
    with pytest.raises(ValueError, match=r"vq_ds16_t2i\.pt has 64 codes, and t2i_tiny was trained with 32"):
        load(folder)
    changed = {
        "cls_embedding.uncond_embedding": torch.ones(120, 24),
        "cls_embedding.cap_proj.fc1.weight": torch.ones(32, 24),
    }
    save(folder, weights | changed)
    with pytest.raises(ValueError, match="text encoder of width 16, and t2i_tiny was trained with 24"):
        load(folder)
    captions = Captions(features={"a dog": torch.ones(2, 16)}, encoder="0")
    save_captions(folder / "captions.safetensors", captions)
    with pytest.raises(ValueError, match="features of width 16, and t2i_tiny was trained with 24: make them again"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 2}, r"config\.json has \['heads'\], expected block_size, dcdd_name, guidance, model_type, .* alone"),
        ({"num_attention_heads": "2"}, "num_attention_heads '2' in its config.json, expected a whole number from 1"),
        ({"num_attention_heads": 3}, "width 32 must be a multiple of 4 times the heads, 12"),
        ({"block_size": 15}, "has 15 tokens an image, expected a square"),
        ({"block_size": None}, "nothing says how many tokens an image of"),
        ({"guidance": "strong"}, r"config\.json: guidance must be .*'strong'"),
        ({"guidance": 1e4}, r"config\.json: guidance must be .*10000"),
        ({"dcdd_name": 7}, r"config\.json: dcdd_name must be a text.*7"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(folder, changes, words):
    change_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=words):
        load(folder)


def test_code_in_a_checkpoint_is_not_run(folder):
    save(folder, tiny_weights(), trainer=Path("x"))
    with pytest.raises(ValueError, match="besides tensors, which could run code"):
        load(folder)
    torch.save({"model": 3}, folder / f"{NAME}.pt")
    with pytest.raises(ValueError, match="holds a int, expected tensors by name"):
        load(folder)
