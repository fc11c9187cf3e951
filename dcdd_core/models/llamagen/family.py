"""LlamaGen as a family: which folders are its, and how they are loaded."""

from __future__ import annotations

import torch

from ...protocols import ImageTokenizer
from . import files, tokenizer
from .sampler import LlamaGenSampler


class LlamaGenFamily:
    """See `protocols.SamplerFamily`."""

    name = "llamagen"
    expected = (
        f"the folder of LlamaGen (text to image), with {' or '.join(files.CHECKPOINTS)}, {tokenizer.NAME}.pt and the "
        f"folder {files.TEXT}"
    )

    def reads(self, path: str) -> bool:
        """See `files.reads`."""
        return files.reads(path)

    def load_sampler(
        self,
        path: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        int8: bool = False,
        computes_on: torch.device | str | None = None,
    ) -> LlamaGenSampler:
        """See `LlamaGenSampler.load`."""
        return LlamaGenSampler.load(path, device=device, dtype=dtype, int8=int8, computes_on=computes_on)

    def load_tokenizer(
        self, path: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> ImageTokenizer:
        """The image tokenizer of a folder.

        Raises:
            ValueError: as `LlamaGenFolder` and its `load_tokenizer`.
        """
        return files.LlamaGenFolder(path).load_tokenizer(device=device, dtype=dtype)

    def published_tokenizer(self) -> ImageTokenizer:
        """The shapes of Janus' own, on the grid of 256 x 256 pixels."""
        return tokenizer.published_tokenizer((16, 16))
