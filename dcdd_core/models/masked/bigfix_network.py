"""BIGFix's transformer (Besnier et al. 2025, arXiv 2510.12231; github.com/valeoai/BigFix).

Image tokens with learned positions attend to each other in both directions, together with registers and one token for
the wanted rewards; queries and keys are normalised over all heads at once. Then they attend to all slots of the text,
padding included, as in the released code. The rewards also scale and shift every block, all in the same way [released
code].

Shapes: R rows, L text slots, S width of the text encoder, N tokens (a row-major h x w grid), K codes, C width, H heads,
E width of a head, M hidden size of a block, P = N + registers + 1 positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers import T5EncoderModel

from ..sizes import GridTransformerConfig
from .network import float32_linear

REWARDS = 3
"""Number of rewards: CLIP, PickScore and ImageReward, each from 0 (the training set's worst images) to 1 (its best)."""
WANTED_REWARD, UNWANTED_REWARD = 0.8, 0.2
"""The rewards asked for in rows with and without the prompt, as in the released sampler."""
NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class BigFixConfig(GridTransformerConfig):
    """See `GridTransformerConfig`.

    Attributes:
        text_width: S.
        registers: number of extra positions that hold no image token.

    Raises:
        ValueError: for values out of range.
    """

    remedy: ClassVar[str] = "take a checkpoint of BIGFix as it was published"

    text_width: int
    registers: int

    def __post_init__(self):
        super().__post_init__()
        self._require_counts("text_width", "registers")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}: {self.remedy}")


class Modulation(NamedTuple):
    """How the rewards modulate each block; every part is [R, 1, C]."""

    attention_scale: torch.Tensor
    attention_shift: torch.Tensor
    attention_gate: torch.Tensor
    mlp_scale: torch.Tensor
    mlp_shift: torch.Tensor
    mlp_gate: torch.Tensor
    text_gate: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class BigFixPrefix:
    """What all passes of one image share.

    Attributes:
        keys, values: those of the text in each block, [R, H, L, E].
        style: [R, 8, C] from the rewards: a token, then the parts of a `Modulation`.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    style: torch.Tensor

    def rows(self, first: int, last: int) -> BigFixPrefix:
        """The prefix of the rows first..last - 1."""
        return BigFixPrefix(
            keys=tuple(part[first:last] for part in self.keys),
            values=tuple(part[first:last] for part in self.values),
            style=self.style[first:last],
        )


class BigFixBlock(nn.Module):
    """Attention within the image, attention to the text and a gated feed-forward, each pre-normed and residual."""

    def __init__(self, config: BigFixConfig):
        super().__init__()
        width, hidden = config.width, config.hidden
        self.heads = config.heads
        self.attention_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.text_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.text_q, self.text_k, self.text_v, self.text_out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.mlp_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def read(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [R, H, L, E] of text [R, L, C]."""
        return self._split(self.text_k(text)), self._split(self.text_v(text))

    def forward(self, x: torch.Tensor, text: tuple[torch.Tensor, torch.Tensor], modulation: Modulation) -> torch.Tensor:
        """x [R, P, C] -> the same shape.

        Args:
            text: keys and values from `read`.
        """
        m = modulation
        normed = self.attention_norm(x) * (1 + m.attention_scale) + m.attention_shift
        q, k = (F.rms_norm(part(normed), x.shape[-1:], eps=NORM_EPS) for part in (self.q, self.k))
        attended = F.scaled_dot_product_attention(*(self._split(part) for part in (q, k, self.v(normed))))
        x = x + m.attention_gate * self.out(self._join(attended))
        told = F.scaled_dot_product_attention(self._split(self.text_q(self.text_norm(x))), *text)
        x = x + m.text_gate * self.text_out(self._join(told))
        normed = self.mlp_norm(x) * (1 + m.mlp_scale) + m.mlp_shift
        return x + m.mlp_gate * self.down(F.silu(self.gate(normed)) * self.up(normed))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return rearrange(x, "r p (h e) -> r h p e", h=self.heads)

    @staticmethod
    def _join(x: torch.Tensor) -> torch.Tensor:
        return rearrange(x, "r h p e -> r p (h e)")


class BigFixTransformer(nn.Module):
    """BIGFix's network for `MaskedSampler`, like `MaskedTransformer`: reads tokens 0..K-1, and K for hidden positions.

    Attributes:
        config: its sizes.
        mask_token: the id of a hidden token, K.
        predicts: empty: no scores for an order of revealing.
        text_encoder: T5's encoder, set when its weights are read; part of the network, so that hosts move both.
    """

    predicts = ()

    def __init__(self, config: BigFixConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.codes = nn.Embedding(config.codes + 1, width)
        self.positions = nn.Embedding(config.tokens, width)
        self.registers = nn.Embedding(config.registers, width)
        self.text_in = nn.Linear(config.text_width, width)
        self.style_in, self.style_out = nn.Linear(REWARDS, width), nn.Linear(width, 8 * width)
        self.layers = nn.ModuleList(BigFixBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.head = nn.Linear(width, config.codes + 1)
        self.text_encoder: T5EncoderModel | None = None

    @property
    def mask_token(self) -> int:
        """K."""
        return self.config.codes

    @property
    def mask(self) -> torch.Tensor:
        """The embedding of a hidden token, [C]."""
        return self.codes.weight[self.mask_token]

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """See `MaskedTransformer`; includes the text encoder's blocks."""
        return (self.layers, self.text_encoder.encoder.block)

    def prefix(self, ids: torch.Tensor, real: torch.Tensor, *, guided: bool) -> BigFixPrefix:
        """Reads prompts: [conditional ; unconditional] rows if `guided`, or only the conditional ones.

        In unconditional rows the states of the text are zeros, and the wanted rewards are low [released code].

        Args:
            ids: [B, L] int64.
            real: bool [B, L], False for padding slots, which T5 does not attend to.
        """
        states = self.text_encoder(input_ids=ids, attention_mask=real.long()).last_hidden_state
        rewards = states.new_full((len(states), REWARDS), WANTED_REWARD)
        if guided:
            states = torch.cat([states, torch.zeros_like(states)])
            rewards = torch.cat([rewards, torch.full_like(rewards, UNWANTED_REWARD)])
        return self.read(states, rewards)

    def read(self, states: torch.Tensor, rewards: torch.Tensor) -> BigFixPrefix:
        """The prefix for the text encoder's states [R, L, S] and the wanted rewards [R, 3]."""
        text = self.text_in(states.to(self.mask.dtype))
        keys, values = zip(*(block.read(text) for block in self.layers))
        style = self.style_out(F.silu(self.style_in(rewards.to(self.mask.dtype))))
        return BigFixPrefix(keys=keys, values=values, style=rearrange(style, "r (part c) -> r part c", part=8))

    def forward(self, tokens: torch.Tensor, prefix: BigFixPrefix) -> torch.Tensor:
        """Hidden states [R, N, C] of tokens [R, N] int64 in 0..K, for `logits`."""
        rows, count = tokens.shape
        token, *parts = prefix.style.split(1, dim=1)
        modulation = Modulation(*parts)
        registers = self.registers.weight.expand(rows, -1, -1)
        x = torch.cat([self.codes(tokens) + self.positions.weight[:count], registers, token], dim=1)
        for block, text in zip(self.layers, zip(prefix.keys, prefix.values)):
            x = block(x, text, modulation)
        return self.norm(x[:, :count])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., K] float32 of hidden states [..., C], computed in float32.

        The released head has one more, for the hidden token, which is never drawn here.
        """
        return float32_linear(self.head, hidden.float())[..., : self.mask_token]
