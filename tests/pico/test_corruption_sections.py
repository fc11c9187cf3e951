"""Scores of the samplers that differ in the wrong tokens of their training, on stubs whose images are known."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from dcdd_core.types import DCDDWarning
from dcdd_pico import corruption_sections, progressive_sections, progressive_table
from dcdd_pico.build_context import Recipe
from dcdd_pico.corruption_sections import measure_corruptions
from dcdd_pico.corruption_variants import VARIANTS, Variant, variant_folder
from dcdd_pico.progressive_sections import REWRITTEN, TARGET
from dcdd_pico.section_keys import Provenance
from dcdd_pico.sections import SECTIONS, Measured, TableOptions
from tests.pico.test_progressive_sections import Sampler, setup  # noqa: F401

#: What a variant's images are off by.
OFFSETS = {name: (number + 1) / 10 for number, name in enumerate(VARIANTS)}


@pytest.fixture
def work(setup, tmp_path, monkeypatch):  # noqa: F811
    """A measurement whose work folder has all variants; they note what they were asked for."""
    setup.work = tmp_path / "work"
    (setup.weights / "janus").mkdir()
    setup.made = {}
    for name in VARIANTS:
        folder = setup.work / variant_folder(name)
        folder.mkdir(parents=True)
        Variant.of(Recipe(progressive_steps=70), setup.weights, name).save(folder)

    def load(own, folder):
        assert own is setup
        name = folder.parent.name
        sampler = Sampler(lambda options, seed: OFFSETS[name] + (0.0 if options.revise else 0.04) + seed / 100)
        sampler.codebook = SimpleNamespace(fingerprint="the codebook")
        return setup.made.setdefault(name, sampler)

    monkeypatch.setattr(corruption_sections, "load_progressive", load)
    monkeypatch.setattr(corruption_sections, "ORDERED", 16)
    monkeypatch.setattr(progressive_sections, "code_hash", lambda *_: "the code")
    return setup


def test_rows_are_means_over_seeds_of_their_own_variant(work):
    table = measure_corruptions(work)
    assert list(table) == [f"{name}, {what}" for name in VARIANTS for what in ("revision", "no revision")]
    for row, found in table.items():
        name, what = row.split(", ")
        offsets = [OFFSETS[name] + (0.04 if what == "no revision" else 0.0) + seed / 100 for seed in range(3)]
        expected = [offset**2 for offset in offsets]
        assert found["frechet"] == pytest.approx(sum(expected) / 3, abs=5e-3), row
        assert found["frechet: lowest"] == pytest.approx(min(expected), abs=5e-3)
        assert found["frechet: highest"] == pytest.approx(max(expected), abs=5e-3)
        assert found["frechet, text detector"] == pytest.approx(4 * sum(expected) / 3, abs=2e-2)
        assert (found["images"], found["updates"]) == (16, 70) and "F1 shape" in found
        assert found[REWRITTEN] == (6.0 if what == "revision" else 0.0)
    for sampler in work.made.values():
        asked = [(options.passes, options.revision_passes, options.revise) for options, _ in sampler.asked]
        assert asked == [(TARGET, 3, "all")] * 3 + [(TARGET, 0, 0)] * 3
        assert {seeds[0] // 10**6 for _, seeds in sampler.asked} == {0, 1, 2}


def test_a_variant_that_was_trained_again_is_sampled_again(work):
    measure_corruptions(work)
    before = {name: len(sampler.asked) for name, sampler in work.made.items()}
    (work.work / variant_folder("all") / "model.safetensors").write_bytes(b"another")
    measure_corruptions(work)
    added = {name: len(sampler.asked) - before[name] for name, sampler in work.made.items()}
    assert added == dict.fromkeys(VARIANTS, 0) | {"all": 6}


def test_a_variant_of_other_tokens_is_refused(work, monkeypatch):
    load = corruption_sections.load_progressive

    def other(own, folder):
        sampler = load(own, folder)
        sampler.codebook.fingerprint = "another"
        return sampler

    monkeypatch.setattr(corruption_sections, "load_progressive", other)
    with pytest.raises(ValueError, match=r"none.sampler has another codebook than the models in "):
        measure_corruptions(work)


def test_the_section_has_a_title_and_is_measured_again_for_another_training(tmp_path):
    assert "progressive-corruptions" in progressive_table.TITLES
    row = {"frechet": 0.5, "frechet: lowest": 0.4, "frechet: highest": 0.6, "updates": 600.0}
    provenance = {"progressive-corruptions": Provenance("progressive-corruptions", "commit", "key")}
    text = progressive_table.tables(Measured({"progressive-corruptions": {"none, revision": row}}, provenance))
    assert "wrong tokens in training, at 11 passes" in text and "| none, revision | 0.5 (0.4 to 0.6) | 600 |" in text
    files = SECTIONS["progressive-corruptions"].work
    assert files == tuple(f"corruptions/{name}/sampler" for name in VARIANTS)


def test_without_the_variants_their_table_stays_as_published(tmp_path, monkeypatch, capsys):
    measured = []
    for name in progressive_table.TITLES:
        section = type(SECTIONS[name])(
            lambda _, name=name: measured.append(name) or {name: {"ssim": 0.5}}, (), SECTIONS[name].work
        )
        monkeypatch.setitem(SECTIONS, name, section)
    monkeypatch.setattr(TableOptions, "setup", lambda self: None)
    monkeypatch.setattr(TableOptions, "key", lambda self, name: "key")
    into, (first, last) = tmp_path / "results.md", progressive_table.MARKS
    published = f"### {progressive_table.TITLES['progressive-corruptions']}\n\nas it was"
    into.write_text(f"{first}\n\n{published}\n\n{last}\n")
    words = ["table", "--out", str(tmp_path), "--work", str(tmp_path / "work"), "--into", str(into)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.warns(DCDDWarning, match="work holds nothing trained for progressive-corruptions: not measured"):
        progressive_table.main()
    assert measured == [name for name in progressive_table.TITLES if name != "progressive-corruptions"]
    assert "as it was" in into.read_text()
    (tmp_path / "work" / variant_folder("none")).mkdir(parents=True)
    progressive_table.main()
    assert measured[-1] == "progressive-corruptions" and "as it was" not in into.read_text()
