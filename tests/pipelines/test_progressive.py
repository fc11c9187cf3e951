"""Sampling in passes: whole, in parts, and refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dcdd_core.method.progressive import Staged, stage_rows
from dcdd_core.pipelines.host import Host
from dcdd_core.pipelines.progressive import changed_plan, sample_stages, staged_sampler
from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import DCDDWarning
from tests.contracts.toy_vlm import ToyVLM, save
from tests.models.masked.tiny_masked import SAMPLING, tiny_masked

PROMPTS, SEEDS = ["a red circle", "a blue square", "the ground"], [3, 4, 5]


class Small(Host):
    """Holds two images."""

    def __init__(self, sampler):
        self.kept, self.brought = 0, []
        self.for_images = [sampler.working_memory(PROMPTS[:n], options=SAMPLING) for n in range(4)]

    def bring(self, memory=0):
        self.brought.append(memory)
        if memory > self.for_images[2]:
            raise torch.OutOfMemoryError("too large")

    def keep(self, result):
        self.kept += len(result.tokens)
        return result


def same(first: Staged, second: Staged) -> None:
    assert torch.equal(first.token_logits.tokens, second.token_logits.tokens)
    torch.testing.assert_close(first.token_logits.logits, second.token_logits.logits, rtol=1e-4, atol=1e-4)
    assert len(first.stages) == len(second.stages)
    for one, other in zip(first.stages, second.stages):
        assert one.guidance == other.guidance
        for name in ("tokens", "known", "revealed", "redrawn", "changed"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_parts_are_the_whole():
    sampler, seen = tiny_masked(), []
    whole = sample_stages(sampler, PROMPTS, seeds=SEEDS, options=SAMPLING)
    same(whole, sampler.sample_stages(PROMPTS, seeds=SEEDS, options=SAMPLING))
    host = Small(sampler)
    with pytest.warns(DCDDWarning, match="continuing with 2 images"):
        parts = sample_stages(
            sampler,
            PROMPTS,
            seeds=SEEDS,
            options=SAMPLING,
            on_progress=lambda now: seen.append((now.first, now.done, len(now.tokens))),
            host=host,
        )
    same(parts, whole)
    assert host.kept == 3 and host.brought == [host.for_images[n] for n in (3, 2, 1)]
    assert seen == [(0, i, 2) for i in range(1, 6)] + [(2, i, 1) for i in range(1, 6)]
    assert [row["revealed"] for row in stage_rows(parts.stages)] == list(SAMPLING.counts(16))


def test_an_edit_in_parts_with_a_row_that_stays():
    sampler = tiny_masked()
    before = sampler.sample(PROMPTS, seeds=[7, 8, 9], options=SAMPLING)
    hole = torch.zeros(3, 16, dtype=torch.bool)
    hole[:2, 3:9] = True
    arguments = {"seeds": SEEDS, "options": SAMPLING, "previous": before, "resample": hole}
    whole = sample_stages(sampler, PROMPTS, **arguments)
    with pytest.warns(DCDDWarning):
        parts = sample_stages(sampler, PROMPTS, **arguments, host=Small(sampler))
    same(parts, whole)
    assert torch.equal(parts.token_logits.tokens[2], before.tokens[2]) and not parts.stages[0].revealed[2].any()
    arguments["options"] = replace(SAMPLING, guidance=SAMPLING.guidance + 1)  # other than those of `before`
    with pytest.warns(DCDDWarning):
        parts = sample_stages(sampler, PROMPTS, **arguments, host=Small(sampler))
    whole = sample_stages(sampler, PROMPTS, **arguments)
    same(parts, whole)
    assert parts.token_logits.record == whole.token_logits.record != before.record
    one = sample_stages(sampler, PROMPTS, **(arguments | {"resample": hole[0]}))
    assert torch.equal(one.token_logits.tokens[:, ~hole[0]], before.tokens[:, ~hole[0]])
    nothing = sample_stages(sampler, PROMPTS, **(arguments | {"resample": torch.zeros_like(hole)}))
    assert nothing.stages == () and torch.equal(nothing.token_logits.tokens, before.tokens)


def test_parts_of_other_options_are_not_joined():
    sampler = tiny_masked()
    few, many = (
        sampler.sample_stages(PROMPTS, seeds=SEEDS, options=replace(SAMPLING, passes=passes)) for passes in (3, 5)
    )
    with pytest.raises(ValueError, match=r"parts of \[3, 5\] passes cannot be joined"):
        Staged.joined([few, many])


def test_a_seed_for_each_prompt():
    with pytest.raises(ValueError, match="3 prompts came with 2 seeds"):
        sample_stages(tiny_masked(), PROMPTS, seeds=SEEDS[:2])
    with pytest.raises(ValueError, match="prompts is empty"):
        sample_stages(tiny_masked(), [], seeds=[])


def test_a_sampler_without_passes_is_refused(tmp_path):
    sampler = tiny_masked()
    assert staged_sampler(sampler) is sampler
    toy = ToyVLM().load_sampler(save(tmp_path / "toy"))
    with pytest.raises(ValueError, match="toy samples one token after the other and has no passes to choose"):
        staged_sampler(toy)
    with pytest.raises(ValueError, match="has no passes to choose: use another node"):
        staged_sampler(toy, remedy="use another node")


DRAWN = SamplingOptions(guidance=2.0, temperature=0.5, top_k=7, top_p=0.9)


def test_a_samplers_own_plan_with_what_is_given():
    own = replace(SAMPLING, order="confidence", spread=2, top_k=3, top_p=0.5)  # 5 passes, 1 of them for revision
    drawn = {"guidance": 2.0, "temperature": 0.5, "top_k": 7, "top_p": 0.9}
    assert changed_plan(own, DRAWN) == replace(own, **drawn)
    given = {"passes": 7, "revision_passes": 3, "order": "raster", "spread": 0, "revise": 5, "start": 2}
    assert changed_plan(own, DRAWN, **given) == replace(own, **drawn, **given)
    kept = changed_plan(own, SamplingOptions())
    assert (kept.top_k, kept.top_p) == (3, 0.5), "a filter that is left out is the sampler's own"
    off = changed_plan(own, SamplingOptions(top_k=0, top_p=1.0))
    assert (off.top_k, off.top_p) == (0, 1.0)
    noisy = replace(own, order_noise=2.0)
    assert changed_plan(noisy, DRAWN, order="confidence").order_noise == 2.0
    assert changed_plan(noisy, DRAWN, order="importance").order_noise is None, "it belongs to the other order"


@pytest.mark.parametrize(
    ("given", "revising"),
    [
        ({"passes": 10}, 2),
        ({"passes": 1}, 0),
        ({"passes": 10, "revision_passes": 0}, 0),
        ({"revise": 0}, 0),
        ({"passes": 10, "revise": 0}, 0),
        ({"revise": 4}, 1),
    ],
)
def test_revision_keeps_its_share_of_other_passes(given, revising):
    """And where nothing is revised, no pass is for that alone."""
    assert changed_plan(SAMPLING, DRAWN, **given).revision_passes == revising


@pytest.mark.parametrize(
    ("given", "passes"), [({"passes": 9}, 7), ({"passes": 9, "revision_passes": 0}, 9), ({"revision_passes": 2}, 3)]
)
def test_a_schedule_that_is_a_list_names_the_passes_it_is_for(given, passes):
    own = replace(SAMPLING, schedule=(1.0, 2.0, 3.0, 4.0))
    assert changed_plan(own, DRAWN, passes=6, revision_passes=2).schedule == own.schedule
    with pytest.raises(ValueError, match=f"has 4 numbers for {passes} revealing passes, .* as many passes as it has"):
        changed_plan(own, DRAWN, **given)


def test_plans_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="4 revision passes have nothing to do where revise is 0"):
        changed_plan(SAMPLING, DRAWN, revise=0, revision_passes=4)
    with pytest.raises(ValueError, match="order must be one of"):
        changed_plan(SAMPLING, DRAWN, order="odd")
