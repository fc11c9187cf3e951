"""Prompts of a masked sampler: a template around the text, and the row without a prompt.

Shapes: L prompt length, U different rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ...files import read_json, reading, utf8_path

_EXPECTED = "a text tokenizer"
_AGAIN = "fetch the tokenizer's files again"


class Words:
    """A text tokenizer with the template that the network was trained with.

    Attributes:
        tokenizer: has BOS and a pad token.
        template: holds "{prompt}" once, such as "{prompt}".

    Raises:
        ValueError: for a template without, and a tokenizer that lacks one of the two tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str):
        if not isinstance(template, str) or template.count("{prompt}") != 1:
            raise ValueError(f'template must hold "{{prompt}}" once, got {template!r}: fetch config.json again')
        for name in ("bos_token", "pad_token"):
            if getattr(tokenizer, name) is None:
                raise ValueError(f"the tokenizer names no {name}: add one to its tokenizer_config.json")
        self.tokenizer, self.template = tokenizer, template

    @classmethod
    def load(cls, folder: Path, template: str) -> Words:
        """From the tokenizer.json and tokenizer_config.json of a folder.

        Raises:
            ValueError: naming a file that is missing or damaged.
        """
        for name in ("tokenizer.json", "tokenizer_config.json"):
            read_json(folder / name, _EXPECTED, _AGAIN)
        with reading(folder / "tokenizer.json", _EXPECTED, _AGAIN), utf8_path(folder) as readable:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(readable, local_files_only=True)
        return cls(tokenizer, template)

    def ids(self, prompt: str) -> list[int]:
        """The ids [L] of a prompt: BOS, then the template around the text without its outer white space.

        Raises:
            ValueError: for a blank prompt.
        """
        if not prompt.strip():
            raise ValueError("the prompt is blank: say what to draw (for an image without a prompt, use guidance 0)")
        text = self.template.replace("{prompt}", prompt.strip())
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        return ids if ids[:1] == [bos] else [bos, *ids]

    def unconditional(self, ids: Sequence[int]) -> list[int]:
        """The row without a prompt, as long as `ids` [L]: all but the first become the pad token, which is attended;
        where the template goes on after the prompt, all but the first and the last."""
        last = [] if self.template.endswith("{prompt}") else [ids[-1]]
        return [ids[0], *[self.tokenizer.pad_token_id] * (len(ids) - 1 - len(last)), *last]

    def unknown(self, prompt: str) -> list[str]:
        """Words that the tokenizer lacks, each once, in order; byte-level tokenizers lack none."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None:
            return []
        encoded = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        spans = zip(encoded["input_ids"], encoded["offset_mapping"])
        return list(dict.fromkeys(prompt[start:end] for word, (start, end) in spans if word == unknown))

    def known(self) -> list[str]:
        """The tokenizer's words, sorted, without special tokens and punctuation; empty if it is byte-level."""
        if self.tokenizer.unk_token_id is None:
            return []
        words = set(self.tokenizer.get_vocab()) - set(self.tokenizer.all_special_tokens)
        return sorted(word for word in words if word.isalpha())


def padded(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as one tensor [U, L] padded on the left with 0, and the padding of each, [U]."""
    length = max(map(len, rows))
    padding = [length - len(ids) for ids in rows]
    ids = [[0] * pad + list(ids) for pad, ids in zip(padding, rows)]
    return torch.tensor(ids, device=device), torch.tensor(padding, device=device)
