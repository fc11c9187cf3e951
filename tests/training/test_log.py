"""What lies in the place of a training's log."""

import os

import pytest

from dcdd_core.training.log import append_to_log, read_log, truncate_log


def test_no_log_is_no_lines(tmp_path):
    truncate_log(tmp_path, 3)
    assert read_log(tmp_path) == []


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (os.mkdir, "is a folder"),
        (os.mkfifo, "is a device, pipe or socket"),
        (lambda path: os.symlink(path.name, path), "cannot be opened"),
    ],
)
def test_what_is_no_log_is_named(tmp_path, make, what):
    make(tmp_path / "log.jsonl")
    for use in (lambda: truncate_log(tmp_path, 3), lambda: read_log(tmp_path)):
        with pytest.raises(ValueError, match=f"log.jsonl {what}.*move it away"):
            use()


def test_lines_after_the_step_are_dropped(tmp_path):
    for step in (1, 2, 3):
        append_to_log(tmp_path, {"step": step, "loss": 1.0})
    truncate_log(tmp_path, 2)
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]
