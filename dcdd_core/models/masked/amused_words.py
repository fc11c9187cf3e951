"""aMUSEd's prompts: CLIP's ids, padded to one length; the unconditional row is the empty text.

Shapes: L the length that CLIP reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import CLIPTokenizerFast

from ...files import read_json, reading, utf8_path
from ...settings import shown
from ..text_tokenizer import require_prompt

_EXPECTED = "a CLIP tokenizer"
_AGAIN = "fetch the tokenizer's files again"


class AmusedWords:
    """Has the same methods as `Words`.

    Args:
        length: L, including the ids for beginning and end.

    Attributes:
        tokenizer: CLIP's.
    """

    def __init__(self, tokenizer: CLIPTokenizerFast, length: int):
        self.tokenizer, self.length = tokenizer, length
        self._empty = self._padded("")

    @classmethod
    def load(cls, folder: Path, length: int) -> AmusedWords:
        """Loads it from tokenizer_config.json and either vocab.json and merges.txt, or tokenizer.json.

        Raises:
            ValueError: naming a file that is missing, damaged or of another tokenizer.
        """
        said = read_json(folder / "tokenizer_config.json", _EXPECTED, _AGAIN).get("tokenizer_class")
        if said not in ("CLIPTokenizer", "CLIPTokenizerFast"):
            raise ValueError(
                f"{folder / 'tokenizer_config.json'}: tokenizer_class is {said!r}, expected 'CLIPTokenizer': {_AGAIN}"
            )
        if not (folder / "tokenizer.json").exists():
            read_json(folder / "vocab.json", _EXPECTED, _AGAIN)
            if not (folder / "merges.txt").exists():
                raise ValueError(f"{folder} has no merges.txt, and no tokenizer.json in its place: {_AGAIN}")
        with reading(folder, _EXPECTED, _AGAIN), utf8_path(folder) as readable:
            return cls(CLIPTokenizerFast.from_pretrained(readable, local_files_only=True), length)

    def ids(self, prompt: str) -> list[int]:
        """The ids [L] of a prompt.

        Raises:
            ValueError: for a prompt that is blank or longer than L.
        """
        ids = self._padded(require_prompt(prompt))
        if len(ids) > self.length:
            raise ValueError(
                f"the prompt {shown(prompt, 40)} has {len(ids)} text tokens with beginning and end, and the text "
                f"encoder reads {self.length}: shorten it"
            )
        return ids

    def unconditional(self, ids: Sequence[int]) -> list[int]:
        """The unconditional row [L]."""
        return self._empty

    def unknown(self, prompt: str) -> list[str]:
        """An empty list: CLIP reads any text, letter by letter if it has to."""
        return []

    def known(self) -> list[str]:
        """An empty list: CLIP has no list of words."""
        return []

    def _padded(self, text: str) -> list[int]:
        return self.tokenizer(text, padding="max_length", max_length=self.length, truncation=False)["input_ids"]
