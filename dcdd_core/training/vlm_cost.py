"""What a VLM's own conditions of images take (`vlm_conditions`): memory and FLOPs of its teacher-forced pass.

Shapes: N tokens, K codes, C width, L slots of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PROMPT = 64
"""L that is counted with: a template and a caption of some 50 words [choice]."""
CACHE_BATCH = 16
"""Images that `train.py cache` takes at a time by default."""


@dataclass(frozen=True, kw_only=True)
class VLMShape:
    """The sizes of a Janus' language model, with the embedding and the head of its image tokens.

    Attributes:
        width, inner: C, and the inner width of the feed-forward layers.
        layers, heads, key_heads: their number, and the heads of an attention layer and of its keys and values.
        words, codes, code_dim: of text, K and D.
    """

    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    words: int = 102400
    codes: int = 16384
    code_dim: int = 8

    @property
    def _of_layers(self) -> int:
        """Weights of the matrices of all layers."""
        keys = self.width * self.key_heads // self.heads
        return self.layers * (2 * self.width * (self.width + keys) + 3 * self.width * self.inner)

    @property
    def _of_head(self) -> int:
        return self.width * (self.width + self.codes)

    @property
    def _of_aligner(self) -> int:
        return self.width * (self.code_dim + self.width)

    @property
    def weights(self) -> int:
        """All that are read; biases and norms are not counted."""
        embedded = self.words * self.width + self.codes * self.code_dim
        return self._of_layers + self._of_head + self._of_aligner + embedded

    def flops(self, tokens: int, prompt: int = PROMPT) -> int:
        """Of one image with its caption: two rows of the prompt and of all tokens but the last, attention to all slots
        that are filled, and the head."""
        read, slots = tokens - 1, prompt + tokens - 1
        attended = prompt * prompt + read * slots
        row = 2 * self._of_layers * slots + 4 * self.layers * self.width * attended
        return 2 * (row + 2 * self._of_aligner * read + 2 * self._of_head * tokens)

    def working_memory(self, images: int, tokens: int, prompt: int = PROMPT) -> int:
        """Bytes besides the weights in bfloat16, for so many images at a time: an estimate.

        Keys and values of two rows, what the widest layer holds of them, the logits twice and the head in float32.
        """
        rows, slots = 2 * images, prompt + tokens - 1
        keys = self.width * self.key_heads // self.heads
        cache = 2 * 2 * self.layers * keys * rows * slots
        layer = 2 * rows * slots * (4 * self.width + 3 * self.inner)
        return cache + layer + 2 * 4 * images * tokens * self.codes + 4 * self._of_head


#: Janus-Pro's, by the names of `train.py estimate --vlm-model`.
PUBLISHED: Mapping[str, VLMShape] = {
    "Janus-Pro-1B": VLMShape(width=2048, inner=5632, layers=24, heads=16, key_heads=16),
    "Janus-Pro-7B": VLMShape(width=4096, inner=11008, layers=30, heads=32, key_heads=32),
}
