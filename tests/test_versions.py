"""The rows of `make versions`, and the files that are written for transformers 4 as well as 5."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from dcdd_pico.embedded import WEIGHTS
from dcdd_pico.train_janus import janus_config, pico_tokenizer, save_tokenizer
from dcdd_pico.train_tokenizer import tokenizer_config

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="tools/versions.py reads pyproject.toml by tomllib")


@pytest.fixture(scope="module")
def versions():
    found = importlib.util.spec_from_file_location("versions", ROOT / "tools" / "versions.py")
    module = importlib.util.module_from_spec(found)
    sys.modules["versions"] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    yield module
    del sys.modules["versions"]


def row(versions, name):
    (found,) = (row for row in versions.ROWS if row.name == name)
    return found


def test_the_rows_are_the_ends_of_what_pyproject_allows(versions):
    lock = (ROOT / "constraints.txt").read_text("utf-8")
    floors = versions.floors()
    wanted, kept = versions.requirements(row(versions, "Python 3.10, everything oldest"), lock)
    assert kept.strip() == "" and set(floors) <= {line.split("==")[0] for line in wanted if "==" in line}
    assert f"torch=={floors['torch']}" in wanted and f"transformers=={floors['transformers']}" in wanted
    wanted, kept = versions.requirements(row(versions, "Python 3.13, everything newest"), lock)
    assert kept.strip() == "" and not any("==" in line.split(";")[0] for line in wanted)
    wanted, kept = versions.requirements(row(versions, "numpy oldest"), lock)
    assert f"numpy=={floors['numpy']}" in wanted and "\nnumpy==" not in kept and "\ntorch==" in kept
    assert {row.python for row in versions.ROWS} == {"3.10", "3.11", "3.13"}
    tests = [word for command in versions.CHECKS["loaders"] for word in command if word.endswith(".py")]
    assert tests and all((ROOT / test).is_file() for test in tests)


def test_readme_promises_the_torch_that_is_run(versions):
    assert f"torch {versions.OLDEST_TORCH.removesuffix('.0')} or newer" in (ROOT / "README.md").read_text("utf-8")


def test_a_row_that_was_not_run_or_failed_says_so(versions):
    (first, second, third, *_), versions_of = versions.ROWS, dict.fromkeys(("python", *versions.SHOWN), "1.0")
    done = {"commit": "abc", "date": "2026-01-01", "versions": versions_of}
    results = {
        first.name: done | {"checks": dict.fromkeys(versions.CHECKS, "ok")},
        second.name: done | {"checks": dict.fromkeys(versions.CHECKS, "ok") | {"demo": "no sizes (exit status 1)"}},
        third.name: {"commit": "abc", "date": "2026-01-01", "not_run": "pip: no such version"},
    }
    assert [versions.verdict(results[row.name])[:9] for row in (first, second, third)] == [
        "ok",
        "demo: no ",
        "not run: ",
    ]
    text = versions.report(results)
    assert f"| {first.name} | 1.0 | 1.0 | 1.0 | 1.0 | 1.0 | ok | ok | ok | abc, 2026-01-01 |" in text
    assert f"| {second.name} | 1.0 | 1.0 | 1.0 | 1.0 | 1.0 | fails | ok | ok |" in text
    assert f"- **{second.name}**: demo: no sizes (exit status 1)" in text
    assert f"- **{third.name}**: not run: pip: no such version" in text
    assert text.count("not run yet |") == len(versions.ROWS) - 3


def test_a_row_is_run_again_for_another_commit_or_lock(versions, monkeypatch):
    locks = iter((b"a==1", b"a==1", b"a==2"))
    monkeypatch.setattr(versions.subprocess, "check_output", lambda *_, **__: next(locks))
    first, *others = (versions.key_of(versions.ROWS[0], commit) for commit in ("c", "d", "c"))
    assert first not in others


def test_the_embedded_janus_is_written_so_that_transformers_4_reads_it(tmp_path):
    config = json.loads((WEIGHTS / "janus" / "config.json").read_text("utf-8"))
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is True
    save_tokenizer(pico_tokenizer(), tmp_path)
    for name in ("tokenizer_config.json", "tokenizer.json"):
        assert json.loads((tmp_path / name).read_text("utf-8")) == json.loads(
            (WEIGHTS / "janus" / name).read_text("utf-8")
        )
    written = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert "extra_special_tokens" not in written and written["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_new_janus_ties_its_embeddings_for_both():
    from transformers.models.janus.modeling_janus import JanusVQVAE

    made = janus_config(JanusVQVAE(tokenizer_config()), pico_tokenizer()).to_dict()
    assert made["tie_word_embeddings"] is made["text_config"]["tie_word_embeddings"] is True


def test_training_on_an_older_torch_ends_in_one_line(monkeypatch):
    monkeypatch.delitem(sys.modules, "dcdd_core.cli.train", raising=False)
    monkeypatch.setitem(sys.modules, "dcdd_core.training.run", None)  # Importing it fails.
    with pytest.raises(ImportError):
        importlib.import_module("dcdd_core.cli.train")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(SystemExit, match=r"^train.py: training needs torch 2.6 or newer, this is 2.5.1\+cpu .*$"):
        importlib.import_module("dcdd_core.cli.train")
