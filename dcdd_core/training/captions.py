"""Captions of training images: where each kind of source keeps them, and what counts as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import regular_file
from ..pipelines.images import UnreadableImage
from ..settings import shown

#: The caption of an image "a.jpg" is in "a.txt" beside it.
SUFFIX = ".txt"
#: Columns of datasets, and fields of webdataset samples, that hold captions: the first one present is used.
COLUMNS, FIELDS = ("caption", "text"), ("txt", "caption", "text")
#: The most bytes of a caption in UTF-8; a longer text is not one. Of a caption file, as many and one more are read.
MOST_BYTES = 2**16


@dataclass(frozen=True, kw_only=True)
class Captions:
    """How the captions of a source's images are read.

    Attributes:
        column: of a dataset, or the field of webdataset samples; None for the first of `COLUMNS` or `FIELDS` present.
        required: whether images without a caption are left out; otherwise they are read without one.
    """

    column: str | None = None
    required: bool = True

    def choose(self, names: Sequence[str], known: Sequence[str], where: str) -> str:
        """The captions' column or field, among the `names` that a source has.

        Args:
            known: the candidates if no column is given, best first.
            where: names the source in messages.

        Raises:
            ValueError: if the column, or every candidate, is missing.
        """
        if self.column is not None:
            if self.column not in names:
                raise ValueError(f"{where} has no column {self.column!r} of captions; it has {', '.join(names)}")
            return self.column
        if (found := next((name for name in known if name in names), None)) is None:
            raise ValueError(
                f"{where} has no captions, which this training needs: it has {', '.join(names)}, and captions are "
                f"expected in {' or '.join(map(repr, known))}; name another with --caption-column"
            )
        return found


class MissingCaption(UnreadableImage):
    """An image has no usable caption. Where captions are required it is skipped, however many such images there are."""


def caption_file(image: Path) -> Path:
    """The file with the caption of an image in a folder."""
    return image.with_suffix(SUFFIX)


def read_caption(image: Path) -> bytes | None:
    """The content of an image's caption file, at most `MOST_BYTES` + 1 bytes; None if there is no file.

    Raises:
        MissingCaption: if the file cannot be read.
    """
    path = caption_file(image)
    if not path.exists():
        return None
    try:
        with regular_file(path, "the caption of an image").open("rb") as file:
            return file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise MissingCaption(f"its caption cannot be read ({error})") from error


def caption_of(value: Any) -> str:
    """One line of text from a caption as its source stores it.

    Raises:
        MissingCaption: if it is absent, blank, too long, or not text in UTF-8.
    """
    if value is None:
        raise MissingCaption("it has no caption")
    if isinstance(value, UnreadableImage):  # found while the file around it was read
        raise MissingCaption(f"its caption cannot be used: {value}")
    if not isinstance(value, bytes | str):
        raise MissingCaption(f"its caption is no text but {shown(value, 40)}")
    stored = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    if len(stored) > MOST_BYTES:
        raise MissingCaption(f"its caption has more than {MOST_BYTES:,} bytes")
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise MissingCaption("its caption is no text in UTF-8") from error
    text = " ".join(value.split())
    if not text:
        raise MissingCaption("its caption is blank")
    return text
