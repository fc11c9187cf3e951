"""What /object_info says of the pack's nodes, as far as it is the same on every machine.

`make .venv/.ready && .venv/bin/python -m tests.comfy.snapshot` writes object_info.json anew, from the ComfyUI that
COMFYUI_DIR and COMFYUI_PYTHON name.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

from tests.comfy.graphs import options
from tests.comfy.server import PACK, ComfyServer, copy_pack, locate

SNAPSHOT = Path(__file__).with_name("object_info.json")
#: Combos of which only the built-in options are kept.
MODEL_FILES = {
    ("DCDD_LoadJanus", "model"),
    ("DCDD_LoadVQVAE", "model"),
    ("DCDD_LoadDecoder", "bundle"),
    ("DCDD_LoadDecoder", "base_model"),
    ("DCDD_LoadDecoder", "vae"),
    ("DCDD_LoadCalibration", "file"),
}
#: How options begin that do not come from files.
BUILT_IN = ("pico (", "pico progressive (", "pico llamagen (", "in the bundle", "with the bundle")
# What the oldest and the newest supported ComfyUI both tell.
_TOLD = ("input", "input_order", "output", "output_name", "output_tooltips", "display_name", "description")
_TOLD += ("category", "output_node", "python_module")


def reduced(info: dict[str, Any]) -> dict[str, Any]:
    """The pack's part of /object_info."""
    ours = {node: entry for node, entry in info.items() if entry["python_module"] == f"custom_nodes.{PACK}"}
    kept = copy.deepcopy({node: {key: entry[key] for key in _TOLD} for node, entry in sorted(ours.items())})
    for node, name in MODEL_FILES:
        offered = options(inputs(kept[node])[name])
        offered[:] = [option for option in offered if option.startswith(BUILT_IN)]
    return kept


def inputs(entry: dict[str, Any]) -> dict[str, list]:
    """Every input of a node, required or not."""
    return {**entry["input"].get("required", {}), **entry["input"].get("optional", {})}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "custom_nodes").mkdir()
        copy_pack(Path(folder) / "custom_nodes")
        with ComfyServer(*locate(), Path(folder)) as server:
            told = reduced(server.get("/object_info"))
    SNAPSHOT.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
