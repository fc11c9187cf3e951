"""Every workflow and the blueprint in ComfyUI's own page: loaded whole, and nothing upon another, in both renderers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.shipped import ROOT
from tests.test_workflows import PICTURED, SCHEMAS, TELLING, Box, overlap

if TYPE_CHECKING:
    from tests.ui.page import ComfyPage

pytestmark = pytest.mark.ui

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
SCREENSHOTS = ROOT / "out" / "ui"
#: Half a pixel of the screen, on a graph that is seen whole.
ROUNDING = 2.0
TRANSPARENT = "rgba(0, 0, 0, 0)"


@dataclass(frozen=True)
class Loaded:
    """A graph in a page: what was shown, said and complained of."""

    graph: dict[str, Any]
    shown: dict[str, list[dict[str, Any]]]
    overlays: list[str]
    errors: list[str]
    #: What was shown with images and notices on the nodes.
    after: dict[str, list[dict[str, Any]]]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


@pytest.fixture(scope="module", params=[*WORKFLOWS, *BLUEPRINTS], ids=lambda path: path.stem)
def loaded(request: pytest.FixtureRequest, page: ComfyPage) -> Loaded:
    path = request.param
    graph = read(path)
    page.load(graph)
    prefix = ""
    if path in BLUEPRINTS:
        (box,), (graph,) = graph["nodes"], graph["definitions"]["subgraphs"]
        page.open_subgraph(box["id"])
        prefix = f"{box['id']}:"  # as a run calls the nodes inside
    shown, overlays, errors = page.shown(), page.overlays(), page.errors()
    if overlays:
        page.close_overlays()
    if page.draws_runs(in_subgraph=bool(prefix)):
        ids = [
            [prefix + node["id"] for node in shown["nodes"] if node["type"] in kinds] for kinds in (PICTURED, TELLING)
        ]
        page.run(*ids)
    page.screenshot(SCREENSHOTS / page.name / f"{path.stem}.png")
    return Loaded(graph, shown, overlays, errors + page.errors(), page.shown())


def smaller(box: Box) -> Box:
    left, top, right, bottom = box
    return left + ROUNDING, top + ROUNDING, right - ROUNDING, bottom - ROUNDING


def clashes(shown: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Nodes that overlap, and nodes that stand partly in a group."""
    found = []
    nodes = [(f"{node['id']} {node['type']}", smaller(node["box"])) for node in shown["nodes"]]
    for (name, box), (other, other_box) in combinations(nodes, 2):
        if overlap(box, other_box):
            found.append(f"{name} {box} and {other} {other_box} overlap")
    for group in shown["groups"]:
        left, top, right, bottom = group["box"]
        for name, box in nodes:
            inside = left <= box[0] and top <= box[1] and box[2] <= right and box[3] <= bottom
            if overlap(box, group["box"]) and not inside:
                found.append(f"{name} {box} sticks out of {group['title']} {group['box']}")
    return found


def test_graph_loads_whole_and_without_complaint(loaded):
    assert [(node["id"], node["type"]) for node in loaded.shown["nodes"] if not node["known"]] == []
    types = sorted(node["type"] for node in loaded.shown["nodes"])
    assert types == sorted(node["type"] for node in loaded.graph["nodes"])
    assert [group["title"] for group in loaded.shown["groups"]] == [one["title"] for one in loaded.graph["groups"]]
    assert loaded.errors == []
    files = [file["name"] for node in loaded.graph["nodes"] for file in node["properties"].get("models", [])]
    for overlay in loaded.overlays:
        # What an older page says of files that are missing; the newest does in a panel of its own.
        assert "Missing Models" in overlay and files and all(name in overlay for name in files), overlay


def test_nodes_keep_apart_and_in_their_groups(loaded):
    assert clashes(loaded.shown) == []


def test_nodes_keep_apart_with_their_images_and_notices(loaded):
    assert clashes(loaded.after) == []


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_blueprint_tells_its_seeds_apart_and_draws_new_ones(page, path):
    page.load(read(path))
    before = dict(page.widgets())
    assert {"sampler seed", "decoder seed", "prompt", "steps"} <= before.keys() and "seed" not in before
    page.queue()
    after = dict(page.widgets())
    assert all(before[name] != after[name] for name in ("sampler seed", "decoder seed"))
    assert before["prompt"] == after["prompt"] and before["steps"] == after["steps"]
    assert page.errors() == []


def own_sockets() -> set[str]:
    """Types that no node of ComfyUI's has."""
    core = json.loads((ROOT / "tests" / "ui" / "core_nodes.json").read_text("utf-8"))
    return _types(SCHEMAS) - _types(core) - {"BOOLEAN"}


def _types(info: dict[str, Any]) -> set[str]:
    """Of all inputs and outputs; combos have a list in the type's place, or their name."""
    parts = [entry["input"].get(part, {}) for entry in info.values() for part in ("required", "optional")]
    kinds = [spec[0] for part in parts for spec in part.values()]
    kinds += [kind for entry in info.values() for kind in entry["output"]]
    return {kind for kind in kinds if isinstance(kind, str)} - {"COMBO"}


def test_every_socket_has_a_color_on_dark_and_light_palettes(page):
    types, seen = sorted(own_sockets()), {}
    assert "TOKEN_LOGITS" in types and "IMAGE" not in types
    for palette in ("dark", "light", "dark"):
        page.choose_palette(palette)
        for kind, (css, socket, link) in zip(types, page.colors(types)):
            assert css == socket == link != TRANSPARENT, f"{kind} on {palette}"
            seen.setdefault(palette, {})[kind] = css
        plain = page.colors(["NO_SUCH_TYPE"])[0][1]
        assert len({*seen[palette].values(), plain}) == len(types) + 1, "two of one color"
    assert not set(seen["dark"].items()) & set(seen["light"].items())
    assert page.errors() == []


def test_what_is_amiss_is_noticed(page):
    graph = read(WORKFLOWS[0])
    moved, other = graph["nodes"][1:3]
    moved["pos"] = list(other["pos"])
    page.load(graph)
    assert any(moved["type"] in clash and other["type"] in clash for clash in clashes(page.shown()))
    moved["type"] = "DCDD_Missing"
    page.load(graph)
    assert [node["type"] for node in page.shown()["nodes"] if not node["known"]] == ["DCDD_Missing"]
    assert any("DCDD_Missing" in text for text in page.overlays())
    page.close_overlays()
