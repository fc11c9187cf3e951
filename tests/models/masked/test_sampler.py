"""The masked sampler: what each pass reveals, rewrites and keeps."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch

from dcdd_core.method import sampling
from dcdd_core.method.progressive import ORDERS, ProgressiveOptions, halton_places, order_noise, stage_counts
from dcdd_core.models.masked.words import padded
from dcdd_core.protocols import SamplingOptions
from tests.models.masked.tiny_masked import SAMPLING, tiny_masked
from tests.tiny import tiny_tokenizer

PROMPTS, SEEDS = ["a red circle on the left", "a blue square"], [3, 4]


@pytest.fixture
def sampler():
    return tiny_masked()


def blind(sampler):
    """Its logits are a function of prompt and position alone."""
    with torch.no_grad():
        sampler.model.align_out.weight.zero_()
        sampler.model.align_out.bias.zero_()
        sampler.model.mask.zero_()
    return sampler


@torch.no_grad()
def guided_logits(sampler, tokens, known, guidance, temperature=1.0):
    """One pass, written out: guidance and temperature on the network's logits [B, N, K]."""
    rows = [sampler.words.ids(prompt) for prompt in PROMPTS]
    seen = torch.where(known, tokens, torch.tensor(64))
    with_prompt, without = (
        sampler.model.logits(sampler.model(seen, sampler.model.prefix(*padded(ids))))
        for ids in (rows, [sampler.words.unconditional(ids) for ids in rows])
    )
    return (without + guidance * (with_prompt - without)) / temperature


@pytest.mark.parametrize("revise", ["all", 3, 0])
@pytest.mark.parametrize("order", ["halton", "confidence"])
def test_logits_are_those_of_the_pass_that_decided_a_position_last(sampler, revise, order):
    options = replace(
        SAMPLING, passes=6, revision_passes=2 if revise else 0, revise=revise, order=order, temperature=0.8, top_k=9
    )
    found = sampler.sample_stages(PROMPTS, seeds=SEEDS, options=options)
    tokens, known = torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, 16, dtype=torch.bool)
    expected = torch.zeros(2, 16, 64)
    for stage in found.stages:
        logits = guided_logits(sampler, tokens, known, stage.guidance, 0.8)
        decided = stage.revealed | stage.redrawn
        expected = torch.where(decided[..., None], logits, expected)
        tokens, known = stage.tokens, stage.known
    torch.testing.assert_close(found.token_logits.logits, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(found.token_logits.tokens, tokens)
    # Each token is the draw from its own logits, with the noise of seed and position.
    noise = sampling.gumbel_noise_grid(SEEDS, range(16), 64)
    drawn = sampling.gumbel_max(sampling.top_k(found.token_logits.logits, 9), noise)[1]
    assert torch.equal(drawn, tokens)


def test_stages_add_up(sampler):
    options = replace(SAMPLING, passes=7, revision_passes=3, revise=5)
    stages = sampler.sample_stages(PROMPTS, seeds=SEEDS, options=options).stages
    assert [stage.guidance for stage in stages] == list(options.guidances())
    counts = (*stage_counts(16, 4, "arccos"), 0, 0, 0)
    known = torch.zeros(2, 16, dtype=torch.bool)
    for i, (stage, before) in enumerate(zip(stages, (None, *stages))):
        assert stage.revealed.sum(1).tolist() == [counts[i]] * 2
        assert not (stage.revealed & known).any() and not (stage.redrawn & ~known).any()
        assert stage.redrawn.sum(1).tolist() == [min(5, sum(counts[:i]))] * 2
        if before is not None:
            assert torch.equal(stage.changed, stage.redrawn & (stage.tokens != before.tokens))
            kept = known & ~stage.redrawn
            assert torch.equal(stage.tokens[kept], before.tokens[kept])
        known = known | stage.revealed
        assert torch.equal(stage.known, known)
    assert known.all()
    assert any(stage.changed.any() for stage in stages), "random weights do revise"


def test_revision_takes_the_last_that_were_revealed(sampler):
    options = replace(SAMPLING, passes=5, revision_passes=0, revise=4, order="raster", schedule=(4, 4, 4, 2, 2))
    stages = sampler.sample_stages(PROMPTS, seeds=SEEDS, options=options).stages
    redrawn = [stage.redrawn[0].nonzero().flatten().tolist() for stage in stages]
    assert redrawn == [[], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [10, 11, 12, 13]]


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_every_order_reveals_everything(sampler, order):
    options = replace(SAMPLING, order=order)
    found = sampler.sample_stages(PROMPTS, seeds=SEEDS, options=options)
    first = found.stages[0].revealed
    prefix = sampler.model.prefix(*padded([sampler.words.ids(prompt) for prompt in PROMPTS]))
    with torch.no_grad():
        error, importance = sampler.model.scores(sampler.model(torch.full((2, 16), 64), prefix))
    highest = {
        "halton": -halton_places((4, 4)).expand(2, -1),
        "raster": -torch.arange(16).expand(2, -1),
        "quantisation-error": -error,
        "importance": importance,
    }
    if order in highest:
        expected = highest[order].topk(int(first[0].sum()), dim=1).indices.sort(dim=1).values
        assert torch.equal(first.nonzero()[:, 1].reshape(2, -1), expected)
    assert found.stages[-1].known.all()


@torch.no_grad()
def test_predicted_scores_are_those_with_the_prompt(sampler):
    """Guidance reads each image with and without it."""
    nothing = torch.full((2, 16), 64)
    rows = [sampler.words.ids(prompt) for prompt in PROMPTS]
    with_prompt, without = (
        torch.stack(sampler.model.scores(sampler.model(nothing, sampler.model.prefix(*padded(ids)))))
        for ids in (rows, [sampler.words.unconditional(ids) for ids in rows])
    )
    for order, at, sign in (("quantisation-error", 0, -1), ("importance", 1, 1)):
        options = replace(SAMPLING, order=order, ramp=False, passes=4, revision_passes=0)
        first = sampler.sample_stages(PROMPTS, seeds=SEEDS, options=options).stages[0].revealed
        count = int(first[0].sum())
        expected, other = (
            torch.zeros(2, 16, dtype=torch.bool).scatter(1, (sign * found[at]).topk(count, dim=1).indices, True)
            for found in (with_prompt, without)
        )
        assert torch.equal(first, expected) and not torch.equal(expected, other)


def test_confidence_is_of_the_whole_distribution(sampler):
    """Guided and tempered; filters shape the draw alone."""
    options = replace(
        SAMPLING, order="confidence", order_noise=0.0, ramp=False, temperature=0.7, top_k=2, passes=4, revision_passes=0
    )
    first = sampler.sample_stages(PROMPTS, seeds=SEEDS, options=options).stages[0].revealed
    nothing = torch.zeros(2, 16, dtype=torch.bool)
    logits = guided_logits(sampler, torch.zeros(2, 16, dtype=torch.int64), nothing, 3.0, 0.7)
    filtered = sampling.top_k(logits, 2)
    drawn = sampling.gumbel_max(filtered, sampling.gumbel_noise_grid(SEEDS, range(16), 64))[1]
    expected, other = (
        nothing.scatter(
            1,
            found.log_softmax(-1).gather(-1, drawn[..., None])[..., 0].topk(int(first[0].sum()), dim=1).indices,
            True,
        )
        for found in (logits, filtered)
    )
    assert torch.equal(first, expected) and not torch.equal(expected, other)


def test_noise_of_the_order_is_that_of_the_seeds_and_falls_with_the_passes(sampler):
    noise = order_noise(SEEDS, 16)
    stages = sampler.sample_stages(PROMPTS, seeds=SEEDS, options=replace(SAMPLING, order="random")).stages
    highest = noise.topk(int(stages[0].revealed[0].sum()), dim=1).indices
    assert torch.equal(stages[0].revealed, torch.zeros(2, 16, dtype=torch.bool).scatter(1, highest, True))
    # Passes that read no token, so that all of them have the same probabilities.
    options = replace(SAMPLING, order="confidence", order_noise=4.0, ramp=False, passes=4, revision_passes=0)
    sampler = blind(sampler)
    found = sampler.sample_stages(PROMPTS, seeds=SEEDS, options=options)
    chances = found.token_logits.logits.log_softmax(-1).gather(-1, found.token_logits.tokens[..., None])[..., 0]
    known = torch.zeros(2, 16, dtype=torch.bool)
    for stage, temperature in zip(found.stages, (4.0, 8 / 3, 4 / 3, 0.0)):
        scores = (chances + temperature * noise).masked_fill(known, -torch.inf)
        highest = scores.topk(int(stage.revealed[0].sum()), dim=1).indices
        assert torch.equal(stage.revealed, torch.zeros(2, 16, dtype=torch.bool).scatter(1, highest, True))
        known = stage.known


@pytest.mark.parametrize("order", ["importance", "raster"])
def test_positions_of_a_pass_keep_apart(sampler, order):
    options = replace(SAMPLING, order=order, spread=1, passes=4, revision_passes=0)
    stages = sampler.sample_stages(PROMPTS, seeds=SEEDS, options=options).stages
    for row in range(2):
        first = stages[0].revealed[row].nonzero().flatten()
        places = torch.stack([first // 4, first % 4], dim=1).float()
        apart = torch.cdist(places, places, p=torch.inf) + 9 * torch.eye(len(first))
        assert len(first) > 1 and apart.min() > 1
    assert stages[-1].known.all()


def test_a_position_whose_distribution_stays_keeps_its_token(sampler):
    options = replace(SAMPLING, ramp=False)
    sampler = blind(sampler)
    runs = [
        sampler.sample_stages(PROMPTS, seeds=SEEDS, options=replace(options, passes=passes, order=order))
        for passes, order in ((2, "halton"), (5, "random"), (16, "confidence"))
    ]
    for run in runs:
        assert torch.equal(run.token_logits.tokens, runs[0].token_logits.tokens)
        assert not any(stage.changed.any() for stage in run.stages)


def test_more_passes_keep_the_order(sampler):
    for order in ("halton", "random", "raster"):
        places = []
        for passes in (3, 6, 16):
            options = replace(SAMPLING, passes=passes, revision_passes=0, order=order)
            stages = sampler.sample_stages(PROMPTS, seeds=SEEDS, options=options).stages
            places.append([set(map(tuple, stage.known.nonzero().tolist())) for stage in stages])
        for few, many in pairwise(places):
            # Whatever is revealed at some point of the one run was revealed before everything else in the other.
            for known in few:
                at = next(other for other in many if len(other) >= len(known))
                assert known <= at


def test_a_hole_is_seen_from_both_sides(sampler):
    run = sampler.sample(PROMPTS, seeds=SEEDS)
    hole = torch.zeros(16, dtype=torch.bool)
    hole[5:7] = True
    options = replace(SAMPLING, passes=2, revision_passes=0)
    edits = []
    for place in (0, 15):
        tokens = run.tokens.clone()
        tokens[:, place] = (tokens[:, place] + 1) % 64
        edits.append(
            sampler.sample(
                PROMPTS, seeds=[8, 9], options=options, previous=replace(run, tokens=tokens), resample=hole
            ).logits
        )
    same = sampler.sample(PROMPTS, seeds=[8, 9], options=options, previous=run, resample=hole)
    for found in edits:
        assert not torch.allclose(found[:, hole], same.logits[:, hole], atol=1e-4)
    assert torch.equal(same.tokens[:, ~hole], run.tokens[:, ~hole])


def test_rows_of_different_holes_share_a_batch(sampler):
    run = sampler.sample(PROMPTS, seeds=SEEDS)
    holes = torch.zeros(2, 16, dtype=torch.bool)
    holes[0, :10] = True
    holes[1, 3] = True
    both = sampler.sample_stages(PROMPTS, seeds=[8, 9], previous=run, resample=holes)
    for row in range(2):
        single = sampler.sample(
            PROMPTS[row : row + 1], seeds=[8 + row], previous=run.part(row, row + 1), resample=holes[row : row + 1]
        )
        assert torch.equal(single.tokens[0], both.token_logits.tokens[row])
    assert [stage.revealed[1].sum().item() for stage in both.stages] == [0, 0, 0, 1, 0]


def test_an_image_may_be_the_start(sampler):
    """The first passes reveal its tokens in the order's turn, the others draw."""
    image = sampler.sample(PROMPTS, seeds=[70, 71])
    everywhere = torch.ones(16, dtype=torch.bool)
    options = replace(SAMPLING, passes=4, revision_passes=0, revise=0, start=2)
    arguments = {"seeds": SEEDS, "previous": image, "resample": everywhere}
    found = sampler.sample_stages(PROMPTS, options=options, **arguments)
    counts = stage_counts(16, 4, "arccos")
    taken = halton_places((4, 4)) < sum(counts[:2])
    made = found.token_logits
    assert torch.equal(made.tokens[:, taken], image.tokens[:, taken])
    assert torch.equal(made.logits[:, taken], image.logits[:, taken])
    assert not torch.equal(made.tokens, image.tokens)
    third = guided_logits(sampler, image.tokens, taken.expand(2, -1), found.stages[2].guidance)
    now = found.stages[2].revealed
    torch.testing.assert_close(made.logits[now], third[now], rtol=1e-3, atol=1e-3)
    for order in ORDERS:
        run = sampler.sample_stages(PROMPTS, options=replace(options, order=order), **arguments)
        first = run.stages[1].known
        assert torch.equal(run.token_logits.tokens[first], image.tokens[first])
    # Its tokens are judged by the prompt alone: passes that draw nothing need no second row.
    sure = replace(options, order="confidence", order_noise=0.0, guidance=6.0, ramp=False)
    run = sampler.sample_stages(PROMPTS, options=sure, **arguments)
    chances = guided_logits(sampler, image.tokens, torch.zeros(2, 16, dtype=torch.bool), 1.0).log_softmax(-1)
    highest = chances.gather(-1, image.tokens[..., None])[..., 0].topk(counts[0], dim=1).indices
    assert torch.equal(run.stages[0].known, torch.zeros(2, 16, dtype=torch.bool).scatter(1, highest, True))
    revised = sampler.sample_stages(PROMPTS, options=replace(options, revise="all"), **arguments)
    assert not revised.stages[1].redrawn.any() and revised.stages[2].redrawn.sum() == 2 * sum(counts[:2])
    with pytest.raises(ValueError, match="start is 2, but there are no tokens to start from"):
        sampler.sample(PROMPTS, seeds=SEEDS, options=options)


def test_plain_options_leave_the_passes_to_the_sampler(sampler):
    totals = []
    for options in (SamplingOptions(guidance=2.0), ProgressiveOptions(guidance=2.0, passes=3, revision_passes=1)):
        sampler.sample(
            PROMPTS[:1],
            seeds=[1],
            options=options,
            on_progress=lambda now: totals.append((now.done, now.total, now.passes)),
        )
    assert totals == [(i, 5, i) for i in range(1, 6)] + [(i, 3, i) for i in range(1, 4)]
    plain = sampler.sample(PROMPTS, seeds=SEEDS, options=SamplingOptions(guidance=2.0, temperature=0.5, top_p=0.9))
    whole = replace(SAMPLING, guidance=2.0, temperature=0.5, top_p=0.9)
    assert torch.equal(plain.tokens, sampler.sample(PROMPTS, seeds=SEEDS, options=whole).tokens)
    for order in sorted(ORDERS):
        greedy = replace(SAMPLING, temperature=0.0, order=order, order_noise=3.0)
        one, two = (sampler.sample_stages(PROMPTS, seeds=[k, k + 1], options=greedy) for k in (0, 50))
        assert torch.equal(one.token_logits.tokens, two.token_logits.tokens), "greedy: no seed decides"
        assert torch.equal(one.stages[0].revealed, two.stages[0].revealed)
    first = {
        order: sampler.sample_stages(PROMPTS, seeds=SEEDS, options=replace(greedy, order=order)).stages[0].revealed
        for order in ("random", "raster")
    }
    assert not torch.equal(first["random"], first["raster"])
    other = tiny_masked()
    other.sampling = replace(SAMPLING, passes=9)
    assert other.fingerprint != sampler.fingerprint == tiny_masked().fingerprint != tiny_masked(1).fingerprint


def test_the_prompt_alone_takes_half_the_rows(sampler):
    rows = []
    sampler.model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    sampler.sample(PROMPTS, seeds=SEEDS, options=replace(SAMPLING, guidance=1.0))
    sampler.sample(PROMPTS, seeds=SEEDS, options=SAMPLING)
    assert rows == [2] * 5 + [2, 4, 4, 4, 4], "a ramp starts with the prompt alone"


def test_a_cancelled_run_stops_within_the_pass(sampler):
    passes = []
    sampler.model.register_forward_pre_hook(lambda *_: passes.append(1))

    def stop(progress):
        if progress.done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sampler.sample(PROMPTS, seeds=SEEDS, on_progress=stop)
    assert len(passes) == 2


def test_broken_weights_are_named_with_their_pass(sampler):
    with torch.no_grad():
        sampler.model.codes.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="pass 2 of 5 failed in torch.float32: logits hold NaN"):
        sampler.sample(PROMPTS, seeds=SEEDS)


def test_words_and_rows(sampler):
    words = sampler.words
    ids = words.ids(" a red circle ")
    assert ids == words.ids("a red circle") and ids[0] == words.tokenizer.bos_token_id
    without = words.unconditional(ids)
    assert len(without) == len(ids) and (without[0], without[-1]) == (ids[0], ids[-1])
    assert set(without[1:-1]) == {words.tokenizer.pad_token_id}
    bare = type(words)(words.tokenizer, "{prompt}")
    assert bare.unconditional(bare.ids("red")) == [words.tokenizer.bos_token_id, words.tokenizer.pad_token_id]
    started = type(words)(words.tokenizer, f"{words.tokenizer.bos_token}{{prompt}}")
    assert started.ids("red") == bare.ids("red"), "a template that begins with BOS gets no second one"
    assert sampler.unknown_words("a red zebra zebra") == ["zebra"] and "circle" in sampler.known_words()
    with pytest.raises(ValueError, match="blank"):
        words.ids("  ")
    for template in ("", "{prompt}{prompt}", 3):
        with pytest.raises(ValueError, match="template must hold"):
            type(words)(words.tokenizer, template)
    for name in ("bos_token", "pad_token"):
        lacking = tiny_tokenizer()
        setattr(lacking, name, None)
        with pytest.raises(ValueError, match=f"the tokenizer names no {name}: add one to its tokenizer_config.json"):
            type(words)(lacking, words.template)


@pytest.mark.parametrize("kind", [SamplingOptions, partial(ProgressiveOptions, passes=5)])
def test_top_k_that_is_not_given_is_the_sampler_s_own(sampler, kind):
    def drawn(top_k):
        return sampler.sample(PROMPTS, seeds=SEEDS, options=kind(guidance=2.0, top_k=top_k)).tokens

    all_codes, one_code = drawn(0), drawn(1)
    assert torch.equal(drawn(None), all_codes) and not torch.equal(one_code, all_codes)
    sampler.sampling = replace(sampler.sampling, top_k=1)
    assert torch.equal(drawn(None), one_code) and torch.equal(drawn(0), all_codes)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("start", [0, 2])
def test_a_small_hole_is_drawn_with_the_whole_guidance(sampler, size, start):
    """Fewer positions than passes: the last passes draw them, late in the ramp, and no pass runs for nothing."""
    run, calls, told = sampler.sample(PROMPTS, seeds=SEEDS), [], []
    hole = torch.zeros(16, dtype=torch.bool)
    hole[4 : 4 + size] = True
    options = replace(SAMPLING, guidance=3.0, passes=8, revision_passes=0, revise=0, start=start)
    with sampler.model.register_forward_pre_hook(lambda *_: calls.append(1)):
        found = sampler.sample_stages(
            PROMPTS,
            seeds=[8, 9],
            options=options,
            previous=run,
            resample=hole,
            on_progress=lambda now: told.append(now),
        )
    assert [stage.revealed[0].sum().item() for stage in found.stages] == [0] * (8 - size) + [1] * size
    assert len(calls) == size == told[-1].passes
    last = found.stages[-1]
    known = found.stages[-2].known
    expected = guided_logits(sampler, found.token_logits.tokens, known, 3.0)
    torch.testing.assert_close(found.token_logits.logits[last.revealed], expected[last.revealed], rtol=1e-3, atol=1e-3)
    assert last.guidance == 3.0 and not torch.equal(found.token_logits.logits[:, hole], run.logits[:, hole])


def test_passes_that_start_from_an_image_are_counted_and_recorded_as_they_ran(sampler):
    image, calls, told = sampler.sample(PROMPTS, seeds=[70, 71]), [], []
    everywhere = torch.ones(16, dtype=torch.bool)
    for order, runs in (("halton", 3), ("confidence", 5)):
        calls.clear()
        options = replace(SAMPLING, order=order, guidance=3.0, passes=5, revision_passes=0, revise=0, start=2)
        with sampler.model.register_forward_pre_hook(lambda *_: calls.append(1)):
            found = sampler.sample_stages(
                PROMPTS, seeds=SEEDS, options=options, previous=image, resample=everywhere, on_progress=told.append
            )
        assert len(calls) == runs == told[-1].passes
        assert [stage.guidance for stage in found.stages] == [1.0, 1.0, 2.0, 2.5, 3.0]
