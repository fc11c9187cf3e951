"""What is written is there whole, or what was there before is; what is read is what was meant, or is named."""

import errno
import json
import os
import re
import shutil
import threading

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dcdd_core.files import (
    MOST_JSON,
    in_file,
    json_object,
    open_tensors,
    read_json,
    read_record,
    reading,
    regular_file,
    require_checksums,
    stored_checksums,
    tensor_checksums,
    utf8_path,
    way_out,
    whole_file,
    write_record,
    write_tensors,
    write_text,
)
from tests.tiny import tiny_condition


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_it_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new folder" / "a.txt"
    with whole_file(path) as temporary:
        temporary.write_text("half")
        assert not path.exists() and temporary.parent == path.parent
        temporary.write_text("whole")
    assert path.read_text() == "whole" and names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_was_there_outlives_a_failure(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(error), whole_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "before" and names(tmp_path) == ["a.txt"]


def test_a_full_disk_is_said(tmp_path):
    resource = pytest.importorskip("resource", reason="limits the size of files")
    path, limits = tmp_path / "c.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_bytes(b"before")
    condition = tiny_condition(4)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))  # bytes a file; writing more fails
    try:
        with pytest.raises(OSError, match=r"c.safetensors could not be written .* GB are free there; make room"):
            condition.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"before" and names(tmp_path) == ["c.safetensors"]


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    tensors = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.ones(3, dtype=torch.int32)}
    metadata = {f"key {k}": f'"{k}" \\ Käse\n' for k in range(8)}
    written = set()
    for _ in range(4):
        write_tensors(tmp_path / "t.safetensors", tensors, metadata)
        written.add((tmp_path / "t.safetensors").read_bytes())
    assert len(written) == 1
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert file.metadata() == metadata
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {
            name: tensor.tolist() for name, tensor in tensors.items()
        }


def test_a_header_that_would_not_fit_is_not_written(tmp_path, monkeypatch):
    path, dumps = tmp_path / "t.safetensors", json.dumps
    path.write_bytes(b"before")
    monkeypatch.setattr(json, "dumps", lambda *args, **options: dumps(*args, **options) + " " * 99)
    with pytest.raises(RuntimeError, match="header of .* grew from"):
        write_tensors(path, {"a": torch.ones(2)}, {"key": "value"})
    assert path.read_bytes() == b"before" and names(tmp_path) == ["t.safetensors"]


@pytest.mark.parametrize("write", [write_text, lambda path, text: write_tensors(path, {"a": torch.ones(2)}, {})])
@pytest.mark.parametrize("mask", [0o022, 0o007, 0o077])
def test_permissions_are_the_umasks(tmp_path, write, mask):
    before = os.umask(mask)
    try:
        write(tmp_path / "new", "text")
        (tmp_path / "old").touch(0o600)
        write(tmp_path / "old", "text")
    finally:
        os.umask(before)
    for name in ("new", "old"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~mask


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path, both = tmp_path / "a.txt", threading.Barrier(2)

    def write(text):
        with whole_file(path) as temporary, temporary.open("w") as file:
            both.wait(10)
            for letter in text:
                file.write(letter)
                file.flush()
            both.wait(10)

    texts = ["a" * 500, "b" * 300]
    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts and names(tmp_path) == ["a.txt"]


def system_error(number, of_safetensors=False):
    if of_safetensors:
        return SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize("of_safetensors", [False, True])
@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "GB are free there; make room"),
        (errno.EDQUOT, "make room"),
        (errno.EFBIG, "make room"),
        (errno.EROFS, "disk is read-only; choose a folder on another"),
        (errno.EACCES, "may not write there; change the permissions of"),
        (errno.EPERM, "may not write there"),
        (errno.EISDIR, "a folder lies in the file's place"),
        (errno.ENOTDIR, "a file lies where its folder should be"),
        (errno.ENAMETOOLONG, "shorter name"),
        (errno.EIO, "check the disk"),
    ],
)
def test_only_a_full_disk_asks_to_make_room(tmp_path, number, says, of_safetensors):
    with pytest.raises(OSError, match=f"a.txt could not be written .*{says}") as caught, whole_file(tmp_path / "a.txt"):
        raise system_error(number, of_safetensors)
    assert ("make room" in str(caught.value)) == (number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    assert names(tmp_path) == []


@pytest.mark.parametrize(("free", "says"), [(2**20, "0.0 GB are free there; make room"), (2**30, "check the disk")])
def test_a_reason_without_a_number_is_a_full_disk_if_the_disk_is_full(tmp_path, monkeypatch, free, says):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40 - free, free))
    assert way_out(RuntimeError("file write failed"), tmp_path / "a.txt").startswith(says)
    assert way_out(OSError(errno.EACCES, "denied"), tmp_path / "a.txt").startswith("you may not write there")


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (112, ".* make room"),
        (39, ".* make room"),
        (5, "you may not write"),
        (206, "choose a shorter"),
        (28, "check the"),
    ],
)
def test_numbers_of_windows_are_not_taken_for_errno_s(tmp_path, number, says):
    """There, 5 is a missing permission and 112 a full disk; errno's 28, a full disk, means something else."""
    error = RuntimeError(f"I/O error: ... (os error {number})")
    assert re.match(says, way_out(error, tmp_path / "a.txt", windows=True))
    assert re.match(".* make room", way_out(RuntimeError("... (os error 28)"), tmp_path / "a.txt", windows=False))


def test_a_record_does_not_change_with_its_file(tmp_path):
    """Nothing stays mapped, so that the file can be replaced, also on Windows."""
    file = tmp_path / "a.safetensors"
    write_record(file, "thing", {"x": torch.arange(1024.0)}, {})
    tensors, _ = read_record(file, "thing", ("x",), ())
    size = file.stat().st_size
    with file.open("r+b") as raw:
        raw.write(bytes(size))
    assert torch.equal(tensors["x"], torch.arange(1024.0))


def test_the_longest_names_can_be_written(tmp_path):
    for name in ("x" * 255, "\u00e4" * 127):
        write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"


def test_a_place_that_cannot_be_written_is_said_before_the_work(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path, says in (
        (tmp_path / "folder", "a folder lies in the file's place"),
        (tmp_path / "file" / "a.txt", "a file lies where its folder should be"),
        (tmp_path / "file" / "b" / "a.txt", "a file lies where its folder should be"),
        (tmp_path / ("x" * 400), "choose a shorter name"),
    ):
        with pytest.raises(OSError, match=says), whole_file(path):
            pytest.fail("the work was begun")


# --- reading ----------------------------------------------------------------------------------------------------------

PLACES = {
    "nothing": (lambda path: None, "does not exist; expected a map"),
    "below a file": (lambda path: path.parent.touch(), "does not exist; expected a map"),
    "link to nothing": (lambda path: path.symlink_to("gone"), "is a link to gone, which does not exist"),
    "link to itself": (lambda path: path.symlink_to(path), "cannot be opened"),
    "folder": (lambda path: path.mkdir(), "is a folder; expected a map"),
    "FIFO": (os.mkfifo, "is a device, pipe or socket; expected a map"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, pipe or socket; expected a map"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "read",
    [regular_file, read_json, lambda path, expected: open_tensors(path, expected).__enter__()],
    ids=["regular_file", "read_json", "open_tensors"],
)
def test_what_is_no_file_is_refused(tmp_path, place, read):
    make, says = PLACES[place]
    path = tmp_path / "a.json" if place != "below a file" else tmp_path / "file" / "a.json"
    make(path)
    with pytest.raises(ValueError, match=f"a.json {says}"):
        read(path, "a map")


@pytest.mark.parametrize("name", ["x" * 400, "a\0b"])
def test_names_that_no_file_can_have_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be opened .*expected a map"):
        regular_file(tmp_path / name, "a map")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"
NOT_JSON = {
    "empty": (b"", "is empty, expected a map: fetch it"),
    "blank": (b" \n", "is blank, expected a map: fetch it"),
    "LFS": (POINTER, r"is a Git LFS pointer.*\(git lfs pull\), expected a map: fetch it"),
    "HTML": (b"\n<!DOCTYPE html><html>404</html>", "is an HTML page, expected a map: fetch it"),
    "HTML with BOM": (b"\xef\xbb\xbf<html>404</html>", "is an HTML page, expected a map: fetch it"),
    "XML": (b"<?xml version='1.0'?><Error/>", "is an XML page"),
    "half": (b'{"a": [1, 2', r"cannot be read as a map \(JSONDecodeError: .*\): fetch it"),
    "nested": (b"[" * 200_000 + b"]" * 200_000, r"cannot be read as a map \(RecursionError: .*\): fetch it"),
    "nested objects": (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "cannot be read as a map .RecursionError"),
    "long number": (b'{"a": ' + b"9" * 10_000 + b"}", "cannot be read as a map .ValueError"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "cannot be read as a map .UnicodeDecodeError"),
    "list": (b"[]", "holds a list, expected a map, a JSON object: fetch it"),
    "number": (b"5", "holds a int, expected a map, a JSON object"),
    "null": (b"null", "holds a NoneType, expected a map, a JSON object"),
    "text": (b'"a"', "holds a str, expected a map, a JSON object"),
}


@pytest.mark.parametrize("content", NOT_JSON)
def test_what_is_no_json_object_is_named_in_one_line(tmp_path, content):
    content, says = NOT_JSON[content]
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path} {says}") as caught:
        read_json(path, "a map", "fetch it")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_json_may_begin_with_a_byte_order_mark(tmp_path, start):
    path = tmp_path / "a.json"
    path.write_text(start + '{"a": [1, "K\u00e4se"]}', "utf-8")
    assert read_json(path, "a map") == {"a": [1, "K\u00e4se"]}
    assert json_object('{"b": 2}', path, "a map") == {"b": 2}


def test_a_file_too_large_for_json_is_not_read(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # a sparse file, larger than memory
    with pytest.raises(ValueError, match=f"has 1,099,511,627,776 bytes, expected a map of at most {MOST_JSON:,}: down"):
        read_json(path, "a map")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyError("weight_map"), r"a.bin cannot be read as a model \(KeyError: 'weight_map'\): fetch it"),
        (RuntimeError("two\n  lines"), r"\(RuntimeError: two lines\): fetch it"),
        (AssertionError(), r"\(AssertionError: no reason given\): fetch it"),
        (RuntimeError("x" * 999), r"\(RuntimeError: x{200}\): fetch it"),
        (PermissionError(13, "Permission denied"), "may not read it; change its permissions"),
        (OSError(5, "Input/output error"), "check its disk and the connection to it, and try again"),
        (OSError("no file named model.bin"), "fetch it"),
    ],
)
def test_what_other_libraries_raise_becomes_one_line(error, says):
    with pytest.raises(ValueError, match=says) as caught, reading("a.bin", "a model", "fetch it"):
        raise error
    assert caught.value.__cause__ is error and "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_memory_and_interrupts_pass_through(error):
    with pytest.raises(error), reading("a.bin", "a model"):
        raise error


def test_checks_of_what_was_read_name_the_file():
    with pytest.raises(ValueError, match="^a.bin: steps must be 1"), in_file("a.bin"):
        raise ValueError("steps must be 1")


@pytest.mark.parametrize(
    "content", [b"", POINTER, b"<html>", b"\0" * 64, b"\xff" * 64, b"\x80\x02}q", b"GGUF" + b"\0" * 60]
)
def test_what_is_no_safetensors_file_is_named_in_one_line(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    says = f"^{path} (is|cannot be read as).* a map.*: fetch it"
    with pytest.raises(ValueError, match=says) as caught, open_tensors(path, "a map", "fetch it"):
        pass
    assert "\n" not in str(caught.value)


def test_a_safetensors_file_that_is_cut_short_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(100.0)}, path)
    whole = path.read_bytes()
    for length in (4, 8, 20, 60, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot be read as a map"), open_tensors(path, "a map"):
            pass


def test_a_header_of_nested_brackets_is_named(tmp_path):
    path, header = tmp_path / "a.safetensors", b'{"__metadata__":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="cannot be read as a map"), open_tensors(path, "a map"):
        pass


RECORD = {"format": "dcdd", "kind": "map"}
DESCRIPTIONS = ("[" * 200_000, "[]", "5", "null", '"a"', "{", "", '{"a": 1', '{"b": 1}', '{"a": 1, "b": 1}')


@pytest.mark.parametrize("description", DESCRIPTIONS, ids=range(len(DESCRIPTIONS)))
def test_a_damaged_description_of_a_record_is_named(tmp_path, description):
    path = tmp_path / "a.safetensors"
    save_file({"t": torch.ones(2)}, path, metadata=RECORD | {"dcdd": description})
    with pytest.raises(ValueError, match=f"^{path} .*make it again") as caught:
        read_record(path, "map", ("t",), ("a",))
    assert "\n" not in str(caught.value)


def test_a_record_comes_back(tmp_path):
    write_record(tmp_path / "a.safetensors", "map", {"t": torch.ones(2)}, {"a": [1, None, "K\u00e4se"]})
    tensors, fields = read_record(tmp_path / "a.safetensors", "map", ("t",), ("a",))
    assert torch.equal(tensors["t"], torch.ones(2)) and fields == {"a": [1, None, "K\u00e4se"]}


# --- checksums --------------------------------------------------------------------------------------------------------


def of_all_kinds():
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(6, 4, generator=draw)
    return {
        **{str(dtype): values.to(dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)},
        "float8": values.to(torch.float8_e4m3fn),
        "transposed": values.T,
        "integers": torch.arange(5),
        "booleans": values > 0,
        "number": torch.tensor(3.5),
        "nothing": torch.zeros(0, 3),
    }


def test_every_flipped_bit_of_a_tensor_is_noticed(tmp_path):
    tensors = {"a": torch.arange(4.0), "b": torch.ones(3, dtype=torch.bfloat16)}
    expected = tensor_checksums(tensors)
    for name, tensor in tensors.items():
        content = tensor.view(torch.uint8)
        for byte in range(len(content)):
            for bit in range(8):
                content[byte] ^= 1 << bit
                with pytest.raises(ValueError, match=f"c.bin is damaged: {name} is not what was written.*another copy"):
                    require_checksums("c.bin", tensors, expected)
                content[byte] ^= 1 << bit
    require_checksums("c.bin", tensors, expected)


def test_checksums_are_of_the_content_wherever_it_lies(tmp_path):
    tensors = of_all_kinds()
    expected = tensor_checksums(tensors)
    assert len(set(expected.values())) == len(tensors)
    again = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    require_checksums("c.bin", again, expected)
    require_checksums("c.bin", {}, expected)  # Some of the tensors may be compared alone.
    require_checksums("c.bin", again, {})  # A file without checksums.
    for changed in (tensors["integers"].int(), torch.arange(5)[None], torch.arange(6)):
        with pytest.raises(ValueError, match="integers is not what was written"):
            require_checksums("c.bin", {"integers": changed}, expected)
    with pytest.raises(ValueError, match="unknown is not"):
        require_checksums("c.bin", {"unknown": torch.ones(1)}, expected)


def test_a_file_carries_its_checksums(tmp_path):
    path, tensors = tmp_path / "t.safetensors", of_all_kinds()
    write_tensors(path, tensors, {"key": "value"}, checksums=True)
    with open_tensors(path, "a map") as file:
        metadata, read = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    assert metadata["key"] == "value" and stored_checksums(path, metadata) == tensor_checksums(tensors)
    require_checksums(path, read, stored_checksums(path, metadata))
    write_tensors(path, tensors, {"key": "value"})
    with open_tensors(path, "a map") as file:
        assert file.metadata() == {"key": "value"} and stored_checksums(path, file.metadata()) == {}
    with pytest.raises(ValueError, match="t.safetensors holds a list, expected a file with checksums"):
        stored_checksums(path, {"checksums": "[]"})


def test_tensors_are_written_and_read_under_names_that_are_not_utf8(tmp_path):
    folder = tmp_path / "\udcff"
    try:
        folder.mkdir()
    except (OSError, UnicodeError):
        pytest.skip("this system has only names that are UTF-8")
    path = folder / "a\udcfe.safetensors"
    before = os.listdir("/proc/self/fd")
    write_tensors(path, {"a": torch.ones(3)}, {"said": "yes"}, checksums=True)
    with open_tensors(path, "tensors") as file:
        assert torch.equal(file.get_tensor("a"), torch.ones(3)) and file.metadata()["said"] == "yes"
    assert names(folder) == [path.name] and len(os.listdir("/proc/self/fd")) == len(before)
    path.write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match="safetensors cannot be read as tensors"), open_tensors(path, "tensors"):
        pass
    with utf8_path(tmp_path) as same:
        assert same == tmp_path


def test_another_file_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """It may be a model of many gigabytes."""
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(2)}, file)
    monkeypatch.setattr(torch.Tensor, "clone", lambda self: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"holds no known kind of thing .*; expected a thing with \['y'\]"):
        read_record(file, "thing", ("y", "z"), (), later=("z",))
