"""Prompt files: every layout, and errors for files that do not fit."""

import json

import pytest

from dcdd_core.evaluation.prompts import Prompt, read_geneval, read_prompts


def test_mjhq_json(tmp_path):
    path = tmp_path / "meta_data.json"
    entries = {"a1": {"category": "animals", "prompt": "a cat"}, "b2": {"category": "art", "prompt": "a vase"}}
    path.write_text(json.dumps(entries))
    assert read_prompts(path) == [
        Prompt(name="a1", text="a cat", category="animals"),
        Prompt(name="b2", text="a vase", category="art"),
    ]


def test_json_lines(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a cat"}\n\n{"prompt": "a vase", "id": 7, "category": "art"}\n')
    assert read_prompts(path) == [Prompt(name="00000", text="a cat"), Prompt(name="7", text="a vase", category="art")]


def test_plain_lines(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a cat\n\n  ein Käse \n", "utf-8")
    assert [(p.name, p.text) for p in read_prompts(path)] == [("00000", "a cat"), ("00001", "ein Käse")]


def test_geneval_lines_are_kept_as_they_stand(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    line = '{"tag": "counting", "include": [{"class": "bench", "count": 3}], "prompt": "a photo of three benches"}'
    path.write_text(line + "\n" + line.replace("three", "four") + "\n")
    first, second = read_geneval(path)
    assert first == Prompt(name="00000", text="a photo of three benches", category="counting", metadata=line)
    assert second.name == "00001" and json.loads(second.metadata)["prompt"] == "a photo of four benches"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.json", "[1]", "holds a list"),
        ("p.json", "{", "is not JSON"),
        ("p.json", '{"a": "x"}', 'p.json, a: expected an object with "prompt"'),
        ("p.json", '{"a": {"prompt": "  "}}', "is empty"),
        ("p.json", '{"../a": {"prompt": "x"}}', "cannot be the name"),
        ("p.json", '{"a": {"prompt": "x", "category": ".."}}', "cannot be the category"),
        ("p.jsonl", '{"prompt": "x", "id": 1}\n{"prompt": "y", "id": 1}', "the ids 1 more than once"),
        ("p.json", '{"a": {"prompt": "x"}, "b": {"prompt": "y"}, "A": {"prompt": "z"}}', "the ids a, A more than once"),
        ("p.jsonl", "a cat", "prompt 0 is not JSON"),
    ],
)
def test_what_is_no_prompt_file_is_explained(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(("text", "words"), [("", "no prompts"), ('{"prompt": "x"}', "line 1 has no tag")])
def test_what_is_not_geneval_s_file_is_explained(tmp_path, text, words):
    (tmp_path / "g.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_geneval(tmp_path / "g.jsonl")


def test_bytes_that_are_no_text_are_explained(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.json"])
def test_a_prompt_file_may_begin_with_a_byte_order_mark(tmp_path, name):
    content = {"p.txt": "a cat\r\n", "p.jsonl": '{"prompt": "a cat"}\n', "p.json": '{"00000": {"prompt": "a cat"}}'}[
        name
    ]
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert [(prompt.name, prompt.text) for prompt in read_prompts(tmp_path / name)] == [("00000", "a cat")]


def test_only_line_breaks_end_a_line(tmp_path):
    (tmp_path / "p.jsonl").write_bytes('{"prompt": "a\u2028b"}\r\n{"prompt": "c\x85d"}\r'.encode())
    assert [prompt.text for prompt in read_prompts(tmp_path / "p.jsonl")] == ["a\u2028b", "c\x85d"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.json", b"[" * 200_000, "is not JSON"),
        ("p.jsonl", b"[" * 200_000, "is not JSON"),
        ("p.json", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("p.txt", b"<!DOCTYPE html>", "is an HTML page"),
        ("p.jsonl", rb'{"prompt": "\ud800"}', "is not Unicode text"),
        ("p.jsonl", rb'{"prompt": "a", "id": "\ud800"}', "cannot be the name"),
        ("p.jsonl", b'{"prompt": "a", "id": "' + b"x" * 201 + b'"}', "cannot be the name"),
        ("p.txt", b"a" * 20_001, "has 20,001 characters, more than 20,000"),
        ("p.txt", b"\xff\xfea\0", "is not UTF-8 text"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as said:
        read_prompts(tmp_path / name)
    assert "\n" not in str(said.value) and len(str(said.value)) < 500


def test_a_folder_or_a_missing_file_is_no_file_of_prompts(tmp_path):
    with pytest.raises(ValueError, match="is a folder; expected a file of prompts"):
        read_prompts(tmp_path)
    with pytest.raises(ValueError, match="does not exist; expected a file of prompts"):
        read_prompts(tmp_path / "none.txt")
