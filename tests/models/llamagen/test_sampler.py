"""LlamaGen's network and sampler, against numbers of the released code.

golden_llamagen.json holds what github.com/FoundationVision/LlamaGen computed in float32 (gpt.py, generate.py and t5.py,
in sample_t2i.py's way of padding) from the weights of `tests.tiny_llamagen`, which it loaded strictly: see
make_golden_llamagen.py.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from dcdd_core import registry
from dcdd_core.method.calibration import apply_calibration
from dcdd_core.method.lcdm import map_logits
from dcdd_core.models.autoregressive import sampler as autoregressive
from dcdd_core.models.autoregressive.token_loop import LlamaReader, TokenLoop
from dcdd_core.models.fused_linear import FusedLinear
from dcdd_core.models.llamagen.network import GridRotary
from dcdd_core.models.llamagen.sampler import SAMPLING, LlamaGenSampler
from dcdd_core.models.t5 import TEXT_SLOTS
from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import Calibration, Codebook
from tests.models.llamagen.make_golden_llamagen import CODES, GOLDEN
from tests.tiny_llamagen import NAME, save_llamagen

PROMPTS, SEEDS = ["a red circle on the left", "a blue square"], [3, 4]
RUNS = {
    "greedy": SamplingOptions(guidance=7.5, temperature=0.0),
    "drawn": SamplingOptions(guidance=7.5, top_k=10),
    "alone": SamplingOptions(guidance=1.0, temperature=0.0),
}


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llamagen(tmp_path_factory.mktemp("llamagen") / "model")


@pytest.fixture(scope="module")
def sampler(folder) -> LlamaGenSampler:
    return registry.sampler_family(folder).load_sampler(str(folder))


@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("name", RUNS)
def test_logits_and_tokens_are_those_of_the_released_loop(sampler, golden, name, window):
    expected = golden["runs"][name]
    assert (golden["guidance"], golden["top_k"]) == (7.5, 10)
    run = sampler.sample(golden["prompts"], seeds=golden["seeds"], options=RUNS[name], parallel=window)
    assert run.tokens.tolist() == expected["tokens"]
    for step, rows in expected["logits"].items():
        rows = torch.tensor(rows)
        assert ((run.logits[:, int(step), :CODES] - rows).abs().max() / rows.abs().max()) < 1e-5


@torch.no_grad()
def test_what_training_computes_is_what_is_sampled_from(sampler):
    """`LlamaGenTransformer.forward`, which goes through transformers' own layers, over the sampled tokens."""
    run = sampler.sample(PROMPTS, seeds=SEEDS, options=SamplingOptions(guidance=3.0))
    prompts = sampler._prompts(PROMPTS, guided=True)
    rows, slots = prompts.rows, prompts.embeddings.shape[1]
    real = torch.arange(slots) >= prompts.padding[:, None]
    assert not real.all()
    given = run.tokens[:, :-1].repeat(2, 1)
    logits = sampler.model(prompts.embeddings[rows], real[rows], given)
    conditional, unconditional = logits.chunk(2)
    guided = unconditional + 3.0 * (conditional - unconditional)
    torch.testing.assert_close(run.logits, guided, rtol=1e-4, atol=1e-4)


def test_rotary_tables_turn_with_row_and_column_and_leave_captions_out():
    cos, sin = GridRotary(columns=3, width=8)(torch.zeros(1), torch.tensor([[-2, -1, 0, 5]]))
    assert cos.shape == sin.shape == (1, 4, 8)
    assert not cos[0, :2].any() and not sin[0, :2].any()
    assert torch.equal(cos[0, 2], torch.ones(8)) and not sin[0, 2].any()
    # Position 5 is row 1, column 2; a quarter of the width has its own frequency, 1 and 1/100.
    angles = torch.tensor([1.0, 0.01, 2.0, 0.02]).repeat(2)
    torch.testing.assert_close(cos[0, 3], angles.cos())
    torch.testing.assert_close(sin[0, 3], angles.sin())


def test_equal_captions_are_read_once_and_cleaned_first(sampler, monkeypatch):
    sizes, read = [], LlamaReader.read

    def counted(self, embeddings, *args, **named):
        sizes.append(tuple(embeddings.shape[:2]))
        return read(self, embeddings, *args, **named)

    monkeypatch.setattr(LlamaReader, "read", counted)
    given = {"options": SamplingOptions(guidance=7.5), "parallel": 1}
    run = sampler.sample(["a red circle", "  A RED (circle)", "a blue square"], seeds=[1, 1, 2], **given)
    # The prompts are two as they are written, and their rows of no caption, as long as they, are one.
    assert sizes == [(4, 4), *[(6, 1)] * 15]
    torch.testing.assert_close(run.logits[0], run.logits[1])
    assert torch.equal(run.tokens[0], run.tokens[1])


def test_it_samples_as_its_authors_do(sampler):
    assert sampler.default_guidance == SAMPLING.guidance == 7.5 and SAMPLING.top_k == 1000
    assert (sampler.name, sampler.grid, sampler.codebook.size) == (NAME, (4, 4), 64)


@pytest.mark.parametrize("prompt", ["", "  ", "(***)", "jc6640"])
def test_prompts_of_which_nothing_is_left_are_refused(sampler, prompt):
    with pytest.raises(ValueError, match="blank once it is cleaned"):
        sampler.sample([prompt], seeds=[0])


def test_prompts_that_would_not_be_read_whole_are_refused(sampler):
    assert len(sampler.features("red " * (TEXT_SLOTS - 1))) == TEXT_SLOTS
    with pytest.raises(ValueError, match="has 121 tokens with the end token, and 120 are read: .* begins with 'red'"):
        sampler.features("red " * TEXT_SLOTS)


def test_known_captions_need_no_text_encoder(folder, sampler, tmp_path):
    expected = sampler.sample(PROMPTS, seeds=SEEDS)
    lone = shutil.copytree(folder, tmp_path / "lone")
    sampler.save_captions(lone / "captions.safetensors", PROMPTS)
    both = LlamaGenSampler.load(lone)
    assert torch.equal(both.known["a blue square"], sampler.features("a blue square"))
    both.model.text_encoder = None  # what is known is not encoded
    assert torch.equal(both.sample(PROMPTS, seeds=SEEDS).tokens, expected.tokens)

    shutil.rmtree(lone / "flan-t5-xl")
    alone = LlamaGenSampler.load(lone)
    assert alone.model.text_encoder is None and alone.unknown_words("zebra") == []
    run = alone.sample(["  A blue SQUARE", PROMPTS[0]], seeds=SEEDS[::-1])
    assert torch.equal(run.tokens, expected.tokens.flip(0))
    with pytest.raises(ValueError, match="t2i_tiny has no text encoder, and its 2 known captions do not hold 'a green"):
        alone.sample(["a green square"], seeds=[0])
    alone.save_captions(lone / "captions.safetensors", [])
    assert set(LlamaGenSampler.load(lone).known) == set(both.known)


def test_int8_is_for_the_layers_and_the_text_encoder(folder, monkeypatch):
    def rounded(module: torch.nn.Module, device: str) -> None:
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.data = torch.zeros_like(layer.weight)

    own = LlamaGenSampler.load(folder)
    monkeypatch.setattr(autoregressive, "store_in_int8", rounded)
    changed = LlamaGenSampler.load(folder, int8=True)
    before = own.model.state_dict()
    touched = {name for name, weight in changed.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert touched == {
        name
        for name, weight in before.items()
        if name.startswith(("language.layers.", "text_encoder.encoder.block."))
        and weight.ndim == 2
        and "relative_attention_bias" not in name
    }
    assert changed.fingerprint == f"{own.fingerprint} in int8"


def test_int8_samples(folder):
    pytest.importorskip("torchao", reason="torchao is not installed")
    assert LlamaGenSampler.load(folder, int8=True).sample(["red"], seeds=[0]).logits.isfinite().all()


def test_on_a_cpu_the_layers_share_threads_and_what_they_read(folder):
    language = LlamaGenSampler.load(folder).model.language
    reader = LlamaReader(language, torch.zeros(1, dtype=torch.int64), 4)
    together = [part for parts in reader.layers for part in parts if isinstance(part, FusedLinear)]
    assert len(together) == 8 and all(part.parts is not None for part in together)


def test_a_step_that_does_not_know_its_place_is_the_same(sampler, monkeypatch):
    """What a GPU records: the position is in a tensor alone, and all slots are looked at."""
    expected = sampler.sample(PROMPTS, seeds=SEEDS, options=RUNS["drawn"])
    step = TokenLoop._step
    monkeypatch.setattr(TokenLoop, "_step", lambda self, seen=None: step(self))
    found = sampler.sample(PROMPTS, seeds=SEEDS, options=RUNS["drawn"])
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_run_is_the_plain_one(folder, monkeypatch):
    sampler = LlamaGenSampler.load(folder, device="cuda")
    recorded = sampler.sample(PROMPTS, seeds=SEEDS)
    monkeypatch.setattr(TokenLoop, "advance", lambda self: (self._step(), self._put_noise(), self._tell()))
    plain = sampler.sample(PROMPTS, seeds=SEEDS)
    assert torch.equal(recorded.tokens, plain.tokens)
    torch.testing.assert_close(recorded.logits, plain.logits, rtol=0, atol=1e-3)


def test_what_it_samples_goes_through_calibration_lcdm_and_the_decoder(folder, sampler):
    tokenizer = registry.sampler_family(folder).load_tokenizer(str(folder), dtype=torch.float32)
    made = sampler.sample(PROMPTS, seeds=SEEDS)
    assert made.model == sampler.name == tokenizer.name and made.grid == tokenizer.grid == (4, 4)
    proxies = tokenizer.encode(tokenizer.decode_tokens(made.tokens, made.grid))
    calibrated = apply_calibration(proxies, tokenizer.codebook, Calibration(scale=25.0, smoothing=0.01))
    for logits in (made, calibrated):
        condition = map_logits(logits, tokenizer.codebook)
        assert condition.code_vectors.shape == (2, 16, 8) and condition.uncertainty.isfinite().all()
        assert tokenizer.decode_vectors(condition.code_vectors, made.grid).std() > 0.01


def test_a_sampler_without_text_is_refused(sampler):
    codebook = Codebook(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="no text encoder and no caption whose features are known"):
        LlamaGenSampler(sampler.model, None, codebook)
