"""Files that are written completely or not at all, and read strictly: one line says what is wrong with a file."""

from __future__ import annotations

import codecs
import errno
import glob
import json
import os
import re
import secrets
import shutil
import stat
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .int8_rows import SCALE, restored
from .settings import shown

#: The system's errors for a full disk: no space left, quota exceeded, file too large.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: Numbers of Windows' own errors, which Rust prints in the place of errno's.
_WINDOWS = {
    5: errno.EACCES,  # access denied
    19: errno.EROFS,  # write-protected
    32: errno.EACCES,  # in use by another program
    39: errno.ENOSPC,  # disk full, while a file grows
    80: errno.EEXIST,
    112: errno.ENOSPC,
    183: errno.EEXIST,
    206: errno.ENAMETOOLONG,
    267: errno.ENOTDIR,
    1224: errno.EACCES,  # mapped by a program
}


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path to write to beside `path`, whose folder is created; it becomes `path` when the block ends.

    If the block fails, what it wrote is removed, and what was at `path` stays. The permissions are the umask's,
    whatever the block sets. Concurrent writers of one path do not interfere: the last to finish wins.

    Raises:
        OSError: if the block cannot write, such as on a full disk; says what to do.
    """
    path = Path(path)
    # Each writer has a name of its own: two that shared one would mix what they write.
    temporary = path.with_name(f"{_temporary_stem(path)}.{secrets.token_hex(4)}.tmp")
    try:
        with suppress(FileNotFoundError):
            if stat.S_ISDIR(path.stat().st_mode):
                raise IsADirectoryError(errno.EISDIR, "a folder has its name")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Only to a file created in this way does the system apply the umask and a folder's default permissions.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:
            temporary.chmod(stat.S_IMODE(mode))
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written ({error}): {way_out(error, path)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(path: str | Path) -> None:
    """Removes what writers of `path` that were killed in `whole_file` left behind. Nobody may be writing it now."""
    path = Path(path)
    for leftover in path.parent.glob(f"{glob.escape(_temporary_stem(path))}.{'[0-9a-f]' * 8}.tmp"):
        with suppress(OSError):
            leftover.unlink()


def _temporary_stem(path: Path) -> str:
    """How a temporary name begins: short enough for any file system, and UTF-8, as other libraries need it."""
    return path.name[:40].encode("utf-8", "ignore").decode()


def way_out(error: BaseException, path: str | Path, *, windows: bool = os.name == "nt") -> str:
    """What to do about a file that could not be written, depending on the system's reason.

    Args:
        error: an OSError, or another library's error that quotes one. If it has no number, a disk with less than 64 MiB
            left is taken to be the reason.
        windows: whether a number that a library quotes is Windows' own.
    """
    folder = Path(path).parent
    # safetensors writes the system's number into its text.
    said = re.search(r"os error (\d+)", str(error))
    quoted = int(said[1]) if said else None
    number = getattr(error, "errno", None) or (_WINDOWS.get(quoted) if windows else quoted)
    free: int | None = None
    with suppress(OSError):
        free = shutil.disk_usage(folder).free
    if number in _FULL or (number is None and free is not None and free < 2**26):
        left = "" if free is None else f"{free / 1e9:.1f} GB are free there; "
        return f"{left}make room and do the same again"
    if number == errno.EROFS:
        return "its disk is read-only; choose a folder on another one"
    if number in (errno.EACCES, errno.EPERM):
        return f"you may not write there; change the permissions of {folder}, or choose another folder"
    if number == errno.EISDIR:
        return "a folder lies in the file's place; choose another name, or move that folder"
    if number in (errno.ENOTDIR, errno.EEXIST):
        return "a file lies where its folder should be; choose another folder, or move that file"
    if number == errno.ENAMETOOLONG:
        return "choose a shorter name"
    return "check the disk, or choose another folder"


@contextmanager
def reading(path: str | Path, expected: str, remedy: str = "download it again") -> Iterator[None]:
    """Turns what other libraries raise in the block, while they read `path`, into one ValueError that names it.

    Use it only around calls into other libraries: the errors of this package's functions say more.

    Args:
        expected: what the file should be, with its article.
        remedy: what the user can do about its content.

    Raises:
        ValueError: for any Exception of the block, except running out of memory.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200] or "no reason given"
        if isinstance(error, PermissionError):
            remedy = "you may not read it; change its permissions"
        elif isinstance(error, OSError) and error.errno is not None:
            remedy = "check its disk and the connection to it, and try again"
        raise ValueError(f"{path} cannot be read as {expected} ({type(error).__name__}: {said}): {remedy}") from error


@contextmanager
def in_file(path: str | Path) -> Iterator[None]:
    """Names the file in the ValueErrors of the block, which checks what was read from it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def regular_file(path: str | Path, expected: str) -> Path:
    """The path, if a regular file is there: one that can be read to its end, unlike a FIFO, a device or a folder.

    Raises:
        ValueError: if there is none, saying what is there.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            raise ValueError(
                f"{path} is a link to {os.readlink(path)}, which does not exist; expected {expected}"
            ) from error
        raise ValueError(f"{path} does not exist; expected {expected}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be opened ({error}); expected {expected}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise ValueError(f"{path} is {kind}; expected {expected}")
    return path


MOST_JSON = 64 * 2**20
"""Bytes of the largest JSON file that is read. The largest known, tokenizers of 256,000 words, are below 40 MB; parsed,
the worst takes 20 times its size."""


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
    if other := stand_in(content):
        raise ValueError(f"{path} is {other}, expected {expected}: {remedy}")
    return json_object(content, path, expected, remedy)


def json_object(
    content: bytes | str, path: str | Path, expected: str, remedy: str = "download it again"
) -> dict[str, Any]:
    """The JSON object that `path` holds as text, such as in a header.

    Args:
        expected, remedy: as `reading`.

    Raises:
        ValueError: naming the file.
    """
    with reading(path, expected, remedy):
        value = json.loads(content.decode("utf-8-sig") if isinstance(content, bytes) else content)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected {expected}, a JSON object: {remedy}")
    return value


#: How files that are often mistaken for others begin, in lower case, and what they are.
_STAND_INS = (
    (b"version https://git-lfs", "a Git LFS pointer, which stands for a file that was not fetched (git lfs pull)"),
    (b"<!doctype", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<?xml", "an XML page"),
)


def stand_in(content: bytes) -> str | None:
    """Describes what a failed download leaves in place of a file; None for any other content."""
    start = content[:512].removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if not start:
        return "blank" if content else "empty"
    return next((kind for sign, kind in _STAND_INS if start.startswith(sign)), None)


@contextmanager
def utf8_path(path: str | Path) -> Iterator[Path]:
    """Gives a path for libraries that take only UTF-8, such as safetensors; `path` itself if it is UTF-8.

    Only Linux has other names, and there an open file is also at /proc/self/fd/N.

    Raises:
        OSError: if there is nothing at a path that needs another name.
    """
    path = Path(path)
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        opened = os.open(path, os.O_RDONLY)
        try:
            yield Path(f"/proc/self/fd/{opened}")
        finally:
            os.close(opened)
    else:
        yield path


@contextmanager
def open_tensors(path: str | Path, expected: str, remedy: str = "download it again") -> Iterator[Any]:
    """Opens a safetensors file; none of its tensors has been read.

    Args:
        expected, remedy: as for `reading`, which belongs around what is then read.

    Raises:
        ValueError: naming the file, and what it is instead.
    """
    path = regular_file(path, expected)
    with reading(path, expected, remedy), path.open("rb") as raw:
        start = raw.read(512)
    if other := stand_in(start):
        raise ValueError(f"{path} is {other}, expected {expected}: {remedy}")
    with ExitStack() as stack:
        with reading(path, expected, remedy):
            file = stack.enter_context(safe_open(stack.enter_context(utf8_path(path)), framework="pt"))
        yield file


_CHECKSUMS = "checksums"


def tensor_checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """A checksum of each tensor's type, shape and content, on any device: "crc32:" and eight hexadecimal digits.

    It detects damage, including any single flipped bit, but not tampering.
    """
    return {name: _checksum(tensor) for name, tensor in tensors.items()}


def _checksum(tensor: torch.Tensor) -> str:
    kind = f"{tensor.dtype} {list(tensor.shape)}".encode()
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"crc32:{zlib.crc32(content, zlib.crc32(kind)):08x}"


def require_checksums(path: str | Path, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, str]) -> None:
    """Compares tensors that were read from `path` with the checksums from when they were written.

    Args:
        tensors: all of the file, or some.
        expected: by name, from `tensor_checksums`, possibly for more tensors. If it is empty, as for a file without
            checksums, nothing is compared.

    Raises:
        ValueError: naming the file and the tensors that differ.
    """
    if not expected:
        return
    damaged = [name for name, found in tensor_checksums(tensors).items() if expected.get(name) != found]
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        raise ValueError(
            f"{path} is damaged: {', '.join(damaged[:3])}{more} is not what was written (its checksum differs): "
            "take another copy of the file"
        )


def write_text(path: Path, text: str) -> Path:
    """Writes a text file completely or not at all, and creates its folder; returns the path.

    Raises:
        OSError: as `whole_file`.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, "utf-8", newline="\n")
    return path


def write_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], *, checksums: bool = False
) -> None:
    """Writes a safetensors file completely or not at all, creating its folder. Equal content gives equal bytes.

    Args:
        tensors: on any device, in any memory layout; each with a storage of its own.
        checksums: adds the tensors' checksums to the metadata, for `stored_checksums`.

    Raises:
        OSError: as `whole_file`.
        RuntimeError: from safetensors, for tensors that share a storage.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    stated = dict(metadata) | ({_CHECKSUMS: json.dumps(tensor_checksums(held))} if checksums else {})
    with whole_file(path) as temporary:
        with utf8_path(temporary.parent) as folder:
            save_file(held, folder / temporary.name, metadata=stated)
        _sort_metadata(temporary)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity.

    No copy is made, except of float8; `isfinite().all()` takes 30 times as long.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # float8 has no arithmetic
        tensor = tensor.to(torch.bfloat16)
    low, high = tensor.aminmax()
    return bool(low.isfinite() & high.isfinite())


def stored_checksums(path: str | Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """The checksums that `write_tensors` put into a file's metadata; empty for a file without.

    Raises:
        ValueError: naming the file, if they are damaged.
    """
    return json_object(metadata.get(_CHECKSUMS, "{}"), path, "a file with checksums", "take another copy of the file")


#: What to do about a record: only this package writes them.
_AGAIN = "it is damaged or something else; make it again"


def write_record(path: str | Path, kind: str, tensors: Mapping[str, torch.Tensor], fields: Mapping[str, Any]) -> None:
    """Writes tensors with named JSON values as one safetensors file; `read_record` reads it back.

    Args:
        kind: what the file holds, in words.

    Raises:
        OSError: as `whole_file`.
    """
    write_tensors(path, tensors, {"format": "dcdd", "kind": kind, "dcdd": json.dumps(fields)})


def read_record(
    path: str | Path,
    kind: str,
    names: Collection[str],
    fields: Collection[str],
    *,
    later: Collection[str] = (),
    int8_rows: bool = False,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the JSON values that `write_record` wrote.

    Args:
        names, fields: exactly the tensors and values that the file must hold.
        later: tensors and fields that a file may lack.
        int8_rows: matrices may be stored in 8 bits (`int8_rows.rounded`); they are then returned in float32.

    Raises:
        ValueError: naming a file that is absent, damaged or of another kind.
    """
    expected = f"a file with a {kind}"
    with open_tensors(path, expected, _AGAIN) as file:
        with reading(path, expected, _AGAIN):
            header, stored = file.metadata() or {}, list(file.keys())
        held = [name for name in stored if not (int8_rows and name.endswith(SCALE))]
        if header.get("format") != "dcdd" or header.get("kind") != kind or not _holds(held, names, later):
            found = " ".join(header.get("kind", "no known kind of thing").split())[:80]
            needed = sorted(set(names) - set(later))
            raise ValueError(
                f"{path} holds {found} with tensors {shown(sorted(held))}; expected a {kind} with {needed}"
            )
        with reading(path, expected, _AGAIN):
            # Copied: a tensor that stays mapped changes with its file, and Windows lets nobody replace a mapped file.
            tensors = {name: file.get_tensor(name).clone() for name in stored}
    if int8_rows:
        with in_file(path):
            tensors = restored(tensors, remedy=_AGAIN)
    meta = json_object(header.get("dcdd", "{}"), path, f"a description of a {kind}", _AGAIN)
    if not _holds(meta, fields, later):
        raise ValueError(
            f"{path} describes its {kind} by {shown(sorted(meta))}, expected {sorted(fields)}: it was written by "
            "another version; make it again"
        )
    return tensors, meta


def _holds(found: Iterable[str], names: Iterable[str], later: Iterable[str]) -> bool:
    """Whether these are the names, of which `later` may be missing."""
    return set(names) - set(later) <= set(found) <= set(names)


def _sort_metadata(path: Path) -> None:
    """Sorts the metadata, which is in a random order, in a safetensors header: its length in 8 bytes, then JSON."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise RuntimeError(f"the header of {path} grew from {length} to {len(text)} bytes when it was sorted")
        file.seek(8)
        file.write(text.ljust(length))
