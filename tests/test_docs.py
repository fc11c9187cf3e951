"""README and docs/: links lead to files, and commands can be typed as they are written."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import train
from dcdd_core.cli import main as dcdd

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Lines of the README; what takes more belongs into a page of docs/.
LONGEST_README = 160

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def commands(text: str) -> Iterator[list[str]]:
    """Words of the command lines in fenced blocks without a language, and of inline code that begins like a command."""
    lines = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        lines += [] if language else block.replace("\\\n", " ").splitlines()
    lines += re.findall(r"(?<!`)`((?:make|python|pytest|dcdd|train\.py) [^`]+)`(?!`)", text)
    for line in lines:
        words = shlex.split(line, comments=True)
        if words:
            yield words


def help_of(main: Callable, words: list[str], capsys: pytest.CaptureFixture) -> str:
    """The help of a command, of which `words` begins with the sub-command."""
    subcommand = words[: 2 if words[:1] == ["evaluate"] else 1]
    chosen = [word for word in subcommand if word.isalpha()]
    with pytest.raises(SystemExit) as ended:
        main([*(chosen or (["train"] if main is train.main else [])), "--help"])
    assert ended.value.code == 0, f"{' '.join(chosen)} is no command"
    return capsys.readouterr().out


def check_options(main: Callable, words: list[str], capsys: pytest.CaptureFixture) -> None:
    shown = help_of(main, words, capsys)
    for word in words:
        if word.startswith("--"):
            assert re.search(rf"{word}\b", shown), f"{word} is no option of {' '.join(words[:2])}"


@every_page
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


@every_page
def test_commands_exist(page, capsys):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    for words in commands(page.read_text("utf-8")):
        line = " ".join(words)
        if words[0] == "make":
            assert words[1] in targets, line
        elif words[0] == "pytest":
            assert all((ROOT / word).exists() for word in words if word.endswith(".py")), line
        elif "train.py" in words:
            check_options(train.main, words[words.index("train.py") + 1 :], capsys)
        elif words[0] == "dcdd" or "dcdd_core.cli" in words:
            begin = words.index("dcdd" if words[0] == "dcdd" else "dcdd_core.cli") + 1
            if words[begin : begin + 1] != ["..."]:
                check_options(dcdd, words[begin:], capsys)
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2].rstrip(",")) is not None, line
        elif words[0] == "python":
            assert (ROOT / words[1]).exists(), line


def test_the_library_s_page_runs():
    """But for the block that reads a bundle of one's own."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "library.md").read_text("utf-8"), re.M | re.S)
    names: dict = {}
    for block in blocks:
        if '"decoder.safetensors"' not in block:
            exec(block, names)
    assert names["image"].shape == names["guided"].shape == names["sharp"].shape == (1, 3, 96, 96)
    assert 0 < float(names["agreement"]) < 1
    assert len(names["table"]) == 8 and sum(row["revealed"] for row in names["table"]) == 144
    assert names["logits"].logits.shape == (1, 144, 1024)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= LONGEST_README
