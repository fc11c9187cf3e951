"""Files of a text tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..files import write_text


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer so that transformers 4 reads it as well as 5.

    transformers 5 writes the list of further special tokens under a name that 4 expects a dictionary at, and names a
    class that 4 has not.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("backend", None)
    write_text(path, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
