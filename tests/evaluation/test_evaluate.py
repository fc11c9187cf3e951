"""Both evaluations on the embedded models' shapes with random weights: values, categories, resuming, several processes.

The sampler is a fast fake, since only what happens to its tokens and logits is tested here.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from dcdd_core.evaluation import decoding
from dcdd_core.evaluation.decoding import Decoders, seed_of
from dcdd_core.evaluation.evaluate import EvaluationRun, evaluate_reconstruction, evaluate_text, generate_geneval
from dcdd_core.evaluation.figures import text_of
from dcdd_core.evaluation.frechet import FrechetStatistics, frechet_distance
from dcdd_core.evaluation.image_folder import as_measured, list_images, read_pixels
from dcdd_core.evaluation.metrics import psnr, ssim
from dcdd_core.evaluation.networks import FeatureNetwork
from dcdd_core.evaluation.prompts import Prompt, read_geneval
from dcdd_core.method.sampling import keyed_generator
from dcdd_core.pipelines.condition import condition_for
from dcdd_core.pipelines.decode import Decoded, decode
from dcdd_core.pipelines.distributed import Processes
from dcdd_core.pipelines.guided import GuidanceOptions, token_guide
from dcdd_core.pipelines.image_files import ReadPolicy
from dcdd_core.types import DCDDWarning, TokenLogits
from dcdd_pico import embedded
from dcdd_pico.models import feature_network, load_pico, perceptual_network
from dcdd_pico.scenes import render_scene
from tests.tiny import random_pico


@pytest.fixture(scope="module", autouse=True)
def weights(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = random_pico(tmp_path_factory.mktemp("pico") / "weights")
        patch.setattr(embedded, "WEIGHTS", folder)
        yield folder


@pytest.fixture(scope="module")
def decoders(weights):
    models = load_pico(with_sampler=False)
    return Decoders(models=models, card=models.decoder.card, steps=1)


@pytest.fixture(scope="module")
def networks(weights):
    return {"features": feature_network(), "perceptual": perceptual_network()}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """MJHQ-30K's layout: three images of animals and four of plants, one of another size."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(7):
        path = folder / ("animals" if i < 3 else "plants") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(render_scene("test", i).image).resize((120, 96) if i == 5 else (96, 96)).save(path)
    return folder


def reconstruct(out, images, decoders, networks, *, by_category=True, processes=None, limit=None, **options):
    run = EvaluationRun(
        out=out,
        processes=processes or Processes(),
        batch=2,
        statistics=options.pop("statistics", None),
        policy=options.pop("policy", ReadPolicy()),
    )
    files = list_images(images, by_category=by_category, limit=limit)
    return evaluate_reconstruction(run, files, decoders, **networks, **options)


def results(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, images, decoders, networks):
    """An uninterrupted reconstruction."""
    out = tmp_path_factory.mktemp("whole")
    reconstruct(out, images, decoders, networks, statistics=out / "real.safetensors", keep_images=True)
    return out


def test_the_numbers_are_those_of_a_direct_computation(whole, images, decoders, networks):
    images = list_images(images)
    truth = read_pixels(images, 96)
    painted = decoders.paint(decoders.models.tokenizer.encode(truth), [seed_of(0, image.name) for image in images])
    features, distance = networks["features"].features, networks["perceptual"].distance
    found = results(whole)["scopes"]
    for path, name in decoding.PATHS.items():
        made = as_measured(painted[path], 96)
        for scope, part in (("overall", slice(0, 7)), ("animals", slice(0, 3)), ("plants", slice(3, 7))):
            real_statistics, made_statistics = (FrechetStatistics.of([features(x[part])]) for x in (truth, made))
            expected = {
                "frechet": frechet_distance(real_statistics, made_statistics),
                "ssim": float(ssim(truth[part], made[part]).mean()),
                "psnr": float(psnr(truth[part], made[part]).mean()),
                "perceptual": float(distance(truth[part], made[part]).mean()),
            }
            assert found[scope][name] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_report_says_all_of_it(whole):
    held, text = results(whole), (whole / "report.md").read_text()
    assert held["pictures"] == held["references"] == {"overall": 7, "animals": 3, "plants": 4}
    assert held["settings"]["steps"] == 1 and held["settings"]["calibration"]["scale"] == 25.0
    assert "rFrechet ↓ | SSIM ↑ | PSNR ↑ | perceptual ↓" in text and "## SSIM ↑ by category" in text
    assert f"{held['scopes']['plants']['DCDD decode']['ssim']:.5g}" in text
    assert all(Image.open(whole / name).width > 200 for name in ("frechet.png", "scores.png"))


def test_files_keep_their_names_and_keys(whole):
    """A run that was stopped under an earlier version must be resumed, and scripts read results.json."""
    held = results(whole)
    assert set(held) == {
        *("size", "painted", "exact", "pictures", "references", "networks", "settings", "left_out", "scopes"),
    }
    assert json.loads((whole / "settings.json").read_text()) == held["settings"]
    assert set(held["settings"]) == {
        *("evaluation", "seed", "size", "tokenizer", "decoder", "decoder dtype", "autoencoder", "variant", "reads"),
        *("calibration", "steps", "shift", "guidance", "resolution", "pixels_per_token"),
        *("vae_factor", "vae_shift", "vae_scale"),
    }
    assert set(held["settings"]["calibration"]) == {"scale", "affine_scale", "smoothing", "anchor"}
    (network,) = (whole / "measured").iterdir()
    assert [folder.name for folder in network.iterdir()] == ["reconstruction"]
    assert {folder.name for folder in (whole / "pictures").iterdir()} == {"vq", "dcdd"}


def test_decoded_images_are_kept_on_demand(whole, images, decoders):
    (image,) = [p for p in list_images(images) if p.name == "plants/4.png"]
    for path in decoders.paths:
        assert Image.open(whole / "pictures" / path / "plants" / "4.png.png").size == (96, 96)
    grid = decoders.models.tokenizer.encode(read_pixels([image], 96))
    by_vq = as_measured(decoders.models.tokenizer.decode_tokens(grid.tokens, grid.grid), 96)
    kept = read_pixels(list_images(whole / "pictures" / "vq" / "plants", limit=2)[1:], 96)
    assert (by_vq - kept).abs().max() <= 2 / 255 + 1e-6


def fails_after(calls):
    """`decode`, interrupted after this many calls."""
    left = iter(range(calls))

    def decode(*arguments, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real_decode(*arguments, **options)

    return decode


real_decode = decoding.decode


def test_an_interrupted_run_goes_on_to_the_same_numbers(whole, tmp_path, images, decoders, networks, monkeypatch):
    monkeypatch.setattr(decoding, "decode", fails_after(2))
    with pytest.raises(KeyboardInterrupt):
        reconstruct(tmp_path, images, decoders, networks)
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setattr(decoding, "decode", fails_after(2))  # of four batches two are left
    reconstruct(tmp_path, images, decoders, networks)
    assert (tmp_path / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    monkeypatch.setattr(decoding, "decode", fails_after(0))  # nothing is decoded again
    reconstruct(tmp_path, images, decoders, networks)
    assert (tmp_path / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def together(work, count=3):
    """Runs `work(processes)` in threads that share a barrier; returns what the first one returns."""
    barrier, returned = threading.Barrier(count, timeout=120), [None] * count

    def one(index):
        returned[index] = work(Processes(index=index, count=count, wait=barrier.wait))

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert returned[1:] == [None] * (count - 1)
    return returned[0]


def test_three_share_the_work_and_give_the_same_numbers(whole, tmp_path, images, decoders, networks):
    text = together(lambda crew: reconstruct(tmp_path, images, decoders, networks, processes=crew))
    assert "VQ-VAE decode" in text
    assert (tmp_path / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def test_more_images_and_other_scopes_go_on_from_what_is_there(whole, tmp_path, images, decoders, networks):
    reconstruct(tmp_path, images, decoders, networks, limit=2)
    assert results(tmp_path)["pictures"] == {"overall": 4, "animals": 2, "plants": 2}
    reconstruct(tmp_path, images, decoders, networks, by_category=False)
    found, expected = results(tmp_path)["scopes"], results(whole)["scopes"]
    assert found.keys() == {"overall"}
    assert found["overall"]["DCDD decode"] == pytest.approx(expected["overall"]["DCDD decode"], rel=1e-4)


def test_other_settings_are_refused(whole, images, decoders, networks):
    with pytest.raises(ValueError, match=r"steps 1 -> 2\).*another --out"):
        other = Decoders(models=decoders.models, card=decoders.card, steps=2)
        reconstruct(whole, images, other, networks)


def test_a_decoder_that_is_served_otherwise_is_another(decoders):
    settings, decoder = decoders.settings(), decoders.models.decoder
    card = decoder.card
    try:
        for change in ({"shift": 2.0}, {"vae_scale": 2 * card.vae_scale}):
            decoder.card = replace(card, **change)
            assert {name for name, value in decoders.settings().items() if settings[name] != value} == set(change)
    finally:
        decoder.card = card
    assert replace(decoders, shift=2.0).settings() == settings | {"shift": 2.0}


def test_distribution_guidance_paints_and_is_named_where_it_is_on(decoders):
    settings, logits = decoders.settings(), decoders.models.tokenizer.encode(torch.rand(2, 3, 96, 96))
    plain, guided = replace(decoders, steps=2), replace(decoders, steps=2, strength=0.3)
    assert replace(decoders, strength=0.3).settings() == settings | {"distribution_guidance": 0.3}
    assert "distribution_guidance" not in settings  # Nor do results from before it name it.
    images, pulled = (each.paint(logits, [7, 8]) for each in (plain, guided))
    assert torch.equal(images["vq"], pulled["vq"])
    differ = (images["dcdd"] - pulled["dcdd"]).abs().amax((1, 2, 3))
    assert (differ > 1e-3).all()
    models, condition = decoders.models, condition_for(decoders.card, logits, decoders.models.tokenizer.codebook)
    scale, options = decoders.card.calibration.sharpness, GuidanceOptions(strength=0.3, pull=0.0)
    guide = token_guide(models.tokenizer, models.codec, condition, scale=scale, options=options)
    expected = decode(models.decoder, models.codec, condition, seeds=[7, 8], steps=2, guide=guide).pixels
    assert torch.equal(pulled["dcdd"], expected)
    with pytest.raises(ValueError, match="strength of 0.3 needs a decoder and a calibration"):
        replace(decoders, card=replace(decoders.card, calibration=None), strength=0.3)
    for wrong in (-0.1, 11.0, float("nan")):
        with pytest.raises(ValueError, match="strength must be"):
            replace(decoders, strength=wrong)


def test_guidance_on_the_condition_is_painted_with_and_named_where_it_is_on(decoders, monkeypatch):
    settings, decoder, seen = decoders.settings(), decoders.models.decoder, []
    monkeypatch.setattr(decoder, "card", replace(decoder.card, condition_dropout=0.1, condition_guidance=2.0))
    assert decoders.settings() == settings | {"condition_guidance": 2.0}
    assert replace(decoders, condition_guidance=3.0).settings() == settings | {"condition_guidance": 3.0}
    assert replace(decoders, condition_guidance=1.0).settings() == settings
    painted = Decoded(pixels=torch.zeros(1), latents=torch.zeros(1))
    monkeypatch.setattr(decoding, "decode", lambda *_, **options: seen.append(options) or painted)
    logits = decoders.models.tokenizer.encode(torch.zeros(1, 3, 96, 96))
    replace(decoders, condition_guidance=3.0, shift=0.5).paint(logits, [7])
    assert seen == [{"seeds": [7], "steps": 1, "shift": 0.5, "condition_guidance": 3.0, "guide": None}]


def test_known_statistics_take_the_place_of_the_images(whole, tmp_path, images, decoders, networks):
    counted = []

    def features(pixels):
        counted.append(len(pixels))
        return networks["features"].features(pixels)

    same = FeatureNetwork(**{**vars(networks["features"]), "features": features})
    reconstruct(tmp_path, images, decoders, networks | {"features": same}, statistics=whole / "real.safetensors")
    assert sum(counted) == 2 * 7  # the decoded images of both paths alone
    assert results(tmp_path)["scopes"] == results(whole)["scopes"]
    flat = reconstruct(tmp_path, images, decoders, networks, by_category=False, statistics=whole / "real.safetensors")
    assert "7 images against 7 references" in flat
    another = FeatureNetwork(**{**vars(networks["features"]), "fingerprint": "inception-v3-0"})
    with pytest.raises(ValueError, match=r"measured by scene-reader-.* this run measures with inception-v3-0"):
        reconstruct(tmp_path, images, decoders, networks | {"features": another}, statistics=whole / "real.safetensors")


def test_statistics_without_the_categories_are_refused(tmp_path, images, decoders, networks):
    path = tmp_path / "flat.safetensors"
    arguments = (images, decoders, networks)
    reconstruct(tmp_path / "a", *arguments, by_category=False, limit=2, statistics=path)
    with pytest.raises(ValueError, match=r"no images of animals, plants \(it has no categories\)"):
        reconstruct(tmp_path / "b", *arguments, statistics=path)


def test_statistics_of_another_number_of_images_are_said(whole, tmp_path, images, decoders, networks):
    options = {"by_category": False, "statistics": whole / "real.safetensors"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", DCDDWarning)
        reconstruct(tmp_path, images, decoders, networks, **options)
    said = r"real.safetensors holds the statistics of 7 images, expected those of the 6 that are decoded: .* delete the"
    with pytest.warns(DCDDWarning, match=said):
        text = reconstruct(tmp_path, images, decoders, networks, limit=6, **options)
    assert "6 images against 7 references" in text


def test_exact_images_count_as_the_best_that_others_can_be(tmp_path, images, decoders, networks, monkeypatch):
    truth = read_pixels(list_images(images, limit=4), 96)
    nearly, half = truth.clone(), truth.clone()
    nearly[:, 0, 5, 7] -= 2 / 255 * truth[:, 0, 5, 7].sign()  # by one level
    half[2:] *= -1
    painted = zip(nearly.split(2), half.split(2))
    monkeypatch.setattr(Decoders, "paint", lambda *_: dict(zip(("vq", "dcdd"), next(painted))))
    text = reconstruct(tmp_path, images, decoders, networks, by_category=False, limit=4)
    found, (best, *others) = results(tmp_path), psnr(truth, nearly).tolist()
    psnrs = [row["psnr"] for row in found["scopes"]["overall"].values()]
    assert psnrs == pytest.approx([best, (2 * best + float(psnr(truth, half)[2:].sum())) / 4], abs=1e-3)
    assert others == pytest.approx([best] * 3, abs=1e-3)
    assert found["exact"] == {"VQ-VAE decode": 0, "DCDD decode": 2}
    assert "\n\nImages that equal their originals: DCDD decode (2 of 4). In the means, their PSNR counts as" in text


@pytest.fixture
def spoilt(tmp_path, images):
    """Nine images in two folders, two of them damaged, one small."""
    folder = tmp_path / "images"
    for i, path in enumerate(sorted(images.rglob("*.png"))):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (folder / "ab"[i % 2] / f"{i}.png").write_bytes(path.read_bytes())
    for name in ("a/2.png", "b/3.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:500])
    Image.open(folder / "a/0.png").resize((47, 60)).save(folder / "a/small.png")
    return folder


def test_damaged_images_are_all_named_and_nothing_is_lost(tmp_path, spoilt, decoders, networks, monkeypatch):
    arguments = (tmp_path / "out", spoilt, decoders, networks)
    with (
        pytest.warns(UserWarning, match=r"a/2.png is skipped"),
        pytest.raises(
            ValueError, match=r"2 of 7 images of the evaluation .*: a/2.png \(.*\), b/3.png \(.*--skip-unreadable 0"
        ),
    ):
        reconstruct(*arguments, by_category=False)
    monkeypatch.setattr(decoding, "decode", None)  # nothing is decoded again
    with pytest.warns(UserWarning):
        report = reconstruct(*arguments, policy=ReadPolicy(skip_unreadable=0.3))
    held = results(tmp_path / "out")
    assert held["pictures"] == held["references"] == {"overall": 5, "a": 3, "b": 2}
    assert held["left_out"] == {"unreadable": ["a/2.png", "b/3.png"], "small": ["a/small.png"]}
    assert "2 images cannot be read and are left out: a/2.png, b/3.png. 1 images are too small" in report
    assert "5 images against 5 references" in report


def test_small_images_are_left_out_or_enlarged_on_demand(tmp_path, spoilt, decoders, networks):
    for name in ("a/2.png", "b/3.png"):
        (spoilt / name).unlink()
    reconstruct(tmp_path / "out", spoilt, decoders, networks)
    assert results(tmp_path / "out")["left_out"] == {"unreadable": [], "small": ["a/small.png"]}
    reconstruct(tmp_path / "out", spoilt, decoders, networks, policy=ReadPolicy(min_side=47))
    held = results(tmp_path / "out")
    assert held["left_out"] == {"unreadable": [], "small": []} and held["pictures"]["a"] == 4
    with pytest.raises(ValueError, match=r"all 6 images have a side below 97 pixels .* such as .*0.png of 96 x 96"):
        reconstruct(tmp_path / "out", spoilt, decoders, networks, policy=ReadPolicy(min_side=97), size=120)


def test_references_follow_the_same_policy(tmp_path, spoilt, decoders, networks):
    prompts = [replace(prompt, category="ab"[i % 2]) for i, prompt in enumerate(PROMPTS)]
    arguments = (tmp_path / "out", spoilt, decoders, networks)
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="2 of 7 images of --references .* could not be read"),
    ):
        draw(*arguments, prompts=prompts)
    with pytest.warns(UserWarning):
        draw(*arguments, prompts=prompts, policy=ReadPolicy(skip_unreadable=0.3))
    held = results(tmp_path / "out")
    assert held["references"] == {"overall": 5, "a": 3, "b": 2}
    assert held["left_out"] == {"unreadable": ["a/2.png", "b/3.png"], "small": ["a/small.png"]}


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="file names there are Unicode")
def test_names_that_are_not_utf_8_are_measured_and_reported(tmp_path, images, decoders, networks):
    folder = tmp_path / "images"
    for i, path in enumerate(sorted(images.rglob("*.png"))[:4]):
        folder.mkdir(exist_ok=True)
        (folder / os.fsdecode(b"\xe4%d.png" % i)).write_bytes(path.read_bytes() if i else b"")
    policy = ReadPolicy(skip_unreadable=0.3)
    with pytest.warns(UserWarning):
        report = reconstruct(
            tmp_path / "out", folder, decoders, networks, by_category=False, policy=policy, keep_images=True
        )
    assert r"left out: \udce40.png" in report and "3 images against 3" in report
    assert (tmp_path / "out/pictures/vq" / os.fsdecode(b"\xe41.png.png")).is_file()


def test_one_image_is_too_few(tmp_path, images, decoders, networks):
    with pytest.raises(ValueError, match="at least two images, got one in animals, plants"):
        reconstruct(tmp_path, images, decoders, networks, limit=1)


def test_a_size_that_cannot_be_measured_is_refused(tmp_path, images, decoders, networks):
    with pytest.raises(ValueError, match=r"--size must lie in 32..4096 pixels.*got 31"):
        reconstruct(tmp_path, images, decoders, networks, size=31)
    with pytest.raises(ValueError, match="got 4097"):
        reconstruct(tmp_path, images, decoders, networks, size=4097)


@pytest.fixture
def larger(decoders):
    """The same decoder, decoding tokens of a 96-pixel image to 128 pixels."""
    decoder = decoders.models.decoder
    card = decoder.card
    decoder.card = replace(card, resolution=128, pixels_per_token=128 / 12)
    yield replace(decoders, card=decoder.card)
    decoder.card = card


@pytest.mark.parametrize("size", [None, 50])
def test_a_decoder_that_paints_larger_is_measured_at_its_size(tmp_path, images, larger, networks, size):
    text = reconstruct(tmp_path, images, larger, networks, by_category=False, limit=3, size=size, keep_images=True)
    images, measured = list_images(images, limit=3), size or 128
    assert results(tmp_path)["size"] == measured and "VQ-VAE decode (96 pixels)" in text
    truth = read_pixels(images, measured)
    seeds = [seed_of(0, image.name) for image in images]
    for path, painted in larger.paint(larger.models.tokenizer.encode(read_pixels(images, 96)), seeds).items():
        made = as_measured(painted, measured)
        found = results(tmp_path)["scopes"]["overall"][decoding.PATHS[path]]
        assert found["ssim"] == pytest.approx(float(ssim(truth, made).mean()), abs=2e-5)
        assert found["psnr"] == pytest.approx(float(psnr(truth, made).mean()), rel=1e-4)
        side = {"vq": 96, "dcdd": 128}[path]
        assert Image.open(tmp_path / "pictures" / path / f"{images[0].name}.png").size == (side, side)


def test_without_a_decoder_there_is_the_vq_path_alone(tmp_path, images, decoders, networks):
    alone = Decoders(models=decoders.models)
    reconstruct(tmp_path, images, alone, networks, size=64)
    found = results(tmp_path)
    assert found["size"] == 64 and list(found["scopes"]["overall"]) == ["VQ-VAE decode"]


# Text to image


def sample(texts, seeds):
    """Token logits that follow from the seeds, as a sampler's do."""
    logits = torch.stack([4 * torch.randn(144, 1024, generator=keyed_generator(seed)) for seed in seeds])
    return TokenLogits(logits, logits.argmax(-1), (12, 12), source="vlm", guidance=3.0, temperature=1.0)


PROMPTS = [Prompt(name=f"p{i}", text=f"scene {i}", category="animals" if i < 2 else "plants") for i in range(5)]


def draw(
    out, images, decoders, networks, *, prompts=PROMPTS, by_category=True, processes=None, statistics=None, **more
):
    run = EvaluationRun(out=out, processes=processes or Processes(), batch=2, statistics=statistics, **more)
    return evaluate_text(
        run,
        prompts,
        decoders,
        sample,
        sampling={"guidance": 3.0},
        features=networks["features"],
        references=images,
        by_category=by_category,
    )


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, images, decoders, networks):
    out = tmp_path_factory.mktemp("drawn")
    text = draw(out, images, decoders, networks, statistics=out / "real.safetensors")
    assert "gFrechet" in text
    return out


def test_both_paths_are_drawn_from_the_same_tokens(drawn, images, decoders, networks):
    seeds = [seed_of(0, f"{prompt.category}/{prompt.name}") for prompt in PROMPTS]
    painted = decoders.paint(sample([], seeds), seeds)
    features = networks["features"].features
    real = FrechetStatistics.of([features(read_pixels(list_images(images), 96))])
    for path, name in decoding.PATHS.items():
        files = [drawn / "pictures" / path / prompt.category / f"{prompt.name}.png" for prompt in PROMPTS]
        kept = read_pixels(list_images(drawn / "pictures" / path), 96)
        assert all(file.is_file() for file in files) and len(kept) == 5
        made = as_measured(painted[path], 96)
        assert (kept - made).abs().max() <= 2 / 255 + 1e-6
        found = results(drawn)["scopes"]["overall"][name]["frechet"]
        assert found == pytest.approx(frechet_distance(real, FrechetStatistics.of([features(made)])), rel=1e-3)
    held = results(drawn)
    assert held["pictures"] == {"overall": 5, "animals": 2, "plants": 3}
    assert held["references"] == {"overall": 7, "animals": 3, "plants": 4}


def test_what_is_painted_larger_is_measured_at_its_size(tmp_path, images, larger, networks):
    draw(tmp_path, images, larger, networks, prompts=PROMPTS[:2], by_category=False)
    assert results(tmp_path)["size"] == 128
    features = networks["features"].features
    made, real = (
        FrechetStatistics.of([features(read_pixels(list_images(folder), 128))])
        for folder in (tmp_path / "pictures" / "dcdd", images)
    )
    found = results(tmp_path)["scopes"]["overall"]["DCDD decode"]["frechet"]
    assert found == pytest.approx(frechet_distance(real, made), rel=1e-3)


def test_a_stopped_drawing_goes_on_and_three_share_it(drawn, tmp_path, images, decoders, networks, monkeypatch):
    monkeypatch.setattr(decoding, "decode", fails_after(1))
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path, images, decoders, networks)
    (tmp_path / "pictures" / "dcdd" / "animals" / "p1.png").unlink()  # as if killed between two files
    monkeypatch.setattr(decoding, "decode", real_decode)
    kept = tmp_path / "pictures" / "vq" / "animals" / "p1.png"
    written = kept.stat().st_mtime_ns
    together(lambda crew: draw(tmp_path, images, decoders, networks, processes=crew))
    assert (tmp_path / "results.json").read_bytes() == (drawn / "results.json").read_bytes()
    assert kept.stat().st_mtime_ns == written


def test_images_of_a_rewritten_prompt_are_drawn_again(drawn, tmp_path, images, decoders, networks):
    out = Path(shutil.copytree(drawn, tmp_path / "out"))
    files = sorted((out / "pictures").rglob("*.png"))
    before = {file: file.stat().st_mtime_ns for file in files}
    rewritten = [replace(prompt, text="another") if prompt.name == "p1" else prompt for prompt in PROMPTS]
    draw(out, images, decoders, networks, prompts=rewritten)
    assert {file.name for file in files if file.stat().st_mtime_ns != before[file]} == {"p1.png"}
    assert len([file for file in files if text_of(file) == "another"]) == 2  # on both paths


def test_text_statistics_serve_again(drawn, tmp_path, decoders, networks):
    draw(tmp_path, None, decoders, networks, statistics=drawn / "real.safetensors")
    assert results(tmp_path)["scopes"] == results(drawn)["scopes"]
    with pytest.raises(ValueError, match=r"none.safetensors does not exist yet; give --references"):
        draw(tmp_path, None, decoders, networks, statistics=tmp_path / "none.safetensors")


def test_categories_must_be_on_both_sides(tmp_path, images, decoders, networks):
    others = [Prompt(name=name, text="x", category="logo") for name in "ab"]
    with pytest.raises(ValueError, match="no sub-folder with images for logo"):
        draw(tmp_path, images, decoders, networks, prompts=others)
    with pytest.raises(ValueError, match="leave out --by-category"):
        draw(tmp_path, images, decoders, networks, prompts=[Prompt(name="a", text="x")])


GENEVAL = [
    '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}',
    '{"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}], "prompt": "a photo of a red cow"}',
]


def scored(folder):
    """What GenEval's evaluation/evaluate_images.py finds in a folder: image -> metadata."""
    found = {}
    for home in os.listdir(folder):
        if not os.path.isdir(os.path.join(folder, home)) or not home.isdigit():
            continue
        with open(os.path.join(folder, home, "metadata.jsonl")) as file:
            metadata = json.load(file)
        for name in os.listdir(os.path.join(folder, home, "samples")):
            path = os.path.join(folder, home, "samples", name)
            if os.path.isfile(path) and re.match(r"\d+\.png", name):
                found[f"{home}/{name}"] = metadata
    return found


def test_geneval_s_folders_are_what_its_scorer_reads(tmp_path, decoders, monkeypatch):
    (tmp_path / "g.jsonl").write_text("\n".join(GENEVAL) + "\n")
    prompts, out = read_geneval(tmp_path / "g.jsonl"), tmp_path / "out"
    write = partial(generate_geneval, prompts=prompts, decoders=decoders, sample=sample, sampling={})
    monkeypatch.setattr(decoding, "decode", fails_after(2))
    with pytest.raises(KeyboardInterrupt):
        write(EvaluationRun(out=out, processes=Processes(), batch=3))
    monkeypatch.setattr(decoding, "decode", fails_after(1))
    folders = write(EvaluationRun(out=out, processes=Processes(), batch=3))
    assert [folder.name for folder in folders] == ["vq", "dcdd"]
    expected = {f"{i:05}/{k:04}.png": json.loads(GENEVAL[i]) for i in range(2) for k in range(4)}
    for folder in folders:
        assert scored(folder) == expected
        assert sorted(path.name for path in folder.iterdir()) == ["00000", "00001"]
        assert {path.name for path in (folder / "00000").iterdir()} == {"grid.png", "metadata.jsonl", "samples"}
        images = [(folder / name[:6] / "samples" / name[6:]).read_bytes() for name in expected]
        assert len(set(images)) == 8  # four different images of each
        assert Image.open(folder / "00001" / "grid.png").size == (192, 192)
        corner = Image.open(folder / "00001" / "grid.png").crop((96, 96, 192, 192))
        assert corner.tobytes() == Image.open(folder / "00001" / "samples" / "0003.png").convert("RGB").tobytes()
    # Of a file that was edited: another tag, and another prompt.
    edited = [GENEVAL[0].replace("single_object", "two_object"), GENEVAL[1].replace("red", "blue")]
    (tmp_path / "g.jsonl").write_text("\n".join(edited) + "\n")
    monkeypatch.setattr(decoding, "decode", real_decode)
    generate_geneval(
        EvaluationRun(out=out, processes=Processes()), read_geneval(tmp_path / "g.jsonl"), decoders, sample, sampling={}
    )
    for folder in folders:
        assert scored(folder) == {f"{i:05}/{k:04}.png": json.loads(edited[i]) for i in range(2) for k in range(4)}
        assert text_of(folder / "00001" / "grid.png") == "a photo of a blue cow"
        assert text_of(folder / "00001" / "samples" / "0003.png") == "a photo of a blue cow"


SCRIPT = """
import sys
from pathlib import Path
from dcdd_core.cli import main
from dcdd_pico import embedded
embedded.WEIGHTS = Path(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_three_processes_through_gloo(whole, tmp_path, images, weights):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    evaluate = ["evaluate", "reconstruction", "--images", images, "--by-category", "--steps", 1, "--batch", 2]
    found = {}
    for count in (1, 3):
        # accelerate's launcher of several processes on one machine; with --device cpu they meet through gloo.
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 3, "--main_process_port", 0]
        launch = launch if count > 1 else []
        out = tmp_path / str(count)
        command = [sys.executable, *launch, script, weights, *evaluate, "--out", out]
        surroundings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=surroundings)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("# Reconstruction") == 1
        found[count] = (out / "results.json").read_bytes()
    assert found[1] == found[3]


def test_geneval_s_scorer_finds_nothing_else(tmp_path, decoders):
    """Neither images that a killed run left half written, nor the folders of another list of prompts."""
    (tmp_path / "g.jsonl").write_text("\n".join(GENEVAL) + "\n")
    run, prompts = EvaluationRun(out=tmp_path / "out", processes=Processes()), read_geneval(tmp_path / "g.jsonl")
    folders = generate_geneval(run, prompts, decoders, sample, sampling={})
    left = folders[0] / "00001" / "samples" / "0000.png.1a2b3c4d.tmp"
    left.write_bytes(b"half")
    grid = (folders[0] / "00000" / "grid.png").stat().st_mtime_ns
    generate_geneval(run, prompts, decoders, sample, sampling={})
    assert not left.exists() and len(scored(folders[0])) == 8
    assert (folders[0] / "00000" / "grid.png").stat().st_mtime_ns == grid, "what is finished is not written again"
    with pytest.raises(
        ValueError, match="geneval has 2 folders of other prompts, such as vq.00001, which GenEval's scorer"
    ):
        generate_geneval(run, prompts[:1], decoders, sample, sampling={})


def test_references_that_are_not_read_are_said(drawn, tmp_path, images, decoders, networks):
    with pytest.warns(DCDDWarning, match="real.safetensors exists, so the images in .* are not read: delete the file"):
        draw(tmp_path, images, decoders, networks, statistics=drawn / "real.safetensors")


def test_pictures_that_were_not_kept_are_said(tmp_path, images, decoders, networks):
    reconstruct(tmp_path, images, decoders, networks, keep_images=False)
    with pytest.warns(DCDDWarning, match="14 pictures are not written, since their images have been measured without"):
        reconstruct(tmp_path, images, decoders, networks, keep_images=True)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_whatever_takes_long_has_a_bar_in_the_first_process(tmp_path, images, decoders, networks, monkeypatch):
    monkeypatch.setattr("sys.stderr", stream := Terminal())
    arguments = (images, decoders, networks)
    together(lambda crew: reconstruct(tmp_path / "a", *arguments, keep_images=True, processes=crew))
    together(lambda crew: draw(tmp_path / "b", *arguments, processes=crew))
    found = re.findall(r"([^\r\n]+): 100%[^\r]* (\d)/\2 [^\r\n]*\n", stream.getvalue())

    def both(what, batches, own):
        return [(f"{what}, done before", batches), (what, own)]

    expected = [("sizes of images", "7"), ("pictures, done before", "7"), *both("reconstruction", "4", "2")]
    expected += [("sizes of images", "7")]
    for what in ("images", "features of vq", "features of dcdd"):
        expected += both(what, "3", "1")
    assert found == [*expected, *both("features of references", "4", "2")]
