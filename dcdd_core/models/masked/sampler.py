"""A masked transformer as a `TokenSampler`: each pass draws all hidden positions and keeps some of them.

Shapes: B batch, N tokens (a row-major h x w grid), K codes, C width, L prompt length, U distinct rows, R rows of the
network ([conditional ; unconditional], 2 B, or B without guidance), P positions of one image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ...method import sampling
from ...method.progressive import (
    ORDERS,
    OrderState,
    ProgressiveOptions,
    Stage,
    Staged,
    find_order,
    order_noise,
    order_scores,
    redrawn,
    reveal,
)
from ...protocols import DEFAULT_SAMPLING, FILTERS, OnProgress, Progress, SamplingOptions
from ...types import Codebook, TokenLogits
from ..checkpoints import fingerprint_of
from ..edits import check_edit, check_request, kept_calibrated
from ..int8 import store_in_int8
from .network import MaskedTransformer, Prefix
from .words import Words, padded

# Arrays of one image's logits that guidance, filters and the draw hold at the same time.
_LOGITS = 5
# Arrays [R, N, C], in the weights' dtype, that the network's blocks hold at the same time.
_HIDDEN = 20


class MaskedSampler:
    """A `MaskedTransformer` and its text tokenizer as a `TokenSampler`.

    Attributes:
        model: the network, in evaluation mode: a `MaskedTransformer`, or a module with the same properties and methods.
        words: its text tokenizer and template.
        codebook: codebook of the image tokenizer that it was trained for.
        name: recorded in TokenLogits.model.
        sampling: passes, order and revision to use if `sample` gets plain `SamplingOptions`.
        grid, default_guidance: see `TokenSampler`.
    """

    def __init__(
        self,
        model: MaskedTransformer,
        words: Words,
        codebook: Codebook,
        *,
        name: str = "",
        sampling: ProgressiveOptions | None = None,
    ):
        self.model, self.words, self.codebook, self.name = model, words, codebook, name
        self.sampling = sampling or ProgressiveOptions()
        self.grid = model.config.grid
        self.default_guidance = self.sampling.guidance
        self._stored: str | None = None

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the weights, and of the passes that plain options leave to the sampler."""
        plan = hashlib.sha256(repr(self._plan(DEFAULT_SAMPLING)).encode()).hexdigest()[:8]
        return f"{self._stored or fingerprint_of(self.model.state_dict())}-{plan}"

    def store_in_int8(self, device: torch.device | str) -> None:
        """Moves the network from the CPU to the device, with the linear weights of its blocks in 8 bits.

        Raises:
            ValueError: without torchao.
        """
        stored = f"{fingerprint_of(self.model.state_dict())} in int8"
        for part in self.model.blocks:
            store_in_int8(part, device)
        self.model.to(device)
        self._stored = stored

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that the tokenizer does not know, each once, in order; byte-level tokenizers know all."""
        return self.words.unknown(prompt)

    def known_words(self) -> list[str]:
        """The tokenizer's words, sorted, without special tokens or punctuation; empty if it is byte-level."""
        return self.words.known()

    def working_memory(self, prompts: Sequence[str], *, options: SamplingOptions = DEFAULT_SAMPLING) -> int:
        """See `TokenSampler`: the result's logits, the noise of all draws, and what one pass takes."""
        plan, batch, count = self._plan(options), len(prompts), self.grid[0] * self.grid[1]
        logits = 4 * count * self.codebook.size * (3 * batch + _LOGITS)
        rows = batch * (1 + any(guidance != 1 for guidance in plan.guidances()[plan.start :]))
        mask = self.model.mask
        head = 0 if mask.dtype == torch.float32 else 4 * mask.numel() * self.codebook.size  # computed in float32
        return logits + rows * count * _HIDDEN * mask.nbytes + head

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
        """Samples an image's tokens for each prompt in a few passes, and keeps the logits that each was drawn from.

        A position's logits are those of the last pass that decided it, l = (l_u + g (l_c - l_u)) / temperature with
        that pass's guidance g, in float32, before top-k and top-p, which affect only the draw. The draw is
        argmax(l + n), where the Gumbel noise n [K] is a function of (sample seed, position) and the same in every pass:
        a position whose distribution does not change keeps its token.

        Args:
            options: `ProgressiveOptions`; plain options leave passes, order and revision to `self.sampling`.
            previous, resample: as in `TokenSampler.sample`. Kept positions are visible to all others from the first
                pass on, and never drawn. With `ProgressiveOptions.start`, the first passes reveal tokens of `previous`
                where `resample` is True, in the usual order.
            on_progress: called after each pass.
            parallel, weights_resident: have no effect here: the options determine the passes.

        Returns:
            TokenLogits on the model's device, logits float32 [B, N, K], source "vlm".

        Raises:
            ValueError: for arguments that do not fit each other or the model, and for logits that are not finite.
        """
        return self.sample_stages(
            prompts, seeds=seeds, options=options, previous=previous, resample=resample, on_progress=on_progress
        ).token_logits

    @torch.no_grad()
    def sample_stages(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        options: SamplingOptions = DEFAULT_SAMPLING,
        previous: TokenLogits | None = None,
        resample: torch.Tensor | None = None,
        on_progress: OnProgress | None = None,
    ) -> Staged:
        """`sample` that also returns what each pass revealed and rewrote; an edit of nothing has no stages.

        Raises:
            ValueError: as `sample`.
        """
        check_request(prompts, seeds)
        plan = self._plan(options)
        if plan.start and previous is None:
            raise ValueError(
                f"start is {plan.start}, but there are no tokens to start from: give `previous` and `resample`, or "
                "start at 0"
            )
        batch, count, codes = len(prompts), self.grid[0] * self.grid[1], self.codebook.size
        device = self.model.mask.device
        hidden = torch.ones(batch, count, dtype=torch.bool)
        tokens = torch.zeros(batch, count, dtype=torch.int64, device=device)
        logits = torch.empty(batch, count, codes, dtype=torch.float32, device=device)
        if previous is not None or resample is not None:
            hidden = check_edit(self, previous, resample, batch).clone()
            if not bool(hidden.any()):
                return Staged(token_logits=previous, stages=())
            tokens.copy_(previous.tokens)
            logits.copy_(previous.logits)

        counts = torch.tensor([plan.counts(int(row.sum())) for row in hidden])
        guidances, noises = plan.guidances(), plan.order_noises()
        places = torch.full((batch, count), -1)
        noise = None
        if plan.temperature != 0:
            noise = sampling.gumbel_noise_grid(seeds, range(count), codes).to(device)
        # Greedy: the seed decides nothing, not even the order.
        order = order_noise([0] * batch if plan.temperature == 0 else seeds, count)
        prefix = self._prefix(prompts, guided=any(g != 1 for g in guidances[plan.start :]))
        stages = []
        anew = torch.zeros_like(tokens, dtype=torch.bool)
        read = 0
        for i in range(plan.passes):
            draws = i >= plan.start
            again = redrawn(places, plan.revise) if draws else torch.zeros_like(hidden)
            guidance = guidances[i] if draws else 1.0
            drawn = _Drawn.nothing(tokens)
            decides = bool(counts[:, i].any()) or bool(again.any())
            if decides and (draws or find_order(plan.order).reads is not None):
                read += 1
                seen = torch.where(hidden.to(device), self.model.mask_token, tokens)
                needed = hidden | again
                given = None if draws else tokens
                drawn = self._draw(seen, prefix, guidance, needed, plan, noise, given=given, number=i + 1)
            state = OrderState(
                grid=self.grid,
                noise=order,
                log_probability=drawn.log_probability,
                quantisation_error=drawn.quantisation_error,
                importance=drawn.importance,
            )
            scores = order_scores(plan.order, state, noises[i])
            chosen, turns = reveal(scores, hidden, counts[:, i], grid=self.grid, spread=plan.spread)
            before = tokens
            if draws:
                decided = (chosen | again).to(device)
                tokens = torch.where(decided, drawn.tokens, tokens)
                anew |= decided
                for row, (mask, part) in enumerate(zip(decided, drawn.logits)):
                    logits[row, mask] = part[mask[drawn.needed[row]]]
            places = torch.where(chosen, places.amax(dim=1, keepdim=True) + 1 + turns, places)
            hidden = hidden & ~chosen
            stage = Stage(
                guidance=guidance,
                tokens=tokens.cpu(),
                known=~hidden,
                revealed=chosen,
                redrawn=again,
                changed=again & (tokens != before).cpu(),
            )
            stages.append(stage)
            if on_progress is not None:
                on_progress(Progress(done=i + 1, total=plan.passes, tokens=tokens, known=stage.known, passes=read))
        made = TokenLogits(
            logits,
            tokens,
            self.grid,
            source="vlm",
            guidance=float(plan.guidance),
            temperature=float(plan.temperature),
            model=self.name,
            codebook=self.codebook.fingerprint,
            calibrated_at=kept_calibrated(previous, anew),
        )
        return Staged(token_logits=made, stages=tuple(stages))

    def _plan(self, options: SamplingOptions) -> ProgressiveOptions:
        if isinstance(options, ProgressiveOptions):
            reads = find_order(options.order).reads
            if reads not in (None, "log_probability", *self.model.predicts):
                others = [name for name, order in ORDERS.items() if order.reads in (None, "log_probability")]
                raise ValueError(
                    f"the order {options.order!r} reads {reads}, which {self.name or 'this model'} was not trained to "
                    f"predict: choose {', '.join(others[:-1])} or {others[-1]}"
                )
            plan = options
        else:
            drawn = ("guidance", "temperature", *FILTERS)
            plan = replace(self.sampling, **{name: getattr(options, name) for name in drawn})
        own = {name: getattr(self.sampling, name) for name in FILTERS if getattr(plan, name) is None}
        if plan.temperature == 0:
            own["order_noise"] = 0.0
        return replace(plan, **own)

    def _prefix(self, prompts: Sequence[str], *, guided: bool) -> Prefix:
        """The prefix of [conditional ; unconditional] rows [2 B], or of only the conditional ones [B]."""
        rows = [self.words.ids(prompt) for prompt in prompts]
        if guided:
            rows += [self.words.unconditional(ids) for ids in rows]
        return self.model.prefix(*padded(rows, self.model.mask.device))

    def _draw(
        self,
        seen: torch.Tensor,
        prefix: Prefix,
        guidance: float,
        needed: torch.Tensor,
        plan: ProgressiveOptions,
        noise: torch.Tensor | None,
        *,
        given: torch.Tensor | None,
        number: int,
    ) -> _Drawn:
        """One pass over tokens [B, N]: draws where `needed`, bool [B, N] on the CPU, or takes the tokens `given`."""
        batch, device = len(seen), seen.device
        guided = guidance != 1
        hidden = self.model(seen.repeat(2, 1), prefix) if guided else self.model(seen, prefix.rows(0, batch))
        drawn = replace(_Drawn.nothing(seen), needed=needed.to(device))
        if self.model.predicts:
            found = (part.cpu() for part in self.model.scores(hidden[:batch]))
            drawn = replace(drawn, **dict(zip(self.model.predicts, found)))
        finite = torch.ones((), dtype=torch.bool, device=device)
        # Image by image: all logits at once would take several times the memory of the result.
        for b in range(batch):
            at = drawn.needed[b]
            step = self.model.logits(hidden[b, at])
            if guided:
                step = sampling.guide(step, self.model.logits(hidden[batch + b, at]), guidance)
            # Greedy decoding keeps the whole distribution too: only the draw has no noise.
            step = sampling.temper(step, plan.temperature or 1.0)
            candidates = sampling.top_p(sampling.top_k(step, plan.top_k), plan.top_p)
            best, token = sampling.gumbel_max(candidates, 0.0 if noise is None else noise[b, at])
            if given is not None:
                token = given[b, at]
            finite &= best.isfinite().all()
            drawn.tokens[b, at] = token
            chances = step.log_softmax(-1).gather(-1, token[:, None])[:, 0]
            drawn.log_probability[b, needed[b]] = chances.cpu()
            drawn.logits.append(step)
        if not bool(finite):
            raise ValueError(
                f"pass {number} of {plan.passes} failed in {self.model.mask.dtype}: {sampling.NOT_FINITE}; load the "
                "model in float32, or check its weights"
            )
        return drawn


@dataclass(frozen=True, kw_only=True, eq=False)
class _Drawn:
    """What a pass drew at the positions where it was needed.

    Attributes:
        needed: bool [B, N], on the device.
        tokens: [B, N] int64, on the device.
        logits: for each image, [P, K] float32 at the needed positions.
        log_probability, quantisation_error, importance: [B, N] on the CPU.
    """

    needed: torch.Tensor
    tokens: torch.Tensor
    logits: list[torch.Tensor]
    log_probability: torch.Tensor
    quantisation_error: torch.Tensor
    importance: torch.Tensor

    @classmethod
    def nothing(cls, tokens: torch.Tensor) -> _Drawn:
        """The state before a pass: nothing is drawn."""
        zeros = torch.zeros(tokens.shape)
        return cls(
            needed=torch.zeros_like(tokens, dtype=torch.bool),
            tokens=tokens.clone(),
            logits=[],
            log_probability=zeros.clone(),
            quantisation_error=zeros,
            importance=zeros,
        )
