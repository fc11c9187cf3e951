"""An autoregressive image model as a `TokenSampler`; families differ only in their prompts and network.

The logits of every step are kept, the noise of a draw depends only on sample seed and position, and guidance and
everything after the last hidden state run in float32.

Shapes: B batch, N tokens (a row-major h x w grid), K codes, D code dim, R rows of the language model ([conditional ;
unconditional], 2 B, or B without guidance).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import LlamaModel

from ...protocols import DEFAULT_SAMPLING, OnProgress, Progress, SamplingOptions
from ...settings import require_number
from ...types import Codebook, TokenLogits
from ..checkpoints import fingerprint_of
from ..edits import check_edit, check_request, kept_calibrated
from ..fused_linear import fuse_weights
from ..int8 import store_in_int8
from .teacher_forcing import check_tokens, teacher_forced_logits
from .token_loop import Prompts, TokenLoop, TokenNetwork, cache_shape, groups_of, is_float32, window_for

CHECK_EVERY = 8
"""Positions between the checks for finite logits, each of which waits for the device."""
# Arrays of a position's logits that guidance, filters and the draw hold at the same time, per row.
_STEPS = 5
# Arrays [R, S, D] in float32 that exist while rotary tables are made.
_TABLES = 6


class AutoregressiveSampler(ABC):
    """A language model of image tokens as a `TokenSampler`.

    Attributes:
        model: used as it is, so it must be in evaluation mode. Its dtype is the transformer's; the head runs in
            float32.
        name: recorded in TokenLogits.model.
        grid, codebook, default_guidance: see `TokenSampler`.
        default_top_k: the top-k for options that leave it to the sampler; None for no top-k.

    Args:
        fingerprint: fingerprint of the original weights, if the model's have been changed (int8).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        grid: tuple[int, int],
        codebook: Codebook,
        default_guidance: float,
        fingerprint: str | None,
    ):
        self.model, self.name, self.grid, self.codebook = model, name, grid, codebook
        self.default_guidance = default_guidance
        self.default_top_k: int | None = None
        self._fingerprint = fingerprint

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the weights: what samples depend on besides the arguments of `sample`."""
        return self._fingerprint or fingerprint_of(self.model.state_dict())

    @abstractmethod
    def unknown_words(self, prompt: str) -> list[str]:
        """See `TokenSampler`."""

    @abstractmethod
    def known_words(self) -> list[str]:
        """See `TokenSampler`."""

    @property
    @abstractmethod
    def _language(self) -> LlamaModel:
        """The layers."""

    @property
    @abstractmethod
    def _head(self) -> nn.Module:
        """Hidden states -> logits, in the model's dtype."""

    @abstractmethod
    def _network(self) -> TokenNetwork:
        """The network, as the loop calls it."""

    @abstractmethod
    def _prompt_slots(self, prompts: Sequence[str]) -> int:
        """The most slots that one of the prompts may take."""

    @abstractmethod
    def _prompts(self, prompts: Sequence[str], *, guided: bool) -> Prompts:
        """The prompts for the loop: rows [conditional ; unconditional] if `guided`, or only the conditional ones."""

    def working_memory(self, prompts: Sequence[str], *, options: SamplingOptions = DEFAULT_SAMPLING) -> int:
        """See `TokenSampler`: logits, keys and values with their rotary tables, and the head in float32."""
        rows, count = len(prompts) * (1 + (options.guidance != 1)), self.grid[0] * self.grid[1]
        logits = 4 * self.codebook.size * (len(prompts) * count + _STEPS * rows)
        slots = 2 * self._prompt_slots(prompts) + count  # the prompts' own cache is copied, and then released
        shape = cache_shape(self._language, rows, slots)
        cache = math.prod(shape) * self._language.embed_tokens.weight.dtype.itemsize
        rotary = 4 * _TABLES * rows * slots * shape[-1]
        head = 0 if is_float32(self._head) else 4 * sum(weight.numel() for weight in self._head.parameters())
        return logits + cache + rotary + head

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

        l = (l_u + guidance (l_c - l_u)) / temperature, in float32, before top-k and top-p, which affect only the draw.
        The draw is argmax(l + g), where the Gumbel noise g [K] is a function of (sample seed, position): up to float
        rounding, a sample depends only on its own prompt and seed, whatever else is in the batch and whatever was
        resampled before (our choice; the released loops draw from the global generator). Prompts of different lengths
        are padded on the left; padding is neither attended to nor counted in positions. The global generator is not
        touched.

        Memory allocated for the call: the logits, 4 B N K bytes (38 MB per image of 576 x 16384); keys and values of R
        rows; for a model in half precision the head in float32, 4 bytes per weight (151 MB for Janus-Pro-1B, 336 MB for
        7B, 84 MB for LlamaGen-XL).

        Args:
            prompts: B texts.
            seeds: B numbers, one per sample.
            options: guidance 1 uses only the conditional rows and takes half the work; temperature 0 takes the most
                likely code, with undivided logits; top-k None means `default_top_k`.
            previous: an earlier result, or the calibrated proxies of an image, whose tokens and logits are kept where
                `resample` is False. The result's guidance and temperature are this call's.
            resample: bool [N] or [B, N], True where to sample again; needs `previous`, which is returned if nothing is
                True. The same prompts, seeds and settings reproduce the earlier run.
            on_progress: called after each pass, the first of which reads the prompt. An edit starts at its first
                resampled position and ends after its last; `done` is that of the slowest row.
            parallel: how many positions a pass draws; only those that one-by-one sampling would also give are accepted
                (`TokenLoop`). None takes `window_for`. In half precision, where rounding depends on the number of rows,
                a sample is then a different draw from the same distributions.
            weights_resident: if True, one step is recorded and replayed on a CUDA GPU.

        Returns:
            TokenLogits on the model's device, logits float32 [B, N, K], source "vlm".

        Raises:
            ValueError: for arguments that do not fit each other or the model, and for logits that are not finite.
        """
        check_request(prompts, seeds)
        require_number("parallel", parallel, whole=True, least=1, optional=True, remedy="1 draws one by one")
        network = self._network()
        device, dtype = network.language.device, network.language.dtype
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

        if options.top_k is None:
            options = replace(options, top_k=self.default_top_k)
        guided = options.guidance != 1
        window = window_for(batch * (1 + guided), device, dtype) if parallel is None else parallel
        loop = TokenLoop(
            network,
            tokens,
            logits,
            first=first,
            last=last,
            anew=anew,
            options=options,
            window=window,
            weights_resident=weights_resident,
        )
        loop.start(self._prompts(prompts, guided=guided), seeds=seeds)
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
        return self._told(logits, tokens, options, None if anew is None else kept_calibrated(previous, anew))

    @torch.no_grad()
    def teacher_forced(
        self, prompts: Sequence[str], tokens: torch.Tensor, *, options: SamplingOptions = DEFAULT_SAMPLING
    ) -> TokenLogits:
        """See `TeacherForced`: each position's logits given the prompt and the image's tokens before it.

        Up to float rounding they are the logits that `sample` keeps when it draws these tokens. One pass reads the
        prompts, another all tokens. Memory allocated for the call: the logits twice, 4 B N K bytes each (38 MB per
        image of 576 x 16384); keys and values of R rows; the head in float32, as in `sample`.

        Raises:
            ValueError: as `TeacherForced`, and for logits that are not finite.
        """
        check_tokens(prompts, tokens, count=self.grid[0] * self.grid[1], codes=self.codebook.size)
        network = self._network()
        given = tokens.to(network.language.device)
        read = self._prompts(prompts, guided=options.guidance != 1)
        return self._told(teacher_forced_logits(network, read, given, options), given, options)

    def _told(
        self,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        options: SamplingOptions,
        calibrated_at: torch.Tensor | None = None,
    ) -> TokenLogits:
        """Logits and tokens, with a record of how they were made."""
        return TokenLogits(
            logits,
            tokens,
            self.grid,
            source="vlm",
            guidance=float(options.guidance),
            temperature=float(options.temperature),
            model=self.name,
            codebook=self.codebook.fingerprint,
            calibrated_at=calibrated_at,
        )


def place_weights(
    model: nn.Module,
    language: LlamaModel,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    int8: bool,
    computes_on: torch.device | str | None,
) -> str | None:
    """Moves a model to the device, with its language model's layers in 8 bits or in the layout a CPU reads fastest.

    Args:
        dtype: dtype of the weights.
        int8, computes_on: as in `SamplerFamily.load_sampler`.

    Returns:
        The fingerprint of the original weights if they were changed, otherwise None.

    Raises:
        ValueError: for int8 without torchao.
    """
    fingerprint = None
    if int8:
        fingerprint = f"{fingerprint_of(model.state_dict())} in int8"
        store_in_int8(language.layers, device)
    model.to(device)
    if not int8 and torch.device(computes_on or device).type == "cpu" and dtype == torch.float32:
        _store_by_columns(model, language)
    return fingerprint


def _store_by_columns(model: nn.Module, language: LlamaModel) -> None:
    """Stores the weights of a model and its language model in the layout in which a CPU multiplies few rows fastest."""
    together = [group for layer in language.layers for group in groups_of(layer)]
    grouped = {layer for group in together for layer in group}
    others = (layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer not in grouped)
    for group in [*together, *((layer,) for layer in others)]:
        fuse_weights(group)
