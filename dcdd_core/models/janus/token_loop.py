"""Janus' decode loop over image tokens, one position at a time: embedding, layers, head, guidance, draw, all in place.

The layers are transformers' Llama modules, called in the order of its `forward`; a host may replace the linear ones. On
a CPU their products are split across threads (`fused_linear`) and the modules themselves are not called. The loop
leaves out what costs more than a single token's arithmetic: masks and rotary tables rebuilt at every step, attention to
empty cache slots, and the library's Python around each layer.

Shapes: B batch, N tokens, K codes, R rows of the language model ([conditional ; unconditional], 2 B, or B without
guidance), Q queries, S slots of the cache, C hidden size, H heads, G heads of keys and values, D width of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import JanusForConditionalGeneration, LlamaModel

from ...method import sampling
from ...protocols import SamplingOptions
from ..fused_linear import FusedLinear

# Their frequencies change with the length that was read, so there is no table of them.
_ROTARY_BY_LENGTH = ("dynamic", "longrope")


def check_language(language: nn.Module) -> None:
    """A ValueError for a language model that `LlamaReader` would read otherwise than transformers does."""
    if not isinstance(language, LlamaModel):
        raise ValueError(
            f"the language model is a {type(language).__name__}, expected a LlamaModel: choose a Janus model"
        )
    if language.rotary_emb.rope_type in _ROTARY_BY_LENGTH:
        raise ValueError(
            f"the language model's rotary embedding is {language.rotary_emb.rope_type!r}, whose frequencies follow "
            "the length: expected one that is fixed, such as 'default', 'linear', 'yarn' or 'llama3'"
        )


class LlamaReader:
    """A Llama's KV cache over R rows, and its forward pass over the next tokens.

    Rows are padded on the left by `padding` [R], which is neither attended nor counted in positions. Each padding slot
    attends to itself only: a query that attends to nothing would be NaN, and NaN would spread through the cache.
    """

    def __init__(self, language: LlamaModel, padding: torch.Tensor, length: int, *, resident: bool = False):
        """
        Args:
            length: S, all that will ever be read.
            resident: `weights_resident` of `TokenSampler.sample`.
        """
        config, width = language.config, language.layers[0].self_attn.head_dim
        self.language = language
        # Looked up once: a module finds its children by way of Python.
        self.layers = [_parts(layer, padding.device, resident) for layer in language.layers]
        self.resident = resident
        self.heads, self.width = (config.num_attention_heads, config.num_key_value_heads), width
        self.scale = language.layers[0].self_attn.scaling
        self.padding = padding
        self.padded = bool(padding.any())
        self.slots = torch.arange(length, device=padding.device)
        self.cache = torch.zeros(
            (len(language.layers), 2, len(padding), config.num_key_value_heads, length, width),
            dtype=language.embed_tokens.weight.dtype,
            device=padding.device,
        )
        cos, sin = language.rotary_emb(self.cache, (self.slots - padding[:, None]).clamp_(min=0))
        # rotate_half(x) = [-x2, x1]; the minus sign is folded into sin, so that a roll does the rest.
        sin = torch.cat([-sin[..., : width // 2], sin[..., width // 2 :]], dim=-1)
        self.rotary = torch.stack([cos, sin])[:, :, None]

    def spread(self, rows: torch.Tensor, filled: int, length: int) -> LlamaReader:
        """A reader of `length` slots whose rows [R'] are copies of these, as far as these are filled."""
        copies = LlamaReader(self.language, self.padding[rows], length, resident=self.resident)
        copies.cache[..., :filled, :] = self.cache[:, :, rows, :, :filled]
        return copies

    def read(self, embeddings: torch.Tensor, slots: torch.Tensor, seen: int | None = None) -> torch.Tensor:
        """Embeddings [R, Q, C] for the next slots [Q] -> the last one's hidden state [R, C].

        Args:
            seen: slots[-1] + 1, the number of slots filled then. None where the host does not know it: all S slots are
                looked at then, under a mask.
        """
        rows, count = embeddings.shape[:2]
        shape, grouped = (rows, count, -1, self.width), self.heads[0] != self.heads[1]
        cos, sin = self.rotary.index_select(3, slots)
        masked = count > 1 or seen is None or self.padded
        mask = self._visible(slots)[..., :seen] if masked else None
        # Flat rows and plain views: each einops string would cost a layer as much time as its norm does.
        hidden = embeddings.flatten(0, 1)
        cache = self.cache[..., :seen, :]
        for (norm, to_qkv, to_out, mlp_norm, to_gated, activation, from_gated), (keys, values) in zip(
            self.layers, cache
        ):
            q, k, v = (part.view(shape).transpose(1, 2) for part in to_qkv(_normed(norm, hidden)))
            turned = torch.cat([q, k], dim=1)
            turned = torch.addcmul(turned * cos, turned.roll(self.width // 2, -1), sin)
            q, k = turned.split_with_sizes(self.heads, dim=1)
            keys.index_copy_(2, slots, k)
            values.index_copy_(2, slots, v)
            x = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=self.scale, enable_gqa=grouped)
            hidden = hidden + to_out(x.transpose(1, 2).flatten(2).flatten(0, 1))[0]
            gate, up = to_gated(_normed(mlp_norm, hidden))
            hidden = hidden + from_gated(activation(gate) * up)[0]
        return _normed(self.language.norm, hidden.view(rows, count, -1)[:, -1])

    def _visible(self, slots: torch.Tensor) -> torch.Tensor:
        """bool [R, 1, Q, S]."""
        queries = slots[:, None]
        past = (queries >= self.slots) & (self.slots >= self.padding[:, None, None])
        return (past | (queries == self.slots))[:, None]


class TokenLoop:
    """Draws position after position into `tokens` [B, N] and `logits` [B, N, K], which belong to the caller.

    All that changes from step to step lies in tensors that stay where they are, so that a GPU can replay one recorded
    step; the host waits for it in `check` alone. Call `start`, then `put_noise` and `draw`, then for every further
    position `put_noise` and `advance`.

    Attributes:
        position: [1], the next to be drawn; `drawn` is the same number as the host knows it.
        anew: bool [B, N], where a draw counts; None for everywhere.
        ahead: the next position's noise on the host, drawn by the `advance` before it; None before the first.
        recordable: whether replaying a step does what the step does.
    """

    def __init__(
        self,
        model: JanusForConditionalGeneration,
        tokens: torch.Tensor,
        logits: torch.Tensor,
        *,
        first: int,
        anew: torch.Tensor | None,
        options: SamplingOptions,
        weights_resident: bool,
    ):
        self.model, self.head = model, _float_head(model)
        self.tokens, self.logits, self.anew = tokens, logits, anew
        self.options = options
        self.first = self.drawn = first
        self.position = torch.tensor([first], device=tokens.device)
        self.noise = torch.zeros_like(logits[:, 0])
        self.ahead: torch.Tensor | None = None
        self.best = torch.zeros(tokens.shape, device=tokens.device)
        parts = (model.model.language_model, model.model.generation_aligner, self.head)
        self.recordable = tokens.is_cuda and all(_stays(part, tokens.device, weights_resident) for part in parts)
        self.replay: Callable[[], None] | None = None
        self.resident = weights_resident

    @torch.inference_mode()
    def start(
        self, ids: torch.Tensor, padding: torch.Tensor, rows: torch.Tensor, *, last: int, seeds: Sequence[int]
    ) -> torch.Tensor:
        """Reads the prompts, each different one once, and the tokens before `first` -> hidden state [R, C].

        Args:
            ids, padding: of U different prompts, [U, L] and [U], see `LlamaReader`.
            rows: [R], which of them each row has.
            last: the last position that will be drawn.
            seeds: of the B samples' noise.
        """
        language, device, length = self.model.model.language_model, self.tokens.device, ids.shape[1]
        self.last, self.seeds = last, seeds
        prompts = LlamaReader(language, padding.to(device), length, resident=self.resident)
        hidden = prompts.read(language.get_input_embeddings()(ids.to(device)), prompts.slots, length)
        self.reader = prompts.spread(rows.to(device), length, length + last)
        self.shift = length - 1
        if self.first == 0:
            return hidden[rows.to(device)]
        slots = self.reader.slots[length : length + self.first]
        return self.reader.read(self._embed(self.tokens[:, : self.first]), slots, length + self.first)

    def put_noise(self) -> None:
        """Puts the noise of the next position in its place, while a GPU still works on the last; greedy has none."""
        if self.options.temperature == 0:
            return
        self.noise.copy_(self._draw_noise() if self.ahead is None else self.ahead, non_blocking=True)

    def advance(self) -> None:
        """Reads the token before the next position, and draws that."""
        if not self.recordable:
            self._step(self.shift + self.drawn + 1)
        elif self.replay is None:
            # Once for real, which prepares the kernels; recording runs nothing.
            self._step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            self.replay = graph.replay
            self.drawn -= 1
        else:
            self.replay()
            self.drawn += 1
        # Before the host waits for the GPU, in `check` or for a preview: the GPU would stand idle for it afterwards.
        if self.options.temperature != 0 and self.drawn <= self.last:
            self.ahead = self._draw_noise()

    @torch.inference_mode()
    def draw(self, hidden: torch.Tensor) -> None:
        """Draws the next position from the hidden state [R, C] of what stands before it."""
        step = self.head(hidden.float())
        if self.options.guidance != 1:
            step = sampling.guide(*step.chunk(2), self.options.guidance)
        # Greedy keeps the whole distribution too: it is the draw that goes without noise.
        step = sampling.temper(step, self.options.temperature or 1.0)
        candidates = sampling.top_p(sampling.top_k(step, self.options.top_k), self.options.top_p)
        best, drawn = sampling.gumbel_max(candidates, self.noise)
        if self.anew is not None:
            chosen = self.anew.index_select(1, self.position)[:, 0]
            drawn = torch.where(chosen, drawn, self.tokens.index_select(1, self.position)[:, 0])
            step = torch.where(chosen[:, None], step, self.logits.index_select(1, self.position)[:, 0])
        self.best.index_copy_(1, self.position, best[:, None])
        self.tokens.index_copy_(1, self.position, drawn[:, None])
        self.logits.index_copy_(1, self.position, step[:, None])
        self.position.add_(1)
        self.drawn += 1

    def check(self) -> None:
        """Waits for the device; a ValueError names the first position drawn from logits that were not finite."""
        broken = ~torch.isfinite(self.best[:, self.first : self.drawn]).all(dim=0)
        if bool(broken.any()):
            step = self.first + int(broken.nonzero()[0]) + 1
            raise ValueError(
                f"step {step} of {self.tokens.shape[1]} failed in {self.reader.cache.dtype}: {sampling.NOT_FINITE}; "
                "load the model in float32 (bfloat16 often does too where float16 overflows), or check its weights"
            )

    def _draw_noise(self) -> torch.Tensor:
        """[B, K] on the host, for the next position; pinned memory is handed out again when the GPU has read it."""
        noise = sampling.gumbel_noise_grid(self.seeds, [self.drawn], self.noise.shape[1])[:, 0]
        return noise.pin_memory() if self.noise.is_cuda else noise

    @torch.inference_mode()
    def _step(self, seen: int | None = None) -> None:
        before = self.tokens.index_select(1, self.position - 1)
        self.draw(self.reader.read(self._embed(before), self.position + self.shift, seen))

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Image tokens [B, Q] -> what the language model reads of them, the same in both halves [R, Q, C]."""
        embeddings = self.model.prepare_embeddings_for_image_generation(tokens)
        return embeddings if self.options.guidance == 1 else embeddings.repeat(2, 1, 1)


def groups_of(layer: nn.Module) -> tuple[tuple[nn.Linear, ...], ...]:
    """The linear layers of a Llama layer, those together that read the same input."""
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
    """Whether all weights are on the device and stay there: layers that are not torch's may fetch theirs per call.

    Args:
        resident: whether the host has said that its own do not.
    """
    linears = (layer for layer in part.modules() if isinstance(layer, nn.Linear))
    known = resident or all(type(layer) is nn.Linear for layer in linears)
    return known and all(weight.device == device for weight in part.parameters())


def _normed(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """LlamaRMSNorm as torch's single operation; in half precision this rounds once where the module rounds twice."""
    return F.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)


def _float_head(model: JanusForConditionalGeneration) -> nn.Module:
    """The generation head in float32: guidance multiplies what half precision would round away."""
    head = model.model.generation_head
    single = all(weight.dtype == torch.float32 for weight in head.parameters())
    return head if single else copy.deepcopy(head).float()
