"""Where models are, and what lies there. Whoever starts the double says which base directory it works in."""

from __future__ import annotations

import os
from pathlib import Path

_WEIGHTS = {".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin"}
#: Kind -> folders below the base directory.
_FOLDERS = {
    "checkpoints": ("models/checkpoints", "output/checkpoints"),
    "diffusion_models": ("models/unet", "models/diffusion_models", "output/diffusion_models"),
    "vae": ("models/vae", "output/vae"),
    "diffusers": ("models/diffusers",),
}
folder_names_and_paths: dict[str, tuple[list[str], set[str]]] = {}
base_path = models_dir = ""


def set_base_directory(base: Path) -> None:
    """Of the double alone: what the command line's --base-directory does."""
    global base_path, models_dir
    base_path, models_dir = str(base), str(base / "models")
    folder_names_and_paths.clear()
    for kind, folders in _FOLDERS.items():
        extensions = {"folder"} if kind == "diffusers" else set(_WEIGHTS)
        folder_names_and_paths[kind] = ([os.path.join(base_path, folder) for folder in folders], extensions)


def add_model_folder_path(folder_name: str, full_folder_path: str) -> None:
    """Behind those that the key has; a new key has no extensions, which lists every file."""
    paths, _ = folder_names_and_paths.setdefault(folder_name, ([], set()))
    if full_folder_path not in paths:
        paths.append(full_folder_path)


def get_folder_paths(folder_name: str) -> list[str]:
    return list(folder_names_and_paths[folder_name][0])


def get_filename_list(folder_name: str) -> list[str]:
    roots, extensions = folder_names_and_paths[folder_name]
    found = {
        path.relative_to(root).as_posix()
        for root in map(Path, roots)
        for path in root.rglob("*")
        if path.is_file() and (not extensions or path.suffix.lower() in extensions)
    }
    return sorted(found)


def get_output_directory() -> str:
    return os.path.join(base_path, "output")


def get_temp_directory() -> str:
    return os.path.join(base_path, "temp")
