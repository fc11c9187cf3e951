"""Which node is running."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class ExecutionContext:
    prompt_id: str
    node_id: str


_running: ContextVar[ExecutionContext | None] = ContextVar("running", default=None)


def get_executing_context() -> ExecutionContext | None:
    return _running.get()


@contextmanager
def executing(node_id: str) -> Iterator[None]:
    """Of the double alone."""
    token = _running.set(ExecutionContext("double", node_id))
    try:
        yield
    finally:
        _running.reset(token)
