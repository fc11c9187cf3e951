"""Opponents beside the diffusion decoder: what they paint, and scores by hand on stubs whose images are known."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dcdd_core.evaluation.intervals import bootstrap
from dcdd_core.models.bundle import save_bundle
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.pipelines.condition import condition_of_tokens
from dcdd_core.pipelines.decode import decode
from dcdd_pico import guided_sections, opponents_sections
from dcdd_pico.build_context import Recipe
from dcdd_pico.feed_forward import (
    DIFFUSION,
    FEED_FORWARD,
    FeedForwardCard,
    FeedForwardDecoder,
    opponent_file,
    save_feed_forward,
)
from dcdd_pico.flops import dcdd_flops, feed_forward_flops, load_dcdd, parameters, vae_flops, vq_flops
from dcdd_pico.guided_images import Painters, Way
from dcdd_pico.guided_sections import RECONSTRUCTION, TEXT, Rulers, minus
from dcdd_pico.models import load_pico
from dcdd_pico.opponents_sections import (
    CODEC,
    DCDD,
    EACH,
    FINE,
    FINE_CONDITION,
    IMAGES,
    LARGE,
    LARGE_CONDITION,
    NAMES,
    PARAMETERS,
    RATIOS,
    SECONDS,
    TOKENS,
    TOTAL,
    VQ,
    WHOLE,
)
from dcdd_pico.sections import SECTIONS, TableOptions, ratio_name
from tests.stub_pico import StubReader
from tests.tiny import fill, random_pico

COUNT = 20
GREYS = np.linspace(20, 200, COUNT).astype(np.uint8)
#: How far images are from the originals: a Frechet distance of the square.
OFFSETS = {VQ: 0.4, LARGE: 0.3, LARGE_CONDITION: 0.25, FINE: 0.35, FINE_CONDITION: 0.2, TOKENS: 0.15, DCDD: 0.1}
OWN = ("opponents-latency", "opponents-reconstruction", "opponents-text")


class Detector(StubReader):
    """Its numbers are twice the stub reader's."""

    def frechet_features(self, images):
        return 2 * super().frechet_features(images)

    def perceptual_distance(self, first, second):
        return 2 * super().perceptual_distance(first, second)


class StubPainters:
    """Images are the originals, moved by the offset of the row; in a folder of the painters' own."""

    pico = SimpleNamespace(
        tokenizer=SimpleNamespace(
            device="cpu",
            features=lambda images: images.mean((1, 2, 3))[:, None],
            tokens=lambda means: (means > 0).long(),
        )
    )

    def __init__(self, folder, name):
        self.folder, self.own_folder, self.weights, self.ways = folder, folder / name, folder, []

    def given(self, task, source, part):
        return SimpleNamespace(tokens=torch.ones(part.stop - part.start, 1, dtype=torch.int64))

    def images(self, way, task, source, part):
        self.ways.append(way)
        assert source == "test"
        truth = guided_sections.scene_pixels(guided_sections.originals(source, part), "cpu")
        return truth + OFFSETS[way.name], 0.25


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    (tmp_path / "reader.safetensors").write_bytes(b"")
    monkeypatch.setattr(
        guided_sections,
        "originals",
        lambda source, part: np.broadcast_to(GREYS[part, None, None, None], (part.stop - part.start, 16, 16, 3)),
    )
    monkeypatch.setattr(guided_sections, "bootstrap", partial(bootstrap, resamples=10))
    base = StubPainters(tmp_path, "base")
    rulers = Rulers(painters=base, reader=StubReader(), detector=Detector())
    monkeypatch.setattr(Rulers, "of", classmethod(lambda cls, setup: rulers))
    found = {row: StubPainters(tmp_path, row) for row in NAMES.values()}

    def opponents(setup, painters):
        assert painters is base
        return found

    monkeypatch.setattr(opponents_sections, "opponents", opponents)
    return SimpleNamespace(setup=SimpleNamespace(images=[None] * COUNT, steps=7), base=base, found=found)


@pytest.mark.parametrize("task", ["reconstruction", "text"])
def test_rows_differences_and_ratios_by_hand(stubs, task):
    measure, columns = {
        "reconstruction": (opponents_sections.measure_reconstruction, RECONSTRUCTION),
        "text": (opponents_sections.measure_text, TEXT),
    }[task]
    table = measure(stubs.setup)
    assert list(table)[:7] == list(OFFSETS)
    for name, offset in OFFSETS.items():
        assert table[name]["frechet"] == pytest.approx(offset**2, abs=1e-4), name
        assert table[name]["frechet, text detector"] == pytest.approx(4 * offset**2, abs=4e-4)
        assert {column for column in table[name] if ":" not in column} == {*columns, "images"}
    pairs = [
        (DCDD, TOKENS), (LARGE_CONDITION, LARGE), (FINE_CONDITION, FINE),
        (DCDD, LARGE), (DCDD, FINE), (DCDD, LARGE_CONDITION), (DCDD, FINE_CONDITION), (TOKENS, LARGE), (TOKENS, FINE),
    ]  # fmt: skip
    pairs += [(name, VQ) for name in OFFSETS if name != VQ]
    expected = {*OFFSETS, *(minus(*pair) for pair in pairs), *(ratio_name(*pair) for pair in pairs)}
    assert set(table) == expected
    for name, other in pairs:
        own, than = OFFSETS[name], OFFSETS[other]
        assert table[minus(name, other)]["frechet"] == pytest.approx(own**2 - than**2, abs=1e-4)
        found = table[ratio_name(name, other)]
        assert found["frechet"] == pytest.approx(own**2 / than**2, rel=1e-2)
        assert found["frechet, text detector"] == pytest.approx(own**2 / than**2, rel=1e-2)
        if task == "reconstruction":
            assert found["perceptual"] == pytest.approx(own / than, rel=1e-3)
        assert {column for column in found if ":" not in column} == {*RATIOS[task], "images"}
        assert {f"frechet: {end}" for end in ("lowest", "highest")} <= set(found)


def test_diffusion_takes_the_steps_and_feed_forward_one(stubs):
    opponents_sections.measure_text(stubs.setup)
    assert {(way.name, way.paints, way.steps) for way in stubs.base.ways} == {(VQ, "vq", 10), (DCDD, "trained", 7)}
    for row, painters in stubs.found.items():
        assert {(way.name, way.steps) for way in painters.ways} == {(row, 7 if row == TOKENS else 1)}


def test_what_was_not_trained_has_no_row(stubs):
    for row in (FINE, FINE_CONDITION):
        del stubs.found[row]
    table = opponents_sections.measure_reconstruction(stubs.setup)
    assert ratio_name(DCDD, LARGE) in table and not any("fine" in row for row in table)


def test_each_decoder_has_its_own_time_in_every_round(stubs, monkeypatch):
    """The first round does not count; in each the decoders take turns, with the same images."""
    clock, times = SimpleNamespace(now=0.0, turn=0), dict(zip(OFFSETS, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 10.0)))
    order = []

    def paint(way, given, seeds):
        assert given.tokens.shape == (16, 3) and seeds == range(16)
        order.append(way.name)
        # Rounds differ: in each, all decoders take twice as long as in the one before.
        clock.now += 16 * times[way.name] * (100 if len(order) <= len(times) else 2 ** ((len(order) - 1) // len(times)))

    monkeypatch.setattr(opponents_sections.time, "perf_counter", lambda: clock.now)
    stubs.base.given = lambda task, source, part: SimpleNamespace(tokens=torch.zeros(part.stop - part.start, 3))
    for painters in (stubs.base, *stubs.found.values()):
        painters.paint = paint
    monkeypatch.setattr(opponents_sections, "Painters", lambda **options: stubs.base)
    monkeypatch.setattr(opponents_sections, "bootstrap", partial(bootstrap, resamples=10))
    costs = {name: {PARAMETERS: 10.0 * k, TOTAL: 3.0 * k} for k, name in enumerate([*OFFSETS, CODEC], 1)}
    monkeypatch.setattr(opponents_sections, "costs_of", lambda setup, name, others: costs[name])
    setup = SimpleNamespace(pico=None, out=stubs.base.folder, weights=None, images=[None] * COUNT, steps=7)
    table = opponents_sections.measure_latency(setup, rounds=3)
    assert order == 4 * list(OFFSETS)
    assert {name: table[name][SECONDS] for name in OFFSETS} == pytest.approx({n: 4 * t for n, t in times.items()})
    row = table[ratio_name(FINE, DCDD)]
    ends = [row[f"{SECONDS}: {end}"] for end in ("lowest", "highest")]
    assert [row[SECONDS], *ends] == pytest.approx(3 * [4.0 / 10.0]), "within a round the ratio is always the same"
    assert row[PARAMETERS] == pytest.approx(40 / 70) and row[TOTAL] == pytest.approx(4 / 7)
    assert ratio_name(VQ, DCDD) not in table and ratio_name(DCDD, DCDD) not in table
    assert table[CODEC] == costs[CODEC], "it makes no images of its own"
    row = table[ratio_name(LARGE, WHOLE)]
    assert row[PARAMETERS] == pytest.approx(20 / (70 + 80)) and row[TOTAL] == pytest.approx(6 / (21 + 24))
    assert SECONDS not in row and ratio_name(TOKENS, WHOLE) not in table


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return random_pico(tmp_path_factory.mktemp("pico") / "weights")


@pytest.fixture(scope="module")
def pico(weights):
    models = load_pico(weights=weights, with_sampler=False)
    models.decoder.card = replace(models.decoder.card, shift=1.5)  # that of the discrete decoder is None
    return models


@pytest.fixture
def setup(weights, pico, tmp_path):
    """Each opponent with weights of its own, in the work folder."""
    card = pico.decoder.card
    for k, (name, (_, reads)) in enumerate(FEED_FORWARD.items()):
        calibration = card.calibration if reads == "condition" else None
        shape = {"width": 16, "blocks": 1, "channels": (16, 8, 8, 8), "images": 100 + k}
        made = FeedForwardCard(reads=reads, codebook=card.codebook, calibration=calibration, **shape)
        save_feed_forward(tmp_path / opponent_file(name), fill(FeedForwardDecoder(made), k))
    discrete = replace(card, variant="discrete", calibration=None, shift=None)
    save_bundle(tmp_path / opponent_file(DIFFUSION), fill(DistributionConditionedDecoder.build(discrete), 9))
    return SimpleNamespace(
        pico=pico, weights=weights, work=tmp_path, out=tmp_path / "out", compiled=False, images=[None] * 2, steps=2
    )


def base_of(setup):
    read = ("janus", "vae", "decoder.safetensors")
    return Painters(pico=setup.pico, folder=setup.out / "guided", weights=setup.weights, read=read)


@torch.no_grad()
def test_each_opponent_paints_from_what_it_reads(setup):
    base, part = base_of(setup), slice(0, 2)
    found = opponents_sections.opponents(setup, base)
    assert list(found) == list(NAMES.values())
    given = base.given("reconstruction", "test", part)
    tokens = condition_of_tokens(given.tokens, given.condition.grid, setup.pico.tokenizer.codebook)
    expected = {row: given.condition if "condition" in row else tokens for row in found}
    seeds, made = range(2), {}
    for row, painters in found.items():
        way = Way(name=row, paints="trained", steps=2)
        made[row] = painters.paint(way, given, seeds)
        if row == TOKENS:
            shift = setup.pico.decoder.card.shift
            options = {"seeds": seeds, "steps": 2, "shift": shift}
            images = decode(painters.network, setup.pico.codec, expected[row], **options).pixels
        else:
            images = painters.network(expected[row])
        assert torch.equal(made[row], images), row
        kept, _ = painters.images(way, "reconstruction", "test", part)
        assert (kept - images.clamp(-1, 1)).abs().max() <= 1.01 / 255
        assert painters.given("reconstruction", "test", part).tokens.equal(given.tokens)
    assert all(not torch.allclose(made[LARGE], made[row], atol=0.01) for row in made if row != LARGE)
    folders = {painters.own_folder for painters in found.values()}
    assert len(folders) == len(found) and {folder.parent for folder in folders} == {base.own_folder}
    file = setup.work / opponent_file("feed-forward-tokens")
    save_feed_forward(file, fill(opponents_sections.load_feed_forward(file), 5))
    again = opponents_sections.opponents(setup, base)[LARGE]
    assert again.own_folder not in folders, "another training's images are not taken for this one's"


@torch.no_grad()
def test_feed_forward_decoders_compute_in_bfloat16_where_the_diffusion_decoder_does(setup, monkeypatch):
    found = opponents_sections.opponents(setup, base_of(setup))[LARGE]
    given, way = found.given("reconstruction", "test", slice(0, 1)), Way(name=LARGE, paints="trained")
    exact = found.paint(way, given, range(1))
    monkeypatch.setattr(DistributionConditionedDecoder, "dtype", torch.bfloat16)
    rounded = found.paint(way, given, range(1))
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, atol=0.3, rtol=0.1)


def test_opponents_of_other_models_are_refused(setup):
    base, card = base_of(setup), setup.pico.decoder.card
    file = setup.work / opponent_file("feed-forward-condition")
    network = opponents_sections.load_feed_forward(file)
    for changed, said in (
        ({"codebook": "1024x8:+9.000"}, "another codebook"),
        ({"calibration": replace(card.calibration, scale=9.0)}, "another calibration of the condition"),
        ({"reads": "tokens", "calibration": None}, "reads the tokens"),
    ):
        network.card = replace(opponents_sections.load_feed_forward(file).card, **changed)
        kept = file.read_bytes()
        save_feed_forward(file, network)
        with pytest.raises(ValueError, match=f"{said}.*train it again"):
            opponents_sections.opponents(setup, base)
        file.write_bytes(kept)
    whole = fill(DistributionConditionedDecoder.build(card))
    save_bundle(setup.work / opponent_file(DIFFUSION), whole)
    with pytest.raises(ValueError, match=r"variant lcdm\+lc"):
        opponents_sections.opponents(setup, base)
    with pytest.raises(ValueError, match=r"holds none of feed-forward-tokens.*train_opponents"):
        opponents_sections.opponents(SimpleNamespace(**{**vars(setup), "work": setup.work / "empty"}), base)


@torch.no_grad()
def test_costs_are_those_of_trainings(setup):
    """Counted where gradients are off, as a section is measured."""
    others = opponents_sections.opponents(setup, base_of(setup))
    recipe, vq = Recipe.load(setup.weights), setup.pico.tokenizer.model
    names = (VQ, LARGE, FINE_CONDITION, DCDD, CODEC)
    costs = {name: opponents_sections.costs_of(setup, name, others) for name in names}
    assert costs[VQ][EACH] == vq_flops(vq)
    assert costs[VQ][IMAGES] == 8 * (recipe.tokenizer_steps + recipe.vq_decoder_steps)
    assert costs[VQ][PARAMETERS] == parameters(vq.decoder) + parameters(vq.post_quant_conv)
    ours = load_dcdd(setup.weights / "decoder.safetensors")
    assert costs[DCDD] == {
        PARAMETERS: parameters(ours),
        EACH: dcdd_flops(ours),
        IMAGES: 16 * (recipe.decoder_steps + recipe.post_updates),
        TOTAL: dcdd_flops(ours) * 16 * (recipe.decoder_steps + recipe.post_updates),
    }
    vae = setup.pico.codec.model
    images = recipe.autoencoder_batch * (
        recipe.autoencoder_before + recipe.autoencoder_steps + recipe.vae_decoder_before + recipe.vae_decoder_steps
    )
    assert costs[CODEC] == {
        PARAMETERS: parameters(vae.decoder),
        EACH: vae_flops(vae, recipe.size),
        IMAGES: images,
        TOTAL: vae_flops(vae, recipe.size) * images,
    }
    each = feed_forward_flops(others[FINE_CONDITION].network)
    assert (costs[FINE_CONDITION][EACH], costs[FINE_CONDITION][IMAGES], costs[FINE_CONDITION][TOTAL]) == (
        each,
        103,
        103 * each,
    )
    found = opponents_sections.costs_of(setup, TOKENS, others)
    assert set(found) == {PARAMETERS, EACH} and found[PARAMETERS] == costs[DCDD][PARAMETERS]
    log = (setup.work / opponent_file(DIFFUSION)).with_suffix("") / "log.jsonl"
    log.parent.mkdir()
    log.write_text('{"step": 500}\n{"step": 700}\n')
    assert opponents_sections.costs_of(setup, TOKENS, others)[IMAGES] == 16 * 700


@pytest.mark.parametrize("section", OWN)
def test_a_key_names_the_code_the_weights_and_the_opponents(section, tmp_path):
    options = TableOptions(out=tmp_path, work=tmp_path)
    without = options.key(section)
    assert without.count("-") == 1 and SECTIONS[section].weights[:3] == ("janus", "vae", "decoder.safetensors")
    keys = {without}
    for name in NAMES:
        file = tmp_path / opponent_file(name)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"a")
        keys.add(options.key(section))
        assert options.key(section).startswith(f"{without}-")
    assert len(keys) == 1 + len(NAMES)
    assert len(options.settings("opponents-latency")) == len(options.settings("latency")) == 7
