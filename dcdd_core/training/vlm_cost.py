"""The cost of a VLM's own conditions of images (`vlm_conditions`): memory and FLOPs of its teacher-forced pass.

Shapes: N tokens, K codes, C width, L slots of a prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

PROMPT = 64
"""L that is counted with: a template and a caption of some 50 words [choice]."""
CACHE_BATCH = 16
"""Images that `train.py cache` takes at a time by default."""


@dataclass(frozen=True, kw_only=True)
class VLMShape(ABC):
    """The sizes of a VLM's language model, which is a Llama.

    Attributes:
        width, inner: C, and the inner width of the feed-forward layers.
        layers, heads, key_heads: the number of layers, of heads per attention layer, and of its key and value heads.
        codes: K.
        prompt: L.
    """

    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    codes: int = 16384
    prompt: int = PROMPT

    @property
    def weights(self) -> int:
        """The number of weights that are read; biases and norms are not counted."""
        return self._of_layers + self._of_head + self._of_aligner + self._of_prompt + self._embedded

    def flops(self, tokens: int) -> int:
        """FLOPs for one image of N = `tokens` tokens with its caption.

        Two rows of the prompt and of all tokens but the last, attention to all filled slots, and the head.
        """
        read, slots = tokens - 1, self.prompt + tokens - 1
        attended = self.prompt * self.prompt + read * slots
        row = 2 * self._of_layers * slots + 4 * self.layers * self.width * attended
        pass_of_tokens = row + 2 * self._of_aligner * read + 2 * self._of_head * tokens
        return 2 * pass_of_tokens + 2 * self.prompt * (self._rows_of_prompt * self._of_prompt + self._of_text)

    def working_memory(self, images: int, tokens: int) -> int:
        """An estimate of the bytes besides the weights in bfloat16, for this many images at a time.

        Keys and values of two rows per image, what the widest layer holds of them and, in float32, the logits twice
        and the head.
        """
        rows, slots = 2 * images, self.prompt + tokens - 1
        cache = 2 * 2 * self.layers * self._keys * rows * slots
        layer = 2 * rows * slots * (4 * self.width + 3 * self.inner)
        return cache + layer + 2 * 4 * images * tokens * self.codes + 4 * self._of_head

    @property
    def _keys(self) -> int:
        return self.width * self.key_heads // self.heads

    @property
    def _of_layers(self) -> int:
        """Weights of the matrices of all layers."""
        return self.layers * (2 * self.width * (self.width + self._keys) + 3 * self.width * self.inner)

    @property
    @abstractmethod
    def _of_head(self) -> int:
        """Weights that turn a state into logits."""

    @property
    @abstractmethod
    def _of_aligner(self) -> int:
        """Weights that an image token's embedding passes through."""

    @property
    @abstractmethod
    def _of_prompt(self) -> int:
        """Weights that a slot of the prompt passes through before the layers."""

    @property
    @abstractmethod
    def _rows_of_prompt(self) -> int:
        """Rows per image that pass through those."""

    @property
    @abstractmethod
    def _of_text(self) -> int:
        """Weights of a separate text encoder that each slot passes through, once per image."""

    @property
    @abstractmethod
    def _embedded(self) -> int:
        """Weights of embedding tables."""


@dataclass(frozen=True, kw_only=True)
class JanusShape(VLMShape):
    """Janus, with the embedding and the head of its image tokens.

    Attributes:
        words, code_dim: size of the text vocabulary, and D, a code's dimension.
    """

    words: int = 102400
    code_dim: int = 8

    @property
    def _of_head(self) -> int:
        return self.width * (self.width + self.codes)

    @property
    def _of_aligner(self) -> int:
        return self.width * (self.code_dim + self.width)

    _of_prompt = _rows_of_prompt = _of_text = 0

    @property
    def _embedded(self) -> int:
        return self.words * self.width + self.codes * self.code_dim


@dataclass(frozen=True, kw_only=True)
class LlamaGenShape(VLMShape):
    """LlamaGen, which reads a text encoder's features of the caption.

    Attributes:
        text_width, slots: width of the features, and their largest number.
        text: weights of the text encoder's layers. It stays on the CPU between prompts and is not among `weights`.
    """

    text_width: int
    text: int
    slots: int = 120

    @property
    def _of_head(self) -> int:
        return self.width * self.codes

    _of_aligner = 0

    @property
    def _of_prompt(self) -> int:
        return self.width * (self.text_width + self.width)

    _rows_of_prompt = 2

    @property
    def _of_text(self) -> int:
        return self.text

    @property
    def _embedded(self) -> int:
        return self.codes * self.width + self.slots * self.text_width


#: flan-t5-xl's 24 encoder layers: attention of 32 heads of 64, and a gated feed-forward of 5120.
_FLAN_T5_XL = 24 * (4 * 2048 * 2048 + 3 * 2048 * 5120)
#: Published models, by the names of `train.py estimate --vlm-model`.
PUBLISHED: Mapping[str, VLMShape] = {
    "Janus-Pro-1B": JanusShape(width=2048, inner=5632, layers=24, heads=16, key_heads=16),
    "Janus-Pro-7B": JanusShape(width=4096, inner=11008, layers=30, heads=32, key_heads=32),
    "LlamaGen-XL": LlamaGenShape(
        width=1280, inner=3584, layers=36, heads=20, key_heads=20, text_width=2048, text=_FLAN_T5_XL
    ),
}
