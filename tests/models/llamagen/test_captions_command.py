"""`dcdd captions`: text features on the command line, and sampling from them where the text encoder is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcdd_core.cli import common, main
from dcdd_core.models import t5
from dcdd_core.models.autoregressive.token_loop import TokenLoop
from dcdd_core.models.llamagen import captions
from dcdd_core.models.llamagen.captions import Captions, load_captions, save_captions
from dcdd_core.models.llamagen.sampler import LlamaGenSampler
from dcdd_core.models.t5 import IN_INT8, T5Text
from tests.tiny import save_janus
from tests.tiny_llamagen import save_llamagen

PROMPTS = ["a red circle on the left", "a blue square", "a green star"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_llamagen(tmp_path_factory.mktemp("llamagen") / "model")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([*PROMPTS, f"  {PROMPTS[1].upper()}"]))
    return file


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """The captions that are encoded, in order."""
    told, features = [], T5Text.features
    monkeypatch.setattr(T5Text, "features", lambda self, texts, at: told.extend(texts) or features(self, texts, at))
    return told


def run(folder: Path, prompts: Path, *more: str) -> int:
    return main(["captions", "--vlm", str(folder), "--prompts", str(prompts), *more])


def generate(folder: Path, prompt: str, out: Path) -> int:
    return main(["generate", prompt, "--vlm", str(folder), "--out", str(out)])


def test_prompts_are_sampled_without_the_text_encoder_afterwards(
    folder, prompts, encoded, tmp_path, monkeypatch, capsys
):
    asked, start = [], TokenLoop.start
    monkeypatch.setattr(
        TokenLoop, "start", lambda self, *args, **given: asked.append(self.options) or start(self, *args, **given)
    )
    assert generate(folder, PROMPTS[1], tmp_path / "before.png") == 0
    encoded.clear()
    assert run(folder, prompts) == 0
    file = folder / "captions.safetensors"
    assert f"wrote {file}: 3 captions, 3 of them new" in capsys.readouterr().out
    assert encoded == PROMPTS == list(load_captions(file).features)
    shutil.rmtree(folder / "flan-t5-xl")
    assert generate(folder, PROMPTS[1], tmp_path / "after.png") == 0
    before, after = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("before", "after"))
    assert (before == after).all() and before.std() > 1
    assert [(options.guidance, options.top_k) for options in asked] == [(7.5, 1000)] * 2
    capsys.readouterr()
    assert generate(folder, "a yellow ring", tmp_path / "no.png") == 1
    assert "do not hold 'a yellow ring'" in (told := capsys.readouterr().err) and "with `dcdd captions`" in told
    assert run(folder, prompts) == 1
    assert "has no folder flan-t5-xl, the text encoder that captions are encoded with" in capsys.readouterr().err


def test_a_file_is_added_to(folder, prompts, encoded, tmp_path, capsys):
    out, more = tmp_path / "new" / "kept.safetensors", tmp_path / "more.txt"
    assert run(folder, prompts, "--out", str(out)) == 0
    more.write_text("a yellow ring\na blue square")
    encoded.clear()
    assert run(folder, more, "--out", str(out)) == 0
    assert encoded == ["a yellow ring"] and list(load_captions(out).features) == [*PROMPTS, "a yellow ring"]
    assert "4 captions, 1 of them new" in capsys.readouterr().out
    before = out.stat().st_mtime_ns
    assert run(folder, more, "--out", str(out)) == 0
    assert "has all of these captions" in capsys.readouterr().out and out.stat().st_mtime_ns == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of memory")])
def test_a_stopped_run_goes_on(folder, prompts, encoded, tmp_path, monkeypatch, error):
    whole, stopped = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    assert run(folder, prompts, "--out", str(whole)) == 0
    features = T5Text.features

    def stop(self, texts, device):
        if texts == [PROMPTS[2]]:
            raise error
        return features(self, texts, device)

    with monkeypatch.context() as patch:
        patch.setattr(T5Text, "features", stop)
        assert run(folder, prompts, "--out", str(stopped)) == (130 if error is KeyboardInterrupt else 1)
    assert list(load_captions(stopped).features) == PROMPTS[:2]
    encoded.clear()
    assert run(folder, prompts, "--out", str(stopped)) == 0
    assert encoded == PROMPTS[2:] and stopped.read_bytes() == whole.read_bytes()
    assert {file.name for file in tmp_path.glob("*.safetensors*")} == {whole.name, stopped.name}


def test_what_has_been_encoded_is_written_on_the_way(folder, prompts, tmp_path, monkeypatch):
    out, there, features = tmp_path / "a.safetensors", [], T5Text.features
    monkeypatch.setattr(captions, "SAVE_EVERY", -1.0)

    def look(self, texts, device):
        there.append(len(load_captions(out).features) if out.exists() else 0)
        return features(self, texts, device)

    monkeypatch.setattr(T5Text, "features", look)
    assert run(folder, prompts, "--out", str(out)) == 0 and there == [0, 1, 2]


def test_the_text_encoder_comes_to_the_device_once(folder, monkeypatch, tmp_path):
    text, moves, told = LlamaGenSampler.load(folder).text, ["cpu"], []
    monkeypatch.setattr(text.encoder, "to", lambda device: moves.append(str(device)))
    monkeypatch.setattr(type(text.encoder), "device", property(lambda self: torch.device(moves[-1])))

    def features(self, texts, device):
        with self.on(device):
            return {caption: torch.ones(3, 8) for caption in texts}

    monkeypatch.setattr(T5Text, "features", features)
    given = {"device": "cuda", "on_progress": lambda *now: told.append(now)}
    assert captions.add_captions(tmp_path / "a.safetensors", PROMPTS, text, **given) == (3, 3)
    assert moves == ["cpu", "cuda", "cpu"] and told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def refused(words: str, capsys, *given) -> None:
    assert run(*given) == 1
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1, told


def test_features_of_another_text_encoder_or_dtype_are_refused(folder, prompts, encoded, tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    assert run(folder, prompts, "--out", str(out), "--dtype", "bfloat16") == 0
    held, kept = load_captions(out), out.read_bytes()
    assert held.dtype == torch.bfloat16
    encoded.clear()
    refused(
        "has features in bfloat16, and this text encoder is in float32: load it in",
        capsys,
        folder,
        prompts,
        "--out",
        str(out),
    )
    assert out.read_bytes() == kept
    save_captions(out, Captions(features=held.features, encoder="0123456789abcdef"))
    more = ("--out", str(out), "--dtype", "bfloat16")
    refused("has features of another text encoder (0123456789abcdef, this is", capsys, folder, prompts, *more)
    out.write_bytes(b"no")
    refused("a.safetensors", capsys, folder, prompts, *more)
    assert encoded == [] and out.read_bytes() == b"no"


@pytest.mark.parametrize(
    ("line", "words"),
    [("(***)", "blank once it is cleaned"), ("red " * 130, "has 131 tokens with the end token, and 120 are read")],
)
def test_prompts_that_cannot_be_encoded_are_refused_before_any_is(folder, prompts, encoded, capsys, line, words):
    prompts.write_text(f"a red circle\n{line}\n")
    refused(words, capsys, folder, prompts)
    assert encoded == [] and not (folder / "captions.safetensors").exists()


def test_the_device_and_eight_bits_are_the_text_encoder_s(folder, prompts, monkeypatch):
    told = []

    def add(file, prompts, text, *, device, on_progress):
        told.append((str(device), text.fingerprint.endswith(IN_INT8)))
        return 0, len(prompts)

    monkeypatch.setattr(common, "device_of", lambda args: torch.device("cuda"))
    monkeypatch.setattr(t5, "store_in_int8", lambda module, device: None)
    monkeypatch.setattr(captions, "add_captions", add)
    assert run(folder, prompts) == run(folder, prompts, "--vlm-int8") == 0
    assert told == [("cuda", False), ("cuda", True)]


def test_what_it_cannot_work_with_is_refused(folder, prompts, tmp_path, capsys):
    janus = save_janus(tmp_path / "janus")
    capsys.readouterr()  # transformers' bar
    refused("has no use for saved features of captions", capsys, janus, prompts)
    refused("is a folder: give the name of a file", capsys, folder, prompts, "--out", str(tmp_path))
    refused("nothing.txt", capsys, folder, tmp_path / "nothing.txt")
    refused("expected a VLM", capsys, tmp_path / "nowhere", prompts)
    refused("pico-llamagen is embedded and needs no saved captions", capsys, "pico-llamagen", prompts)
    refused("cannot be used here", capsys, folder, prompts, "--device", "meta")
