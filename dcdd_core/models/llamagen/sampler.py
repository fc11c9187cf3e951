"""LlamaGen as a sampler of image tokens from text (Sun et al. 2024, arXiv 2406.06525).

It computes the released loop: cleaned captions, T5's features, a learned row of no caption under the caption's own
mask, guidance 7.5. Plain `SamplingOptions` say all filters themselves, so the released top-k of 1000 is used where they
ask for it (`SAMPLING`). What is not the released loop's is in `autoregressive.sampler`.

Shapes: S width of the text features, L caption slots, n tokens of a caption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from ...protocols import SamplingOptions
from ...types import Codebook
from ..autoregressive.sampler import AutoregressiveSampler, place_weights
from ..autoregressive.token_loop import Prompts, TokenNetwork, in_float32
from ..t5 import T5Words
from .captions import clean_caption, save_captions
from .files import CAPTIONS, TEXT, LlamaGenFolder
from .network import LlamaGenTransformer

SAMPLING = SamplingOptions(guidance=7.5, top_k=1000)
"""As the released script samples."""


class LlamaGenSampler(AutoregressiveSampler):
    """A `LlamaGenTransformer` with its text side as a `TokenSampler`.

    Attributes, besides those of `AutoregressiveSampler`:
        words: the text encoder's tokenizer; None without an encoder.
        known: text features [n, S] by cleaned caption, which need no encoder.

    Raises:
        ValueError: for a model without an encoder of text and without known captions.
    """

    model: LlamaGenTransformer

    def __init__(
        self,
        model: LlamaGenTransformer,
        words: T5Words | None,
        codebook: Codebook,
        *,
        name: str = "",
        known: Mapping[str, torch.Tensor] | None = None,
        fingerprint: str | None = None,
    ):
        if words is None and not known:
            raise ValueError(f"there is no text encoder and no caption whose features are known: give one ({TEXT})")
        super().__init__(
            model,
            name=name,
            grid=model.config.grid,
            codebook=codebook,
            default_guidance=SAMPLING.guidance,
            fingerprint=fingerprint,
        )
        self.words, self.known = words, dict(known or {})

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        int8: bool = False,
        computes_on: torch.device | str | None = None,
    ) -> LlamaGenSampler:
        """The sampler in a folder (see `files`); nothing is downloaded.

        Args:
            int8, computes_on: as `JanusSampler.load`; int8 is for the text encoder's linear weights too.

        Raises:
            ValueError: for int8 without torchao, and as `LlamaGenFolder`.
        """
        found, at = LlamaGenFolder(folder), "cpu" if int8 else device
        codebook, known = found.codebook(), found.load_captions()
        words, encoder = found.load_text(device=at, dtype=dtype)
        model = found.load_network(device=at, dtype=dtype)
        model.text_encoder = encoder
        also = [] if encoder is None else [encoder.encoder.block]
        fingerprint = place_weights(
            model, model.language, device=device, dtype=dtype, int8=int8, computes_on=computes_on, also=also
        )
        return cls(model, words, codebook, name=found.name, known=known, fingerprint=fingerprint)

    def unknown_words(self, prompt: str) -> list[str]:
        """Parts of the cleaned prompt that the text encoder's tokenizer lacks, each once, in order."""
        return [] if self.words is None else self.words.unknown(clean_caption(prompt))

    def known_words(self) -> list[str]:
        """None by name: it reads any text, in pieces of words."""
        return []

    @torch.no_grad()
    def features(self, prompt: str) -> torch.Tensor:
        """The text features [n, S] of a prompt, which is cleaned first: those known, or the text encoder's.

        Raises:
            ValueError: for a prompt of which cleaning leaves nothing, one of more than L tokens, and one that is not
                known where there is no encoder.
        """
        caption = clean_caption(prompt)
        if not caption:
            raise ValueError(
                f"the prompt {prompt.strip()[:40]!r} is blank once it is cleaned as LlamaGen's captions are: say what "
                "to draw (for an image without a prompt, use guidance 0)"
            )
        if caption in self.known:
            return self.known[caption]
        if self.words is None:
            raise ValueError(
                f"{self.name or 'this model'} has no text encoder, and its {len(self.known)} known captions do not "
                f"hold {caption[:40]!r}: put google/{TEXT} into its folder {TEXT}, or add the caption to {CAPTIONS}"
            )
        encoder = self.model.text_encoder
        ids = torch.tensor([self.words.ids(caption)], device=self.model.language.device)
        return encoder(input_ids=ids).last_hidden_state[0]

    def save_captions(self, file: str | Path, prompts: Sequence[str]) -> None:
        """Writes the text features of prompts, after those known; as captions.safetensors in the folder of a model they
        are read with it, which then needs no text encoder for them.

        Raises:
            ValueError: as `features`, and without any.
            OSError: if the file cannot be written.
        """
        save_captions(file, self.known | {clean_caption(prompt): self.features(prompt) for prompt in prompts})

    def _network(self) -> TokenNetwork:
        language = self.model.language
        return TokenNetwork(
            language=language,
            embed=language.embed_tokens,
            head=in_float32(self.model.head),
            embedders=(),
            counts_prompt=False,
        )

    def _prompts(self, prompts: Sequence[str], *, guided: bool) -> Prompts:
        features = {prompt: self.features(prompt) for prompt in dict.fromkeys(prompts)}
        lengths = {prompt: len(values) for prompt, values in features.items()}
        rows: list[str | int] = list(prompts)
        if guided:  # The row of no caption is as long as that of the caption, and sees the last of its slots.
            rows += [lengths[prompt] for prompt in prompts]
            features |= {length: self.model.null[-length:] for length in lengths.values()}
        most = max(lengths.values())
        padding = [most - len(values) for values in features.values()]
        # What is padding is never attended.
        padded = torch.stack(
            [F.pad(self.model.captions(values), (0, 0, pad, 0)) for values, pad in zip(features.values(), padding)]
        )
        numbers = {row: i for i, row in enumerate(features)}
        return Prompts(padded, torch.tensor(padding), torch.tensor([numbers[row] for row in rows]))
