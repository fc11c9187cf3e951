"""The shipped masked sampler: from the command line, against a few held-out scenes, and into a hole."""

import pytest
import torch
from PIL import Image

from dcdd_core.cli import main
from dcdd_core.method.calibration import apply_calibration
from dcdd_core.pipelines.progressive import sample_stages
from dcdd_core.types import same_codebook
from dcdd_pico.embedded import PROGRESSIVE, WEIGHTS
from dcdd_pico.models import load_pico, load_reader
from dcdd_pico.progressive import progressive_folder
from dcdd_pico.reader import fact_labels
from dcdd_pico.scenes import render_scene, scene_facts, scene_pixels

FOLDER = progressive_folder(WEIGHTS)

PROMPT = "a large plain red circle in the centre on a plain sky ground"


@pytest.fixture(scope="module")
def models():
    return load_pico(vlm=PROGRESSIVE)


def test_they_are_small_and_of_picos_tokens(models):
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 6 * 10**6
    assert same_codebook(models.sampler.codebook.fingerprint, models.tokenizer.codebook.fingerprint)
    assert (models.sampler.sampling.passes, models.sampler.sampling.order) == (11, "halton")


def test_the_command_samples_with_them_without_a_path(tmp_path, capsys):
    out, stages = tmp_path / "a.png", tmp_path / "stages.png"
    words = ["generate", PROMPT, "--sampler", "progressive", "--compare", "--steps", "4"]
    assert main([*words, "--out", str(out), "--stages", str(stages)]) == 0, capsys.readouterr().err
    with Image.open(stages) as sheet:
        assert sheet.width == 12 + 11 * (160 + 12)
    for path in (out, tmp_path / "a-vq.png"):
        with Image.open(path) as image:
            (red, green, blue), ground = image.getpixel((48, 48)), image.getpixel((8, 8))
            assert image.size == (96, 96)
            assert red > green + 60 and red > blue + 60 and ground[2] > ground[0] + 30, path


@torch.no_grad()
def test_a_sentence_becomes_its_image(models):
    facts = scene_facts("test", 12)
    sampling = models.sampler.sampling
    tokens = models.sampler.sample([f.caption() for f in facts], seeds=range(12), options=sampling).tokens
    answers = load_reader()(models.tokenizer.decode_tokens(tokens, models.sampler.grid))
    labels = fact_labels(facts)
    for fact in ("colour", "place", "ground_colour"):
        assert (answers[fact].argmax(1) == labels[fact]).float().mean() > 0.8, fact


@torch.no_grad()
def test_a_hole_is_filled_from_the_prompt_and_what_surrounds_it(models):
    """In the corners of the hole the ground goes on, where the triangle was is a star, and the rest is kept."""
    truth = scene_pixels(render_scene("test", 6).image[None])  # a striped blue triangle on dotted rose
    proxies = models.tokenizer.encode(truth)
    given = apply_calibration(proxies, models.tokenizer.codebook, models.decoder.card.calibration)
    hole = torch.zeros(12, 12, dtype=torch.bool)
    hole[2:10, 2:10] = True
    hole = hole.flatten()
    prompt = "a large plain yellow star in the centre on a dotted rose ground"
    edit = {"previous": given, "resample": hole, "options": models.sampler.sampling}
    filled = sample_stages(models.sampler, [prompt], seeds=[1], **edit).token_logits
    for name in ("tokens", "logits"):
        assert torch.equal(getattr(filled, name)[:, ~hole], getattr(given, name)[:, ~hole])
    image = models.tokenizer.decode_tokens(filled.tokens, filled.grid)[0]
    red, green, blue = image[:, 40:56, 40:56].mean(dim=(1, 2))
    assert min(red, green) > blue + 0.4, (red, green, blue)
    for corner in (image[:, 16:28, 16:28], image[:, 16:28, 68:80], image[:, 68:80, 68:80]):
        assert (corner.mean(dim=(1, 2)) - truth[0, :, :16].mean(dim=(1, 2))).abs().max() < 0.15
