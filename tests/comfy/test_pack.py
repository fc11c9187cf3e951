"""How the pack appears in ComfyUI: its nodes, what is said of them, and the workflows that come along."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.parse

import numpy as np
import pytest
from packaging.utils import canonicalize_name

from tests.comfy.graphs import options, output
from tests.comfy.server import PACK, locate
from tests.comfy.snapshot import SNAPSHOT, inputs, reduced
from tests.comfy.tiny_flux import TEXT_ENCODERS, write_flux
from tests.comfy.workflows import missing_files, opened, problems, to_prompt
from tests.shipped import ROOT

pytestmark = pytest.mark.comfy

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
WITH_FLUX = [path for path in WORKFLOWS if "your own FLUX" in path.stem]
SUBGRAPHS = sorted((ROOT / "subgraphs").glob("*.json"))


@pytest.fixture(scope="module")
def ours(info):
    return {node: entry for node, entry in info.items() if entry["python_module"] == f"custom_nodes.{PACK}"}


def test_pack_loads_without_a_warning(server):
    # ComfyUI's own start may have something to say of the machine, and comes first.
    loading = server.log().partition("web root")[2].partition("Starting server")[0]
    assert re.search(rf"[\d.]+ seconds: .*{PACK}\n", loading), loading
    assert not re.search(r"Warning|Traceback|Cannot import|Error|could not be loaded", loading), loading


def test_requirements_replace_nothing_in_comfyuis_environment():
    """What pip would do with requirements.txt there: packages that are new to it may come, no other may change."""
    try:
        _, python = locate()
    except LookupError as missing:
        pytest.skip(str(missing))
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    wanted = ["install", "--dry-run", "--quiet", "--report", "-", "--requirement", str(ROOT / "requirements.txt")]
    there, planned = (
        json.loads(subprocess.run([*pip, *command], capture_output=True, check=True, text=True).stdout)
        for command in (["list", "--format", "json"], wanted)
    )
    has = {canonicalize_name(package["name"]): package["version"] for package in there}
    assert {"torch", "transformers"} <= set(has)
    comes = {canonicalize_name(one["metadata"]["name"]): one["metadata"]["version"] for one in planned["install"]}
    assert not {name: f"{has[name]} -> {version}" for name, version in comes.items() if name in has}


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
    # The last of a folder of extra_model_paths.yaml.
    folders = ["amused", "another", "bigfix", "cut", "llamagen", "masked", "tiny"]
    built_in = ["pico (built in)", "pico progressive (built in)", "pico llamagen (built in)"]
    assert options(inputs(ours["DCDD_LoadJanus"])["model"]) == [*built_in, *folders]
    assert options(inputs(ours["DCDD_LoadVQVAE"])["model"]) == [built_in[0], *folders]
    decoder = inputs(ours["DCDD_LoadDecoder"])
    bundles = ["bundle.safetensors", "cut.safetensors", "damaged.safetensors", "flux.safetensors"]
    bundles.append("uncalibrated.safetensors")
    assert options(decoder["bundle"])[1:] == bundles
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


@pytest.mark.parametrize("path", [path for path in WORKFLOWS if path not in WITH_FLUX], ids=lambda path: path.stem)
def test_workflow_runs_on_what_ships(path, server, info):
    prompt = to_prompt(json.loads(path.read_text("utf-8")), info)
    assert not missing_files(prompt, info)
    run = server.run(prompt)
    assert run.status == "success", f"node {run.node}: {run.error}"


def test_own_warnings_alone_become_notices(server):
    found = server.get("/test/noticed")
    assert found["notices"] == ["ours"]
    assert found["warnings"] == [["theirs", "UserWarning"], ["old", "DeprecationWarning"]]


def test_automatic_dtype_follows_the_placement(server):
    found = server.get("/test/dtypes")
    assert found == {"auto": "torch.bfloat16", "low VRAM": "torch.bfloat16", "CPU": "torch.float32"}


@pytest.fixture
def flux(server):
    """The files of workflows 8 and 9 in ComfyUI's folders, and ComfyUI told how small their text encoders are."""
    files = write_flux(server.base / "models")
    server.post("/test/text_encoders", TEXT_ENCODERS)
    yield
    server.post("/test/text_encoders", {})
    server.free()
    for path in files:
        path.unlink()


@pytest.mark.parametrize("path", WITH_FLUX, ids=lambda path: path.stem)
def test_workflow_with_ones_own_flux_runs_on_a_checkpoint_of_its_shape(path, server, flux):
    """The workflow as it is, every node of it real, on random weights.

    Less than real are: FLUX's depth (one block of each kind), the depth and inner width of the text encoders, which
    ComfyUI does not read off their files and is told instead, the image's size, and the number of steps.
    """
    info = server.get("/object_info")
    prompt = to_prompt(json.loads(path.read_text("utf-8")), info)
    assert not missing_files(prompt, info)
    side, steps = 128, 2
    kinds: dict[str, list[str]] = {}
    for name, node in prompt.items():
        kinds.setdefault(node["class_type"], []).append(name)
        node["inputs"] |= {key: side for key in ("width", "height") if key in node["inputs"]}
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = steps
    for number, name in enumerate(kinds.get("SolidMask", [])):
        prompt[name]["inputs"] |= {"width": (side, 64)[number], "height": (side, 64)[number]}
    for name in kinds.get("MaskComposite", []):
        prompt[name]["inputs"] |= {"x": 32, "y": 32}
    (saved,) = kinds["SaveImage"]
    prompt["kept"] = {"class_type": "TEST_Save", "inputs": {"value": prompt[saved]["inputs"]["images"], "name": "kept"}}
    before = len(server.log())
    run = server.run(prompt, seconds=3000)
    assert run.status == "success", f"node {run.node}: {run.error}"
    assert {*run.executed, *run.cached} == set(prompt)
    assert all(run.progress[name][-1] == (steps, steps) for name in kinds["KSampler"])
    painted = server.saved("kept")["value"]
    assert painted.shape == (1, side, side, 3)
    assert np.isfinite(painted).all() and painted.std() > 0.01
    # ComfyUI loads what fits and goes on: only its log says that names or shapes were others than it expected.
    log = server.log()[before:]
    assert "model_type FLUX" in log
    assert not re.search(r"missing|unexpected|left ?over|unet_dtype: None", log, re.I), log


def test_blueprint_is_offered(server):
    try:
        offered = server.get("/global_subgraphs")
    except ValueError:
        pytest.skip("this ComfyUI has no subgraph blueprints of packs yet")
    ours = {e["name"]: key for key, e in offered.items() if e["info"]["node_pack"] == f"custom_nodes.{PACK}"}
    assert set(ours) == {path.stem for path in SUBGRAPHS}
    for path in SUBGRAPHS:
        assert server.get(f"/global_subgraphs/{ours[path.stem]}")["data"] == path.read_text("utf-8")


def test_blueprint_runs_and_its_painting_seed_alone_paints_anew(server, graph, info):
    (path,) = SUBGRAPHS
    janus = graph.add("janus", "DCDD_LoadJanus")
    given = {"janus": janus, "vq_vae": output(janus, 1), "decoder": graph.add("decoder", "DCDD_LoadDecoder")}
    blueprint = json.loads(path.read_text("utf-8"))
    inside, outputs = opened(blueprint, info, given)
    graph.prompt |= inside
    for name, link in outputs.items():
        graph.keep(link, f"box_{name}")
    graph.look(outputs["image"])
    run = server.run(graph.prompt)
    assert run.status == "success", f"node {run.node}: {run.error}"
    image, logits = server.saved("box_image")["value"], server.saved("box_token_logits")["logits"]
    assert image.shape == (1, 96, 96, 3) and np.isfinite(image).all()
    assert logits.shape[:2] == (1, 144)
    (box,) = blueprint["nodes"]
    seeds = [f"{box['id']}:{number}" for number, widget in box["properties"]["proxyWidgets"] if widget == "seed"]
    assert {inside[name]["class_type"] for name in seeds} == {"DCDD_JanusLogitSampler", "DCDD_FluxDecoder"}
    painter = outputs["image"][0]
    graph.prompt[painter]["inputs"]["seed"] += 1
    again = server.run(graph.prompt)
    assert again.status == "success" and inside.keys() & set(again.executed) == {painter}
    assert not np.array_equal(server.saved("box_image")["value"], image)
