"""Many positions a pass: the tokens and logits of drawing one by one, in fewer passes. N = 16 positions."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcdd_core.models.autoregressive.token_loop import window_for
from dcdd_core.models.janus.sampler import JanusSampler
from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import TokenLogits
from tests.tiny import tiny_janus

N = 16
PROMPTS = ["a red circle", "a blue square and a green circle on the left", "red"]


@pytest.fixture(scope="module")
def sampler() -> JanusSampler:
    return JanusSampler(*tiny_janus())


def passes_of(sampler: JanusSampler, prompts: Sequence[str], window: int | None, **given) -> tuple[TokenLogits, list]:
    seen = []
    return sampler.sample(prompts, parallel=window, on_progress=seen.append, **given), seen


options = st.builds(
    SamplingOptions,
    guidance=st.sampled_from([0.0, 1.0, 2.5, 6.0]),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([None, 1, 3, 20]),
    top_p=st.sampled_from([None, 0.3, 0.9]),
)


@settings(max_examples=40, deadline=None)
@given(
    options=options,
    window=st.integers(2, 20),
    count=st.integers(1, 3),
    seed=st.integers(0, 50),
    edit=st.none() | st.lists(st.lists(st.booleans(), min_size=N, max_size=N), min_size=3, max_size=3),
)
def test_tokens_are_those_of_one_by_one(sampler, options, window, count, seed, edit):
    given = {"seeds": range(seed, seed + count), "options": options}
    if edit is not None:
        previous = sampler.sample(PROMPTS[:count], seeds=range(90, 90 + count), parallel=1)
        given |= {"previous": previous, "resample": torch.tensor(edit[:count])}
    expected, alone = passes_of(sampler, PROMPTS[:count], 1, **given)
    found, together = passes_of(sampler, PROMPTS[:count], window, **given)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert len(together) <= len(alone)
    if edit is not None:
        kept = ~given["resample"]
        assert torch.equal(found.logits[kept], previous.logits[kept])


@pytest.mark.parametrize("window", [2, 4, 16])
def test_progress_tells_what_stands(sampler, window):
    given = {"seeds": [0, 1, 2], "options": SamplingOptions(guidance=1.0, top_k=2)}
    expected = sampler.sample(PROMPTS, parallel=1, **given)
    seen = []
    sampler.sample(
        PROMPTS,
        **given,
        parallel=window,
        on_progress=lambda now: seen.append((now.done, now.passes, now.tokens.clone(), now.known.clone())),
    )
    assert [passes for _, passes, _, _ in seen] == list(range(1, len(seen) + 1)) and len(seen) < N
    for done, _, tokens, known in seen:
        assert int(known.sum(1).min()) == done and torch.equal(tokens[known], expected.tokens[known])
        assert not bool((known[:, 1:] & ~known[:, :-1]).any())
    assert seen[-1][0] == N and bool(seen[-1][3].all())
    # Rows do not wait for each other.
    assert any(len(set(known.sum(1).tolist())) > 1 for *_, known in seen)


def test_what_an_edit_keeps_is_a_guess_that_is_always_right(sampler):
    run = sampler.sample(PROMPTS[:1], seeds=[0])
    resample = torch.zeros(N, dtype=torch.bool)
    resample[[3, 12]] = True
    given = {"seeds": [5], "previous": run, "resample": resample}
    _, seen = passes_of(sampler, PROMPTS[:1], 16, **given)
    assert [now.done for now in seen] == [4, 13]
    _, seen = passes_of(sampler, PROMPTS[:1], 4, **given)
    assert [now.done for now in seen] == [4, 8, 12, 13]


def test_an_image_of_one_token_is_few_passes(sampler):
    """Greedy and the same token everywhere: each guess is right, and a pass moves by the whole window."""
    model, tokenizer = tiny_janus()
    with torch.no_grad():
        model.model.generation_head.vision_head.weight.zero_()
        model.model.generation_head.vision_head.bias.zero_()[7] = 1.0
    _, seen = passes_of(JanusSampler(model, tokenizer), ["red"], 5, seeds=[0], options=SamplingOptions(temperature=0.0))
    assert [now.done for now in seen] == [1, 6, 11, 16]


def test_a_window_of_none_is_refused(sampler):
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(
            ValueError, match="parallel must be a whole number of at least 1 or None, got .*: 1 draws one by one"
        ):
            sampler.sample(["red"], seeds=[0], parallel=wrong)


def test_the_window_shrinks_with_the_rows():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [window_for(rows, cpu, torch.float32) for rows in (1, 2, 8, 24, 500)] == [12, 12, 3, 1, 1]
    assert window_for(2, gpu, torch.float32) == window_for(2, cpu, torch.bfloat16) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_drawn_one_by_one_unless_asked(dtype):
    model, tokenizer = tiny_janus()
    sampler = JanusSampler(model.to(dtype), tokenizer)
    given = {"seeds": [0], "options": SamplingOptions(guidance=1.0, top_k=2)}
    _, seen = passes_of(sampler, ["red"], None, **given)
    assert (len(seen) == N) == (dtype == torch.bfloat16)
    _, asked = passes_of(sampler, ["red"], 8, **given)
    assert len(asked) < N
