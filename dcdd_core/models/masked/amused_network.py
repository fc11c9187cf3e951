"""aMUSEd's network (Patil et al. 2024, arXiv 2401.01808): diffusers' U-ViT over image tokens, with CLIP's text encoder.

It was trained to predict hidden tokens from correct visible ones: it has no head that predicts an order, and has never
seen a wrong token that it should revise.

Shapes: R rows, L prompt length, N tokens (a row-major h x w grid), K codes, C width of the U-ViT's outer blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import UVit2DModel
from einops import rearrange
from torch import nn
from transformers import CLIPTextModelWithProjection

CROP = (0, 0)
"""Top and left edge of the crop that the network is told of, in pixels: the image is not cropped."""
AESTHETIC_SCORE = 6.0
"""The score of LAION's aesthetic predictor that the network is told: the one that its authors sample with."""
CONDITIONS = 5
"""How many numbers the network is told of an image besides the prompt: width, height, the crop's two, and the score."""


@dataclass(frozen=True, kw_only=True)
class AmusedConfig:
    """What sampling needs to know.

    Attributes:
        grid: (h, w) of its images.
        factor: pixels per token side.
        mask_token: the id of a hidden token; not K, since the vocabulary is padded.
    """

    grid: tuple[int, int]
    factor: int
    mask_token: int


@dataclass(frozen=True, kw_only=True, eq=False)
class AmusedPrefix:
    """What the image tokens see of a prompt.

    Attributes:
        states: [R, L, width of CLIP], hidden states before CLIP's last layer.
        pooled: [R, width of the projection], CLIP's text embedding.
    """

    states: torch.Tensor
    pooled: torch.Tensor

    def rows(self, first: int, last: int) -> AmusedPrefix:
        """The prefix of the rows first..last - 1."""
        return AmusedPrefix(states=self.states[first:last], pooled=self.pooled[first:last])


class AmusedNetwork(nn.Module):
    """A `UVit2DModel` with its text encoder, in the form that `MaskedSampler` expects.

    The U-ViT's last layer reads each position separately. It is taken off and applied by `logits`, in float32 and only
    where a position is drawn.

    Args:
        transformer: its `mlm_layer` is moved to this module.

    Attributes:
        config: see `AmusedConfig`.
        predicts: empty: no scores for an order of revealing.
    """

    predicts = ()

    def __init__(self, config: AmusedConfig, transformer: UVit2DModel, text: CLIPTextModelWithProjection):
        super().__init__()
        self.config, self.transformer, self.text = config, transformer, text
        self.head, transformer.mlm_layer = transformer.mlm_layer, nn.Identity()

    @property
    def mask_token(self) -> int:
        """The id of a hidden token."""
        return self.config.mask_token

    @property
    def mask(self) -> torch.Tensor:
        """The embedding of a hidden token, [width]."""
        return self.transformer.embed.embeddings.weight[self.mask_token]

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """See `MaskedTransformer`."""
        return (self.transformer.transformer_layers,)

    def prefix(self, ids: torch.Tensor, padding: torch.Tensor) -> AmusedPrefix:
        """Reads prompts.

        Args:
            ids: [R, L] int64, where L is the length that CLIP reads.
            padding: [R] zeros; CLIP's own padding is on the right, and is attended to.
        """
        read = self.text(input_ids=ids, output_hidden_states=True)
        return AmusedPrefix(states=read.hidden_states[-2], pooled=read.text_embeds)

    def forward(self, tokens: torch.Tensor, prefix: AmusedPrefix) -> torch.Tensor:
        """Hidden states [R, N, C] of tokens [R, N] int64, for `logits`."""
        h, w = self.config.grid
        # Width before height, as in training.
        told = (w * self.config.factor, h * self.config.factor, *CROP, AESTHETIC_SCORE)
        hidden = self.transformer(
            rearrange(tokens, "r (h w) -> r h w", h=h),
            encoder_hidden_states=prefix.states,
            pooled_text_emb=prefix.pooled,
            micro_conds=torch.tensor(told, device=tokens.device).expand(len(tokens), -1),
        )
        return rearrange(hidden, "r c h w -> r (h w) c")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., K] float32 of hidden states [..., C], computed in float32."""
        inner = _pointwise(self.head.conv1, hidden.float())
        norm = self.head.layer_norm
        inner = F.rms_norm(inner, norm.dim, None if norm.weight is None else norm.weight.float(), norm.eps)
        return _pointwise(self.head.conv2, inner)


def _pointwise(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Applies a convolution of kernel size 1 along the last axis, in float32, whatever the weights' dtype."""
    return F.linear(x, layer.weight.float().flatten(1), None if layer.bias is None else layer.bias.float())
