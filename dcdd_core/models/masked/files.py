"""The folder of a masked sampler: config.json, model.safetensors, the text tokenizer's files.

config.json states the sizes of the network, the prompt's template, the default sampling options, and the path of its
image tokenizer, relative to the folder. Weights are stored as they are, or in 8 bits with one scale per row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from ...files import in_file, write_tensors, write_text
from ...int8_rows import large_matrices, restored, rounded
from ...method.progressive import ProgressiveOptions
from ...settings import require_text
from ...types import Codebook
from ..checkpoints import check_count, load_strictly, read_config, read_headers, read_wanted
from .network import MaskedConfig, MaskedTransformer
from .sampler import MaskedSampler
from .words import Words

MODEL_TYPE = "dcdd_masked"
_AGAIN = "fetch the whole model again"
_CODEBOOK = "codebook"
_ENTRIES = {"model_type", "name", "template", "tokenizer", "sampling", "network"}


def save_masked(
    folder: Path,
    network: MaskedTransformer,
    codebook: Codebook,
    *,
    name: str,
    template: str,
    tokenizer: str,
    sampling: ProgressiveOptions,
    int8: bool = False,
) -> None:
    """Writes config.json and model.safetensors; the caller writes the text tokenizer's files.

    Args:
        tokenizer: the image tokenizer's folder, relative to `folder`, with "/".
        int8: large matrices in 8 bits with a float32 scale per row, the rest in float16; otherwise all unchanged.

    Raises:
        OSError: as `write_tensors`.
    """
    held = network.state_dict()
    tensors = {_CODEBOOK: codebook.vectors} | (rounded(held, large_matrices(network)) if int8 else held)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    config = {
        "model_type": MODEL_TYPE,
        "name": name,
        "template": template,
        "tokenizer": tokenizer,
        "sampling": asdict(sampling),
        "network": asdict(network.config),
    }
    write_text(folder / "config.json", _text(config))


def save_sampling(folder: Path, sampling: ProgressiveOptions) -> None:
    """Changes the default sampling options of the sampler in a folder, and nothing else.

    Raises:
        ValueError: if the folder's config.json cannot be read or has other entries.
    """
    config = _config(folder) | {"sampling": asdict(sampling)}
    write_text(folder / "config.json", _text(config))


def load_masked(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> MaskedSampler:
    """Loads the sampler in a folder.

    Raises:
        ValueError: for an entry of config.json that is missing, unknown or out of range, tensors that are missing,
            unexpected or of a wrong shape, a text tokenizer that is too large, and files that cannot be read.
    """
    folder = Path(folder)
    config = _config(folder)
    with in_file(folder / "config.json"):
        sizes, sampling = MaskedConfig.of(config["network"]), _sampling(config["sampling"])
        require_text("name", config["name"], remedy=_AGAIN)
    words = Words.load(folder, config["template"])
    headers = read_headers(folder)
    check_count(folder / "config.json", "network.layers", sizes.layers, headers, "layers.")
    found = read_wanted(folder, headers.__contains__, device=device)
    with in_file(folder / "model.safetensors"):
        if _CODEBOOK not in found:
            raise ValueError(f"has no tensor {_CODEBOOK!r}: {_AGAIN}")
        codebook = Codebook(found.pop(_CODEBOOK))
        if (codebook.size, codebook.dim) != (sizes.codes, sizes.code_dim):
            raise ValueError(
                f"has a codebook of {codebook.size} x {codebook.dim}, and config.json says {sizes.codes} x "
                f"{sizes.code_dim}: {_AGAIN}"
            )
        tensors = {name: value.to(dtype) for name, value in restored(found, remedy=_AGAIN).items()}
    with torch.device("meta"):
        network = MaskedTransformer(sizes)
    load_strictly(network, tensors, str(folder))
    if words.size > sizes.words:
        raise ValueError(
            f"{folder} has a tokenizer of {words.size} words and a network of {sizes.words}: they do not belong "
            f"together, {_AGAIN}"
        )
    network.eval().requires_grad_(False)
    return MaskedSampler(network, words, codebook, name=config["name"], sampling=sampling)


def tokenizer_folder(folder: str | Path) -> Path:
    """The folder of a masked sampler's image tokenizer.

    Raises:
        ValueError: for an entry that is not a relative path.
    """
    folder = Path(folder)
    said = _config(folder)["tokenizer"]
    if not isinstance(said, str) or not said or PurePosixPath(said).is_absolute() or Path(said).is_absolute():
        raise ValueError(
            f"{folder / 'config.json'}: tokenizer must be the image tokenizer's folder relative to this one, such as "
            f"'tokenizer', got {said!r}"
        )
    return folder / said


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=1, ensure_ascii=False) + "\n"


def _config(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    if set(config) != _ENTRIES:
        missing, unknown = sorted(_ENTRIES - set(config)), sorted(set(config) - _ENTRIES)
        raise ValueError(f"{folder / 'config.json'} lacks {missing} and has {unknown}, which is unknown: {_AGAIN}")
    return config


def _sampling(values: Any) -> ProgressiveOptions:
    if not isinstance(values, Mapping):
        raise ValueError(f"sampling must be an object, got {values!r}: {_AGAIN}")
    if isinstance(schedule := values.get("schedule"), list):
        values = {**values, "schedule": tuple(schedule)}
    try:
        return ProgressiveOptions(**values)
    except TypeError as error:
        raise ValueError(f"sampling has an unknown entry ({error}): {_AGAIN}") from None
