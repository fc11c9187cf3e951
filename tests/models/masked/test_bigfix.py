"""BIGFix's network and sampler, against numbers of the released code.

golden_bigfix.json holds what github.com/valeoai/BigFix (txt_transformer.py, halton_sampler.py) and
github.com/FoundationVision/LlamaGen (vq_model.py) computed in float32 from the weights of `tests.tiny_bigfix`, which
they loaded strictly. "guided" went the way of the released pipeline: T5's states of the padded prompts against zeros,
rewards .8 against .2, and (1 + w) l_c - w l_u.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dcdd_core import registry
from dcdd_core.method.calibration import apply_calibration
from dcdd_core.method.lcdm import map_logits
from dcdd_core.method.progressive import ProgressiveOptions, halton_places
from dcdd_core.models.llamagen import tokenizer as llamagen
from dcdd_core.models.masked.bigfix import SAMPLING
from dcdd_core.models.masked.bigfix_files import BigFixFolder
from dcdd_core.models.t5 import TEXT_SLOTS, T5Words
from dcdd_core.pipelines.progressive import sample_stages, staged_sampler
from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import Calibration, TokenLogits
from tests.tiny_bigfix import save_bigfix, tiny_words

GOLDEN = json.loads(Path(__file__).with_name("golden_bigfix.json").read_text())
PROMPTS, SEEDS = ["a red circle on the left", "a blue square"], [3, 4]
FEW = replace(SAMPLING, passes=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_bigfix(tmp_path_factory.mktemp("bigfix") / "model")


@pytest.fixture(scope="module")
def sampler(folder):
    return registry.sampler_family(folder).load_sampler(str(folder))


def assert_golden(found: torch.Tensor, expected: list) -> None:
    """To 1e-5 of the largest."""
    expected = torch.tensor(expected)
    assert found.shape == expected.shape and ((found - expected).abs().max() / expected.abs().max()) < 1e-5


@torch.no_grad()
def test_logits_are_those_of_the_released_network(folder):
    draw = torch.Generator().manual_seed(1)
    states, rewards = torch.randn(2, 5, 16, generator=draw), torch.rand(2, 3, generator=draw)
    network = BigFixFolder(folder).read_network()
    tokens = torch.tensor(GOLDEN["tokens"])
    assert (tokens == network.mask_token).any()
    logits = network.logits(network(tokens, network.read(states, rewards)))
    assert logits.shape == (2, 16, 64) and logits.dtype == torch.float32
    for position, expected in GOLDEN["logits"].items():
        assert_golden(logits[:, int(position), :12], expected)


def test_a_guided_pass_is_that_of_the_released_pipeline(sampler):
    """One pass over the hidden positions of an edit: prompts, text encoder, both rows, guidance."""
    golden, tokens = GOLDEN["guided"], torch.tensor(GOLDEN["tokens"])
    hidden = tokens == 64
    before = TokenLogits(
        torch.zeros(2, 16, 64), tokens.masked_fill(hidden, 0), (4, 4), codebook=sampler.codebook.fingerprint
    )
    options = ProgressiveOptions(guidance=1 + golden["guidance_scale"], passes=1, revision_passes=0)
    made = sampler.sample(golden["prompts"], seeds=SEEDS, options=options, previous=before, resample=hidden)
    for position, expected in golden["logits"].items():
        assert hidden[:, int(position)].all()
        assert_golden(made.logits[:, int(position), :12], expected)


def test_llamagens_tokenizer_is_that_of_its_authors(folder):
    golden = GOLDEN["llamagen"]
    tokenizer = llamagen.load_tokenizer(folder / "vq_ds16_t2i.pt", grid=(4, 4))
    painted = tokenizer.decode_tokens(torch.tensor([golden["codes"]]), (4, 4))
    assert_golden(painted[0, :, 5, ::3].flatten(), golden["pixels"])
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    assert tokenizer.encode(image).tokens[0].tolist() == golden["encoded"]


def test_the_halton_order_is_the_released_one_transposed():
    places = halton_places((8, 8)).reshape(8, 8)
    assert places.T.flatten()[torch.tensor(GOLDEN["halton"])].tolist() == list(range(64))


def test_it_samples_as_its_authors_do(sampler):
    assert staged_sampler(sampler) is sampler and sampler.sampling == SAMPLING and sampler.default_guidance == 6.0
    assert (SAMPLING.passes, SAMPLING.top_p, SAMPLING.order, SAMPLING.revise) == (32, 0.8, "halton", "all")
    assert (SAMPLING.schedule, SAMPLING.revision_passes, SAMPLING.temperature) == ("arccos", 0, 1.0)
    assert set(SAMPLING.guidances()) == {6.0} and sum(SAMPLING.counts(1024)) == 1024
    totals = []
    sampler.sample(PROMPTS[:1], seeds=[1], on_progress=lambda now: totals.append(now.total))
    assert totals == [32] * 32


def test_orders_without_a_head_are_refused(sampler):
    for order in ("importance", "quantisation-error"):
        with pytest.raises(ValueError, match=rf"the order '{order}' .*BigFix_tiny .* choose .*halton"):
            sampler.sample(PROMPTS, seeds=SEEDS, options=replace(FEW, order=order))
    for order in ("confidence", "random", "raster"):
        assert sampler.sample(PROMPTS, seeds=SEEDS, options=replace(FEW, order=order)).logits.isfinite().all()


def test_stages_revise_and_edits_keep_the_rest(sampler):
    staged = sample_stages(sampler, PROMPTS, seeds=SEEDS, options=FEW)
    assert len(staged.stages) == 4 and staged.stages[-1].known.all()
    assert any(stage.changed.any() for stage in staged.stages), "random weights do revise"
    hole = torch.zeros(16, dtype=torch.bool)
    hole[5:7] = True
    run = staged.token_logits
    edited = sampler.sample(["a green circle"] * 2, seeds=[8, 9], options=FEW, previous=run, resample=hole)
    assert torch.equal(edited.tokens[:, ~hole], run.tokens[:, ~hole])
    assert not torch.equal(edited.logits[:, hole], run.logits[:, hole])


def test_what_it_samples_goes_through_calibration_lcdm_and_the_decoder(folder, sampler):
    tokenizer = registry.sampler_family(folder).load_tokenizer(str(folder), dtype=torch.float32)
    made = sampler.sample(PROMPTS, seeds=SEEDS, options=FEW)
    assert made.model == sampler.name == tokenizer.name == "BigFix_tiny" and made.grid == tokenizer.grid == (4, 4)
    proxies = tokenizer.encode(tokenizer.decode_tokens(made.tokens, made.grid))
    calibrated = apply_calibration(proxies, tokenizer.codebook, Calibration(scale=25.0, smoothing=0.01))
    for logits in (made, calibrated):
        condition = map_logits(logits, tokenizer.codebook)
        assert condition.code_vectors.shape == (2, 16, 8) and condition.uncertainty.isfinite().all()
        soft = tokenizer.decode_vectors(condition.code_vectors, made.grid)
        assert soft.shape == (2, 3, 16, 16) and soft.std() > 0.01


def test_prompts_are_padded_on_the_right_to_all_slots():
    words = T5Words(tiny_words())
    rows = [words.ids(prompt) for prompt in (" a red circle ", "a blue square on the left")]
    assert rows[0] == [*tiny_words().convert_tokens_to_ids(["a", "red", "circle"]), 1], "ends with </s>"
    ids, real = words.padded(rows)
    assert ids.shape == real.shape == (2, TEXT_SLOTS) and real.sum(1).tolist() == [4, 7]
    assert ids[0, :4].tolist() == rows[0] and (ids[~real] == 0).all()
    assert words.unknown("a zebra and a zebra red") == ["zebra"] and words.known() == []


def test_prompts_that_would_not_be_read_whole_are_refused(sampler):
    words = T5Words(tiny_words())
    assert len(words.ids("red " * 119)) == 120
    with pytest.raises(ValueError, match="has 122 tokens with the end token, and 120 are read: .* 'blue green'"):
        words.ids("red " * 119 + "blue green")
    with pytest.raises(ValueError, match="blank"):
        sampler.sample([" "], seeds=[1])


def test_the_prompt_alone_takes_half_the_rows(sampler):
    rows = []
    hook = sampler.model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for guidance in (1.0, 2.0):
        sampler.sample(PROMPTS, seeds=SEEDS, options=replace(FEW, passes=1, guidance=guidance))
    sampler.sample(PROMPTS, seeds=SEEDS, options=replace(FEW, ramp=True, passes=2))
    hook.remove()
    assert rows == [2, 4, 2, 4], "a ramp starts with the prompt alone"
    ramped = sampler.sample(PROMPTS, seeds=SEEDS, options=replace(FEW, ramp=True, passes=2, revise=0))
    alone = sampler.sample(PROMPTS, seeds=SEEDS, options=replace(FEW, passes=2, revise=0, guidance=1.0))
    first = halton_places((4, 4)) < FEW.counts(16)[0]
    torch.testing.assert_close(ramped.logits[:, first], alone.logits[:, first], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top_p", [None, 1.0])
def test_a_top_p_that_is_left_out_is_the_released_one(sampler, top_p):
    drawn = {"guidance": 1.0, "temperature": 4.0}
    plain = sampler.sample(PROMPTS, seeds=SEEDS, options=SamplingOptions(**drawn, top_p=top_p))
    found = {
        p: sampler.sample(PROMPTS, seeds=SEEDS, options=replace(SAMPLING, **drawn, top_p=p)).tokens for p in (0.8, 1.0)
    }
    assert torch.equal(plain.tokens, found[top_p or 0.8]) and not torch.equal(found[0.8], found[1.0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(folder, dtype):
    loaded = registry.sampler_family(folder).load_sampler(str(folder), dtype=dtype)
    last = {part.weight.dtype for name, part in loaded.model.text_encoder.named_modules() if name.endswith(".wo")}
    assert last == {torch.float32 if dtype == torch.float16 else dtype}
    kept = {name: value.dtype for name, value in loaded.model.named_parameters() if not name.endswith(".wo.weight")}
    assert set(kept.values()) == {dtype}
    assert loaded.sample(PROMPTS, seeds=SEEDS, options=FEW).logits.dtype == torch.float32
