"""Text tokenizers: loading and saving their files, and the checks that samplers make on a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import read_json, reading, utf8_path, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast  # takes seconds to import

_EXPECTED = "a text tokenizer"


def load_text_tokenizer(folder: Path, remedy: str) -> PreTrainedTokenizerFast:
    """Loads a tokenizer from the tokenizer.json and tokenizer_config.json of a folder.

    Args:
        remedy: what to do about it; ends the error messages.

    Raises:
        ValueError: naming a file that is missing or damaged.
    """
    from transformers import PreTrainedTokenizerFast

    for name in ("tokenizer.json", "tokenizer_config.json"):
        read_json(folder / name, _EXPECTED, remedy)
    with reading(folder / "tokenizer.json", _EXPECTED, remedy), utf8_path(folder) as readable:
        return PreTrainedTokenizerFast.from_pretrained(readable, local_files_only=True)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer so that transformers 4 reads it as well as 5.

    transformers 5 writes the list of extra special tokens under a name where 4 expects a dictionary, and names a class
    that 4 does not have.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("backend", None)
    write_text(path, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def require_prompt(prompt: str) -> str:
    """The prompt without leading and trailing white space.

    Raises:
        ValueError: for a blank prompt.
    """
    if not (text := prompt.strip()):
        raise ValueError("the prompt is blank: say what to draw, or give any words and guidance 0")
    return text


def unknown_words(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[str]:
    """Parts of the prompt that the tokenizer does not know, each once, in order; byte-level tokenizers know all."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return []
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    spans = zip(encoded["input_ids"], encoded["offset_mapping"])
    return list(dict.fromkeys(prompt[start:end].strip() for word, (start, end) in spans if word == unknown))


def known_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokenizer's words, sorted, without special tokens or punctuation; empty if it is byte-level."""
    if tokenizer.unk_token_id is None:
        return []
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    return sorted(word for word in words if word.isalpha())
