"""Reading checkpoints strictly: folders of safetensors shards, configs, and modules that get exactly their tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn


def read_config(folder: str | Path, name: str = "config.json") -> dict[str, Any]:
    """A model folder's JSON configuration.

    Raises:
        ValueError: if the folder or the file is missing, or not JSON.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected a model folder with {name} and *.safetensors in it")
    path = folder / name
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"{folder} has no {name} (it holds {found}); give the folder that the model was saved into")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, expected an object; download it again")
    return config


def read_tensors(
    source: str | Path, *, prefix: str = "", dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """The tensors of one safetensors file, or of all in a folder, whose names start with `prefix` (then cut off).

    Only these are read from disk: the VQ-VAE of a 14 GB checkpoint costs its own size.

    Raises:
        ValueError: if there is no file, a file is cut short, or nothing has the prefix.
    """
    source = Path(source)
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{source} holds no .safetensors file; give a model folder or file that does")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt", device=str(device)) as opened:
                for name in opened.keys():
                    if name.startswith(prefix):
                        tensor = opened.get_tensor(name)
                        cast = dtype is not None and tensor.is_floating_point()
                        tensors[name[len(prefix) :]] = tensor.to(dtype) if cast else tensor
        except SafetensorError as error:
            raise ValueError(
                f"{file} cannot be read ({error}): it is cut short or damaged, download it again"
            ) from error
    if not tensors:
        raise ValueError(f"{source} holds no tensor named {prefix}*; it is another kind of model")
    return tensors


def load_strictly(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], what: str, *, unused: Iterable[str] = ()
) -> None:
    """Puts `tensors` in the place of all the module's parameters and persistent buffers (which may be on "meta").

    Args:
        what: names the file in errors.
        unused: parameters that may be missing.

    Raises:
        ValueError: naming missing and unexpected tensors, and shapes that do not fit.
    """
    expected = module.state_dict()
    missing = sorted(set(expected) - set(tensors) - set(unused))
    unexpected = sorted(set(tensors) - set(expected))
    wrong = [
        f"{name} is {list(tensors[name].shape)}, expected {list(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if missing or unexpected or wrong:
        parts = [
            f"{label}: {_some(names)}"
            for label, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
            if names
        ]
        raise ValueError(f"{what} does not fit {type(module).__name__}; " + "; ".join(parts))
    module.load_state_dict(dict(tensors), strict=not unused, assign=True)


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
