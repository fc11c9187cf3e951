"""What the combos list of models/janus and models/diffusers, without ComfyUI."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.shipped import ROOT


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"alone_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    folder_paths = loaded(ROOT / "tests" / "fake_comfy" / "modules" / "folder_paths.py")
    folder_paths.set_base_directory(tmp_path)
    monkeypatch.setitem(sys.modules, "folder_paths", folder_paths)
    module = loaded(ROOT / "nodes" / "model_folders.py")
    module.add_model_folders()
    return module


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def listed(model_folders: ModuleType) -> list[str]:
    return model_folders.samplers()


def test_folders_are_listed_at_any_depth_and_found_by_their_names(tmp_path, model_folders):
    janus = tmp_path / "models" / "janus"
    assert listed(model_folders) == []
    put(janus / "Janus-Pro-1B" / "config.json")
    put(janus / "deepseek-ai" / "Janus-Pro-7B" / "config.json")
    put(janus / "deepseek-ai" / "Janus-Pro-7B" / "part" / "config.json")
    put(janus / ".git" / "inside" / "config.json")
    put(janus / "empty" / "README.md")
    put(janus / "config.json")
    expected = ["Janus-Pro-1B", "deepseek-ai/Janus-Pro-7B"]
    assert listed(model_folders) == expected
    assert [model_folders.path_of("janus", name) for name in expected] == [janus / name for name in expected]
    with pytest.raises(ValueError, match="is not in"):
        model_folders.path_of("janus", "deepseek-ai/../../janus")
    (tmp_path / "elsewhere").mkdir()
    for name in (str(tmp_path / "elsewhere"), "C:/models", "C:model", "\\\\server\\share", "a\\..\\..\\b"):
        with pytest.raises(ValueError, match="is not in"):
            model_folders.path_of("janus", name)


def test_the_hubs_cache_is_listed(tmp_path, model_folders):
    cache = tmp_path / "models" / "janus" / "models--deepseek-community--Janus-Pro-1B"
    blob = put(cache / "blobs" / "0123")
    put(cache / "refs" / "main")
    snapshot = cache / "snapshots" / "abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to(blob)
    assert listed(model_folders) == ["models--deepseek-community--Janus-Pro-1B/snapshots/abcd"]


def test_links_are_followed_and_loops_end(tmp_path, model_folders):
    janus, elsewhere = tmp_path / "models" / "janus", tmp_path / "elsewhere"
    put(elsewhere / "owner" / "model" / "config.json")
    janus.mkdir(parents=True)
    (janus / "linked").symlink_to(elsewhere)
    (janus / "same").symlink_to(elsewhere / "owner" / "model")
    (elsewhere / "owner" / "up").symlink_to(janus)
    (elsewhere / "owner" / "itself").symlink_to(elsewhere / "owner")
    (janus / "gone").symlink_to(tmp_path / "nowhere")
    assert listed(model_folders) == ["linked/owner/model", "same"]


def test_published_samplers_are_listed_and_their_parts_are_not(tmp_path, model_folders):
    janus = tmp_path / "models" / "janus"
    put(janus / "amused" / "amused-512" / "model_index.json")
    put(janus / "amused" / "amused-512" / "transformer" / "config.json")
    put(janus / "BIGFix" / "BigFix_XLarge.pth")
    put(janus / "BIGFix" / "flan-t5-xl" / "config.json")
    for folder, suffix in (("LlamaGen", "pt"), ("LlamaGen-512", "safetensors")):
        put(janus / folder / f"t2i_XL_stage2_512.{suffix}")
        put(janus / folder / "flan-t5-xl" / "config.json")
    put(janus / "else" / "notes.txt")
    assert listed(model_folders) == ["BIGFix", "LlamaGen", "LlamaGen-512", "amused/amused-512"]


def test_diffusers_folders_are_listed_below_their_owners(tmp_path, model_folders):
    folder = tmp_path / "models" / "diffusers" / "black-forest-labs" / "FLUX.1-Fill-dev"
    put(folder / "transformer" / "config.json")
    put(folder / "vae" / "config.json")
    assert model_folders.transformers() == model_folders.autoencoders() == ["black-forest-labs/FLUX.1-Fill-dev/"]
    assert model_folders.transformer_path("black-forest-labs/FLUX.1-Fill-dev/") == folder / "transformer"
