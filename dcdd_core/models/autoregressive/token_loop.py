"""The decode loop over image tokens, many positions per pass: embedding, layers, head, guidance, draw, all in place.

The layers are transformers' Llama modules, called in the order of its `forward`; a host may replace the linear ones. On
a CPU their products are split across threads (`fused_linear`) and the modules themselves are not called. The loop
avoids what costs more than a single token's arithmetic: rebuilding masks and rotary tables at every step, attending to
empty cache slots, and the library's Python around each layer.

Shapes: B batch, N tokens, K codes, R rows of the language model ([conditional ; unconditional], 2 B, or B without
guidance), U distinct prompts, L slots of a prompt, Q queries, S slots of the cache, C hidden size, H heads, G heads of
keys and values, D width of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaModel

from ...method import sampling
from ...protocols import SamplingOptions
from ..fused_linear import FusedLinear

# Rotary types whose frequencies change with the length read so far, so that they cannot be tabulated.
_ROTARY_BY_LENGTH = ("dynamic", "longrope")


def check_language(language: nn.Module) -> None:
    """Raises ValueError for a language model that `LlamaReader` would not run as transformers does."""
    if not isinstance(language, LlamaModel):
        raise ValueError(
            f"the language model is a {type(language).__name__}, expected a LlamaModel: choose a Janus model"
        )
    if language.rotary_emb.rope_type in _ROTARY_BY_LENGTH:
        raise ValueError(
            f"the language model's rotary embedding is {language.rotary_emb.rope_type!r}, whose frequencies follow "
            "the length: expected one that is fixed, such as 'default', 'linear', 'yarn' or 'llama3'"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenNetwork:
    """An autoregressive image model as the loop calls it: everything that differs between families.

    Attributes:
        language: the layers, which `LlamaReader` runs.
        embed: image tokens [B, Q] int64 -> [B, Q, C].
        head: hidden states [R, Q, C] float32 -> logits [R, Q, K], in float32 (`in_float32`).
        embedders: the modules that `embed` calls.
        counts_prompt: whether positions count the prompt's tokens. Otherwise position 0 is the image's first token, and
            all of the prompt's positions are negative.
    """

    language: LlamaModel
    embed: Callable[[torch.Tensor], torch.Tensor]
    head: nn.Module
    embedders: tuple[nn.Module, ...]
    counts_prompt: bool = True


class Prompts(NamedTuple):
    """The prompts that the loop reads before an image.

    Attributes:
        embeddings: [U, L, C] of the distinct prompts, padded on the left.
        padding: [U], number of padding slots of each.
        rows: [R], the index of each row's prompt among them.
    """

    embeddings: torch.Tensor
    padding: torch.Tensor
    rows: torch.Tensor


def cache_shape(language: LlamaModel, rows: int, length: int) -> tuple[int, ...]:
    """Shape of the keys and values that every layer keeps of R rows of S = `length` slots."""
    width = language.layers[0].self_attn.head_dim
    return len(language.layers), 2, rows, language.config.num_key_value_heads, length, width


class LlamaReader:
    """A Llama's KV cache over R rows, and its forward pass over the next tokens.

    Rows are padded on the left by `padding` [R], which is neither attended to nor counted in positions. Each padding
    slot attends only to itself: a query that attends to nothing would be NaN, and NaN would spread through the cache.
    """

    def __init__(
        self,
        language: LlamaModel,
        padding: torch.Tensor,
        length: int,
        *,
        origin: torch.Tensor | None = None,
        resident: bool = False,
    ):
        """
        Args:
            length: S, the number of slots that will be read in all.
            origin: [R], the slot of each row that has position 0; None for the first slot after the padding.
            resident: `weights_resident` of `TokenSampler.sample`.
        """
        config, width = language.config, language.layers[0].self_attn.head_dim
        self.language = language
        # Looked up once: attribute access on a module goes through Python.
        self.layers = [_parts(layer, padding.device, resident) for layer in language.layers]
        self.resident = resident
        self.heads, self.width = (config.num_attention_heads, config.num_key_value_heads), width
        self.scale = language.layers[0].self_attn.scaling
        self.padding, self.origin = padding, padding if origin is None else origin
        self.padded = bool(padding.any())
        self.slots = torch.arange(length, device=padding.device)
        self.cache = torch.zeros(
            cache_shape(language, len(padding), length),
            dtype=language.embed_tokens.weight.dtype,
            device=padding.device,
        )
        cos, sin = language.rotary_emb(self.cache, self.slots - self.origin[:, None])
        # rotate_half(x) = [-x2, x1]; the minus sign is folded into sin, so that a roll does the rest.
        sin = torch.cat([-sin[..., : width // 2], sin[..., width // 2 :]], dim=-1)
        self.rotary = torch.stack([cos, sin])[:, :, None]

    def spread(self, rows: torch.Tensor, filled: int, length: int) -> LlamaReader:
        """A reader with `length` slots whose rows are copies of `rows` [R'], of which `filled` slots are copied."""
        padding, origin = self.padding[rows], self.origin[rows]
        copies = LlamaReader(self.language, padding, length, origin=origin, resident=self.resident)
        copies.cache[..., :filled, :] = self.cache[:, :, rows, :, :filled]
        return copies

    def read(
        self, embeddings: torch.Tensor, slots: torch.Tensor, seen: int | None = None, *, whole: bool = False
    ) -> torch.Tensor:
        """Embeddings [R, Q, C] for slots [Q], or [R, Q] if each row has its own -> the last hidden state [R, C].

        Args:
            seen: the highest slot + 1: slots from there on are empty. None if the host does not know it: then all S
                slots are read, under a mask.
            whole: return all hidden states [R, Q, C].
        """
        rows, count = embeddings.shape[:2]
        shape, grouped = (rows, count, -1, self.width), self.heads[0] != self.heads[1]
        shared = slots.ndim == 1
        where = slots if shared else slots[:, None, :, None]
        cos, sin = self.rotary.index_select(3, slots) if shared else self.rotary.take_along_dim(where[None], dim=3)
        masked = count > 1 or seen is None or self.padded or not shared
        mask = self._visible(slots)[..., :seen] if masked else None
        # Flat rows and plain views: each einops call would cost as much time as a layer's norm.
        hidden = embeddings.flatten(0, 1)
        cache = self.cache[..., :seen, :]
        for (norm, to_qkv, to_out, mlp_norm, to_gated, activation, from_gated), (keys, values) in zip(
            self.layers, cache
        ):
            q, k, v = (part.view(shape).transpose(1, 2) for part in to_qkv(_normed(norm, hidden)))
            turned = torch.cat([q, k], dim=1)
            turned = torch.addcmul(turned * cos, turned.roll(self.width // 2, -1), sin)
            q, k = turned.split_with_sizes(self.heads, dim=1)
            if shared:
                keys.index_copy_(2, slots, k)
                values.index_copy_(2, slots, v)
            else:
                places = where.expand_as(k)
                keys.scatter_(2, places, k)
                values.scatter_(2, places, v)
            x = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=self.scale, enable_gqa=grouped)
            hidden = hidden + to_out(x.transpose(1, 2).flatten(2).flatten(0, 1))[0]
            gate, up = to_gated(_normed(mlp_norm, hidden))
            hidden = hidden + from_gated(activation(gate) * up)[0]
        hidden = hidden.view(rows, count, -1)
        return _normed(self.language.norm, hidden if whole else hidden[:, -1])

    def _visible(self, slots: torch.Tensor) -> torch.Tensor:
        """The attention mask of queries at these slots: bool [R, 1, Q, S]."""
        queries = slots[..., None]
        past = (queries >= self.slots) & (self.slots >= self.padding[:, None, None])
        return (past | (queries == self.slots))[:, None]


class TokenLoop:
    """Draws positions into the caller's `tokens` [B, N] and `logits` [B, N, K], W at a time, with exact results.

    A pass reads the last final token and W - 1 guesses of what follows, and draws all W positions. As the noise is
    keyed by position, a draw is the sequential sampler's own if all guesses before it were right. These draws, at least
    one, become final, and the others are the guesses of the next pass. By induction over positions the result is that
    of W = 1, up to the different rounding of products of W rows and of a single row (Song et al. 2021, arXiv
    2002.03629: Jacobi decoding; Teng et al. 2024, arXiv 2410.01699, for images).

    Everything that changes between passes is held in tensors at fixed addresses, so that a GPU can replay one recorded
    pass. A position's noise is stored in `logits` until its own logits replace it. Each row of a batch advances at its
    own pace. Call `start`, then `advance` until `done`.

    Attributes:
        window: W; at most the number of positions after the first.
        next: [B], each row's first position that is not final; `reached` is the host's copy of it.
        anew: bool [B, N], where a draw counts; None for everywhere. Other positions are guesses that are always right.
        passes: number of network passes since `start`, which counts as one.
        recordable: whether a recorded pass can be replayed.
    """

    def __init__(
        self,
        network: TokenNetwork,
        tokens: torch.Tensor,
        logits: torch.Tensor,
        *,
        first: int,
        last: int,
        anew: torch.Tensor | None,
        options: SamplingOptions,
        window: int,
        weights_resident: bool,
    ):
        """
        Args:
            first, last: the first and the last position to draw.
        """
        self.network = network
        self.tokens, self.logits, self.anew = tokens, logits, anew
        self.options = options
        self.first, self.last = first, last
        self.window = max(1, min(window, last - first))
        self.next = torch.full((len(tokens),), first, device=tokens.device)
        self.reached = [first] * len(tokens)
        self.passes = self.noised = 0
        self.ahead = torch.arange(self.window, device=tokens.device)
        self.best = torch.zeros(tokens.shape, device=tokens.device)
        parts = (network.language, network.head, *network.embedders)
        self.recordable = tokens.is_cuda and all(_stays(part, tokens.device, weights_resident) for part in parts)
        self.replay: Callable[[], None] | None = None
        self.resident = weights_resident

    @property
    def done(self) -> bool:
        """Whether all rows are drawn."""
        return min(self.reached) > self.last

    @torch.inference_mode()
    def start(self, prompts: Prompts, *, seeds: Sequence[int]) -> None:
        """Reads the distinct prompts and the tokens before `first`, and draws the position `first`.

        Args:
            seeds: seeds of the noise, one for each of the B samples.
        """
        device, length = self.tokens.device, prompts.embeddings.shape[1]
        padding, rows = prompts.padding.to(device), prompts.rows.to(device)
        self.seeds, self.noised = seeds, self.first
        origin = None if self.network.counts_prompt else torch.full_like(padding, length)
        reader = LlamaReader(self.network.language, padding, length, origin=origin, resident=self.resident)
        hidden = reader.read(prompts.embeddings.to(device), reader.slots, length)
        self.reader = reader.spread(rows, length, length + self.last)
        self.shift = length - 1
        if self.first == 0:
            hidden = hidden[rows]
        else:
            slots = self.reader.slots[length : length + self.first]
            hidden = self.reader.read(self._embed(self.tokens[:, : self.first]), slots, length + self.first)
        self._put_noise()
        self._draw(hidden[:, None], self.next[:, None].clone())
        self._tell()

    def advance(self) -> None:
        """One pass: at least one more position becomes final in each row that is not done."""
        if not self.recordable:
            most = min(max(self.reached), self.last + 1 - self.window)
            self._step(self.shift + most + self.window)
        elif self.replay is None:
            # One real pass first, which prepares the kernels; recording runs nothing.
            self._step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            self.replay = graph.replay
        else:
            self.replay()
        # Done before the host waits for the GPU: afterwards the GPU would be idle during it.
        self._put_noise()
        self._tell()

    def check(self) -> None:
        """Waits for the device; raises ValueError naming the first position drawn from logits that are not finite."""
        broken = ~torch.isfinite(self.best).all(dim=0)
        if bool(broken.any()):
            step = int(broken.nonzero()[0]) + 1
            raise ValueError(
                f"step {step} of {self.tokens.shape[1]} failed in {self.reader.cache.dtype}: {sampling.NOT_FINITE}; "
                "load the model in float32 (bfloat16 often does too where float16 overflows), or check its weights"
            )

    def _tell(self) -> None:
        """Updates `reached` on the host. With W = 1 every pass moves all rows by one, and nothing is waited for."""
        self.passes += 1
        if self.window == 1 or self.passes == 1:
            self.reached = [row + 1 for row in self.reached]
        else:
            self.reached = self.next.tolist()

    def _put_noise(self) -> None:
        """Draws the noise of the positions that the next pass may need; greedy decoding has none."""
        until = min(self.last + 1, max(self.reached) + 2 * self.window)
        if self.options.temperature == 0 or until <= self.noised:
            return
        noise = sampling.gumbel_noise_grid(self.seeds, range(self.noised, until), self.logits.shape[2])
        if self.logits.is_cuda:  # pinned memory is reused only after the GPU has read it
            noise = noise.pin_memory()
        held = self.logits[:, self.noised : until]
        noise = noise.to(held.device, non_blocking=True)
        if self.anew is not None:
            noise = torch.where(self.anew[:, self.noised : until, None], noise, held)
        held.copy_(noise)
        self.noised = until

    @torch.inference_mode()
    def _step(self, seen: int | None = None) -> None:
        places = self._places()
        embeddings = self._embed(self.tokens.gather(1, places - 1))
        slots = places[0] if self.window == 1 or len(places) == 1 else places.repeat(len(embeddings) // len(places), 1)
        self._draw(self.reader.read(embeddings, slots + self.shift, seen, whole=True), places)

    def _draw(self, hidden: torch.Tensor, places: torch.Tensor) -> None:
        """Draws positions `places` [B, Q] from hidden states [R, Q, C] of the final or guessed tokens before them."""
        step = self.network.head(hidden.float())
        if self.options.guidance != 1:
            step = sampling.guide(*step.chunk(2), self.options.guidance)
        # Greedy decoding keeps the whole distribution too: only the draw has no noise.
        step = sampling.temper(step, self.options.temperature or 1.0)
        candidates = sampling.top_p(sampling.top_k(step, self.options.top_k), self.options.top_p)
        at = places[..., None].expand_as(step)
        held = self.logits.gather(1, at)  # noise, for positions that were never drawn
        best, drawn = sampling.gumbel_max(candidates, held if self.options.temperature else 0.0)
        guessed, stands = self.tokens.gather(1, places), places < self.next[:, None]
        if self.anew is not None:
            stands = stands | ~self.anew.gather(1, places)
        drawn = torch.where(stands, guessed, drawn)
        agreed = 1 + (drawn == guessed)[:, :-1].cumprod(1).sum(1)
        new = ~stands & (self.ahead[: places.shape[1]] < agreed[:, None])
        self.best.scatter_(1, places, torch.where(new, best, self.best.gather(1, places)))
        self.tokens.scatter_(1, places, drawn)
        self.logits.scatter_(1, at, torch.where(new[..., None], step, held))
        self.next.copy_(torch.maximum(self.next, places[:, 0] + agreed))
        self._guess(places[:, -1:])

    def _guess(self, drawn: torch.Tensor) -> None:
        """Guesses the tokens that the next pass reads after the last `drawn` positions [B, 1]: the token drawn there.

        Other guesses were not better (docs/performance.md), since nearly every guess is the draw of an earlier pass.
        """
        if self.window == 1:
            return
        places = self._places()
        fresh = places > drawn
        if self.anew is not None:
            fresh &= self.anew.gather(1, places)
        held = self.tokens.gather(1, places)
        self.tokens.scatter_(1, places, torch.where(fresh, self.tokens.gather(1, drawn), held))

    def _places(self) -> torch.Tensor:
        """The positions [B, W] of the next pass; at the end of an image some of them are final already."""
        return self.next.clamp(max=self.last + 1 - self.window)[:, None] + self.ahead

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Image tokens [B, Q] -> the language model's input embeddings [R, Q, C], the same in both halves."""
        embeddings = self.network.embed(tokens)
        return embeddings if self.options.guidance == 1 else embeddings.repeat(2, 1, 1)


def window_for(rows: int, device: torch.device, dtype: torch.dtype) -> int:
    """The default number of positions per pass for R rows.

    On a CPU in float32 a product becomes bound by arithmetic at about 24 rows (`python -m benchmarks parallel`). In
    half precision the rounding of a product depends on its number of rows, so that a seed would give another image, and
    on a GPU nothing was measured: in both cases positions are drawn one by one.
    """
    if device.type != "cpu" or dtype != torch.float32:
        return 1
    return max(1, min(12, 24 // rows))


def groups_of(layer: nn.Module) -> tuple[tuple[nn.Linear, ...], ...]:
    """The linear layers of a Llama layer, grouped by the input that they read."""
    attention, mlp = layer.self_attn, layer.mlp
    return (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )


def _parts(layer: nn.Module, device: torch.device, resident: bool) -> tuple[Callable, ...]:
    groups = groups_of(layer)
    to_qkv, to_out, to_gated, from_gated = (FusedLinear(group, device=device, resident=resident) for group in groups)
    norms = layer.input_layernorm, layer.post_attention_layernorm
    return norms[0], to_qkv, to_out, norms[1], to_gated, layer.mlp.act_fn, from_gated


def _stays(part: nn.Module, device: torch.device, resident: bool) -> bool:
    """Whether all weights are on the device and stay there: a host's own layers may fetch theirs at each call.

    Args:
        resident: whether the host has promised that its layers do not.
    """
    linears = (layer for layer in part.modules() if isinstance(layer, nn.Linear))
    known = resident or all(type(layer) is nn.Linear for layer in linears)
    return known and all(weight.device == device for weight in part.parameters())


def _normed(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """LlamaRMSNorm as a single torch operation; in half precision it rounds once, where the module rounds twice."""
    return F.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)


def is_float32(head: nn.Module) -> bool:
    """Whether all of its weights are."""
    return all(weight.dtype == torch.float32 for weight in head.parameters())


def in_float32(head: nn.Module, device: torch.device) -> nn.Module:
    """The head, or a copy of it in float32 on the device: guidance amplifies what half precision would round away.

    The copy's linear layers are torch's own, since a host's may hold native memory that must not be copied.
    """
    return head if is_float32(head) else _float32_copy(head, device)


def _float32_copy(part: nn.Module, device: torch.device) -> nn.Module:
    if isinstance(part, nn.Linear):
        twin = nn.Linear(part.in_features, part.out_features, bias=part.bias is not None, device="meta")
    else:
        twin = copy.copy(part)
        twin.__dict__.pop("forward", None)  # that of a host's hook, which computes with the original's weights
        twin._modules = {
            name: None if own is None else _float32_copy(own, device) for name, own in part._modules.items()
        }
    held = {
        name: nn.Parameter(weight.detach().to(device, torch.float32), requires_grad=False)
        for name, weight in part.named_parameters(recurse=False)
    }
    twin._parameters = twin._parameters | held
    return twin
