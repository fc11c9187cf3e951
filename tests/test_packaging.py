"""What the registry and ComfyUI's Manager read and install: metadata, pictures, and the files that ship."""

from __future__ import annotations

import re
import sys

import pytest
from packaging.specifiers import SpecifierSet
from PIL import Image

from tests.shipped import ROOT, shipped_files

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout: nothing says what ships")


@pytest.fixture(scope="module")
def metadata() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_project_is_as_the_registry_wants_it(metadata):
    project = metadata["project"]
    assert re.fullmatch(r"[a-z](?:[._-]?[a-z0-9])*", project["name"]) and len(project["name"]) < 100
    assert "comfyui" not in project["name"].lower(), "the registry asks for a name without ComfyUI"
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["description"] and project["license"] == "Apache-2.0"
    SpecifierSet(project["requires-python"])
    assert "Operating System :: OS Independent" in project["classifiers"]
    assert {"Repository", "Documentation", "Issues"} <= set(project["urls"])
    assert all(url.startswith("https://") for url in project["urls"].values())


def test_comfy_section_is_complete(metadata):
    comfy = metadata["tool"]["comfy"]
    assert set(comfy) == {"PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui", "includes"}
    owner, repository = metadata["project"]["urls"]["Repository"].split("/")[-2:]
    assert comfy["PublisherId"] == owner, "one placeholder, or one owner"
    assert comfy["DisplayName"] == repository
    assert str(SpecifierSet(comfy["requires-comfyui"])) == ">=0.3.64"


@pytest.mark.parametrize("key", ["Icon", "Banner"])
def test_picture_has_an_address_and_fits(metadata, key):
    """The registry wants addresses: an icon no wider than 400 pixels and square, a banner of 21 to 9."""
    address, comfy = metadata["tool"]["comfy"][key], metadata["project"]["urls"]["Repository"]
    beginning = comfy.replace("github.com", "raw.githubusercontent.com") + "/main/"
    assert address.startswith(beginning), address
    with Image.open(ROOT / address.removeprefix(beginning)) as picture:
        picture.load()
        wide, tall = picture.size
    if key == "Icon":
        assert wide == tall <= 400
    else:
        assert wide * 9 == tall * 21


@needs_git
def test_what_ships():
    top = {name.partition("/")[0] for name in shipped_files()}
    folders = {"dcdd_core", "dcdd_pico", "docs", "locales", "nodes", "subgraphs", "web", "workflows"}
    files = {"CHANGELOG.md", "LICENSE", "README.md", "__init__.py", "pyproject.toml", "requirements.txt"}
    assert top == folders | files | {".comfyignore", ".gitignore"}


@needs_git
def test_reader_does_not_ship_and_what_pico_needs_does(metadata):
    ours = "dcdd_pico/weights/"
    ignored = (ROOT / ".comfyignore").read_text("utf-8").splitlines()
    assert f"{ours}reader.safetensors" in ignored
    assert not [name for name in shipped_files() if name.startswith(ours) and "reader" in name]
    included = metadata["tool"]["comfy"]["includes"]
    assert set(included) == {f"{ours}decoder.safetensors", f"{ours}janus", f"{ours}vae"}
    for name in included:
        if (ROOT / name).exists():
            assert any(f == name or f.startswith(f"{name}/") for f in shipped_files()), f"{name} does not ship"


@needs_git
def test_shipped_files_are_few_and_small():
    """A Manager install is downloaded by everyone: the weights are its only large files."""
    large = {n for n in shipped_files() if (ROOT / n).stat().st_size > 600_000 and "/weights/" not in n}
    assert not large
