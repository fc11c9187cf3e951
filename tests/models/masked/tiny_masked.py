"""A tiny masked sampler with weights that are the same on every machine."""

from __future__ import annotations

from pathlib import Path

from dcdd_core.method.progressive import ProgressiveOptions
from dcdd_core.models.masked.files import save_masked
from dcdd_core.models.masked.network import MaskedConfig, MaskedTransformer
from dcdd_core.models.masked.sampler import MaskedSampler
from dcdd_core.models.masked.words import Words
from dcdd_core.types import Codebook
from tests.tiny import fill, tiny_tokenizer, tiny_vq

TEMPLATE = "<|User|>: {prompt}\n\n<|Assistant|>:<begin_of_image>"
SAMPLING = ProgressiveOptions(guidance=3.0, passes=5, revision_passes=1, order="halton")


def tiny_network(seed: int = 0) -> MaskedTransformer:
    """For `tiny_vq` and `tiny_tokenizer`: 4 x 4 tokens of 64 codes in 8-D, 2 blocks of width 32."""
    config = MaskedConfig(
        grid=(4, 4), codes=64, code_dim=8, words=len(tiny_tokenizer()), width=32, layers=2, heads=2, hidden=64
    )
    return fill(MaskedTransformer(config), seed).requires_grad_(False)


def tiny_masked(seed: int = 0) -> MaskedSampler:
    words = Words(tiny_tokenizer(), TEMPLATE)
    codebook = Codebook(tiny_vq().quantize.embedding.weight)
    return MaskedSampler(tiny_network(seed), words, codebook, name="tiny", sampling=SAMPLING)


def save_tiny_masked(folder: Path, *, int8: bool = False) -> Path:
    """`tiny_masked` as a folder, with its image tokenizer inside."""
    sampler = tiny_masked()
    folder.mkdir(parents=True, exist_ok=True)
    tiny_vq().save_pretrained(folder / "tokenizer")
    save_masked(
        folder,
        sampler.model,
        sampler.codebook,
        name="tiny",
        template=TEMPLATE,
        tokenizer="tokenizer",
        sampling=SAMPLING,
        int8=int8,
    )
    tiny_tokenizer().save_pretrained(folder)
    return folder
