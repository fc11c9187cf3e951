"""Settings and per-image measurements of an evaluation on disk, so that a stopped run can be resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..files import json_object, open_tensors, read_json, reading, write_record, write_text
from ..settings import require_same_settings

_KIND = "measurements"
#: Settings that older results do not name; of these they are not asked.
_LATER = ("vlm dtype", "parallel")


def hold_to(settings: Mapping[str, Any], folder: Path, *, write: bool = True, option: str = "--out") -> None:
    """Writes `settings.json` into a folder, or checks that the one there holds the same settings.

    Args:
        settings: everything besides the list of images that the results depend on, as plain JSON values.
        write: False for all processes but the first.
        option: the one that names the folder, for messages.

    Raises:
        ValueError: if they differ; the message names the settings.
    """
    path = folder / "settings.json"
    if path.exists():
        before = read_json(
            path, "the settings of an evaluation", f"delete it if you are sure of them, or give another {option}"
        )
        remedy = f"give another {option}, or use those settings to resume"
        added = {name: settings[name] for name in _LATER if name in settings and name not in before}
        require_same_settings(f"{folder} holds results", before | added, settings, remedy=remedy)
        if added and write:  # from now on they are asked for
            write_text(path, json.dumps(settings, indent=1) + "\n")
    elif write:
        write_text(path, json.dumps(settings, indent=1) + "\n")


class Measurements:
    """Per-image measurements in a folder of small files; files are added, never changed.

    Args:
        folder: need not exist.
        needed: names of the tensors that an image must have to count as measured.
    """

    def __init__(self, folder: Path, needed: Sequence[str]):
        self.folder = folder
        self.needed = frozenset(needed)

    def add(self, keys: Sequence[str], values: Mapping[str, torch.Tensor]) -> None:
        """Stores tensors [B, ...] of B images in one file, written atomically."""
        name = hashlib.sha256("\n".join(keys).encode("utf-8", "surrogateescape")).hexdigest()[:24]
        write_record(self.folder / f"{name}.safetensors", _KIND, dict(values), {"keys": list(keys)})

    def done(self) -> set[str]:
        """Keys of the images that have been measured."""
        return {key for _, keys in self._files() for key in keys}

    def gather(self, keys: Sequence[str], name: str) -> torch.Tensor:
        """The tensor called `name`, [M, ...], in the order of the keys.

        Raises:
            ValueError: if an image has not been measured.
        """
        row = {key: i for i, key in enumerate(keys)}
        gathered, missing = None, set(row)
        for path, held in self._files():
            wanted = [i for i, key in enumerate(held) if key in row]
            if not wanted:
                continue
            with open_tensors(path, _KIND) as file, reading(path, _KIND):
                values = file.get_tensor(name)
            if gathered is None:
                gathered = values.new_empty(len(keys), *values.shape[1:])
            gathered[[row[held[i]] for i in wanted]] = values[wanted]
            missing -= {held[i] for i in wanted}
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(keys)} images have no {name} in {self.folder}, such as {min(missing)}: "
                "run the same command again to measure them"
            )
        return gathered

    def _files(self) -> list[tuple[Path, list[str]]]:
        """The files with all needed tensors, and their keys; a damaged file counts as missing."""
        found = []
        for path in sorted(self.folder.glob("*.safetensors")):
            with suppress(ValueError):
                with open_tensors(path, _KIND) as file, reading(path, _KIND):
                    if not self.needed <= set(file.keys()):
                        continue
                    counts = {file.get_slice(name).get_shape()[0] for name in self.needed}
                    keys = json_object((file.metadata() or {}).get("dcdd", ""), path, _KIND).get("keys")
                if isinstance(keys, list) and all(isinstance(key, str) for key in keys) and counts == {len(keys)}:
                    found.append((path, keys))
        return found
