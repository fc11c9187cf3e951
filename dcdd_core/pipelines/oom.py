"""Batches that continue in smaller parts when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from .host import PLAIN, Host

T = TypeVar("T")

#: Messages of allocators that have no exception of their own: MPS, the CPU's, DirectML's, CUDA's libraries, ComfyUI's.
_NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "not enough gpu video memory",
    "alloc_failed",
    "vram grow failed",
    "vram reservation failed",
)


def in_parts(run: Callable[[int, int], T], count: int, host: Host = PLAIN, *, remedy: str | None = None) -> list[T]:
    """run(0, count), or if that runs out of memory, its halves, down to single items.

    Args:
        run: makes the items first..last - 1. Items do not depend on each other, so the parts equal the whole up to
            rounding.
        host: told of each split, after the memory of the failed attempt has been released.
        remedy: what to do if a single item does not fit; the host's by default.

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
                raise RuntimeError(f"out of memory even for a single image: {remedy or host.remedy}") from error
        size = (last - first + 1) // 2
        host.on_split(size)
    return parts


def one_by_one(run: Callable[[int], T], count: int, host: Host = PLAIN, *, remedy: str | None = None) -> Iterator[T]:
    """Yields run(0), run(1), ... run(count - 1), with the host's check before each.

    Raises:
        RuntimeError: if one item does not fit into memory.
    """
    for k in range(count):
        host.check()
        yield from in_parts(lambda *_, k=k: run(k), 1, host, remedy=remedy)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error means that an allocator, on any device, ran out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error).lower() for words in _NO_MEMORY)
