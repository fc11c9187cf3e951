"""Blocks that are made before they are needed."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from dcdd_pico.ahead import Ahead


def made(folder: Path, number: int) -> tuple[int, int, int]:
    """Notes each call; the number's square, the process and its threads."""
    with open(folder / f"{number}", "a") as file:
        file.write("made\n")
    return number * number, os.getpid(), torch.get_num_threads()


def test_a_process_of_its_own_makes_each_block_once_before_it_is_needed(tmp_path):
    blocks = Ahead(made, lambda number: (tmp_path, number))
    try:
        for _ in range(2):
            blocks.ask(3)
        assert blocks.result(2)[0] == 4
        square, process, threads = blocks.result(3)
        assert square == 9 and process != os.getpid() and threads == 1
    finally:
        blocks.close()
    assert [(tmp_path / name).read_text() for name in "23"] == ["made\n"] * 2


def test_without_a_process_a_block_is_made_when_it_is_asked_for(tmp_path):
    blocks = Ahead(made, lambda number: (tmp_path, number), apart=False)
    blocks.ask(3)
    assert not (tmp_path / "3").exists()
    assert blocks.result(3)[:2] == (9, os.getpid())
    blocks.close()
