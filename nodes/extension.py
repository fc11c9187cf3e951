"""The list of nodes, as ComfyUI asks for it."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import condition, decode, host, inspect, load, tokens


class DCDDExtension(ComfyExtension):
    """Every node of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*load.NODES, *tokens.NODES, *condition.NODES, *decode.NODES, *inspect.NODES]


def extension() -> DCDDExtension:
    """Makes the pack's model folders known to ComfyUI, and gives the nodes."""
    host.add_model_folders()
    return DCDDExtension()
