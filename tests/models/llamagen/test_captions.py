"""Captions are cleaned as the released code cleans them, and their features survive a file."""

from __future__ import annotations

import json

import pytest
import torch

from dcdd_core.files import write_record
from dcdd_core.models.llamagen.captions import _KIND, clean_caption, load_captions, save_captions
from tests.models.llamagen.make_golden_llamagen import CAPTIONS, GOLDEN


def test_captions_are_cleaned_as_by_the_released_code():
    cleaned = json.loads(GOLDEN.read_text())["captions"]
    assert [caption for caption, _ in cleaned] == list(CAPTIONS)
    assert [clean_caption(caption) for caption, _ in cleaned] == [expected for _, expected in cleaned]


def test_a_plain_caption_stays():
    for caption in ("a red circle on the left", "an astronaut's horse, 3 trees: half-timbered", "été à la plage"):
        assert clean_caption(caption) == caption


def test_features_survive_a_file(tmp_path):
    file, draw = tmp_path / "captions.safetensors", torch.Generator().manual_seed(0)
    features = {"a dog": torch.randn(3, 4, generator=draw).bfloat16(), 'it says "x"': torch.ones(1, 4).bfloat16()}
    save_captions(file, features)
    found = load_captions(file)
    assert list(found) == list(features)
    assert all(torch.equal(found[caption], values) for caption, values in features.items())
    with pytest.raises(ValueError, match="no captions to save"):
        save_captions(file, {})


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "captions.safetensors"
    write_record(file, "calibration", {"features": torch.ones(2, 4)}, {})
    with pytest.raises(ValueError, match="expected a set of text features by caption"):
        load_captions(file)
    for captions, lengths in ((["a"], [1]), (["a", "b"], [2]), (["a", "b"], [0, 2])):
        write_record(file, _KIND, {"features": torch.ones(2, 4)}, {"captions": captions, "lengths": lengths})
        with pytest.raises(ValueError, match="is damaged, make it again"):
            load_captions(file)
