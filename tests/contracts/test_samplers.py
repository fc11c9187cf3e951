"""What every token sampler must do, whatever its family."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dcdd_core import registry
from dcdd_core.protocols import SamplerFamily, SamplingOptions, TokenSampler
from dcdd_core.types import TokenLogits
from tests.contracts.conftest import names
from tests.streamed import stream

PROMPTS, SEEDS = ["a red circle on the left", "a blue square"], [3, 4]
OPTIONS = SamplingOptions(guidance=3.0)


@pytest.fixture(params=names(registry.samplers), scope="module")
def name(request):
    return request.param


@pytest.fixture
def sampler(name, files):
    return registry.sampler_family(files(name)).load_sampler(str(files(name)))


@pytest.fixture
def run(sampler) -> TokenLogits:
    return sampler.sample(PROMPTS, seeds=SEEDS, options=OPTIONS)


def half(sampler):
    """Every other position."""
    return torch.arange(sampler.grid[0] * sampler.grid[1]) % 2 == 0


def test_it_is_a_sampler_with_everything_that_hosts_ask_for(sampler, name):
    assert isinstance(sampler, TokenSampler)
    assert isinstance(next(f for f in registry.samplers() if f.name == name), SamplerFamily)
    assert len(sampler.fingerprint) >= 8 and isinstance(sampler.model, torch.nn.Module)
    assert sampler.unknown_words("zebra") == ["zebra"] or sampler.known_words() == []


def test_what_it_gives_is_whole_and_says_how_it_was_made(sampler, run):
    count = sampler.grid[0] * sampler.grid[1]
    assert run.logits.shape == (2, count, sampler.codebook.size) and run.logits.dtype == torch.float32
    assert (run.source, run.guidance, run.temperature, run.calibrated) == ("vlm", 3.0, 1.0, False)
    assert (run.model, run.codebook, run.grid) == (sampler.name, sampler.codebook.fingerprint, sampler.grid)


def test_a_batch_is_its_singles(sampler, run):
    for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS)):
        single = sampler.sample([prompt], seeds=[seed], options=OPTIONS)
        assert torch.equal(single.tokens[0], run.tokens[row])
        torch.testing.assert_close(single.logits[0], run.logits[row], rtol=1e-4, atol=1e-4)


def test_the_seed_decides_and_nothing_else(sampler, run):
    before = torch.random.get_rng_state()
    torch.manual_seed(99)
    again = sampler.sample(PROMPTS, seeds=SEEDS, options=OPTIONS)
    torch.random.set_rng_state(before)
    assert torch.equal(again.tokens, run.tokens) and torch.equal(again.logits, run.logits)
    other = sampler.sample(PROMPTS, seeds=[30, 40], options=OPTIONS)
    assert not torch.equal(other.tokens, run.tokens)
    assert torch.equal(before, torch.random.get_rng_state())


def test_prompt_guidance_and_temperature_matter(sampler, run):
    swapped = sampler.sample(PROMPTS[::-1], seeds=SEEDS, options=OPTIONS)
    assert not torch.equal(swapped.logits, run.logits)
    for changed in (replace(OPTIONS, guidance=1.0), replace(OPTIONS, temperature=2.0)):
        assert not torch.equal(sampler.sample(PROMPTS, seeds=SEEDS, options=changed).logits, run.logits)


def test_temperature_zero_takes_the_most_likely_code(sampler):
    greedy = sampler.sample(PROMPTS, seeds=SEEDS, options=replace(OPTIONS, temperature=0.0))
    assert torch.equal(greedy.tokens, greedy.logits.argmax(-1))
    other = sampler.sample(PROMPTS, seeds=[30, 40], options=replace(OPTIONS, temperature=0.0))
    assert torch.equal(greedy.tokens, other.tokens)


def test_filters_shape_the_draw_and_not_the_logits(sampler):
    filtered = sampler.sample(PROMPTS, seeds=SEEDS, options=replace(OPTIONS, top_k=1))
    assert torch.equal(filtered.tokens, filtered.logits.argmax(-1))
    assert bool(filtered.logits.isfinite().all())
    nucleus = sampler.sample(PROMPTS, seeds=SEEDS, options=replace(OPTIONS, top_p=1e-6))
    assert torch.equal(nucleus.tokens, nucleus.logits.argmax(-1))


def test_progress_ends_at_the_result(sampler, run):
    seen = []
    sampler.sample(
        PROMPTS,
        seeds=SEEDS,
        options=OPTIONS,
        on_progress=lambda p: seen.append((p.done, p.total, p.tokens.clone(), p.known.clone())),
    )
    counts = [done for done, *_ in seen]
    assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] == seen[-1][1]
    for (_, _, _, before), (_, _, _, after) in pairwise(seen):
        assert bool((after | ~before).all()), "what is known stays known"
    assert bool(seen[-1][3].all()) and torch.equal(seen[-1][2], run.tokens)
    assert not bool(seen[0][3].all())


def test_progress_may_stop_it(sampler, run):
    def stop(progress):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        sampler.sample(PROMPTS, seeds=SEEDS, options=OPTIONS, on_progress=stop)
    assert torch.equal(sampler.sample(PROMPTS, seeds=SEEDS, options=OPTIONS).tokens, run.tokens)


def test_a_host_may_keep_linear_layers_elsewhere(sampler, run):
    stream(sampler.model)
    streamed = sampler.sample(PROMPTS, seeds=SEEDS, options=OPTIONS)
    assert torch.equal(streamed.tokens, run.tokens)
    torch.testing.assert_close(streamed.logits, run.logits, rtol=1e-4, atol=1e-4)


def test_an_edit_keeps_the_rest_to_the_last_bit(sampler, run):
    again = half(sampler)
    kept = (run.tokens.clone(), run.logits.clone())
    edited = sampler.sample(PROMPTS, seeds=[8, 9], options=OPTIONS, previous=run, resample=again)
    assert torch.equal(edited.tokens[:, ~again], run.tokens[:, ~again])
    assert torch.equal(edited.logits[:, ~again], run.logits[:, ~again])
    assert not torch.equal(edited.tokens, run.tokens)
    assert torch.equal(run.tokens, kept[0]) and torch.equal(run.logits, kept[1]), "nothing is written into the input"
    each = again.expand(2, -1).clone()
    each[0] = False
    one = sampler.sample(PROMPTS, seeds=[8, 9], options=OPTIONS, previous=run, resample=each)
    assert torch.equal(one.tokens[0], run.tokens[0])
    nothing = sampler.sample(PROMPTS, seeds=[8, 9], options=OPTIONS, previous=run, resample=torch.zeros_like(again))
    assert nothing is run


def test_an_edit_of_an_image_says_what_it_kept(sampler, run):
    """The image's calibrated proxies must not be calibrated once more with the new logits."""
    again = half(sampler)
    proxies = replace(run, source="proxy", guidance=None, temperature=None, calibrated=True)
    edited = sampler.sample(PROMPTS, seeds=[8, 9], options=OPTIONS, previous=proxies, resample=again)
    assert edited.source == "vlm" and not edited.calibrated
    assert torch.equal(edited.calibrated_at.cpu(), ~again.expand(2, -1))
    once_more = sampler.sample(PROMPTS, seeds=[3, 4], options=OPTIONS, previous=edited, resample=~again)
    assert once_more.calibrated_at is None
    assert sampler.sample(PROMPTS, seeds=[8, 9], options=OPTIONS, previous=run, resample=again).calibrated_at is None


def test_edits_that_make_no_sense_are_refused(sampler, run):
    again = half(sampler)
    foreign = replace(run, codebook="x" + (run.codebook or ""))
    proxies = replace(run, source="proxy", guidance=None, temperature=None)
    for previous, resample, words in (
        (run, None, "needs both"),
        (None, again, "needs both"),
        (foreign, again, "another codebook"),
        (proxies, again, "calibrate them first"),
        (replace(run, calibrated=True), again, "calibrated already"),
        (run.part(0, 1), again, "2 prompts cannot edit 1 samples"),
        (run, again[:-1], "resample must be a bool tensor"),
        (run, again.long(), "resample must be a bool tensor"),
    ):
        with pytest.raises(ValueError, match=words):
            sampler.sample(PROMPTS, seeds=SEEDS, options=OPTIONS, previous=previous, resample=resample)


def test_prompts_and_seeds_must_fit(sampler):
    for prompts, seeds, words in (
        ([], [], "empty"),
        ("red", [1], "list"),
        (["red", "blue"], [1], "2 prompts .* 1 seeds"),
    ):
        with pytest.raises(ValueError, match=words):
            sampler.sample(prompts, seeds=seeds)


def test_half_precision_gives_float32_logits(name, files):
    sampler = registry.sampler_family(files(name)).load_sampler(str(files(name)), dtype=torch.bfloat16)
    run = sampler.sample(["a red circle"], seeds=[1])
    assert run.logits.dtype == torch.float32 and bool(run.logits.isfinite().all())


def test_samples_survive_a_file(run, tmp_path):
    run.save(tmp_path / "run.safetensors")
    loaded = TokenLogits.load(tmp_path / "run.safetensors")
    assert torch.equal(loaded.tokens, run.tokens) and torch.equal(loaded.logits, run.logits)
    assert (loaded.model, loaded.codebook, loaded.guidance) == (run.model, run.codebook, run.guidance)


def test_only_its_own_files_are_read(name, files, tmp_path):
    family = next(f for f in registry.samplers() if f.name == name)
    for other in names(registry.samplers):
        assert family.reads(str(files(other))) == (other == name)
    with pytest.raises(
        ValueError,
        match=f"{tmp_path} has no config.json \\(it holds nothing\\); expected a VLM: .*{family.expected[:20]}",
    ):
        registry.sampler_family(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        registry.sampler_family(tmp_path / "none")
    for configuration in ("config.json", "model_index.json"):
        if (files(name) / configuration).exists():
            (tmp_path / configuration).write_text((files(name) / configuration).read_text())
    with pytest.raises(ValueError):
        registry.sampler_family(tmp_path).load_sampler(str(tmp_path))


@pytest.mark.parametrize(
    ("configurations", "words"),
    [
        ({"model_index.json": '{"_class_name": "StableDiffusionPipeline"}'}, "holds a 'StableDiffusionPipeline'"),
        ({"config.json": '{"model_type": "llama"}', "model_index.json": "{}"}, "holds a 'llama'"),
        ({"config.json": "{}"}, "holds no known model"),
        ({"model_index.json": "{}"}, "holds no known model"),
        ({"model_index.json": "[]"}, "model_index.json holds a list, expected"),
        ({"weights.bin": ""}, r"has no config.json \(it holds weights.bin\)"),
    ],
)
def test_a_foreign_folder_is_told_by_what_it_says_it_is(tmp_path, configurations, words):
    for name, text in configurations.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words) as refused:
        registry.sampler_family(tmp_path)
    if "list" not in words:
        assert "expected a VLM: " in str(refused.value) and "as `train.py progressive` writes it" in str(refused.value)
