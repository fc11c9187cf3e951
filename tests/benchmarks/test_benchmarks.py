"""The benchmarks run, compare equal things, and say what they did not measure; their numbers are not tested."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import __main__, decoder, growth, int8, lcdm, memory, sampler, timing
from dcdd_core.method.lcdm import map_logits
from dcdd_core.models.janus import JanusSampler
from dcdd_core.types import Codebook, TokenLogits
from tests.tiny import tiny_janus


def test_lcdm_as_written_is_ours():
    draw = torch.Generator().manual_seed(0)
    codebook, logits = Codebook(torch.randn(300, 8, generator=draw)), 3 * torch.randn(2, 4, 300, generator=draw)
    c, u = lcdm.plain(logits, codebook.vectors)
    ours = map_logits(TokenLogits(logits, logits.argmax(-1), (2, 2)), codebook)
    torch.testing.assert_close(ours.code_vectors, c)
    torch.testing.assert_close(ours.uncertainty, u, rtol=1e-4, atol=1e-5)


def test_peak_counts_what_is_held_at_once():
    def held() -> None:
        for _ in range(3):
            torch.zeros(1000)
        kept = torch.zeros(1000), torch.zeros(500)
        del kept

    assert 6000 <= lcdm.peak(held, False) < 7000


def test_sampler_contest_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampler, "PROMPT", "a red circle")
    ours = JanusSampler(*tiny_janus())
    ours.model.model.vision_model.config.num_image_tokens = 16
    found = sampler.contest("tiny", ours.model, ours, 2, 1)
    assert [len(row) for row in found] == [len(sampler.HEAD)] * 3
    ids = torch.tensor([sampler.prompt_ids(ours.tokenizer, "a red circle")])
    assert sampler.generate(ours.model, ids, 1)().shape == (1, 16)
    assert sampler.deepseek(ours.model, ids, 1, 16)().shape == (1, 16)


def test_reread_logits_are_the_models_own():
    ours = JanusSampler(*tiny_janus())
    run = ours.sample(["red"], seeds=[0])
    torch.testing.assert_close(int8.reread(ours, run, ["red"]).logits, run.logits, rtol=0, atol=1e-4)
    model, words = tiny_janus()
    model.model.generation_head.vision_head.weight.data.neg_()
    other = int8.reread(JanusSampler(model, words), run, ["red"])
    assert torch.equal(other.tokens, run.tokens) and not torch.allclose(other.logits, run.logits, atol=0.1)


def test_decoder_contest_runs():
    found = decoder.contest(heads=1, steps=1, rounds=1)
    assert [row[1] for row in found] == ["ours", "diffusers"]
    assert [len(row) for row in found] == [len(decoder.HEAD)] * 2
    assert found[0][3] == "1.00" and float(found[0][-1]) < float(found[1][-1])  # ours holds no text stream


def test_memory_s_rows_are_a_table_of_its_own(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "JANUS_PRO", {"Janus-Pro-1B": memory.JANUS_PRO["Janus-Pro-1B"]})
    monkeypatch.setattr("sys.argv", ["memory.py"])
    memory.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == ["| model | weights | GB |", "|---|---|---|", "| Janus-Pro-1B, sampling | bfloat16 | 3.0 |"]
    assert "| FLUX.1-Fill transformer, to paint | bfloat16 | 12.9 |" in printed
    assert any("not measured" in line for line in printed)


def test_growth_is_drawn(tmp_path: Path):
    growth.draw([("a", "b", {1: 1.0, 2: 3.0}), ("c", "d", {1: 1.0})], tmp_path / "new" / "growth.png")
    assert (tmp_path / "new" / "growth.png").stat().st_size > 1000


def test_table_and_rounds(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    calls = []
    seconds = timing.alternating({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3 and [len(taken) for taken in seconds.values()] == [2, 2]
    monkeypatch.setattr(lcdm, "rows", lambda: [("x", "1", "2", "3")])
    monkeypatch.setattr("sys.argv", ["benchmarks", "lcdm", "timing"])
    __main__.main()
    printed = capsys.readouterr().out
    assert "### LCDM" in printed and "| x | 1 | 2 | 3 |" in printed and printed.count("###") == 1
