"""Keys of published sections: what changes them, and what does not."""

import shutil
from pathlib import Path

import pytest

from dcdd_pico import flops, paper_sections, sections
from dcdd_pico.results_table import MARKS, PUBLISHED, REPORT, TABLE, stale
from dcdd_pico.section_keys import NO_KEY, ROOT, Provenance, code_hash, files_hash, imported_modules
from dcdd_pico.sections import SECTIONS, Section, TableOptions


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of both packages' source."""
    folder = tmp_path_factory.mktemp("source")
    for package in ("dcdd_core", "dcdd_pico"):
        for path in (ROOT / package).rglob("*.py"):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return folder


def changed(root, path, old, new):
    """The sections whose code hash changes when a file of the copy is edited."""
    file = root / path
    text = file.read_text("utf-8")
    assert old in text
    before = {name: code_hash(own.measure, root=root) for name, own in SECTIONS.items() if name in REPORT}
    try:
        file.write_text(text.replace(old, new, 1), "utf-8")
        return {name for name in before if code_hash(SECTIONS[name].measure, root=root) != before[name]}
    finally:
        file.write_text(text, "utf-8")


def test_the_copy_has_the_hashes_of_the_original(copied):
    functions = [SECTIONS[name].measure for name in REPORT]
    for function in functions:
        assert code_hash(function, root=copied) == code_hash(function)
    assert len({code_hash(function) for function in functions}) == len(REPORT)


def test_a_transitive_dependency_changes_the_key(copied):
    assert changed(copied, "dcdd_core/evaluation/metrics.py", "4.0 /", "5.0 /") >= {"reconstruction", "steps"}
    flow = changed(copied, "dcdd_core/method/flow.py", "def ", "def renamed_")  # decode imports it
    assert flow >= {"reconstruction", "text", "steps", "ablation", "latency"}


def test_modules_that_the_registry_names_in_strings_count():
    found = imported_modules(sections.load_setup)
    assert {"dcdd_core.models.janus.family", "dcdd_core.models.backbones.flux_fill.backbone"} <= found
    assert "dcdd_core.training.trainer" not in found and "dcdd_pico.results_table" not in found


def test_comments_docstrings_and_formatting_do_not_change_the_key(copied):
    for old, new in (
        ("    a, b = (x.cpu()", "    # a comment\n\n    a, b = (x.cpu()"),
        ('"""Image fidelity metrics', '"""Other words'),
        ("10 * torch.log10(4.0 /", "10*torch.log10( 4.0/"),
    ):
        assert changed(copied, "dcdd_core/evaluation/metrics.py", old, new) == set()


def test_other_modules_do_not_change_the_key(copied):
    assert changed(copied, "dcdd_core/training/trainer.py", "import torch", "import torch as other") == set()
    assert changed(copied, "dcdd_pico/paper_report.py", "0.7535", "0.75") == set()


def test_only_the_definitions_that_a_section_uses_count(copied):
    images = {"reader", "reconstruction", "text", "readings", "steps", "ablation"}
    assert changed(copied, "dcdd_pico/sections.py", "count: int = 100", "count: int = 99") == images | {"calibration"}
    assert changed(copied, "dcdd_pico/paper_sections.py", "STEPPED = 512", "STEPPED = 511") == {"steps"}
    assert changed(copied, "dcdd_pico/guided_sections.py", "2 * hits", "3 * hits") == images


def test_files_are_hashed_by_name_and_content(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").write_text("1")
    (tmp_path / "b").write_text("2")
    paths = [tmp_path / "a", tmp_path / "b"]
    first = files_hash(paths)
    assert files_hash(paths) == first
    (tmp_path / "a" / "one").rename(tmp_path / "a" / "two")
    second = files_hash(paths)
    (tmp_path / "b").write_text("3")
    assert len({first, second, files_hash(paths)}) == 3


@pytest.fixture
def weights(tmp_path):
    folder = tmp_path / "weights"
    for name in ("janus/model.safetensors", "vae/model.safetensors", "decoder.safetensors", "reader.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "recipe.json").write_text("{}")
    return folder


def test_a_key_covers_the_weights_that_the_section_reads(weights):
    options = TableOptions(out=Path(), weights=weights)
    before = {name: options.key(name) for name in REPORT}
    (weights / "reader.safetensors").write_text("other")
    assert {name for name in REPORT if options.key(name) != before[name]} == {*REPORT} - {"calibration", "latency"}


def test_published_sections_are_stale_until_measured_with_today_s_code_and_weights(weights, monkeypatch):
    options = TableOptions(out=Path(), weights=weights)
    current = Provenance("steps", "abc1234", options.key("steps"))
    old = Provenance("text", "0123456", NO_KEY)
    text = f"words\n\n{current}\n\n{old}\n"
    assert Provenance.all_in(text) == [current, old]
    (line,) = stale(options, {Path("results.md"): text})
    assert line == "results.md: text: measured at 0123456 before keys were recorded"
    # As if it were measured in another way.
    monkeypatch.setitem(SECTIONS, "steps", Section(paper_sections.measure_text, SECTIONS["steps"].weights))
    assert len(stale(options, {Path("results.md"): text})) == 2
    (line,) = stale(options, {Path("a"): str(Provenance("gone", "1", "x-y"))})
    assert line.endswith("there is no such section any more")


def test_the_ablation_is_compared_without_its_bundles_where_they_are_missing(weights, tmp_path):
    bundle = tmp_path / "lcdm-0.safetensors"
    bundle.write_text("1")
    options = TableOptions(out=Path(), weights=weights)
    with_bundle = TableOptions(out=Path(), weights=weights, ablation={"lcdm, seed 0": bundle})
    published = {Path("results.md"): str(Provenance("ablation", "abc1234", with_bundle.key("ablation")))}
    assert stale(options, published) == stale(with_bundle, published) == []
    bundle.write_text("2")
    assert stale(options, published) == [] and len(stale(with_bundle, published)) == 1


def test_the_flops_have_a_key():
    assert code_hash(flops.flops_of) != code_hash(paper_sections.measure_reader)


def test_every_published_table_says_where_it_is_from():
    results, report, card = (path.read_text("utf-8") for path in PUBLISHED)
    block, same = (text.partition(MARKS[0])[2].partition(MARKS[1])[0] for text in (results, card))
    assert block == same
    tables = [part for part in block.split("\n### ")[1:] if not part.startswith("Targets")]
    assert [found.section for table in tables for found in Provenance.all_in(table)] == [*_shown(TABLE), "flops"]
    parts = [part for part in report.split("\n## ") if part.startswith("Table ")]
    assert len(parts) == 6 and all(Provenance.all_in(part) for part in parts)
    assert {found.section for found in Provenance.all_in(report)} == {*REPORT}


def _shown(names):
    """The order of the tables: the ablation's means come last."""
    return sorted(names, key=lambda name: name == "ablation")
