"""Captions of training images: where each kind of source keeps them, and what counts as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import regular_file
from ..pipelines.images import UnreadableImage
from ..settings import shown

#: Beside an image "a.jpg", its caption is "a.txt".
SUFFIX = ".txt"
#: Columns of datasets, and fields of webdataset samples, that hold captions: the first that is there.
COLUMNS, FIELDS = ("caption", "text"), ("txt", "caption", "text")
#: Bytes; a text that is longer is no caption.
MOST_BYTES = 2**16


@dataclass(frozen=True, kw_only=True)
class Captions:
    """That the images of a source come with captions.

    Attributes:
        column: of a dataset, or the field of webdataset samples; None for the first of `COLUMNS` or `FIELDS`.
        required: images without a caption are left out; otherwise they are read without one.
    """

    column: str | None = None
    required: bool = True

    def choose(self, names: Sequence[str], known: Sequence[str], where: str) -> str:
        """The column or field of the captions among those that a source has.

        Raises:
            ValueError: if there is none.
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
    """An image without a caption is skipped where captions are required; there may be any number of them."""


def caption_file(image: Path) -> Path:
    """Where the caption of an image in a folder is."""
    return image.with_suffix(SUFFIX)


def read_caption(image: Path) -> bytes | None:
    """The content of an image's caption file, at most a little more than `MOST_BYTES`; None if there is none.

    Raises:
        MissingCaption: for one that cannot be read.
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
    """A caption as a source stores it, as one line of text.

    Raises:
        MissingCaption: for none, a blank one, one that is too long, and one that is no text in UTF-8.
    """
    if value is None:
        raise MissingCaption("it has no caption")
    if isinstance(value, UnreadableImage):  # found while the file around it was read
        raise MissingCaption(f"its caption cannot be used: {value}")
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise MissingCaption("its caption is no text in UTF-8") from error
    if not isinstance(value, str):
        raise MissingCaption(f"its caption is no text but {shown(value, 40)}")
    if len(value) > MOST_BYTES:
        raise MissingCaption(f"its caption has more than {MOST_BYTES:,} characters")
    text = " ".join(value.split())
    if not text:
        raise MissingCaption("its caption is blank")
    return text
