"""Files that are written whole or not at all, and read strictly: what is wrong with one is said in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to, in the folder of `path`, which is made; when the block ends it becomes `path`.

    Where the block fails, what it wrote is removed, and what was at `path` stays.

    Raises:
        OSError: if the block cannot write, such as on a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free / 1e9
        raise OSError(
            f"{path} could not be written ({error}): {free:.1f} GB are free there; make room and do the same again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def reading(path: str | Path, expected: str, remedy: str = "download it again") -> Iterator[None]:
    """Turns what other libraries raise in the block, where they read `path`, into one ValueError that names it.

    It belongs around calls into other libraries alone: the errors of this package's functions say more.

    Args:
        expected: what the file should be, with its article.
        remedy: what the user can do.

    Raises:
        ValueError: for any Exception of the block, except for memory that ran out.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200] or "no reason given"
        raise ValueError(f"{path} cannot be read as {expected} ({type(error).__name__}: {said}): {remedy}") from error


def regular_file(path: str | Path, expected: str) -> Path:
    """The path of a file that can be read from end to end, as a FIFO, a device or a folder cannot.

    Raises:
        ValueError: if there is none, saying what is there.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected {expected}")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a device, pipe or socket"
        raise ValueError(f"{path} is {kind}; expected {expected}")
    return path


MOST_JSON = 256 * 2**20
"""Bytes of the largest JSON file that is read. The largest known, tokenizers of 256,000 words, are below 40 MB."""


def read_json(path: str | Path, expected: str, remedy: str = "download it again") -> dict[str, Any]:
    """The object in a JSON file, which may begin with a byte order mark.

    Args:
        expected, remedy: as `reading`.

    Raises:
        ValueError: naming the file, and what it holds instead, such as a Git LFS pointer or an HTML page.
    """
    path = regular_file(path, expected)
    if (size := path.stat().st_size) > MOST_JSON:
        raise ValueError(f"{path} has {size:,} bytes, expected {expected} of at most {MOST_JSON:,}: {remedy}")
    with reading(path, expected, remedy):
        content = path.read_bytes()
    if other := _not_json(content):
        raise ValueError(f"{path} is {other}, expected {expected}: {remedy}")
    with reading(path, expected, remedy):
        value = json.loads(content.decode("utf-8-sig"))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected {expected}, a JSON object: {remedy}")
    return value


def _not_json(content: bytes) -> str | None:
    """What downloads leave in the place of a file, in words."""
    start = content[:512].lstrip().lower()
    if not start:
        return "empty"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, which stands for a file that was not fetched (git lfs pull)"
    return "an HTML page" if start.startswith((b"<!doctype", b"<html")) else None


def write_text(path: Path, text: str) -> Path:
    """Writes a text file whole or not at all; makes its folder.

    Raises:
        OSError: as `whole_file`.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, "utf-8")
    return path


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file whole or not at all; makes its folder. The same content gives the same bytes.

    Args:
        tensors: on any device, of any layout; each with a storage of its own.

    Raises:
        OSError: as `whole_file`.
        RuntimeError: from safetensors, for tensors that share a storage.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        save_file(held, temporary, metadata=dict(metadata))
        _sort_metadata(temporary)


def write_record(path: str | Path, kind: str, tensors: Mapping[str, torch.Tensor], fields: Mapping[str, Any]) -> None:
    """Writes tensors with named JSON values as one safetensors file; `read_record` reads it back.

    Args:
        kind: what the file holds, in words.

    Raises:
        OSError: as `whole_file`.
    """
    write_tensors(path, tensors, {"format": "dcdd", "kind": kind, "dcdd": json.dumps(fields)})


def read_record(
    path: str | Path, kind: str, names: Collection[str], fields: Collection[str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the JSON values that `write_record` wrote.

    Args:
        names, fields: exactly those the file must hold.

    Raises:
        ValueError: naming a file that is absent, damaged or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a file with a {kind}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); expected a {kind}") from error
    if header.get("format") != "dcdd" or header.get("kind") != kind or set(tensors) != set(names):
        raise ValueError(
            f"{path} holds {header.get('kind', 'no known kind of thing')} with tensors {sorted(tensors)}; "
            f"expected a {kind} with {sorted(names)}"
        )
    try:
        meta = json.loads(header.get("dcdd", "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: its description is not JSON ({error}); make it again") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{path} is damaged: its description is {meta!r}, expected an object; make it again")
    if set(meta) != set(fields):
        raise ValueError(
            f"{path} describes its {kind} by {sorted(meta)}, expected {sorted(fields)}: it was written by another "
            "version; make it again"
        )
    return tensors, meta


def _sort_metadata(path: Path) -> None:
    """In the header of a safetensors file (its length in 8 bytes, then JSON), which has them in a random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise RuntimeError(f"the header of {path} grew from {length} to {len(text)} bytes when it was sorted")
        file.seek(8)
        file.write(text.ljust(length))
