"""Writes the shipped workflows, their thumbnails, and the subgraph blueprint.

    export COMFYUI_DIR=~/ComfyUI COMFYUI_PYTHON=~/comfy-env/bin/python
    python tools/make_workflows.py                             # after a change to a node or a graph
    python tools/make_workflows.py --thumbnails [--only TEXT]  # after a change to the embedded weights

The graphs are the functions at the end of this file. The sockets and widgets of each node, their order and their
defaults come from a running ComfyUI (0.8.0 or newer), which this script starts on the CPU in an empty base directory
with a link to this pack. So after a change to a node's schema, running this again is enough. Links of the wrong type,
unknown inputs, and values outside a list or range are errors.

`--thumbnails` also runs each graph, and saves the image of the node that the graph names as its thumbnail.
`--object-info FILE` reads the nodes from a saved /object_info; no ComfyUI is needed then. `--pack DIR` links another
copy of the pack instead, for example one with other weights. The only dependency is Pillow.

Sizes and positions are in canvas pixels, x to the right and y down. A node's position is its top left corner, below the
title bar.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
#: Name and version: ComfyUI's manager uses them to find the packs that a graph needs.
PACK = re.findall(r'^(?:name|version) = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[
    :2
]
CORE = ["comfy-core", "0.3.64"]
_NAMESPACE = uuid.UUID("5f2a3b0e-6c1d-4b52-9d0e-2603133890aa")

# --- nodes and links --------------------------------------------------------------------------------------------------

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
FIRST = {"color": "#232", "bgcolor": "#353"}
NOTE = {"color": "#432", "bgcolor": "#653"}


class Own(str):
    """A file that the user has to provide: it need not be in ComfyUI's lists."""


@dataclass(frozen=True)
class ModelFile:
    """A public model file, which the frontend offers if it is missing, and the folder in models that it goes into."""

    name: str
    url: str
    directory: str


@dataclass(frozen=True)
class Field:
    """One input of a node's definition."""

    name: str
    type: str
    options: dict[str, Any]
    required: bool

    @property
    def is_widget(self) -> bool:
        return self.type in WIDGET_TYPES and not self.options.get("forceInput")

    @property
    def choices(self) -> list[Any] | None:
        return self.options.get("options") if self.type == "COMBO" else None

    @property
    def default(self) -> Any:
        if "default" in self.options:
            return self.options["default"]
        return self.choices[0] if self.choices else {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(self.type, "")


@dataclass(frozen=True)
class Output:
    """An output to link from."""

    node: Node
    slot: int
    type: str


@dataclass(eq=False)
class Node:
    """A node on the canvas; `node["image"]` is its output called image."""

    id: int
    kind: str
    fields: list[Field]
    outputs: list[tuple[str, str]]
    given: dict[str, Any]
    title: str | None = None
    colors: dict[str, str] = field(default_factory=dict)
    width: int = 0
    height: int = 0
    room: int = 0
    place: tuple[int, int] = (0, 0)
    files: list[ModelFile] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    control: str = "fixed"

    def __getitem__(self, name: str) -> Output:
        for slot, (output, kind) in enumerate(self.outputs):
            if output == name:
                return Output(self, slot, kind)
        raise KeyError(f"{self.kind} has no output {name}, only {', '.join(name for name, _ in self.outputs)}")

    @property
    def sockets(self) -> list[Field]:
        return [f for f in self.fields if not f.is_widget]

    @property
    def widgets(self) -> list[Field]:
        return [f for f in self.fields if f.is_widget]

    @property
    def slots(self) -> list[Field]:
        """In the frontend's order: sockets, then the sockets of widgets."""
        return [*self.sockets, *self.widgets]

    def value(self, widget: Field) -> Any:
        given = self.given.get(widget.name, widget.default)
        return widget.default if isinstance(given, Output) else given

    def widget_values(self) -> list[Any]:
        values = []
        for widget in self.widgets:
            values.append(self.value(widget))
            # What the frontend adds after a widget with one of these options.
            extras = {"control_after_generate": self.control, "image_upload": "image"}
            values += [extra for option, extra in extras.items() if widget.options.get(option)]
        return values


def read_fields(definition: dict[str, Any]) -> list[Field]:
    """The inputs of an /object_info entry."""
    found = []
    for part in ("required", "optional"):
        for name, (kind, *options) in definition["input"].get(part, {}).items():
            options = dict(options[0]) if options else {}
            if isinstance(kind, list):  # the older way to write a combo
                kind, options = "COMBO", {**options, "options": kind}
            found.append(Field(name, kind, options, part == "required"))
    return found


def least_height(node: Node) -> int:
    """The height of a node with its widgets at their smallest, in the renderer that needs more."""
    rows = max(len(node.sockets), len(node.outputs))
    return max(_height_on_canvas(node, rows), _height_in_vue(node, rows))


def _height_on_canvas(node: Node, rows: int) -> int:
    extras = len(node.widget_values()) - len(node.widgets)
    tall = sum(bool(widget.options.get("multiline")) for widget in node.widgets)
    return 6 + 20 * rows + (8 + 24 * (len(node.widgets) + extras) + 30 * tall if node.widgets else 0)


def _height_in_vue(node: Node, rows: int) -> int:
    """Nodes 2.0 of frontend 1.58: widgets have frames, and the badge with the pack's name takes a row."""
    widgets = sum(
        28 if widget.type != "STRING" else 68 if widget.options.get("multiline") else 36 for widget in node.widgets
    )
    badge = 24 if node.kind.startswith("DCDD_") else 0
    return 14 + 20 * rows + widgets + badge


@dataclass(eq=False)
class Group:
    """A coloured frame around vertical stacks of nodes, which are placed side by side."""

    title: str
    colour: str
    stacks: list[list[Node]]
    place: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)


def group(title: str, colour: str, *stacks: list[Node]) -> Group:
    return Group(title, colour, list(stacks))


class Graph:
    """One workflow."""

    def __init__(self, definitions: dict[str, Any], name: str, *, inside: bool = False):
        """
        Args:
            inside: whether it will become a subgraph. Its required sockets may then be unconnected.
        """
        self.definitions, self.name, self.inside = definitions, name, inside
        self.nodes: list[Node] = []
        self.groups: list[Group] = []
        #: The node with the final image, and between which fractions of its width the thumbnail shows it.
        self.thumbnail: Node | None = None
        self.thumbnail_part = (0.0, 1.0)

    def node(
        self,
        kind: str,
        *,
        title: str | None = None,
        wide: int = 0,
        tall: int = 0,
        room: int = 0,
        preview: bool = False,
        first: bool = False,
        files: list[ModelFile] | None = None,
        labels: dict[str, str] | None = None,
        control: str = "fixed",
        **given: Output | Any,
    ) -> Node:
        """
        Args:
            wide, tall: minimum size; the node gets more if its widgets need it.
            room: free space below the node, in pixels, for when it grows.
            preview: whether the frontend shows an image on it.
            first: whether users should change this node first. It is drawn in green.
            files: model files that the node loads.
            labels: what widgets are called instead of their names.
            control: what happens to the seed after a run.
            given: links (outputs) and widget values; other widgets keep their defaults.
        """
        if kind not in self.definitions:
            raise KeyError(f"this ComfyUI has no node {kind}")
        definition = self.definitions[kind]
        outputs = list(zip(definition["output_name"], definition["output"]))
        node = Node(len(self.nodes) + 1, kind, read_fields(definition), outputs, given, title, FIRST if first else {})
        _check(node, whole=not self.inside)
        least = least_height(node) + (PREVIEW if preview else 0)
        node.width, node.height, node.room = max(wide, 210), max(tall, least), room
        node.files, node.labels, node.control = files or [], labels or {}, control
        self.nodes.append(node)
        return node

    def note(self, text: str, wide: int = 360) -> Node:
        """A MarkdownNote that is as tall as its text."""
        text = _unwrapped(text)
        node = Node(len(self.nodes) + 1, "MarkdownNote", [], [], {"text": text}, "About this workflow", NOTE)
        node.width, node.height = wide, _text_height(text, wide)
        self.nodes.append(node)
        return node

    def columns(self, *columns: list[Group | Node]) -> None:
        """Lays out the graph: columns from left to right, each with groups and single nodes from top to bottom."""
        x = 0
        for column in columns:
            frames = [part if isinstance(part, Group) else Group("", "", [[part]]) for part in column]
            wide, y = max(_extent(frame)[0] for frame in frames), 0
            for frame in frames:
                frame.place, frame.size = (x, y), (wide, _extent(frame)[1])
                _settle(frame)
                y += frame.size[1] + GUTTER
            self.groups += [frame for frame in frames if frame.title]
            x += wide + GUTTER
        placed = {node.id for column in columns for part in column for node in _nodes_in(part)}
        lost = [node.kind for node in self.nodes if node.id not in placed]
        if lost:
            raise ValueError(f"{self.name}: {', '.join(lost)} are in no column")

    # -- file formats

    def links(self) -> list[tuple[int, Output, Node, int]]:
        """(link id, source output, target node, target slot)."""
        ends = (
            (node.given[slot.name], node, number)
            for node in self.nodes
            for number, slot in enumerate(node.slots)
            if isinstance(node.given.get(slot.name), Output)
        )
        return [(k + 1, *end) for k, end in enumerate(ends)]

    def workflow(self) -> dict[str, Any]:
        """The graph in the frontend's format."""
        links = self.links()
        return {
            "id": _uuid(self.name),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(links),
            "nodes": [_node_json(node, links) for node in self.nodes],
            "links": [[k, out.node.id, out.slot, node.id, slot, out.type] for k, out, node, slot in links],
            "groups": [_group_json(k + 1, group) for k, group in enumerate(self.groups)],
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def prompt(self, target: Node) -> dict[str, Any]:
        """The nodes that `target` depends on, in the server's API format."""
        wanted, todo = set(), [target]
        while todo:
            node = todo.pop()
            wanted.add(node.id)
            todo += [value.node for value in node.given.values() if isinstance(value, Output)]
        prompt = {}
        for node in self.nodes:
            if node.id in wanted:
                inputs: dict[str, Any] = {widget.name: node.value(widget) for widget in node.widgets}
                for name, value in node.given.items():
                    inputs[name] = [str(value.node.id), value.slot] if isinstance(value, Output) else value
                prompt[str(node.id)] = {"class_type": node.kind, "inputs": inputs}
        return prompt


def _check(node: Node, whole: bool) -> None:
    """Raises if the node would not run: unknown inputs, wrong types, values out of range, missing links."""
    known = {f.name: f for f in node.fields}
    for name, value in node.given.items():
        if name not in known:
            raise KeyError(f"{node.kind} has no input {name}, only {', '.join(known)}")
        f = known[name]
        if isinstance(value, Output):
            if f.type not in ("*", value.type) and value.type not in f.type.split(","):
                raise TypeError(f"{node.kind}.{name} takes {f.type}, got {value.type} of {value.node.kind}")
        elif not f.is_widget:
            raise TypeError(f"{node.kind}.{name} is a socket, got {value!r}")
        elif f.choices is not None and value not in f.choices and not isinstance(value, Own):
            raise ValueError(f"{node.kind}.{name} got {value!r}, not one of {f.choices}")
        elif f.type in ("INT", "FLOAT") and not f.options.get("min", value) <= value <= f.options.get("max", value):
            raise ValueError(f"{node.kind}.{name} got {value}, out of its range")
    missing = [f.name for f in node.sockets if f.required and f.name not in node.given]
    if whole and missing:
        raise ValueError(f"{node.kind} lacks {', '.join(missing)}")


def _uuid(name: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, name))


def _node_json(node: Node, links: list[tuple[int, Output, Node, int]]) -> dict[str, Any]:
    into = {(end.id, slot): k for k, _, end, slot in links}
    inputs = []
    for number, f in enumerate(node.slots):
        entry: dict[str, Any] = {"name": f.name, "type": f.type, "link": into.get((node.id, number))}
        entry |= {} if f.required or f.is_widget else {"shape": 7}  # drawn as a ring: an optional socket
        entry |= {"label": node.labels[f.name]} if f.name in node.labels else {}
        inputs.append(entry | ({"widget": {"name": f.name}} if f.is_widget else {}))
    outputs = [
        {"name": name, "type": kind, "links": [k for k, out, _, _ in links if (out.node, out.slot) == (node, slot)]}
        for slot, (name, kind) in enumerate(node.outputs)
    ]
    written: dict[str, Any] = {
        "id": node.id,
        "type": node.kind,
        "pos": list(node.place),
        "size": [node.width, node.height],
        "flags": {},
        "order": node.id - 1,  # nodes are created after the nodes that they link from
        "mode": 0,
        "inputs": inputs,
        "outputs": outputs,
    }
    if node.title:
        written["title"] = node.title
    if node.kind == "MarkdownNote":
        written |= {"properties": {}, "widgets_values": [node.given["text"]]}
    else:
        pack, version = PACK if node.kind.startswith("DCDD_") else CORE
        written["properties"] = {"cnr_id": pack, "ver": version, "Node name for S&R": node.kind}
        if node.files:
            written["properties"]["models"] = [asdict(file) for file in node.files]
        written["widgets_values"] = node.widget_values()
    return written | node.colors


# --- layout -----------------------------------------------------------------------------------------------------------

GUTTER, PAD, BETWEEN, TITLE, HEAD = 40, 20, 28, 30, 44
#: Minimum height in pixels, measured with Nodes 2.0, of a preview (reserved on the node) and of a notice (below it).
PREVIEW, NOTICE = 232, 70


def _nodes_in(part: Group | Node) -> list[Node]:
    return [part] if isinstance(part, Node) else [node for stack in part.stacks for node in stack]


def _inset(frame: Group) -> tuple[int, int]:
    """Padding of the frame: at its sides, and above the first title bar."""
    return (PAD, HEAD) if frame.title else (0, HEAD)


def _extent(frame: Group) -> tuple[int, int]:
    side, head = _inset(frame)
    widths = [max(node.width for node in stack) for stack in frame.stacks]
    heights = [sum(TITLE + node.height + node.room + BETWEEN for node in stack) - BETWEEN for stack in frame.stacks]
    return sum(widths) + GUTTER * (len(widths) - 1) + 2 * side, max(heights) + head + PAD


def _settle(frame: Group) -> None:
    """Places a frame's nodes. All nodes of a stack get the same width, and the last stack gets the remaining width."""
    side, head = _inset(frame)
    x = frame.place[0] + side
    for k, stack in enumerate(frame.stacks):
        last = k == len(frame.stacks) - 1
        width = frame.place[0] + frame.size[0] - side - x if last else max(node.width for node in stack)
        y = frame.place[1] + head
        for node in stack:
            node.place, node.width = (x, y + TITLE), width
            y += TITLE + node.height + node.room + BETWEEN
        x += width + GUTTER


def _group_json(number: int, group: Group) -> dict[str, Any]:
    return {
        "id": number,
        "title": group.title,
        "bounding": [*group.place, *group.size],
        "color": group.colour,
        "font_size": 24,
        "flags": {},
    }


def _unwrapped(text: str) -> str:
    """Markdown with each paragraph and list item on one line."""
    lines: list[str] = []
    for line in (line.strip() for line in text.strip().splitlines()):
        starts = not line or line.startswith(("#", "-")) or not lines or not lines[-1] or lines[-1].startswith("#")
        if starts:
            lines.append(line)
        else:
            lines[-1] += f" {line}"
    return "\n".join(lines)


def _text_height(text: str, width: int) -> int:
    """Height of unwrapped Markdown in a note, in Nodes 2.0 of frontend 1.35: the largest of the tested renderers."""
    height = 60
    for line in text.splitlines():
        size, space = (18, 14) if line.startswith("# ") else (14, 26) if line.startswith("## ") else (11, 0)
        indent = 0
        if line.startswith("- "):
            indent, space = 40, 8
        rows = math.ceil(len(line) * size * 0.48 / (width - 40 - indent))
        height += round(1.6 * size * rows) + (space if line else 10)
    return height


# --- the subgraph blueprint -------------------------------------------------------------------------------------------

_INSIDE_IN, _INSIDE_OUT = -10, -20


def blueprint(
    graph: Graph, description: str, sockets: dict[str, list[tuple[Node, str]]], results: dict[str, Output], shown: list
) -> dict[str, Any]:
    """Wraps a graph in a single node.

    Args:
        sockets: its inputs, each with the (node, input) pairs inside that it connects to.
        results: its outputs.
        shown: (node, widget) pairs of the widgets to show on it.
    """
    inner = graph.workflow()
    links = [
        {"id": k, "origin_id": a, "origin_slot": i, "target_id": b, "target_slot": j, "type": kind}
        for k, a, i, b, j, kind in inner["links"]
    ]
    by_id = {node["id"]: node for node in inner["nodes"]}
    left, right = -240, max(node.place[0] + node.width for node in graph.nodes) + 140

    def connect(origin: tuple[int, int], target: tuple[int, int], kind: str) -> int:
        ends = zip(("origin_id", "origin_slot", "target_id", "target_slot"), (*origin, *target))
        links.append({"id": len(links) + 1, **dict(ends), "type": kind})
        return len(links)

    inputs, outputs = [], []
    for k, (name, ends) in enumerate(sockets.items()):
        kind, ids = "", []
        for node, socket_name in ends:
            slot, f = next((s, f) for s, f in enumerate(node.slots) if f.name == socket_name)
            kind = f.type
            ids.append(connect((_INSIDE_IN, k), (node.id, slot), kind))
            by_id[node.id]["inputs"][slot]["link"] = ids[-1]
        place = [left + 100, 100 + 20 * k]
        inputs.append({"id": _uuid(f"in {name}"), "name": name, "type": kind, "linkIds": ids, "pos": place})
    for k, (name, out) in enumerate(results.items()):
        ids = [connect((out.node.id, out.slot), (_INSIDE_OUT, k), out.type)]
        by_id[out.node.id]["outputs"][out.slot]["links"] += ids
        place = [right + 20, 100 + 20 * k]
        outputs.append({"id": _uuid(f"out {name}"), "name": name, "type": out.type, "linkIds": ids, "pos": place})

    definition = {
        "id": _uuid(f"definition of {graph.name}"),
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": len(graph.nodes), "lastLinkId": len(links), "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": graph.name,
        "inputNode": {"id": _INSIDE_IN, "bounding": [left, 80, 120, 40 + 20 * len(inputs)]},
        "outputNode": {"id": _INSIDE_OUT, "bounding": [right, 80, 120, 40 + 20 * len(outputs)]},
        "inputs": inputs,
        "outputs": outputs,
        "widgets": [],
        "nodes": inner["nodes"],
        "groups": inner["groups"],
        "links": links,
        "extra": {},
    }
    outside = {
        "id": 1,
        "type": definition["id"],
        "pos": [0, 0],
        "size": [400, 620],  # has room for the preview
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [{"name": entry["name"], "type": entry["type"], "link": None} for entry in inputs],
        "outputs": [{"name": entry["name"], "type": entry["type"], "links": []} for entry in outputs],
        "title": graph.name,
        "properties": {
            "proxyWidgets": [[str(node.id), widget] for node, widget in shown],
            "cnr_id": PACK[0],
            "ver": PACK[1],
        },
        "widgets_values": [],
    }
    return {
        "id": _uuid(graph.name),
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [outside],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [definition]},
        "extra": {"BlueprintDescription": description},
    }


# --- ComfyUI ----------------------------------------------------------------------------------------------------------


@contextmanager
def running(comfyui: Path, python: str, pack: Path) -> Iterator[str]:
    """Starts ComfyUI in a temporary base directory and yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="workflows_") as base:
        (Path(base) / "custom_nodes").mkdir()
        (Path(base) / "custom_nodes" / "ComfyUI-DCDD").symlink_to(pack.resolve(), target_is_directory=True)
        flags = ["--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", base]
        flags += ["--database-url", "sqlite:///:memory:", "--disable-api-nodes", "--disable-auto-launch"]
        log = Path(base) / "log.txt"
        with log.open("wb") as to:
            server = subprocess.Popen([python, str(comfyui / "main.py"), *flags], cwd=base, stdout=to, stderr=to)
        try:
            url, patience = f"http://127.0.0.1:{port}", time.monotonic() + 900
            while True:
                try:
                    ask(url, "/system_stats")
                    break
                except OSError:
                    if server.poll() is not None or time.monotonic() > patience:
                        raise SystemExit(f"ComfyUI did not start:\n{log.read_text()[-3000:]}") from None
                    time.sleep(1)
            yield url
        finally:
            server.terminate()
            server.wait(60)


def ask(url: str, path: str, body: Any = None) -> Any:
    """GET, or POST if there is a body. Decodes a JSON answer and returns any other as bytes."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        raw = answer.read()
        return json.loads(raw) if "json" in answer.headers.get("Content-Type", "") else raw


def result_of(url: str, graph: Graph) -> Image.Image:
    """Runs a graph up to its thumbnail node and returns the image.

    Raises:
        RuntimeError: the run fails; with ComfyUI's message.
    """
    assert graph.thumbnail is not None
    try:
        run = ask(url, "/prompt", {"prompt": graph.prompt(graph.thumbnail)})["prompt_id"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{graph.name}: {error.read().decode()[:2000]}") from error
    while run not in (history := ask(url, f"/history/{run}")):
        time.sleep(0.5)
    found = history[run]
    if found["status"]["status_str"] != "success":
        raise RuntimeError(f"{graph.name}: {found['status']['messages'][-1]}")
    first = found["outputs"][str(graph.thumbnail.id)]["images"][0]
    query = urllib.parse.urlencode({key: first[key] for key in ("filename", "subfolder", "type")})
    return Image.open(io.BytesIO(ask(url, f"/view?{query}"))).convert("RGB")


def thumbnail(image: Image.Image, part: tuple[float, float], side: int = 400) -> Image.Image:
    """Scales a part of an image to fit a square, on the background colour of the comparison sheets."""
    left, right = (round(end * image.width) for end in part)
    image = image.crop((left, 0, right, image.height))
    scale = side / max(image.size)
    size = [round(length * scale) for length in image.size]
    square = Image.new("RGB", (side, side), (250, 249, 246))
    square.paste(image.resize(size, Image.Resampling.LANCZOS), ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


# --- the workflows ----------------------------------------------------------------------------------------------------

MODELS, IMAGE, TOKENS, CONDITION, DECODE, COMPARE = "#3f789e", "#b58b2a", "#a1309b", "#8A8", "#b06634", "#8AA"
PROMPT = "a large striped red heart in the centre on a wavy sky ground"
#: Side of the embedded models' images in pixels.
SIDE = 96


#: FLUX.1-dev's files: those that ComfyUI's own templates link to, which need no account.
FLUX_DEV = ModelFile(
    "flux1-dev.safetensors",
    "https://huggingface.co/Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors",
    "diffusion_models",
)
FLUX_VAE = ModelFile(
    "ae.safetensors",
    "https://huggingface.co/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors",
    "vae",
)
_ENCODERS = "https://huggingface.co/comfyanonymous/flux_text_encoders/resolve/main"
CLIP_L, T5 = (
    ModelFile(name, f"{_ENCODERS}/{name}", "text_encoders")
    for name in ("clip_l.safetensors", "t5xxl_fp8_e4m3fn.safetensors")
)


def load_janus(graph: Graph, model: str = "pico (built in)") -> Node:
    return graph.node("DCDD_LoadJanus", wide=310, model=model)


def load_decoder(graph: Graph) -> Node:
    return graph.node("DCDD_LoadDecoder", wide=310)


def sampler(graph: Graph, janus: Node, **given: Any) -> Node:
    """Leaves room for the preview on and below it: in Nodes 2.0 the prompt widget does not shrink for a preview."""
    given = {"prompt": PROMPT, "seed": 1, "first": True, **given}
    return graph.node("DCDD_JanusLogitSampler", janus=janus["janus"], wide=400, preview=True, room=PREVIEW, **given)


def sampler_in_passes(graph: Graph, janus: Node, **given: Any) -> Node:
    """Leaves room as `sampler` does."""
    given = {"prompt": PROMPT, "seed": 1, "first": True, **given}
    return graph.node(
        "DCDD_ProgressiveTokenSampler", janus=janus["janus"], wide=400, preview=True, room=PREVIEW, **given
    )


def lcdm(graph: Graph, logits: Output, vq_vae: Output, decoder: Node | None = None) -> Node:
    linked = {} if decoder is None else {"decoder": decoder["decoder"]}
    return graph.node("DCDD_LCDMEncoder", wide=310, room=NOTICE, token_logits=logits, vq_vae=vq_vae, **linked)


def uncertainty_mask(graph: Graph, condition: Node, **given: Any) -> Node:
    return graph.node("DCDD_UncertaintyMask", wide=310, condition=condition["condition"], **given)


def encode(graph: Graph, vq_vae: Output, image: Output, **given: Any) -> Node:
    return graph.node("DCDD_VQVAEEncode", wide=310, preview=True, vq_vae=vq_vae, image=image, **given)


def vq_decode(graph: Graph, logits: Output, vq_vae: Output, **given: Any) -> Node:
    given = {"wide": 340, "preview": True, **given}
    return graph.node("DCDD_VQVAEDecode", token_logits=logits, vq_vae=vq_vae, **given)


def paint(graph: Graph, decoder: Node, condition: Node, **given: Any) -> Node:
    return graph.node(
        "DCDD_FluxDecoder",
        wide=340,
        preview=True,
        decoder=decoder["decoder"],
        condition=condition["condition"],
        **given,
    )


def compare(graph: Graph, captions: str | Output = "", **images: Output | str) -> Node:
    """A Compare Decoders node. `images` holds images by the letter of their column, and labels as label_LETTER."""
    given = {f"image_{key}" if len(key) == 1 else key: value for key, value in images.items()}
    return graph.node("DCDD_CompareDecoders", wide=420, captions=captions, **given)


def save(graph: Graph, image: Output, name: str, title: str, wide: int = 340, tall: int = 330) -> Node:
    given = {"images": image, "filename_prefix": f"DCDD/{name}"}
    return graph.node("SaveImage", title=title, wide=wide, tall=tall, preview=True, **given)


def preview(graph: Graph, image: Output, title: str, wide: int = 310, tall: int = 300) -> Node:
    return graph.node("PreviewImage", title=title, wide=wide, tall=tall, preview=True, images=image)


def side_by_side(
    graph: Graph, note: Node, *, who: str, prefix: str, model: str = "pico (built in)", pictures: bool = False
) -> None:
    """Two images of a prompt by both decoders, and where the model was unsure.

    Args:
        who: the model in words.
        model: the model to choose in Load Janus.
        pictures: saves the images of the diffusion decoder too, without captions.
    """
    janus, decoder = load_janus(graph, model), load_decoder(graph)
    sampled = sampler(graph, janus, batch_size=2)
    condition = lcdm(graph, sampled["token_logits"], janus["vq_vae"], decoder)
    mask = uncertainty_mask(graph, condition)
    by_vq = vq_decode(graph, sampled["token_logits"], janus["vq_vae"])
    painted = paint(graph, decoder, condition)
    sheet = compare(
        graph,
        "sampler seed 1\nsampler seed 2",
        a=by_vq["image"],
        b=painted["image"],
        c=mask["heat_map"],
        label_c=f"where {who} was unsure (bright)",
    )
    saved = [save(graph, painted["image"], "picture", "Save the images")] if pictures else []
    graph.thumbnail = save(graph, sheet["image"], prefix, "Save the comparison", wide=800, tall=700)
    graph.columns(
        [note, group("Models", MODELS, [janus, decoder])],
        [group("Tokens", TOKENS, [sampled]), group("Condition", CONDITION, [condition, mask])],
        [group("Decode", DECODE, [by_vq, painted, *saved])],
        [group("Compare", COMPARE, [sheet, graph.thumbnail])],
    )


def both_decoders(graph: Graph) -> None:
    note = graph.note("""
        # Text to image, both decoders
        Janus samples an image token by token. Its own **VQ-VAE** decoder gets only the sampled tokens. The **FLUX
        decoder** also gets how certain Janus was at each position, and which other tokens it considered. This workflow
        decodes the same tokens with both.

        Press **Run**: it works as it is, with *pico*, the tiny models that come with the pack.
        ## Change first
        - the **prompt** (green). pico knows the words of one small world: shapes, colours, patterns, places, grounds
        - the sampler's **seed**, for another image
        - the decoder's **seed**, for other details from the same tokens
        ## With real models
        - *Load Janus*: Janus-Pro, in models/janus (the node *Download Model* fetches it)
        - *Load DCDD Decoder*: a bundle that you trained (none is published; workflow 8 needs none), FLUX.1-Fill,
        ae.safetensors
    """)
    side_by_side(graph, note, who="Janus", prefix="both decoders", pictures=True)


def reconstruct(graph: Graph) -> None:
    note = graph.note("""
        # Reconstruct an image
        An image is turned into tokens and decoded by both decoders, beside the original. It shows what each decoder
        loses, without any prompt.

        **Pico Scene** renders three images that were held out from training, so no file is needed.
        ## Change first
        - **your own image**: add a *Load Image*, connect its IMAGE to *image* of **VQ-VAE Encode**, and delete *Pico
        Scene*
        - the scene's **seed** (green), for other images
        ## With real models
        - *Load VQ-VAE*: the folder of Janus-Pro; its language model is not loaded
        - *Load DCDD Decoder*: a bundle that you trained (none is published; workflow 8 needs none), FLUX.1-Fill,
        ae.safetensors
    """)
    scene = graph.node("DCDD_PicoScene", wide=310, seed=4, size=SIDE, batch_size=3, first=True)
    vq_vae, decoder = graph.node("DCDD_LoadVQVAE", wide=310), load_decoder(graph)
    tokens = encode(graph, vq_vae["vq_vae"], scene["image"])
    condition = lcdm(graph, tokens["token_logits"], vq_vae["vq_vae"], decoder)
    by_vq = vq_decode(graph, tokens["token_logits"], vq_vae["vq_vae"])
    painted = paint(graph, decoder, condition)
    sheet = compare(
        graph,
        scene["caption"],
        a=tokens["image"],
        b=by_vq["image"],
        c=painted["image"],
        label_a="the truth",
        label_b="VQ-VAE decode",
        label_c="DCDD decode",
        side=256,
    )
    graph.thumbnail = save(graph, sheet["image"], "reconstructed", "Save the comparison", wide=720, tall=840)
    graph.columns(
        [note],
        [group("Image", IMAGE, [scene]), group("Models", MODELS, [vq_vae, decoder])],
        [group("Tokens", TOKENS, [tokens]), group("Condition", CONDITION, [condition])],
        [group("Decode", DECODE, [by_vq, painted])],
        [group("Compare", COMPARE, [sheet, graph.thumbnail])],
    )


def upscale(graph: Graph) -> None:
    note = graph.note("""
        # Decode, then upscale
        The FLUX decoder's image goes on into ComfyUI's own nodes like any other: here it is enlarged six times and
        sharpened, beside the VQ-VAE's image with the same treatment.

        Enlarging shows how each decoder renders edges and stripes: blur stays blur.
        ## Change first
        - the **prompt** and **scale_by** (green)
        - with an upscale model in models/upscale_models: replace both nodes with *Upscale Image (using Model)*
        - the decoder's *latent* output is a FLUX latent (pico has none): *Upscale Latent* and a *KSampler* work on it
        too
        ## With real models
        - *Load Janus*: Janus-Pro
        - *Load DCDD Decoder*: a bundle that you trained (none is published; workflow 8 needs none), FLUX.1-Fill,
        ae.safetensors
        - *scale_by* 2 gives 768 pixels from Janus' 384
    """)
    janus, decoder = load_janus(graph), load_decoder(graph)
    sampled = sampler(graph, janus, prompt="a large checked blue star in the centre on a lined cream ground", seed=3)
    condition = lcdm(graph, sampled["token_logits"], janus["vq_vae"], decoder)
    painted = paint(graph, decoder, condition)
    by_vq = vq_decode(graph, sampled["token_logits"], janus["vq_vae"])
    enlarging = {"upscale_method": "lanczos", "scale_by": 6.0, "wide": 310}
    sharpening = {"sharpen_radius": 3, "sigma": 1.5, "alpha": 0.5, "wide": 310}
    large = graph.node("ImageScaleBy", first=True, image=painted["image"], **enlarging)
    sharp = graph.node("ImageSharpen", image=large["IMAGE"], **sharpening)
    large_vq = graph.node("ImageScaleBy", title="Upscale Image By (VQ-VAE)", image=by_vq["image"], **enlarging)
    sharp_vq = graph.node("ImageSharpen", title="Image Sharpen (VQ-VAE)", image=large_vq["IMAGE"], **sharpening)
    graph.thumbnail = save(graph, sharp["IMAGE"], "upscaled", "Save the FLUX decoder's image", wide=600, tall=660)
    beside = preview(graph, sharp_vq["IMAGE"], "The VQ-VAE's image, to compare", tall=460)
    graph.columns(
        [note, group("Models", MODELS, [janus, decoder])],
        [group("Tokens", TOKENS, [sampled]), group("Condition", CONDITION, [condition])],
        [group("Decode", DECODE, [painted, by_vq])],
        [group("Upscale", IMAGE, [large, sharp, large_vq, sharp_vq])],
        [group("Compare", COMPARE, [graph.thumbnail, beside])],
    )


def repaint(graph: Graph) -> None:
    note = graph.note("""
        # Repaint where Janus was uncertain
        The **Uncertainty Mask** is white where Janus hesitated between many tokens. There the FLUX decoder paints again
        from other noise; all other pixels stay exactly as they are.
        ## Change first
        - **threshold** (green): a lower value repaints more
        - the **second decoder's seed**: another attempt at the uncertain parts
        - *grow* and *blur*: how far the new parts reach, and how softly they blend in
        - any other mask works too: draw one on the image with *Open in MaskEditor*
        ## With real models
        - *Load Janus*: Janus-Pro
        - *Load DCDD Decoder*: a bundle that you trained (none is published; workflow 8 needs none), FLUX.1-Fill,
        ae.safetensors
        - *threshold*: choose it by the *heat_map* of *Uncertainty Mask*; Janus-Pro is less certain than pico
    """)
    janus, decoder = load_janus(graph), load_decoder(graph)
    sampled = sampler(
        graph,
        janus,
        prompt="a large dotted green ring in the centre on a woven rose ground",
        seed=5,
        batch_size=2,
        first=False,
    )
    condition = lcdm(graph, sampled["token_logits"], janus["vq_vae"], decoder)
    before = paint(graph, decoder, condition, title="First decode", seed=0)
    mask = uncertainty_mask(graph, condition, image=before["image"], edge="hard", threshold=0.6, blur=0.3, first=True)
    shown = graph.node("MaskToImage", mask=mask["mask"])
    after = paint(
        graph,
        decoder,
        condition,
        title="Second decode, under the mask",
        seed=1,
        image=before["image"],
        mask=mask["mask"],
    )
    sheet = compare(
        graph,
        a=before["image"],
        b=shown["IMAGE"],
        c=after["image"],
        label_a="before",
        label_b="unsure: painted again where white",
        label_c="after",
    )
    graph.thumbnail = save(graph, sheet["image"], "repainted", "Save the comparison", wide=760, tall=660)
    graph.columns(
        [note, group("Models", MODELS, [janus, decoder])],
        [group("Tokens", TOKENS, [sampled]), group("Condition", CONDITION, [condition])],
        [group("Decode", DECODE, [before]), group("Mask", IMAGE, [mask, shown])],
        [group("Decode again", DECODE, [after])],
        [group("Compare", COMPARE, [sheet, graph.thumbnail])],
    )


def look_inside(graph: Graph) -> None:
    note = graph.note("""
        # Look inside: logits and their calibration
        The decoder is trained on images, not on Janus' output. An image's **proxy logits** (how close each patch is to
        each code) are almost uniform; after **calibration** they are about as confident as Janus' own. The sheet shows
        the paper's Table 1 and Figure 6 for four sets of logits:
        - **Janus**: sampled from the prompt
        - **proxies**: of Pico Scenes, uncalibrated
        - **decoder's**: calibrated as in the decoder's training
        - **fitted here**: a calibration fitted to these very images, and saved

        The uncalibrated proxies give a flat line; calibrated they come close to Janus' curve.
        ## Change first
        - **batch_size** of both (green): 100 images give a good calibration, 16 a quick one
        - the **prompt**: a calibration holds for images of its kind; many different prompts are best
        - the **name** of the file; *Load Calibration* loads it again
        ## With real models
        - *Load Janus*: Janus-Pro
        - your own images in place of *Pico Scene*
        - *Load DCDD Decoder*: a bundle that you trained (none is published)
    """)
    janus, decoder = load_janus(graph), load_decoder(graph)
    scenes = graph.node("DCDD_PicoScene", wide=310, seed=100, size=SIDE, batch_size=16, first=True)
    sampled = sampler(graph, janus, seed=1, batch_size=16)
    proxies = encode(graph, janus["vq_vae"], scenes["image"])
    shared = {"token_logits": proxies["token_logits"], "vq_vae": janus["vq_vae"], "wide": 340}
    known = graph.node("DCDD_LogitCalibrator", title="Calibrate as the decoder", decoder=decoder["decoder"], **shared)
    fitted = graph.node(
        "DCDD_LogitCalibrator", title="Fit to Janus", room=NOTICE, reference=sampled["token_logits"], **shared
    )
    saved = graph.node("DCDD_SaveCalibration", wide=340, calibration=fitted["calibration"], name="pico, fitted")
    sheet = graph.node(
        "DCDD_LogitStatistics",
        wide=420,
        token_logits=sampled["token_logits"],
        token_logits_b=proxies["token_logits"],
        token_logits_c=known["token_logits"],
        token_logits_d=fitted["token_logits"],
        names="Janus, proxies, decoder's, fitted here",
    )
    graph.thumbnail = save(graph, sheet["image"], "logits", "Save the sheet", wide=900, tall=420)
    graph.thumbnail_part = (0.535, 1.0)  # only the curve: the table would be too small to read
    graph.columns(
        [note],
        [group("Models", MODELS, [janus, decoder]), group("Image", IMAGE, [scenes])],
        [group("Tokens", TOKENS, [sampled, proxies])],
        [
            group("Calibrate", CONDITION, [known, fitted], [saved]),
            group("Compare", COMPARE, [sheet, graph.thumbnail]),
        ],
    )


def edit(graph: Graph) -> None:
    note = graph.note("""
        # Edit: keep tokens, sample the rest again
        The second sampler keeps every token outside the mask and samples the others from **another prompt**. Janus
        reads the kept tokens as it goes, so the new part fits its surroundings.
        ## Change first
        - the **second prompt** (green)
        - its **seed**, for another attempt
        - the **mask**: *x*, *y* and the size of the white box. Every token that it touches is sampled again
        - to edit an image of your own: *Load Image*, *Upscale Image* to the model's size (pico: 96 x 96, Janus-Pro: 384
        x 384; crop *center*), *VQ-VAE Encode*, *Logit Calibrator* into *token_logits*, and the mask that you draw with
        *Open in MaskEditor*; it is cropped as the image is
        ## With real models
        - *Load Janus*: Janus-Pro
        - *Load DCDD Decoder*: a bundle that you trained (none is published; workflow 8 needs none), FLUX.1-Fill,
        ae.safetensors
    """)
    janus, decoder = load_janus(graph), load_decoder(graph)
    black = graph.node("SolidMask", title="Keep everything (black)", wide=225, value=0.0, width=384, height=384)
    white = graph.node("SolidMask", title="except this box (white)", wide=225, value=1.0, width=256, height=256)
    mask = graph.node(
        "MaskComposite", wide=225, destination=black["MASK"], source=white["MASK"], x=64, y=64, operation="add"
    )
    shown = graph.node("MaskPreview", title="Sampled again (white)", wide=225, preview=True, mask=mask["MASK"])
    first = sampler(graph, janus, batch_size=2, first=False)
    second = sampler(
        graph,
        janus,
        prompt="a large checked purple star in the centre on a wavy sky ground",
        seed=11,
        batch_size=2,
        token_logits=first["token_logits"],
        mask=mask["MASK"],
    )
    conditions = [lcdm(graph, s["token_logits"], janus["vq_vae"], decoder) for s in (first, second)]
    titles = ("Decode the first image", "Decode the edit")
    before, after = (paint(graph, decoder, condition, title=title) for condition, title in zip(conditions, titles))
    sheet = compare(
        graph, a=before["image"], b=after["image"], label_a="the first prompt", label_b="the second, under the mask"
    )
    graph.thumbnail = save(graph, sheet["image"], "edited", "Save the comparison", wide=640, tall=760)
    graph.columns(
        [note, group("Models", MODELS, [janus, decoder])],
        [
            group("First image", TOKENS, [first]),
            group("Where to edit", IMAGE, [black, white], [mask, shown]),
        ],
        [group("The edit", TOKENS, [second]), group("Condition", CONDITION, conditions)],
        [group("Decode", DECODE, [before, after])],
        [group("Compare", COMPARE, [sheet, graph.thumbnail])],
    )


def guide_latent(graph: Graph, sampled: Node, janus: Node, model: Output, vae: Output, **given: Any) -> Node:
    given = {"wide": 310, "room": NOTICE, "token_logits": sampled["token_logits"], "model": model, "vae": vae, **given}
    return graph.node("DCDD_TokenGuideLatent", vq_vae=janus["vq_vae"], **given)


def guided_model(graph: Graph, sampled: Node, janus: Node, model: Output, vae: Output, **given: Any) -> Node:
    given = {"wide": 310, "first": True, "token_logits": sampled["token_logits"], "model": model, "vae": vae, **given}
    return graph.node("DCDD_DistributionGuidance", vq_vae=janus["vq_vae"], **given)


def ksampler(graph: Graph, model: Output, texts: tuple[Output, Output], latent: Output, **given: Any) -> Node:
    """Euler steps without CFG, as FLUX and pico take them."""
    given = {"seed": 0, "steps": 20, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "wide": 310, **given}
    positive, negative = texts
    return graph.node(
        "KSampler", preview=True, model=model, positive=positive, negative=negative, latent_image=latent, **given
    )


def agreement(graph: Graph, image: Output, sampled: Node, janus: Node) -> Node:
    return graph.node(
        "DCDD_TokenAgreement",
        wide=310,
        room=NOTICE,
        image=image,
        token_logits=sampled["token_logits"],
        vq_vae=janus["vq_vae"],
    )


def guidance(graph: Graph) -> None:
    note = graph.note("""
        # Distribution guidance
        Any diffusion model paints what Janus said, **without a trained decoder**: at each step its predicted image is
        pulled until Janus' own encoder reads in it what Janus predicted. Here pico's diffusion model, which knows
        neither the prompt nor the tokens, takes the place of your FLUX.

        The sheet shows the VQ-VAE's image, the same diffusion model without guidance, with it, and a decoder that was
        trained for the tokens.
        ## Change first
        - the **prompt** and the **strength** (green)
        - *start* of *Token Guide Latent*: how much noise the model starts from
        - *Token Agreement* says how many tokens are read in the image: if more *strength* lowers that a lot, it is too
        high
        ## With your own model
        Workflow 8 is the same with FLUX.1-dev.
    """)
    janus, decoder = load_janus(graph), load_decoder(graph)
    pico = graph.node("DCDD_LoadPicoModel", wide=310)
    prompt = "a large checked blue star in the centre on a lined cream ground"
    sampled = sampler(graph, janus, prompt=prompt, seed=3, batch_size=3)
    start = guide_latent(graph, sampled, janus, pico["model"], pico["vae"])
    guided = guided_model(graph, sampled, janus, pico["model"], pico["vae"])
    texts = (pico["conditioning"], pico["conditioning"])
    runs = {
        title: ksampler(graph, model, texts, start["latent"], title=title, steps=10, denoise=start["denoise"])
        for title, model in (("Without guidance", pico["model"]), ("Guided", guided["model"]))
    }
    plain, painted = (
        graph.node("VAEDecode", wide=310, samples=run["LATENT"], vae=pico["vae"]) for run in runs.values()
    )
    by_vq = vq_decode(graph, sampled["token_logits"], janus["vq_vae"])
    condition = lcdm(graph, sampled["token_logits"], janus["vq_vae"], decoder)
    trained = paint(graph, decoder, condition, title="Trained decoder")
    sheet = compare(
        graph,
        a=by_vq["image"],
        b=plain["IMAGE"],
        c=painted["IMAGE"],
        d=trained["image"],
        label_a="VQ-VAE",
        label_b="without guidance",
        label_c="guided",
        label_d="trained decoder",
    )
    graph.thumbnail = save(graph, sheet["image"], "guided", "Save the comparison", wide=640, tall=560)
    told = agreement(graph, painted["IMAGE"], sampled, janus)
    graph.columns(
        [note, group("Models", MODELS, [janus, pico, decoder])],
        [group("Tokens", TOKENS, [sampled]), group("Condition", CONDITION, [condition])],
        [group("Guidance", CONDITION, [start, guided])],
        [group("Your diffusion model", DECODE, list(runs.values()), [plain, painted])],
        [group("Decoders", DECODE, [by_vq, trained]), group("Check", IMAGE, [told])],
        [group("Compare", COMPARE, [sheet, graph.thumbnail])],
    )


_OWN_FLUX = """
        It needs FLUX.1-dev (about 24 GB; *weight_dtype* fp8_e4m3fn in *Load Diffusion Model*, or an fp8 file, halves
        the memory). Nothing is downloaded automatically; the page offers the files that are missing when this
        workflow is opened:
        - models/diffusion_models: [flux1-dev.safetensors](https://huggingface.co/Comfy-Org/flux1-dev)
        - models/vae: [ae.safetensors](https://huggingface.co/Comfy-Org/Lumina_Image_2.0_Repackaged)
        - models/text_encoders: [clip_l and t5xxl](https://huggingface.co/comfyanonymous/flux_text_encoders)

        Do your files have other names? Choose them in the three loaders. Another model (SDXL, SD 1.5, a GGUF file):
        replace the loaders, and give negative prompt and CFG as that model wants them."""


def flux_files(graph: Graph) -> tuple[Node, Node, Node]:
    """Loaders of FLUX.1-dev's transformer, text encoders and VAE."""
    unet = graph.node("UNETLoader", wide=310, files=[FLUX_DEV], unet_name=Own(FLUX_DEV.name))
    names = {"clip_name1": Own(CLIP_L.name), "clip_name2": Own(T5.name)}
    clip = graph.node("DualCLIPLoader", wide=310, files=[CLIP_L, T5], type="flux", **names)
    return unet, clip, graph.node("VAELoader", wide=310, files=[FLUX_VAE], vae_name=Own(FLUX_VAE.name))


def flux_prompt(graph: Graph, clip: Node, text: str, title: str) -> tuple[list[Node], tuple[Output, Output]]:
    """The nodes of a prompt, and the conditioning that FLUX takes for positive and negative."""
    prompt = graph.node("CLIPTextEncode", title=title, wide=400, tall=140, first=True, clip=clip["CLIP"], text=text)
    positive = graph.node("FluxGuidance", wide=310, conditioning=prompt["CONDITIONING"], guidance=3.5)
    negative = graph.node("ConditioningZeroOut", wide=310, conditioning=prompt["CONDITIONING"])
    return [prompt, positive, negative], (positive["CONDITIONING"], negative["CONDITIONING"])


#: Side in pixels of the images that workflows 8 and 9 paint.
_PAINTED = 768


def own_flux(graph: Graph) -> None:
    note = graph.note(
        """
        # Janus-Pro with your own FLUX, no training
        Janus-Pro composes the image; **FLUX.1-dev** paints it at 768 x 768, guided at each step towards what Janus
        predicted. No decoder has to be trained.
"""
        + _OWN_FLUX
        + """
        ## Change first
        - *Load Janus*: **Janus-Pro** in models/janus (*Download Model* fetches it). pico only demonstrates the graph
        - the **prompt**, for Janus and for FLUX (green)
        - **strength**: 0 is FLUX alone, from Janus' image; too much looks over-cooked
        - *start* of *Token Guide Latent*: more noise lets FLUX change more
        """
    )
    janus = load_janus(graph)
    unet, clip, vae = flux_files(graph)
    sampled = sampler(graph, janus)
    text, texts = flux_prompt(
        graph,
        clip,
        "a large red heart with white stripes, in the centre of a sky blue wall with fine wavy lines",
        "Prompt for FLUX",
    )
    start = guide_latent(graph, sampled, janus, unet["MODEL"], vae["VAE"], width=_PAINTED, height=_PAINTED)
    guided = guided_model(graph, sampled, janus, unet["MODEL"], vae["VAE"])
    own = vq_decode(graph, sampled["token_logits"], janus["vq_vae"], codes="soft: the expected codes")
    graph.thumbnail = preview(graph, own["image"], "Janus' own image", wide=340, tall=330)
    run = ksampler(graph, guided["model"], texts, start["latent"], denoise=start["denoise"])
    painted = graph.node("VAEDecode", wide=310, samples=run["LATENT"], vae=vae["VAE"])
    told = agreement(graph, painted["IMAGE"], sampled, janus)
    saved = save(graph, painted["IMAGE"], "by FLUX", "Save the image", wide=640, tall=720)
    graph.columns(
        [note, group("Models", MODELS, [janus, unet, clip, vae])],
        [group("Tokens", TOKENS, [sampled]), group("Prompt for FLUX", IMAGE, text)],
        [group("Guidance", CONDITION, [start, guided]), group("Check", IMAGE, [told])],
        [group("FLUX", DECODE, [run, painted])],
        [group("Decode", DECODE, [own]), group("Compare", COMPARE, [graph.thumbnail])],
        [group("Result", COMPARE, [saved])],
    )


def repaint_with_flux(graph: Graph) -> None:
    note = graph.note(
        """
        # Repaint under a mask, with your own FLUX
        Janus draws a first image and then, from a **second prompt**, new tokens under the mask that fit what
        surrounds them. **FLUX.1-dev** paints the first image, and repaints the part under the mask, guided by the new
        tokens; all other pixels stay as they are.
"""
        + _OWN_FLUX
        + """
        ## Change first
        - *Load Janus*: **Janus-Pro** in models/janus. pico only demonstrates the graph
        - the **second prompt**, for Janus and for FLUX (green)
        - the **mask**: *x*, *y* and the size of the white box, or one that you draw
        - an image of your own in the place of the first: *Load Image*, scaled to 768 x 768, into both
        *ImageCompositeMasked*; and scaled to 384 x 384 through *VQ-VAE Encode* and *Logit Calibrator* into the second
        sampler's *token_logits*
        """
    )
    janus = load_janus(graph)
    unet, clip, vae = flux_files(graph)
    black = graph.node("SolidMask", title="Keep everything (black)", wide=225, value=0.0, width=768, height=768)
    white = graph.node("SolidMask", title="except this box (white)", wide=225, value=1.0, width=512, height=512)
    mask = graph.node(
        "MaskComposite", wide=225, destination=black["MASK"], source=white["MASK"], x=128, y=128, operation="add"
    )
    shown = graph.node("MaskPreview", title="Repainted (white)", wide=225, preview=True, mask=mask["MASK"])
    first = sampler(graph, janus, first=False)
    second = sampler(
        graph,
        janus,
        prompt="a large checked purple star in the centre on a wavy sky ground",
        seed=11,
        token_logits=first["token_logits"],
        mask=mask["MASK"],
    )
    text, texts = flux_prompt(
        graph, clip, "a large red heart with white stripes on a sky blue wall with fine wavy lines", "First prompt"
    )
    text_again, texts_again = flux_prompt(
        graph, clip, "a large purple star with a chequered pattern on a sky blue wall", "Second prompt"
    )
    sizes = {"width": _PAINTED, "height": _PAINTED}
    start = guide_latent(graph, first, janus, unet["MODEL"], vae["VAE"], **sizes)
    guided = guided_model(graph, first, janus, unet["MODEL"], vae["VAE"], first=False)
    run = ksampler(graph, guided["model"], texts, start["latent"], denoise=start["denoise"], title="First image")
    before = graph.node("VAEDecode", wide=310, samples=run["LATENT"], vae=vae["VAE"])
    start_again = guide_latent(graph, second, janus, unet["MODEL"], vae["VAE"], **sizes)
    pasted = {"x": 0, "y": 0, "resize_source": False, "mask": mask["MASK"], "destination": before["IMAGE"]}
    canvas = graph.node(
        "ImageCompositeMasked", title="Janus' new part, pasted", wide=310, source=start_again["image"], **pasted
    )
    latent = graph.node("VAEEncode", wide=310, pixels=canvas["IMAGE"], vae=vae["VAE"])
    masked = graph.node("SetLatentNoiseMask", wide=310, samples=latent["LATENT"], mask=mask["MASK"])
    guided_again = guided_model(graph, second, janus, unet["MODEL"], vae["VAE"], mask=mask["MASK"])
    again = ksampler(
        graph, guided_again["model"], texts_again, masked["LATENT"], denoise=start_again["denoise"], title="Repaint"
    )
    part = graph.node("VAEDecode", wide=310, samples=again["LATENT"], vae=vae["VAE"])
    whole = graph.node("ImageCompositeMasked", title="All else as it was", wide=310, source=part["IMAGE"], **pasted)
    sheet = compare(
        graph, a=before["IMAGE"], b=whole["IMAGE"], label_a="the first image", label_b="repainted under the mask"
    )
    told = agreement(graph, whole["IMAGE"], second, janus)
    own, own_again = (vq_decode(graph, each["token_logits"], janus["vq_vae"]) for each in (first, second))
    drawn = compare(graph, a=own["image"], b=own_again["image"], label_a="Janus' first", label_b="with new tokens")
    graph.thumbnail = preview(graph, drawn["image"], "What Janus draws", wide=420, tall=330)
    saved = save(graph, whole["IMAGE"], "repainted", "Save the image", wide=640, tall=720)
    beside = preview(graph, sheet["image"], "Before and after", wide=640, tall=400)
    graph.columns(
        [note, group("Models", MODELS, [janus, unet, clip, vae])],
        [group("First image", TOKENS, [first]), group("Where to repaint", IMAGE, [black, white], [mask, shown])],
        [group("New tokens", TOKENS, [second]), group("Prompts for FLUX", IMAGE, [*text, *text_again])],
        [group("Guidance", CONDITION, [start, guided]), group("FLUX", DECODE, [run, before])],
        [
            group("Guidance under the mask", CONDITION, [start_again, guided_again]),
            group("Canvas", IMAGE, [canvas, latent, masked]),
        ],
        [
            group("FLUX repaints", DECODE, [again, part, whole]),
            group("Janus alone", DECODE, [own, own_again]),
        ],
        [group("What Janus draws", COMPARE, [drawn, graph.thumbnail]), group("Compare", COMPARE, [sheet, beside])],
        [group("Result", COMPARE, [saved]), group("Check", IMAGE, [told])],
    )


_PICO_PROGRESSIVE, _PICO_LLAMAGEN = "pico progressive (built in)", "pico llamagen (built in)"


def progressive(graph: Graph) -> None:
    note = graph.note("""
        # Progressive: from coarse to fine
        A masked sampler draws all tokens in a few **passes**. Each pass reveals many tokens at once (green) and draws
        earlier ones again (orange), so that mistakes are taken back. The first sheet shows every pass; below it, both
        decoders decode the same tokens.

        Press **Run**: it works as it is, with *pico progressive*, which comes with the pack.
        ## Change first
        - the **prompt** (green). pico knows the words of one small world: shapes, colours, patterns, places, grounds
        - **passes**: few give a sketch, many take longer; 0 is the model's own number, 11
        - **revise** 0: tokens stay as they were first drawn, mistakes too
        - **order**: which tokens come first
        ## With real models
        - *Load Janus*: a masked sampler in models/janus: aMUSEd, BIGFix, or one that you trained. Janus and Janus-Pro
        draw one token after the other: workflow 1
        - *Load DCDD Decoder*: a bundle that you trained for the same tokenizer (none is published)
    """)
    janus, decoder = load_janus(graph, _PICO_PROGRESSIVE), load_decoder(graph)
    sampled = sampler_in_passes(graph, janus)
    condition = lcdm(graph, sampled["token_logits"], janus["vq_vae"], decoder)
    by_vq = vq_decode(graph, sampled["token_logits"], janus["vq_vae"])
    painted = paint(graph, decoder, condition)
    graph.thumbnail = preview(graph, sampled["stages"], "Every pass: green is new, orange is rewritten", 1000, 380)
    graph.thumbnail_part = (0.455, 0.726)  # three passes: eleven would be too small to see
    sheet = compare(graph, a=by_vq["image"], b=painted["image"])
    saved = save(graph, sheet["image"], "in passes", "Save the comparison", wide=540, tall=420)
    graph.columns(
        [note, group("Models", MODELS, [janus, decoder])],
        [group("Tokens", TOKENS, [sampled]), group("Condition", CONDITION, [condition])],
        [group("Decode", DECODE, [by_vq, painted])],
        [group("Passes", IMAGE, [graph.thumbnail]), group("Compare", COMPARE, [sheet], [saved])],
    )


def inpaint(graph: Graph) -> None:
    note = graph.note("""
        # Inpaint with tokens
        An image becomes tokens. Those under the **mask** are drawn anew from the prompt by a masked sampler, which sees
        the image on **all sides** of the hole from its first pass on. Then the FLUX decoder paints the new part; all
        other pixels stay exactly as they are.

        **Pico Scene** renders the image, so no file is needed.
        ## Change first
        - the **prompt** (green): what the whole image should show
        - the **mask**: *x*, *y* and the size of the white box. Every token that it touches is drawn again
        - the sampler's **seed**, for other attempts, and *Number of attempts*, for more of them at once
        - **start** 2 or more: the new part keeps more of what was there
        - **your own image**: *Load Image*, *Upscale Image* to the model's size (pico: 96 x 96; crop *center*), in place
        of *Pico Scene*, and the mask that you draw with *Open in MaskEditor*
        ## With real models
        - *Load Janus*: a masked sampler in models/janus: aMUSEd, BIGFix, or one that you trained
        - *Load DCDD Decoder*: a bundle that you trained for the same tokenizer (none is published)
    """)
    janus, decoder = load_janus(graph, _PICO_PROGRESSIVE), load_decoder(graph)
    scene = graph.node("DCDD_PicoScene", wide=310, seed=6, size=SIDE, batch_size=1)
    black = graph.node("SolidMask", title="Keep everything (black)", wide=225, value=0.0, width=384, height=384)
    white = graph.node("SolidMask", title="except this box (white)", wide=225, value=1.0, width=256, height=256)
    mask = graph.node(
        "MaskComposite", wide=225, destination=black["MASK"], source=white["MASK"], x=64, y=64, operation="add"
    )
    shown = graph.node("MaskPreview", title="Drawn again (white)", wide=225, preview=True, mask=mask["MASK"])
    attempts = graph.node("RepeatImageBatch", title="Number of attempts", wide=310, image=scene["image"], amount=2)
    tokens = encode(graph, janus["vq_vae"], attempts["IMAGE"])
    calibrated = graph.node(
        "DCDD_LogitCalibrator",
        wide=310,
        token_logits=tokens["token_logits"],
        vq_vae=janus["vq_vae"],
        decoder=decoder["decoder"],
    )
    sampled = sampler_in_passes(
        graph,
        janus,
        prompt="a large striped green heart in the centre on a dotted rose ground",
        token_logits=calibrated["token_logits"],
        mask=mask["MASK"],
    )
    condition = lcdm(graph, sampled["token_logits"], janus["vq_vae"], decoder)
    by_vq = vq_decode(graph, sampled["token_logits"], janus["vq_vae"])
    painted = paint(graph, decoder, condition, image=tokens["image"], mask=mask["MASK"])
    passes = preview(graph, sampled["stages"], "Every pass: green is new, orange is rewritten", 900, 560)
    sheet = compare(
        graph,
        "seed 1\nseed 2",
        a=tokens["image"],
        b=by_vq["image"],
        c=painted["image"],
        label_a="the image",
        label_b="VQ-VAE decode, new tokens",
        label_c="DCDD decode, under the mask",
    )
    graph.thumbnail = save(graph, sheet["image"], "inpainted", "Save the comparison", wide=560, tall=360)
    graph.columns(
        [note, group("Models", MODELS, [janus, decoder])],
        [group("Image", IMAGE, [scene, attempts]), group("Where to draw again", IMAGE, [black, white], [mask, shown])],
        [group("Its tokens", TOKENS, [tokens, calibrated])],
        [group("New tokens", TOKENS, [sampled]), group("Condition", CONDITION, [condition])],
        [group("Decode", DECODE, [by_vq, painted])],
        [group("Passes", IMAGE, [passes]), group("Compare", COMPARE, [sheet], [graph.thumbnail])],
    )


def llamagen(graph: Graph) -> None:
    note = graph.note("""
        # LlamaGen, both decoders
        **LlamaGen** is another model that samples an image token by token; it reads the prompt with a T5 text encoder.
        It takes Janus' place, and all other nodes stay as they are: its own **VQ-VAE** decodes the tokens, and the
        **FLUX decoder** also gets how certain it was at each position.

        Press **Run**: it works as it is, with *pico llamagen*, a tiny model that comes with the pack.
        It is weaker than *pico*: grounds and colours come out as you ask, shapes often do not.
        ## Change first
        - the **prompt** (green). pico knows the words of one small world: shapes, colours, patterns, places, grounds
        - the sampler's **seed**, for another image
        - *Load Janus*: **pico (built in)** shows what Janus makes of the same prompt
        ## With the published LlamaGen
        - *Load Janus*: a folder in models/janus with t2i_XL_stage2_512.pt (or t2i_XL_stage1_256.pt), vq_ds16_t2i.pt,
        and google/flan-t5-xl in its folder flan-t5-xl (the node *Download Model* fetches them all)
        - *guidance* and *top_k* at -1 are its authors' own: 7.5 and 1000
        - no decoder for it is published, and those of other models are refused. Let your own FLUX paint, by
        *Distribution Guidance* (workflow 8, with LlamaGen in its *Load Janus*), or train a decoder
    """)
    side_by_side(graph, note, who="LlamaGen", prefix="LlamaGen", model=_PICO_LLAMAGEN)


WORKFLOWS: dict[str, Callable[[Graph], None]] = {
    "1 Text to image, both decoders": both_decoders,
    "2 Reconstruct a picture": reconstruct,
    "3 Decode, then upscale": upscale,
    "4 Repaint where Janus was unsure": repaint,
    "5 Look inside, logits and calibration": look_inside,
    "6 Edit, keep tokens and sample the rest": edit,
    "7 Distribution guidance": guidance,
    "8 Janus-Pro with your own FLUX, no training": own_flux,
    "9 Repaint under a mask, with your own FLUX": repaint_with_flux,
    "10 Progressive, coarse to fine": progressive,
    "11 Inpaint with tokens": inpaint,
    "12 LlamaGen, both decoders": llamagen,
}


def janus_to_dcdd(definitions: dict[str, Any]) -> dict[str, Any]:
    """The three nodes in the middle of every workflow, as one node."""
    graph = Graph(definitions, "Janus to DCDD", inside=True)
    # The frontend copies the labels to the outside, and also what happens to the seeds after a run: newer versions show
    # no widget for that on the outside, but follow the one inside.
    sampled = graph.node(
        "DCDD_JanusLogitSampler",
        wide=400,
        preview=True,
        labels={"seed": "sampler seed"},
        control="randomize",
        prompt=PROMPT,
    )
    condition = graph.node("DCDD_LCDMEncoder", wide=310, token_logits=sampled["token_logits"])
    painted = graph.node(
        "DCDD_FluxDecoder",
        wide=340,
        preview=True,
        labels={"seed": "decoder seed"},
        control="randomize",
        condition=condition["condition"],
    )
    graph.columns([sampled], [condition], [painted])
    return blueprint(
        graph,
        "Prompt to image: Janus Logit Sampler, LCDM Encoder and FLUX Decoder in one node. Connect Load Janus and "
        "Load DCDD Decoder.",
        sockets={
            "janus": [(sampled, "janus")],
            "vq_vae": [(condition, "vq_vae")],
            "decoder": [(condition, "decoder"), (painted, "decoder")],
        },
        results={
            "image": painted["image"],
            "token_logits": sampled["token_logits"],
            "condition": condition["condition"],
            "latent": painted["latent"],
        },
        shown=[
            *((sampled, name) for name in ("prompt", "seed", "control_after_generate", "guidance", "batch_size")),
            *((painted, name) for name in ("seed", "control_after_generate", "steps")),
        ],
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", default="", help="only workflows with this text in their names")
    arguments.add_argument("--thumbnails", action="store_true", help="also run them, and save their images")
    arguments.add_argument("--object-info", type=Path, help="a saved /object_info; no ComfyUI is started")
    arguments.add_argument("--pack", type=Path, default=ROOT, help="the copy of the pack that ComfyUI loads")
    given = arguments.parse_args()
    if given.object_info:
        if given.thumbnails:
            arguments.error("thumbnails need a running ComfyUI: leave out --object-info")
        make(json.loads(given.object_info.read_text()), given.only, None)
        return
    missing = [name for name in ("COMFYUI_DIR", "COMFYUI_PYTHON") if not os.environ.get(name)]
    if missing:
        arguments.error(f"set {' and '.join(missing)}, or give --object-info")
    with running(Path(os.environ["COMFYUI_DIR"]).expanduser(), os.environ["COMFYUI_PYTHON"], given.pack) as url:
        make(ask(url, "/object_info"), given.only, url if given.thumbnails else None)


def make(definitions: dict[str, Any], only: str, url: str | None) -> None:
    """Writes the files, and with a server also the thumbnails."""
    for name, build in WORKFLOWS.items():
        if only.lower() in name.lower():
            graph = Graph(definitions, name)
            build(graph)
            write(ROOT / "workflows" / f"{name}.json", graph.workflow())
            if url is not None:
                thumbnail(result_of(url, graph), graph.thumbnail_part).save(
                    ROOT / "workflows" / f"{name}.jpg", quality=88
                )
    if not only:
        write(ROOT / "subgraphs" / "Janus to DCDD.json", janus_to_dcdd(definitions))


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
