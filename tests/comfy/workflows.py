"""Workflow files as ComfyUI's page saves them: are they what the nodes say, and what prompt do they become?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.comfy.graphs import Link, options
from tests.comfy.server import Prompt
from tests.comfy.snapshot import MODEL_FILES, inputs

#: Nodes that exist on the page alone, and nothing runs.
NOTES = {"Note", "MarkdownNote"}
_WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
_CONTROLS = ("fixed", "increment", "decrement", "randomize")
_FILES = {".safetensors", ".sft", ".png", ".jpg"}
_MUTED, _BYPASSED = 2, 4
#: Ids of a subgraph's two ends.
_ENTRANCE, _EXIT = -10, -20


def problems(workflow: dict[str, Any], info: dict[str, Any]) -> list[str]:
    """All that does not fit /object_info: nodes, links, and widgets' values; empty if nothing.

    Model files that are not on this machine do not count.
    """
    subgraphs = workflow.get("definitions", {}).get("subgraphs", [])
    own = {definition["id"]: definition for definition in subgraphs}
    found = [*_in_graph(workflow, info, own)]
    return found + [f"{one['name']}: {problem}" for one in subgraphs for problem in _in_graph(one, info, own)]


def _in_graph(graph: dict[str, Any], info: dict[str, Any], own: dict[str, Any]) -> Iterator[str]:
    nodes = {node["id"]: node for node in graph["nodes"]}
    if len(nodes) < len(graph["nodes"]):
        yield "two nodes have the same id"
    links = [_link(link) for link in graph["links"]]
    for node in graph["nodes"]:
        name = f"node {node['id']} ({node['type']})"
        if node["type"] in NOTES:
            continue
        if node["type"] in own:
            yield from (f"{name}: {problem}" for problem in _in_box(node, own[node["type"]], info))
            continue
        if node["type"] not in info:
            yield f"{name}: there is no such node"
            continue
        yield from (f"{name}: {problem}" for problem in _in_node(node, info[node["type"]]))
    for number, source, slot, target, entry, kind in links:
        name = f"link {number}"
        # The two ends of a subgraph have ids below zero, and are checked by the page.
        if source in nodes:
            outputs = nodes[source].get("outputs", [])
            if slot >= len(outputs) or number not in (outputs[slot]["links"] or ()):
                yield f"{name} is not among those of output {slot} of node {source}"
            elif not _fits(outputs[slot]["type"], kind):
                yield f"{name} of type {kind} comes from {outputs[slot]['type']}"
        elif source >= 0:
            yield f"{name} comes from nowhere"
        if target in nodes:
            entries = nodes[target].get("inputs", [])
            if entry >= len(entries) or entries[entry]["link"] != number:
                yield f"{name} is not that of input {entry} of node {target}"
            elif not _fits(kind, entries[entry]["type"]):
                yield f"{name} of type {kind} goes to {entries[entry]['type']}"
        elif target >= 0:
            yield f"{name} goes nowhere"
    known = {link[0] for link in links}
    for node in graph["nodes"]:
        ends = [entry["link"] for entry in node.get("inputs", [])]
        ends += [link for output in node.get("outputs", []) for link in output["links"] or ()]
        if lost := {end for end in ends if end is not None} - known:
            yield f"node {node['id']} names links that are not there: {sorted(lost)}"


def _in_node(node: dict[str, Any], entry: dict[str, Any]) -> Iterator[str]:
    specs = inputs(entry)
    sockets = {socket["name"]: socket for socket in node.get("inputs", [])}
    for name, socket in sockets.items():
        if name not in specs:
            yield f"it has no input {name}"
        elif not _fits(socket["type"], _type(specs[name])):
            yield f"input {name} is {_type(specs[name])}, not {socket['type']}"
    for name, spec in entry["input"].get("required", {}).items():
        if _type(spec) not in _WIDGETS and (name not in sockets or sockets[name]["link"] is None):
            yield f"nothing is connected to {name}"
    told = [(kind, name) for kind, name in zip(entry["output"], entry["output_name"])]
    # Saved names may be of another version of ComfyUI; types may not. Where a newer one gives its own nodes further
    # outputs, at the end, the page adds them.
    saved, kinds = [output["type"] for output in node.get("outputs", [])], [kind for kind, _ in told]
    if saved != (kinds if node["type"].startswith("DCDD_") else kinds[: len(saved)]):
        yield f"its outputs are {told}"
    values, expected = node.get("widgets_values", []), list(_widgets(specs))
    if len(values) != len(expected):
        yield f"{len(values)} values for {len(expected)} widgets ({', '.join(expected)})"
        return
    for name, value in zip(expected, values):
        of_file = (node["type"], name) in MODEL_FILES or Path(str(value)).suffix in _FILES
        if not of_file and (problem := _refusal(value, specs.get(name))):
            yield f"{name} {problem}"


def _in_box(node: dict[str, Any], definition: dict[str, Any], info: dict[str, Any]) -> Iterator[str]:
    """Of a subgraph's node: are its sockets those of the subgraph, and the widgets that it shows inside?"""
    for way in ("inputs", "outputs"):
        told, meant = ([(end["name"], end["type"]) for end in of[way]] for of in (node, definition))
        if told != meant:
            yield f"its {way} are {meant}"
    insides = {str(inside["id"]): inside["type"] for inside in definition["nodes"]}
    for number, widget in node["properties"].get("proxyWidgets", []):
        known = {*(inputs(info[insides[number]]) if number in insides else ())}
        known |= {"control_after_generate"} if "seed" in known else set()
        if widget not in known:
            yield f"it shows {widget} of node {number}, which is not inside"


def _refusal(value: Any, spec: list | None) -> str | None:
    if spec is None:
        return None if value in (*_CONTROLS, "image") else f"is {value!r}, none of {_CONTROLS}"
    offered, more = options(spec), spec[1] if len(spec) > 1 else {}
    if offered is not None:
        return None if value in offered else f"is {value!r}, none of {offered}"
    types = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}[spec[0]]
    if not isinstance(value, types) or (spec[0] != "BOOLEAN" and isinstance(value, bool)):
        return f"is {value!r}, no {spec[0]}"
    if isinstance(value, (int, float)) and not more.get("min", value) <= value <= more.get("max", value):
        return f"is {value!r}, outside of {more.get('min')}..{more.get('max')}"
    return None


def to_prompt(workflow: dict[str, Any], info: dict[str, Any]) -> Prompt:
    """The prompt that the page would queue; of a workflow without problems and without subgraphs."""
    active = {
        node["id"]: node
        for node in workflow["nodes"]
        if node["type"] not in NOTES and node.get("mode", 0) not in (_MUTED, _BYPASSED)
    }
    links = {number: (str(source), slot) for number, source, slot, *_ in map(_link, workflow["links"])}
    prompt: Prompt = {}
    for number, node in active.items():
        specs = inputs(info[node["type"]])
        values = zip(_widgets(specs), node.get("widgets_values", []))
        given = {name: value for name, value in values if name in specs}
        given |= {one["name"]: links[one["link"]] for one in node.get("inputs", []) if one["link"] is not None}
        prompt[str(number)] = {"class_type": node["type"], "inputs": given}
    return prompt


def opened(blueprint: dict[str, Any], info: dict[str, Any], given: dict[str, Link]) -> tuple[Prompt, dict[str, Link]]:
    """What the page queues for a subgraph blueprint's node: the nodes inside, called OUTSIDE:INSIDE.

    Args:
        given: what its inputs are connected to.

    Returns:
        The prompt, and the node's outputs by name.
    """
    (node,), (definition,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    names = [entry["name"] for entry in definition["inputs"]]

    def inside(link: Link) -> Link:
        source, slot = link
        return given[names[slot]] if source == str(_ENTRANCE) else (f"{node['id']}:{source}", slot)

    prompt = to_prompt(definition, info)
    for step in prompt.values():
        step["inputs"] = {k: inside(v) if isinstance(v, tuple) else v for k, v in step["inputs"].items()}
    exits = [link for link in map(_link, definition["links"]) if link[3] == _EXIT]
    outputs = {definition["outputs"][link[4]]["name"]: inside((str(link[1]), link[2])) for link in exits}
    return {f"{node['id']}:{number}": step for number, step in prompt.items()}, outputs


def missing_files(prompt: Prompt, info: dict[str, Any]) -> list[str]:
    """Files that the prompt's combos name and this server lacks."""
    return [
        str(value)
        for node in prompt.values()
        for name, value in node["inputs"].items()
        if (offered := options(inputs(info[node["class_type"]])[name])) is not None and value not in offered
    ]


def _widgets(specs: dict[str, list]) -> Iterator[str]:
    """Names of the widgets as their values are saved; one that the page adds has no input of its name."""
    for name, spec in specs.items():
        more = spec[1] if len(spec) > 1 else {}
        if _type(spec) in _WIDGETS and not more.get("forceInput"):
            yield name
            # The page gives one to these two names in any case.
            if more.get("control_after_generate") or (spec[0] == "INT" and name in ("seed", "noise_seed")):
                yield f"{name}: control after generate"
            if more.get("image_upload"):
                yield f"{name}: upload"


def _type(spec: list) -> str:
    return "COMBO" if isinstance(spec[0], list) else spec[0]


def _fits(given: str, wanted: str) -> bool:
    return "*" in (given, wanted) or bool(set(given.split(",")) & set(wanted.split(",")))


def _link(link: list | dict) -> tuple:
    """Of a workflow (a list) or a subgraph (named): (id, source, its slot, target, its slot, type)."""
    if isinstance(link, list):
        return tuple(link)
    return tuple(link[k] for k in ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"))
