"""Janus and Janus-Pro as samplers of image tokens (Chen et al. 2025, arXiv 2501.17811), on transformers' classes.

It computes DeepSeek's released image loop: its template, its unconditional row, guidance 5, temperature 1, no filter.
Ours are: every step's logits are kept, the noise of a draw depends only on sample seed and position, and guidance and
everything after the last hidden state run in float32.

Shapes: B batch, N tokens (a row-major h x w grid), K codes, D code dim, L prompt length, U different rows,
R rows of the language model ([conditional ; unconditional], 2 B, or B without guidance).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import JanusForConditionalGeneration, PreTrainedTokenizerBase

from ...files import in_file
from ...protocols import DEFAULT_SAMPLING, OnProgress, Progress, SamplingOptions
from ...settings import require_number
from ...types import Codebook, TokenLogits
from ..checkpoints import fingerprint_of
from ..edits import check_edit, check_request
from ..fused_linear import fuse_weights
from ..int8 import store_in_int8
from .files import SAMPLERS, JanusFolder
from .token_loop import TokenLoop, check_language, groups_of, window_for

CHECK_EVERY = 8
"""Positions between the checks for finite logits, each of which waits for the device."""

_IMAGE_START = "<begin_of_image>"
_DEEPSEEK_PAD = "<｜▁pad▁｜>"


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The ids [L] that Janus reads before an image's first token.

    BOS, DeepSeek's chat template without a system prompt ("<|User|>: {prompt}", a blank line, "<|Assistant|>:") around
    the prompt without its outer white space, and the begin-of-image token. BOS comes once, whether or not the tokenizer
    adds it by itself.

    Raises:
        ValueError: for a blank prompt, or a tokenizer without a BOS or begin-of-image token.
    """
    if not prompt.strip():
        raise ValueError("the prompt is blank: say what to draw (for an image without a prompt, use guidance 0)")
    if tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer names no BOS token: add bos_token to its tokenizer_config.json")
    ids = tokenizer(_templated(prompt), add_special_tokens=False)["input_ids"]
    if ids[-1] != _token_id(tokenizer, _IMAGE_START):
        raise ValueError(
            f"the tokenizer does not read {_IMAGE_START} as one token: take a Janus model's tokenizer, "
            "where it is among the special tokens"
        )
    return ids if ids[0] == tokenizer.bos_token_id else [tokenizer.bos_token_id, *ids]


def unconditional_ids(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The unconditional row for `ids` [L]: all but the first and the last become the pad token, which is attended.

    Training drops captions with the same function; otherwise the unconditional row would be a sequence never seen.

    Raises:
        ValueError: if the tokenizer has no pad token.
    """
    return [ids[0], *[_pad_id(tokenizer)] * (len(ids) - 2), ids[-1]]


class JanusSampler:
    """A `JanusForConditionalGeneration` and its tokenizer as a `TokenSampler`.

    Attributes:
        model: used as it is; bring it in evaluation mode. Its dtype is the transformer's, the head runs in float32.
        tokenizer: knows BOS, a pad token and "<begin_of_image>".
        name: goes into TokenLogits.model.
        grid: num_patches x num_patches of the VQ configuration.
        codebook: the VQ model's, in unit rows; a model in half precision gives it rounded to that.

    Args:
        fingerprint: of the original weights, if the model's have been changed (int8).

    Raises:
        ValueError: if the tokenizer has more words, or a higher id, than the model, two words with one id,
            or not all words of the template.
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
        if len(set(ids)) < len(ids):  # A special token that tokenizer.json lacks is given an id that it does not have.
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
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.grid = (side, side)
        self.codebook = Codebook(model.model.vqmodel.quantize.embedding.weight)
        self.default_guidance = 5.0  # DeepSeek's
        self._fingerprint = fingerprint

    @property
    def fingerprint(self) -> str:
        """Of the weights: what samples depend on besides the arguments of `sample`."""
        return self._fingerprint or fingerprint_of(self.model.state_dict())

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
        """A folder in the transformers layout or in DeepSeek's own, with safetensors or .bin files.

        Both need tokenizer.json; nothing is downloaded. What sampling does not use is neither read nor checked: the
        vision tower with its aligner, the text head, and the VQ model's networks (not its codebook).

        Args:
            int8: the layers' linear weights in 8 bits (torchao, one scale a row), a quarter of float32. Each is rounded
                as it reaches the device, which never holds more. `python -m benchmarks int8` measures what that does to
                the logits.
            computes_on: where it will compute, if a host moves it from `device` later. For a CPU and float32, weights
                that read the same input share one storage (`fused_linear`): the model is for sampling, not for saving.

        Raises:
            ValueError: for int8 without torchao, for a tokenizer that does not belong to the model, and as
                `JanusFolder` and its `words` and `sampler`.
        """
        found = JanusFolder(folder, SAMPLERS)
        tokenizer = found.words()
        model = found.sampler(dtype=dtype, device="cpu" if int8 else device)
        fingerprint = None
        if int8:
            fingerprint = f"{fingerprint_of(model.state_dict())} in int8"
            store_in_int8(model.model.language_model.layers, device)
        model.to(device)
        if not int8 and torch.device(computes_on or device).type == "cpu" and dtype == torch.float32:
            _store_by_columns(model)
        with in_file(folder):
            return cls(model, tokenizer, name=found.name, fingerprint=fingerprint)

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that the tokenizer lacks, each once, in order; byte-level tokenizers lack none."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None:
            return []
        encoded = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        spans = zip(encoded["input_ids"], encoded["offset_mapping"])
        return list(dict.fromkeys(prompt[start:end] for word, (start, end) in spans if word == unknown))

    def known_words(self) -> list[str]:
        """The tokenizer's words, sorted, without special tokens and punctuation; empty if it is byte-level."""
        if self.tokenizer.unk_token_id is None:
            return []
        words = set(self.tokenizer.get_vocab()) - set(self.tokenizer.all_special_tokens)
        return sorted(word for word in words if word.isalpha())

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        options: SamplingOptions = DEFAULT_SAMPLING,
        previous: TokenLogits | None = None,
        resample: torch.Tensor | None = None,
        on_progress: OnProgress | None = None,
        parallel: int | None = None,
        weights_resident: bool = False,
    ) -> TokenLogits:
        """Samples an image's tokens for each prompt, and keeps the logits l of Eqs. 4-5 that each was drawn from.

        l = (l_u + guidance (l_c - l_u)) / temperature, in float32, before top-k and top-p, which shape the draw alone.
        The draw is argmax(l + g), Gumbel noise g [K] a function of (sample seed, position): a sample depends on its own
        prompt and seed, up to float rounding, whatever else is in the batch and whatever was resampled before (our
        choice; DeepSeek draws from the global generator). Prompts of different lengths are padded on the left, and that
        padding is neither attended nor counted in positions. The global generator is not touched.

        Memory allocated for the call: the logits, 4 B N K bytes (38 MB an image of 576 x 16384); keys and values of R
        rows; for a model in half precision the head in float32, 4 bytes a weight (151 MB for Janus-Pro-1B, 336 MB for
        7B).

        Args:
            prompts: B texts, see `prompt_ids`.
            seeds: B numbers, one a sample.
            options: guidance 1 is the prompt alone and takes half the work; temperature 0 takes the most likely code,
                with logits undivided.
            previous: an earlier result, or the calibrated proxies of an image, whose tokens and logits stay where
                `resample` is False. The result's guidance and temperature are this call's.
            resample: bool [N] or [B, N], True where to sample again; goes with `previous`, and if nothing is True,
                `previous` is returned. With the same prompts, seeds and settings the earlier run comes again.
            on_progress: called after each pass, of which the first reads the prompt. An edit starts at its first
                resampled position and ends after its last; `done` is that of the slowest row.
            parallel: how many positions a pass draws, of which those stand that draws one by one would give
                (`TokenLoop`); None takes `window_for`. In half precision, where rounding depends on the number of rows,
                a sample is another draw of the same distributions.
            weights_resident: on a CUDA GPU, one step is then recorded and replayed.

        Returns:
            TokenLogits on the model's device, logits float32 [B, N, K], source "vlm".

        Raises:
            ValueError: for arguments that do not fit each other or the model, and for logits that are not finite.
        """
        check_request(prompts, seeds)
        require_number("parallel", parallel, whole=True, least=1, optional=True, remedy="1 draws one by one")
        language = self.model.model.language_model
        device = language.device
        batch, count, codes = len(prompts), self.grid[0] * self.grid[1], self.codebook.size
        logits = torch.empty(batch, count, codes, dtype=torch.float32, device=device)
        tokens = torch.zeros(batch, count, dtype=torch.int64, device=device)
        known = torch.zeros(batch, count, dtype=torch.bool)
        first, last, anew = 0, count - 1, None
        if previous is not None or resample is not None:
            anew = check_edit(self, previous, resample, batch)
            if not bool(anew.any()):
                return previous
            logits.copy_(previous.logits)
            tokens.copy_(previous.tokens)
            columns = anew.any(dim=0).nonzero()
            known = ~anew
            first, last, anew = int(columns[0]), int(columns[-1]), anew.to(device)

        guided = options.guidance != 1
        window = window_for(batch * (1 + guided), device, language.dtype) if parallel is None else parallel
        loop = TokenLoop(
            self.model,
            tokens,
            logits,
            first=first,
            last=last,
            grid=self.grid,
            anew=anew,
            options=options,
            window=window,
            weights_resident=weights_resident,
        )
        loop.start(*self._rows(prompts, guided=guided), seeds=seeds)
        checked = first
        while True:
            done = min(loop.reached)
            if loop.done or done - checked >= CHECK_EVERY:
                loop.check()
                checked = done
            if on_progress is not None:
                drawn = known | (torch.arange(count) < torch.tensor(loop.reached)[:, None])
                on_progress(Progress(done=done, total=count, tokens=tokens, known=drawn, passes=loop.passes))
            if loop.done:
                break
            loop.advance()
        return TokenLogits(
            logits,
            tokens,
            self.grid,
            source="vlm",
            guidance=float(options.guidance),
            temperature=float(options.temperature),
            model=self.name,
            codebook=self.codebook.fingerprint,
        )

    def _rows(self, prompts: Sequence[str], guided: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Prompts -> unique ids [U, L] padded on the left, the padding of each [U], and which one each row has [R]."""
        rows = [tuple(prompt_ids(self.tokenizer, prompt)) for prompt in prompts]
        room = self.model.model.language_model.config.max_position_embeddings - self.grid[0] * self.grid[1]
        if (longest := max(map(len, rows))) > room:
            raise ValueError(
                f"a prompt has {longest:,} tokens, but {self.name} has positions for {max(0, room):,} before an image: "
                "shorten it"
            )
        if guided:
            rows += [tuple(unconditional_ids(ids, self.tokenizer)) for ids in rows]
        unique = {ids: i for i, ids in enumerate(dict.fromkeys(rows))}
        padding = [max(map(len, unique)) - len(ids) for ids in unique]
        # The padding is never attended, so any id will do.
        padded = [(0,) * pad + ids for pad, ids in zip(padding, unique)]
        return torch.tensor(padded), torch.tensor(padding), torch.tensor([unique[ids] for ids in rows])


def _templated(prompt: str) -> str:
    return f"<|User|>: {prompt.strip()}\n\n<|Assistant|>:{_IMAGE_START}"


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str | None) -> int | None:
    """None for a token that the tokenizer lacks. Converted back, since a missing token gets the unknown word's id."""
    found = None if token is None else tokenizer.convert_tokens_to_ids(token)
    return found if found is not None and tokenizer.convert_ids_to_tokens(found) == token else None


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """DeepSeek's own pad token first: its loop uses that one, whatever the tokenizer's configuration names."""
    for token in (_DEEPSEEK_PAD, tokenizer.pad_token):
        found = _token_id(tokenizer, token)
        if found is not None:
            return found
    raise ValueError(
        f"the tokenizer has no pad token, which the unconditional row is made of: name one as pad_token in its "
        f"tokenizer_config.json (DeepSeek's is {_DEEPSEEK_PAD})"
    )


def _store_by_columns(model: JanusForConditionalGeneration) -> None:
    """Stores the weights in the layout in which a CPU multiplies few rows fastest."""
    together = [group for layer in model.model.language_model.layers for group in groups_of(layer)]
    grouped = {layer for group in together for layer in group}
    others = (layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer not in grouped)
    for group in [*together, *((layer,) for layer in others)]:
        fuse_weights(group)
