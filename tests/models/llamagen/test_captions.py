"""Captions are cleaned as the released code cleans them, and their features survive a file."""

from __future__ import annotations

import json

import pytest
import torch

from dcdd_core.files import write_record
from dcdd_core.models.llamagen.captions import (
    _KIND,
    Captions,
    clean_caption,
    load_captions,
    require_caption,
    save_captions,
)
from tests.models.llamagen.make_golden_llamagen import CAPTIONS, GOLDEN


def test_captions_are_cleaned_as_by_the_released_code():
    cleaned = json.loads(GOLDEN.read_text())["captions"]
    assert [caption for caption, _ in cleaned] == list(CAPTIONS)
    assert [clean_caption(caption) for caption, _ in cleaned] == [expected for _, expected in cleaned]


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("a dog <script>var x;</script><style>p {}</style>runs", "a dog runs"),
        ("\ufeffa dog\x07 runs", "a dog runs"),
        ("cafe\u0301", "caf\u00e9"),
        ("http:foo.co a dog", "a dog"),
        ("www:foo.co a dog", "www: a dog"),
    ],
)
def test_rarer_captions_too(caption, cleaned):
    """What that code made of them with ftfy 6.3 and beautifulsoup4 4.15."""
    assert clean_caption(caption) == cleaned


def test_a_plain_caption_stays():
    for caption in ("a red circle on the left", "an astronaut's horse, 3 trees: half-timbered", "été à la plage"):
        assert clean_caption(caption) == caption


def test_features_survive_a_file(tmp_path):
    file, draw = tmp_path / "captions.safetensors", torch.Generator().manual_seed(0)
    features = {"a dog": torch.randn(3, 4, generator=draw).bfloat16(), 'it says "x"': torch.ones(1, 4).bfloat16()}
    save_captions(file, Captions(features=features, encoder="abc"))
    found = load_captions(file)
    assert (list(found.features), found.encoder) == (list(features), "abc")
    assert (found.dtype, found.width) == (torch.bfloat16, 4)
    assert all(torch.equal(found.features[caption], values) for caption, values in features.items())


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({}, "no captions to save"),
        ({"a": torch.ones(2, 4), "b": torch.ones(2, 5)}, r"features of 'b' are \[2, 5\] in torch.float32, expected"),
        ({"a": torch.ones(2, 4), "b": torch.ones(2, 4).half()}, "in torch.float16, expected .* in torch.float32"),
        ({"a": torch.ones(0, 4)}, r"are \[0, 4\]"),
        ({"a": torch.ones(4)}, r"are \[4\]"),
    ],
)
def test_features_that_are_none_are_refused(features, words):
    with pytest.raises(ValueError, match=words):
        Captions(features=features, encoder="abc")


@pytest.mark.parametrize("left", ["", "  ", "(***)", "jc6640"])
def test_a_prompt_of_which_nothing_is_left_is_refused(left):
    with pytest.raises(ValueError, match="blank once it is cleaned"):
        require_caption(left)


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "captions.safetensors"
    write_record(file, "calibration", {"features": torch.ones(2, 4)}, {})
    with pytest.raises(ValueError, match="expected a set of text features by caption"):
        load_captions(file)
    whole = {"captions": ["a"], "lengths": [2], "encoder": "abc"}
    for changes in (
        {"lengths": [1]},
        {"captions": ["a", "b"]},
        {"captions": ["a", "b"], "lengths": [0, 2]},
        {"captions": ["a", "a"], "lengths": [1, 1]},
        {"captions": [], "lengths": []},
        {"captions": "a"},
        {"captions": [1]},
        {"lengths": ["2"]},
        {"lengths": 2},
    ):
        write_record(file, _KIND, {"features": torch.ones(2, 4)}, whole | changes)
        with pytest.raises(ValueError, match="is damaged, make it again"):
            load_captions(file)
    for values, words in ((torch.ones(2, 4).int(), "is damaged"), (torch.full((2, 4), torch.nan), "not finite")):
        write_record(file, _KIND, {"features": values}, whole)
        with pytest.raises(ValueError, match=words):
            load_captions(file)
    write_record(file, _KIND, {"features": torch.ones(2, 4)}, whole | {"encoder": 3})
    with pytest.raises(ValueError, match="captions.safetensors: encoder must be a text, got 3"):
        load_captions(file)
