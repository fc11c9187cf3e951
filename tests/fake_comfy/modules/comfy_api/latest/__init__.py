"""The version 3 schema, as much of it as the pack's nodes speak, and what /object_info says of it."""

from __future__ import annotations

from . import io


class ComfyExtension:
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        raise NotImplementedError


__all__ = ["ComfyExtension", "io"]
