"""Which files an install through ComfyUI's Manager has, as the registry's own tool packs them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def shipped_files() -> list[str]:
    """git's files, and those not added yet, less what .comfyignore names (in .gitignore's language); sorted.

    Raises:
        RuntimeError: outside of a git checkout, where nothing says which files are the project's.
    """
    if not (ROOT / ".git").exists():
        raise RuntimeError(f"{ROOT} is no git checkout: nothing says which files are the project's")
    known = _listed("--cached", "--others", "--exclude-standard")
    left_out = _listed("--cached", "--ignored", "--exclude-from=.comfyignore")
    left_out |= _listed("--others", "--ignored", "--exclude-from=.comfyignore")
    return sorted(name for name in known - left_out if (ROOT / name).is_file())


def copy_shipped(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """Copies the shipped files for which `wanted` holds; returns `folder`."""
    for name in filter(wanted, shipped_files()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def _listed(*options: str) -> set[str]:
    done = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, check=True)
    return set(filter(None, done.stdout.decode().split("\0")))
