"""Writes locales/en, the pack's English texts for ComfyUI's frontend, and lists what locales/zh lacks.

    python tools/make_locales.py                                    from tests/comfy/object_info.json
    python tools/make_locales.py --server http://127.0.0.1:8188     from a running ComfyUI with this pack

The texts come from the nodes' schemas. After a change there, update the file with `python -m tests.comfy.snapshot`,
then run this. The exit status is 1 if zh is incomplete.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SNAPSHOT = ROOT / "tests" / "comfy" / "object_info.json"
LOCALES = ROOT / "locales"
PREFIX = "DCDD_"
#: Categories that ComfyUI translates itself. They are shared by all packs, so ours must not override them.
COMMON_CATEGORIES = {"loaders"}

Info = Mapping[str, Mapping[str, Any]]
Words = dict[str, Any]


def inputs_of(node: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Required and optional inputs, [type, options] by name, in the node's order."""
    return {**node["input"].get("required", {}), **node["input"].get("optional", {})}


def node_words(object_info: Info) -> Words:
    """locales/en/nodeDefs.json: each node's texts under the frontend's keys."""
    return {
        key: {
            "display_name": node["display_name"],
            "description": node["description"],
            "inputs": {
                name: {"name": spec[1].get("display_name") or name, "tooltip": spec[1].get("tooltip", "")}
                for name, spec in inputs_of(node).items()
            },
            "outputs": {
                str(k): {"name": name, "tooltip": tooltip or ""}
                for k, (name, tooltip) in enumerate(zip(node["output_name"], node["output_tooltips"]))
            },
        }
        for key, node in object_info.items()
    }


def category_words(object_info: Info) -> Words:
    """locales/en/main.json: each level of the node menu."""
    levels = dict.fromkeys(level for node in object_info.values() for level in node["category"].split("/"))
    return {"nodeCategories": {level: level for level in levels if level not in COMMON_CATEGORIES}}


def leaves(words: Words, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text."""
    for key, value in words.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def differences(english: Words, other: Words) -> list[str]:
    """What the other language lacks, and what it has but English lacks; a blank text counts as lacking."""
    wanted, found = dict(leaves(english)), dict(leaves(other))
    lacking = [f"lacks {key}: {text}" for key, text in wanted.items() if text and not found.get(key, "").strip()]
    return lacking + [f"has too much: {key}" for key in found if key not in wanted]


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def write(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
    print(f"wrote {path.relative_to(ROOT)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", metavar="URL", help="a running ComfyUI with this pack; default: the file")
    given = parser.parse_args()
    if given.server:
        with urllib.request.urlopen(f"{given.server.rstrip('/')}/object_info", timeout=60) as answer:
            told = json.load(answer)
        info = {key: told[key] for key in sorted(told) if key.startswith(PREFIX)}
    else:
        info = read(SNAPSHOT)
    lacking = []
    for file, words in (("nodeDefs.json", node_words(info)), ("main.json", category_words(info))):
        write(LOCALES / "en" / file, words)
        theirs = LOCALES / "zh" / file
        lacking += [f"zh/{file} {line}" for line in differences(words, read(theirs) if theirs.is_file() else {})]
    print("\n".join(lacking) or "zh is complete")
    return bool(lacking)


if __name__ == "__main__":
    sys.exit(main())
