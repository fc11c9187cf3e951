"""The shipped weights on a few held-out scenes: minimum quality of every part."""

import numpy as np
import pytest
import torch

from dcdd_core.evaluation.metrics import psnr, ssim
from dcdd_core.models.cheap_decoder import load_cheap_decoder
from dcdd_core.pipelines.condition import condition_for
from dcdd_core.pipelines.decode import decode
from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import same_codebook
from dcdd_pico.embedded import CHEAP, WEIGHTS
from dcdd_pico.export import MOST_BYTES
from dcdd_pico.models import load_pico, load_reader
from dcdd_pico.reader import fact_labels
from dcdd_pico.results_table import MARKS
from dcdd_pico.scenes import render_scene, scene_pixels
from dcdd_pico.sections import TITLES

pytestmark = pytest.mark.skipif(not WEIGHTS.exists(), reason="the embedded weights are not built: make pico")

SCENES = [render_scene("test", i) for i in range(48)]


@pytest.fixture(scope="module")
def models():
    return load_pico()


@pytest.fixture(scope="module")
def reader():
    return load_reader()


def pixels(count=None):
    return torch.cat([scene_pixels(scene.image[None]) for scene in SCENES[:count]])


def test_they_are_small_enough_for_git():
    assert sum(p.stat().st_size for p in WEIGHTS.rglob("*") if p.is_file()) <= MOST_BYTES


def test_the_parts_belong_together(models):
    card = models.decoder.card
    for other in (models.tokenizer.codebook.fingerprint, card.codebook, card.calibration.codebook):
        assert same_codebook(models.sampler.codebook.fingerprint, other)
    assert card.calibration.converged
    assert card.calibration.vlm == models.sampler.name
    assert abs(card.calibration.achieved.mean_entropy - card.calibration.target.mean_entropy) <= 0.02


@torch.no_grad()
def test_the_measuring_network_reads_real_scenes(reader):
    labels = fact_labels([scene.facts for scene in SCENES])
    answers = reader(pixels())
    for fact in ("shape", "colour", "texture", "place"):
        assert (answers[fact].argmax(1) == labels[fact]).float().mean() > 0.9, fact


def test_the_tokenizer_uses_its_codebook(models):
    assert len(models.tokenizer.encode(pixels()).tokens.unique()) > 0.9 * models.tokenizer.codebook.size


def test_both_decoders_reconstruct_and_the_diffusion_decoder_is_nearer(models, reader):
    truth = pixels(12)
    proxies = models.tokenizer.encode(truth)
    by_vq = models.tokenizer.decode_tokens(proxies.tokens, proxies.grid)
    condition = condition_for(models.decoder.card, proxies, models.tokenizer.codebook)
    painted = decode(models.decoder, models.codec, condition, seeds=range(12), steps=10).pixels
    assert ssim(truth, by_vq).mean() > 0.75
    assert ssim(truth, painted).mean() > ssim(truth, by_vq).mean()
    assert reader.perceptual_distance(truth, painted).mean() < reader.perceptual_distance(truth, by_vq).mean()


@torch.no_grad()
def test_the_small_decoder_shows_what_the_autoencoder_does(models):
    small = load_cheap_decoder(WEIGHTS / CHEAP)
    small.require_for(models.codec)
    latents = models.codec.encode(scene_pixels(np.stack([render_scene("test", k, size=96).image for k in range(4)])))
    whole, seen = models.codec.decode(latents), small(models.codec.normalize(latents))
    assert psnr(whole, seen).mean() > 24
    tokens = models.tokenizer.tokens(models.tokenizer.features(whole))
    assert (models.tokenizer.tokens(models.tokenizer.features(seen)) == tokens).float().mean() > 0.5


def test_a_sentence_becomes_its_image(models, reader):
    facts = [scene.facts for scene in SCENES[:12]]
    grid = models.sampler.sample(
        [f.caption() for f in facts],
        seeds=range(12),
        options=SamplingOptions(guidance=models.decoder.card.calibration.guidance),
    )
    condition = condition_for(models.decoder.card, grid, models.tokenizer.codebook)
    painted = decode(models.decoder, models.codec, condition, seeds=range(12), steps=10).pixels
    labels, answers = fact_labels(facts), reader(painted)
    for fact in ("colour", "place", "ground_colour"):
        assert (answers[fact].argmax(1) == labels[fact]).float().mean() > 0.8, fact


@torch.no_grad()
def test_localised_decoding_paints_the_box_like_its_surroundings(models):
    """From the image's own tokens, with the surroundings given: the box must be nearer to the truth than its mean."""
    truth = pixels(6)
    mask = torch.zeros(1, 1, 96, 96)
    mask[..., 24:72, 24:72] = 1
    condition = condition_for(models.decoder.card, models.tokenizer.encode(truth), models.tokenizer.codebook)
    painted = decode(models.decoder, models.codec, condition, seeds=range(6), steps=10, image=truth, mask=mask).pixels
    box = (..., slice(24, 72), slice(24, 72))
    flat = truth[box].mean(dim=(2, 3), keepdim=True)
    assert (painted[box] - truth[box]).abs().mean() < 0.7 * (flat - truth[box]).abs().mean()
    assert torch.equal(painted[..., :24, :], truth[..., :24, :])


def test_the_card_shows_the_tables():
    table = (WEIGHTS / "README.md").read_text("utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]
    assert all(TITLES[section] in table for section in ("reconstruction", "text", "calibration", "reader"))
