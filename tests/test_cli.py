"""The command line on models of the embedded shapes: files, exit codes, and errors in words."""

import argparse
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch._inductor import config as inductor_config

from dcdd_core.cli import app, common, main
from dcdd_core.cli import sharpen as sharpening
from dcdd_core.cli.app import COMMANDS, parser
from dcdd_core.method.flow import resolution_shift
from dcdd_core.models.autoregressive.token_loop import TokenLoop
from dcdd_core.models.card import ServedGuidance
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.models.int8 import store_in_int8
from dcdd_core.models.masked.sampler import MaskedSampler
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.pipelines.calibrate import PROMPTS
from dcdd_core.pipelines.guided import GuidanceOptions, TokenGuide
from dcdd_core.pipelines.guided_pipeline import PriorPipeline
from dcdd_core.pipelines.images import to_pixels, to_tensor
from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import Calibration, TokenLogits
from dcdd_pico import embedded
from dcdd_pico.models import load_pico
from dcdd_pico.progressive import SAMPLING
from dcdd_pico.scenes import render_scene, scene_pixels
from tests.models.masked.tiny_masked import SAMPLING as TINY
from tests.models.masked.tiny_masked import save_tiny_masked
from tests.tiny import random_pico, save_janus
from tests.tiny_amused import save_tiny_amused
from tests.tiny_llamagen import save_llamagen
from tests.tiny_pipelines import save_sd, tiny_autoencoder


@pytest.fixture(scope="module", autouse=True)
def random_weights(tmp_path_factory):
    """The embedded models' files with random weights: here only what runs is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "WEIGHTS", random_pico(tmp_path_factory.mktemp("pico") / "weights"))
        yield


_SAMPLE, _READ = common.sample_tokens, common.read_rgb
PROMPT = "a large plain red circle in the centre on a plain sky ground"


@pytest.fixture
def one_s_own(tmp_path):
    """Options of a VLM and pictures of a user's own: four, in sub-folders, larger than the VLM's."""
    for i, folder in enumerate("aabb"):
        (tmp_path / "images" / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(render_scene("test", i, size=40).image).save(tmp_path / "images" / folder / f"{i}.png")
    return ["--janus", str(save_janus(tmp_path / "janus")), "--images", str(tmp_path / "images")]


def size(path):
    with Image.open(path) as image:
        return image.size


HELP = """
import sys
from dcdd_core.cli import main
try:
    main(sys.argv[1:])
finally:
    print(*sorted({"diffusers", "matplotlib", "numpy", "scipy", "torch", "transformers"} & set(sys.modules)))
"""


def test_help_names_the_commands_and_loads_no_library_of_models():
    done = subprocess.run([sys.executable, "-c", HELP, "--help"], capture_output=True, text=True, check=True)
    *told, loaded = done.stdout.splitlines()
    assert loaded == ""
    named = [line.split()[0] for line in told if line.startswith("    ") and not line.startswith("     ")]
    assert named == [*COMMANDS, "train"]


@pytest.mark.parametrize("words", [["generate"], ["reconstruct"], ["evaluate", "text"], ["demo"], ["train"]])
def test_help_of_a_command_loads_no_library_of_models(words):
    """They take seconds."""
    done = subprocess.run([sys.executable, "-c", HELP, *words, "--help"], capture_output=True, text=True, check=True)
    *told, loaded = done.stdout.splitlines()
    assert told and not {"diffusers", "transformers"} & set(loaded.split())


def test_generate_writes_both_pictures_and_the_logits(tmp_path, capsys):
    out, logits = tmp_path / "a.png", tmp_path / "l.safetensors"
    assert main(["generate", PROMPT, "--steps", "2", "--out", str(out), "--compare", "--logits", str(logits)]) == 0
    assert size(out) == size(tmp_path / "a-vq.png") == (96, 96)
    kept = TokenLogits.load(logits)
    assert kept.logits.shape == (1, 144, 1024) and kept.guidance == 3.0
    assert str(out) in capsys.readouterr().out


def asked_of(monkeypatch):
    """The options of every sampling in passes, in order."""
    asked, sample = [], MaskedSampler.sample_stages
    monkeypatch.setattr(
        MaskedSampler, "sample_stages", lambda *args, **given: asked.append(given["options"]) or sample(*args, **given)
    )
    return asked


def test_a_masked_sampler_takes_the_place_of_janus(tmp_path, monkeypatch):
    asked, images = asked_of(monkeypatch), {}
    for name, words in {
        "janus": [],
        "same": ["--sampler", "autoregressive"],
        "progressive": ["--sampler", "progressive"],
        "stages": ["--sampler", "progressive", "--stages", str(tmp_path / "sheet.png")],
        "raster": ["--sampler", "progressive", "--order", "raster"],
    }.items():
        out = tmp_path / f"{name}.png"
        assert main(["generate", PROMPT, "--steps", "2", *words, "--out", str(out), "--compare"]) == 0
        images[name] = (tmp_path / f"{name}-vq.png").read_bytes()
    assert images["same"] == images["janus"] and images["stages"] == images["progressive"]
    assert len({images[name] for name in ("janus", "progressive", "raster")}) == 3
    assert size(tmp_path / "sheet.png")[0] > 11 * 96 / 2  # a column a pass
    assert [(type(o).__name__, o.guidance) for o in asked[:2]] == [("SamplingOptions", 3.0)] * 2
    assert asked[2] == replace(SAMPLING, guidance=3.0, order="raster")


def test_the_guidance_is_that_of_the_calibration_that_is_served(tmp_path):
    kept, calibration = tmp_path / "l.safetensors", tmp_path / "c.safetensors"
    replace(load_pico(with_sampler=False).decoder.card.calibration, guidance=2.5).save(calibration)
    words = ["generate", PROMPT, "--steps", "1", "--out", str(tmp_path / "a.png"), "--logits", str(kept)]
    for more, guidance in ([], 3.0), (["--calibration", str(calibration)], 2.5):
        assert main([*words, *more]) == 0
        assert TokenLogits.load(kept).guidance == guidance
    assert main([*words, "--calibration", str(calibration), "--guidance", "4"]) == 0
    assert TokenLogits.load(kept).guidance == 4


def test_passes_order_and_revision_are_those_asked_for(tmp_path, monkeypatch, capsys):
    asked = asked_of(monkeypatch)
    folder = save_tiny_masked(tmp_path / "masked")
    given = ["generate", "a red circle", "a blue circle", "--janus", str(folder), "--out", str(tmp_path / "a.png")]
    own = replace(TINY, guidance=3.0)
    for words, expected in (
        ([], SamplingOptions(guidance=3.0)),
        (["--passes", "10"], replace(own, passes=10, revision_passes=2)),
        (["--passes", "1"], replace(own, passes=1, revision_passes=0)),
        (["--passes", "8", "--revision-passes", "5"], replace(own, passes=8, revision_passes=5)),
        (["--order", "importance", "--spread", "1"], replace(own, order="importance", spread=1)),
        (["--revise", "4", "--temperature", "0.5"], replace(own, revise=4, temperature=0.5)),
        (["--revise", "0", "--passes", "6"], replace(own, revise=0, passes=6, revision_passes=0)),
        (["--sampler", "progressive", "--guidance", "2"], SamplingOptions(guidance=2.0)),
    ):
        assert main([*given, *words]) == 0
        assert asked.pop() == expected and not asked
    capsys.readouterr()
    assert main([*given, "--stages", str(tmp_path / "s.png")]) == 0
    assert size(tmp_path / "s-1.png") == size(tmp_path / "s-2.png") and not (tmp_path / "s.png").exists()
    said, table = capsys.readouterr().out.split("\npass  revealed  drawn again  changed\n")
    assert said == f"16 tokens for each of 2 images in {TINY.passes} passes"
    rows = [list(map(float, line.split())) for line in table.splitlines()[: TINY.passes]]
    assert [row[0] for row in rows] == [1, 2, 3, 4, 5] and [row[1] for row in rows] == list(TINY.counts(16))
    assert rows[-1][2] == 16 and all(again >= changed for _, _, again, changed in rows) and rows[0][2:] == [0, 0]
    assert main([*given, "--passes", "1"]) == 0
    assert capsys.readouterr().out.startswith("16 tokens for each of 2 images in 1 pass\n")


def test_the_embedded_samplers_go_by_name(tmp_path, capsys):
    assert main(["generate", "a red circle", "--vlm", "pico-progressive", "--out", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out.startswith("144 tokens in 11 passes\n")
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "a red circle", "--vlm", "pico", "--janus", str(tmp_path)])
    assert "argument --vlm/--janus: given twice: leave one of them out" in capsys.readouterr().err


def test_a_sheet_of_many_passes_takes_the_memory_of_one(tmp_path, monkeypatch):
    decode, batches = VQTokenizer.decode_tokens, []
    monkeypatch.setattr(VQTokenizer, "decode_tokens", lambda self, t, *a: batches.append(len(t)) or decode(self, t, *a))
    words = ["--janus", str(save_tiny_masked(tmp_path / "masked")), "--passes", "20", "--out", str(tmp_path / "a.png")]
    assert main(["generate", "a red circle", *words, "--stages", str(tmp_path / "s.png")]) == 0
    assert batches == [1] * 21  # the last is the image


def test_sampling_in_passes_is_refused_in_words(tmp_path, capsys, one_s_own):
    masked, listed = (["--janus", str(save_tiny_masked(tmp_path / name))] for name in ("masked", "listed"))
    config = json.loads((tmp_path / "listed" / "config.json").read_text())
    config["sampling"]["schedule"] = [1, 2, 3, 4]
    (tmp_path / "listed" / "config.json").write_text(json.dumps(config))
    amused = ["--janus", str(save_tiny_amused(tmp_path / "amused"))]
    janus, progressive = one_s_own[:2], ["--sampler", "progressive"]
    for words, told in (
        (["--passes", "8"], "has no passes to choose: add --sampler progressive, or leave out --passes"),
        (["--stages", str(tmp_path / "s.png")], "add --sampler progressive, or leave out --stages"),
        ([*janus, "--order", "raster", "--spread", "2"], "give the folder of a masked sampler, or leave out --order"),
        ([*janus, *progressive], "holds a sampler of the other kind"),
        ([*masked, "--sampler", "autoregressive"], "holds a sampler of the other kind"),
        (
            ["--vlm", "pico", *progressive],
            "leave --sampler out, or give --vlm pico-progressive",
        ),
        (["--vlm", "pico", "--passes", "5"], "give --vlm pico-progressive, or leave out --passes"),
        (["--vlm", "pico-progressive", "--sampler", "autoregressive"], "holds a sampler of the other kind"),
        (["--vlm", "pico", "--dtype", "bfloat16"], "--dtype goes with the folder of a VLM in --vlm"),
        ([*progressive, "--revision-passes", "11"], "revision_passes must be less than passes, got 11 of 11"),
        ([*amused, "--order", "importance"], "was not trained to predict: choose confidence, halton, random or raster"),
        ([*listed, "--passes", "9"], "schedule has 4 numbers for 7 revealing passes"),
        ([*listed, "--passes", "9"], ": give as many passes as it has numbers, 7 numbers, or one of cosine"),
        ([*progressive, "--parallel", "4"], "--parallel would do nothing"),
        ([*progressive, "--stages", "a.jpg"], "--stages a.jpg: images are written as PNG"),
        (
            [*progressive, "--stages", str(tmp_path / "a.png")],
            f"--stages would both write {tmp_path / 'a.png'}",
        ),
        ([*progressive, "--stages", f"{tmp_path}/../{tmp_path.name}/a.png"], "--out and --stages would both write"),
        (
            [*progressive, "--stages", str(tmp_path / "a-vq.png"), "--compare"],
            "--compare and --stages would both write",
        ),
        (["--logits", str(tmp_path / "a.png")], "--out and --logits would both write"),
        (["a square", "--logits", str(tmp_path / "a-2.png")], "--out and --logits would both write"),
    ):
        assert main(["generate", "a red circle", *words, "--out", str(tmp_path / "a.png")]) == 1, words
        assert told in one_line(capsys.readouterr().err), words
    assert not list(tmp_path.glob("*.png"))


def one_line(told: str) -> str:
    """An error, without the library's progress bars."""
    errors = [line for line in told.splitlines() if line.startswith("dcdd: ")]
    assert len(errors) == 1, told
    return errors[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--passes 0", "passes must be a whole number in 1..4,096, got 0"),
        ("--passes 1000000000", "passes must be a whole number in 1..4,096, got 1000000000"),
        ("--passes 3 --revision-passes 3", "revision_passes must be less than passes, got 3 of 3: one pass at least"),
        ("--revision-passes -1", "revision_passes must be a whole number of at least 0, got -1"),
        ("--revise 0 --revision-passes 2", "2 revision passes have nothing to do where revise is 0"),
        ("--spread -1", "spread must be a whole number in 0..1,024, got -1"),
        (f"--spread 1{'0' * 30}", "spread must be a whole number in 0..1,024, got 1000"),
        ("--revise -1", "revise must be 'all' or a whole number of positions in 0..1,048,576, got -1"),
        (f"--revise 1{'0' * 30}", "revise must be 'all' or a whole number of positions in 0..1,048,576, got 1000"),
    ],
)
def test_passes_that_make_no_sense_are_refused_before_a_model_is_loaded(tmp_path, capsys, monkeypatch, words, told):
    monkeypatch.setattr(common, "load", lambda args: pytest.fail("it loads"))
    given = ["generate", "a red circle", "--sampler", "progressive", *words.split(), "--out", str(tmp_path / "a.png")]
    assert main(given) == 1
    assert told in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--revise", "some"], "argument --revise: expected 'all' or a whole number, got 'some'"),
        (["--order", "odd"], "argument --order: invalid choice: 'odd' (choose from"),
        (["--passes", "many"], "argument --passes: invalid int value: 'many'"),
    ],
)
def test_words_that_are_no_value_are_named(capsys, words, told):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "a", "--sampler", "progressive", *words])
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_help_names_what_is_left_out(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    plan = SAMPLING
    assert f"pico's: {plan.passes} passes, the last {plan.revision_passes} for revision alone; order halton" in shown
    assert "order halton, spread 0, revise all." in shown and (plan.order, plan.spread, plan.revise) == (
        "halton",
        0,
        "all",
    )
    assert f"run in {common.STEPS} steps if --steps does not say otherwise" in shown


def test_many_tokens_a_pass_are_the_same_image(tmp_path, capsys):
    images, told = {}, {}
    for name, words in {"default": [], "one": ["--parallel", "1"], "many": ["--parallel", "40"]}.items():
        out = tmp_path / f"{name}.png"
        assert main(["generate", PROMPT, "--steps", "2", *words, "--out", str(out), "--compare"]) == 0
        images[name] = (tmp_path / f"{name}-vq.png").read_bytes()
        told[name] = int(re.search(r"144 tokens in (\d+) passes", capsys.readouterr().out)[1])
    assert len(set(images.values())) == 1
    assert told["one"] == 144 > told["default"] >= told["many"]
    assert main(["generate", PROMPT, "--parallel", "0"]) == 1
    assert "--parallel must be a whole number of at least 1" in capsys.readouterr().err


def test_guidance_paints_without_the_trained_decoder(tmp_path):
    """The prior, a strength on top of the trained decoder, and the trained decoder alone are three images."""
    images = {}
    for name, words in {
        "prior": ["--decoder", "guidance"],
        "unguided": ["--decoder", "guidance", "--strength", "0"],
        "trained": [],
        "on top": ["--strength", "0.2"],
        "late": ["--start", "0.5"],
        "off": ["--strength", "0", "--start", "1"],
    }.items():
        out = tmp_path / f"{name}.png"
        assert main(["generate", PROMPT, "--steps", "2", *words, "--out", str(out)]) == 0
        images[name] = out.read_bytes()
    assert images["off"] == images["trained"]
    assert len(set(images.values())) == 5


def test_a_pipeline_is_guided_by_the_tokens(tmp_path, one_s_own):
    base = str(save_sd(tmp_path / "base"))
    out, side = tmp_path / "a.png", str(tmp_path / "b.png")
    words = ["--decoder", "guidance", "--base", base, "--steps", "2"]
    assert main(["generate", PROMPT, *words, "--out", str(out), "--compare"]) == 0
    assert main(["generate", PROMPT, *words, "--paint-side", "128", "--out", side]) == 0
    assert size(out) == size(tmp_path / "a-vq.png") == (96, 96) and size(side) == (128, 128)
    assert main(["generate", PROMPT, *words, "--strength", "0", "--out", str(tmp_path / "c.png")]) == 0
    assert (tmp_path / "c.png").read_bytes() != out.read_bytes()
    # A VLM of one's own, which has a calibration in a file.
    Calibration(scale=20.0).save(tmp_path / "c.safetensors")
    own = [*one_s_own[:2], "--calibration", str(tmp_path / "c.safetensors")]
    assert main(["generate", "a red circle", *own, *words, "--out", str(tmp_path / "d.png")]) == 0
    image = str(next((tmp_path / "images").rglob("*.png")))
    assert main(["reconstruct", image, *own, *words, "--prompt", "red", "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*-dcdd.png"))) == 1


def test_a_pipeline_gets_what_is_asked_for(tmp_path, monkeypatch):
    """The prompts, of which an image has one that is empty unless it is given; and what the help names by default."""

    class Painted(Exception):
        pass

    def paint(self, tokenizer, condition, prompts, **given):
        names = ("seeds", "steps", "start", "size", "options", "scale")
        asked.append((list(prompts), *(given[name] for name in names)))
        raise Painted

    base, image, asked = str(save_sd(tmp_path / "base")), tmp_path / "scene.png", []
    Image.fromarray(render_scene("test", 0, size=96).image).save(image)
    monkeypatch.setattr(PriorPipeline, "paint", paint)
    more = ["--seed", "5", "--steps", "3", "--start", "0.3", "--strength", "0.2"]
    for words in (
        ["generate", PROMPT, "a red circle", "--out", str(tmp_path / "a.png")],
        ["generate", PROMPT, *more, "--paint-side", "128", "--out", str(tmp_path / "a.png")],
        ["reconstruct", str(image), "--out", str(tmp_path)],
        ["reconstruct", str(image), *more, "--prompt", "red", "--out", str(tmp_path)],
    ):
        with pytest.raises(Painted):
            main([*words, "--decoder", "guidance", "--base", base])
    scale = load_pico(with_sampler=False).decoder.card.calibration.sharpness
    own, weak = (GuidanceOptions(strength=eta, pull=1.0) for eta in (0.4, 0.2))
    assert asked == [
        ([PROMPT, "a red circle"], [0, 1], 10, 0.6, (96, 96), own, scale),
        ([PROMPT], [5], 3, 0.3, (128, 128), weak, scale),
        ([""], [0], 10, 0.6, (96, 96), own, scale),
        (["red"], [5], 3, 0.3, (96, 96), weak, scale),
    ]


def test_guidance_sees_through_a_small_decoder(tmp_path):
    """With the trained decoder, with a pipeline, and without either: another image each time."""
    base, image = str(save_sd(tmp_path / "base")), tmp_path / "scene.png"
    Image.fromarray(render_scene("test", 0, size=48).image).save(image)
    small = {channels: str(tmp_path / f"small-{channels}") for channels in (4, 16)}
    for channels, folder in small.items():
        tiny_autoencoder(channels).save_pretrained(folder)
    for words, channels in (
        (["reconstruct", str(image), "--steps", "1", "--strength", "0.4"], 16),
        (["reconstruct", str(image), "--steps", "1", "--decoder", "guidance", "--base", base], 4),
        (["sharpen", str(image), "--steps", "1"], 16),
    ):
        made = []
        for more in ([], ["--guide-decoder", small[channels]]):
            out = tmp_path / f"out-{len(made)}"
            assert main([*words, *more, "--out", str(out)]) == 0
            (path,) = [one for one in out.iterdir() if "-vq" not in one.name]
            made.append(path.read_bytes())
            path.unlink()
        assert made[0] != made[1]


def test_a_decoder_is_guided_as_its_card_says(monkeypatch):
    """With the strength and the shift of the card, if neither is asked for; not without a card of its own."""
    card = replace(load_pico(with_sampler=False).decoder.card, distribution_guidance=ServedGuidance(strength=0.2))
    shifted = replace(card, distribution_guidance=ServedGuidance(strength=0.2, shift=1.5))
    off = replace(card, distribution_guidance=ServedGuidance(strength=0.0, shift=1.5))

    def found(card, *words):
        args = parser().parse_args(["generate", PROMPT, *words])
        return common.guidance_of(args, card)[0].strength, common.shift_of(args, card)

    assert found(card) == (0.2, None) and found(shifted) == (0.2, 1.5)
    assert found(shifted, "--shift", "0.5") == (0.2, 0.5)
    assert found(shifted, "--strength", "0.3") == (0.3, None) and found(shifted, "--strength", "0") == (0.0, None)
    assert found(off) == (0.0, None) and found(None) == (0.0, None)
    assert found(shifted, "--decoder", "guidance") == (0.4, None)
    assert common.guidance_of(parser().parse_args(["generate", PROMPT]), shifted)[0].pull == 0


def test_the_card_s_guidance_paints_and_is_shown(tmp_path, capsys, monkeypatch):
    def guided(**options):
        models = load_pico(**options)
        served = ServedGuidance(strength=0.3, shift=1.5)
        models.decoder.card = replace(models.decoder.card, distribution_guidance=served)
        return models

    image, made = tmp_path / "scene.png", {}
    Image.fromarray(render_scene("test", 0, size=48).image).save(image)
    asked = ["reconstruct", str(image), "--steps", "2", "--out", str(tmp_path / "out")]
    for name, loads, words in (
        ("paper", load_pico, []),
        ("card", guided, []),
        ("asked for", load_pico, ["--strength", "0.3", "--shift", "1.5"]),
        ("off", guided, ["--strength", "0"]),
    ):
        monkeypatch.setattr(common, "load_pico", loads)
        assert main([*asked, *words]) == 0
        made[name] = (tmp_path / "out" / "scene-dcdd.png").read_bytes()
    assert made["card"] == made["asked for"] != made["paper"] == made["off"]
    capsys.readouterr()
    for loads, words in ((load_pico, "no distribution guidance"), (guided, "of strength 0.3 at shift 1.5")):
        monkeypatch.setattr(common, "load_pico", loads)
        assert main(["inspect", "--count", "2", "--out", str(tmp_path / "top.png")]) == 0
        assert f"{words}\n" in capsys.readouterr().out


@pytest.fixture
def guided_card(monkeypatch):
    """Makes the embedded decoder's card name guidance of strength 0.3 at shift 1.5."""

    def loads(**options):
        models = load_pico(**options)
        served = ServedGuidance(strength=0.3, shift=1.5)
        models.decoder.card = replace(models.decoder.card, distribution_guidance=served)
        return models

    def use(load=loads):
        monkeypatch.setattr(common, "load_pico", load)
        monkeypatch.setattr("dcdd_core.cli.demo.load_pico", load)

    use()
    return use


def test_every_command_that_paints_is_guided_as_the_card_says_or_as_asked_for(
    tmp_path, capsys, monkeypatch, guided_card
):
    class Painted(Exception):
        pass

    def decode(*_, guide, shift, **__):
        seen.append((guide and (guide.options.strength, guide.options.pull), shift))
        raise Painted

    seen, scenes = [], tmp_path / "scenes"
    scenes.mkdir()
    for i in range(3):
        Image.fromarray(render_scene("test", i).image).save(scenes / f"{i}.png")
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n" * 3)
    monkeypatch.setattr(common, "decode", decode)
    monkeypatch.setattr("dcdd_core.evaluation.decoding.decode", decode)
    sources = ["--images", str(scenes)], ["--prompts", str(tmp_path / "prompts.txt"), "--references", str(scenes)]
    commands = (
        ["generate", PROMPT, "--out", str(tmp_path / "a.png")],
        ["demo", PROMPT, "--out", str(tmp_path / "a.png")],
        ["reconstruct", str(scenes / "0.png"), "--out", str(tmp_path / "b")],
        ["evaluate", "reconstruction", *sources[0]],
        ["evaluate", "text", *sources[1]],
    )
    for k, (words, expected) in enumerate(
        (([], ((0.3, 0.0), 1.5)), (["--strength", "0.2"], ((0.2, 0.0), None)), (["--strength", "0"], (None, None)))
    ):
        for each in commands:
            out = ["--out", str(tmp_path / f"{each[1]}-{k}")] if each[0] == "evaluate" else []
            with pytest.raises(Painted):
                main([*each, *out, *words])
        assert seen == [expected] * 5
        seen.clear()
        said = capsys.readouterr().out.count("DCDD decode: distribution guidance of strength 0.")
        assert said == (2 if words != ["--strength", "0"] else 0)


def test_an_evaluation_is_guided_as_the_card_says_and_keeps_its_results_apart(tmp_path, capsys, guided_card):
    scenes, made = tmp_path / "scenes", {}
    scenes.mkdir()
    for i in range(2):
        Image.fromarray(render_scene("test", i).image).save(scenes / f"{i}.png")
    words = ["evaluate", "reconstruction", "--images", str(scenes), "--steps", "2", "--keep-pictures", "--out"]
    for name, load, more in (
        ("card", None, []),
        ("off", None, ["--strength", "0"]),
        ("paper", load_pico, []),
    ):
        guided_card(*(() if load is None else (load,)))
        out = tmp_path / name
        assert main([*words, str(out), *more]) == 0
        told = capsys.readouterr().out
        assert told.count("DCDD decode: distribution guidance of strength 0.3 at shift 1.5") == 2 * (name == "card")
        settings = json.loads((out / "settings.json").read_text())
        named = json.loads((out / "results.json").read_text())["settings"]
        made[name] = (out / "pictures" / "dcdd" / "0.png.png").read_bytes(), settings
        assert named == settings
    assert made["off"] == made["paper"]
    assert made["card"][0] != made["paper"][0]
    changed = {name: value for name, value in made["card"][1].items() if made["paper"][1].get(name) != value}
    assert changed == {"distribution_guidance": 0.3, "shift": 1.5}
    guided_card()
    assert main([*words, str(tmp_path / "card"), "--strength", "0"]) == 1
    assert "distribution_guidance 0.3 -> None" in capsys.readouterr().err


def test_the_demo_is_guided_as_the_card_says(tmp_path, capsys, guided_card):
    out, made = tmp_path / "demo.png", []
    for words, said in (
        ([], "LCDM + DCDD, 1 steps, distribution guidance of strength 0.3 at shift 1.5\n"),
        (["--strength", "0"], "LCDM + DCDD, 1 steps\n"),
    ):
        assert main(["demo", PROMPT, "--steps", "1", "--out", str(out), *words]) == 0
        assert said in capsys.readouterr().out
        made.append(out.read_bytes())
    assert made[0] != made[1]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc here")
def test_a_folder_that_only_seems_writable_is_named_before_the_work(capsys, monkeypatch):
    monkeypatch.setattr(common, "load", None)
    assert main(["generate", PROMPT, "--out", "/proc/x.png"]) == 1
    assert "--out /proc/x.png cannot be written: you may not write to /proc" in capsys.readouterr().err


def test_a_name_that_is_too_long_is_named_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "load", None)
    assert main(["generate", PROMPT, "--out", str(tmp_path / f"{'a' * 300}.png")]) == 1
    assert ".png cannot be written (File name too long): choose another name" in capsys.readouterr().err


@pytest.mark.parametrize(("before", "after"), [(0.9, 0.3), (0.3, 0.9), (0.5, 0.5)])
def test_too_strong_sharpening_is_told(tmp_path, capsys, monkeypatch, before, after):
    scene, found = tmp_path / "scene.png", iter([before, after])
    Image.fromarray(render_scene("test", 0, size=48).image).save(scene)
    monkeypatch.setattr(TokenGuide, "agreement", lambda self, pixels: torch.tensor([next(found)]))
    assert main(["sharpen", str(scene), "--steps", "1", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert f"reads {after:.0%} of the tokens in it, and {before:.0%} in the soft VQ decode" in told.out
    assert ("that is less than before: choose a lower --strength" in told.err) == (after < before)


@pytest.fixture
def with_null(monkeypatch):
    """Makes the embedded decoder one that was trained with dropped conditions; gives what loads it, by its card."""

    def loads(**served):
        def load(**options):
            models = load_pico(**options)
            models.decoder.card = replace(models.decoder.card, condition_dropout=0.1, **served)
            models.decoder.adapter.keep_null(True)
            return models

        monkeypatch.setattr(common, "load_pico", load)
        monkeypatch.setattr("dcdd_core.cli.demo.load_pico", load)

    return loads


def test_guidance_on_the_condition_is_the_card_s_or_the_one_asked_for(tmp_path, capsys, with_null):
    image, made = tmp_path / "scene.png", {}
    Image.fromarray(render_scene("test", 0, size=48).image).save(image)
    for name, served, words in (
        ("plain", {}, []),
        ("card", {"condition_guidance": 2.0}, []),
        ("asked for", {}, ["--condition-guidance", "2"]),
        ("off", {"condition_guidance": 2.0}, ["--condition-guidance", "1"]),
    ):
        with_null(**served)
        assert main(["reconstruct", str(image), "--steps", "2", "--out", str(tmp_path / "out"), *words]) == 0
        made[name] = (tmp_path / "out" / "scene-dcdd.png").read_bytes()
    assert made["card"] == made["asked for"] != made["plain"] == made["off"]
    capsys.readouterr()
    with_null(condition_guidance=2.0)
    assert main(["inspect", "--count", "2", "--out", str(tmp_path / "top.png")]) == 0
    assert "condition guidance of 2, no distribution guidance\n" in capsys.readouterr().out


def test_every_command_that_paints_takes_guidance_on_the_condition(tmp_path, monkeypatch, with_null):
    class Painted(Exception):
        pass

    def decode(*_, **options):
        seen.append(options["condition_guidance"])
        raise Painted

    with_null()
    seen, scenes = [], tmp_path / "scenes"
    scenes.mkdir()
    for i in range(3):
        Image.fromarray(render_scene("test", i).image).save(scenes / f"{i}.png")
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n" * 3)
    monkeypatch.setattr(common, "decode", decode)
    monkeypatch.setattr("dcdd_core.evaluation.decoding.decode", decode)
    sources = ["--images", str(scenes)], ["--prompts", str(tmp_path / "prompts.txt"), "--references", str(scenes)]
    for words in (
        ["generate", PROMPT, "--out", str(tmp_path / "a.png")],
        ["demo", PROMPT, "--out", str(tmp_path / "a.png")],
        ["reconstruct", str(scenes / "0.png"), "--out", str(tmp_path / "b")],
        ["evaluate", "reconstruction", *sources[0], "--out", str(tmp_path / "c")],
        ["evaluate", "text", *sources[1], "--out", str(tmp_path / "d")],
    ):
        with pytest.raises(Painted):
            main([*words, "--condition-guidance", "1.5"])
    assert seen == [1.5] * 5


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["generate", PROMPT, "--condition-guidance", "2"],
            "condition_guidance must be 1, which is off, got 2: this decoder never saw an image without",
        ),
        (["demo", "--condition-guidance", "-1"], "condition_guidance must be a finite number in 0..20.0, got -1.0"),
        (["generate", PROMPT, "--condition-guidance", "nan"], "condition_guidance must be a finite number in 0..20"),
        (
            ["generate", PROMPT, "--decoder", "guidance", "--condition-guidance", "1"],
            "--condition-guidance would do nothing with --decoder guidance, whose prior has no condition: leave it out",
        ),
    ],
)
def test_guidance_on_the_condition_that_cannot_be_is_refused_before_anything_is_sampled(
    tmp_path, capsys, monkeypatch, words, expected
):
    monkeypatch.setattr(common, "sample", None)
    assert main([*words, "--out", str(tmp_path / "a.png")]) == 1
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--strength", "11"], "strength must be a finite number in 0..10"),
        (["--paint-side", "128"], "--paint-side goes with --decoder guidance and --base"),
        (["--decoder", "guidance", "--paint-side", "128"], "--paint-side goes with --decoder guidance and --base"),
        (["--decoder", "guidance", "--base", "BASE", "--shift", "1"], "--shift would do nothing with the pipeline"),
        (
            ["--decoder", "guidance", "--base", "BASE", "--paint-side", "7"],
            "paints sides of multiples of 2 pixels, got 7 x 7",
        ),
        (["--decoder", "guidance", "--base", "nowhere"], "nowhere is not a folder; expected a diffusers pipeline"),
        (["--guide-decoder", "SMALL"], "--guide-decoder would do nothing without guidance: give a --strength"),
        (["--strength", "0.1", "--guide-decoder", "SMALL"], "reads 4 channels, but the latents have 16"),
        (["--strength", "0.1", "--guide-decoder", "BASE"], "base/pipeline has no config.json"),
        (["--janus", "OWN", "--decoder", "guidance"], "give --base FOLDER"),
        (["--janus", "OWN", "--decoder", "guidance", "--base", "BASE"], "and --calibration FILE"),
    ],
)
def test_what_guidance_cannot_do_is_said(tmp_path, capsys, one_s_own, words, expected):
    tiny_autoencoder(4).save_pretrained(tmp_path / "small")
    names = {"BASE": str(save_sd(tmp_path / "base")), "OWN": one_s_own[1], "SMALL": str(tmp_path / "small")}
    words = [names.get(word, word) for word in words]
    assert main(["generate", PROMPT, *words, "--steps", "1", "--out", str(tmp_path / "a.png")]) == 1
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (GuidanceOptions(strength=0.0, pull=0.0), 1.0)),
        (["--decoder", "guidance"], (GuidanceOptions(strength=0.4, pull=1.0), 0.6)),
        (["--decoder", "guidance", "--strength", "0.2"], (GuidanceOptions(strength=0.2, pull=1.0), 0.6)),
        (["--strength", "0.2"], (GuidanceOptions(strength=0.2, pull=0.0), 1.0)),
        (["--start", "0.5"], (GuidanceOptions(strength=0.0, pull=0.0), 0.5)),
    ],
)
def test_guidance_has_the_defaults_that_the_help_names(words, expected):
    args = parser().parse_args(["generate", PROMPT, *words])
    assert common.guidance_of(args) == expected
    options = expected[0]
    assert (options.first, options.last, options.every, options.gradients, options.weight) == (1, 0, 1, 1, "confidence")


def test_sharpening_has_the_defaults_that_the_help_names():
    args = parser().parse_args(["sharpen", "a.png"])
    assert (args.steps, args.strength) == (8, 0.1)


def test_sharpening_takes_the_steps_and_the_strength_that_are_asked_for(tmp_path, monkeypatch):
    image, asked, sharpen = tmp_path / "scene.png", [], sharpening.sharpen
    Image.fromarray(render_scene("test", 0, size=48).image).save(image)

    def watched(guide, clean, **given):
        asked.append((guide.options, given["steps"]))
        return sharpen(guide, clean, **given)

    monkeypatch.setattr(sharpening, "sharpen", watched)
    for words in ([], ["--strength", "0.05", "--steps", "3"]):
        assert main(["sharpen", str(image), *words, "--out", str(tmp_path / "out")]) == 0
    assert asked == [(GuidanceOptions(strength=0.1), 8), (GuidanceOptions(strength=0.05), 3)]


def test_sharpening_writes_an_image_and_says_what_the_encoder_reads(tmp_path, capsys):
    scene = tmp_path / "scene.png"
    Image.fromarray(render_scene("test", 0, size=48).image).save(scene)
    assert main(["sharpen", str(scene), "--steps", "2", "--out", str(tmp_path / "out")]) == 0
    assert size(tmp_path / "out" / "scene-sharp.png") == (48, 48)
    assert "scene-sharp.png: the encoder reads" in capsys.readouterr().out


def test_a_seed_of_sharpening_is_told_to_have_no_effect(tmp_path, capsys):
    scene, made = tmp_path / "scene.png", []
    Image.fromarray(render_scene("test", 0, size=48).image).save(scene)
    for words in ([], ["--seed", "0"], ["--seed", "5"]):
        assert main(["sharpen", str(scene), "--steps", "1", *words, "--out", str(tmp_path)]) == 0
        told = "dcdd: --seed has no effect: `dcdd sharpen` draws nothing at random\n" if words else ""
        assert capsys.readouterr().err == told
        made.append((tmp_path / "scene-sharp.png").read_bytes())
    assert made[0] == made[1] == made[2]
    for command, listed in (("sharpen", False), ("reconstruct", True)):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert ("--seed" in capsys.readouterr().out) == listed


def test_sharpening_with_models_of_one_s_own(tmp_path, one_s_own):
    janus = one_s_own[1]
    calibration = tmp_path / "c.safetensors"
    Calibration(scale=20.0).save(calibration)
    image = next((tmp_path / "images").rglob("*.png"))
    words = ["sharpen", str(image), "--janus", janus, "--steps", "1", "--out", str(tmp_path / "out")]
    assert main([*words, "--vae", str(embedded.WEIGHTS / "vae"), "--calibration", str(calibration)]) == 0
    assert (tmp_path / "out" / f"{image.stem}-sharp.png").is_file()
    assert main(words) == 1


def test_the_same_seed_gives_the_same_file_and_another_does_not(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert (
            main(["generate", PROMPT, "--steps", "1", "--seed", str(seed), "--out", str(tmp_path / f"{name}.png")]) == 0
        )
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_the_shift_is_the_decoder_s_own_or_the_one_asked_for(tmp_path):
    Image.fromarray(render_scene("test", 0).image).save(tmp_path / "a.png")

    def painted(*asked):
        assert main(["reconstruct", str(tmp_path / "a.png"), "--steps", "2", "--out", str(tmp_path), *asked]) == 0
        return (tmp_path / "a-dcdd.png").read_bytes()

    own, even = painted(), painted("--shift", "0")
    assert own == painted("--shift", str(resolution_shift(12 * 12))) != even


def test_unknown_words_are_named(tmp_path, capsys):
    main(["generate", "a red unicorn in the centre", "--steps", "1", "--out", str(tmp_path / "a.png")])
    assert "does not know unicorn (in: a red unicorn in the centre); it knows a, and, at" in capsys.readouterr().err
    main(["generate", "a red \u2603", "--vlm", str(save_llamagen(tmp_path / "l")), "--out", str(tmp_path / "a.png")])
    assert one_line(capsys.readouterr().err).endswith(" does not know \u2603 (in: a red \u2603)")


def test_reconstruct_takes_any_size_from_a_token_up(tmp_path):
    Image.fromarray(render_scene("test", 0, size=70).image).save(tmp_path / "a.png")
    assert main(["reconstruct", str(tmp_path / "a.png"), "--steps", "1", "--out", str(tmp_path / "out")]) == 0
    assert size(tmp_path / "out" / "a-vq.png") == size(tmp_path / "out" / "a-dcdd.png") == (64, 64)


def test_a_photograph_becomes_the_pixels_that_a_scene_does():
    image = render_scene("test", 0).image
    assert torch.equal(to_pixels(to_tensor(Image.fromarray(image))[None], "cpu"), scene_pixels(image[None]))


def test_calibrate_writes_what_generate_reads(tmp_path, capsys):
    path = tmp_path / "c.safetensors"
    assert main(["calibrate", "--count", "3", "--guidance", "3", "--out", str(path)]) == 0
    found = Calibration.load(path)
    printed = capsys.readouterr().out
    assert found.guidance == 3.0 and found.vlm == "pico"
    assert all(words in printed for words in ("raw proxies", "calibrated proxies", "Otsu rank", "difference"))
    assert ("NOT converged" in printed) == (not found.converged)
    arguments = ["generate", PROMPT, "--steps", "1", "--calibration", str(path), "--out", str(tmp_path / "a.png")]
    assert main(arguments) == 0


def test_calibrate_goes_on_with_what_was_sampled(tmp_path, one_s_own, capsys, monkeypatch):
    arguments = ["calibrate", *one_s_own, "--batch", "2", "--out", str(tmp_path / "c.safetensors")]
    assert main([*arguments, "--count", "3"]) == 0
    samples = tmp_path / "c-samples"
    first = {path: TokenLogits.load(path).logits for path in samples.glob("*.safetensors")}
    min(first).unlink()
    capsys.readouterr()
    assert main([*arguments, "--count", "4"]) == 0
    assert "resuming: 2 of 4 samples" in capsys.readouterr().out
    for path, logits in first.items():  # up to rounding, which differs with the prompts that share a batch
        torch.testing.assert_close(TokenLogits.load(path).logits, logits, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr("dcdd_core.cli.common.sample_tokens", None)  # nothing may be sampled a second time
    assert main([*arguments, "--count", "4", "--fit-anchor"]) == 0
    alone = Calibration.load(tmp_path / "c.safetensors")
    assert main([*arguments, "--count", "4", "--fit-anchor-temperature"]) == 0
    both = Calibration.load(tmp_path / "c.safetensors")
    assert alone.anchor_temperature == 1 and both.unanchored == alone.unanchored and both != alone
    assert main([*arguments, "--count", "4", "--guidance", "2"]) == 1
    assert "guidance 5.0 -> 2.0" in capsys.readouterr().err


def test_calibrate_asks_the_shipped_prompts_and_spreads_over_the_pictures(tmp_path, one_s_own, monkeypatch):
    asked, read = [], []
    monkeypatch.setattr(common, "sample_tokens", lambda *given: asked.extend(given[1]) or _SAMPLE(*given))
    monkeypatch.setattr(
        "dcdd_core.cli.common.read_rgb", lambda path: read.append(f"{path.parent.name}/{path.name}") or _READ(path)
    )
    assert main(["calibrate", *one_s_own, "--count", "2", "--out", str(tmp_path / "c.safetensors")]) == 0
    assert asked == PROMPTS.read_text("utf-8").splitlines()[:2]
    assert read == ["a/0.png", "b/2.png"]
    assert Calibration.load(tmp_path / "c.safetensors").vlm == "janus"


def test_calibrate_explains_what_pictures_are_for_before_it_loads_anything(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "janus"}')
    assert main(["calibrate", "--janus", str(tmp_path), "--out", str(tmp_path / "c")]) == 1
    error = capsys.readouterr().err
    assert "--images FOLDER" in error and "will be trained on" in error


def test_inspect_prints_table_1_and_draws_figure_6(tmp_path, capsys):
    out = tmp_path / "curve.png"
    assert main(["inspect", "--count", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("raw proxies", "calibrated proxies", "Otsu rank", "tail entropy"))
    assert size(out)[0] > 500


def test_calibrate_measures_a_hundred_and_inspect_twenty_five(capsys):
    for command, count in (("calibrate", 100), ("inspect", 25), ("calibrate", 100)):
        assert parser().parse_args([command]).count == count
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"at most (default: {count})" in " ".join(capsys.readouterr().out.split())


def test_inspect_looks_at_saved_logits(tmp_path, capsys):
    logits, out = str(tmp_path / "l.safetensors"), str(tmp_path / "a.png")
    assert main(["generate", PROMPT, "--steps", "1", "--out", out, "--logits", logits]) == 0
    capsys.readouterr()
    assert main(["inspect", "--logits", logits, "--out", out]) == 0
    assert logits in capsys.readouterr().out and size(out)[0] > 500


def test_demo_makes_one_sheet(tmp_path, capsys):
    assert main(["demo", PROMPT, "--steps", "1", "--out", str(tmp_path / "demo.png")]) == 0
    assert size(tmp_path / "demo.png")[0] > 1000
    assert "Janus samples 1 x 144 tokens" in capsys.readouterr().out


@pytest.fixture
def scenes(tmp_path):
    """Scenes in sub-folders, as MJHQ-30K has them, and its prompt file."""
    folder, prompts = tmp_path / "scenes", {}
    for i in range(4):
        scene, category = render_scene("test", i), "animals" if i < 2 else "art"
        (folder / category).mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene.image).save(folder / category / f"{i}.png")
        prompts[f"{i}"] = {"prompt": scene.caption, "category": category}
    (tmp_path / "meta_data.json").write_text(json.dumps(prompts))
    return folder


def test_evaluate_reconstruction_reports_and_goes_on(tmp_path, scenes, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = ["evaluate", "reconstruction", "--images", str(scenes), "--steps", "1", "--out", str(out)]
    assert main([*arguments, "--by-category", "--batch", "3"]) == 0
    printed = capsys.readouterr().out
    assert "rFrechet ↓ | SSIM ↑ | PSNR ↑ | perceptual ↓" in printed and "## SSIM ↑ by category" in printed
    assert f"`dcdd evaluate reconstruction --images {scenes}" in printed and str(out / "report.md") in printed
    found = json.loads((out / "results.json").read_text())
    assert found["pictures"] == {"overall": 4, "animals": 2, "art": 2}
    monkeypatch.setattr("dcdd_core.evaluation.decoding.decode", None)  # nothing may be decoded a second time
    assert main(arguments) == 0
    assert json.loads((out / "results.json").read_text())["scopes"].keys() == {"overall"}
    capsys.readouterr()
    assert main([*arguments, "--seed", "1"]) == 1
    assert "seed 0 -> 1" in capsys.readouterr().err.splitlines()[-1]


def test_evaluate_text_draws_measures_and_fills_geneval_s_folders(tmp_path, scenes, capsys):
    (tmp_path / "g.jsonl").write_text(json.dumps({"tag": "colors", "prompt": PROMPT}) + "\n")
    out = tmp_path / "out"
    arguments = ["--prompts", str(tmp_path / "meta_data.json"), "--references", str(scenes), "--limit", "2"]
    arguments += ["--geneval", str(tmp_path / "g.jsonl"), "--statistics", str(tmp_path / "s.safetensors")]
    assert main(["evaluate", "text", *arguments, "--steps", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (
        "gFrechet ↓" in printed and "2 images against 4 references" in printed and (tmp_path / "s.safetensors").exists()
    )
    for path in ("vq", "dcdd"):
        assert size(out / "pictures" / path / "animals" / "1.png") == (96, 96)
        assert len(list((out / "geneval" / path / "00000" / "samples").iterdir())) == 4
        assert str(out / "geneval" / path) in printed


def test_real_models_are_measured_by_files_that_are_named(tmp_path, scenes, capsys):
    arguments = ["--images", str(scenes), "--janus", str(save_janus(tmp_path / "janus")), "--out", str(tmp_path / "o")]
    assert main(["evaluate", "reconstruction", *arguments]) == 1
    assert "--inception FILE is needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", PROMPT, "--janus", "/nowhere"], "/nowhere"),
        (["generate", "   "], "blank"),
        (["generate", PROMPT, "--strength", "-1"], "strength"),
        (["generate", PROMPT, "--strength", "nan"], "strength"),
        (["generate", PROMPT, "--start", "0"], "--start must be above 0"),
        (["generate", PROMPT, "--start", "1.5"], "--start must be above 0"),
        (["generate", PROMPT, "--start", "nan"], "--start must be above 0"),
        (["inspect", "--decoder", "guidance"], "--decoder guidance goes with `dcdd generate` and `dcdd reconstruct`"),
        (["sharpen", "/nowhere/x.png"], "/nowhere/x.png"),
        (["generate", PROMPT, "--temperature", "-1"], "temperature"),
        (["generate", PROMPT, "--steps", "0"], "steps"),
        (["generate", PROMPT, "--shift", "nan"], "shift must be a number"),
        (["demo", "--shift", "inf"], "shift must be a number"),
        (["generate", PROMPT, "--decoder", "x"], "goes with the folder of a VLM in --vlm"),
        (["generate", PROMPT, "--out", "a.jpg"], ".png"),
        (["generate", PROMPT, "--anchor", "1", "--reads", "tokens"], "exclude"),
        (["generate", PROMPT, "--device", "cuda:99"], "--device cuda:99"),
        (["demo", "--device", "abacus"], "--device abacus"),
        (["reconstruct", "a/x.png", "b/x.png"], "the same name"),
        (["generate", PROMPT, "--calibration", "/nowhere"], "/nowhere"),
        (["reconstruct", "/nowhere.png"], "nowhere.png"),
        (["reconstruct", "a.png", "--side", "0"], "--side must be at least 1"),
        (["calibrate", "--prompts", "/nowhere.txt"], "nowhere.txt"),
        (["calibrate", "--janus", "/nowhere"], "/nowhere does not exist; expected a VLM"),
        (["inspect", "--janus", "/nowhere"], "/nowhere does not exist; expected a VLM"),
        (["calibrate", "--count", "0"], "--count must be at least 1"),
        (["calibrate", "--batch", "0"], "--batch must be at least 1"),
        (["inspect", "--batch", "0"], "--batch must be at least 1"),
        (["inspect", "--logits", "l", "--images", "i", "--top-k", "5"], "--images, --top-k would do nothing: --logits"),
        (["inspect", "--logits", "l", "--calibration", "c", "--seed", "1"], "--calibration, --seed would do nothing"),
        (["evaluate", "reconstruction", "--images", "/nowhere", "--out", "o"], "/nowhere is not a folder"),
        (["evaluate", "reconstruction", "--images", ".", "--out", "o"], "holds no images"),
        (
            ["evaluate", "reconstruction", "--images", ".", "--out", "o", "--limit", "2", "--statistics", "s"],
            "make it without --limit",
        ),
        (["evaluate", "text", "--out", "o"], "--prompts FILE, --geneval FILE"),
        (["evaluate", "text", "--geneval", "g", "--references", "r", "--out", "o"], "--references would do nothing"),
        (
            ["evaluate", "text", "--geneval", "g", "--min-side", "9", "--skip-unreadable", "0.5", "--out", "o"],
            "--min-side, --skip-unreadable would do nothing without --references",
        ),
        (
            ["evaluate", "text", "--prompts", "p", "--statistics", "s", "--min-side", "9", "--out", "o"],
            "--min-side would do nothing without --references",
        ),
        (["evaluate", "text", "--prompts", "/nowhere.txt", "--out", "o"], "nowhere.txt"),
        (["generate", PROMPT, "--steps", "1001"], "--steps must be at most 1,000, got 1,001"),
        (["calibrate", "--count", "1000001"], "--count must be at most 1,000,000"),
        (["inspect", "--batch", "10001"], "--batch must be at most 10,000"),
        (["reconstruct", "a.png", "--side", "70000"], "--side must be at most 65,536"),
        (["demo", "--seed", str(2**63)], "--seed must be a whole number of 64 bits"),
        (["demo", "--device", "meta"], "--device meta cannot be used here"),
        (["generate", "a" * 20_001], "the prompt has 20,001 characters, more than 20,000"),
        (["generate", "red " * 100], "tokens, but pico has positions for"),
        (["generate", "\udcff"], "is not Unicode text"),
        (["generate", PROMPT, "--guidance", "nan"], "guidance must be a finite number"),
        (["generate", PROMPT, "--guidance", "1e300"], "guidance must be a finite number in -1,000.0..1,000.0, got 1e"),
        (["generate", PROMPT, "--temperature", "1e-320"], "temperature must be a finite number in 0.001..1,000.0"),
        (["calibrate", "--min-side", "3"], "--min-side would do nothing without --images"),
        (["inspect", "--logits", "l", "--skip-unreadable", "0.5"], "--skip-unreadable would do nothing"),
        (["evaluate", "reconstruction", "--images", ".", "--out", "o", "--skip-unreadable", "2"], "must lie in 0..1"),
        (
            ["evaluate", "reconstruction", "--images", ".", "--out", "o", "--min-side", "0"],
            "--min-side must be at least 1",
        ),
    ],
)
def test_errors_are_one_line_and_exit_1(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dcdd: ") and words in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--vlm", "pico", "--data", "i", "--vae", "v"], "--vae would do nothing: pico has its own autoencoder"),
        (
            ["--vlm", "pico", "--data", "i", "--width", "64"],
            "--width would do nothing: the decoder that is started from",
        ),
        (["--vlm", "j", "--vae", "v", "--data", "i", "--bundle", "b", "--width", "64"], "--width would do nothing"),
        (["--vlm", "pico", "--data", "i", "--rank", "8"], "--rank would do nothing: only --train lora has a rank"),
        (["--vlm", "pico", "--cache", "c", "--column", "jpg"], "--column would do nothing: what a cache holds"),
        (["--vlm", "pico", "--cache", "c", "--min-side", "9"], "--min-side would do nothing"),
        (["--vlm", "pico", "--cache", "c", "--skip-unreadable", "0.5"], "--skip-unreadable would do nothing"),
        (["--vlm", "pico", "--data", "i", "--skip-unreadable", "2"], "--skip-unreadable must lie in 0..1"),
        (["cache", "--vlm", "pico", "--data", "i", "--vae", "v"], "--vae would do nothing"),
        (["cache", "--vlm", "pico", "--data", "i", "--min-side", "0"], "--min-side must be at least 1"),
    ],
)
def test_training_refuses_options_that_do_nothing(arguments, words, tmp_path, capsys):
    pytest.importorskip("accelerate", reason="it comes with the 'train' extra")
    assert main(["train", *arguments, "--out", str(tmp_path / "out")]) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_training_and_cache_take_the_policy_for_images(tmp_path, capsys):
    pytest.importorskip("accelerate", reason="it comes with the 'train' extra")
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        Image.fromarray(render_scene("test", i, size=47 if i == 3 else 96).image).save(images / f"{i}.png")
    (images / "2.png").write_bytes(b"no image")
    cache = ["train", "cache", "--vlm", "pico", "--data", str(images), "--cpu", "--out", str(tmp_path / "cache")]
    assert main(cache) == 1
    said = capsys.readouterr()
    assert "1 of 3 images of" in said.err and "2.png (UnidentifiedImageError" in said.err
    assert "1 images have a side below 48 pixels (--min-side) and are left out" in said.out
    assert main([*cache, "--skip-unreadable", "0.34"]) == 0
    assert main([*cache[:-1], str(tmp_path / "other"), "--skip-unreadable", "0.34", "--min-side", "47"]) == 0
    items = [json.loads((tmp_path / name / "manifest.json").read_text())["items"] for name in ("cache", "other")]
    assert items == [2, 3]


OUTPUTS = [
    (["generate", PROMPT, "--out", "{}.png"], "--out"),
    (["generate", PROMPT, "--logits", "{}"], "--logits"),
    (["inspect", "--out", "{}.png"], "--out"),
    (["demo", "--out", "{}.png"], "--out"),
    (["calibrate", "--out", "{}"], "--out"),
    (["calibrate", "--samples", "{}"], "--samples"),
    (["reconstruct", "a.png", "--out", "{}"], "--out"),
    (["evaluate", "reconstruction", "--images", ".", "--out", "{}"], "--out"),
    (["evaluate", "reconstruction", "--images", ".", "--out", "o", "--statistics", "{}"], "--statistics"),
    (["evaluate", "text", "--prompts", "p", "--out", "{}"], "--out"),
]


@pytest.mark.parametrize(("arguments", "option"), OUTPUTS)
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(
    arguments, option, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(common, "load_pico", None)
    monkeypatch.setattr("dcdd_core.cli.demo.load_pico", None)
    assert main([word.format("file/a/b") for word in arguments]) == 1
    assert f"{option} file/a/b" in (said := capsys.readouterr().err) and "file is not a folder" in said
    with monkeypatch.context() as shut:
        shut.setattr("tempfile.TemporaryFile", lambda dir: os.open(tmp_path / "file" / "x", 0))
        assert main([word.format("new/b") for word in arguments]) == 1
    assert "you may not write to ." in capsys.readouterr().err


def test_a_folder_is_no_file_and_a_file_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").mkdir()
    (tmp_path / "file").write_text("")
    assert main(["generate", PROMPT, "--out", "a.png"]) == 1
    assert "--out a.png is a folder: give the name of a file" in capsys.readouterr().err
    assert main(["reconstruct", "x.png", "--out", "file"]) == 1
    assert "--out file is a file: give the name of a folder" in capsys.readouterr().err


@pytest.mark.parametrize("empty", ["", " ", "a\0b"])
def test_a_path_that_is_none_is_a_wrong_option(empty, capsys):
    for arguments in (
        *([command, "--out", empty] for command in ("demo", "calibrate", "inspect")),
        ["generate", PROMPT, "--out", empty],
        ["generate", PROMPT, "--janus", empty],
        ["reconstruct", empty],
        ["reconstruct", "a.png", "--out", empty],
        ["evaluate", "reconstruction", "--images", empty, "--out", "o"],
        ["evaluate", "reconstruction", "--images", ".", "--out", empty],
        ["evaluate", "text", "--prompts", "p", "--out", empty],
        ["train", "--vlm", "pico", "--data", empty, "--out", "o"],
        ["train", "--vlm", "pico", "--data", ".", "--out", empty],
        ["train", "--vlm", empty, "--data", ".", "--out", "o"],
        ["train", "cache", "--vlm", "pico", "--data", empty, "--out", "o"],
        ["train", "cache", "--vlm", "pico", "--data", ".", "--out", empty],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2 and "expected a path, got" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "demo", "reconstruct", "inspect"])
def test_a_calibration_is_read_before_anything_is_loaded(command, tmp_path, capsys, monkeypatch):
    (tmp_path / "c.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    monkeypatch.setattr(common, "load_pico", None)
    monkeypatch.setattr("dcdd_core.cli.demo.load_pico", None)
    what = () if command == "inspect" else (PROMPT,)
    assert main([command, *what, "--calibration", str(tmp_path / "c.safetensors")]) == 1
    assert "c.safetensors is a Git LFS pointer" in capsys.readouterr().err


def test_what_does_not_fit_the_decoder_is_said_before_anything_is_sampled(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "sample", None)
    arguments = [PROMPT, "--anchor", "1", "--reads", "tokens", "--out", str(tmp_path / "a.png")]
    for command in ("generate", "demo"):
        assert main([command, *arguments]) == 1 and "exclude each other" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_is_named_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "load_pico", None)
    Image.new("RGB", (96, 96)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    assert main(["reconstruct", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--out", str(tmp_path / "o")]) == 1
    assert "b.png cannot be read as an image" in capsys.readouterr().err


def test_images_for_calibration_follow_the_policy_of_training(tmp_path, one_s_own, capsys):
    (tmp_path / "images/a/0.png").write_bytes(b"no image")
    Image.new("RGB", (7, 40)).save(tmp_path / "images/b/small.png")
    arguments = ["calibrate", *one_s_own, "--out", str(tmp_path / "c.safetensors")]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "1 of 4 images of" in said and "a/0.png (UnidentifiedImageError" in said
    assert "1 images are too small and are left out: b/small.png" in said
    assert main([*arguments, "--skip-unreadable", "0.25"]) == 0
    assert "1 images cannot be read and are left out: a/0.png" in capsys.readouterr().err


def test_printing_never_fails(tmp_path, monkeypatch, capfd):
    """With strict ASCII, and with a name that is no text."""
    Image.fromarray(render_scene("test", 0).image).save(tmp_path / "a.png")
    odd = os.fsdecode(b"n\xe4me") if os.name != "nt" and sys.platform != "darwin" else "n\xe4me"
    for encoding in ("ascii", "utf-8"):
        stream = io.TextIOWrapper(raw := io.BytesIO(), encoding=encoding, errors="strict")
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["reconstruct", str(tmp_path / "a.png"), "--steps", "1", "--out", str(tmp_path / odd)]) == 0
        stream.flush()
        assert stream.errors == "strict" and b"wrote" in raw.getvalue()
    assert (tmp_path / odd / "a-dcdd.png").is_file()


def test_a_picture_of_too_many_tokens_is_refused_and_shrunk_on_demand(tmp_path, capsys):
    Image.new("RGB", (1200, 1000)).save(tmp_path / "a.png")
    arguments = ["reconstruct", str(tmp_path / "a.png"), "--steps", "1", "--out", str(tmp_path / "out")]
    assert main(arguments) == 1 and "--side" in capsys.readouterr().err
    assert main([*arguments, "--side", "100"]) == 0
    assert size(tmp_path / "out" / "a-dcdd.png") == (96, 80)


def test_running_out_of_memory_is_explained(monkeypatch, tmp_path, capsys):
    def too_much(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("dcdd_core.cli.common.decode", too_much)
    assert main(["generate", PROMPT, "--out", str(tmp_path / "a.png")]) == 1
    assert capsys.readouterr().err.endswith("dcdd: out of memory: close other programs\n")


VLM, BUNDLE = ["--vlm", "folder"], ["--decoder", "d.safetensors", "--vae", "v"]
IN_8_BITS, HALF = ["--vlm-int8", "--decoder-8bit"], ["--dtype", "bfloat16"]


@pytest.mark.parametrize(
    ("words", "ways"),
    [
        (["demo"], []),
        (["generate", PROMPT], []),
        (["generate", PROMPT, "--device", "cuda:1"], ["--device cpu"]),
        (["generate", PROMPT, *VLM], ["--dtype bfloat16", "--vlm-int8"]),
        (["generate", PROMPT, *VLM, *BUNDLE], ["--dtype bfloat16", "--vlm-int8", "--decoder-8bit", "--stream"]),
        (["generate", PROMPT, *VLM, *BUNDLE, "--compile", *HALF], ["--vlm-int8", "--decoder-8bit"]),
        (["generate", PROMPT, *VLM, *BUNDLE, *IN_8_BITS, "--stream", *HALF], []),
        (
            ["generate", PROMPT, *VLM, "--decoder", "guidance", "--base", "b"],
            ["a smaller --paint-side", "--dtype bfloat16", "--vlm-int8"],
        ),
        (["generate", PROMPT, "--decoder", "guidance", "--base", "b"], ["a smaller --paint-side", "--dtype bfloat16"]),
        (["reconstruct", "a.png"], ["a smaller --side"]),
        (["reconstruct", "a.png", *VLM], ["a smaller --side"]),
        (["reconstruct", "a.png", *VLM, *BUNDLE, *HALF], ["a smaller --side", "--decoder-8bit", "--stream"]),
        (["sharpen", "a.png", *VLM], ["a smaller --side"]),
        (["inspect", *VLM], ["--dtype bfloat16", "--vlm-int8"]),
        (["calibrate", *VLM, "--dtype", "float16"], ["--vlm-int8"]),
        (["captions", *VLM, "--prompts", "p"], ["--dtype bfloat16", "--vlm-int8"]),
        (["captions", *VLM, "--prompts", "p", "--vlm-int8"], ["--dtype bfloat16"]),
    ],
)
def test_options_against_a_lack_of_memory_are_the_command_s_own_and_do_something(
    words, ways, monkeypatch, capsys, tmp_path
):
    def too_much(args):
        raise torch.OutOfMemoryError

    def parsing(names):
        made = whole(names)
        parse = made.parse_args
        made.parse_args = lambda words: argparse.Namespace(**{**vars(parse(words)), "run": too_much})
        return made

    whole = app.parser
    monkeypatch.setattr(app, "parser", parsing)
    assert main(words) == 1
    said = capsys.readouterr().err.strip().removeprefix("dcdd: out of memory: close other programs")
    assert said == (f", or use {' or '.join(ways)}" if ways else "")
    with pytest.raises(SystemExit):
        whole().parse_args([words[0], "--help"])
    known = re.findall(r"--[a-z0-9-]+", capsys.readouterr().out)
    assert set(re.findall(r"--[a-z0-9-]+", said)) <= set(known)


@pytest.mark.parametrize("options", [["--vlm-int8"], ["--decoder-8bit"], ["--vlm-int8", "--decoder-8bit"]])
def test_weights_in_8_bits_without_torchao_are_told_by_their_options(options, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    monkeypatch.setattr(common, "load_models", lambda *_, **__: store_in_int8(torch.nn.Linear(1, 1), "cpu"))
    assert main(["generate", PROMPT, *VLM, *BUNDLE, *options]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"dcdd: {' and '.join(options)} needs torchao (") and "eight_bit" not in said
    assert said.endswith("): pip install torchao, or leave it out\n")


def test_compiling_without_a_compiler_is_explained(monkeypatch, tmp_path, capsys):
    def compiled(*_, **__):
        with inductor_config.patch({"cpp.cxx": ("/nowhere",), "force_disable_caches": True}):
            torch.compile(torch.sin)(torch.ones(8))

    monkeypatch.setattr("dcdd_core.cli.common.decode", compiled)
    assert main(["generate", PROMPT, "--out", str(tmp_path / "a.png")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dcdd: --compile failed (") and "/nowhere" in error and "install a C++ compiler" in error


def test_what_does_not_fit_at_once_is_made_in_turn(monkeypatch, tmp_path, capsys):
    step, forward = TokenLoop._embed, DistributionConditionedDecoder.forward

    def limited(function):
        def run(self, pictures, *rest):
            if len(pictures) > 1:
                raise torch.OutOfMemoryError
            return function(self, pictures, *rest)

        return run

    arguments = ["generate", PROMPT, PROMPT, "--steps", "1", "--out"]
    assert main([*arguments, str(tmp_path / "whole.png")]) == 0
    monkeypatch.setattr(TokenLoop, "_embed", limited(step))
    monkeypatch.setattr(DistributionConditionedDecoder, "forward", limited(forward))
    capsys.readouterr()
    assert main([*arguments, str(tmp_path / "split.png")]) == 0
    assert capsys.readouterr().err.count("dcdd: out of memory: continuing with 1 images at a time") == 2
    for k in (1, 2):
        whole, split = (np.asarray(Image.open(tmp_path / f"{name}-{k}.png"), float) for name in ("whole", "split"))
        assert np.abs(whole - split).max() <= 1  # of 255: float rounding


def test_missing_weights_are_explained(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path / "none")
    assert main(["demo", "--out", str(tmp_path / "a.png")]) == 1
    error = capsys.readouterr().err
    assert "install the pack again" in error and "git checkout -- dcdd_pico/weights" in error


def test_a_wrong_option_exits_2():
    with pytest.raises(SystemExit) as stopped:
        main(["generate", PROMPT, "--stepss", "3"])
    assert stopped.value.code == 2


def test_an_interrupt_exits_130(monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dcdd_core.cli.common.decode", interrupted)
    assert main(["generate", PROMPT, "--out", str(tmp_path / "a.png")]) == 130


def test_a_folder_of_one_s_own_works_without_a_decoder(tmp_path, capsys):
    folder = save_janus(tmp_path / "janus")
    assert main(["generate", "a red circle", "--janus", str(folder), "--out", str(tmp_path / "a.png")]) == 0
    assert size(tmp_path / "a.png") == (16, 16)
    for nothing in ("--steps", "--shift", "--anchor", "--condition-guidance"):
        assert main(["generate", "a red circle", "--janus", str(folder), nothing, "0"]) == 1
        assert f"{nothing} would do nothing without a decoder" in capsys.readouterr().err


def test_how_models_are_held_reaches_their_loaders(tmp_path, monkeypatch, capsys):
    real = ["--janus", str(tmp_path), "--decoder", "d.safetensors", "--vae", "v"]
    held = ["--janus-int8", "--decoder-8bit"]
    seen = {}

    def load(paths, options, **_):
        seen.update(asdict(options))
        raise ValueError("seen")

    monkeypatch.setattr(common, "load_models", load)
    for option, name in (("--stream", "streamed"), ("--compile", "compiled")):
        assert main(["generate", PROMPT, *real, *held, option]) == 1
        assert seen["sampler_int8"] is seen["eight_bit"] is seen[name] is True
    capsys.readouterr()
    assert main(["generate", PROMPT, *real, "--stream", "--compile"]) == 1
    assert "--stream and --compile exclude each other, got both: leave one of them out" in capsys.readouterr().err
    assert main(["generate", PROMPT, *real]) == 1
    assert all(seen[name] is False for name in ("sampler_int8", "eight_bit", "streamed", "compiled"))
    capsys.readouterr()
    assert (
        main(["generate", PROMPT, "--stream"]) == 1
        and "--stream goes with the folder of a VLM" in capsys.readouterr().err
    )


def test_a_decoder_in_eight_bits_paints(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    weights = embedded.WEIGHTS
    real = ["--janus", weights / "janus", "--decoder", weights / "decoder.safetensors", "--vae", weights / "vae"]
    out = tmp_path / "a.png"
    held = ["--decoder-8bit", "--dtype", "bfloat16", "--steps", "2", "--out"]
    assert main(["generate", PROMPT, *map(str, real), *held, str(out)]) == 0
    assert size(out) == (96, 96)


def test_results_do_not_overwrite_what_they_are_made_of(tmp_path, capsys):
    for name in ("a", "a-vq", "a-sharp"):
        Image.new("RGB", (32, 32), "red").save(tmp_path / f"{name}.png")
    before = (tmp_path / "a-vq.png").read_bytes()
    for command, other in (("reconstruct", "a-vq"), ("sharpen", "a-sharp")):
        images = [str(tmp_path / f"{name}.png") for name in ("a", other)]
        assert main([command, *images, "--out", str(tmp_path)]) == 1
        assert f"a result would overwrite {tmp_path / other}.png, which is one of the images" in capsys.readouterr().err
    assert (tmp_path / "a-vq.png").read_bytes() == before


def test_a_prompt_without_a_pipeline_is_refused(tmp_path, capsys):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    assert main(["reconstruct", str(tmp_path / "a.png"), "--prompt", "red", "--out", str(tmp_path / "out")]) == 1
    assert "--prompt is what the pipeline in --base is told, and there is none" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_decides_the_rounding_is_recorded(dtype):
    model = torch.nn.Linear(2, 2).to(getattr(torch, dtype))
    told = common.rounding_of(SimpleNamespace(model=model), 4)
    assert told == {"vlm dtype": dtype} | ({} if dtype == "float32" else {"parallel": 4})
