"""The server's messages to the page."""

from __future__ import annotations

from collections.abc import Callable


class PromptServer:
    """One instance, which whoever starts the double makes."""

    instance: PromptServer

    def __init__(self, on_text: Callable[[str, str], None]):
        """Args: on_text: called with (node id, text) for each line that a node shows."""
        self._on_text = on_text

    def send_progress_text(self, text: str, node_id: str) -> None:
        self._on_text(node_id, text)
