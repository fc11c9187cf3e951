"""A bidirectional transformer over image tokens after a text prefix: predicts hidden tokens from those revealed.

It has pre-norm blocks with rotary attention and SwiGLU, as in Llama, so that it can start from an autoregressive
model's weights. Text attends causally and only to text: its keys and values are computed once, and each pass reads only
the image tokens, which attend to the text and to each other in both directions [our choice].

Shapes: B batch, R rows, L prompt length, N tokens (a row-major h x w grid), K codes, D code dim, C width, H heads,
E width of a head, M hidden size of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ...settings import require_number
from ..sizes import GridTransformerConfig


@dataclass(frozen=True, kw_only=True)
class MaskedConfig(GridTransformerConfig):
    """See `GridTransformerConfig`.

    Attributes:
        code_dim: D.
        words: size of the text vocabulary.
        rope_theta, norm_eps: base of the rotary embedding and epsilon of the norms, above 0.

    Raises:
        ValueError: for values out of range.
    """

    remedy: ClassVar[str] = "fetch config.json again"

    code_dim: int
    words: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        self._require_counts("code_dim", "words")
        for name in ("rope_theta", "norm_eps"):
            require_number(name, getattr(self, name), above=0, remedy=self.remedy)
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width {self.width} must be an even multiple of heads {self.heads}, for the rotary embedding: "
                f"{self.remedy}"
            )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> MaskedConfig:
        """The configuration from JSON values.

        Raises:
            ValueError: for entries that are missing, unknown or out of range.
        """
        try:
            return cls(**{**values, "grid": tuple(values["grid"])})
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"the sizes of a masked transformer are incomplete or unknown ({error}): {cls.remedy}"
            ) from None


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """What image tokens attend to of a prompt.

    Attributes:
        keys, values: those of each block, [R, H, L, E].
        padding: [R], number of padding slots on the left.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    padding: torch.Tensor

    def rows(self, first: int, last: int) -> Prefix:
        """The prefix of the rows first..last - 1."""
        return Prefix(
            keys=tuple(part[first:last] for part in self.keys),
            values=tuple(part[first:last] for part in self.values),
            padding=self.padding[first:last],
        )


class Block(nn.Module):
    """Attention and a gated feed-forward, each pre-normed and residual."""

    def __init__(self, config: MaskedConfig):
        super().__init__()
        width, hidden = config.width, config.hidden
        self.heads = config.heads
        self.attention_norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.mlp_norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        before: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [R, P, C] -> the same shape, and the keys and values [R, H, P, E] of these positions.

        Args:
            before: keys and values [R, H, L, E] that are attended to as well.
            mask: bool, broadcastable to [R, H, P, L + P]; None attends to all.
        """
        normed = self.attention_norm(x)
        q, k, v = (rearrange(part(normed), "r p (h e) -> r h p e", h=self.heads) for part in (self.q, self.k, self.v))
        q, k = _turned(q, rotary), _turned(k, rotary)
        keys, values = (k, v) if before is None else (torch.cat([a, b], dim=2) for a, b in zip(before, (k, v)))
        attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        x = x + self.out(rearrange(attended, "r h p e -> r p (h e)"))
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed)), k, v


class MaskedTransformer(nn.Module):
    """The network of a masked sampler; it reads tokens 0..K-1, and K for hidden positions.

    Attributes:
        config: its sizes.
        mask_token: the id of a hidden token, K.
        predicts: names of what `scores` returns, as in `OrderState`.
    """

    predicts = ("quantisation_error", "importance")

    def __init__(self, config: MaskedConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.words = nn.Embedding(config.words, width)
        self.codes = nn.Embedding(config.codes, config.code_dim)
        self.align_in, self.align_out = nn.Linear(config.code_dim, width), nn.Linear(width, width)
        self.mask = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(config.tokens, width))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.head_in, self.head_out = nn.Linear(width, width), nn.Linear(width, config.codes)
        self.scores_in, self.scores_out = nn.Linear(width, width // 4), nn.Linear(width // 4, 2)

    @property
    def mask_token(self) -> int:
        """K."""
        return self.config.codes

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The parts whose linear weights may be stored in 8 bits."""
        return (self.layers,)

    def prefix(self, ids: torch.Tensor, padding: torch.Tensor) -> Prefix:
        """Reads prompts.

        Args:
            ids: [R, L] int64, padded on the left with any ids.
            padding: [R], number of padding slots.
        """
        slots = torch.arange(ids.shape[1], device=ids.device)
        rotary = self._rotary((slots - padding[:, None]).clamp_(min=0))
        real = slots >= padding[:, None]
        # A padding slot attends only to itself: a query without keys would be NaN.
        visible = (slots[:, None] >= slots) & real[:, None] | torch.eye(len(slots), dtype=torch.bool, device=ids.device)
        x, found = self.words(ids), []
        for block in self.layers:
            x, *kept = block(x, rotary, visible[:, None])
            found.append(kept)
        keys, values = zip(*found)
        return Prefix(keys=keys, values=values, padding=padding)

    def forward(self, tokens: torch.Tensor, prefix: Prefix) -> torch.Tensor:
        """Hidden states [R, N, C] of tokens [R, N] int64 in 0..K, for `logits` and `scores`."""
        count, length = tokens.shape[1], prefix.keys[0].shape[2]
        slots = torch.arange(length + count, device=tokens.device)
        rotary = self._rotary(slots[length:] - prefix.padding[:, None])
        padded = tokens.is_meta or bool(prefix.padding.any())  # On "meta" there are no values to check.
        real = (slots >= prefix.padding[:, None])[:, None, None] if padded else None
        x = self._embed(tokens)
        for block, before in zip(self.layers, zip(prefix.keys, prefix.values)):
            x, _, _ = block(x, rotary, real, before)
        return self.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., K] float32 of hidden states [..., C], computed in float32 unless under autocast."""
        return float32_linear(self.head_out, F.gelu(float32_linear(self.head_in, hidden.float()))).float()

    def scores(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted quantisation error and dynamic importance, each [...] float32, of hidden states [..., C]."""
        found = float32_linear(self.scores_out, F.gelu(float32_linear(self.scores_in, hidden.float()))).float()
        return found[..., 0], found[..., 1]

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings [R, N, C] in the weights' dtype, even under autocast, which would round similar codes alike."""
        hidden = tokens == self.mask_token
        with nullcontext() if tokens.is_meta else torch.autocast(tokens.device.type, enabled=False):
            codes = self.codes(tokens.masked_fill(hidden, 0))
            aligned = self.align_out(F.gelu(self.align_in(codes)))
        return torch.where(hidden[..., None], self.mask, aligned) + self.positions

    def _rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [R, 1, P, E] float32 of positions [R, P]."""
        width = self.config.width // self.config.heads
        half = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
        angles = positions[:, None, :, None].float() * self.config.rope_theta ** (-half / width)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def _turned(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotates the pairs (e, e + E / 2) of [R, H, P, E]."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def float32_linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Applies a layer in float32, whatever the weights' dtype: guidance amplifies what half precision rounds away.

    A float32 layer is called as a module, since a host may have replaced it by one that fetches its weights.
    """
    if layer.weight.dtype == torch.float32:
        return layer(x)
    weight, bias = (part.to(x.device, torch.float32) for part in (layer.weight, layer.bias))
    return F.linear(x, weight, bias)
