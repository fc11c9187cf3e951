"""Ways to damage a sound file or folder: what downloads, disks, other programs and other people do to one."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

BAD_VALUES = (
    None,
    "",
    "nonsense",
    "\ud800",
    -1,
    0,
    1.5,
    10**30,
    float("nan"),
    float("inf"),
    True,
    [],
    {},
    [[[]]],
    {"a": 1},
    "x" * 5000,
)
_NESTED = b"[" * 200_000
_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 14516686\n"
_PAGE = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Entry not found</body></html>\n"


def _replaced(content: bytes) -> Callable[[Path, random.Random], str]:
    def mutate(path: Path, draw: random.Random) -> str:
        path.write_bytes(content)
        return f"{path.name} := {content[:30]!r}"

    return mutate


def flip(path: Path, draw: random.Random) -> str:
    """One bit. Half of the time in the first kilobyte, where the structure is."""
    content = bytearray(path.read_bytes())
    if not content:
        return "nothing"
    place = draw.randrange(min(len(content), 1024) if draw.random() < 0.5 else len(content))
    content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return f"{path.name}: a bit of byte {place}"


def truncate(path: Path, draw: random.Random) -> str:
    content = path.read_bytes()
    kept = draw.choice((0, 1, 7, 8, 9, len(content) // 2, max(len(content) - 1, 0), draw.randrange(len(content) + 1)))
    path.write_bytes(content[:kept])
    return f"{path.name}: the first {min(kept, len(content))} bytes"


def append(path: Path, draw: random.Random) -> str:
    with path.open("ab") as file:
        file.write(draw.randbytes(draw.choice((1, 8, 1000))))
    return f"{path.name}: bytes appended"


def byte_order_mark(path: Path, draw: random.Random) -> str:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return f"{path.name}: a byte order mark"


def utf16(path: Path, draw: random.Random) -> str:
    path.write_bytes(path.read_bytes().decode("latin-1").encode("utf-16"))
    return f"{path.name}: as UTF-16"


def remove(path: Path, draw: random.Random) -> str:
    path.unlink()
    return f"{path.name}: removed"


def fifo(path: Path, draw: random.Random) -> str:
    path.unlink()
    os.mkfifo(path)
    return f"{path.name}: a FIFO"


def device(path: Path, draw: random.Random) -> str:
    """A device of this folder's own: nothing that overwrites it harms the machine."""
    path.unlink()
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # zeros without an end
    except OSError:  # Only root makes devices.
        os.mkfifo(path)
    return f"{path.name}: a device"


def folder(path: Path, draw: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return f"{path.name}: a folder"


def loop(path: Path, draw: random.Random) -> str:
    path.unlink()
    path.symlink_to(path.name)
    return f"{path.name}: a link to itself"


def _places(value: Any, place: tuple = ()) -> list[tuple]:
    """The paths of all values in a JSON value, but for its own."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, held in items for found in ((*place, key), *_places(held, (*place, key)))]


def _change(value: Any, draw: random.Random) -> str:
    """Replaces, removes or adds one field of a JSON value, in it."""
    places = _places(value)
    if not places:
        return "nothing"
    *way, last = draw.choice(places)
    for key in way:
        value = value[key]
    if isinstance(value, dict) and draw.random() < 0.15:
        del value[last]
        return f"{[*way, last]} removed"
    if isinstance(value, dict) and draw.random() < 0.1:
        value["added by nobody"] = 1
        return f"{way}: a field added"
    value[last] = bad = draw.choice(BAD_VALUES)
    return f"{[*way, last]} := {str(bad)[:20]!r}"


def json_field(path: Path, draw: random.Random) -> str:
    """One field of a JSON file, or of one line of a .jsonl."""
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        said = _change(lines, draw)
        path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
        return f"{path.name}: {said}"
    value = json.loads(path.read_text("utf-8"))
    said = _change(value, draw)
    path.write_text(json.dumps(value), "utf-8")
    return f"{path.name}: {said}"


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_safetensors(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def metadata(path: Path, draw: random.Random) -> str:
    """A field of the metadata of a safetensors file; of the JSON that it holds, if it holds any."""
    header, data = read_safetensors(path)
    held = header.get("__metadata__") or {}
    if not held:
        header["__metadata__"] = {"format": draw.choice(("pt", "tf", "", "x" * 10**5))}
        write_safetensors(path, header, data)
        return f"{path.name}: metadata added"
    name = draw.choice(sorted(held))
    try:
        value = json.loads(held[name])
    except ValueError:
        value = None
    if isinstance(value, (dict, list)) and draw.random() < 0.8:
        said = _change(value, draw)
        held[name] = json.dumps(value)
    else:
        held[name] = draw.choice(
            ("", "nonsense", "[]", "{}", "null", "[" * 200_000, held[name][: len(held[name]) // 2])
        )
        said = held[name][:20]
    write_safetensors(path, header, data)
    return f"{path.name}: metadata {name}: {said}"


def tensors(path: Path, draw: random.Random) -> str:
    """The header of a safetensors file: names, types, shapes and places of tensors."""
    header, data = read_safetensors(path)
    names = sorted(set(header) - {"__metadata__"})
    if not names:
        return "nothing"
    name = draw.choice(names)
    entry = header[name]
    what = draw.choice(("drop", "rename", "add", "shape", "huge", "dtype", "offsets", "length"))
    if what == "drop":
        del header[name]
    elif what == "rename":
        header[draw.choice(("nobody.weight", name + "x", name.upper(), "", "a" * 5000))] = header.pop(name)
    elif what == "add":
        header["extra.weight"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
        data += bytes(4)
    elif what == "shape":
        entry["shape"] = draw.choice((entry["shape"][::-1], [*entry["shape"], 1], [], [-1], ["1"], None))
    elif what == "huge":
        entry["shape"] = [10**6, 10**6]
        if draw.random() < 0.5:
            entry["data_offsets"] = [0, 4 * 10**12]
    elif what == "dtype":
        entry["dtype"] = draw.choice(("F64", "I8", "I32", "BOOL", "F8_E4M3", "C64", "nonsense", 4))
    elif what == "offsets":
        entry["data_offsets"] = draw.choice(([0, 0], [5, 3], [-4, 4], [0, 2**63], [len(data), len(data) + 4], []))
    write_safetensors(path, header, data)
    if what == "length":
        content = path.read_bytes()
        size = draw.choice((0, 1, 2**40, 2**63, 2**64 - 1, 100_000_001))
        path.write_bytes(size.to_bytes(8, "little") + content[8:])
    return f"{path.name}: {what} of {name}"


def not_finite(path: Path, draw: random.Random) -> str:
    """NaN or infinity in one tensor."""
    header, data = read_safetensors(path)
    patterns = {"F32": (0x7FC00000, 0x7F800000), "F16": (0x7E00, 0x7C00), "BF16": (0x7FC0, 0x7F80)}
    names = [name for name in sorted(header) if name != "__metadata__" and header[name]["dtype"] in patterns]
    if not names:
        return "nothing"
    name = draw.choice(names)
    begin, end = header[name]["data_offsets"]
    size = {"F32": 4, "F16": 2, "BF16": 2}[header[name]["dtype"]]
    bits = draw.choice(patterns[header[name]["dtype"]]).to_bytes(size, "little")
    place = begin + size * draw.randrange((end - begin) // size)
    content = bytearray(data)
    content[place : place + size] = bits
    write_safetensors(path, header, bytes(content))
    return f"{path.name}: {bits[::-1].hex()} in {name}"


def stray(path: Path, draw: random.Random) -> str:
    """Another file of weights, with other values, or something that is none, beside one."""
    names = ("model.safetensors", "model-2.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "x.safetensors")
    names += (
        ".hidden.safetensors",
        "diffusion_pytorch_model.bin",
        "consolidated.safetensors",
        "notes.txt",
        "Thumbs.db",
    )
    other = path.with_name(draw.choice(names))
    if other.exists():
        return "nothing"
    if path.suffix == ".safetensors" and draw.random() < 0.8:
        header, data = read_safetensors(path)
        write_safetensors(other, header, bytes(len(data)))
    else:
        other.write_bytes(draw.choice((b"", b"x", _POINTER, _PAGE)))
    return f"{other.name} beside {path.name}"


def index(path: Path, draw: random.Random) -> str:
    """An index beside weights that names a file outside the folder, or none, or a wrong one."""
    header, _ = read_safetensors(path)
    outside = path.parent.parent / "outside.safetensors"
    shutil.copy(path, outside)
    target = draw.choice(("../outside.safetensors", str(outside), "absent.safetensors", "", ".", path.name + "/x", 3))
    names = sorted(set(header) - {"__metadata__"})
    chosen = names if draw.random() < 0.5 else names[:1]
    there = path.with_name(f"{path.stem.split('-0')[0]}.safetensors.index.json")
    held = json.loads(there.read_text()) if there.exists() else {"weight_map": dict.fromkeys(names, path.name)}
    held["weight_map"] |= dict.fromkeys(chosen, target)
    there.write_text(json.dumps(held), "utf-8")
    if draw.random() < 0.5:
        path.unlink()
    return f"{there.name} names {target!r}"


ANY = {
    "flip": flip,
    "truncate": truncate,
    "append": append,
    "remove": remove,
    "fifo": fifo,
    "device": device,
    "folder": folder,
    "loop": loop,
    "stray": stray,
    "byte order mark": byte_order_mark,
    "UTF-16": utf16,
    "LFS pointer": _replaced(_POINTER),
    "HTML page": _replaced(_PAGE),
    "nested brackets": _replaced(_NESTED),
    "an empty list": _replaced(b"[]"),
    "an empty object": _replaced(b"{}"),
    "null": _replaced(b"null"),
    "zeros": _replaced(bytes(5000)),
}
JSON = {"field": json_field}
SAFETENSORS = {"metadata": metadata, "tensors": tensors, "not finite": not_finite, "index": index}
KINDS = (*ANY, *JSON, *SAFETENSORS)


def mutate(top: Path, kind: str, draw: random.Random) -> str:
    """Damages one file below a folder in this way, if a file there can be; says what was done."""
    files = sorted(path for path in top.rglob("*") if path.is_file() and not path.is_symlink())
    if kind in JSON:
        files = [path for path in files if path.suffix in (".json", ".jsonl")]
    elif kind in SAFETENSORS:
        files = [path for path in files if path.suffix == ".safetensors"]
    if not files:
        return "nothing"
    return (ANY | JSON | SAFETENSORS)[kind](draw.choice(files), draw)
