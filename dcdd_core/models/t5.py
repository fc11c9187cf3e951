"""T5 as the text side of image models: prompts as ids, the encoder from a T5 model's folder, and text features.

Shapes: L text slots, n tokens of a text, S width of the text features.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel

from ..files import reading
from .checkpoints import (
    check_count,
    check_size,
    fingerprint_of,
    load_strictly,
    quantised,
    read_config,
    read_headers,
    read_wanted,
    whole_number,
)
from .int8 import store_in_int8
from .text_tokenizer import load_text_tokenizer, require_prompt, unknown_words

TEXT_SLOTS = 120
"""L for BIGFix and LlamaGen, which read no more tokens of a prompt."""
KEPT = 1024
"""Number of texts whose features are kept: 0.5 GB for flan-t5-xl in bfloat16, if all of them have L tokens."""
IN_INT8 = " in int8"
"""Suffix of the fingerprint of an encoder whose weights were rounded."""

_AGAIN = "fetch the folder of google/flan-t5-xl again"
_PARTS = ("shared.", "encoder.")
_TIED = "encoder.embed_tokens.weight"
# Entries of config.json, each with the tensor and axis whose length it states.
_SIZES = (
    ("vocab_size", "shared.weight", 0),
    ("d_model", "shared.weight", 1),
    ("d_ff", "encoder.block.0.layer.1.DenseReluDense.wo.weight", 1),
    ("num_heads", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 1),
    (
        "relative_attention_num_buckets",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        0,
    ),
)


class T5Words:
    """T5's tokenizer, which ends every prompt with an end token and pads it on the right.

    Attributes:
        tokenizer: has a pad token.

    Raises:
        ValueError: for a tokenizer without a pad token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.pad_token is None:
            raise ValueError(f"the tokenizer names no pad_token: {_AGAIN}")
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path) -> T5Words:
        """Loads it from the tokenizer.json and tokenizer_config.json of a folder.

        Raises:
            ValueError: naming a file that is missing or damaged.
        """
        return cls(load_text_tokenizer(folder, _AGAIN))

    def ids(self, prompt: str) -> list[int]:
        """The ids of a prompt, at most L with the end token, without padding.

        Raises:
            ValueError: for a blank prompt, and for one of more than L tokens, whose end would not be read.
        """
        prompt = require_prompt(prompt)
        encoded = self.tokenizer(prompt, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        if len(ids) > TEXT_SLOTS:
            unread = prompt[encoded["offset_mapping"][TEXT_SLOTS - 1][0] :]
            raise ValueError(
                f"the prompt has {len(ids)} tokens with the end token, and {TEXT_SLOTS} are read: shorten it by what "
                f"begins with {unread[:40]!r}"
            )
        return ids

    def padded(self, rows: list[list[int]], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Rows from `ids` as one tensor [B, L], padded on the right, and bool [B, L], False for padding."""
        ids = torch.full((len(rows), TEXT_SLOTS), self.tokenizer.pad_token_id)
        real = torch.zeros(len(rows), TEXT_SLOTS, dtype=torch.bool)
        for row, found in enumerate(rows):
            ids[row, : len(found)] = torch.tensor(found)
            real[row, : len(found)] = True
        return ids.to(device), real.to(device)

    def unknown(self, prompt: str) -> list[str]:
        """See `text_tokenizer.unknown_words`; for example letters of other scripts."""
        return unknown_words(self.tokenizer, prompt)

    def known(self) -> list[str]:
        """An empty list: it reads any text, in pieces of words."""
        return []


class T5Text:
    """Text features from T5, whose encoder is on the sampler's device only while it encodes.

    flan-t5-xl's encoder is larger than LlamaGen's transformer, and is needed only for new prompts: features of the last
    `KEPT` texts are cached. Encoding on another device changes features only by rounding, caching not at all.

    Attributes:
        words: the tokenizer.
        encoder: the encoder, on the device where it is kept; `features` moves it from there and back.
        fingerprint: fingerprint of the encoder's weights as they are stored, so that it does not depend on the dtype;
            ends with `IN_INT8` if they were rounded.
        stays: True to encode where the encoder is kept, which is slow on a CPU but takes no memory on the device.
    """

    def __init__(self, words: T5Words, encoder: T5EncoderModel, *, fingerprint: str, stays: bool = False):
        self.words, self.encoder, self.fingerprint, self.stays = words, encoder, fingerprint, stays
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()

    def store_in_int8(self) -> None:
        """Rounds the linear weights of the encoder's blocks to 8 bits, on the device where it is kept.

        Raises:
            ValueError: without torchao.
        """
        store_in_int8(self.encoder.encoder.block, self.encoder.device)
        self.fingerprint += IN_INT8

    def memory(self, texts: Sequence[str]) -> int:
        """Bytes that encoding these texts takes on another device: the encoder's weights; 0 if nothing moves."""
        if self.stays or all(text in self._kept for text in texts):
            return 0
        return sum(weight.numel() * weight.element_size() for weight in self.encoder.parameters())

    @torch.no_grad()
    def features(self, texts: Sequence[str], device: torch.device | str) -> dict[str, torch.Tensor]:
        """The features [n, S] of each text, on the CPU, in the encoder's dtype.

        Args:
            device: where to encode texts that are not cached, unless the encoder `stays`.

        Raises:
            ValueError: as `T5Words.ids`, before anything is moved.
        """
        found = {text: self._kept.get(text) for text in texts}
        ids = {text: self.words.ids(text) for text, known in found.items() if known is None}
        if ids:
            with self.on(self.encoder.device if self.stays else device):
                for text, row in ids.items():
                    states = self.encoder(input_ids=torch.tensor([row], device=self.encoder.device))
                    found[text] = states.last_hidden_state[0].cpu()
        for text, values in found.items():
            self._kept[text] = values
            self._kept.move_to_end(text)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return found

    @contextmanager
    def on(self, device: torch.device | str) -> Iterator[None]:
        """Keeps the encoder on a device within the context, however often `features` is called.

        Afterwards, also after an error, the encoder is moved back.
        """
        rests = self.encoder.device
        if torch.device(device) == rests:
            yield
            return
        try:
            self.encoder.to(device)
            yield
        finally:
            self.encoder.to(rests)


def load_text(folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> T5Text:
    """Loads the tokenizer and the encoder in the folder of a T5 model.

    Args:
        device: device where the encoder is kept.

    Raises:
        ValueError: as `T5Words.load` and `load_text_encoder`, and if the tokenizer has more words than the encoder.
    """
    words = T5Words.load(folder)
    encoder, fingerprint = load_text_encoder(folder, device=device, dtype=dtype)
    if len(words.tokenizer) > encoder.config.vocab_size:
        raise ValueError(
            f"{folder} has a tokenizer of {len(words.tokenizer)} words and an encoder of {encoder.config.vocab_size}: "
            f"they do not belong together; {_AGAIN}"
        )
    return T5Text(words, encoder, fingerprint=fingerprint)


def check_width(folder: Path, trained: int, name: str, remedy: str) -> None:
    """Checks that the T5 model in a folder is as wide as the one that an image model was trained with.

    Args:
        name: the image model's.

    Raises:
        ValueError: if it is not.
    """
    width = whole_number(read_config(folder), "d_model", str(folder), remedy=remedy)
    if width != trained:
        raise ValueError(
            f"{folder} has a text encoder of width {width}, and {name} was trained with {trained}: {remedy}"
        )


def load_text_encoder(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[T5EncoderModel, str]:
    """Loads the encoder from the folder of a T5 model, and computes the fingerprint of its weights as they are stored.

    The folder may hold the whole model or only the encoder; nothing of the decoder is read. In float16 the last layer
    of each feed-forward stays in float32, since its values exceed float16's range.

    Raises:
        ValueError: for entries of config.json that are wrong or do not fit the weights, quantised weights, tensors that
            are missing, unexpected or of a wrong shape, and files that cannot be read.
    """
    config = read_config(folder)
    if config.get("model_type") != "t5":
        raise ValueError(f"{folder} holds a model of type {config.get('model_type')!r}, expected 't5': {_AGAIN}")
    file = folder / "config.json"
    headers = read_headers(folder, lambda name: name.startswith(_PARTS))
    check_count(
        file,
        "num_layers",
        whole_number(config, "num_layers", str(folder), remedy=_AGAIN),
        headers,
        "encoder.block.",
    )
    usual = {"relative_attention_num_buckets": 32}
    for entry, name, axis in _SIZES:
        declared = whole_number(config, entry, str(folder), usual=usual.get(entry), remedy=_AGAIN)
        check_size(file, entry, declared, headers, name, axis)
    width = whole_number(config, "d_kv", str(folder), remedy=_AGAIN) * config["num_heads"]
    check_size(file, "d_kv * num_heads", width, headers, "encoder.block.0.layer.0.SelfAttention.q.weight", 0)
    if how := quantised({name: header.dtype for name, header in headers.items()}, headers):
        raise ValueError(f"{folder} is quantised {how}, which is not read: take the original model")
    with reading(file, "the configuration of a T5 model", _AGAIN), torch.device("meta"):
        model = T5EncoderModel(T5Config.from_dict(config))
    found = read_wanted(folder, lambda name: name.startswith(_PARTS))
    found.pop(_TIED, None)
    fingerprint = fingerprint_of(found)
    tensors = {
        name: value.to(device, torch.float32 if dtype == torch.float16 and name.endswith(".wo.weight") else dtype)
        for name, value in found.items()
    }
    load_strictly(model, tensors, str(folder), unused=[_TIED])
    model.set_input_embeddings(model.shared)
    return model.eval().requires_grad_(False), fingerprint
