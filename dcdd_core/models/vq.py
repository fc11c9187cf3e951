"""The VQ-VAE tokenizer: pixels -> features -> tokens, and tokens or continuous code vectors -> pixels.

Shapes: B batch, N tokens (row-major h x w grid), K codes, D code dimension, H x W pixels, f down-sampling factor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from transformers.models.janus.modeling_janus import JanusVQVAE

from ..method.calibration import proxy_logits
from ..types import Codebook, TokenLogits


class VQTokenizer:
    """A frozen `JanusVQVAE` (also LlamaGen's VQ-16) with its normalised codebook.

    transformers' own `quantize.forward` normalises neither features nor codebook; the released models normalise both,
    as does this class.

    Attributes:
        model: the network.
        codebook: [K, D], unit rows; it keeps its device when the network is moved.
        factor: pixels per token side, f.
        grid: (h, w) of the images that the VLM paints.
        name: for messages and records.
    """

    def __init__(self, model: JanusVQVAE, *, name: str = ""):
        self.model = model.eval().requires_grad_(False)
        weight = model.quantize.embedding.weight
        if not weight.is_meta:  # shapes alone give no codebook
            self.codebook = Codebook(weight)
        self.factor = 2 ** (len(model.config.channel_multiplier) - 1)
        self.grid = (model.config.num_patches,) * 2
        self.name = name

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return self.model.post_quant_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The network's dtype; features and pixels are float32."""
        return self.model.post_quant_conv.weight.dtype

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """The token grid (h, w) of an image.

        Raises:
            ValueError: if a side is not a multiple of the factor.
        """
        f = self.factor
        if height < f or width < f or height % f or width % f:
            fits = f"{max(f, round(height / f) * f)} x {max(f, round(width / f) * f)}"
            raise ValueError(f"an image of {height} x {width} pixels has no whole grid of {f}-pixel tokens: use {fits}")
        return height // f, width // f

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Image-token features, before quantisation (Eq. 9): pixels [B, 3, H, W] in -1..1 -> [B, N, D] float32.

        Differentiable: since the weights are frozen, pixels that need no gradient build no autograd graph.

        Raises:
            ValueError: for another shape, and a side that is not a multiple of the factor.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels must be [B, 3, H, W] in -1..1, got {list(pixels.shape)}")
        self.grid_of(*pixels.shape[2:])
        return rearrange(self._encoded(pixels.to(self.device, self.dtype)).float(), "b d h w -> b (h w) d")

    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, H, W] in the network's dtype -> features [B, D, h, w]."""
        return self.model.quant_conv(self.model.encoder(pixels))

    def tokens(self, features: torch.Tensor) -> torch.Tensor:
        """Nearest codes by cosine: features [B, N, D] -> [B, N] int64.

        Raises:
            ValueError: if the features do not have the dimension of the codes.
        """
        return proxy_logits(features, self.codebook).argmax(dim=-1)

    def quantisation_errors(self, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """1 - cosine of features [B, N, D] and the codes of tokens [B, N], both of unit length: [B, N] float32."""
        codes = self.codebook.of(tokens).to(features.device)
        return (1 - (F.normalize(features.float(), dim=-1) * codes).sum(-1)).clamp(min=0)

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> TokenLogits:
        """Proxy logits (Eqs. 9-10) and tokens of images [B, 3, H, W] in -1..1, any multiple of the factor in size.

        Raises:
            ValueError: as `features`.
        """
        features = self.features(pixels)
        logits = proxy_logits(features, self.codebook)
        return TokenLogits(
            logits,
            logits.argmax(dim=-1),
            self.grid_of(*pixels.shape[2:]),
            source="proxy",
            model=self.name,
            codebook=self.codebook.fingerprint,
        )

    @torch.no_grad()
    def decode_vectors(self, vectors: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Code vectors [B, N, D], codes or any mixture of them, on an (h, w) grid -> pixels [B, 3, H, W] in -1..1.

        Raises:
            ValueError: for a shape that does not fit the grid or the codebook.
        """
        h, w = grid
        if vectors.ndim != 3 or vectors.shape[1] != h * w or vectors.shape[2] != self.codebook.dim:
            raise ValueError(
                f"code vectors must be [B, {h * w}, {self.codebook.dim}] for a {h} x {w} grid of this tokenizer, "
                f"got {list(vectors.shape)}"
            )
        code_map = rearrange(vectors.to(self.device, self.dtype), "b (h w) d -> b d h w", h=h)
        # Without gradients, channels-last convolutions are faster on a CPU; with them, GroupNorm is far slower that way
        # (docs/embedded.md).
        code_map = code_map.contiguous(memory_format=torch.channels_last)
        return self._decoded(code_map).float().clamp(-1, 1)

    def _decoded(self, code_map: torch.Tensor) -> torch.Tensor:
        """Code vectors [B, D, h, w] in the network's dtype -> pixels [B, 3, H, W], about in -1..1."""
        return self.model.decoder(self.model.post_quant_conv(code_map))

    def decode_tokens(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Tokens [B, N] -> pixels [B, 3, H, W] in -1..1: the VQ path of the VLM itself.

        Raises:
            ValueError: for tokens outside the codebook, no tokens, or a number that does not fit the grid.
        """
        if tokens.numel() == 0 or int(tokens.min()) < 0 or int(tokens.max()) >= self.codebook.size:
            raise ValueError(f"tokens must lie in 0..{self.codebook.size - 1}: these belong to another tokenizer")
        return self.decode_vectors(self.codebook.of(tokens), grid)

    def working_memory(self, grid: tuple[int, int]) -> int:
        """Bytes for one image in float32: ComfyUI's estimate for FLUX's autoencoder (width 128), scaled by width."""
        h, w = grid
        return round(4 * 2178 * h * w * self.factor**2 * self.model.config.base_channels / 128)
