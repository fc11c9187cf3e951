"""LlamaGen as a sampler of image tokens from text (Sun et al. 2024, arXiv 2406.06525).

It follows the released loop: cleaned captions, T5's features, a learned unconditional row under the caption's own mask,
guidance 7.5 and top-k 1000 unless options or the folder's config.json say otherwise. Differences from the released loop
are described in `autoregressive.sampler`.

Shapes: S width of the text features, L caption slots, n tokens of a caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaModel

from ...protocols import SamplingOptions
from ...types import Codebook
from ..autoregressive.sampler import AutoregressiveSampler, place_weights
from ..autoregressive.token_loop import Prompts, TokenNetwork, in_float32
from ..t5 import IN_INT8, T5Text
from .captions import Captions, clean_caption, require_caption, save_captions
from .files import CAPTIONS, TEXT, LlamaGenFolder
from .network import LlamaGenTransformer

SAMPLING = SamplingOptions(guidance=7.5, top_k=1000)
"""The settings of the released sampling script."""


class LlamaGenSampler(AutoregressiveSampler):
    """A `LlamaGenTransformer` with its text side as a `TokenSampler`.

    The text encoder is not part of `model`: hosts that move the model leave the encoder where it is kept, and it moves
    to the model's device only while it reads new prompts (`T5Text`; with `text.stays` it never moves).

    Attributes, besides those of `AutoregressiveSampler`:
        text: the text encoder with its tokenizer; None without.
        known: text features [n, S] by cleaned caption, which need no encoder.

    Args:
        known: features from the text encoder `text`, or if that is None, from the encoder that they name.
        sampling: guidance and top-k for options that leave them to the sampler.

    Raises:
        ValueError: if there is neither a text encoder nor any known caption.
    """

    model: LlamaGenTransformer

    def __init__(
        self,
        model: LlamaGenTransformer,
        text: T5Text | None,
        codebook: Codebook,
        *,
        name: str = "",
        known: Captions | None = None,
        sampling: SamplingOptions = SAMPLING,
        fingerprint: str | None = None,
    ):
        if text is None and known is None:
            raise ValueError(f"there is no text encoder and no caption whose features are known: give one ({TEXT})")
        super().__init__(
            model,
            name=name,
            grid=model.config.grid,
            codebook=codebook,
            default_guidance=sampling.guidance,
            fingerprint=fingerprint,
        )
        self.default_top_k = sampling.top_k
        self.text, self.known = text, dict(known.features if known else {})
        self._encoder = text.fingerprint if text else known.encoder

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
        """Loads the sampler in a folder (see `files`); nothing is downloaded.

        Args:
            device: device of the transformer; the text encoder is kept on the CPU.
            int8, computes_on: as in `JanusSampler.load`; int8 also applies to the text encoder's linear weights.

        Raises:
            ValueError: for int8 without torchao, for saved features from a text encoder other than the folder's, and as
                `LlamaGenFolder`.
        """
        found = LlamaGenFolder(folder)
        codebook, known, text = found.codebook(), found.load_captions(), found.load_text(dtype=dtype)
        if text and known and known.encoder.removesuffix(IN_INT8) != text.fingerprint:
            raise ValueError(
                f"{found.path / CAPTIONS} has features of another text encoder than the one in that folder: remove "
                "one of the two, or make the file again with `dcdd captions`"
            )
        if text and int8:
            text.store_in_int8()
        model = found.load_network(device="cpu" if int8 else device, dtype=dtype)
        fingerprint = place_weights(
            model, model.language, device=device, dtype=dtype, int8=int8, computes_on=computes_on
        )
        sampling = SAMPLING if found.guidance is None else SamplingOptions(guidance=found.guidance)
        return cls(model, text, codebook, name=found.name, known=known, sampling=sampling, fingerprint=fingerprint)

    @property
    def fingerprint(self) -> str:
        """See `AutoregressiveSampler`; it includes the text encoder's, even if only its saved features are there."""
        return f"{super().fingerprint}-{self._encoder}"

    def unknown_words(self, prompt: str) -> list[str]:
        """Parts of the cleaned prompt that the text encoder's tokenizer does not know, each once, in order."""
        return [] if self.text is None else self.text.words.unknown(clean_caption(prompt))

    def known_words(self) -> list[str]:
        """An empty list: it reads any text, in pieces of words."""
        return []

    def text_memory(self, prompts: Sequence[str]) -> int:
        """See `pipelines.sample.ReadsText`."""
        return 0 if self.text is None else self.text.memory(self._unknown(prompts))

    def read(self, prompts: Sequence[str], *, moved: bool = True) -> None:
        """See `pipelines.sample.ReadsText`.

        Raises:
            ValueError: as `features`.
        """
        self._features(prompts, moved=moved)

    def features(self, prompt: str) -> torch.Tensor:
        """The text features [n, S] of a prompt, which is cleaned first: known ones, or the text encoder's.

        Raises:
            ValueError: for a prompt of which cleaning leaves nothing, one of more than L tokens, and an unknown one if
                there is no text encoder.
        """
        return self._features([prompt], moved=True)[prompt]

    def save_captions(self, file: str | Path, prompts: Sequence[str]) -> None:
        """Writes the known text features and those of prompts to a file.

        As captions.safetensors in a model's folder it is loaded with the model, which then needs no text encoder for
        these captions.

        Raises:
            ValueError: as `features`, and if there are no captions at all.
            OSError: if the file cannot be written.
        """
        new = {clean_caption(prompt): values for prompt, values in self._features(prompts, moved=True).items()}
        save_captions(file, Captions(features=self.known | new, encoder=self._encoder))

    def _features(self, prompts: Sequence[str], *, moved: bool) -> dict[str, torch.Tensor]:
        """The text features by prompt, each once."""
        unknown = self._unknown(prompts)
        if unknown and self.text is None:
            raise ValueError(
                f"{self.name or 'this model'} has no text encoder, and its {len(self.known)} known captions do not "
                f"hold {unknown[0][:40]!r}: put google/{TEXT} into its folder {TEXT}, or add the caption to {CAPTIONS} "
                "with `dcdd captions`"
            )
        found = dict(self.known)
        if unknown:
            found |= self.text.features(unknown, self._device if moved else self.text.encoder.device)
        return {prompt: found[clean_caption(prompt)] for prompt in dict.fromkeys(prompts)}

    @property
    def _device(self) -> torch.device:
        """The network's device."""
        return self.model.language.device

    def _unknown(self, prompts: Sequence[str]) -> list[str]:
        """The captions of those prompts whose features are not known."""
        captions = {prompt: require_caption(prompt) for prompt in prompts}
        return [caption for caption in dict.fromkeys(captions.values()) if caption not in self.known]

    @property
    def _language(self) -> LlamaModel:
        return self.model.language

    @property
    def _head(self) -> nn.Module:
        return self.model.head

    def _prompt_slots(self, prompts: Sequence[str]) -> int:
        return len(self.model.null)

    def _network(self) -> TokenNetwork:
        language = self.model.language
        return TokenNetwork(
            language=language,
            embed=language.embed_tokens,
            head=in_float32(self._head, language.device),
            embedders=(),
            counts_prompt=False,
        )

    def _prompts(self, prompts: Sequence[str], *, guided: bool) -> Prompts:
        features: dict[str | int, torch.Tensor] = {**self._features(prompts, moved=True)}
        lengths = {prompt: len(values) for prompt, values in features.items()}
        rows: list[str | int] = list(prompts)
        if guided:  # The unconditional row is as long as the caption, and takes the last slots of the null features.
            rows += [lengths[prompt] for prompt in prompts]
            features |= {length: self.model.null[-length:] for length in lengths.values()}
        most = max(lengths.values())
        padding = [most - len(values) for values in features.values()]
        # Padding is never attended to.
        padded = torch.stack(
            [F.pad(self.model.captions(values), (0, 0, pad, 0)) for values, pad in zip(features.values(), padding)]
        )
        numbers = {row: i for i, row in enumerate(features)}
        return Prompts(padded, torch.tensor(padding), torch.tensor([numbers[row] for row in rows]))
