"""Numbered blocks of work, prepared ahead of time in a separate process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Generic, TypeVar

import torch

Made = TypeVar("Made")


class Ahead(Generic[Made]):
    """Calls a function for blocks of work, in a separate process or in this one.

    Args:
        make: a module-level function; in the separate process PyTorch has one thread.
        arguments: block number -> arguments of `make`.
        apart: False calls `make` in this process, when the result is asked for.
    """

    def __init__(self, make: Callable[..., Made], arguments: Callable[[int], tuple[Any, ...]], *, apart: bool = True):
        self._make, self._arguments = make, arguments
        self._pool = None
        if apart:
            self._pool = ProcessPoolExecutor(
                1, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
            )
        self._coming: dict[int, Future[Made]] = {}

    def ask(self, number: int) -> None:
        """Starts making a block in the separate process, unless it is already under way."""
        if self._pool is not None and number not in self._coming:
            self._coming[number] = self._pool.submit(self._make, *self._arguments(number))

    def result(self, number: int) -> Made:
        """The result for a block, waiting for it if needed; it is not kept."""
        if self._pool is None:
            return self._make(*self._arguments(number))
        self.ask(number)
        return self._coming.pop(number).result()

    def close(self) -> None:
        """Ends the separate process."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
