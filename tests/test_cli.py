"""The command line on models of the embedded shapes: files, exit codes, and errors in words."""

import pytest
import torch
from PIL import Image

from dcdd_core.cli import main
from dcdd_core.pico.scenes import render_scene
from dcdd_core.pipelines import models as pipelines_models
from dcdd_core.types import Calibration, TokenLogits
from tests.tiny import random_pico, save_janus


@pytest.fixture(scope="module", autouse=True)
def random_weights(tmp_path_factory):
    """The embedded models' files with random weights: here only what runs is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines_models, "PICO_WEIGHTS", random_pico(tmp_path_factory.mktemp("pico") / "weights"))
        yield


PROMPT = "a large plain red circle in the centre on a plain sky ground"


def size(path):
    with Image.open(path) as image:
        return image.size


def test_generate_writes_both_pictures_and_the_logits(tmp_path, capsys):
    out, logits = tmp_path / "a.png", tmp_path / "l.safetensors"
    assert main(["generate", PROMPT, "--steps", "2", "--out", str(out), "--compare", "--logits", str(logits)]) == 0
    assert size(out) == size(tmp_path / "a-vq.png") == (96, 96)
    kept = TokenLogits.load(logits)
    assert kept.logits.shape == (1, 144, 1024) and kept.guidance == 3.0
    assert str(out) in capsys.readouterr().out


def test_the_same_seed_gives_the_same_file_and_another_does_not(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert (
            main(["generate", PROMPT, "--steps", "1", "--seed", str(seed), "--out", str(tmp_path / f"{name}.png")]) == 0
        )
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_unknown_words_are_named(tmp_path, capsys):
    main(["generate", "a red unicorn in the centre", "--steps", "1", "--out", str(tmp_path / "a.png")])
    assert "does not know unicorn" in capsys.readouterr().err


def test_reconstruct_takes_any_size_from_a_token_up(tmp_path):
    Image.fromarray(render_scene("test", 0, size=70).image).save(tmp_path / "a.png")
    assert main(["reconstruct", str(tmp_path / "a.png"), "--steps", "1", "--out", str(tmp_path / "out")]) == 0
    assert size(tmp_path / "out" / "a-vq.png") == size(tmp_path / "out" / "a-dcdd.png") == (64, 64)


def test_calibrate_writes_what_generate_reads(tmp_path, capsys):
    path = tmp_path / "c.safetensors"
    assert main(["calibrate", "--count", "3", "--guidance", "3", "--out", str(path)]) == 0
    found = Calibration.load(path)
    assert found.guidance == 3.0 and found.vlm == "pico" and "mean entropy" in capsys.readouterr().out
    arguments = ["generate", PROMPT, "--steps", "1", "--calibration", str(path), "--out", str(tmp_path / "a.png")]
    assert main(arguments) == 0


def test_inspect_prints_table_1_and_draws_figure_6(tmp_path, capsys):
    out = tmp_path / "curve.png"
    assert main(["inspect", "--count", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("raw proxies", "calibrated proxies", "Otsu rank", "tail entropy"))
    assert size(out)[0] > 500


def test_demo_makes_one_sheet(tmp_path, capsys):
    assert main(["demo", PROMPT, "--steps", "1", "--out", str(tmp_path / "demo.png")]) == 0
    assert size(tmp_path / "demo.png")[0] > 1000
    assert "Janus samples 1 x 144 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", PROMPT, "--janus", "/nowhere"], "/nowhere"),
        (["generate", "   "], "blank"),
        (["generate", PROMPT, "--temperature", "-1"], "temperature"),
        (["generate", PROMPT, "--steps", "0"], "steps"),
        (["generate", PROMPT, "--decoder", "x"], "--janus"),
        (["generate", PROMPT, "--out", "a.jpg"], ".png"),
        (["generate", PROMPT, "--anchor", "1", "--reads", "tokens"], "exclude"),
        (["generate", PROMPT, "--device", "cuda:99"], "--device cuda:99"),
        (["demo", "--device", "abacus"], "--device abacus"),
        (["reconstruct", "a/x.png", "b/x.png"], "one name"),
        (["generate", PROMPT, "--calibration", "/nowhere"], "/nowhere"),
        (["reconstruct", "/nowhere.png"], "nowhere.png"),
        (["calibrate", "--prompts", "/nowhere.txt"], "nowhere.txt"),
    ],
)
def test_errors_are_one_line_and_exit_1(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dcdd: ") and words in error


def test_a_picture_of_too_many_tokens_is_refused_and_shrunk_on_demand(tmp_path, capsys):
    Image.new("RGB", (1200, 1000)).save(tmp_path / "a.png")
    arguments = ["reconstruct", str(tmp_path / "a.png"), "--steps", "1", "--out", str(tmp_path / "out")]
    assert main(arguments) == 1 and "--side" in capsys.readouterr().err
    assert main([*arguments, "--side", "100"]) == 0
    assert size(tmp_path / "out" / "a-dcdd.png") == (96, 80)


def test_running_out_of_memory_is_explained(monkeypatch, tmp_path, capsys):
    def too_much(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("dcdd_core.cli.decode", too_much)
    assert main(["generate", PROMPT, "--out", str(tmp_path / "a.png")]) == 1
    assert "out of memory" in capsys.readouterr().err


def test_missing_weights_are_explained(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pipelines_models, "PICO_WEIGHTS", tmp_path / "none")
    assert main(["demo", "--out", str(tmp_path / "a.png")]) == 1
    assert "make pico" in capsys.readouterr().err


def test_a_wrong_option_exits_2():
    with pytest.raises(SystemExit) as stopped:
        main(["generate", PROMPT, "--stepss", "3"])
    assert stopped.value.code == 2


def test_an_interrupt_exits_130(monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dcdd_core.cli.decode", interrupted)
    assert main(["generate", PROMPT, "--out", str(tmp_path / "a.png")]) == 130


def test_a_folder_of_one_s_own_works_without_a_decoder(tmp_path):
    folder = save_janus(tmp_path / "janus")
    assert main(["generate", "a red circle", "--janus", str(folder), "--out", str(tmp_path / "a.png")]) == 0
    assert size(tmp_path / "a.png") == (16, 16)
    assert main(["calibrate", "--janus", str(folder), "--out", str(tmp_path / "c")]) == 1
    assert main(["generate", "a red circle", "--janus", str(folder), "--steps", "3"]) == 1
    (tmp_path / "p.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "images").mkdir()
    Image.fromarray(render_scene("test", 0, size=16).image).save(tmp_path / "images" / "a.png")
    arguments = [
        "--prompts",
        str(tmp_path / "p.txt"),
        "--images",
        str(tmp_path / "images"),
        "--out",
        str(tmp_path / "c"),
    ]
    assert main(["calibrate", "--janus", str(folder), *arguments]) == 0
    assert Calibration.load(tmp_path / "c").guidance == 5.0
