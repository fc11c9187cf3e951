"""The ComfyUI nodes: they convert, call a function of `dcdd_core.pipelines`, and convert back. No other module imports
ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import calibrate, condition, core_models, decode, guidance, inspect, load, model_folders, tokens


class DCDDExtension(ComfyExtension):
    """Every node of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        modules = (load, core_models, tokens, calibrate, condition, decode, guidance, inspect)
        return [node for module in modules for node in module.NODES]


def extension() -> DCDDExtension:
    """Registers the pack's model folders with ComfyUI, and returns the extension with the nodes."""
    model_folders.add_model_folders()
    return DCDDExtension()
