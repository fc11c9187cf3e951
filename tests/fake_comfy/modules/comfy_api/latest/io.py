"""Schemas of nodes. A keyword that ComfyUI's own classes do not take is a TypeError here too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


class _Input:
    """An input of a node; what kinds differ in is which further keywords they take."""

    type = ""
    #: With their defaults.
    keywords: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, id: str, *, optional: bool = False, extra_dict: dict | None = None, **values: Any):
        known = {"display_name": None, "tooltip": None, "lazy": None, **self.keywords}
        if unknown := set(values) - set(known):
            raise TypeError(f"an input of type {self.type} takes no {', '.join(sorted(unknown))}")
        self.id, self.optional, self._extra, self._said = id, optional, extra_dict or {}, {**known, **values}

    def spec(self) -> list:
        """What /object_info says: the type, and all that is set."""
        said = {"dynamicPrompts" if k == "dynamic_prompts" else k: v for k, v in self._said.items() if v is not None}
        return [self.type, said | self._extra]


@dataclass
class _Output:
    id: str | None = None
    display_name: str | None = None
    tooltip: str | None = None
    is_output_list: bool = False
    type = ""


def Custom(name: str, **keywords: Any) -> type:
    """A type with its Input and Output. Of the double alone: its Input's further keywords, with their defaults."""
    both = {
        "Input": type("Input", (_Input,), {"type": name, "keywords": keywords}),
        "Output": type("Output", (_Output,), {"type": name}),
    }
    return type(name, (), both)


_NUMBER = {"default": None, "min": None, "max": None, "step": None, "control_after_generate": None}
_NUMBER |= {"display_mode": None}

Int = Custom("INT", **_NUMBER)
Float = Custom("FLOAT", **_NUMBER, round=None)
Boolean = Custom("BOOLEAN", default=None, label_on=None, label_off=None)
String = Custom("STRING", default=None, multiline=False, placeholder=None, dynamic_prompts=None)
Combo = Custom("COMBO", options=None, default=None, multiselect=False, control_after_generate=None)
Image, Mask, Latent, Vae, Model, Conditioning = map(Custom, ("IMAGE", "MASK", "LATENT", "VAE", "MODEL", "CONDITIONING"))


@dataclass
class Schema:
    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list = field(default_factory=list)
    outputs: list = field(default_factory=list)
    hidden: list = field(default_factory=list)
    description: str = ""
    search_aliases: list[str] = field(default_factory=list)
    is_output_node: bool = False
    is_deprecated: bool = False
    is_experimental: bool = False
    not_idempotent: bool = False

    def info(self, module: str) -> dict[str, Any]:
        """The node's entry of /object_info."""
        parts: dict[str, dict] = {"required": {}, "optional": {}, "hidden": {}}
        for one in self.inputs:
            parts["optional" if one.optional else "required"][one.id] = one.spec()
        if self.is_output_node:
            # The page's own metadata, for the node that ends a graph.
            parts["hidden"] = {"prompt": ["PROMPT"], "extra_pnginfo": ["EXTRA_PNGINFO"]}
        parts = {name: specs for name, specs in parts.items() if specs} or {"required": {}}
        return {
            "input": parts,
            "input_order": {name: list(specs) for name, specs in parts.items()},
            "output": [one.type for one in self.outputs],
            "output_name": [one.display_name or one.type for one in self.outputs],
            "output_tooltips": [one.tooltip for one in self.outputs],
            "name": self.node_id,
            "display_name": self.display_name,
            "description": self.description,
            "category": self.category,
            "output_node": self.is_output_node,
            "python_module": module,
        }


class NodeOutput:
    def __init__(self, *args: Any, ui: dict | None = None):
        self.args, self.ui = args, ui


class _Locked(type):
    def __setattr__(cls, name: str, value: Any) -> None:
        raise AttributeError(f"{cls.__name__} keeps no state: {name} cannot be set while it runs")


class ComfyNode:
    """What nodes derive from: class methods, of which ComfyUI runs those of a locked copy of the class."""

    @classmethod
    def define_schema(cls) -> Schema:
        raise NotImplementedError

    @classmethod
    def execute(cls, **inputs: Any) -> NodeOutput:
        raise NotImplementedError

    @classmethod
    def locked(cls) -> type[ComfyNode]:
        """Of the double alone."""
        return _Locked(cls.__name__, (cls,), {})
