"""Model files and folders as ComfyUI lists and finds them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import folder_paths

BUNDLES = "dcdd"
JANUS = "janus"


def add_model_folders() -> None:
    """Adds models/janus and models/dcdd to ComfyUI's folders, after those that extra_model_paths.yaml names."""
    for key in (JANUS, BUNDLES):
        folder_paths.add_model_folder_path(key, os.path.join(folder_paths.models_dir, key))
    # Only bundles are single files; a key without extensions would list everything there is.
    folder_paths.folder_names_and_paths[BUNDLES][1].add(".safetensors")


def model_folder(key: str) -> Path:
    """Where new files of a kind go: among the folders that are searched, the one of that name, or else the first."""
    paths = [Path(path) for path in folder_paths.get_folder_paths(key)]
    return next((path for path in paths if path.name == key), paths[0])


def files(key: str) -> list[str]:
    """Names of the model files of a kind, as combos list them."""
    return folder_paths.get_filename_list(key)


def folders(key: str, *holding: str) -> list[str]:
    """Names of a kind's folders, at any depth, that hold a file or folder with one of these names or patterns. A
    folder's name may be OWNER/NAME, or models--OWNER--NAME/snapshots/REVISION as in the hub's cache."""
    found = (
        path.relative_to(root).as_posix()
        for root in map(Path, folder_paths.get_folder_paths(key))
        for path in _holders(root, holding)
    )
    return sorted(dict.fromkeys(found))


def samplers() -> list[str]:
    """Folders of token samplers in models/janus. Published ones other than Janus have a pipeline's index (aMUSEd) or a
    checkpoint (BIGFix, LlamaGen) instead of a configuration."""
    return folders(JANUS, "config.json", "model_index.json", "*.pth", "t2i_*.pt", "t2i_*.safetensors")


def _holders(root: Path, holding: Collection[str]) -> Iterator[Path]:
    """Folders below `root` that hold one of `holding`; no folder inside these is searched. Links are followed, but each
    folder is searched only once, so that loops end."""
    waiting, searched = [root], set()
    while waiting:
        folder = waiting.pop()
        try:
            if (place := folder.resolve()) in searched:
                continue
            searched.add(place)
            children = sorted(child for child in folder.iterdir() if child.is_dir())
        except OSError:  # Not readable, or gone: left out, as by os.walk and thus by ComfyUI.
            continue
        for child in children:
            if any(path.exists() for pattern in holding for path in child.glob(pattern)):
                yield child
            elif not child.name.startswith("."):
                waiting.append(child)


def transformers() -> list[str]:
    """Names of what may hold a diffusion transformer: model files, and diffusers folders, which end in a slash."""
    return [*files("diffusion_models"), *(f"{name}/" for name in folders("diffusers", "transformer"))]


def autoencoders() -> list[str]:
    """Names of what may hold an autoencoder: VAE files, and diffusers folders, which end in a slash."""
    return [*files("vae"), *(f"{name}/" for name in folders("diffusers", "vae"))]


def transformer_path(name: str) -> Path:
    """The file or folder of a name from `transformers`."""
    return path_of("diffusers", name) / "transformer" if name.endswith("/") else path_of("diffusion_models", name)


def autoencoder_path(name: str) -> Path:
    """The file or folder of a name from `autoencoders`."""
    return path_of("diffusers", name) / "vae" if name.endswith("/") else path_of("vae", name)


def path_of(key: str, name: str) -> Path:
    """The file or folder that a combo's name stands for.

    Raises:
        ValueError: if it does not exist (any more), or leads out of its folder.
    """
    for root in map(Path, folder_paths.get_folder_paths(key)):
        path = root / name
        if name and _inside(name) and path.exists() and path.resolve() != root.resolve():
            return path
    where = " or ".join(folder_paths.get_folder_paths(key))
    raise ValueError(f"{name!r} is not in {where}: put it there, press R to refresh the lists, and choose it again")


def _inside(name: str) -> bool:
    """Whether a relative path stays in its folder, on any system."""
    kinds = (PurePosixPath(name), PureWindowsPath(name))
    return not any(kind.is_absolute() or kind.drive or kind.root or ".." in kind.parts for kind in kinds)


CALIBRATIONS = "calibrations"
#: The combo value that stands for an empty list.
NO_CALIBRATION = "none yet: fit one and save it"


def bundles() -> list[str]:
    """Decoder bundles in models/dcdd, without the calibrations, which have a folder of their own there."""
    return [name for name in files(BUNDLES) if Path(name).parts[0] != CALIBRATIONS]


def calibrations() -> list[str]:
    """Calibration files, as paths relative to their folder."""
    names = (Path(name) for name in files(BUNDLES))
    return [name.relative_to(CALIBRATIONS).as_posix() for name in names if name.parts[0] == CALIBRATIONS]


def calibration_path(name: str) -> Path:
    """The file of a name from `calibrations`.

    Raises:
        ValueError: if it does not exist, or no calibration does.
    """
    if name == NO_CALIBRATION:
        raise ValueError("no calibration is saved yet: fit one with a Logit Calibrator, save it, press R and choose it")
    return path_of(BUNDLES, f"{CALIBRATIONS}/{name}")


def new_calibration(name: str) -> Path:
    """A path for a new calibration, at which no file exists yet.

    Raises:
        ValueError: for a name that a file cannot have.
    """
    name = name.strip().removesuffix(".safetensors")
    if not name or name.startswith(".") or any(sign in name for sign in '/\\:*?"<>|'):
        raise ValueError(f"{name!r} is not a valid file name: use letters, digits, spaces, - and _")
    folder = model_folder(BUNDLES) / CALIBRATIONS
    numbered = (folder / f"{name}{suffix}.safetensors" for suffix in ("", *(f"_{k}" for k in range(2, 10_000))))
    return next(path for path in numbered if not path.exists())


def state_of(path: Path) -> str:
    """A text that changes with a model file, or with any file in a model folder: only then do loaders run again."""
    parts = sorted(path.rglob("*")) if path.is_dir() else [path]
    return "|".join(f"{p.name}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in parts if p.is_file())
