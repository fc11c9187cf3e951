"""What is written is there whole, or what was there before is."""

import json

import pytest
import torch
from safetensors import safe_open

from dcdd_core.files import whole_file, write_tensors
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
