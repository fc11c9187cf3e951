"""LlamaGen beside Janus: scores by hand on stubs whose images are known, and what random weights sample."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dcdd_core.evaluation.intervals import bootstrap
from dcdd_core.method.lcdm import map_logits
from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import Calibration
from dcdd_pico import guided_sections, llamagen_sections, sections
from dcdd_pico.embedded import JANUS, LLAMAGEN, calibration_name
from dcdd_pico.guided_images import scenes_of
from dcdd_pico.guided_sections import F1, Rulers, minus
from dcdd_pico.llamagen_sections import (
    DCDD,
    GUIDANCES,
    LOSS,
    RATIOS,
    RECONSTRUCTION,
    TEXT,
    VQ,
    calibrated_name,
    chosen_guidance,
    gain_name,
    guidance_name,
    row_name,
)
from dcdd_pico.models import load_pico
from dcdd_pico.sections import SECTIONS, TableOptions
from tests.stub_pico import StubReader
from tests.tiny import random_llamagen, random_pico, tiny_card

CALIBRATION = calibration_name(LLAMAGEN)

IMAGES = 20
GREYS = np.linspace(20, 200, 300).astype(np.uint8)
#: How far images are from the originals: a Frechet distance of the square.
OFFSETS = {(JANUS, VQ): 0.4, (JANUS, DCDD): 0.2, (LLAMAGEN, VQ): 0.6, (LLAMAGEN, DCDD): 0.5}
OWN = ("llamagen-choice", "llamagen-loss", "llamagen-reconstruction", "llamagen-text")


class Detector(StubReader):
    """Its numbers are twice the stub reader's."""

    def frechet_features(self, images):
        return 2 * super().frechet_features(images)

    def perceptual_distance(self, first, second):
        return 2 * super().perceptual_distance(first, second)


class Decoder:
    def __init__(self, card):
        self.card, self.dtype = card, torch.float32

    def to(self, dtype):
        self.dtype = dtype


TOKENIZER = SimpleNamespace(
    device="cpu",
    features=lambda images: images.mean((1, 2, 3))[:, None],
    tokens=lambda means: (means > 0).long(),
    encode=lambda images: SimpleNamespace(tokens=images[:, :1, 0, 0]),
)


@dataclass(frozen=True, kw_only=True)
class Pico:
    sampler: Any
    decoder: Any
    tokenizer: Any = field(default_factory=lambda: TOKENIZER)


def pico_of(vlm, guidance):
    card = tiny_card(calibration=Calibration(scale=25.0, guidance=guidance, vlm=vlm))
    return Pico(sampler=SimpleNamespace(name=vlm), decoder=Decoder(card))


@dataclass(kw_only=True)
class Painters:
    """Images are the originals, moved by an offset; of calibration captions, by a tenth of the guidance."""

    pico: Any
    folder: Path
    weights: Path
    read: tuple[str, ...] = (JANUS,)
    name: str = ""

    def __post_init__(self):
        self.own_folder, self.painted = self.folder / f"{self.name}own", []

    def given(self, task, source, part):
        return SimpleNamespace(tokens=torch.ones(part.stop - part.start, 1, dtype=torch.int64))

    def images(self, way, task, source, part):
        self.painted.append((way, task, source, part.start))
        truth = guided_sections.scene_pixels(guided_sections.originals(source, part), "cpu")
        guidance = self.pico.decoder.card.calibration.guidance
        chosen = guidance / 10 if source == "calibration" else OFFSETS[self.pico.sampler.name, way.name]
        return truth + chosen, 0.25


@pytest.fixture
def setup(tmp_path, monkeypatch):
    weights = tmp_path / "weights"
    (weights / LLAMAGEN).mkdir(parents=True)
    (weights / "reader.safetensors").write_bytes(b"")
    (weights / CALIBRATION).write_bytes(b"")
    made = SimpleNamespace(
        pico=pico_of(JANUS, 3.0),
        images=[None] * IMAGES,
        guidance=3.0,
        steps=7,
        compiled=False,
        out=tmp_path / "out",
        weights=weights,
        painters=[],
    )
    made.pico.decoder.dtype = torch.bfloat16

    def load(**options):
        assert options == {"device": "cpu", "weights": weights, "compiled": False, "vlm": LLAMAGEN}
        made.llamagen = pico_of(LLAMAGEN, 2.0)
        return made.llamagen

    def painters(**options):
        made.painters.append(Painters(**options))
        return made.painters[-1]

    monkeypatch.setattr(llamagen_sections, "load_pico", load)
    monkeypatch.setattr(llamagen_sections, "Painters", painters)
    monkeypatch.setattr(
        guided_sections,
        "originals",
        lambda source, part: np.broadcast_to(GREYS[part, None, None, None], (part.stop - part.start, 16, 16, 3)),
    )
    monkeypatch.setattr(llamagen_sections, "originals", lambda source, part: guided_sections.originals(source, part))
    monkeypatch.setattr(guided_sections, "bootstrap", partial(bootstrap, resamples=10))
    own = Painters(pico=made.pico, folder=tmp_path / "guided", weights=weights)
    made.janus = Rulers(painters=own, reader=StubReader(), detector=Detector())
    monkeypatch.setattr(Rulers, "of", classmethod(lambda cls, setup: made.janus))
    return made


def test_text_compares_both_vlms_with_both_decoders(setup):
    table = llamagen_sections.measure_text(setup)
    names = {key: row_name(*key) for key in OFFSETS}
    weaker = minus(names[LLAMAGEN, VQ], names[JANUS, VQ])
    apart = minus(gain_name(LLAMAGEN), gain_name(JANUS))
    gains = {vlm: minus(names[vlm, DCDD], names[vlm, VQ]) for vlm in (JANUS, LLAMAGEN)}
    assert set(table) == {*names.values(), *gains.values(), weaker, gain_name(JANUS), gain_name(LLAMAGEN), apart}
    expected = {names[key]: offset**2 for key, offset in OFFSETS.items()}
    expected |= {gains[JANUS]: 0.04 - 0.16, gains[LLAMAGEN]: 0.25 - 0.36, weaker: 0.36 - 0.16}
    for name, value in expected.items():
        assert table[name]["frechet"] == pytest.approx(value, abs=1e-4), name
        assert table[name]["frechet, text detector"] == pytest.approx(4 * value, abs=4e-4)
    for column in ("frechet", "frechet, text detector"):
        found = [table[name][column] for name in (gain_name(JANUS), gain_name(LLAMAGEN), apart)]
        assert found == pytest.approx([0.04 / 0.16, 0.25 / 0.36, 0.25 / 0.36 - 0.25], abs=1e-3)
    assert table[gain_name(JANUS)]["F1"] == 1 and table[apart]["F1"] == table[gains[JANUS]]["F1"] == 0
    for name, row in table.items():
        columns = RATIOS if "ratio of" in name else TEXT
        details = ("", ": lowest", ": highest")
        assert set(row) - {"guidance", "images"} == {f"{column}{detail}" for column in columns for detail in details}
        assert row["images"] == IMAGES and ("guidance" in row) == (name in names.values())
    assert [table[names[key]]["guidance"] for key in OFFSETS] == [3.0, 3.0, 2.0, 2.0]
    for painters in (setup.janus.painters, setup.painters[0]):
        assert {(way.name, way.paints, way.steps) for way, *_ in painters.painted} == {
            (VQ, "vq", 10),
            (DCDD, "trained", 7),
        }
        assert {(task, source) for _, task, source, _ in painters.painted} == {("text", "test")}
    assert setup.llamagen.decoder.dtype == torch.bfloat16


def test_reconstruction_has_one_vq_decode_and_either_calibration(setup):
    table = llamagen_sections.measure_reconstruction(setup)
    janus, llamagen = calibrated_name(JANUS), calibrated_name(LLAMAGEN)
    assert list(table) == [VQ, janus, llamagen, minus(janus, VQ), minus(llamagen, VQ), minus(llamagen, janus)]
    expected = [0.16, 0.04, 0.25, 0.04 - 0.16, 0.25 - 0.16, 0.25 - 0.04]
    assert [row["frechet"] for row in table.values()] == pytest.approx(expected, abs=1e-4)
    moved = [0.4, 0.2, 0.5, -0.2, 0.1, 0.3]
    assert [row["perceptual"] for row in table.values()] == pytest.approx(moved, abs=1e-4)
    assert [row["perceptual, text detector"] for row in table.values()] == pytest.approx([2 * d for d in moved])
    psnr = [10 * np.log10(4 / offset**2) for offset in (0.4, 0.2, 0.5)]
    assert [row["psnr"] for row in table.values()][:3] == pytest.approx(psnr, rel=1e-3)
    for row in table.values():
        assert {column for column in row if ":" not in column} == {*RECONSTRUCTION, "images"}
    (painters,) = setup.painters
    assert {way.name for way, *_ in painters.painted} == {DCDD}, "the same tokens need no second VQ decode"
    assert set(painters.read) >= {CALIBRATION, JANUS, "decoder.safetensors", "vae"}


def test_guidances_are_compared_on_calibration_captions_before_there_is_a_calibration(setup, monkeypatch):
    monkeypatch.setattr(llamagen_sections, "CHOICE", 18)
    (setup.weights / CALIBRATION).unlink()
    table = llamagen_sections.measure_choice(setup)
    assert list(table) == [guidance_name(guidance) for guidance in GUIDANCES]
    for guidance, painters in zip(GUIDANCES, setup.painters, strict=True):
        row = table[guidance_name(guidance)]
        assert row["frechet"] == pytest.approx((guidance / 10) ** 2, abs=1e-3) and row["images"] == 18
        assert {column for column in row if ":" not in column} == {"frechet", "F1", "images"}
        assert painters.pico.decoder.card.calibration == Calibration(scale=25.0, guidance=guidance, vlm=LLAMAGEN)
        assert {(way.paints, task, source) for way, task, source, _ in painters.painted} == {
            ("vq", "text", "calibration")
        }
        assert not any(CALIBRATION in name or "config" in name for name in painters.read)
    assert len({painters.own_folder for painters in setup.painters}) == len(GUIDANCES)
    assert {painters.folder for painters in setup.painters} == {setup.janus.painters.folder}
    assert setup.llamagen.decoder.card.calibration.guidance == 2.0, "the loaded card is left as it is"


def test_the_choice_is_the_nearest_of_those_that_show_the_facts():
    def row(frechet, f1):
        return {"frechet": frechet, "F1": f1, "F1: lowest": f1 - 0.02, "F1: highest": f1 + 0.02}

    rows = dict(zip(map(guidance_name, GUIDANCES), (row(1.0, 0.5), row(1.5, 0.87), *[row(2.0, 0.89)] * 4)))
    assert chosen_guidance(rows) == 1.5
    assert chosen_guidance(rows | {guidance_name(5.0): row(1.4, 0.88)}) == 5.0
    assert chosen_guidance(rows | {guidance_name(7.5): row(9.0, 0.9)}) == 2.0, "1.5 is below the best one's interval"


def test_losses_are_paired_by_scene(setup, monkeypatch):
    asked = []

    def token_losses(sampler, captions, tokens):
        asked.append((sampler, list(captions)))
        return torch.cat([tokens, tokens + 2.0], 1).double() + (1.5 if sampler.name == LLAMAGEN else 0.0)

    monkeypatch.setattr(llamagen_sections, "token_losses", token_losses)
    table = llamagen_sections.measure_loss(setup)
    scenes = GREYS[:IMAGES].astype(float) / 127.5 - 1 + 1.0
    assert list(table) == ["Janus", "LlamaGen", "LlamaGen, minus Janus"]
    found = [row[LOSS] for row in table.values()]
    assert found == pytest.approx([scenes.mean(), scenes.mean() + 1.5, 1.5], abs=1e-6)
    apart = table["LlamaGen, minus Janus"]
    assert (apart[f"{LOSS}: lowest"], apart[f"{LOSS}: highest"]) == pytest.approx((1.5, 1.5))
    assert table["Janus"][f"{LOSS}: lowest"] < table["Janus"][f"{LOSS}: highest"]
    captions = [scene.caption for scene in scenes_of("test", slice(0, 16))]
    assert asked[:2] == [(pico.sampler, captions) for pico in (setup.pico, setup.llamagen)]


def test_a_calibration_that_is_missing_is_asked_for(setup):
    (setup.weights / CALIBRATION).unlink()
    for measured in (llamagen_sections.measure_text, llamagen_sections.measure_reconstruction):
        with pytest.raises(ValueError, match=r"does not exist: fit it with `python -m dcdd_pico.llamagen_calibration`"):
            measured(setup)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = random_pico(tmp_path_factory.mktemp("pico") / "weights")
    random_llamagen(folder)
    codebook = load_pico(weights=folder, with_sampler=False).tokenizer.codebook.fingerprint
    calibration = Calibration(
        scale=20.0, smoothing=0.02, anchor=3.0, vlm="pico llamagen", guidance=2.0, temperature=1.0, codebook=codebook
    )
    calibration.save(folder / CALIBRATION)
    return folder


def test_its_own_guidance_and_calibration_make_its_conditions(weights, tmp_path, monkeypatch, recwarn):
    setup = SimpleNamespace(
        pico=load_pico(weights=weights), weights=weights, out=tmp_path, compiled=False, reader=StubReader()
    )
    monkeypatch.setattr(guided_sections, "TextDetectorRuler", lambda threads: Detector())
    pico = llamagen_sections.load_llamagen(setup)
    assert setup.pico.decoder.card.calibration.guidance == 3.0 and setup.pico.sampler.name == "pico"
    own = Calibration.load(weights / CALIBRATION)
    assert pico.decoder.card.calibration == own and pico.sampler.name == "pico llamagen"
    rulers = llamagen_sections.of_llamagen(Rulers.of(setup), pico, JANUS, LLAMAGEN)
    part = slice(0, 2)
    found = rulers.painters.given("text", "test", part)
    captions = [scene.caption for scene in scenes_of("test", part)]
    grid = pico.sampler.sample(captions, seeds=[0, 1], options=SamplingOptions(guidance=2.0))
    assert pico.decoder.card.reads == "logits"
    expected = map_logits(grid, pico.tokenizer.codebook, replace(own, anchor=0.0))
    assert torch.equal(found.tokens, grid.tokens)
    torch.testing.assert_close(found.condition.code_vectors, expected.code_vectors)
    torch.testing.assert_close(found.condition.uncertainty, expected.uncertainty)
    assert not [str(one.message) for one in recwarn if "calibrate" in str(one.message)]

    other = llamagen_sections.at_guidance(pico, 5.0)
    tokens = llamagen_sections.of_llamagen(rulers, other, JANUS, LLAMAGEN).painters.given("text", "test", part).tokens
    grid = pico.sampler.sample(captions, seeds=[0, 1], options=SamplingOptions(guidance=5.0))
    assert torch.equal(tokens, grid.tokens) and pico.decoder.card.calibration == own


@pytest.mark.parametrize("vlm", [JANUS, LLAMAGEN])
def test_the_loss_is_that_of_the_logits_that_are_sampled_from(weights, vlm):
    """Captions of three lengths, so that rows are padded."""
    pico = load_pico(weights=weights, vlm=vlm)
    captions = ["a large plain red star at the top", "a red circle", "a small plain blue star on the left"]
    run = pico.sampler.sample(captions, seeds=range(3), options=SamplingOptions(guidance=1.0))
    expected = F.cross_entropy(run.logits.mT, run.tokens, reduction="none")
    found = llamagen_sections.token_losses(pico.sampler, captions, run.tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_keys_are_of_the_weights_that_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sections, "code_hash", lambda function: function.__name__)
    options = TableOptions(out=tmp_path, weights=tmp_path)
    names = {name for section in OWN for name in SECTIONS[section].weights} | {f"{LLAMAGEN}/config.json"}
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def changed(name):
        before = {section: options.key(section) for section in OWN}
        (tmp_path / name).write_bytes(b"other")
        return {section for section in OWN if options.key(section) != before[section]}

    painted = {"llamagen-reconstruction", "llamagen-text"}
    assert changed(CALIBRATION) == painted == changed("decoder.safetensors")
    assert changed(f"{LLAMAGEN}/config.json") == set(), "it names the guidance that is chosen"
    assert changed(f"{LLAMAGEN}/t2i_pico.safetensors") == set(OWN) == changed(JANUS)
    assert changed("reader.safetensors") == set(OWN) - {"llamagen-loss"}


def test_the_paths_are_those_that_are_written(weights):
    for section in OWN:
        for name in SECTIONS[section].weights:
            assert (weights / name).exists(), name
    assert F1[0] == "F1" and replace(load_pico(weights=weights)).sampler.name == "pico"
