"""Calibration as the first step of a training: stored samples, the fit, and the verdict."""

import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dcdd_core.evaluation.prompts import read_prompts
from dcdd_core.method.anchoring import condition_spread, fit_anchor_and_temperature
from dcdd_core.method.calibration import fit_calibration, target_statistics
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.pipelines.calibrate import PROMPTS, KeptSamples, Proxies, compared, fit_to_samples, verdict
from dcdd_core.pipelines.distributed import Processes
from dcdd_core.types import Calibration, CalibrationStatistics, TokenLogits
from tests.tiny import tiny_vq

ROOT = Path(__file__).resolve().parents[2]
PROMPTED = [f"prompt {i}" for i in range(7)]
ALONE = {"batch": 3, "bytes_each": 4 * 16 * 64}


class Sampler:
    """Logits that depend on the seed alone; records its calls, and can be interrupted."""

    def __init__(self, codebook, stop_after=99):
        self.codebook, self.stop_after, self.asked = codebook, stop_after, []

    def __call__(self, prompts, seeds):
        if len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked += prompts
        logits = torch.stack([torch.randn(16, 64, generator=torch.Generator().manual_seed(s)) for s in seeds]) * 3
        return TokenLogits(logits, logits.argmax(-1), (4, 4), guidance=5.0, codebook=self.codebook.fingerprint)


@pytest.fixture(scope="module")
def vq():
    return VQTokenizer(tiny_vq(), name="tiny")


@pytest.fixture(scope="module")
def proxies(vq):
    draw = torch.Generator().manual_seed(1)
    return Proxies(vq, (torch.rand(1, 3, 16, 16, generator=draw) * 2 - 1 for _ in range(6)))


def test_a_stopped_sampling_goes_on_where_it_was(tmp_path, vq):
    whole = KeptSamples(tmp_path / "whole", PROMPTED)
    whole.fill(Sampler(vq.codebook), Processes(), **ALONE)
    stopped, samples = Sampler(vq.codebook, stop_after=3), KeptSamples(tmp_path / "parts", PROMPTED)
    with pytest.raises(KeyboardInterrupt):
        samples.fill(stopped, Processes(), **ALONE)
    assert samples.missing == 4
    again = Sampler(vq.codebook)
    samples.fill(again, Processes(), **ALONE)
    assert again.asked == PROMPTED[3:] and samples.missing == 0
    for one, other in zip(samples, whole, strict=True):
        assert torch.equal(one.logits, other.logits) and torch.equal(one.tokens, other.tokens)


def test_samples_depend_on_their_prompt_and_number_alone(tmp_path, vq):
    KeptSamples(tmp_path, PROMPTED[:4]).fill(Sampler(vq.codebook), Processes(), **ALONE)
    more = [*PROMPTED[:2], "rewritten", *PROMPTED[3:], PROMPTED[0]]
    sampler, samples = Sampler(vq.codebook), KeptSamples(tmp_path, more)
    samples.fill(sampler, Processes(), batch=1, bytes_each=1)
    assert sampler.asked == ["rewritten", *PROMPTED[4:], PROMPTED[0]]  # a prompt at another position is sampled again
    first, *_, last = samples
    assert not torch.equal(first.logits, last.logits)


def test_a_file_that_is_there_is_left_as_it_is(tmp_path, vq):
    samples = KeptSamples(tmp_path, PROMPTED[:3])
    samples.fill(Sampler(vq.codebook), Processes(), **ALONE)
    first, *others = sorted(tmp_path.iterdir())
    first.unlink()
    written = [path.stat().st_mtime_ns for path in others]
    samples.fill(Sampler(vq.codebook), Processes(), **ALONE)  # the three share a batch
    assert first.exists() and [path.stat().st_mtime_ns for path in others] == written


def test_the_seed_of_a_sample_is_its_number_s(tmp_path, vq):
    KeptSamples(tmp_path / "5", PROMPTED[:2], seed=5).fill(Sampler(vq.codebook), Processes(), **ALONE)
    expected = Sampler(vq.codebook)(PROMPTED[:2], [5, 6])
    assert torch.equal(torch.cat([grid.logits for grid in KeptSamples(tmp_path / "5", PROMPTED[:2])]), expected.logits)


def test_processes_share_the_sampling(tmp_path, vq):
    asked = []
    for index in range(2):
        sampler = Sampler(vq.codebook)
        # both see an empty folder, as when they start together
        KeptSamples(tmp_path / f"{index}", PROMPTED).fill(sampler, Processes(index=index, count=2), **ALONE)
        asked.append(sampler.asked)
    assert asked == [[*PROMPTED[:3], PROMPTED[6]], PROMPTED[3:6]]


def test_a_full_disk_is_told_before_anything_is_sampled(tmp_path, vq):
    sampler = Sampler(vq.codebook)
    with pytest.raises(ValueError, match=r"7 samples need 7000000000\.0 GB, .* --samples"):
        KeptSamples(tmp_path, PROMPTED).fill(sampler, Processes(), batch=3, bytes_each=10**18)
    assert not sampler.asked


def test_the_logits_are_read_one_file_at_a_time(tmp_path, vq, monkeypatch):
    samples = KeptSamples(tmp_path, PROMPTED)
    samples.fill(Sampler(vq.codebook), Processes(), **ALONE)
    read, load = [], TokenLogits.load
    monkeypatch.setattr(TokenLogits, "load", staticmethod(lambda path: read.append(path) or load(path)))
    grids = iter(samples)
    assert next(grids).logits.shape == (1, 16, 64) and len(read) == 1


def test_proxies_are_what_the_tokenizer_encodes(vq):
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    (ours,), theirs = Proxies(vq, [pixels]), vq.encode(pixels)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.tokens, theirs.tokens)
    assert (ours.grid, ours.source, ours.model, ours.codebook) == (
        theirs.grid,
        theirs.source,
        theirs.model,
        theirs.codebook,
    )
    with pytest.raises(ValueError, match="no images"):
        Proxies(vq, [])


def test_the_streams_give_the_calibration_of_all_at_once(tmp_path, vq, proxies):
    samples = KeptSamples(tmp_path, PROMPTED)
    samples.fill(Sampler(vq.codebook), Processes(), **ALONE)
    ours = fit_to_samples(samples, proxies, vlm="v", guidance=5.0, temperature=1.0)
    at_once = Sampler(vq.codebook)(PROMPTED, range(7))
    assert ours == fit_calibration(
        torch.cat(proxies.features),
        vq.codebook,
        target_statistics(at_once),
        vlm="v",
        guidance=5.0,
        temperature=1.0,
    )
    assert ours.converged and ours.anchor == 0 and ours.codebook == vq.codebook.fingerprint
    anchored = fit_to_samples(samples, proxies, vlm="", guidance=5.0, temperature=1.0, with_anchor=True)
    assert replace(anchored, anchor=0.0, vlm="v") == ours and anchored.anchor > 0
    told = []
    both = fit_to_samples(
        samples, proxies, vlm="v", guidance=5.0, temperature=1.0, with_temperature=True,
        on_pass=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == sorted(told) and told[-1] == (80, 80) and {total for _, total in told} == {80}
    assert {70, 71, 72} < {done for done, _ in told} and all(done < 80 for done, _ in told[:-1])
    wanted = condition_spread(proxies, vq.codebook, ours)
    assert both == fit_anchor_and_temperature(at_once, vq.codebook, wanted, ours)
    assert both.unanchored == ours and f"at temperature {both.anchor_temperature:.3f}" in verdict(both)


def test_the_columns_show_what_calibration_does(tmp_path, vq, proxies):
    samples = KeptSamples(tmp_path, PROMPTED)
    samples.fill(Sampler(vq.codebook), Processes(), **ALONE)
    calibration = fit_to_samples(samples, proxies, vlm="", guidance=5.0, temperature=1.0)
    columns = compared("v", samples, proxies, calibration)
    vlm, raw, calibrated = columns.values()
    assert list(columns) == ["v", "raw proxies", "calibrated proxies"]
    assert abs(calibrated.entropy - vlm.entropy) <= 0.02 < abs(raw.entropy - vlm.entropy)
    assert (vlm.tokens, raw.tokens) == (7 * 16, 6 * 16)
    assert list(compared("v", samples, proxies, None)) == ["v", "raw proxies"]


def test_the_verdict_says_whether_to_go_on():
    numbers = {"entropy_95": 0.5, "mean_confidence": 0.3, "confidence_95": 0.6}
    target, achieved = (CalibrationStatistics(mean_entropy=h, **numbers) for h in (0.42, 0.43))
    good = verdict(Calibration(scale=25.0, target=target, achieved=achieved, converged=True))
    assert re.search(r"mean entropy +0\.4200 +0\.4300 +\+0\.0100", good) and "\nconverged" in good
    assert "--guidance" not in good
    bad = verdict(Calibration(scale=25.0, target=target, achieved=achieved))
    assert "NOT converged" in bad and all(option in bad for option in ("--guidance", "--images", "--count"))


def test_the_shipped_prompts_are_many_different_and_mixed():
    prompts = [prompt.text for prompt in read_prompts(PROMPTS)]
    assert len(prompts) == len({prompt.casefold() for prompt in prompts}) == 300
    assert all(4 <= len(prompt.split()) <= 40 and prompt.isprintable() for prompt in prompts)
    # Any first part is varied: no noun occurs more than a few times in the first hundred, which are the default.
    words = [word.strip(",.").casefold() for prompt in prompts[:100] for word in set(prompt.split(",")[0].split())]
    often = {word: words.count(word) for word in set(words) if len(word) > 4 and words.count(word) > 8}
    assert not often, often


def test_a_wheel_carries_the_prompts(tmp_path):
    """Built from a copy, since setuptools writes folders beside the source."""
    source, kept = tmp_path / "source", shutil.ignore_patterns("weights", "__pycache__")
    shutil.copytree(ROOT / "dcdd_core", source / "dcdd_core", ignore=kept)
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as held:
        assert held.read(f"dcdd_core/pipelines/{PROMPTS.name}") == PROMPTS.read_bytes()


@pytest.mark.parametrize("at", [3, 71])
def test_a_fit_is_stopped_from_its_progress(tmp_path, vq, proxies, at):
    samples = KeptSamples(tmp_path, PROMPTED)
    samples.fill(Sampler(vq.codebook), Processes(), **ALONE)

    def stop(done, total):
        if done >= at:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit_to_samples(samples, proxies, vlm="", guidance=5.0, temperature=1.0, with_temperature=True, on_pass=stop)
