"""How the pack appears in ComfyUI: its nodes, what is said of them, and the workflows that come along."""

from __future__ import annotations

import json
import re
import urllib.parse

import pytest

from tests.comfy.graphs import options
from tests.comfy.server import PACK
from tests.comfy.snapshot import SNAPSHOT, inputs, reduced
from tests.comfy.workflows import missing_files, problems, to_prompt
from tests.shipped import ROOT

pytestmark = pytest.mark.comfy

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
SUBGRAPHS = sorted((ROOT / "subgraphs").glob("*.json"))


@pytest.fixture(scope="module")
def ours(info):
    return {node: entry for node, entry in info.items() if entry["python_module"] == f"custom_nodes.{PACK}"}


def test_pack_loads_without_a_warning(server):
    # ComfyUI's own start may have something to say of the machine, and comes first.
    loading = server.log().partition("web root")[2].partition("Starting server")[0]
    assert re.search(rf"[\d.]+ seconds: .*{PACK}\n", loading), loading
    assert not re.search(r"Warning|Traceback|Cannot import|Error|could not be loaded", loading), loading


def test_exactly_these_nodes_are_registered(ours):
    assert set(ours) == set(json.loads(SNAPSHOT.read_text("utf-8")))
    assert all(node.startswith("DCDD_") for node in ours), "an id that a core node has is dropped without a word"


def test_object_info_is_as_checked_in(info):
    found, expected = reduced(info), json.loads(SNAPSHOT.read_text("utf-8"))
    changed = {node: (found[node], expected[node]) for node in found if found[node] != expected.get(node)}
    assert not changed, f"`python -m tests.comfy.snapshot` writes it anew, if this is meant: {changed}"


def test_everything_is_explained(ours):
    silent = [node for node, entry in ours.items() if len(entry["description"]) < 20]
    silent += [f"{node}.{n}" for node, e in ours.items() for n, spec in inputs(e).items() if not spec[1].get("tooltip")]
    for node, entry in ours.items():
        told = entry["output_tooltips"]
        silent += [f"{node} -> {name}" for name, tip in zip(entry["output_name"], told, strict=True) if not tip]
    assert not silent


def test_no_output_has_an_inputs_id(server):
    clashes = {node: set(s["inputs"]) & set(s["outputs"]) for node, s in server.get("/test/sockets").items()}
    assert len(clashes) == len(json.loads(SNAPSHOT.read_text("utf-8")))
    assert not any(clashes.values()), clashes


def test_outputs_are_called_by_name_and_not_by_type(ours):
    unnamed = [f"{n}: {name}" for n, entry in ours.items() for name in entry["output_name"] if name in entry["output"]]
    assert not unnamed, f"older versions show the type where an output has no display_name: {unnamed}"


def test_combos_list_what_is_there(ours):
    janus = options(inputs(ours["DCDD_LoadJanus"])["model"])
    assert "another" in janus
    assert "tiny" in janus, "a folder of extra_model_paths.yaml is not listed"
    decoder = inputs(ours["DCDD_LoadDecoder"])
    assert options(decoder["bundle"])[1:] == ["bundle.safetensors", "cut.safetensors", "damaged.safetensors"]
    assert "pico/" in options(decoder["vae"])
    calibrations = options(inputs(ours["DCDD_LoadCalibration"])["file"])
    assert {"good.safetensors", "damaged.safetensors"} <= set(calibrations)


def test_model_of_extra_model_paths_loads(server, graph):
    image = graph.add("image", "TEST_Picture", fill="noise", height=16, width=16)
    vq = graph.add("load", "DCDD_LoadVQVAE", model="tiny")
    graph.keep(graph.add("encode", "DCDD_VQVAEEncode", vq_vae=vq, image=image), "extra")
    run = server.run(graph.prompt)
    assert run.status == "success", run.error
    assert server.saved("extra")["logits"].shape == (1, 16, 64)


def test_templates_are_served(server):
    assert set(server.get("/workflow_templates").get(PACK, [])) == {path.stem for path in WORKFLOWS}
    for path in WORKFLOWS:
        served = server.get(f"/api/workflow_templates/{PACK}/{urllib.parse.quote(path.name)}")
        assert served == json.loads(path.read_text("utf-8"))


def test_help_and_words_are_served(server, ours):
    for path in (ROOT / "web" / "docs").glob("*.md"):
        assert path.stem in ours, f"{path.name} is help for a node that does not exist"
        assert server.text(f"/extensions/{PACK}/docs/{path.name}") == path.read_text("utf-8")
    words = server.get("/i18n")
    for language in (ROOT / "locales").iterdir():
        told = json.loads((language / "nodeDefs.json").read_text("utf-8"))
        assert {node: words[language.name]["nodeDefs"].get(node) for node in told} == told


@pytest.mark.parametrize("path", [*WORKFLOWS, *SUBGRAPHS], ids=lambda path: path.stem)
def test_workflow_fits_the_nodes(path, info):
    assert problems(json.loads(path.read_text("utf-8")), info) == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_runs(path, server, info):
    prompt = to_prompt(json.loads(path.read_text("utf-8")), info)
    if missing := missing_files(prompt, info):
        pytest.skip(f"needs {', '.join(missing)}")
    run = server.run(prompt)
    assert run.status == "success", f"node {run.node}: {run.error}"
