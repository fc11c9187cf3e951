"""Prompts of a masked sampler: a template around the text, and the unconditional row.

Shapes: L prompt length, U distinct rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..text_tokenizer import known_words, load_text_tokenizer, require_prompt, unknown_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # takes seconds to import


class Words:
    """A text tokenizer with the template that the network was trained with.

    Attributes:
        tokenizer: has BOS and a pad token.
        template: holds "{prompt}" once, such as "{prompt}".

    Raises:
        ValueError: for a template that does not hold it once, and a tokenizer that lacks one of the two tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str):
        if not isinstance(template, str) or template.count("{prompt}") != 1:
            raise ValueError(f'template must hold "{{prompt}}" once, got {template!r}: fetch config.json again')
        for name in ("bos_token", "pad_token"):
            if getattr(tokenizer, name) is None:
                raise ValueError(f"the tokenizer names no {name}: add one to its tokenizer_config.json")
        self.tokenizer, self.template = tokenizer, template

    @property
    def size(self) -> int:
        """Rows that a table of the words needs: one more than the largest id, since ids may have gaps."""
        return 1 + max(self.tokenizer.get_vocab().values())

    @classmethod
    def load(cls, folder: Path, template: str) -> Words:
        """Loads the tokenizer from the tokenizer.json and tokenizer_config.json of a folder.

        Raises:
            ValueError: naming a file that is missing or damaged.
        """
        return cls(load_text_tokenizer(folder, "fetch the tokenizer's files again"), template)

    def ids(self, prompt: str) -> list[int]:
        """The ids [L] of a prompt: BOS, then the template around the stripped text.

        Raises:
            ValueError: for a blank prompt.
        """
        text = self.template.replace("{prompt}", require_prompt(prompt))
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        return ids if ids[:1] == [bos] else [bos, *ids]

    def unconditional(self, ids: Sequence[int]) -> list[int]:
        """The unconditional row, as long as `ids` [L]: all but the first become pad tokens, which are attended to.

        If the template continues after the prompt, the last id is kept as well.
        """
        last = [] if self.template.endswith("{prompt}") else [ids[-1]]
        return [ids[0], *[self.tokenizer.pad_token_id] * (len(ids) - 1 - len(last)), *last]

    def unknown(self, prompt: str) -> list[str]:
        """See `text_tokenizer.unknown_words`."""
        return unknown_words(self.tokenizer, prompt)

    def known(self) -> list[str]:
        """See `text_tokenizer.known_words`."""
        return known_words(self.tokenizer)


def padded(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as one tensor [U, L], padded on the left with 0, and the number of padding slots of each, [U]."""
    length = max(map(len, rows))
    padding = [length - len(ids) for ids in rows]
    ids = [[0] * pad + list(ids) for pad, ids in zip(padding, rows)]
    return torch.tensor(ids, device=device), torch.tensor(padding, device=device)
