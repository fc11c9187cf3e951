"""Batches that are made in smaller parts where memory runs out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from ..types import DCDDWarning

T = TypeVar("T")

#: How allocators without an exception of their own say it: MPS, the CPU's, DirectML's, and CUDA's libraries.
_NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "not enough gpu video memory",
    "alloc_failed",
)


def _warn_of_split(size: int) -> None:
    warnings.warn(f"out of memory: going on with {size} pictures at a time", DCDDWarning, stacklevel=3)


def in_parts(
    run: Callable[[int, int], T],
    count: int,
    *,
    remedy: str = "take a smaller picture, or hold the models in fewer bits",
    on_split: Callable[[int], None] = _warn_of_split,
) -> list[T]:
    """run(0, count), or where that runs out of memory, its halves, down to single items.

    Args:
        run: makes the items first..last - 1; samples do not depend on each other, so the parts are what the whole is.
        remedy: what to do where a single item does not fit.
        on_split: called with the number of items that are tried next, when nothing of the failure is held any more.

    Raises:
        RuntimeError: if a single item does not fit.
    """
    parts, first, size = [], 0, count
    while first < count:
        last = min(first + size, count)
        try:
            parts.append(run(first, last))
            first = last
            continue
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if last - first == 1:
                raise RuntimeError(f"out of memory even for a single picture: {remedy}") from error
        size = (last - first + 1) // 2
        on_split(size)
    return parts


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is an allocator's failure, of any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error).lower() for words in _NO_MEMORY)
