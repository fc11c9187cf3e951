"""What the nodes' schemas hand on to ComfyUI, with a stand-in for it: versions differ in what a schema can hold."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.shipped import ROOT

NODES = set(json.loads((ROOT / "tests" / "comfy" / "object_info.json").read_text("utf-8")))

# Run in a process of its own, given the pack's folder and the fields of a schema: loads the nodes under a name of
# ComfyUI's, with anything at all in the place of ComfyUI's modules, and prints every node's search aliases; null where
# the schema was given none.
READER = r"""
import asyncio, importlib, json, os, sys, types
from dataclasses import make_dataclass
from unittest.mock import MagicMock

folder, known = sys.argv[1], sys.argv[2].split(",")

class StandIn(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        return MagicMock(name=f"{self.__name__}.{name}")

parts = ("cli_args", "latent_formats", "ldm", "ldm.models", "ldm.models.autoencoder", "model_base", "model_management")
parts += ("model_patcher", "model_sampling", "ops", "patcher_extension", "sd", "supported_models_base", "utils")
names = ["comfy", *(f"comfy.{part}" for part in parts)]
names += ["comfy_api", "comfy_api.latest", "comfy_execution", "comfy_execution.graph_utils", "comfy_execution.utils"]
names += ["folder_paths", "latent_preview", "server"]
for name in names:
    sys.modules[name] = StandIn(name)
Schema = make_dataclass("Schema", [(name, object, None) for name in known])
latest = sys.modules["comfy_api.latest"]
latest.ComfyExtension = type("ComfyExtension", (), {})
latest.io = StandIn("io")
latest.io.ComfyNode, latest.io.Schema = type("ComfyNode", (), {}), Schema

pack = types.ModuleType("pack")
pack.__path__ = [folder]
sys.modules["pack"] = pack
extension = importlib.import_module("pack.nodes").DCDDExtension()
schemas = [node.define_schema() for node in asyncio.run(extension.get_node_list())]
print(json.dumps({schema.node_id: getattr(schema, "search_aliases", None) for schema in schemas}))
"""
FIELDS = "node_id,display_name,category,description,inputs,outputs,is_output_node,hidden,is_experimental,not_idempotent"


def aliases(fields: str) -> dict[str, list[str] | None]:
    done = subprocess.run([sys.executable, "-c", READER, str(ROOT), fields], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_node_has_search_aliases_where_comfyui_takes_them():
    found = aliases(f"{FIELDS},search_aliases")
    assert set(found) == NODES
    for node, words in found.items():
        assert words and len(set(words)) == len(words), f"{node}: {words}"
        assert all(word and word == word.strip() for word in words), f"{node}: {words}"


def test_older_comfyui_gets_schemas_without_them():
    assert aliases(FIELDS) == dict.fromkeys(NODES)
