"""The image tokenizer in a Janus folder."""

from __future__ import annotations

from pathlib import Path

import torch

from ..vq import VQTokenizer
from .files import JanusFolder


def load_tokenizer(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> VQTokenizer:
    """The VQ part of a Janus folder, transformers' or DeepSeek's, or of a folder that holds only a `JanusVQVAE`.

    Raises:
        ValueError: as `JanusFolder.tokenizer`.
    """
    found = JanusFolder(folder)
    return VQTokenizer(found.tokenizer(dtype=dtype, device=device), name=found.name)
