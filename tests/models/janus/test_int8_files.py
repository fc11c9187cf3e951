"""A Janus folder whose matrices are in 8 bits: written, read back, and refused where its files are not of one model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import JanusForConditionalGeneration

from dcdd_core import registry
from dcdd_core.int8_rows import SCALE
from dcdd_core.models.janus.files import INT8_FILE, INT8_METHOD, save_int8
from dcdd_core.models.janus.sampler import JanusSampler
from dcdd_core.models.janus.tokenizer import load_tokenizer
from dcdd_core.models.text_tokenizer import save_tokenizer
from dcdd_core.types import same_codebook
from dcdd_pico.build_context import Recipe
from dcdd_pico.train_janus import pico_tokenizer, start
from tests.tiny import fill, tiny_vq

LAYER = "model.language_model.layers.0."
Q = f"{LAYER}self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def janus() -> JanusForConditionalGeneration:
    """One layer of width 64 over `tiny_vq`: every matrix of it is large enough."""
    return fill(start(tiny_vq(), pico_tokenizer(), Recipe(janus_width=64, janus_layers=1)))


@pytest.fixture(scope="module")
def stored(janus: JanusForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "janus"
    save_int8(folder, janus)
    save_tokenizer(pico_tokenizer(), folder)
    return folder


@pytest.fixture
def folder(stored: Path, tmp_path: Path) -> Path:
    """To be damaged."""
    return Path(shutil.copytree(stored, tmp_path / "janus"))


@pytest.fixture
def floats(janus: JanusForConditionalGeneration, tmp_path: Path) -> Path:
    """The same model as transformers writes it."""
    janus.save_pretrained(tmp_path / "floats")
    save_tokenizer(pico_tokenizer(), tmp_path / "floats")
    return tmp_path / "floats"


def test_large_matrices_are_in_8_bits_and_the_tokenizer_in_float16(stored, janus):
    held, own = load_file(stored / INT8_FILE), janus.state_dict()
    matrices = {name for name, value in held.items() if value.dtype == torch.int8}
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    parts += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    around = ("generation_aligner.hidden_layers.0", "generation_head.proj_out", "generation_head.vision_head")
    assert matrices == {f"{LAYER}{part}.weight" for part in parts} | {f"model.{part}.weight" for part in around}
    unused = ("lm_head.", "model.vision_model.", "model.aligner.")
    scales = {name + SCALE for name in matrices}
    assert set(held) == {name for name in own if not name.startswith(unused)} | scales
    for name in set(held) - matrices - scales:
        assert torch.equal(held[name], own[name].half()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_back_is_near_what_was_stored(stored, janus, dtype):
    sampler, own = JanusSampler.load(stored, dtype=dtype), janus.state_dict()
    found = sampler.model.state_dict()
    for name, value in found.items():
        assert value.dtype == dtype
        step = own[name].abs().amax(-1, keepdim=True) / 127 if name in matrices_of(stored) else 0
        rounding = own[name].abs() * (2.0**-11 + (2.0**-8 if dtype == torch.bfloat16 else 0)) + 1e-7
        assert ((value.float() - own[name]).abs() <= 0.5001 * step + rounding).all(), name
    assert sampler.name == "pico" and registry.sampler_family(stored).name == "janus"
    run = sampler.sample(["a red circle"], seeds=[0])
    assert run.grid == (4, 4) and same_codebook(run.codebook, load_tokenizer(stored).codebook.fingerprint)


def matrices_of(folder: Path) -> set[str]:
    return {name for name, value in load_file(folder / INT8_FILE).items() if value.dtype == torch.int8}


def test_its_image_tokenizer_is_that_of_the_model_in_half_precision(stored, janus):
    own = {name: value.half() for name, value in janus.model.vqmodel.state_dict().items()}
    found = load_tokenizer(stored).model.state_dict()
    assert set(found) == set(own) and all(torch.equal(found[name], own[name]) for name in own)


def test_transformers_does_not_take_the_integers_for_weights(stored):
    with pytest.raises(OSError, match="model.safetensors"):
        JanusForConditionalGeneration.from_pretrained(stored)


def test_files_of_two_models_are_refused(folder, floats):
    for_floats, for_rows = ((path / "config.json").read_text("utf-8") for path in (floats, folder))
    (folder / "config.json").write_text(for_floats, "utf-8")
    with pytest.raises(ValueError, match=rf"8-bit rows in {INT8_FILE}, and a config.json that does not say so.*fetch"):
        JanusSampler.load(folder)
    (folder / "config.json").write_text(for_rows, "utf-8")
    shutil.copy(floats / "model.safetensors", folder)
    with pytest.raises(ValueError, match=r"config.json says .*8-bit rows .*model.safetensors holds none.*fetch"):
        JanusSampler.load(folder)
    (floats / "config.json").write_text(for_rows, "utf-8")
    with pytest.raises(ValueError, match=r"config.json says .*8-bit rows .*model.safetensors holds none.*fetch"):
        JanusSampler.load(floats)
    (floats / "config.json").write_text(for_floats, "utf-8")
    assert JanusSampler.load(floats).grid == (4, 4)


DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "no scale": (lambda held: held.pop(Q + SCALE), "q_proj.weight as torch.int8 .*one scale each"),
    "a short scale": (lambda held: held.update({Q + SCALE: held[Q + SCALE][1:]}), "q_proj.weight as torch.int8"),
    "a scale of floats": (lambda held: held.update({Q: held[Q].float()}), "q_proj.weight_scale and no int8"),
    "a scale of nothing": (
        lambda held: held.update({f"{LAYER}x{SCALE}": torch.ones(1)}),
        "do not fit its config.json.*unexpected",
    ),
    "another width": (lambda held: held.update({Q: held[Q][:, 1:].contiguous()}), r"q_proj.weight is \[64, 63\]"),
    "other integers": (lambda held: held.update({Q: held[Q].to(torch.int32)}), "I32 without scales"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_fit_together_is_refused(folder, damage):
    change, words = DAMAGE[damage]
    held = load_file(folder / INT8_FILE)
    change(held)
    save_file(held, folder / INT8_FILE)
    with pytest.raises(ValueError, match=words) as caught:
        JanusSampler.load(folder)
    assert str(folder) in str(caught.value)
    assert load_tokenizer(folder).codebook.size == 64, "which is stored as floats"


def test_the_method_counts_in_transformers_layout_alone(folder):
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["quantization_config"] == {"quant_method": INT8_METHOD}
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ValueError, match=rf"is quantised \(by its config.json\): {INT8_METHOD}"):
        JanusSampler.load(folder)
