"""A small build: every stage runs and resumes, and the weights can be loaded and used."""

import pytest
import torch
from safetensors.torch import load_file

import dcdd_pico.build as stages
from dcdd_core.models.bundle import read_card
from dcdd_core.models.card import VARIANTS
from dcdd_core.models.cheap_decoder import load_cheap_decoder
from dcdd_core.models.masked.files import load_masked
from dcdd_core.pipelines.condition import condition_for
from dcdd_core.pipelines.decode import decode
from dcdd_core.protocols import SamplingOptions
from dcdd_pico.ablation import train_ablation
from dcdd_pico.build import build
from dcdd_pico.build_context import BuildContext, Recipe
from dcdd_pico.embedded import CHEAP, LLAMAGEN, PROGRESSIVE
from dcdd_pico.models import load_pico, load_reader
from dcdd_pico.progressive import progressive_folder
from dcdd_pico.sections import ablation_files

SMALL = Recipe(
    train_scenes=64,
    held_out_scenes=16,
    reader_steps=2,
    tokenizer_steps=6,
    tokenizer_batch=8,
    vq_decoder_steps=2,
    autoencoder_steps=2,
    autoencoder_batch=2,
    vae_decoder_steps=2,
    calibration_images=2,
    janus_layers=1,
    janus_width=64,
    janus_held_out=8,
    janus_steps=2,
    janus_batch=2,
    decoder_steps=2,
    prior_steps=2,
    cheap_steps=2,
    progressive_steps=2,
    progressive_batch=2,
    llamagen_steps=2,
    llamagen_batch=2,
    decoder_batch=3,
    post_updates=2,
    choice_scenes=8,
    variant_steps=1,
    variant_seeds=2,
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*")
def test_the_whole_build_in_small(tmp_path):
    context = BuildContext(folder=tmp_path / "work", device=torch.device("cpu"), recipe=SMALL)
    build(context, until="autoencoder", weights=tmp_path / "weights")
    assert not (tmp_path / "weights").exists() and not (tmp_path / "work" / "janus").exists()
    tokenizer = (tmp_path / "work" / "tokenizer" / "checkpoint.pt").stat().st_mtime_ns
    (tmp_path / "weights").mkdir()
    for name in ("README.md", "decoder.md"):
        (tmp_path / "weights" / name).write_text("of weights before")
    build(context, until="export", weights=tmp_path / "weights")
    assert (tmp_path / "weights" / "README.md").read_text() == "of weights before"
    assert not (tmp_path / "weights" / "decoder.md").exists() and Recipe.load(tmp_path / "weights").post_updates == 0
    build(context, weights=tmp_path / "weights")
    assert (tmp_path / "work" / "tokenizer" / "checkpoint.pt").stat().st_mtime_ns == tokenizer
    assert Recipe.load(tmp_path / "weights") == SMALL
    card = read_card(tmp_path / "weights" / "decoder.safetensors")
    assert card.condition_dropout > 0 and card.steps == 10, "post-trained, then served anew"
    assert "for 2 updates of" in (tmp_path / "weights" / "decoder.md").read_text()
    models = load_pico(weights=tmp_path / "weights")
    load_reader(weights=tmp_path / "weights")
    load_cheap_decoder(tmp_path / "weights" / CHEAP).require_for(models.codec)
    masked = load_masked(progressive_folder(tmp_path / "weights"))
    assert masked.sample(["a red circle"], seeds=[0]).codebook == models.tokenizer.codebook.fingerprint
    own = load_pico(weights=tmp_path / "weights", vlm=PROGRESSIVE).decoder.card.calibration
    assert (own.vlm, own.guidance) == ("pico progressive", masked.sampling.guidance)
    other = load_pico(weights=tmp_path / "weights", vlm=LLAMAGEN)
    assert other.sampler.sample(["a red circle"], seeds=[0]).codebook == models.tokenizer.codebook.fingerprint
    assert other.decoder.card.calibration.guidance == other.sampler.default_guidance == SMALL.llamagen_guidance
    grid = models.sampler.sample(
        ["a red circle"], seeds=[0], options=SamplingOptions(guidance=models.decoder.card.calibration.guidance)
    )
    condition = condition_for(models.decoder.card, grid, models.tokenizer.codebook)
    painted = decode(models.decoder, models.codec, condition, seeds=[0], steps=2).pixels
    assert painted.shape == (1, 3, 96, 96) and torch.isfinite(painted).all()
    train_ablation(context, tmp_path / "weights")
    found = ablation_files(tmp_path / "work" / "variants")
    assert len(found) == 2 * len(VARIANTS)
    assert {read_card(path).variant for path in found.values()} == set(VARIANTS)
    first, second = (load_file(found[f"lcdm, seed {seed}"]) for seed in (0, 1))
    assert any(not torch.equal(value, second[name]) for name, value in first.items())


def test_a_missing_text_detector_is_told_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "train_reader", lambda *_: pytest.fail("trained first"))
    monkeypatch.setattr("dcdd_pico.ruler.find_spec", lambda name: None)
    context = BuildContext(folder=tmp_path, device=torch.device("cpu"), recipe=SMALL)
    with pytest.raises(ValueError, match="rapidocr, which is not installed: pip install"):
        build(context, weights=tmp_path / "weights")
    monkeypatch.setattr(stages, "train_reader", lambda *_: None)
    monkeypatch.setattr(stages, "train_loss_reader", lambda *_: None)
    build(context, until="readers", weights=tmp_path / "weights")  # which chooses nothing


def test_an_unknown_stage_is_refused(tmp_path):
    context = BuildContext(folder=tmp_path, device=torch.device("cpu"), recipe=SMALL)
    with pytest.raises(ValueError, match="unknown stage"):
        build(context, until="tea")
