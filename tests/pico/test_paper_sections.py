"""The paper's tables by hand, on stubs whose images are known: the originals, moved by an offset of their row."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dcdd_core.evaluation.intervals import bootstrap
from dcdd_core.models.card import VARIANTS
from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import Calibration
from dcdd_pico import guided_sections, paper_sections
from dcdd_pico.guided_images import scenes_of
from dcdd_pico.guided_sections import F1, Rulers, labels_of
from dcdd_pico.paper_sections import REAL, RECONSTRUCTION, SOFT, TEXT, TOKENS, anchored_name
from dcdd_pico.reader import FACTS
from dcdd_pico.sections import (
    ABLATION_SCORES,
    BY_LOGITS,
    DCDD,
    RERENDERED,
    SERVED,
    STEP_COUNTS,
    VQ,
    ablation_means,
    ratio_name,
    steps_name,
)
from tests.stub_pico import StubReader
from tests.tiny import tiny_card

IMAGES = 20
GREYS = np.linspace(60, 160, IMAGES).astype(np.uint8)
SCENES = torch.from_numpy(GREYS).double() / 127.5 - 1
#: How far images are from the originals, by what paints them; of the trained decoder by what it reads.
OFFSETS = {"vq": 0.1, "soft": 0.15, "logits": 0.2, "anchored": 0.25, "tokens": 0.3}
TRAINED_OFFSETS = {"discrete": 0.4, "lcdm": 0.2, "lcdm+lc": 0.1}
ANCHORED = anchored_name(7.0)


class Detector(StubReader):
    """Its numbers are twice the stub reader's."""

    def frechet_features(self, images):
        return 2 * super().frechet_features(images)

    def perceptual_distance(self, first, second):
        return 2 * super().perceptual_distance(first, second)


@dataclass(frozen=True, kw_only=True)
class Pico:
    decoder: Any
    tokenizer: Any
    sampler: Any = None
    codec: str = "the codec"


@dataclass(frozen=True, kw_only=True)
class Painters:
    pico: Any
    folder: Path
    weights: Path
    name: str = ""
    painted: list = field(default_factory=list)

    @property
    def own_folder(self):
        return self.folder / f"{self.name}own"

    def given(self, task, source, part):
        return SimpleNamespace(tokens=torch.ones(part.stop - part.start, 1, dtype=torch.int64))

    def images(self, way, task, source, part):
        self.painted.append((self.name, way, task, source, part.start))
        reads = self.pico.decoder.card.reads
        moved = OFFSETS[way.paints if way.paints != "trained" else reads] + (way.steps - 10) / 1000
        return guided_sections.scene_pixels(guided_sections.originals(source, part), "cpu") + moved, 0.25


@pytest.fixture
def setup(tmp_path, monkeypatch):
    weights = tmp_path / "weights"
    (weights / "janus").mkdir(parents=True)
    for name in ("reader.safetensors", "decoder.safetensors", "vae", "janus/model"):
        (weights / name).write_bytes(b"")
    card = tiny_card(calibration=Calibration(scale=25.0, anchor=7.0, guidance=3.0), reads="anchored", shift=1.5)
    tokenizer = SimpleNamespace(
        device="cpu",
        codebook="the codebook",
        features=lambda images: images.mean((1, 2, 3))[:, None],
        tokens=lambda means: (means > 0).long(),
        encode=lambda pixels: SimpleNamespace(pixels=pixels),
    )
    pico = Pico(decoder=SimpleNamespace(card=card, dtype=torch.float32), tokenizer=tokenizer)
    own = Painters(pico=pico, folder=tmp_path / "guided", weights=weights)
    rulers = Rulers(painters=own, reader=StubReader(), detector=Detector())
    monkeypatch.setattr(Rulers, "of", classmethod(lambda cls, setup: rulers))
    for module in (guided_sections, paper_sections):
        monkeypatch.setattr(
            module,
            "originals",
            lambda source, part: np.broadcast_to(GREYS[part, None, None, None], (part.stop - part.start, 16, 16, 3)),
        )
    monkeypatch.setattr(guided_sections, "bootstrap", partial(bootstrap, resamples=10))
    return SimpleNamespace(
        pico=pico, images=[None] * IMAGES, guidance=3.0, steps=10, compiled=False, out=tmp_path, weights=weights,
        ablation={}, painted=own.painted,
    )  # fmt: skip


def expected(offset, count=IMAGES):
    """What a row with this offset must say of reconstruction, worked out by hand."""
    x, c1 = (SCENES[:count].numpy() + 1) / 2, 0.01**2  # intensities 0..1
    y = x + offset / 2
    return {
        "frechet": offset**2,
        "frechet, text detector": 4 * offset**2,
        "ssim": float(((2 * x * y + c1) / (x * x + y * y + c1)).mean()),
        "psnr": 10 * np.log10(4 / offset**2),
        "perceptual": offset,
        "perceptual, text detector": 2 * offset,
    }


def assert_row(row, values):
    assert {name: row[name] for name in values} == pytest.approx(values, rel=1e-4, abs=1e-5)


def assert_ratio(rows, name, baseline, offsets):
    """The ratio of two rows' scores, with an interval."""
    row = rows[ratio_name(name, baseline)]
    ours, theirs = (expected(offset) for offset in offsets)
    known = {column: ours[column] / theirs[column] for column in ours if column in row}
    assert_row(row, known)
    for column in known:
        assert row[f"{column}: lowest"] - 1e-6 <= row[column] <= row[f"{column}: highest"] + 1e-6


def test_table_2_names_the_images_that_it_measures(setup):
    rows = paper_sections.measure_reconstruction(setup)
    assert list(rows) == [VQ, SOFT, DCDD, ratio_name(SOFT, VQ), ratio_name(DCDD, VQ)]
    for name, offset in ((VQ, "vq"), (SOFT, "soft"), (DCDD, "anchored")):
        assert_row(rows[name], expected(OFFSETS[offset]))
    assert_ratio(rows, DCDD, VQ, (0.25, 0.1))
    for row in rows.values():
        assert {column for column in row if ":" not in column} == {*RECONSTRUCTION, "images"}
        assert row["images"] == IMAGES
    assert {(task, source) for _, _, task, source, _ in setup.painted} == {("reconstruction", "test")}


def test_table_3_names_the_images_that_it_measures(setup):
    rows = paper_sections.measure_text(setup)
    offsets = {VQ: "vq", SERVED: "anchored"}
    assert list(rows) == [VQ, SERVED, ratio_name(SERVED, VQ)]
    shapes = labels_of("test", IMAGES)["shape"]
    for name, reads in offsets.items():
        assert_row(rows[name], {c: expected(OFFSETS[reads])[c] for c in ("frechet", "frechet, text detector")})
        assert {column for column in rows[name] if ":" not in column} == {*TEXT, "images"}
        details = {key for key in rows[name] if key.startswith("frechet: ")}
        seen = {f"frechet: {FACTS['shape'][k]}" for k in set(shapes.tolist()) if (shapes == k).sum() > 1}
        assert details == seen | {"frechet: lowest", "frechet: highest"} and seen
        for detail in seen:
            assert rows[name][detail] == pytest.approx(OFFSETS[reads] ** 2, abs=1e-4)
    assert_ratio(rows, SERVED, VQ, (0.25, 0.1))


def test_readings_are_compared_with_the_baseline_and_with_what_is_served(setup):
    rows = paper_sections.measure_readings(setup)
    offsets = {VQ: "vq", BY_LOGITS: "logits", ANCHORED: "anchored", TOKENS: "tokens"}
    pairs = [*((name, VQ) for name in list(offsets)[1:]), (BY_LOGITS, ANCHORED), (TOKENS, ANCHORED)]
    assert list(rows) == [*offsets, *(ratio_name(*pair) for pair in pairs)]
    for name, reads in offsets.items():
        assert_row(rows[name], {c: expected(OFFSETS[reads])[c] for c in ("frechet", "frechet, text detector")})
        assert {column for column in rows[name] if ":" not in column} == {*TEXT, "images"}
    for pair in pairs:
        assert_ratio(rows, *pair, [OFFSETS[offsets[name]] for name in pair])
    assert {name for name, way, *_ in setup.painted if way.name == ANCHORED} == {""}, "kept with the other tables'"
    assert {name for name, way, *_ in setup.painted if way.name == TOKENS} == {"tokens-"}


def test_details_are_of_the_images_with_that_shape(setup):
    rows = paper_sections.measure_text(setup)
    moved = paper_sections.by_shape(
        guided_sections.Scores(
            held={"reader features": np.where(labels_of("test", IMAGES)["shape"] == 0, 3.0, 1.0)[:, None]},
            real={"reader features": np.zeros((IMAGES, 1))},
            labels=labels_of("test", IMAGES),
        )
    )
    first = f"frechet: {FACTS['shape'][0]}"
    assert first in rows[VQ] and moved.pop(first) == pytest.approx(9)
    assert list(moved.values()) == pytest.approx([1] * len(moved)) and moved


def test_what_is_served_is_the_card_s_reading(setup):
    calibration = setup.pico.decoder.card.calibration
    setup.pico.decoder.card = tiny_card(calibration=calibration, reads="tokens", shift=1.5)
    rows = paper_sections.measure_text(setup)
    assert rows[SERVED]["frechet"] == pytest.approx(OFFSETS["tokens"] ** 2, abs=1e-4)
    compared = {name for name in paper_sections.measure_readings(setup) if name.endswith(f"to {TOKENS}")}
    assert compared == {ratio_name(BY_LOGITS, TOKENS), ratio_name(ANCHORED, TOKENS)}
    assert setup.pico.decoder.card.reads == "tokens", "the loaded card is left as it is"


def test_table_6_names_the_steps_that_it_measures(setup, monkeypatch):
    monkeypatch.setattr(paper_sections, "STEPPED", 18)
    rows = paper_sections.measure_steps(setup)
    names = [VQ, *map(steps_name, STEP_COUNTS)]
    ratios = [ratio_name(name, VQ) for name in names[1:]]
    assert list(rows) == [*names, *ratios, ratio_name(steps_name(10), steps_name(30))]
    assert_row(rows[VQ], expected(0.1, 18))
    for steps in STEP_COUNTS:
        assert_row(rows[steps_name(steps)], expected(0.25 + (steps - 10) / 1000, 18))
    assert {row["images"] for row in rows.values()} == {18}
    assert rows[ratio_name(steps_name(10), steps_name(30))]["frechet"] == pytest.approx((0.25 / 0.27) ** 2, rel=1e-3)


@pytest.mark.parametrize("task, measure", [("reconstruction", "measure_few"), ("text", "measure_few_text")])
def test_few_steps_are_compared_with_the_card_s_own(setup, task, measure):
    rows = getattr(paper_sections, measure)(setup)
    few = {f"DCDD, {steps} at shift 0.5": steps for steps in ("4 steps", "2 steps", "1 step")}
    assert list(rows) == ["DCDD, 10 steps", *few, *(ratio_name(name, "DCDD, 10 steps") for name in few)]
    painted = {(way.steps, way.shift) for _, way, of, source, _ in setup.painted if (of, source) == (task, "test")}
    assert painted == {(10, None), (4, 0.5), (2, 0.5), (1, 0.5)}
    for name, steps in few.items():
        offset = 0.25 + (int(steps.split()[0]) - 10) / 1000
        assert rows[name]["frechet"] == pytest.approx(offset**2, rel=1e-3)
        assert rows[ratio_name(name, "DCDD, 10 steps")]["frechet"] == pytest.approx((offset / 0.25) ** 2, rel=1e-3)
    assert {row["images"] for row in rows.values()} == {IMAGES}
    assert ("ssim" in rows["DCDD, 10 steps"]) == (task == "reconstruction")


def test_table_4_names_the_decoders_that_it_measures(setup, monkeypatch, tmp_path):
    """Decoders get the same tokens, the shipped decoder's time shift, and their own card's condition."""

    class Sampler:
        def sample(self, captions, *, seeds, options):
            part = slice(seeds[0], seeds[-1] + 1)
            assert captions == [scene.caption for scene in scenes_of("test", part)]
            assert options == SamplingOptions(guidance=3.0)
            return setup.pico.tokenizer.encode(
                paper_sections.scene_pixels(paper_sections.originals("test", part), "cpu")
            )

    def load(path, *, options):
        assert options == {"device": "cpu", "dtype": torch.float32, "compiled": False}
        return SimpleNamespace(card=tiny_card(variant=path.stem, reads="logits", calibration=None))

    def decode(decoder, codec, condition, *, seeds, steps, shift):
        assert (codec, steps, shift) == ("the codec", 10, 1.5) and len(seeds) == len(condition.pixels)
        return SimpleNamespace(pixels=condition.pixels + TRAINED_OFFSETS[decoder.card.variant])

    def condition_for(card, grid, codebook):
        assert codebook == "the codebook" and card.variant in VARIANTS
        return grid

    monkeypatch.setattr(paper_sections, "load_decoder", load)
    monkeypatch.setattr(paper_sections, "DecoderOptions", lambda **options: options)
    monkeypatch.setattr(paper_sections, "decode", decode)
    monkeypatch.setattr(paper_sections, "condition_for", condition_for)
    setup.pico = Pico(decoder=setup.pico.decoder, tokenizer=setup.pico.tokenizer, sampler=Sampler())
    for variant in VARIANTS:
        (tmp_path / f"{variant}.safetensors").write_text(variant)
        setup.ablation[f"{variant}, seed 0"] = tmp_path / f"{variant}.safetensors"
    rows = paper_sections.measure_ablation(setup)
    assert list(rows) == list(setup.ablation)
    for variant, row in zip(VARIANTS, rows.values()):
        known = expected(TRAINED_OFFSETS[variant])
        text = {f"text {column}": known[column] for column in ("frechet", "frechet, text detector")}
        assert_row(row, {column: (known | text)[column] for column in ABLATION_SCORES})
        assert row["images"] == IMAGES and row["frechet: lowest"] <= row["frechet"] <= row["frechet: highest"]
    means = ablation_means(rows)
    assert means[ratio_name("lcdm", "discrete")]["perceptual"] == pytest.approx(0.5)
    monkeypatch.setattr(paper_sections, "decode", None)
    assert paper_sections.measure_ablation(setup) == rows, "what was measured is kept"


def test_the_chance_level_is_that_of_other_renderings(setup, monkeypatch):
    seen = []

    def draw(facts, rng, *, size):
        seen.append((facts, rng.integers(1000)))
        return np.full((size, size, 3), GREYS[len(seen) - 1] + 10, np.uint8)

    monkeypatch.setattr(paper_sections, "draw", draw)
    rows = paper_sections.measure_reader(setup)
    assert list(rows) == [REAL, RERENDERED]
    assert {column for column in rows[REAL] if ":" not in column} == {*F1, "images"}
    assert_row(rows[RERENDERED], {c: expected(10 / 127.5)[c] for c in ("frechet", "frechet, text detector")})
    assert any(key.removeprefix("frechet: ") in FACTS["shape"] for key in rows[RERENDERED])
    assert [facts for facts, _ in seen] == [scene.facts for scene in scenes_of("test", slice(0, IMAGES))]
    assert [number for _, number in seen] == [np.random.default_rng([1, k]).integers(1000) for k in range(IMAGES)]
    assert paper_sections.measure_reader(setup) == rows and len(seen) == IMAGES, "what was measured is kept"


def test_the_chance_level_is_not_taken_from_another_rendering(setup, monkeypatch):
    names, original = [], Rulers.of_images

    def of_images(self, name, part, make, **options):
        names.append(name)
        return original(self, name, part, make, **options)

    monkeypatch.setattr(Rulers, "of_images", of_images)
    for told in ("one", "other"):
        monkeypatch.setattr(paper_sections, "code_hash", lambda *functions, told=told: told)
        paper_sections.measure_reader(setup)
    assert set(names) == {"rerendered-one", "rerendered-other"}
