"""Prompt files: MJHQ-30K's meta_data.json, JSON lines, plain lines, and GenEval's evaluation_metadata.jsonl."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..files import in_file, regular_file, stand_in
from ..settings import shown

LONGEST_PROMPT = 20_000
"""In characters. Every VLM has its own limit, in tokens of about four characters; Janus-Pro's is 16,384."""
_LONGEST_NAME = 200  # bytes: file systems take 255, and suffixes are added
_LARGEST_FILE = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt of a benchmark.

    Attributes:
        name: file name of its images, without suffix; unique, also without regard to case.
        text: the prompt itself.
        category: sub-folder of its images; empty if there are no categories.
        metadata: its original line, for GenEval's scorer; empty for other benchmarks.

    Raises:
        ValueError: for a text that is empty, too long or not Unicode, and for a name or category that is not a valid
            file name.
    """

    name: str
    text: str
    category: str = ""
    metadata: str = ""

    def __post_init__(self):
        with in_file(f"prompt {shown(self.name)}"):
            check_prompt(self.text)
        for what, value in (("name", self.name), ("category", self.category or "none")):
            length = len(value.encode("utf-8", "surrogateescape")) if _is_text(value) else 0
            if not 0 < length <= _LONGEST_NAME or value in (".", "..") or set(value) & set('/\\:*?"<>|\0\n'):
                raise ValueError(f"{shown(value)} cannot be the {what} of a prompt, since it becomes a file name")


def check_prompt(text: str) -> None:
    """Checks that a text can be a prompt.

    Raises:
        ValueError: if it is blank, not Unicode, or longer than `LONGEST_PROMPT` characters.
    """
    if not text.strip():
        raise ValueError("the prompt is empty or blank: write a text, or remove it")
    if not _is_text(text):
        raise ValueError(f"the prompt {shown(text)} is not Unicode text: save it as UTF-8")
    if len(text) > LONGEST_PROMPT:
        raise ValueError(f"the prompt has {len(text):,} characters, more than {LONGEST_PROMPT:,}: shorten it")


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, in its order.

    - .json: MJHQ-30K's layout, {id: {"prompt": ..., "category": ...}};
    - .jsonl: one JSON object per line with "prompt" and optionally "id" and "category";
    - otherwise one prompt per line; blank lines are skipped.

    Prompts without an id are named by their number, such as "00000".

    Raises:
        ValueError: for a file that is missing, empty or in another layout, and for ids that are equal or differ
            only in case, which some file systems take for the same name.
    """
    if path.suffix.lower() == ".json":
        held = _json(_read(path), f"{path}")
        if not isinstance(held, dict):
            raise ValueError(f"{path} holds a {type(held).__name__}, expected MJHQ-30K's {{id: {{prompt, category}}}}")
        prompts = [_prompt(entry, f"{path}, {name}", name) for name, entry in held.items()]
    elif path.suffix.lower() == ".jsonl":
        lines = enumerate(_lines(path))
        prompts = [_prompt(_json(line, f"{path}, prompt {i}"), f"{path}, prompt {i}", f"{i:05}") for i, line in lines]
    else:
        prompts = [Prompt(name=f"{i:05}", text=line) for i, line in enumerate(_lines(path))]
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    counts = Counter(prompt.name.casefold() for prompt in prompts)
    if twice := list(dict.fromkeys(prompt.name for prompt in prompts if counts[prompt.name.casefold()] > 1)):
        raise ValueError(
            f"{path} has the ids {', '.join(twice[:5])} more than once, or differing only in case: their images could "
            "overwrite each other, give each prompt its own id"
        )
    return prompts


def read_geneval(path: Path) -> list[Prompt]:
    """GenEval's evaluation_metadata.jsonl: one prompt per line, named by its number, with its tag as category.

    Raises:
        ValueError: for a file that is missing or empty, and for a line without "prompt" or "tag".
    """
    prompts = []
    for i, line in enumerate(_lines(path)):
        where = f"{path}, line {i + 1}"
        entry = _json(line, where)
        if not isinstance(entry, dict) or not isinstance(entry.get("tag"), str):
            raise ValueError(f"{where} has no tag; expected GenEval's evaluation_metadata.jsonl")
        name = f"{i:05}"
        prompts.append(replace(_prompt(entry, where, name), name=name, category=entry["tag"], metadata=line))
    if not prompts:
        raise ValueError(f"{path} holds no prompts; expected GenEval's evaluation_metadata.jsonl")
    return prompts


def _prompt(entry: Any, where: str, name: str) -> Prompt:
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError(f'{where}: expected an object with "prompt", got {str(entry)[:60]}')
    return Prompt(name=str(entry.get("id", name)), text=entry["prompt"], category=str(entry.get("category", "")))


def _read(path: Path) -> str:
    if (size := regular_file(path, "a file of prompts").stat().st_size) > _LARGEST_FILE:
        raise ValueError(f"{path} has {size:,} bytes, expected a file of prompts of at most {_LARGEST_FILE:,}")
    content = path.read_bytes()
    if content.strip() and (other := stand_in(content)):
        raise ValueError(f"{path} is {other}; expected a file of prompts")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); expected a file of prompts") from error


def _lines(path: Path) -> list[str]:
    # Not splitlines(): a JSON line may hold other separators, such as U+2028.
    return [line.strip() for line in re.split(r"\r\n|\r|\n", _read(path)) if line.strip()]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error})") from error


def _is_text(value: str) -> bool:
    """Whether this can be encoded as UTF-8, which half of a surrogate pair cannot."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
