"""train.py on models of the embedded shapes: from a folder of images to a bundle that decodes."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dcdd_core import files
from dcdd_core.cli import train as cli
from dcdd_core.models.bundle import DecoderOptions, load_decoder, read_card, save_bundle
from dcdd_core.models.janus.sampler import JanusSampler
from dcdd_core.pipelines.condition import condition_for
from dcdd_core.pipelines.decode import decode
from dcdd_core.pipelines.load import ModelPaths, load_models
from dcdd_core.training.checkpoints import load_best
from dcdd_core.training.held_out import split
from dcdd_core.training.image_batch import Geometry
from dcdd_core.training.lock import run_lock
from dcdd_core.training.log import read_log
from dcdd_core.training.plan import Plan
from dcdd_core.training.run import make_accelerator
from dcdd_core.training.sources import open_images
from dcdd_core.training.stop import TrainingStopped
from dcdd_core.types import Calibration
from dcdd_pico import embedded
from tests.tiny import random_llamagen, random_pico
from tests.training.runs import forked, png_folder

# By its path: the name "train" may be that of the checkout's folder.
ROOT = Path(__file__).parents[1]
main = runpy.run_path(str(ROOT / "train.py"))["main"]

pytestmark = pytest.mark.filterwarnings("ignore:.*")


@pytest.fixture(scope="module")
def pico(tmp_path_factory):
    return random_pico(tmp_path_factory.mktemp("pico") / "weights")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return png_folder(tmp_path_factory.mktemp("images") / "folder", count=12, side=48)


@pytest.fixture
def run(pico, images, tmp_path, monkeypatch):
    """`train.py` on the embedded models; a None takes an option's default away."""
    monkeypatch.setattr(embedded, "WEIGHTS", pico)

    def call(*words, **changes):
        AcceleratorState._reset_state(reset_partial_state=True)
        options = {"vlm": "pico", "data": images, "out": tmp_path / "run"}
        if words[:1] != ("cache",):
            options |= {"steps": 2, "batch": 2, "log-every": 1, "samples": 0, "precision": "no"}
        options = {name: value for name, value in (options | changes).items() if value is not None}
        flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return main([*words, "--cpu", *flags])

    return call


def test_a_folder_of_images_becomes_a_bundle_that_paints(run, pico, tmp_path, capsys):
    assert run(samples=2, **{"sample-every": 2}) == 0
    assert "wrote" in capsys.readouterr().out
    bundle = tmp_path / "run" / "decoder.safetensors"
    models = load_models(ModelPaths(vlm=pico / "janus", vae=pico / "vae", decoder=bundle), with_sampler=False)
    proxies = models.tokenizer.encode(torch.zeros(1, 3, 96, 96))
    painted = decode(
        models.decoder,
        models.codec,
        condition_for(models.decoder.card, proxies, models.tokenizer.codebook),
        seeds=[0],
        steps=1,
    ).pixels
    assert painted.shape == (1, 3, 96, 96) and bool(painted.isfinite().all())
    before = load_decoder(pico / "decoder.safetensors", options=DecoderOptions(dtype=torch.bfloat16)).state_dict()
    moved = {
        name for name, value in models.decoder.state_dict().items() if not torch.equal(value.bfloat16(), before[name])
    }
    assert moved and all(".attn." in name or name.startswith("adapter.") for name in moved)
    with Image.open(tmp_path / "run" / "samples" / "step-00000002.png") as sheet:
        assert sheet.size == (3 * 96, 2 * 96)
    lines = read_log(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2] and lines[1]["eval/training_loss"] > 0
    assert run(samples=2, **{"sample-every": 2}) == 0  # Finished: only the bundle is written again.
    assert read_log(tmp_path / "run") == lines


def test_a_run_that_is_not_at_its_end_has_a_bundle_too(run, tmp_path, capsys):
    assert run("--bundle-now") == 1 and "no checkpoint yet" in capsys.readouterr().err
    assert run() == 0
    assert run("--bundle-now") == 0
    now, end = (tmp_path / "run" / name for name in ("decoder-step-00000002.safetensors", "decoder.safetensors"))
    assert read_card(now) == read_card(end)
    weights = load_file(end)
    assert load_file(now).keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in load_file(now).items())
    now.unlink()
    assert run("--bundle-now", variant="lcdm") == 1
    assert "other settings (card.calibration" in capsys.readouterr().err
    average = tmp_path / "run" / "checkpoints" / "step-00000002" / "average.safetensors"
    average.write_bytes(average.read_bytes()[:-50])
    assert run("--bundle-now") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        "step-00000002 is damaged (average.safetensors: not what was written)" in said and "delete it to resume" in said
    )
    assert not now.exists()


@pytest.fixture(scope="module")
def more_images(tmp_path_factory):
    """Enough for one to be held out."""
    return png_folder(tmp_path_factory.mktemp("more") / "folder", count=24, side=48)


def test_an_image_is_held_out_and_the_best_weights_become_a_bundle(run, more_images, tmp_path, capsys):
    options = {"data": more_images, "steps": 4, "sample-every": 1, "held-out": 0.1, "learning-rate": 1e-2, "warmup": 1}
    assert run(**options) == 0
    said = capsys.readouterr().out
    assert "run: 22 images, and 2 held out that are never trained on" in said
    found = {line["step"]: line["eval/loss"] for line in read_log(tmp_path / "run")}
    best = min(found, key=found.get)
    assert len(set(found.values())) == 4 and f"best.safetensors, of step {best}: the lowest held-out loss, " in said
    bundle = tmp_path / "run" / "best.safetensors"
    assert read_card(bundle) == read_card(tmp_path / "run" / "decoder.safetensors")
    weights = {name: value for name, value in load_file(bundle).items() if name.startswith("adapter.")}
    kept = load_best(tmp_path / "run").weights
    assert weights and all(torch.equal(value, kept[name].bfloat16()) for name, value in weights.items())
    for path in (bundle, tmp_path / "run" / "log.jsonl"):
        path.unlink()
    assert run("--bundle-now", **options) == 0 and bundle.exists()
    for changes, words in (
        ({"held-out": 0}, "this run began with --held-out 0.1, got 0: give --held-out 0.1 again"),
        ({"held-out": 0.25}, "this run began with --held-out 0.1, got 0.25: give --held-out 0.1 again"),
        ({"sample-every": 0}, "--sample-every 0 takes none: give another --sample-every"),
    ):
        assert run(**options | changes) == 1
        assert words in capsys.readouterr().err
    assert run(**options | {"held-out": 0.09}) == 0  # the same two images
    other = png_folder(tmp_path / "other", count=30, side=48)
    assert run(**options | {"data": other}) == 1
    assert f"images were added to {other}, removed or renamed. Give the images" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_says_that_its_held_out_images_are_others(run, more_images, tmp_path, capsys):
    options = {"data": more_images, "held-out": 0.1}
    assert run(**options) == 0
    newest = tmp_path / "run" / "checkpoints" / "step-00000002" / "training.json"
    told = json.loads(newest.read_text())
    del told["checksum"], told["settings"]["held_out_fraction"]
    newest.write_text(json.dumps(told))
    assert run(**options) == 0
    assert run(**options | {"held-out": 0.2}) == 1
    assert f"added to {more_images}, removed or renamed or --held-out was not 0.2. Give" in capsys.readouterr().err


def spoilt(images, folder):
    """Two of twelve images are unreadable, one is too small, and one file is none."""
    shutil.copytree(images, folder)
    for name in ("03.png", "07.png"):
        (folder / name).write_bytes(b"no image")
    Image.new("RGB", (9, 9)).save(folder / "05.png")
    (folder / "notes.txt").write_text("")
    return folder


def test_what_was_left_out_is_said_at_the_end_and_recorded(run, images, tmp_path, capsys):
    options = {"data": spoilt(images, tmp_path / "spoilt"), "skip-unreadable": 0.2, "batch": 3}
    lines = [
        "run: 2 images are unreadable and left out: 03.png, 07.png",
        "run: 1 images have a side below 48 pixels (--min-side) and are left out: 05.png",
        "run: 1 file is passed over: 1 .txt",
        f"run: all of them are named in {tmp_path / 'run' / 'left_out.json'}",
    ]
    for changes in ({"steps": 6}, {"steps": 6}, {"steps": 7}):  # finished; and resumed in a later epoch
        assert run(**options | changes) == 0
        assert capsys.readouterr().out.splitlines()[-4:] == lines
        record = json.loads((tmp_path / "run" / "left_out.json").read_text())
        assert list(record["unreadable"]) == ["03.png", "07.png"] and record["small"] == ["05.png"]
        assert record["unreadable"]["03.png"].startswith("UnidentifiedImageError")
        assert record["passed_over"] == "1 file is passed over: 1 .txt"
    position = tmp_path / "run" / "checkpoints" / "step-00000007" / "position-0.json"
    assert json.loads(position.read_text())["left_out"]["small"] == ["05.png"]


def test_an_unreadable_held_out_image_is_among_what_was_left_out(run, more_images, tmp_path, capsys):
    shutil.copytree(more_images, tmp_path / "images")
    geometry = Geometry(resolution=96, token_resolution=96, token_factor=8, vae_factor=4)
    parts = split(open_images(tmp_path / "images", geometry), 0.1)
    (tmp_path / "images" / parts.held_out.listed[0].key).write_bytes(b"no image")
    assert run(data=tmp_path / "images", **{"held-out": 0.1, "sample-every": 2}) == 0
    assert f"1 images are unreadable and left out: {parts.held_out.listed[0].key}" in capsys.readouterr().out


def test_nothing_that_is_left_out_is_recorded_too(run, tmp_path, capsys):
    assert run() == 0
    assert "left out" not in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "left_out.json").read_text())
    assert record == {"unreadable": {}, "small": [], "passed_over": ""}


def ended_while_writing(monkeypatch, name, number):
    """The process gets a signal while the temporary file of this result is written."""
    real = files._sort_metadata

    def sort(path):
        if path.name.startswith(name) and path.parent.name == "run":
            os.kill(os.getpid(), number)
            raise AssertionError("it went on")
        real(path)

    monkeypatch.setattr(files, "_sort_metadata", sort)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="sends signals to processes")
def test_ended_while_the_bundles_are_written_the_same_command_writes_them(
    run, more_images, tmp_path, capsys, monkeypatch
):
    bundles = ("best.safetensors", "decoder.safetensors")
    options = {"data": more_images, "held-out": 0.1, "sample-every": 1, "steps": 1}
    assert run(**options, out=tmp_path / "whole") == 0
    before, folder = signal.getsignal(signal.SIGTERM), tmp_path / "run"
    for name in bundles:
        capsys.readouterr()
        with monkeypatch.context() as patched:
            ended_while_writing(patched, name, signal.SIGTERM)
            assert run(**options) == 143
            assert "run: stopped while its results were written: run the same command" in capsys.readouterr().out
            assert signal.getsignal(signal.SIGTERM) == before
            assert not list(folder.rglob("*.tmp")) and not (folder / "decoder.safetensors").exists()
            ended_while_writing(patched, name, signal.SIGKILL)
            assert forked(lambda: run(**options)) == [-signal.SIGKILL]
        assert [path.name[: len(name)] for path in folder.rglob("*.tmp")] == [name]
    assert run(**options) == 0
    assert not list(folder.rglob("*.tmp"))
    assert all((folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in bundles)


def test_a_run_that_began_without_held_out_images_goes_on_without(run, more_images, tmp_path, capsys):
    for name in ("whole", "later"):
        assert run(data=more_images, out=tmp_path / name, **{"held-out": 0, "steps": 2, "save-every": 1}) == 0
    shutil.rmtree(tmp_path / "later" / "checkpoints" / "step-00000002")
    assert run(data=more_images, out=tmp_path / "later") == 0
    assert "this run began without held-out images, and goes on without them" in capsys.readouterr().out
    newest = [tmp_path / name / "checkpoints" / "step-00000002" / "average.safetensors" for name in ("whole", "later")]
    assert newest[0].read_bytes() == newest[1].read_bytes()
    assert not (tmp_path / "later" / "best.safetensors").exists()


def test_a_summary_says_what_is_trained_on_what_and_how(run, capsys):
    assert run(steps=3, batch=2, accumulate=2, train="adapter") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:6] == [
        "no images are held out, since there are fewer than 20: there is no validation loss",
        "run: 1 process on cpu x 2 images x 2 micro-batches = an effective batch of 4",
        "run: 12 images, and 0 held out that are never trained on",
        "run: 107,520 trained parameters, and 8,817,984 frozen ones",
        "run: 3 updates, a warm-up of 500, then a cosine from a learning rate of 0.0001",
        "run: the warm-up is as long as the run: its learning rate ends at 6e-07; see --warmup",
    ]


def test_a_second_training_in_a_folder_is_refused_before_anything_is_loaded(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Plan, "encoders", None)
    with run_lock(tmp_path / "run", SimpleNamespace(is_main_process=True, num_processes=1)):
        assert run() == 1
    assert f"another training runs in {tmp_path / 'run'} (process {os.getpid()} on " in capsys.readouterr().err


def test_what_can_fail_is_checked_before_anything_is_loaded(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Plan, "encoders", None)
    (tmp_path / "file").write_text("no calibration")
    for options, words in (
        ({"calibration": tmp_path / "file"}, f"{tmp_path / 'file'} "),
        ({"calibration": "nowhere"}, "nowhere does not exist"),
        ({"optimizer": "muon", "train": "adapter"}, "muon would update nothing: it takes the matrices inside the tran"),
        ({"bundle": "nowhere"}, "nowhere does not exist; expected a decoder bundle"),
        ({"base": "nowhere"}, "nowhere does not exist; expected a diffusion transformer"),
        ({"out": tmp_path / "file" / "run"}, "cannot be written to"),
    ):
        assert run(**options) == 1
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1


@pytest.mark.parametrize("command", [[], ["distill"], ["cache"], ["estimate"], ["progressive"]], ids=str)
def test_the_help_says_each_default_once_and_none_where_there_is_none(capsys, command):
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "None" not in said and "default: False" not in said
    for option in re.split(r" (?=--[a-z])", said):
        assert option.count("(default: ") <= 1, option


@pytest.mark.parametrize("name", ["AnotherTransformer", 5, []])
def test_a_bundle_of_an_unknown_network_is_named(run, pico, tmp_path, capsys, name):
    bundle = tmp_path / "strange.safetensors"
    with safe_open(pico / "decoder.safetensors", "pt") as file:
        told = file.metadata()
    card = json.loads(told["card"])
    card["base_config"]["_class_name"] = name
    save_file(load_file(pico / "decoder.safetensors"), bundle, metadata=told | {"card": json.dumps(card)})
    assert run(bundle=bundle) == 1
    assert f"{bundle}: the decoder's network is a {name!r}; known are Flux" in capsys.readouterr().err


def test_a_stop_has_the_status_of_its_signal(run, monkeypatch):
    def stopped(*args, **options):
        raise TrainingStopped("it has said so", 15)

    monkeypatch.setattr(cli, "run_training", stopped)
    assert run() == 143


def test_a_run_has_checkpoints_before_its_end_and_keeps_as_many_as_asked_for(run, tmp_path):
    assert run(steps=8, keep=5) == 0
    found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == [f"step-{step:08}" for step in (2, 4, 6, 8)]


def test_a_bundle_of_pico_is_calibrated_for_the_vlm_in_its_own_folder_whatever_that_is_called(tmp_path):
    shutil.copytree(embedded.WEIGHTS / "janus", tmp_path / "renamed")
    sampler = JanusSampler.load(tmp_path / "renamed")
    card = read_card(embedded.WEIGHTS / "decoder.safetensors")
    assert sampler.name == card.calibration.vlm == "pico"
    config = tmp_path / "renamed" / "config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps(told | {"dcdd_name": 7}))
    with pytest.raises(ValueError, match="config.json: dcdd_name must be a text"):
        JanusSampler.load(tmp_path / "renamed")
    del told["dcdd_name"]
    config.write_text(json.dumps(told))
    assert JanusSampler.load(tmp_path / "renamed").name == "renamed"


def test_an_embedded_vlm_brings_its_own_calibration(run, pico, tmp_path, capsys, monkeypatch):
    weights, bundle = shutil.copytree(pico, tmp_path / "pico"), tmp_path / "run" / "decoder.safetensors"
    random_llamagen(weights)
    monkeypatch.setattr(embedded, "WEIGHTS", weights)
    of_janus = read_card(weights / "decoder.safetensors").calibration
    own = replace(of_janus, scale=17.0, guidance=1.5, vlm="pico llamagen")
    own.save(weights / embedded.calibration_name("llamagen"))
    assert run(vlm="pico-llamagen") == 0, capsys.readouterr().err
    assert read_card(bundle).calibration == own
    for changes in ({"vlm": "pico"}, {"vlm": "pico-llamagen", "bundle": weights / "decoder.safetensors"}):
        assert run(out=tmp_path / changes["vlm"], **changes) == 0, capsys.readouterr().err
        assert read_card(tmp_path / changes["vlm"] / "decoder.safetensors").calibration == of_janus
    assert run(vlm="pico-progressive", vae=weights / "vae") == 1
    assert "pico has its own autoencoder" in capsys.readouterr().err


def test_a_window_that_does_nothing_is_said_and_does_not_keep_a_run_from_resuming(run, tmp_path, capsys):
    assert run(window=5) == 0 and run(out=tmp_path / "whole", steps=4) == 0
    capsys.readouterr()
    assert run(window=7, steps=4) == 0
    said = capsys.readouterr().out
    assert "run: resuming from step 2 of 4" in said
    assert "run: --window 7 does nothing: only streams have a window, other images are shuffled as a whole" in said
    assert len(read_log(tmp_path / "run")) == 4


def test_a_run_starts_from_a_bundle_with_other_numbers(run, tmp_path):
    assert run() == 0 and run("--bundle-now") == 0
    bundle = tmp_path / "run" / "decoder-step-00000002.safetensors"
    assert run(out=tmp_path / "again", bundle=bundle, **{"learning-rate": 1e-9}) == 0
    before, after = load_file(bundle), load_file(tmp_path / "again" / "decoder.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6, msg=name)


def test_conditions_are_left_out_and_the_bundle_says_so_and_can_be_guided(run, pico, tmp_path, capsys):
    options = {"drop-condition": 0.5, "learning-rate": 0.1, "warmup": 0}
    assert run(**options) == 0
    assert "run: the condition is left out in a share of 0.5 of the examples" in capsys.readouterr().out
    bundle = tmp_path / "run" / "decoder.safetensors"
    card = read_card(bundle)
    assert (card.condition_dropout, card.condition_guidance) == (0.5, 1.0)
    assert load_file(bundle)["adapter.null.token"].abs().max() > 0
    models = load_models(ModelPaths(vlm=pico / "janus", decoder=bundle, vae=pico / "vae"))
    proxies = models.tokenizer.encode(torch.zeros(1, 3, 96, 96))
    condition = condition_for(models.decoder.card, proxies, models.tokenizer.codebook)
    plain, guided = (
        decode(models.decoder, models.codec, condition, seeds=[1], steps=1, condition_guidance=w).latents
        for w in (None, 3.0)
    )
    assert plain.shape == guided.shape and (plain - guided).abs().max() > 1e-3
    for words in ((), ("--bundle-now",)):
        for given, share in ((None, 0), (0, 0), (0.25, 0.25)):
            assert run(*words, **options | {"drop-condition": given}) == 1
            words_of = f"this run began with --drop-condition 0.5, got {share}: give --drop-condition 0.5 again, or"
            assert words_of in capsys.readouterr().err
    assert run(**options) == 0 and run("--bundle-now", **options) == 0


def test_the_loss_on_held_out_images_is_told_without_the_condition_too(run, more_images, tmp_path):
    options = {"data": more_images, "sample-every": 1, "held-out": 0.1, "learning-rate": 1e-2, "warmup": 0, "steps": 3}
    assert run(**options, **{"drop-condition": 0.5}) == 0
    lines = read_log(tmp_path / "run")
    assert all(line["eval/loss_without_condition"] != line["eval/loss"] for line in lines) and len(lines) == 3
    assert load_best(tmp_path / "run").loss == min(line["eval/loss"] for line in lines)
    assert run(**options, out=tmp_path / "other") == 0
    assert not [line for line in read_log(tmp_path / "other") if "eval/loss_without_condition" in line]


def test_a_run_without_dropped_conditions_does_not_begin_to_leave_some_out(run, pico, tmp_path, capsys):
    assert run() == 0
    bundle = tmp_path / "run" / "decoder.safetensors"
    assert read_card(bundle).condition_dropout == 0
    assert load_file(bundle).keys() == load_file(pico / "decoder.safetensors").keys()
    assert run(**{"drop-condition": 0.1}) == 1
    assert "this run began with --drop-condition 0, got 0.1: give --drop-condition 0 again" in capsys.readouterr().err


@pytest.mark.parametrize("trained", ["lora", "adapter"])
def test_a_bundle_brings_its_null_condition_and_its_share(run, tmp_path, trained):
    def share_of(folder):
        card = read_card(tmp_path / folder / "decoder.safetensors")
        return card.condition_dropout, card.condition_guidance

    def null_of(folder):
        return load_file(tmp_path / folder / "decoder.safetensors").get("adapter.null.token")

    assert run(train=trained, **{"drop-condition": 0.5, "learning-rate": 0.1, "warmup": 0}) == 0
    bundle, still = tmp_path / "run" / "decoder.safetensors", {"train": trained, "learning-rate": 1e-9}
    decoder = load_decoder(bundle, options=DecoderOptions(fold=False))
    decoder.card = replace(decoder.card, condition_guidance=2.0)
    bundle = tmp_path / "guided.safetensors"
    save_bundle(bundle, decoder)
    assert run(out=tmp_path / "again", bundle=bundle, **still) == 0
    assert share_of("again") == (0.5, 2.0) and null_of("run").abs().max() > 0
    torch.testing.assert_close(null_of("again"), null_of("run"), rtol=0, atol=1e-6)
    assert run(out=tmp_path / "less", bundle=bundle, **still, **{"drop-condition": 0.1}) == 0
    assert share_of("less") == (0.1, 2.0)
    torch.testing.assert_close(null_of("less"), null_of("run"), rtol=0, atol=1e-6)
    assert run(out=tmp_path / "none", bundle=bundle, **still, **{"drop-condition": 0}) == 0
    assert share_of("none") == (0.0, 1.0) and null_of("none") is None


@pytest.mark.parametrize(
    ("gpu", "bf16", "launcher", "chosen", "expected"),
    [
        (True, True, None, None, "bf16"),  # what an estimate is of, too
        (True, False, None, None, "no"),
        (False, True, None, None, "no"),
        (True, True, "no", None, None),  # accelerate reads it
        (True, True, "bf16", "no", "no"),
        (False, True, None, "bf16", "bf16"),
    ],
)
def test_a_gpu_trains_in_bf16_unless_told_otherwise(monkeypatch, gpu, bf16, launcher, chosen, expected):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launcher is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    monkeypatch.setattr(accelerate.utils, "is_bf16_available", lambda ignore_tpu: bf16)
    made = {}
    workers = SimpleNamespace(mixed_precision="bf16")
    monkeypatch.setattr(accelerate, "Accelerator", lambda **options: made.update(options) or workers)
    make_accelerator(precision=chosen)
    assert (made["cpu"], made["mixed_precision"]) == (not gpu, expected)
    (patience,) = made["kwargs_handlers"]
    assert patience.timeout >= timedelta(days=1), "processes wait for one that reads a long list of files"


def test_a_run_says_its_precision(run, tmp_path, capsys):
    for precision, words in ((None, "no, frozen weights held in torch.float32"), ("bf16", "bf16, frozen weights held")):
        assert run(steps=1, precision=precision, out=tmp_path / f"{precision}") == 0
        assert f"mixed precision {words}" in capsys.readouterr().out


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("MPS backend out of memory"), MemoryError()])
def test_out_of_memory_is_one_line_on_every_device(run, capsys, monkeypatch, error):
    def full(*args, **options):
        raise error

    monkeypatch.setattr(cli, "run_training", full)
    assert run() == 1
    said = capsys.readouterr().err
    assert said.startswith("train.py: out of memory: ") and said.count("\n") == 1
    assert "resume the run with --checkpointing, or with a smaller --batch and as much more --accumulate;" in said


def test_a_cache_is_told_its_own_way_out(capsys, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(cli, "run_cache", full)
    assert cli.main(["cache", "--vlm", "pico", "--data", "images", "--out", "cache"]) == 1
    said = capsys.readouterr().err
    assert "smaller --batch; what was written is kept" in said and "--checkpointing" not in said


SCRIPT = """
import runpy, sys
from pathlib import Path
from dcdd_pico import embedded
embedded.WEIGHTS = Path(sys.argv.pop(1))
script = sys.argv.pop(1)
sys.exit(runpy.run_path(script)["main"]())
"""


@pytest.mark.slow
def test_two_launched_processes_cache_and_train(pico, images, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    surroundings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def launched(*words):
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2]
        command = [*launch, "--main_process_port", 0, script, pico, ROOT / "train.py", *words, "--vlm", "pico", "--cpu"]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=surroundings)
        assert done.returncode == 0, done.stderr

    launched("cache", "--data", images, "--out", tmp_path / "cache", "--keep-pixels")
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["complete"] and manifest["items"] == 12
    options = ["--steps", 2, "--batch", 2, "--log-every", 1, "--samples", 2, "--sample-every", 2, "--precision", "no"]
    for name, data in (("direct", ["--data", images]), ("cached", ["--cache", tmp_path / "cache"])):
        launched("train", *data, "--out", tmp_path / name, *options)
        assert (tmp_path / name / "checkpoints" / "step-00000002" / "position-1.json").exists()
        assert len(list((tmp_path / name / "samples").iterdir())) == 1
        assert load_decoder(tmp_path / name / "decoder.safetensors").card.variant == "lcdm+lc"
    direct, cached = ([line["loss"] for line in read_log(tmp_path / name)] for name in ("direct", "cached"))
    assert len(direct) == 2 and cached == pytest.approx(direct, rel=1e-2)


def test_from_a_cache_as_from_the_images(run, tmp_path):
    assert run("cache", out=tmp_path / "cache") == 0
    assert json.loads((tmp_path / "cache" / "manifest.json").read_text())["items"] == 12
    for name, options in (("direct", {}), ("cached", {"data": None, "cache": tmp_path / "cache"})):
        assert run(out=tmp_path / name, localised=0, **options) == 0
    direct, cached = ([line["loss"] for line in read_log(tmp_path / name)] for name in ("direct", "cached"))
    assert cached == pytest.approx(direct, rel=1e-2)


def test_a_damaged_cache_is_found_on_demand(run, tmp_path, capsys):
    assert run("cache", out=tmp_path / "cache") == 0
    shard = tmp_path / "cache" / "shards" / "00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    assert run("train", "--verify", data=None, cache=tmp_path / "cache", localised=0) == 1
    assert "shards/00000.safetensors" in capsys.readouterr().err
    assert run("train", "--verify") == 1 and "leave --verify out" in capsys.readouterr().err


def test_a_run_is_not_resumed_on_another_frozen_base(run, pico, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    weights = load_file(pico / "decoder.safetensors")
    weights["transformer.single_transformer_blocks.0.proj_mlp.weight"] += 1
    with safe_open(pico / "decoder.safetensors", "pt") as file:
        told = {name: value for name, value in file.metadata().items() if name != "checksums"}
        save_file(weights, other, metadata=told)
    assert run() == 0
    for words in ((), ("--bundle-now",)):
        assert run(*words, bundle=other) == 1
        assert "made with other settings (frozen " in capsys.readouterr().err


def test_a_cache_without_pixels_cannot_be_masked(run, tmp_path, capsys):
    assert run("cache", out=tmp_path / "cache") == 0
    assert run(data=None, cache=tmp_path / "cache") == 1
    assert "which localised training needs" in capsys.readouterr().err


def test_low_rank_updates_are_merged(run, pico, tmp_path):
    assert run("--checkpointing", train="lora", rank=2, precision="bf16", optimizer="muon", **{"learning-rate": 1}) == 0
    names = load_decoder(tmp_path / "run" / "decoder.safetensors").state_dict()
    before = load_decoder(pico / "decoder.safetensors", options=DecoderOptions(dtype=torch.bfloat16)).state_dict()
    moved = {name for name, value in names.items() if not torch.equal(value, before[name])}
    assert set(names) == set(before) and "transformer.transformer_blocks.0.attn.to_q.weight" in moved
    assert all(".attn." in name or name.startswith("adapter.") for name in moved)


def test_over_a_base_only_what_changed_is_kept(run, pico, tmp_path):
    base = tmp_path / "base"
    load_decoder(pico / "decoder.safetensors", options=DecoderOptions(fold=False)).transformer.save_pretrained(
        base / "transformer"
    )
    calibration = tmp_path / "calibration.safetensors"
    Calibration(scale=20.0).save(calibration)
    own = {"vlm": pico / "janus", "vae": pico / "vae", "base": base, "width": 16}
    assert run(**own, calibration=calibration, licence="mine") == 0
    bundle = tmp_path / "run" / "decoder.safetensors"
    card = read_card(bundle)
    assert (card.base, card.width, card.licence, card.calibration.scale) == ("base", 16, "mine", 20.0)
    assert (card.tokenizer, card.resolution, card.pixels_per_token) == ("pico", 96, 8)
    with pytest.raises(ValueError, match="it needs its base model base as well"):
        load_decoder(bundle)
    assert load_decoder(bundle, base).card == card
    assert run(**own, variant="lcdm", out=tmp_path / "raw") == 0
    assert read_card(tmp_path / "raw" / "decoder.safetensors").calibration is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": "nowhere"}, "there is no file nowhere"),
        ({"resolution": 100}, "use 96 or 104"),
        ({"tracker": "nobody"}, "the tracker 'nobody' is not installed"),
        ({"vlm": "nowhere", "vae": "nowhere"}, "nowhere does not exist; expected a VLM"),
        ({"vlm": "nowhere"}, "nowhere does not exist; expected a VLM"),
        ({"vlm": str(embedded.WEIGHTS / "janus")}, "give --vae"),
        ({"variant": "discrete", "calibration": "c.safetensors"}, "takes no calibration"),
        ({"calibration": "c.safetensors"}, "c.safetensors does not exist"),
    ],
)
def test_errors_are_one_line_with_the_way_out(run, capsys, tmp_path, options, words):
    assert run(**options) == 1
    said = capsys.readouterr().err
    assert words in said and said.startswith("train.py: ") and "Traceback" not in said
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"log-every": 0}, "log_every must be at least 1, got 0"),
        ({"save-every": -5}, "save_every must be at least 1, got -5"),
        ({"sample-every": 0, "samples": 1}, "sample_every must be at least 1, got 0: for no sheets take --samples 0"),
        ({"samples": -1}, "samples must be at least 0, got -1"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"steps": 0}, "steps and accumulation must be at least 1, got 0 and 1"),
        ({"accumulate": 0}, "steps and accumulation must be at least 1, got 2 and 0"),
        ({"steps": 10**12}, "steps must be at most 99,999,999, got 1,000,000,000,000"),
        ({"accumulate": 10**6}, "accumulation must be at most 65,536, got 1,000,000"),
        ({"batch": 10**12}, "batch must be at most 65,536, got 1,000,000,000,000"),
        ({"window": 10**12}, "window must be at most 1,000,000, got 1,000,000,000,000"),
        ({"workers": 10**6}, "workers must be at most 1,024, got 1,000,000"),
        ({"shift": 1e300}, "shift must be a finite number in -16.0..16.0, got 1e+300"),
        ({"samples": 10**9}, "samples must be at most 64, got 1,000,000,000"),
        ({"weight-decay": "inf"}, "weight_decay must be a finite number in 0..10.0, got inf"),
        ({"weight-decay": -1}, "weight_decay must be a finite number in 0..10.0, got -1.0"),
        ({"weight-decay": 1e6}, "weight_decay must be a finite number in 0..10.0, got 1000000.0"),
        ({"learning-rate": 1e3}, "learning_rate must be a finite number above 0 and of at most 10.0, got 1000.0"),
        ({"save-every": 10**9}, "save_every must be at most 99,999,999, got 1,000,000,000"),
        ({"log-every": 10**30}, f"log_every must be at most 99,999,999, got {10**30:,}"),
        ({"sample-every": 10**9}, "sample_every must be at most 99,999,999, got 1,000,000,000"),
        ({"keep": 10**9}, "keep must be at most 99,999,999, got 1,000,000,000"),
        ({"min-side": 10**9}, "--min-side must be at most 11,585, got 1,000,000,000"),
        ({"seed": 2**63}, "seed must be a whole number of 64 bits, got 9223372036854775808"),
        ({"held-out": "nan"}, "the fraction of held-out images must lie in 0..0.5, got nan"),
        ({"held-out": 0.6}, "the fraction of held-out images must lie in 0..0.5, got 0.6"),
        ({"keep": 0}, "keep must be at least 1, got 0"),
        ({"sample-every": -1}, "sample_every must be at least 0, got -1"),
        ({"resolution": 10**9}, "resolution must be at most 65,536, got 1,000,000,000"),
        ({"resolution": 0}, "resolution must be at least 1, got 0"),
        ({"width": 0, "bundle": None, "base": "nowhere"}, "width must be at least 1, got 0"),
        ({"rank": 0, "train": "lora"}, "rank must be at least 1, got 0"),
        ({"drop-condition": 1}, "drop-condition must be a finite number of at least 0 and below 1 or None, got 1.0"),
        (
            {"drop-condition": -0.1},
            "drop-condition must be a finite number of at least 0 and below 1 or None, got -0.1",
        ),
    ],
)
def test_what_must_be_above_zero_is_refused_before_anything_is_loaded(run, capsys, options, words):
    own = {"vlm": "nowhere", "vae": "nowhere", "bundle": "nowhere"}  # Read, they would be missed first.
    assert run(**own | options) == 1
    assert capsys.readouterr().err == f"train.py: {words}\n"


@pytest.mark.parametrize("option", ["batch", "shard-size"])
def test_a_cache_of_nothing_at_a_time_is_refused_before_anything_is_loaded(run, capsys, option):
    assert run("cache", vlm="nowhere", vae="nowhere", **{option: 0}) == 1
    assert capsys.readouterr().err == f"train.py: {option.replace('-', '_')} must be at least 1, got 0\n"


def test_eight_bit_moments_need_a_library_that_is_named(run, capsys, monkeypatch):
    for module in ("bitsandbytes.optim", "torchao.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    assert run(optimizer="adamw8bit") == 1
    assert "needs bitsandbytes or torchao: install one of them" in capsys.readouterr().err


def test_an_estimate_needs_no_images_and_no_models(tmp_path, capsys):
    small = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "joint_attention_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps(small))
    words = ["estimate", "--base", str(tmp_path), "--resolution", "256", "--grid", "16"]
    assert main(words) == 0
    assert "hours" in capsys.readouterr().out
    assert main([*words, "--batch", "0"]) == 1
    assert capsys.readouterr().err == "train.py: batch must be at least 1, got 0\n"


def test_what_is_missing_is_said(run, pico, capsys, tmp_path):
    own = {"vlm": pico / "janus", "vae": pico / "vae"}
    assert run(**own) == 1 and "give the base (FLUX.1-Fill), or a decoder bundle" in capsys.readouterr().err
    load_decoder(pico / "decoder.safetensors", options=DecoderOptions(fold=False)).transformer.save_pretrained(
        tmp_path / "base"
    )
    assert run(**own, base=tmp_path / "base") == 1
    assert "make one for this VLM with `dcdd calibrate`" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run(data=tmp_path / "empty") == 1 and "holds no images" in capsys.readouterr().err


@pytest.mark.parametrize("converged", [False, True])
def test_a_calibration_that_did_not_converge_is_warned_of_once(run, tmp_path, capsys, converged):
    calibration = tmp_path / "calibration.safetensors"
    Calibration(scale=20.0, converged=converged).save(calibration)
    assert run(calibration=calibration, steps=1) == 0
    said = f"train.py: the calibration of {calibration} did not converge: "
    assert capsys.readouterr().err.count(said) == (not converged)


def test_any_size_is_painted_from_the_vlm_s_own_grid(run, pico, tmp_path):
    assert run(resolution=64, samples=1) == 0  # 12 x 12 tokens of 5.3 pixels
    bundle = tmp_path / "run" / "decoder.safetensors"
    models = load_models(ModelPaths(vlm=pico / "janus", vae=pico / "vae", decoder=bundle), with_sampler=False)
    proxies = models.tokenizer.encode(torch.zeros(1, 3, 96, 96))
    condition = condition_for(models.decoder.card, proxies, models.tokenizer.codebook)
    assert decode(models.decoder, models.codec, condition, seeds=[0], steps=1).pixels.shape == (1, 3, 64, 64)
    with Image.open(tmp_path / "run" / "samples" / "step-00000002.png") as sheet:
        assert sheet.size == (3 * 64, 64)


def test_an_unreadable_image_is_skipped_and_named(run, images, tmp_path, capsys):
    folder = png_folder(tmp_path / "some", count=3, side=48)
    (folder / "broken.png").write_bytes(b"no image")
    assert run(data=folder, steps=4, **{"skip-unreadable": 0.5}) == 0
    assert "broken.png of" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configs_that_are_shipped(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16" and config.num_machines == 1
    known = {action.dest for action in launch_command_parser()._actions}
    for name in config.fsdp_config or {}:
        assert name in known, name
    assert "fsdp_transformer_layer_cls_to_wrap" not in (config.fsdp_config or {}), "the backbone says which"


def test_a_launcher_configured_for_deepspeed_is_refused(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as `accelerate launch --use_deepspeed` sets it
    assert run() == 1
    assert "DeepSpeed, which is not supported: choose DDP or FSDP2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_numbers_and_the_sheets(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # is not there to be imported, nor is tensorflow
    assert run(tracker="tensorboard", samples=1) == 0
    events = EventAccumulator(str(tmp_path / "run" / "dcdd")).Reload()
    lines = read_log(tmp_path / "run")
    for name in ("loss", "gradient_norm", "eval/training_loss"):
        found = {scalar.step: scalar.value for scalar in events.Scalars(name)}
        assert found == pytest.approx({line["step"]: line[name] for line in lines if name in line}), name
    (image,) = events.Images("samples")
    with (
        Image.open(BytesIO(image.encoded_image_string)) as seen,
        Image.open(tmp_path / "run" / "samples" / f"step-{image.step:08}.png") as sheet,
    ):
        assert image.step == 2 and seen.size == sheet.size and seen.tobytes() == sheet.tobytes()
