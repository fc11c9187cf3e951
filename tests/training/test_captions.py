"""What counts as a caption, and where it is found."""

from __future__ import annotations

import pytest

from dcdd_core.pipelines.images import UnreadableImage
from dcdd_core.training.captions import COLUMNS, FIELDS, MOST_BYTES, Captions, MissingCaption, caption_of, read_caption


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        ("a red circle", "a red circle"),
        (b"\xef\xbb\xbfa red\r\n  circle\n", "a red circle"),
        ("  ein grüner\tKreis ".encode(), "ein grüner Kreis"),
        ("x" * MOST_BYTES, "x" * MOST_BYTES),
        ("ü" * (MOST_BYTES // 2), "ü" * (MOST_BYTES // 2)),
        (("ü" * (MOST_BYTES // 2)).encode(), "ü" * (MOST_BYTES // 2)),
    ],
)
def test_a_caption_is_one_line(value, caption):
    assert caption_of(value) == caption


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "it has no caption"),
        (" \n", "its caption is blank"),
        (b"\xff\xfe", "its caption is no text in UTF-8"),
        (["a", "b"], "its caption is no text but"),
        (5, "its caption is no text but 5"),
        ("x" * (MOST_BYTES + 1), "its caption has more than 65,536 bytes"),
        ("ü" * (MOST_BYTES // 2 + 1), "its caption has more than 65,536 bytes"),
        # As `read_caption` gives it: cut within a character.
        (("€" * MOST_BYTES).encode()[: MOST_BYTES + 1], "its caption has more than 65,536 bytes"),
        (UnreadableImage("it is too large"), "its caption cannot be used: it is too large"),
    ],
)
def test_what_is_no_caption_leaves_the_image_out(value, words):
    with pytest.raises(MissingCaption, match=words):
        caption_of(value)


def test_the_caption_of_an_image_is_beside_it(tmp_path):
    assert read_caption(tmp_path / "a.b.jpg") is None
    (tmp_path / "a.b.txt").write_bytes(b"a red circle")
    assert read_caption(tmp_path / "a.b.jpg") == b"a red circle"
    (tmp_path / "long.txt").write_bytes(b"x" * (2 * MOST_BYTES))
    assert len(read_caption(tmp_path / "long.png")) == MOST_BYTES + 1
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(MissingCaption, match="its caption cannot be read"):
        read_caption(tmp_path / "folder.png")


def test_the_first_known_column_is_taken_unless_another_is_named():
    assert Captions().choose(["image", "text", "caption"], COLUMNS, "a") == "caption"
    assert Captions().choose(["jpg", "text", "caption", "txt"], FIELDS, "a") == "txt"
    assert Captions(column="said").choose(["said", "caption"], COLUMNS, "a") == "said"
