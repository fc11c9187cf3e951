"""Scores of guidance by hand, on stubs and on images whose scores are known."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_f1_score

from dcdd_core.evaluation.intervals import block_jackknife, bootstrap
from dcdd_pico import guided_sections
from dcdd_pico.guided_sections import (
    ABOVE,
    BOTH,
    CHANGES,
    CHOICE,
    CODEC,
    GUIDED,
    LOSS_8,
    RECONSTRUCTION,
    SDEDIT,
    SOFT,
    STRONGER,
    TEXT,
    TRAINED,
    VARIED,
    VQ,
    WAYS,
    Rulers,
    Scores,
    collect,
    high_frequencies,
    labels_of,
    macro_f1,
    minus,
    ratio,
    row_of,
    rows_of,
    share_name,
)
from dcdd_pico.reader import FACTS, fact_labels
from dcdd_pico.scenes import render_scene
from dcdd_pico.sections import READ
from tests.stub_pico import StubReader

DRAW = np.random.default_rng(0)
COUNT = 40


def scores(shift, **held):
    """M = 40 images whose only feature is 0..39 moved by a shift: a Frechet distance of shift^2."""
    line = np.arange(COUNT, dtype=np.float64)[:, None]
    return Scores(
        held={"reader features": line + shift, "detector features": line + 2 * shift, **held},
        real={"reader features": line, "detector features": line},
        labels={},
    )


def test_f1_is_torchmetrics():
    for classes in (2, 5, 9):
        truth, read = DRAW.integers(classes, size=(2, 60))
        truth[truth == classes - 1] = 0  # a class that does not occur is left out
        read[read == classes - 1] = 0
        expected = multiclass_f1_score(torch.from_numpy(read), torch.from_numpy(truth), classes, average="macro")
        assert macro_f1(read, truth, classes) == pytest.approx(float(expected), rel=1e-5)


def test_f1_of_facts_is_of_what_is_read_and_their_mean():
    held = {f"read {name}": np.zeros(COUNT, np.int64) for name in FACTS}
    held["read colour"] = np.ones(COUNT, np.int64)
    labels = {name: np.zeros(COUNT, np.int64) for name in FACTS}
    found = Scores(held=scores(0.0).held | held, real={}, labels=labels)
    every = np.arange(COUNT)
    assert [found.score(f"F1 {name}", every) for name in READ] == [1.0, 0.0, 1.0, 1.0]
    assert found.score("F1", every) == 0.75
    assert "F1 shape" in found.columns() and "F1 shape" not in scores(0.0).columns()


def test_rows_differences_and_shares_by_hand():
    better = DRAW.normal(0.1, 0.01, COUNT)
    ssim = DRAW.normal(0.8, 0.05, COUNT)
    table = rows_of(
        {
            VQ: scores(4.0, ssim=ssim),
            GUIDED: scores(2.0, ssim=ssim + 0.9 * better),
            TRAINED: scores(1.0, ssim=ssim + better),
        },
        ("frechet", "frechet, text detector", "ssim"),
        trained=TRAINED,
    )
    share = share_name(GUIDED)
    assert list(table) == [VQ, GUIDED, TRAINED, minus(GUIDED, VQ), minus(TRAINED, VQ), share]
    assert [table[name]["frechet"] for name in table] == pytest.approx([16, 4, 1, -12, -15, 12 / 15], abs=1e-6)
    assert table[GUIDED]["frechet, text detector"] == pytest.approx(16)
    assert table[VQ]["ssim"] == pytest.approx(ssim.mean())
    assert table[share]["ssim"] == pytest.approx(0.9) and table[share]["ssim: highest"] == pytest.approx(0.9)
    assert table[minus(TRAINED, VQ)]["images"] == COUNT and table[minus(TRAINED, VQ)]["ssim"] == pytest.approx(
        better.mean()
    )
    paired = bootstrap(lambda k: better[k].mean(), COUNT)
    found = table[minus(TRAINED, VQ)]
    assert (found["ssim: lowest"], found["ssim: highest"]) == pytest.approx((paired.low, paired.high))


def test_ratios_are_paired():
    """Of scores that are always twice those of another way, every resample's ratio is 2."""
    held = DRAW.uniform(1, 9, COUNT)
    ours, theirs = (Scores(held={"psnr": factor * held}, real={}, labels={}) for factor in (2.0, 1.0))
    row = row_of(["psnr"], partial(ratio, ours, theirs), COUNT)
    assert [row["psnr"], row["psnr: lowest"], row["psnr: highest"]] == pytest.approx(3 * [2.0])


def test_labels_are_the_facts_of_the_range_that_is_measured():
    truth = fact_labels([render_scene("test", 100_000 + k, size=96).facts for k in range(3)])
    found = labels_of("test", 3)
    assert set(found) == set(truth) and all(found[name].tolist() == truth[name].tolist() for name in truth)
    assert any(len(set(values.tolist())) > 1 for values in found.values())


def test_frechet_distances_have_the_jackknife_s_interval():
    noisy = scores(1.0)
    noisy.held["reader features"] = noisy.held["reader features"] + DRAW.normal(0, 5, (COUNT, 1))
    row = rows_of({VQ: noisy}, ("frechet",))[VQ]
    expected = block_jackknife(lambda k: noisy.score("frechet", k), COUNT)
    assert (row["frechet: lowest"], row["frechet: highest"]) == (expected.low, expected.high)
    assert row["frechet: highest"] > row["frechet"]


class Detector(StubReader):
    """Its numbers are twice the stub reader's."""

    def frechet_features(self, images):
        return 2 * super().frechet_features(images)

    def perceptual_distance(self, first, second):
        return 2 * super().perceptual_distance(first, second)


OFFSETS = {way.name: 0.02 * k for k, way in enumerate(WAYS, 1)}


class Painters:
    """Images are the originals, moved by a way's offset."""

    pico = SimpleNamespace(
        tokenizer=SimpleNamespace(
            device="cpu",
            features=lambda images: images.mean((1, 2, 3))[:, None],
            tokens=lambda means: (means > 0).long(),
        ),
        codec=SimpleNamespace(encode=lambda images: images, decode=lambda images: images),
    )

    def __init__(self, folder):
        self.folder, self.own_folder, self.weights, self.painted = folder, folder, folder, []

    def given(self, task, source, part):
        return SimpleNamespace(tokens=torch.ones(part.stop - part.start, 1, dtype=torch.int64))

    def images(self, way, task, source, part):
        self.painted.append((way.name, part.start))
        truth = guided_sections.scene_pixels(guided_sections.originals(source, part), "cpu")
        return truth * 0.5 + OFFSETS[way.name], 0.25


@pytest.fixture
def rulers(tmp_path, monkeypatch):
    greys = np.linspace(20, 200, 64).astype(np.uint8)
    monkeypatch.setattr(
        guided_sections,
        "originals",
        lambda source, part: np.broadcast_to(greys[part, None, None, None], (part.stop - part.start, 16, 16, 3)),
    )
    (tmp_path / "reader.safetensors").write_bytes(b"")
    made = Rulers(painters=Painters(tmp_path), reader=StubReader(), detector=Detector())
    monkeypatch.setattr(Rulers, "of", classmethod(lambda cls, setup: made))
    monkeypatch.setattr(guided_sections, "bootstrap", partial(bootstrap, resamples=20))
    return made


def setup(count):
    return SimpleNamespace(images=[None] * count, pico=Painters.pico)


def test_reconstruction_measures_each_way_against_the_originals(rulers):
    table = guided_sections.measure_guided_reconstruction(setup(20))
    assert set(table[VQ]) >= set(RECONSTRUCTION) and table[VQ]["images"] == 20
    assert {
        share_name(GUIDED),
        minus(GUIDED, SDEDIT),
        minus(BOTH, TRAINED),
        minus(GUIDED, VQ),
        minus(GUIDED, CODEC),
    } <= set(table)
    truth = torch.tensor(guided_sections.originals("test", slice(0, 20))).float() / 127.5 - 1
    for way in WAYS:
        offset = OFFSETS[way.name]
        means = truth.mean((1, 2, 3))
        distance = (means * 0.5 + offset - means).abs().mean()
        assert table[way.name]["perceptual"] == pytest.approx(float(distance), rel=1e-4)
        assert table[way.name]["perceptual, text detector"] == pytest.approx(2 * float(distance), rel=1e-4)
        share = float((means * 0.5 + offset > 0).float().mean())
        assert table[way.name]["token agreement"] == pytest.approx(share)


def test_text_has_no_scores_of_reconstruction(rulers):
    table = guided_sections.measure_guided_text(setup(18))
    assert set(TEXT) <= set(table[VQ]) and "ssim" not in table[VQ]
    assert "ssim" not in rulers.made(WAYS[0], "text", "test", slice(0, 16))
    assert minus(GUIDED, VQ) in table and minus(GUIDED, SDEDIT) in table and share_name(GUIDED) not in table


def test_an_interrupted_measurement_goes_on(rulers):
    painters = rulers.painters
    first = collect(rulers, WAYS[:2], "reconstruction", "test", 16)
    assert len(painters.painted) == 2
    more = collect(rulers, WAYS[:2], "reconstruction", "test", 20)
    assert painters.painted[2:] == [(WAYS[0].name, 16), (WAYS[1].name, 16)]
    assert np.array_equal(more[VQ].held["ssim"][:16], first[VQ].held["ssim"]) and len(more[VQ]) == 20


def test_photographs_count_those_that_are_better(rulers):
    table = guided_sections.measure_guided_photographs(setup(4))
    assert ABOVE not in table[VQ] and 0 <= table[GUIDED][ABOVE] <= 1
    ssim = {
        name: rulers.made(way, "reconstruction", "photographs", slice(0, 16))["ssim"] for name, way in zip("ab", WAYS)
    }
    better = ssim["b"].reshape(4, 4).mean(1) > ssim["a"].reshape(4, 4).mean(1)
    collected = collect(rulers, WAYS[:2], "reconstruction", "photographs", 64)
    held = [own.held["ssim"].reshape(16, 4).mean(1) for own in collected.values()]
    assert table[WAYS[1].name][ABOVE] == (held[1] > held[0]).mean()
    assert np.array_equal((held[1] > held[0])[:4], better.numpy())


def test_robustness_measures_what_was_changed(rulers, monkeypatch):
    """Originals with a checkerboard, of which the ways leave half: a quarter of its energy."""
    board = 20 * ((np.arange(16)[:, None] + np.arange(16)) % 2)[None, :, :, None]
    plain = guided_sections.originals
    monkeypatch.setattr(
        guided_sections, "originals", lambda source, part: (plain(source, part) + board).astype(np.uint8)
    )
    monkeypatch.setattr(guided_sections, "CHANGES", {"as it is": lambda images: images, "negative": lambda x: -x})
    table = guided_sections.measure_guided_robustness(setup(64))
    assert list(table)[:2] == ["original", "original through the autoencoder"]
    truth = torch.tensor(guided_sections.originals("test", slice(0, 64))).float().mean((1, 2, 3)) / 127.5 - 1
    for name, means in (("original", truth), (GUIDED, truth * 0.5 + OFFSETS[GUIDED])):
        assert table[name]["as it is"] == pytest.approx(float((means > 0).float().mean()))
        assert table[name]["negative"] == pytest.approx(float((means < 0).float().mean()))
    assert 0 < table[GUIDED]["as it is"] < 1
    assert table["original"]["high frequencies"] == 1
    assert table[GUIDED]["high frequencies"] == pytest.approx(0.25)


def test_changes_by_hand():
    flat = torch.full((2, 3, 16, 16), 0.25)
    for name, change in CHANGES.items():
        made = change(flat)
        assert made.shape == flat.shape and made.abs().max() <= 1
        assert torch.allclose(made, flat, atol=0.01) == (not name.startswith("noise"))
    noise = guided_sections.noised(flat, 0.03) - flat
    assert noise.std() == pytest.approx(0.03, rel=0.1) and torch.equal(
        guided_sections.noised(flat, 0.03), guided_sections.noised(flat, 0.03)
    )
    point = torch.zeros(1, 3, 17, 17)
    point[:, :, 8, 8] = 1
    spread = guided_sections.blurred(point, 0.8)
    assert spread.sum() == pytest.approx(3) and spread[0, 0, 8, 9] / spread[0, 0, 8, 8] == pytest.approx(
        np.exp(-1 / (2 * 0.64)), rel=1e-4
    )
    tinted = guided_sections.tinted(flat, 0.1)
    assert [float(tinted[0, c, 0, 0]) for c in range(3)] == pytest.approx([0.35, 0.15, 0.3])
    hole = guided_sections.emptied(point, 0.5)
    assert hole[0, 0, 8, 8] == pytest.approx(1 / 289)


def test_high_frequencies_are_those_above_a_quarter_cycle():
    k = torch.arange(32)
    waves = [torch.cos(2 * torch.pi * f * k).expand(1, 3, 32, 32) for f in (1 / 8, 1 / 4, 3 / 8)]
    for way in (lambda wave: wave, lambda wave: wave.mT):
        slow, limit, fast = (float(high_frequencies(way(wave))) for wave in waves)
        assert slow == pytest.approx(0, abs=1e-6) and limit == pytest.approx(0, abs=1e-6)
        assert fast == pytest.approx(3 * 2 * (32 * 32 / 2) ** 2)


def test_the_rows_have_the_strengths_that_the_tables_tell():
    strengths = {way.name: way.guidance.strength for way in WAYS if way.guidance is not None}
    assert strengths == {SDEDIT: 0.0, LOSS_8: 0.1, GUIDED: 0.4, STRONGER: 0.6, BOTH: 0.05}
    assert {way.name for way in WAYS if way.guidance is None} == {VQ, SOFT, CODEC, TRAINED}
    assert {way.start for way in WAYS if way.paints == "prior"} == {0.6}


@pytest.mark.parametrize(
    ("measure", "ways", "task"),
    [
        (guided_sections.measure_guided_ablation, VARIED, "reconstruction"),
        (guided_sections.measure_guided_choice, CHOICE, "text"),
    ],
)
def test_settings_are_compared_on_scenes_that_only_choices_see(monkeypatch, measure, ways, task):
    asked = []
    monkeypatch.setattr(Rulers, "of", classmethod(lambda cls, setup: None))
    monkeypatch.setattr(guided_sections, "collect", lambda rulers, *given: asked.append(given) or {})
    assert measure(setup(1000)) == {} and asked == [(ways, task, "calibration", guided_sections.FEW)]


def test_what_the_reader_reads_is_its_most_likely_answer(rulers):
    class Reading(StubReader):
        def __call__(self, images):
            return {"colour": torch.tensor([[0.1, 2.0, -3.0], [5.0, 4.0, 3.0]])}

    found = guided_sections.scores_of(replace(rulers, reader=Reading()), torch.zeros(2, 3, 8, 8), None, None)
    assert found["read colour"].tolist() == [1, 0]
