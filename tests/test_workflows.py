"""The shipped workflows as files, without a ComfyUI: pictures, notes, and room for what grows."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image

from tools.make_workflows import HEAD, NOTICE, PREVIEW, ROOT, TITLE, WORKFLOWS, janus_to_dcdd

FILES = sorted((ROOT / "workflows").glob("*.json"))
BLUEPRINT = ROOT / "subgraphs" / "Janus to DCDD.json"
SCHEMAS = json.loads((ROOT / "tests" / "comfy" / "object_info.json").read_text("utf-8"))
NOTES = {"MarkdownNote", "Note"}
#: Nodes on which the page draws a picture, while they run or afterwards.
PICTURED = {
    "DCDD_FluxDecoder",
    "DCDD_JanusLogitSampler",
    "DCDD_ProgressiveTokenSampler",
    "DCDD_VQVAEDecode",
    "DCDD_VQVAEEncode",
    "KSampler",
    "MaskPreview",
    "PreviewImage",
    "SaveImage",
}
#: Nodes that have something to say as the workflows use them.
TELLING = {
    "DCDD_JanusLogitSampler",
    "DCDD_LCDMEncoder",
    "DCDD_ProgressiveTokenSampler",
    "DCDD_SaveCalibration",
    "DCDD_TokenAgreement",
}
#: ComfyUI's own nodes in the workflows with a text of several lines.
TALL = {"CLIPTextEncode"}

Box = tuple[float, float, float, float]

every_workflow = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def graph_of(path: Path) -> dict:
    """A workflow's nodes and groups; a blueprint's inside."""
    found = json.loads(path.read_text("utf-8"))
    return found["definitions"]["subgraphs"][0] if "definitions" in found else found


def least_height(node: dict) -> int:
    """What a node's sockets and widgets take: 20 pixels a row of sockets, 24 a widget, 30 more a text of many lines."""
    sockets = [entry for entry in node["inputs"] if "widget" not in entry]
    widgets = len(node["widgets_values"])
    specs = {k: v for part in SCHEMAS.get(node["type"], {}).get("input", {}).values() for k, v in part.items()}
    tall = sum(bool(len(spec) > 1 and spec[1].get("multiline")) for spec in specs.values()) + (node["type"] in TALL)
    return 6 + 20 * max(len(sockets), len(node["outputs"])) + (8 + 24 * widgets + 30 * tall if widgets else 0)


def grown(node: dict) -> Box:
    """left, top, right, bottom of a node, its title bar included, once it has its picture and has said its notice."""
    (left, top), (wide, tall) = node["pos"], node["size"]
    if node["type"] not in NOTES:
        needs = least_height(node) + PREVIEW * (node["type"] in PICTURED)
        # A notice is put below what is there, unless the node has room left.
        tall = max(tall, needs) + NOTICE * (node["type"] in TELLING or is_fitting(node))
    return left, top - TITLE, left + wide, top + tall


def is_fitting(node: dict) -> bool:
    """A calibrator with a reference fits, and says how well."""
    linked = {entry["name"] for entry in node["inputs"] if entry["link"] is not None}
    return node["type"] == "DCDD_LogitCalibrator" and "reference" in linked


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def overlaps(graph: dict) -> list[str]:
    nodes = [(f"{node['id']} {node['type']}", grown(node)) for node in graph["nodes"]]
    groups = [(group["title"], box_of(group)) for group in graph["groups"]]
    both = [*combinations(nodes, 2), *combinations(groups, 2)]
    return [f"{name} and {other}" for (name, a), (other, b) in both if overlap(a, b)]


def box_of(group: dict) -> Box:
    left, top, wide, tall = group["bounding"]
    return left, top, left + wide, top + tall


def test_workflows_are_those_that_the_tool_writes():
    assert {path.stem for path in FILES} == set(WORKFLOWS)


@every_workflow
def test_workflow_has_a_picture(path):
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG" and picture.mode == "RGB"
        picture.load()
        assert picture.width == picture.height == 400
        darkest, brightest = picture.convert("L").getextrema()
        assert brightest - darkest > 100, "one colour is no picture"


def test_every_picture_is_a_workflows():
    assert {path.stem for path in (ROOT / "workflows").iterdir()} == {path.stem for path in FILES}


@every_workflow
def test_workflow_begins_with_a_note(path):
    notes = [node for node in graph_of(path)["nodes"] if node["type"] in NOTES]
    assert notes and notes[0]["pos"][0] == min(node["pos"][0] for node in graph_of(path)["nodes"])
    (text,) = notes[0]["widgets_values"]
    assert text.startswith("# ") and "## Change first" in text


@pytest.mark.parametrize("path", [*FILES, BLUEPRINT], ids=lambda path: path.stem)
def test_nothing_overlaps_when_pictures_and_notices_appear(path):
    assert overlaps(graph_of(path)) == []


@every_workflow
def test_nodes_lie_in_their_groups(path):
    graph = graph_of(path)
    for node in graph["nodes"]:
        left, top = node["pos"]
        right, bottom = left + node["size"][0], top + node["size"][1]
        for group in graph["groups"]:
            box = box_of(group)
            if overlap((left, top, right, bottom), box):
                assert box[0] < left and box[1] + HEAD <= top and right < box[2] and bottom < box[3], (
                    f"{node['type']} sticks out of {group['title']}"
                )


@every_workflow
def test_model_files_are_named_with_where_to_get_them(path):
    """Every file that a node loads, as the page needs it to offer the missing ones."""
    for node in graph_of(path)["nodes"]:
        named = {file["name"]: file for file in node["properties"].get("models", [])}
        values = [] if node["type"] in NOTES else node["widgets_values"]
        chosen = {value for value in values if str(value).endswith(".safetensors")}
        assert named.keys() == chosen, node["type"]
        for name, file in named.items():
            assert file.keys() == {"name", "url", "directory"}
            assert file["url"].startswith("https://huggingface.co/") and file["url"].endswith(f"/{name}")
            assert file["directory"] in ("diffusion_models", "text_encoders", "vae")


def test_blueprint_tells_its_seeds_apart_and_draws_new_ones():
    labels = []
    for node in graph_of(BLUEPRINT)["nodes"]:
        seeds = [entry for entry in node["inputs"] if entry["name"] == "seed"]
        labels += [entry["label"] for entry in seeds]
        assert not seeds or "randomize" in node["widgets_values"], node["type"]
    assert labels == ["sampler seed", "decoder seed"]


def test_overlap_is_noticed():
    graph = graph_of(FILES[0])
    low, high = sorted((node for node in graph["nodes"] if node["type"] in PICTURED), key=lambda node: node["pos"])[:2]
    high["pos"] = [low["pos"][0], low["pos"][1] + least_height(low) + PREVIEW - 1]
    assert any(low["type"] in pair and high["type"] in pair for pair in overlaps(graph))


def test_blueprint_is_what_the_tool_writes():
    """Its nodes are the pack's own, so their schemas as checked in are enough to write it."""
    assert json.loads(BLUEPRINT.read_text("utf-8")) == janus_to_dcdd(SCHEMAS)
