"""Scores of the masked sampler by hand, on stubs whose images are known."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dcdd_core.evaluation.intervals import bootstrap
from dcdd_core.method.progressive import ORDERS, ProgressiveOptions
from dcdd_core.protocols import SamplingOptions
from dcdd_pico import guided_sections, progressive_sections
from dcdd_pico.embedded import PROGRESSIVE, calibration_name
from dcdd_pico.guided_sections import Rulers, minus
from dcdd_pico.progressive_sections import AR, DCDD, PASSES, REWRITTEN, TARGET, VQ, Arm, Samples, passes_name
from dcdd_pico.progressive_table import tables, verdicts
from dcdd_pico.scenes import scene_facts
from dcdd_pico.section_keys import Provenance
from dcdd_pico.sections import SECTIONS, Measured
from tests.stub_pico import StubReader
from tests.tiny import tiny_card

IMAGES = 20
GREYS = torch.linspace(-0.5, 0.5, IMAGES)
#: What the trained decoder adds.
PAINTED = 0.3
#: What a schedule adds.
SCHEDULED = {"arccos": 0.0, "cosine": 0.03, "linear": 0.06}
#: Of the autoregressive sampler's images.
AR_OFFSET = 0.5


class Detector(StubReader):
    """Its features are twice the stub reader's."""

    def frechet_features(self, images):
        return 2 * super().frechet_features(images)


def pixels(values):
    return values[:, None, None, None].expand(-1, 3, 16, 16)


class Sampler:
    """A token is a thousand times its image's grey plus an offset; it notes what it was asked for."""

    sampling = ProgressiveOptions(guidance=5.0)

    def __init__(self, offset):
        self.offset, self.asked = offset, []

    def sample(self, captions, *, seeds, options):
        self.asked.append((options, list(seeds)))
        assert [seed % 10**6 for seed in seeds][: len(captions)] and len(seeds) == len(captions)
        offset = self.offset(options, seeds[0] // 10**6)
        return SimpleNamespace(tokens=((GREYS[[int(c) for c in captions]] + offset) * 1000).round().long()[:, None])

    def sample_stages(self, captions, *, seeds, options):
        made = self.sample(captions, seeds=seeds, options=options)
        changed = torch.ones(len(captions), 3, dtype=torch.bool)
        nothing = torch.zeros_like(changed)
        return SimpleNamespace(
            token_logits=made, stages=[SimpleNamespace(changed=changed if options.revise else nothing)] * 2
        )


@pytest.fixture
def setup(tmp_path, monkeypatch):
    tokenizer = SimpleNamespace(
        device="cpu",
        grid=(1, 1),
        codebook=SimpleNamespace(fingerprint="the codebook"),
        decode_tokens=lambda tokens, grid: pixels(tokens[:, 0] / 1000),
    )
    decoder = SimpleNamespace(card=tiny_card(shift=1.5), dtype=torch.float32)
    made = SimpleNamespace(
        pico=SimpleNamespace(
            tokenizer=tokenizer,
            decoder=decoder,
            codec="the codec",
            sampler=Sampler(lambda options, _: AR_OFFSET),
        ),
        images=[None] * IMAGES,
        guidance=3.0,
        steps=7,
        out=tmp_path / "out",
        weights=tmp_path / "weights",
        cards=[],
    )

    def condition_for(card, grid, codebook):
        assert codebook is tokenizer.codebook
        made.cards.append(card)
        vectors = grid.tokens[..., None] / 1000
        return SimpleNamespace(code_vectors=vectors, uncertainty=torch.zeros(*grid.tokens.shape, 4))

    def decode(own, codec, condition, *, seeds, steps, shift):
        assert (own, codec, steps, shift) == (decoder, "the codec", 7, 1.5) and len(seeds) == len(
            condition.code_vectors
        )
        return SimpleNamespace(pixels=pixels(condition.code_vectors[:, 0, 0] + PAINTED))

    def scenes_of(split, part):
        assert split == "test"
        facts = scene_facts("test", IMAGES)
        return [SimpleNamespace(caption=str(k), facts=facts[k]) for k in range(part.start, part.stop)]

    monkeypatch.setattr(progressive_sections, "condition_for", condition_for)
    monkeypatch.setattr(progressive_sections, "decode", decode)
    monkeypatch.setattr(progressive_sections, "scenes_of", scenes_of)
    greys = ((GREYS + 1) * 127.5).round().byte().numpy()
    monkeypatch.setattr(
        guided_sections,
        "originals",
        lambda source, part: np.broadcast_to(greys[part, None, None, None], (part.stop - part.start, 16, 16, 3)),
    )
    monkeypatch.setattr(guided_sections, "bootstrap", partial(bootstrap, resamples=10))
    painters = SimpleNamespace(pico=made.pico, folder=tmp_path / "guided", weights=made.weights)
    rulers = Rulers(painters=painters, reader=StubReader(), detector=Detector())
    monkeypatch.setattr(Rulers, "of", classmethod(lambda cls, setup: rulers))
    made.weights.mkdir()
    (made.weights / "reader.safetensors").write_bytes(b"")
    return made


@pytest.fixture
def masked(setup, monkeypatch):
    """Its images are off by a hundredth for each pass."""
    made = Sampler(lambda options, _: options.passes / 100)
    monkeypatch.setattr(progressive_sections, "load_progressive", lambda _: made)
    return made


def test_passes_are_measured_with_both_decoders_against_the_autoregressive_sampler(setup, masked):
    table = progressive_sections.measure_passes(setup)
    for decoder, added in ((VQ, 0.0), (DCDD, PAINTED)):
        own = (AR_OFFSET + added) ** 2
        assert table[f"{AR}, {decoder}"]["frechet"] == pytest.approx(own, abs=2e-3)
        for passes in PASSES:
            name = f"{passes_name(passes)}, {decoder}"
            expected = (passes / 100 + added) ** 2
            assert table[name]["frechet"] == pytest.approx(expected, abs=5e-3), name
            assert table[name]["frechet, text detector"] == pytest.approx(4 * expected, abs=2e-2)
            difference = table[minus(name, f"{AR}, {decoder}")]
            assert difference["frechet"] == pytest.approx(expected - own, abs=5e-3)
            assert difference["frechet: lowest"] <= difference["frechet"] <= difference["frechet: highest"]
            assert difference["F1"] == 0 and difference["images"] == IMAGES
    assert {options for options, _ in setup.pico.sampler.asked} == {SamplingOptions(guidance=3.0)}
    assert [options.passes for options, _ in masked.asked] == [p for _ in range(2) for p in PASSES], "in two parts"
    assert [k for _, seeds in setup.pico.sampler.asked for k in seeds] == list(range(IMAGES)), "once for both decoders"


def test_what_was_sampled_and_scored_is_kept(setup, masked):
    first = progressive_sections.measure_passes(setup)
    asked = len(masked.asked)
    assert progressive_sections.measure_passes(setup) == first and len(masked.asked) == asked


def test_orders_are_means_over_seeds(setup, monkeypatch):
    names = list(ORDERS)

    def offset(options, seed):
        base = names.index(options.order) / 10 + 0.02 * options.spread + SCHEDULED[options.schedule]
        return base + (0.0 if options.revise else 0.04) + seed / 100

    made = Sampler(offset)
    monkeypatch.setattr(progressive_sections, "load_progressive", lambda _: made)
    monkeypatch.setattr(progressive_sections, "ORDERED", 16)
    table = progressive_sections.measure_orders(setup)
    orders = (*ORDERS, "quantisation-error, apart", "importance, apart")
    expected = {f"{order}, {kind}" for order in orders for kind in ("revision", "no revision")}
    assert set(table) == expected | {f"halton, {schedule} schedule, revision" for schedule in ("cosine", "linear")}
    for name, row in table.items():
        order, *more, kind = name.split(", ")
        added = {"apart": 0.02} | {f"{schedule} schedule": value for schedule, value in SCHEDULED.items()}
        base = names.index(order) / 10 + sum(added[k] for k in more) + (0.04 if kind == "no revision" else 0.0)
        expected = [(base + seed / 100) ** 2 for seed in range(3)]
        assert row["frechet"] == pytest.approx(sum(expected) / 3, abs=5e-3), name
        assert row["frechet: lowest"] == pytest.approx(min(expected), abs=5e-3)
        assert row["frechet: highest"] == pytest.approx(max(expected), abs=5e-3)
        assert row["images"] == 16
        assert row[REWRITTEN] == (6.0 if kind == "revision" else 0.0)
    asked = {(options.passes, options.revision_passes, options.revise) for options, _ in made.asked}
    assert asked == {(TARGET, 3, "all"), (TARGET, 0, 0)}


def test_seconds_are_medians_for_an_image(setup, masked, monkeypatch):
    """The clock goes on by 8 seconds between two looks."""
    monkeypatch.setattr(progressive_sections.time, "perf_counter", partial(next, count(0, 8)))
    table = progressive_sections.measure_seconds(setup, rounds=3)
    assert list(table) == [AR, *(passes_name(n) for n in (8, TARGET, 16))]
    for row in table.values():
        assert (row["seconds, batch 1"], row["seconds, batch 8"]) == (8.0, 1.0) and row["threads"] >= 1


def test_the_target_is_measured_on_all_captions_and_the_curve_on_fewer(setup, masked, monkeypatch):
    monkeypatch.setattr(progressive_sections, "CURVE", 16)
    target, curve = progressive_sections.measure_target(setup), progressive_sections.measure_passes(setup)
    names = [f"{name}, {decoder}" for decoder in (VQ, DCDD) for name in (AR, passes_name(TARGET))]
    gains = [progressive_sections.gain_name(sampler) for sampler in (AR, passes_name(TARGET))]
    assert {name for name in target if ", minus " not in name} == {*names, *gains}
    for name in names:
        assert (target[name]["images"], curve[name]["images"]) == (IMAGES, 16)
    assert target[names[1]]["frechet"] == pytest.approx((TARGET / 100) ** 2, abs=5e-3)
    plain, ours = AR_OFFSET**2, (TARGET / 100 + PAINTED) ** 2  # of Janus by the VQ decode, of the passes by the other
    assert target[minus(names[3], names[0])]["frechet"] == pytest.approx(ours - plain, abs=5e-3)
    for gain, offset in zip(gains, (AR_OFFSET, TARGET / 100)):
        for column in ("frechet", "frechet, text detector"):
            found = target[gain][column]
            assert found == pytest.approx(((offset + PAINTED) / offset) ** 2, rel=0.1), (gain, column)
            assert target[gain][f"{column}: lowest"] <= found <= target[gain][f"{column}: highest"]
        assert target[gain]["F1"] == 1
    assert len(target) == 4 + 2 + 1 + 2


def test_passes_share_out_revision_as_the_sampler_does(setup, masked):
    masked.sampling = ProgressiveOptions(guidance=5.0, order="random")
    for passes, revising in ((4, 1), (8, 2), (11, 3), (16, 4), (24, 7), (64, 17)):
        expected = ProgressiveOptions(guidance=5.0, passes=passes, revision_passes=revising, order="random")
        assert Samples.of(setup).in_passes(passes) == expected


def test_each_sampler_is_read_with_the_calibration_that_is_its_own(setup, masked):
    arms = [Arm(name="a", options=options) for options in (SamplingOptions(guidance=3.0), ProgressiveOptions())]

    def calibrations():
        setup.cards.clear()
        for arm in arms:
            progressive_sections.sampled_of(Samples.of(setup), arm, slice(0, 2))
        return [card.calibration for card in setup.cards]

    of_janus = setup.pico.decoder.card.calibration
    assert calibrations() == [of_janus, of_janus], "without one of its own"
    own = replace(of_janus, scale=9.0, vlm="pico progressive")
    own.save(setup.weights / calibration_name(PROGRESSIVE))
    before = Samples.of(setup).versions
    assert calibrations() == [of_janus, own]
    replace(own, scale=8.0).save(setup.weights / calibration_name(PROGRESSIVE))
    after = Samples.of(setup).versions
    assert after[False] == before[False] and after[True] != before[True], "what was sampled with another is not taken"


def test_weights_that_were_not_trained_are_asked_for(setup):
    with pytest.raises(ValueError, match="progressive does not exist: train it with `python -m dcdd_pico.train_prog"):
        progressive_sections.load_progressive(setup)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_masked_sampler_has_the_precision_of_the_decoder(setup, monkeypatch, dtype):
    setup.pico.decoder.dtype = dtype
    folder = setup.weights / "progressive"
    folder.mkdir()
    asked = []
    family = SimpleNamespace(load_sampler=lambda path, **where: asked.append((path, where)))
    monkeypatch.setattr(
        progressive_sections.registry, "sampler_family", lambda path: family if path == folder else None
    )
    progressive_sections.load_progressive(setup)
    assert asked == [(str(folder), {"device": setup.pico.tokenizer.device, "dtype": dtype})]


def test_the_target_is_read_off_the_intervals():
    row = minus(f"{passes_name(11)}, {VQ}", f"{AR}, {VQ}")

    def told(low, high):
        held = {"frechet": (low + high) / 2, "frechet: lowest": low, "frechet: highest": high}
        return next(
            line for line in verdicts({"progressive-target": {row: held}}).splitlines() if f"{row}: frechet |" in line
        )

    assert "| met |" in told(-0.3, -0.1) and "| MISSED |" in told(0.1, 0.3) and "| open |" in told(-0.1, 0.1)
    assert verdicts({}).count("not measured") == 2 * 7


def test_sections_become_tables():
    assert {"progressive-target", "progressive-passes", "progressive-orders", "progressive-seconds"} <= set(SECTIONS)
    row = {"frechet": 0.5, "frechet: lowest": 0.4, "frechet: highest": 0.6}
    other = minus("a", "b")
    provenance = {"progressive-passes": Provenance("progressive-passes", "commit", "key")}
    text = tables(Measured({"progressive-passes": {"a": row, "b": row, other: row}}, provenance))
    assert "| a | 0.5 (0.4 to 0.6) |" in text and text.index("| b |") < text.index(f"| {other} |")
    assert "Section `progressive-passes`, measured at commit `commit`, key `key`." in text


def test_scores_of_other_steps_are_not_taken(setup, masked, monkeypatch):
    kept = []
    monkeypatch.setattr(progressive_sections, "kept", lambda path, make: kept.append(path) or {})
    arm = Arm(name="a", options=SamplingOptions(guidance=3.0))
    for setup.steps in (7, 4):
        Samples.of(setup).scores(arm, "trained DCDD", slice(0, 2))
    assert kept[0] != kept[1]
