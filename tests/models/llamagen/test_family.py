"""LlamaGen beside other families: what belongs to one of them is refused by the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dcdd_core import registry
from dcdd_core.cli import main
from dcdd_core.method.lcdm import map_logits
from dcdd_core.models.bundle import save_bundle
from dcdd_core.models.janus.sampler import JanusSampler
from dcdd_core.models.llamagen.tokenizer import llamagen_name
from dcdd_core.pipelines.load import ModelPaths, load_models
from dcdd_core.types import Calibration, Codebook
from tests.tiny import save_janus, tiny_decoder, tiny_janus, tiny_vae, tiny_vq
from tests.tiny_llamagen import save_llamagen

PROMPTS, SEEDS = ["a red circle"], [0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LlamaGen with another codebook than the tiny Janus."""
    folder = save_llamagen(tmp_path_factory.mktemp("llamagen") / "model")
    other = {llamagen_name(name): value for name, value in tiny_vq(1).state_dict().items()}
    torch.save({"model": other}, folder / "vq_ds16_t2i.pt")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    return registry.sampler_family(folder).load_sampler(str(folder)).sample(PROMPTS, seeds=SEEDS)


def test_a_janus_decoder_is_refused(folder, tmp_path):
    save_bundle(tmp_path / "decoder.safetensors", tiny_decoder())
    tiny_vae().save_pretrained(tmp_path / "vae")
    with pytest.raises(
        ValueError,
        match="trained for the codebook of tiny, but t2i_tiny has another: use the decoder bundle made for this VLM",
    ):
        load_models(ModelPaths(vlm=folder, decoder=tmp_path / "decoder.safetensors", vae=tmp_path / "vae"))


def test_a_janus_codebook_is_refused(run):
    with pytest.raises(ValueError, match="codebook"):
        map_logits(run, Codebook(tiny_vq().quantize.embedding.weight))


def test_janus_edits_none_of_its_tokens(folder, run):
    with pytest.raises(ValueError, match="the kept tokens are of another codebook .64 codes, made by t2i_tiny"):
        JanusSampler(*tiny_janus()).sample(
            PROMPTS, seeds=SEEDS, previous=run, resample=torch.ones(16, dtype=torch.bool)
        )


@pytest.mark.filterwarnings("ignore:.*")
def test_its_calibration_is_fitted_at_its_own_guidance(folder, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for k in range(2):
        noise = np.random.default_rng(k).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{k}.png")
    out = tmp_path / "calibration.safetensors"
    given = ["--vlm", str(folder), "--images", str(tmp_path / "images"), "--count", "2", "--out", str(out)]
    assert main(["calibrate", *given]) == 0, capsys.readouterr()
    calibration = Calibration.load(out)
    assert (calibration.guidance, calibration.vlm) == (7.5, "t2i_tiny")
    tokenizer = registry.sampler_family(folder).load_tokenizer(str(folder))
    assert calibration.codebook == tokenizer.codebook.fingerprint


def test_a_janus_folder_is_not_its_own(tmp_path):
    assert registry.sampler_family(save_janus(tmp_path / "janus")).name == "janus"


def test_the_published_tokenizer_is_on_the_grid_of_256_pixels():
    tokenizer = next(family for family in registry.samplers() if family.name == "llamagen").published_tokenizer()
    assert (tokenizer.grid, tokenizer.factor) == ((16, 16), 16) and tokenizer.codebook.size == 16384
