"""The LlamaGen family: which folders belong to it, and how they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ...protocols import ImageTokenizer
from . import captions, files, tokenizer
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
        """Loads the image tokenizer of a folder.

        Raises:
            ValueError: as `LlamaGenFolder` and its `load_tokenizer`.
        """
        return files.LlamaGenFolder(path).load_tokenizer(device=device, dtype=dtype)

    def captions_file(self, path: str) -> Path:
        """See `pipelines.captions.CaptionFamily`."""
        return Path(path) / files.CAPTIONS

    def encode_captions(
        self,
        path: str,
        prompts: Sequence[str],
        file: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        int8: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> tuple[int, int]:
        """See `pipelines.captions.CaptionFamily`.

        Raises:
            ValueError: as `LlamaGenFolder` and its `load_text`, and `captions.add_captions`; for a folder without a
                text encoder, and for int8 without torchao.
        """
        text = files.LlamaGenFolder(path).load_text(dtype=dtype)
        if text is None:
            raise ValueError(
                f"{path} has no folder {files.TEXT}, the text encoder that captions are encoded with: put the files of "
                f"google/{files.TEXT} there"
            )
        if int8:
            text.store_in_int8()
        return captions.add_captions(file, prompts, text, device=device, on_progress=on_progress)

    def published_tokenizer(self) -> ImageTokenizer:
        """A tokenizer of the shapes of Janus' own, on the 16 x 16 grid of 256 x 256 pixels."""
        return tokenizer.published_tokenizer((16, 16))
