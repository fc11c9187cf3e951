"""Numbered blocks of work that a process of its own does before they are needed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Generic, TypeVar

import torch

Made = TypeVar("Made")


class Ahead(Generic[Made]):
    """Calls a function for blocks of work, in a process of its own or here.

    Args:
        make: a module's own function; PyTorch has one thread in the process.
        arguments: of `make`, by the block's number.
        apart: False calls it here, when the result is asked for.
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
        """Has a block made, unless that is under way, or is done here."""
        if self._pool is not None and number not in self._coming:
            self._coming[number] = self._pool.submit(self._make, *self._arguments(number))

    def result(self, number: int) -> Made:
        """Of a block; it is not kept."""
        if self._pool is None:
            return self._make(*self._arguments(number))
        self.ask(number)
        return self._coming.pop(number).result()

    def close(self) -> None:
        """Ends the process."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
