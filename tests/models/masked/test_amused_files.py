"""aMUSEd's folder: the published sizes, what is refused, and what may differ."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path

import pytest
import torch
from diffusers import AmusedScheduler, VQModel
from safetensors.torch import load_file, save_file

from dcdd_core import registry
from dcdd_core.models.masked import amused_files
from dcdd_core.models.masked.amused import FAMILY
from dcdd_core.types import same_codebook
from tests.tiny_amused import save_tiny_amused, save_words

PARTS = ("transformer", "text_encoder", "vqvae", "tokenizer", "scheduler")
WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vqvae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}

# The configurations of amused/amused-256 and amused/amused-512, which differ in three entries.
TRANSFORMER = {
    "_class_name": "UVit2DModel",
    "_diffusers_version": "0.25.0.dev0",
    "attention_dropout": 0.0,
    "block_num_heads": 12,
    "block_out_channels": 768,
    "codebook_size": 8192,
    "cond_embed_dim": 768,
    "encoder_hidden_size": 768,
    "hidden_dropout": 0.0,
    "hidden_size": 1024,
    "in_channels": 768,
    "intermediate_size": 2816,
    "layer_norm_eps": 1e-06,
    "ln_elementwise_affine": True,
    "micro_cond_embed_dim": 1280,
    "micro_cond_encode_dim": 256,
    "num_attention_heads": 16,
    "num_hidden_layers": 22,
    "num_res_blocks": 3,
    "use_bias": False,
    "vocab_size": 8256,
}
SMALL = {"downsample": False, "sample_size": 16, "upsample": False}
LARGE = {"downsample": True, "sample_size": 32, "upsample": True}
VQVAE = {
    "_class_name": "VQModel",
    "_diffusers_version": "0.25.0.dev0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 256, 512, 768],
    "down_block_types": ["DownEncoderBlock2D"] * 5,
    "in_channels": 3,
    "latent_channels": 64,
    "layers_per_block": 2,
    "lookup_from_codebook": True,
    "mid_block_add_attention": False,
    "norm_num_groups": 32,
    "norm_type": "group",
    "num_vq_embeddings": 8192,
    "out_channels": 3,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 5,
    "vq_embed_dim": None,
    "force_upcast": True,
}
TEXT = {
    "architectures": ["CLIPTextModelWithProjection"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.34.1",
    "vocab_size": 49408,
}
SCHEDULER = {"_class_name": "AmusedScheduler", "mask_token_id": 8255, "masking_schedule": "cosine"}


def residual(name, columns, hidden=1024, width=768):
    """A ConvNeXt block and its attention, as the published files name them."""
    block, attention = f"{name}.res_blocks.{columns}", f"{name}.attention_blocks.{columns}"
    shapes = {
        f"{block}.depthwise.weight": (width, 1, 3, 3),
        f"{block}.norm.weight": (width,),
        f"{block}.channelwise_linear_1.weight": (4 * width, width),
        f"{block}.channelwise_norm.gamma": (1, 1, 1, 4 * width),
        f"{block}.channelwise_norm.beta": (1, 1, 1, 4 * width),
        f"{block}.channelwise_linear_2.weight": (width, 4 * width),
        f"{block}.cond_embeds_mapper.weight": (2 * width, hidden),
        f"{attention}.kv_mapper.weight": (width, hidden),
    }
    for number in (1, 2):
        shapes[f"{attention}.norm{number}.weight"] = (width,)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes[f"{attention}.attn{number}.{part}.weight"] = (width, width)
    return shapes


def transformer_shapes(large: bool) -> dict[str, tuple[int, ...]]:
    """Written down apart from diffusers' class: 603,537,664 weights of amused-256 and 608,257,792 of amused-512."""
    width, hidden = 768, 1024
    shapes = {
        "encoder_proj.weight": (hidden, 768),
        "encoder_proj_layer_norm.weight": (hidden,),
        "embed.embeddings.weight": (8256, width),
        "embed.layer_norm.weight": (width,),
        "embed.conv.weight": (width, width, 1, 1),
        "cond_embed.linear_1.weight": (hidden, 5 * 256 + 768),
        "cond_embed.linear_2.weight": (hidden, hidden),
        "project_to_hidden_norm.weight": (width,),
        "project_to_hidden.weight": (hidden, width),
        "project_from_hidden_norm.weight": (hidden,),
        "project_from_hidden.weight": (width, hidden),
        "mlm_layer.conv1.weight": (width, width, 1, 1),
        "mlm_layer.layer_norm.weight": (width,),
        "mlm_layer.conv2.weight": (8192, width, 1, 1),
    }
    for i in range(3):
        shapes |= residual("down_block", i) | residual("up_block", i)
    for i in range(22):
        layer = f"transformer_layers.{i}"
        for number in (1, 2, 3):
            shapes[f"{layer}.norm{number}.linear.weight"] = (2 * hidden, hidden)
            shapes[f"{layer}.norm{number}.norm.weight"] = (hidden,)
        for number in (1, 2):
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes[f"{layer}.attn{number}.{part}.weight"] = (hidden, hidden)
        shapes[f"{layer}.ff.net.0.proj.weight"] = (2 * 2816, hidden)
        shapes[f"{layer}.ff.net.2.weight"] = (hidden, 2816)
    if large:
        for step in ("down_block.downsample", "up_block.upsample"):
            shapes |= {f"{step}.norm.weight": (width,), f"{step}.conv.weight": (width, width, 2, 2)}
    return shapes


def text_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, 768),
        "text_model.embeddings.position_embedding.weight": (77, 768),
        "text_model.final_layer_norm.weight": (768,),
        "text_model.final_layer_norm.bias": (768,),
        "text_projection.weight": (768, 768),
    }
    sizes = {f"self_attn.{part}_proj": (768, 768) for part in ("q", "k", "v", "out")}
    sizes |= {"mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072), "layer_norm1": (768,), "layer_norm2": (768,)}
    for i in range(12):
        for part, shape in sizes.items():
            shapes[f"text_model.encoder.layers.{i}.{part}.weight"] = shape
            shapes[f"text_model.encoder.layers.{i}.{part}.bias"] = shape[:1]
    return shapes


def write_hollow(file: Path, shapes) -> None:
    """A safetensors file of this header whose values take no space on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)


@pytest.mark.parametrize(("sizes", "weights"), [(SMALL, 603_537_664), (LARGE, 608_257_792)], ids=["256", "512"])
def test_the_published_models_at_their_size(tmp_path, monkeypatch, sizes, weights):
    folder = tmp_path / "models--amused--amused" / "snapshots" / "abc"
    for part, config in (("transformer", TRANSFORMER | sizes), ("vqvae", VQVAE), ("text_encoder", TEXT)):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    save_words(folder / "tokenizer")
    large = sizes is LARGE
    written = {"transformer": transformer_shapes(large), "text_encoder": text_shapes()}
    with torch.device("meta"):
        codec = VQModel(**{name: value for name, value in VQVAE.items() if not name.startswith("_")})
    written["vqvae"] = {name: tuple(value.shape) for name, value in codec.state_dict().items()}
    for part, shapes in written.items():
        write_hollow(folder / part / WEIGHTS[part], shapes)
    # As the hub lists them: 603M and 608M weights, files of 585 MB and 495 MB.
    counts = {part: sum(map(math.prod, shapes.values())) for part, shapes in written.items()}
    assert counts == {"transformer": weights, "text_encoder": 123_650_304, "vqvae": 146_244_675}

    def read(source, wanted, **_):
        shapes = {name: shape for name, shape in written[Path(source).name].items() if wanted(name)}
        if list(shapes) == ["quantize.embedding.weight"]:
            return {name: torch.randn(shape) for name, shape in shapes.items()}
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    monkeypatch.setattr(amused_files, "read_wanted", read)
    assert registry.sampler_family(folder).name == "amused"
    sampler = FAMILY.load_sampler(str(folder), device="meta")
    network, side = sampler.model, sizes["sample_size"]
    assert (sampler.grid, sampler.codebook.size, network.mask_token) == ((side, side), 8192, 8255)
    assert sampler.name == "amused" and all(weight.is_meta for weight in network.parameters())
    tokens, ids = (torch.zeros(2, n, dtype=torch.int64, device="meta") for n in (side * side, 77))
    with torch.no_grad():
        prefix = network.prefix(ids, torch.zeros(2))
        assert prefix.states.shape == (2, 77, 768) and prefix.pooled.shape == (2, 768)
        assert network.logits(network(tokens, prefix)).shape == (2, side * side, 8192)
    tokenizer = FAMILY.load_tokenizer(str(folder))
    assert (tokenizer.grid, tokenizer.factor, tokenizer.codebook.dim) == ((side, side), 16, 66)


def test_the_published_tokenizer_is_that_of_the_configuration():
    tokenizer = FAMILY.published_tokenizer()
    assert (tokenizer.grid, tokenizer.factor) == ((32, 32), 16)
    found = tokenizer.model.config
    assert {name: found[name] for name in VQVAE if name[0] != "_"} == {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in (VQVAE | {"scaling_factor": 0.18215}).items()
        if name[0] != "_"
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny_amused(tmp_path_factory.mktemp("amused") / "model")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def change(folder: Path, part: str, changes: dict) -> None:
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def change_weights(folder: Path, part: str, change) -> None:
    file = folder / part / WEIGHTS[part]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def load_both(folder):
    FAMILY.load_sampler(str(folder))
    FAMILY.load_tokenizer(str(folder))


def test_which_folders_are_read(folder):
    assert FAMILY.reads(str(folder)) and registry.sampler_family(folder) is FAMILY
    for name in ("AmusedImg2ImgPipeline", "AmusedInpaintPipeline"):
        (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
        assert FAMILY.reads(str(folder)), "as diffusers saves it for edits"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    assert not FAMILY.reads(str(folder))
    (folder / "model_index.json").unlink()
    assert FAMILY.reads(str(folder))
    load_both(folder)
    change(folder, "transformer", {"_class_name": "FluxTransformer2DModel"})
    assert not FAMILY.reads(str(folder)) and not FAMILY.reads(str(folder / "none"))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing_is_named(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(
        ValueError, match=f"has no folder {part} .it holds .* as every aMUSEd model has: fetch the whole"
    ):
        load_both(folder)


@pytest.mark.parametrize(
    ("part", "file"),
    [(part, name) for part, name in WEIGHTS.items()]
    + [(part, "config.json") for part in WEIGHTS]
    + [("scheduler", "scheduler_config.json")]
    + [("tokenizer", name) for name in ("vocab.json", "merges.txt", "tokenizer_config.json")],
)
def test_a_file_that_is_missing_is_named(folder, part, file):
    (folder / part / file).unlink()
    with pytest.raises(ValueError, match=f"{part}.*({file}|expected one .safetensors file)"):
        load_both(folder)


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("transformer", {"_class_name": "UNet2DModel"}, "_class_name is 'UNet2DModel', expected 'UVit2DModel'"),
        ("vqvae", {"_class_name": "AutoencoderKL"}, "_class_name is 'AutoencoderKL', expected 'VQModel'"),
        ("scheduler", {"_class_name": "DDIMScheduler"}, "is 'DDIMScheduler', expected 'AmusedScheduler'"),
        ("text_encoder", {"architectures": ["CLIPTextModel"]}, r"is \['CLIPTextModel'\] .* expected"),
        ("text_encoder", {"model_type": "t5"}, "model_type 't5', expected"),
        ("transformer", {"quantization_config": {}}, "its weights are quantised"),
        ("text_encoder", {"quantization_config": {}}, "its weights are quantised"),
        ("transformer", {"depth": 3}, "unknown entries depth: update diffusers, or fetch"),
        ("vqvae", {"depth": 3}, "unknown entries depth"),
        ("transformer", {"hidden_size": "32"}, "hidden_size must be a whole number"),
        ("transformer", {"use_bias": 1}, "use_bias must be true or false"),
        ("transformer", {"hidden_dropout": 1}, "hidden_dropout must be"),
        ("transformer", {"layer_norm_eps": 0}, "layer_norm_eps must be"),
        ("transformer", {"num_attention_heads": 5}, "hidden_size 32 must be a multiple of num_attention_heads 5"),
        ("transformer", {"block_num_heads": 3}, "block_out_channels 28 must be a multiple of block_num_heads 3"),
        ("transformer", {"micro_cond_embed_dim": 48}, "must be 5 times micro_cond_encode_dim 8"),
        ("transformer", {"downsample": True}, "downsample True and upsample False must be the same"),
        ("transformer", {"downsample": True, "upsample": True, "sample_size": 5}, "only of an even sample_size, got 5"),
        ("transformer", {"num_hidden_layers": 2**20}, "num_hidden_layers 1,048,576, and the weights have 2"),
        ("transformer", {"num_res_blocks": 3}, "num_res_blocks 3, and the weights have 2"),
        ("transformer", {"num_hidden_layers": 1}, r"unexpected: transformer_layers\.1\."),
        ("transformer", {"hidden_size": 64}, "hidden_size 64, and the weights have 32"),
        ("transformer", {"vocab_size": 80}, "vocab_size 80, and the weights have 72"),
        ("transformer", {"intermediate_size": 64}, "intermediate_size 64, and the weights have 48"),
        ("transformer", {"block_out_channels": 32}, "block_out_channels 32, and the weights have 28"),
        ("transformer", {"codebook_size": 65}, "num_vq_embeddings is 64, and .* says codebook_size 65"),
        ("transformer", {"cond_embed_dim": 32}, "projection_dim is 24, and .* says cond_embed_dim 32"),
        ("transformer", {"encoder_hidden_size": 32}, "hidden_size is 16, and .* says encoder_hidden_size 32"),
        ("text_encoder", {"num_hidden_layers": 12}, "num_hidden_layers 12, and the weights have 3"),
        ("text_encoder", {"num_attention_heads": 3}, "16.* multiple of .*attention.heads .?3"),
        ("text_encoder", {"vocab_size": 0}, "vocab_size must be a whole number"),
        ("text_encoder", {"vocab_size": 500}, "has 514 words, and the text encoder 500"),
        ("text_encoder", {"vocab_size": 600}, "vocab_size 600, and the weights have 514"),
        ("vqvae", {"num_vq_embeddings": 65}, "num_vq_embeddings is 65, and .* says codebook_size 64"),
        ("vqvae", {"vq_embed_dim": 4}, "vq_embed_dim or latent_channels 4, and the weights have 8"),
        ("vqvae", {"vq_embed_dim": 0}, "vq_embed_dim must be"),
        ("vqvae", {"norm_type": "spatial"}, "norm_type must be 'group', got 'spatial'"),
        ("vqvae", {"in_channels": 1}, "must be 3, of colour images, got 1 and 3"),
        ("vqvae", {"layers_per_block": 2}, "layers_per_block 2, and the weights have 1"),
        ("vqvae", {"latent_channels": 0}, "latent_channels must be"),
        ("vqvae", {"block_out_channels": [16, 8, 8, 8, 16]}, r"block_out_channels\[0\] 16, and the weights have 8"),
        ("vqvae", {"mid_block_add_attention": True}, "missing: decoder.mid_block.attentions"),
        ("scheduler", {"mask_token_id": 63}, "mask_token_id must be a whole number in 64..71, got 63"),
        ("scheduler", {"mask_token_id": ...}, "mask_token_id must be a whole number in 64..71, got None"),
        ("scheduler", {"masking_schedule": "sine"}, "masking_schedule must be 'cosine' or 'linear', got 'sine'"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(folder, part, changes, words):
    change(folder, part, changes)
    with pytest.raises(ValueError, match=words) as caught:
        load_both(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("transformer", "project_to_hidden.weight"),
        ("text_encoder", "text_projection.weight"),
        ("vqvae", "post_quant_conv.weight"),
        ("vqvae", "quantize.embedding.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, part, name):
    kept = load_file(folder / part / WEIGHTS[part])[name]
    for change, words in (
        (lambda t: t.pop(name), f"(missing:|has no tensor) {name}"),
        (lambda t: t.update({name: kept.T.contiguous() if kept.ndim == 2 else kept[:1]}), f"{name} is"),
        (lambda t: t.update({name: kept, "other": torch.zeros(1)}), "unexpected: other"),
        (lambda t: (t.pop("other"), t.update({name: kept * float("nan")})), "not finite"),
        (lambda t: t.update({name: kept, f"{name}.absmax": torch.zeros(1)}), "is quantised .* bitsandbytes, 4 bits"),
    ):
        change_weights(folder, part, change)
        with pytest.raises(ValueError, match=words):
            load_both(folder)


def test_words_of_another_tokenizer_are_refused(folder):
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "T5Tokenizer"}))
    with pytest.raises(ValueError, match="tokenizer_class is 'T5Tokenizer', expected 'CLIPTokenizer'"):
        load_both(folder)


def test_an_old_texts_positions_are_ignored(folder, saved):
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    change_weights(folder, "text_encoder", lambda tensors: tensors.update(positions))
    old, new = (FAMILY.load_sampler(str(each)) for each in (folder, saved))
    assert torch.equal(*(each.sample(["red"], seeds=[1]).logits for each in (old, new)))


def test_half_of_the_files_may_be_stored_beside(folder, saved):
    for part, name in WEIGHTS.items():
        other = folder / part / name.replace(".safetensors", ".fp16.safetensors")
        save_file({key: value.half() for key, value in load_file(folder / part / name).items()}, other)
    whole, expected = (FAMILY.load_sampler(str(each)) for each in (folder, saved))
    assert whole.fingerprint == expected.fingerprint
    for part, name in WEIGHTS.items():
        (folder / part / name).unlink()
    half = FAMILY.load_sampler(str(folder))
    assert half.fingerprint != expected.fingerprint
    assert same_codebook(half.codebook.fingerprint, expected.codebook.fingerprint)
    load_both(folder)


def test_a_linear_schedule_is_the_schedulers(folder):
    change(folder, "scheduler", {"masking_schedule": "linear", "temperature": [2, 0]})
    assert FAMILY.load_sampler(str(folder)).sampling.schedule == "linear"
    change(folder, "scheduler", {"masking_schedule": ...})
    assert FAMILY.load_sampler(str(folder)).sampling.schedule == AmusedScheduler(1).config.masking_schedule


def test_what_saved_tokenizers_look_like_may_differ(folder, saved):
    words = FAMILY.load_sampler(str(saved)).words
    shutil.rmtree(folder / "tokenizer")
    words.tokenizer.save_pretrained(folder / "tokenizer")
    assert FAMILY.load_sampler(str(folder)).words.ids("a red circle") == words.ids("a red circle")
