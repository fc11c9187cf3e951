"""LlamaGen's transformer over image tokens after a caption (Sun et al. 2024, arXiv 2406.06525), on transformers' Llama.

Its layers are a Llama's, with two differences: a caption enters as text encoder features through two linear layers, and
positions are rows and columns of the image. At caption positions queries and keys are zero, so that a caption is read
as a mean [released code].

Shapes: R rows, S width of the text features, L caption slots, N tokens (a row-major h x w grid), K codes, C width,
D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaModel

from ..sizes import GridTransformerConfig

NORM_EPS = 1e-5
ROPE_BASE = 10000.0


@dataclass(frozen=True, kw_only=True)
class LlamaGenConfig(GridTransformerConfig):
    """See `GridTransformerConfig`.

    Attributes:
        text_width, text_slots: S, and L, the length of the longest caption.

    Raises:
        ValueError: for values out of range.
    """

    remedy: ClassVar[str] = "take a text-to-image checkpoint of LlamaGen as it was published"

    text_width: int
    text_slots: int

    def __post_init__(self):
        super().__post_init__()
        self._require_counts("text_width", "text_slots")
        if self.width % (4 * self.heads):
            raise ValueError(
                f"width {self.width} must be a multiple of 4 times the heads, {4 * self.heads}: half of a head turns "
                f"with the row, half with the column, in pairs; {self.remedy}"
            )


class GridRotary(nn.Module):
    """Rotary tables for positions in a row-major grid, in place of a Llama's.

    The first half of the frequencies rotates with the row, the second with the column. Negative positions belong to a
    caption: their cosines and sines are all zero.
    """

    def __init__(self, columns: int, width: int):
        """
        Args:
            columns: w.
            width: D.
        """
        super().__init__()
        self.columns, self.width = columns, width

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [R, Q, D] of positions [R, Q], in the dtype and on the device of x."""
        half = self.width // 2
        steps = torch.arange(0, half, 2, device=x.device, dtype=torch.float32)
        frequencies = 1.0 / (ROPE_BASE ** (steps / half))
        position_ids = position_ids.to(x.device)
        row_and_column = position_ids // self.columns, position_ids % self.columns
        angles = torch.cat([part[..., None] * frequencies for part in row_and_column] * 2, dim=-1)
        known = (position_ids >= 0)[..., None]
        return tuple((part * known).to(x.dtype) for part in (angles.cos(), angles.sin()))


class LlamaGenTransformer(nn.Module):
    """Maps captions and image tokens to logits of the next token.

    Attributes:
        config: its sizes.
        null: learned features [L, S] that stand for no caption.
        language: its layers, and the embedding of image tokens.
    """

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.config = config
        self.null = nn.Parameter(torch.empty(config.text_slots, config.text_width))
        self.caption_in = nn.Linear(config.text_width, config.width, bias=False)
        self.caption_out = nn.Linear(config.width, config.width, bias=False)
        self.language = LlamaModel(
            LlamaConfig(
                vocab_size=config.codes,
                hidden_size=config.width,
                intermediate_size=config.hidden,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=config.text_slots + config.tokens,
                rms_norm_eps=NORM_EPS,
                bos_token_id=None,
                eos_token_id=None,
                attn_implementation="sdpa",
            )
        )
        self.language.rotary_emb = GridRotary(config.grid[1], config.width // config.heads)
        self.head = nn.Linear(config.width, config.codes, bias=False)

    def captions(self, features: torch.Tensor) -> torch.Tensor:
        """The layers' input for text features: [..., S] -> [..., C]."""
        features = features.to(self.null.device, self.null.dtype)  # not the layer's: a host may keep that elsewhere
        return self.caption_out(F.gelu(self.caption_in(features), approximate="tanh"))

    def forward(self, captions: torch.Tensor, real: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [R, N', K] float32 of the first N' = 1 + Q image tokens, given the first Q: for training and tests.

        Args:
            captions: [R, L', C] from `captions`, padded on the left.
            real: bool [R, L'], False for padding slots, which attend only to themselves and are not attended to.
            tokens: [R, Q] int64.
        """
        slots, count = captions.shape[1], tokens.shape[1]
        x = torch.cat([captions, self.language.embed_tokens(tokens)], dim=1)
        places = torch.arange(slots + count, device=x.device)
        seen = F.pad(real.to(x.device), (0, count), value=True)[:, None] & (places[:, None] >= places)
        mask = (seen | torch.eye(len(places), dtype=torch.bool, device=x.device))[:, None]
        positions = (places - slots).expand(len(x), -1)
        hidden = self.language(inputs_embeds=x, attention_mask=mask, position_ids=positions).last_hidden_state
        return self.head(hidden[:, slots - 1 :].float())
