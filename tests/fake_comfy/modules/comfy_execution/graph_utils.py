"""An output that keeps the nodes behind it from running."""

from __future__ import annotations


class ExecutionBlocker:
    def __init__(self, message: str | None):
        """Args: message: what is said on the node that takes the output; None for nothing."""
        self.message = message
