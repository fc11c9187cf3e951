"""T5's text features: what is kept, where the encoder goes, and what is refused before it goes anywhere."""

from __future__ import annotations

import pytest
import torch

from dcdd_core.models import t5
from dcdd_core.models.checkpoints import fingerprint_of
from dcdd_core.models.t5 import T5Text, load_text
from tests.tiny_bigfix import tiny_text_encoder, tiny_words

TEXTS = ["a red circle", "a blue square", "red"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    tiny_text_encoder().save_pretrained(folder)
    tiny_words().save_pretrained(folder)
    return folder


@pytest.fixture
def text(folder) -> T5Text:
    return load_text(folder)


def moving(text: T5Text, monkeypatch) -> list[str]:
    """Where its encoder goes from now on; in truth it stays."""
    moves: list[str] = []
    monkeypatch.setattr(text.encoder, "to", lambda device: moves.append(str(device)))
    return moves


def test_features_are_the_encoders(text):
    found = text.features(TEXTS, "cpu")
    assert list(found) == TEXTS
    with torch.no_grad():
        for one, values in found.items():
            expected = tiny_text_encoder().eval()(torch.tensor([text.words.ids(one)])).last_hidden_state[0]
            torch.testing.assert_close(values, expected)


def test_the_encoder_comes_once_for_all_new_texts(text, monkeypatch):
    moves = moving(text, monkeypatch)
    expected = text.features(TEXTS, "cpu")
    assert moves == []
    found = text.features([*TEXTS, "green", "star"], "cuda")
    assert moves == ["cuda", "cpu"] and all(torch.equal(found[one], expected[one]) for one in TEXTS)
    text.features(["green"], "cuda")
    assert moves == ["cuda", "cpu"] and text.memory(["green"]) == 0 < text.memory(["green", "a"])


def test_the_encoder_goes_back_after_an_error(text, monkeypatch):
    moves = moving(text, monkeypatch)

    def fail(**given):
        raise RuntimeError("no")

    monkeypatch.setattr(text.encoder, "forward", fail)
    with pytest.raises(RuntimeError, match="no"):
        text.features(TEXTS, "cuda")
    assert moves == ["cuda", "cpu"]


def test_what_cannot_be_read_is_refused_before_the_encoder_moves(text, monkeypatch):
    moves = moving(text, monkeypatch)
    with pytest.raises(ValueError, match="has 121 tokens"):
        text.features(["red", "red " * 120], "cuda")
    assert moves == []


def test_the_last_texts_are_kept(text, monkeypatch):
    monkeypatch.setattr(t5, "KEPT", 2)
    found = text.features(TEXTS, "cpu")
    assert len(found) == 3 and text.memory(TEXTS[1:]) == 0 < text.memory(TEXTS[:1])
    text.features(TEXTS[1:2], "cpu")  # used again: the other goes first
    text.features(["green"], "cpu")
    assert text.memory(["green", TEXTS[1]]) == 0 < text.memory(TEXTS[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fingerprint_does_not_depend_on_the_dtype(folder, text, dtype):
    found = load_text(folder, dtype=dtype)
    assert found.fingerprint == text.fingerprint
    assert found.features(["red"], "cpu")["red"].dtype == dtype
    assert text.fingerprint != fingerprint_of({})


def test_in_inference_mode_it_moves_and_computes_too(text):
    """ComfyUI runs nodes in it, and frees and loads models outside of it."""
    expected = text.features(["red"], "cpu")["red"]
    text.encoder.to(torch.float64)
    with torch.inference_mode():
        text.encoder.to(torch.float32)
        text.features(["a red star"], "cpu")
    text.encoder.to(torch.float64).to(torch.float32)
    fresh = T5Text(text.words, text.encoder, fingerprint="")
    assert torch.equal(fresh.features(["red"], "cpu")["red"], expected)
