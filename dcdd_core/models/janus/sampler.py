"""Janus and Janus-Pro as samplers of image tokens (Chen et al. 2025, arXiv 2501.17811), on transformers' classes.

It follows DeepSeek's released image loop: its template, its unconditional row, guidance 5, temperature 1, no filter.
Differences from the released loop are described in `autoregressive.sampler`.

Shapes: L prompt length.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import JanusForConditionalGeneration, LlamaModel, PreTrainedTokenizerBase

from ...files import in_file
from ...types import Codebook
from ..autoregressive.sampler import AutoregressiveSampler, place_weights
from ..autoregressive.token_loop import Prompts, TokenNetwork, check_language, in_float32
from ..text_tokenizer import known_words, require_prompt, unknown_words
from .files import SAMPLERS, JanusFolder

_IMAGE_START = "<begin_of_image>"
_DEEPSEEK_PAD = "<｜▁pad▁｜>"


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The ids [L] that Janus reads before an image's first token.

    These are BOS, DeepSeek's chat template without a system prompt ("<|User|>: {prompt}", a blank line,
    "<|Assistant|>:") around the stripped prompt, and the begin-of-image token. BOS appears once, whether or not the
    tokenizer adds it by itself.

    Raises:
        ValueError: for a blank prompt, or a tokenizer without a BOS or begin-of-image token.
    """
    text = _templated(require_prompt(prompt))
    if tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer names no BOS token: add bos_token to its tokenizer_config.json")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if ids[-1] != _token_id(tokenizer, _IMAGE_START):
        raise ValueError(
            f"the tokenizer does not read {_IMAGE_START} as one token: take a Janus model's tokenizer, "
            "where it is among the special tokens"
        )
    return ids if ids[0] == tokenizer.bos_token_id else [tokenizer.bos_token_id, *ids]


def unconditional_ids(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The unconditional row for `ids` [L]: all but the first and the last become pad tokens, which are attended to.

    Training drops captions with the same function; otherwise the model would never have seen an unconditional row.

    Raises:
        ValueError: if the tokenizer has no pad token.
    """
    return [ids[0], *[_pad_id(tokenizer)] * (len(ids) - 2), ids[-1]]


class JanusSampler(AutoregressiveSampler):
    """A `JanusForConditionalGeneration` and its tokenizer as a `TokenSampler`.

    Attributes, besides those of `AutoregressiveSampler`:
        tokenizer: knows BOS, a pad token and "<begin_of_image>".
        grid: num_patches x num_patches of the VQ configuration.
        codebook: the VQ model's, in unit rows; rounded accordingly if the model is in half precision.

    Args:
        fingerprint: fingerprint of the original weights, if the model's have been changed (int8).

    Raises:
        ValueError: if the tokenizer has more words or higher ids than the model, two words with the same id, or lacks
            words of the template; for a language model that `token_loop.check_language` refuses.
    """

    def __init__(
        self,
        model: JanusForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "",
        fingerprint: str | None = None,
    ):
        words = model.config.text_config.vocab_size
        if len(tokenizer) > words:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} words and the model {words}: they do not belong together, "
                "take both from one folder"
            )
        ids = tokenizer.get_vocab().values()
        if len(set(ids)) < len(ids):  # A special token that is missing in tokenizer.json gets an id not meant for it.
            raise ValueError("the tokenizer has two words with one id: fetch the tokenizer's files again")
        if (last := max(ids)) >= words:
            raise ValueError(
                f"the tokenizer has a word with id {last:,} and the model only {words:,} words: they do not belong "
                "together, take both from one folder"
            )
        template = tokenizer(_templated(""), add_special_tokens=False)["input_ids"]
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in template:
            raise ValueError(
                f"the tokenizer does not know every word around a prompt ({_templated('...')!r}): take a Janus model's "
                "tokenizer"
            )
        check_language(model.model.language_model)
        side = model.config.vq_config.num_patches
        super().__init__(
            model,
            name=name,
            grid=(side, side),
            codebook=Codebook(model.model.vqmodel.quantize.embedding.weight),
            default_guidance=5.0,  # DeepSeek's
            fingerprint=fingerprint,
        )
        self.tokenizer = tokenizer

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        int8: bool = False,
        computes_on: torch.device | str | None = None,
    ) -> JanusSampler:
        """Loads a folder in transformers' layout or in DeepSeek's own, with safetensors or .bin files.

        Both need tokenizer.json; nothing is downloaded. Parts that sampling does not use are neither read nor checked:
        the vision tower with its aligner, the text head, and the VQ model's networks (but not its codebook).

        Args:
            int8: hold the layers' linear weights in 8 bits (torchao, one scale per row), a quarter of float32. Each is
                rounded as it reaches the device, which never holds more. `python -m benchmarks int8` measures the
                effect on the logits.
            computes_on: where it will compute, if a host moves it from `device` later. For a CPU and float32, weights
                that read the same input share one storage (`fused_linear`): the model is for sampling, not for saving.

        Raises:
            ValueError: for int8 without torchao, for a tokenizer that does not belong to the model, and as
                `JanusFolder` and its `words` and `sampler`.
        """
        found = JanusFolder(folder, SAMPLERS)
        tokenizer = found.words()
        model = found.sampler(dtype=dtype, device="cpu" if int8 else device, int8=int8)
        fingerprint = place_weights(
            model, model.model.language_model, device=device, dtype=dtype, int8=int8, computes_on=computes_on
        )
        with in_file(folder):
            return cls(model, tokenizer, name=found.name, fingerprint=fingerprint)

    def unknown_words(self, prompt: str) -> list[str]:
        """See `text_tokenizer.unknown_words`."""
        return unknown_words(self.tokenizer, prompt)

    def known_words(self) -> list[str]:
        """See `text_tokenizer.known_words`."""
        return known_words(self.tokenizer)

    @property
    def _language(self) -> LlamaModel:
        return self.model.model.language_model

    @property
    def _head(self) -> nn.Module:
        return self.model.model.generation_head

    def _prompt_slots(self, prompts: Sequence[str]) -> int:
        return max(len(prompt_ids(self.tokenizer, prompt)) for prompt in prompts)

    def _network(self) -> TokenNetwork:
        model = self.model.model
        return TokenNetwork(
            language=model.language_model,
            embed=self.model.prepare_embeddings_for_image_generation,
            head=in_float32(self._head, model.language_model.device),
            embedders=(model.generation_embeddings, model.generation_aligner),
        )

    def _prompts(self, prompts: Sequence[str], *, guided: bool) -> Prompts:
        language = self._language
        rows = [tuple(prompt_ids(self.tokenizer, prompt)) for prompt in prompts]
        room = language.config.max_position_embeddings - self.grid[0] * self.grid[1]
        if (longest := max(map(len, rows))) > room:
            raise ValueError(
                f"a prompt has {longest:,} tokens, but {self.name} has positions for {max(0, room):,} before an image: "
                "shorten it"
            )
        if guided:
            rows += [tuple(unconditional_ids(ids, self.tokenizer)) for ids in rows]
        unique = {ids: i for i, ids in enumerate(dict.fromkeys(rows))}
        padding = [max(map(len, unique)) - len(ids) for ids in unique]
        # Padding is never attended to, so any id will do.
        padded = torch.tensor([(0,) * pad + ids for pad, ids in zip(padding, unique)], device=language.device)
        embeddings = language.get_input_embeddings()(padded)
        return Prompts(embeddings, torch.tensor(padding), torch.tensor([unique[ids] for ids in rows]))


def _templated(prompt: str) -> str:
    return f"<|User|>: {prompt}\n\n<|Assistant|>:{_IMAGE_START}"


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str | None) -> int | None:
    """The token's id; None if the tokenizer lacks it, which shows when the id is converted back."""
    found = None if token is None else tokenizer.convert_tokens_to_ids(token)
    return found if found is not None and tokenizer.convert_ids_to_tokens(found) == token else None


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The pad token's id: DeepSeek's own first, which its loop uses whatever the tokenizer's configuration names."""
    for token in (_DEEPSEEK_PAD, tokenizer.pad_token):
        found = _token_id(tokenizer, token)
        if found is not None:
            return found
    raise ValueError(
        f"the tokenizer has no pad token, which the unconditional row is made of: name one as pad_token in its "
        f"tokenizer_config.json (DeepSeek's is {_DEEPSEEK_PAD})"
    )
