"""Teacher-forced logits against those that the decode loop keeps: Janus and LlamaGen, captions of any length."""

from __future__ import annotations

import pytest
import torch

from dcdd_core import registry
from dcdd_core.protocols import SamplingOptions, TeacherForced
from tests.tiny import save_janus
from tests.tiny_llamagen import save_llamagen

# Of unequal lengths, so that rows are padded and caption masks differ; one of them twice.
PROMPTS = ["a red circle on the left", "a blue square", "green", "a blue square"]
SEEDS = [3, 4, 5, 6]
OPTIONS = [
    SamplingOptions(guidance=3.0),
    SamplingOptions(guidance=5.0, temperature=0.7),
    SamplingOptions(guidance=1.0),
    SamplingOptions(guidance=0.0, temperature=2.0),
    SamplingOptions(guidance=3.0, temperature=0.0),
    SamplingOptions(guidance=3.0, top_k=5, top_p=0.8),
]


@pytest.fixture(params=[save_janus, save_llamagen], ids=["janus", "llamagen"], scope="module")
def load(request, tmp_path_factory):
    folder = request.param(tmp_path_factory.mktemp("vlm") / "model")
    return lambda **options: registry.sampler_family(folder).load_sampler(str(folder), **options)


@pytest.fixture(scope="module")
def sampler(load):
    return load()


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
def test_they_are_what_the_loop_drew_these_tokens_from(sampler, options):
    assert isinstance(sampler, TeacherForced)
    run = sampler.sample(PROMPTS, seeds=SEEDS, options=options)
    forced = sampler.teacher_forced(PROMPTS, run.tokens, options=options)
    torch.testing.assert_close(forced.logits, run.logits, rtol=1e-4, atol=1e-4)
    assert float(run.logits.std()) > 0.1 and forced.logits.dtype == torch.float32
    assert torch.equal(forced.tokens, run.tokens)
    told = ("grid", "source", "guidance", "temperature", "model", "codebook", "calibrated")
    assert [getattr(forced, name) for name in told] == [getattr(run, name) for name in told]


def test_a_batch_is_its_singles(sampler):
    tokens = torch.randint(0, sampler.codebook.size, (4, 16), generator=torch.Generator().manual_seed(0))
    batch = sampler.teacher_forced(PROMPTS, tokens, options=OPTIONS[0])
    for row, prompt in enumerate(PROMPTS):
        single = sampler.teacher_forced([prompt], tokens[row : row + 1], options=OPTIONS[0])
        torch.testing.assert_close(single.logits[0], batch.logits[row], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(batch.logits[1], batch.logits[3], atol=0.1), "the same caption over other tokens"


def test_a_position_sees_the_caption_and_the_tokens_before_it_alone(sampler):
    tokens = torch.randint(0, sampler.codebook.size, (1, 16), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % sampler.codebook.size
    before, after = (sampler.teacher_forced(PROMPTS[:1], t, options=OPTIONS[0]).logits for t in (tokens, changed))
    torch.testing.assert_close(after[:, :8], before[:, :8])
    assert float((after[:, 8:] - before[:, 8:]).abs().amax(dim=2).min()) > 1e-4
    other = sampler.teacher_forced(PROMPTS[1:2], tokens, options=OPTIONS[0]).logits
    assert float((other - before).abs().amax(dim=2).min()) > 1e-4


@pytest.mark.parametrize("options", OPTIONS[:3], ids=repr)
def test_an_image_of_a_single_token_has_the_logits_of_the_loop_too(load, options):
    """No token is before it, so that nothing but the prompts is read."""
    sampler = load()
    sampler.grid = (1, 1)
    run = sampler.sample(PROMPTS, seeds=SEEDS, options=options)
    forced = sampler.teacher_forced(PROMPTS, run.tokens, options=options)
    assert forced.logits.shape == (4, 1, 64) and forced.grid == (1, 1)
    torch.testing.assert_close(forced.logits, run.logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(forced.logits[0], forced.logits[1], atol=0.1), "other prompts, other logits"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_and_its_head_and_guidance_are_in_float32(sampler, load, dtype):
    half = load(dtype=dtype)
    tokens = torch.randint(0, sampler.codebook.size, (4, 16), generator=torch.Generator().manual_seed(2))
    whole = sampler.teacher_forced(PROMPTS, tokens, options=OPTIONS[0]).logits
    found = half.teacher_forced(PROMPTS, tokens, options=OPTIONS[0]).logits
    assert found.dtype == torch.float32 and float((found - whole).square().mean().sqrt() / whole.std()) < 0.1
    assert not torch.equal(found, found.to(dtype).float()), "rounded nowhere after the last hidden state"


def test_the_global_generator_is_left_alone(sampler):
    before = torch.random.get_rng_state()
    sampler.teacher_forced(["green"], torch.zeros(1, 16, dtype=torch.int64))
    assert torch.equal(before, torch.random.get_rng_state())


def test_what_does_not_fit_is_refused(sampler):
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    for prompts, given, words in (
        ("red", tokens, r"expected a list of them: write \[prompt\]"),
        ([], tokens, "prompts is empty"),
        (["red"], tokens, r"int64 \[1, 16\], .* got \[2, 16\]: encode images of the size that this model paints"),
        (["red", "blue"], tokens[:, :9], r"int64 \[2, 16\], .* got \[2, 9\]"),
        (["red", "blue"], tokens.float(), "got float32: encode the images with this model's tokenizer"),
        (["red", "blue"], tokens.tolist(), "got list"),
        (["red", "blue"], tokens + 64, r"must lie in 0..63, got 64..64"),
        (["red", "blue"], tokens - 1, r"must lie in 0..63, got -1..-1"),
    ):
        with pytest.raises(ValueError, match=words):
            sampler.teacher_forced(prompts, given, options=OPTIONS[0])


def test_logits_that_are_not_finite_are_named(load):
    sampler = load()
    with torch.no_grad():
        next(iter(sampler._network().head.parameters())).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"position 1 of 16 failed in torch.float32: logits hold NaN"):
        sampler.teacher_forced(["red"], torch.zeros(1, 16, dtype=torch.int64))
