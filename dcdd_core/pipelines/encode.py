"""Images -> tokens with proxy logits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..protocols import ImageTokenizer
from ..types import TokenLogits
from .host import PLAIN, Host
from .oom import one_by_one


def encode(
    tokenizer: ImageTokenizer,
    pixels: torch.Tensor,
    *,
    on_image: Callable[[int, torch.Tensor], None] | None = None,
    host: Host = PLAIN,
) -> TokenLogits:
    """Proxy logits (Eqs. 9-10) and tokens of images [B, 3, H, W] in -1..1, encoded one by one.

    Args:
        on_image: called with (images done so far, pixels of the latest one).

    Raises:
        ValueError: for sides that are not a multiple of the tokenizer's factor.
        RuntimeError: if an image does not fit into memory.
    """
    memory = tokenizer.working_memory(tokenizer.grid_of(*pixels.shape[2:]))

    def run(k: int) -> TokenLogits:
        host.bring(memory)
        return host.keep(tokenizer.encode(pixels[k : k + 1]))

    parts = []
    for k, part in enumerate(one_by_one(run, len(pixels), host)):
        parts.append(part)
        if on_image is not None:
            on_image(k + 1, pixels[k : k + 1])
    return TokenLogits.joined(parts)


def fitting_size(size: tuple[int, int], factor: int, longest_side: int | None = None) -> tuple[int, int]:
    """The size (H, W) nearest to `size` that is a whole grid of tokens.

    Args:
        factor: pixels per token side.
        longest_side: in pixels; larger images are first shrunk to it. None keeps the size.
    """
    scale = min(1.0, longest_side / max(size)) if longest_side else 1.0
    height, width = (max(factor, round(side * scale / factor) * factor) for side in size)
    return height, width
