"""The Janus family: which folders belong to it, and how they are loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from ..checkpoints import read_config
from ..masked.sampler import MaskedSampler
from ..vq import VQTokenizer
from .files import KINDS
from .masked_start import masked_start
from .sampler import JanusSampler
from .tokenizer import load_tokenizer


class JanusFamily:
    """See `protocols.SamplerFamily`."""

    name = "janus"
    expected = "the folder of a Janus or Janus-Pro model (transformers' layout or DeepSeek's own), or of its tokenizer"

    def reads(self, path: str) -> bool:
        """True for a folder whose config.json is of a Janus model, or of only its VQ-VAE."""
        return (Path(path) / "config.json").exists() and read_config(path).get("model_type") in KINDS

    def load_sampler(
        self,
        path: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        int8: bool = False,
        computes_on: torch.device | str | None = None,
    ) -> JanusSampler:
        """See `JanusSampler.load`."""
        return JanusSampler.load(path, device=device, dtype=dtype, int8=int8, computes_on=computes_on)

    def load_tokenizer(
        self, path: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> VQTokenizer:
        """See `tokenizer.load_tokenizer`."""
        return load_tokenizer(path, device=device, dtype=dtype)

    def start_masked(self, path: str, *, grid: tuple[int, int], seed: int) -> MaskedSampler:
        """A masked sampler initialised from a Janus model, for training; see `masked_start`."""
        return masked_start(self.load_sampler(path), seed, grid=grid)

    def published_tokenizer(self) -> VQTokenizer:
        """Janus-Pro's tokenizer: transformers' defaults, on the 24 x 24 grid of 384 pixels."""
        with torch.device("meta"):
            model = JanusVQVAE(JanusVQVAEConfig(num_patches=24))
        # The codebook's values are checked, so it needs some: these are random.
        weight = model.quantize.embedding.weight
        model.quantize.embedding.weight = torch.nn.Parameter(
            torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        )
        tokenizer = VQTokenizer(model)
        model.to("meta")
        return tokenizer
