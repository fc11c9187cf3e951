"""What all sections share, and the two that compare no images (see `stub_pico`)."""

import argparse
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dcdd_core.method.statistics import TokenStatistics
from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import Calibration
from dcdd_pico import paper_sections, sections
from dcdd_pico.build_context import WORK
from dcdd_pico.results_table import REPORT
from dcdd_pico.scenes import scene_facts
from dcdd_pico.sections import (
    VQ,
    TableOptions,
    measure,
    parse,
)
from tests.stub_pico import stub_setup
from tests.tiny import tiny_card


@pytest.fixture
def setup(monkeypatch):
    return stub_setup(monkeypatch)


def test_table_1_names_the_logits_that_it_describes(setup, monkeypatch):
    def describe_logits(grids, codebook, calibration=None):
        grids = list(grids)
        assert codebook == "the codebook" and sum(len(grid.tokens) for grid in grids) == 5
        (source,) = {grid.source for grid in grids}
        entropy = {"vlm": 0.1, "proxy": 0.9}[source] if calibration is None else 0.2
        assert calibration in (None, setup.pico.decoder.card.calibration)
        return TokenStatistics(
            top_1=0.5, top_2=0.2, entropy=entropy, tail_entropy=0.3, otsu_threshold=0.1, rank=2, head_mass=0.7,
            curve=(0.5, 0.2), tokens=5,
        )  # fmt: skip

    monkeypatch.setattr(sections, "describe_logits", describe_logits)
    rows = sections.measure_calibration(setup, count=5)
    assert {name: row["entropy"] for name, row in rows.items()} == {
        "Janus": 0.1,
        "raw proxies": 0.9,
        "calibrated proxies": 0.2,
    }
    row = rows["Janus"]
    assert [row[name] for name in ("top_1", "top_2", "tail_entropy", "rank", "curve: 1")] == [0.5, 0.2, 0.3, 2, 0.2]


def test_table_5_gives_each_stage_its_own_time(setup, monkeypatch):
    clock = SimpleNamespace(now=0.0, calls=0, image=0, waits=[])

    captions = [facts.caption() for facts in scene_facts("test", 4)]
    sampling = SamplingOptions(guidance=3.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: clock.waits.append(clock.calls))

    def takes(seconds, made, expected):
        def work(*given, **options):
            assert (given, options) == expected(clock.image)
            # The first image, which does not count, is the slowest; each one after it takes longer than the one before.
            clock.now += 100 if clock.image == 0 else seconds * clock.image
            clock.calls += 1
            clock.image = clock.calls // 4
            return made

        return work

    monkeypatch.setattr(sections.time, "perf_counter", lambda: clock.now)
    grid, decoder = SimpleNamespace(tokens="tokens", grid="grid"), setup.pico.decoder
    setup.pico.sampler = SimpleNamespace(
        sample=takes(5.0, grid, lambda k: (([captions[k]],), {"seeds": [k], "options": sampling}))
    )
    setup.pico.tokenizer = SimpleNamespace(
        decode_tokens=takes(2.0, None, lambda _: (("tokens", "grid"), {})), codebook="the codebook"
    )
    mapped = takes(1.0, "the condition", lambda _: ((decoder.card, grid, "the codebook"), {}))
    monkeypatch.setattr(sections, "condition_for", mapped)
    painted = takes(
        3.0,
        SimpleNamespace(pixels=None),
        lambda k: (
            (decoder, "the codec", "the condition"),
            {"seeds": range(k, k + 1), "steps": 10, "shift": decoder.card.shift},
        ),
    )
    monkeypatch.setattr(sections, "decode", painted)
    rows = sections.measure_latency(setup, rounds=3)
    assert clock.image == 4 and clock.waits == list(range(1, 17))  # a GPU has finished before the clock is read
    assert {stage: row["seconds"] for stage, row in rows.items()} == {
        "Janus": 10.0,
        VQ: 4.0,
        "LCDM": 2.0,
        "DCDD, 10 steps": 6.0,
    }


def test_the_tables_sizes_are_those_that_their_titles_name():
    """The report says the first 512 scenes, the first 100 captions, the median of seven."""
    default = {
        measure: {name: one.default for name, one in inspect.signature(measure).parameters.items() if name != "setup"}
        for measure in (sections.measure_calibration, sections.measure_latency)
    }
    assert list(default.values()) == [{"count": 100}, {"rounds": 7}] and paper_sections.STEPPED == 512
    options = TableOptions(out=Path())
    assert (options.scenes, options.steps, options.batch) == (2048, 10, 64)
    assert not options.bf16 and not options.compiled and options.ablation == {}


@pytest.mark.parametrize("bf16, dtype", [(False, torch.float32), (True, torch.bfloat16)])
def test_models_are_loaded_as_the_options_say(tmp_path, monkeypatch, bf16, dtype):
    """The decoder is cast, and what the options say of everything else arrives."""
    asked = {}
    decoder = SimpleNamespace(
        card=tiny_card(calibration=Calibration(scale=25.0, guidance=4.0)), to=lambda to: asked.update(to=to)
    )
    monkeypatch.setattr(
        sections, "load_pico", lambda **options: asked.update(pico=options) or SimpleNamespace(decoder=decoder)
    )
    monkeypatch.setattr(sections, "load_reader", lambda **options: asked.update(reader=options) or "the reader")
    monkeypatch.setattr(sections, "scene_images", lambda *what: ("the images", what))
    options = TableOptions(
        out=tmp_path, weights=Path("w"), work=Path("k"), scenes=7, steps=3, batch=2, bf16=bf16, compiled=True,
        device="meta", ablation={"a": Path("b")}, commit="abc1234",
    )  # fmt: skip
    found = options.setup()
    assert asked == {
        "pico": {"device": "meta", "weights": Path("w"), "compiled": True},
        "reader": {"device": "meta", "weights": Path("w")},
        "to": dtype,
    }
    assert (found.reader, found.images) == ("the reader", ("the images", (tmp_path, "test", 7)))
    assert (found.batch, found.steps, found.guidance, found.compiled) == (2, 3, 4.0, True)
    assert found.ablation == {"a": Path("b")} and (found.out, found.weights, found.work) == (
        tmp_path,
        Path("w"),
        Path("k"),
    )


@pytest.mark.parametrize("cuda, device", [(False, "cpu"), (True, "cuda")])
def test_options_have_the_published_values_unless_given(tmp_path, monkeypatch, cuda, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(sys, "argv", ["table", "--work", str(tmp_path)])
    _, found = parse(argparse.ArgumentParser())
    assert found == TableOptions(out=Path("out/table"), device=device, work=tmp_path)
    assert TableOptions(out=tmp_path).work == WORK


def test_every_option_is_described_and_has_its_type(monkeypatch, tmp_path):
    words = [
        "--batch",
        "3",
        "--steps",
        "4",
        "--scenes",
        "5",
        "--bf16",
        "--compile",
        "--commit",
        "abc",
        "--device",
        "meta",
    ]
    monkeypatch.setattr(sys, "argv", ["table", *words, "--weights", "w", "--out", "o", "--work", str(tmp_path)])
    parser = argparse.ArgumentParser()
    _, found = parse(parser)
    assert found == TableOptions(
        out=Path("o"), weights=Path("w"), work=tmp_path, scenes=5, steps=4, batch=3, bf16=True, compiled=True,
        device="meta", commit="abc",
    )  # fmt: skip
    assert all(action.help for action in parser._actions)
    assert parser.get_default("work") == WORK


def test_batches_are_counted_under_the_name_of_what_is_measured(setup, monkeypatch):
    bars = []

    def tqdm(parts, **options):
        bars.append((list(parts), options))
        return parts

    monkeypatch.setattr(sections, "tqdm", tqdm)
    assert list(setup.parts("steps")) == [slice(0, 4), slice(4, 6)]
    assert list(setup.parts("steps", 5)) == [slice(0, 4), slice(4, 5)]
    assert bars == [([0, 4], {"desc": "steps", "unit": "batch", "disable": None})] * 2


def test_a_key_is_of_the_measurement_of_loading_and_of_the_weights_that_are_read(tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(sections, "code_hash", lambda *functions: hashed.append(functions) or "code")
    monkeypatch.setattr(sections, "files_hash", lambda files: hashed.append(list(files)) or "files")
    assert TableOptions(out=Path(), weights=tmp_path).key("latency") == "code-files"
    read = [tmp_path / name for name in ("janus", "vae", "decoder.safetensors")]
    assert hashed == [read, (sections.measure_latency, sections.load_setup)] or hashed == [
        (sections.measure_latency, sections.load_setup),
        read,
    ]


def test_measurements_are_kept_with_a_line_for_each_value(tmp_path, monkeypatch):
    monkeypatch.setattr(TableOptions, "setup", lambda self: self)
    monkeypatch.setattr(TableOptions, "key", lambda self, name: "a key")
    monkeypatch.setitem(sections.SECTIONS, "steps", sections.Section(lambda setup: {"row": {"psnr": 1.5}}, ()))
    measure(TableOptions(out=tmp_path, scenes=7), ["steps"])
    lines = (tmp_path / "steps.json").read_text().splitlines()
    assert lines[0] == "{" and lines[1] == ' "key": "a key",' and lines[-1] == "}"


def test_only_the_ablation_s_key_follows_its_bundles(tmp_path):
    (tmp_path / "lcdm-0.safetensors").write_bytes(b"one")
    ablation = {"lcdm, seed 0": tmp_path / "lcdm-0.safetensors"}
    without, with_it = TableOptions(out=Path()), TableOptions(out=Path(), ablation=ablation)
    changed = {name for name in REPORT if without.key(name) != with_it.key(name)}
    assert changed == {"ablation"}
    before = with_it.key("ablation")
    (tmp_path / "lcdm-0.safetensors").write_bytes(b"two")
    assert with_it.key("ablation") != before
