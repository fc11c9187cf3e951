"""What the commands of tables with intervals have in common, for their tests."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from dcdd_pico.sections import SECTIONS, TableOptions


def written_by(command: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> str:
    """Runs a command twice, its sections replaced by ones that take no time, and returns what it wrote into a file.

    Each section is measured once and kept, text outside the marks stays, and what is written is printed and lies in
    the output folder too. Models are not loaded.
    """
    measured = []
    for name in command.TITLES:
        section = type(SECTIONS[name])(lambda setup, name=name: measured.append(name) or {name: {"ssim": 0.5}}, ())
        monkeypatch.setitem(SECTIONS, name, section)
    monkeypatch.setattr(TableOptions, "setup", lambda self: None)
    monkeypatch.setattr(TableOptions, "key", lambda self, name: f"key of {name}")
    into, (first, last) = folder / "results.md", command.MARKS
    into.write_text(f"before\n{first}\nold\n{last}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["table", "--out", str(folder), "--into", str(into), "--commit", "abc"])
    for _ in range(2):
        command.main()
    assert measured == list(command.TITLES)
    text = into.read_text()
    assert "old" not in text and text.startswith("before\n") and text.endswith("after\n")
    (kept,) = (path for path in folder.glob("*.md") if path != into)
    assert kept.read_text() in capsys.readouterr().out
    return text
