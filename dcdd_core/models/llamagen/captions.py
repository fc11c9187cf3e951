"""Captions cleaned as LlamaGen was trained with them, and a file of their text features.

Its authors clean every caption twice (language/t5.py, after PixArt and DeepFloyd IF), so it never saw a prompt that is
not cleaned. The rules are theirs, except for ftfy's repair of wrongly decoded text: of ftfy's steps, only those for
ligatures, wide letters, control characters and composed letters (NFC) are done here.

Shapes: n tokens of a caption, S width of the text features.
"""

from __future__ import annotations

import html
import re
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_plus

import torch

from ...files import in_file, is_finite, read_record, write_record
from ...settings import require_text
from ..t5 import T5Text

SAVE_EVERY = 120.0
"""Seconds between two writes of the captions encoded so far."""

_KIND = "set of text features by caption"
_ENDINGS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"

# Replacements (pattern, by), in order, before and after doubly escaped HTML is unescaped.
_FIRST = (
    (r"@\w+\b", ""),  # nicknames
    (r"[\u31c0-\u4dbf\u4dc0-\u9fff]+", ""),  # CJK strokes and ideographs
    (r"-+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?|&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b|#\d{5,}\b|\b\d{6,}\b", ""),  # article numbers
    (rf"\S+\.(?:{_ENDINGS})", ""),  # file names
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_SECOND = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_ENDINGS})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes, also with a Cyrillic x
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]|['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)
_CONTROL = r"[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffb]"  # ftfy's, including byte order marks
_SITE = r"[a-z0-9.-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_ADDRESSES = tuple((rf"\b(?:{scheme}:(?:/{{1,3}}|[a-z0-9%])|{_SITE})", "") for scheme in ("https?", "www"))


def clean_caption(caption: str) -> str:
    """A caption cleaned as in the network's training; empty if nothing is left."""
    return _cleaned(_cleaned(caption))


def require_caption(prompt: str) -> str:
    """`clean_caption` of a prompt.

    Raises:
        ValueError: if nothing is left of it.
    """
    if not (caption := clean_caption(prompt)):
        raise ValueError(
            f"the prompt {prompt.strip()[:40]!r} is blank once it is cleaned as LlamaGen's captions are: say what to "
            "draw, or give any words and guidance 0"
        )
    return caption


def _cleaned(caption: str) -> str:
    caption = unquote_plus(caption).strip().lower().replace("<person>", "person")
    caption = _text_of(_replaced(caption, _ADDRESSES))
    caption = "".join("-" if unicodedata.category(c) == "Pd" else c for c in caption)
    caption = _replaced(caption, _FIRST)
    if len(re.findall("[-_]", caption)) > 3:  # a name of words joined by hyphens or underscores
        caption = re.sub("[-_]", " ", caption)
    caption = unicodedata.normalize("NFC", re.sub(_CONTROL, "", "".join(_plain(c) for c in caption)))
    caption = html.unescape(html.unescape(caption)).strip()
    return _replaced(caption, _SECOND).strip()


def _replaced(caption: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, by in rules:
        caption = re.sub(pattern, by, caption)
    return caption


def _plain(character: str) -> str:
    """The plain letters of a ligature or a wide letter; any other character unchanged."""
    kind = unicodedata.decomposition(character).partition(" ")[0]
    wide = kind in ("<wide>", "<narrow>") or "\ufb00" <= character <= "\ufb06"
    return unicodedata.normalize("NFKC", character) if wide else character


def _text_of(markup: str) -> str:
    """The text of HTML, without its tags."""
    parts: list[str] = []
    reader = HTMLParser(convert_charrefs=True)
    # Scripts and styles are not text.
    reader.handle_data = lambda data: None if reader.cdata_elem else parts.append(data)
    reader.feed(markup)
    reader.close()
    return "".join(parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Captions:
    """Text features of captions.

    Attributes:
        features: [n, S] by cleaned caption, on the CPU, all of one dtype.
        encoder: the text encoder's fingerprint (`T5Text.fingerprint`).

    Raises:
        ValueError: if there are no captions, features are not [n, S], or their dtypes or widths differ.
    """

    features: Mapping[str, torch.Tensor]
    encoder: str

    def __post_init__(self):
        require_text("encoder", self.encoder)
        if not self.features:
            raise ValueError("there are no captions to save: give at least one")
        for caption, values in self.features.items():
            if values.ndim != 2 or not len(values) or (values.dtype, values.shape[1]) != (self.dtype, self.width):
                raise ValueError(
                    f"the features of {caption[:40]!r} are {list(values.shape)} in {values.dtype}, expected [n, "
                    f"{self.width}] in {self.dtype} as those of the other captions: encode all by one text encoder"
                )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all features."""
        return next(iter(self.features.values())).dtype

    @property
    def width(self) -> int:
        """S, the width of all features."""
        return next(iter(self.features.values())).shape[-1]


def save_captions(file: str | Path, captions: Captions) -> None:
    """Writes text features, so that these captions need no text encoder; the file is written whole or not at all.

    Raises:
        OSError: if the file cannot be written.
    """
    values = [part.detach().cpu() for part in captions.features.values()]
    fields = {
        "captions": list(captions.features),
        "lengths": [len(part) for part in values],
        "encoder": captions.encoder,
    }
    write_record(file, _KIND, {"features": torch.cat(values)}, fields)


def load_captions(file: str | Path) -> Captions:
    """Reads what `save_captions` wrote.

    Raises:
        ValueError: for a file that is damaged or holds something else, and for features that are not finite.
    """
    tensors, fields = read_record(file, _KIND, {"features"}, {"captions", "lengths", "encoder"})
    features, captions, lengths = tensors["features"], fields["captions"], fields["lengths"]
    if (
        not isinstance(captions, list)
        or not isinstance(lengths, list)
        or not all(isinstance(caption, str) for caption in captions)
        or not all(isinstance(length, int) and length > 0 for length in lengths)
        or not features.is_floating_point()
        or features.ndim != 2
        or not len(set(captions)) == len(captions) == len(lengths) > 0
        or sum(lengths) != len(features)
    ):
        raise ValueError(
            f"{file} holds {list(features.shape)} features of captions whose list does not fit them: it is damaged, "
            "make it again with `dcdd captions`"
        )
    if not is_finite(features):
        raise ValueError(f"{file} has features that are not finite: make it again with `dcdd captions`")
    with in_file(file):
        return Captions(features=dict(zip(captions, features.split(lengths))), encoder=fields["encoder"])


def add_captions(
    file: str | Path,
    prompts: Sequence[str],
    text: T5Text,
    *,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[int, int]:
    """Adds features of prompts to a file, keeping those it already has; the file is created if it does not exist.

    The file is written whole every `SAVE_EVERY` seconds and at the end, also after an error or Ctrl-C.

    Args:
        device: device to encode on.
        on_progress: called with (captions of these prompts done so far, captions of these prompts).

    Returns:
        The number of new captions, and the number that the file holds now.

    Raises:
        ValueError: for prompts as `require_caption` and `T5Words.ids`, for a file of another kind, and for one with
            features of another text encoder or dtype; in these cases nothing has been encoded.
        OSError: if the file cannot be written.
    """
    captions = list(dict.fromkeys(map(require_caption, prompts)))
    held = _held(file, text)
    missing = [caption for caption in captions if caption not in held]
    for caption in missing:
        text.words.ids(caption)
    found, written, last = dict(held), len(held), time.monotonic()

    def write() -> None:
        nonlocal written, last
        if len(found) > written:
            save_captions(file, Captions(features=found, encoder=text.fingerprint))
            written, last = len(found), time.monotonic()

    def tell() -> None:
        if on_progress is not None:
            on_progress(len(captions) - len(missing) + len(found) - len(held), len(captions))

    tell()
    try:
        with text.on(device):
            for caption in missing:
                found |= text.features([caption], device)
                tell()
                if time.monotonic() - last > SAVE_EVERY:
                    write()
    finally:
        write()
    return len(missing), len(found)


def _held(file: str | Path, text: T5Text) -> dict[str, torch.Tensor]:
    """The features that a file already has, if they are of this text encoder and its dtype."""
    if not Path(file).exists():
        return {}
    held, dtype = load_captions(file), text.encoder.dtype
    if held.encoder != text.fingerprint:
        raise ValueError(
            f"{file} has features of another text encoder ({held.encoder}, this is {text.fingerprint}): give another "
            "name, or delete it"
        )
    if held.dtype != dtype:
        raise ValueError(
            f"{file} has features in {_name(held.dtype)}, and this text encoder is in {_name(dtype)}: load it in "
            f"{_name(held.dtype)}, give another name, or delete the file"
        )
    return dict(held.features)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
