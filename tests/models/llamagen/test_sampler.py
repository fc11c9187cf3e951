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
from safetensors.torch import load_file, save_file

from dcdd_core import registry
from dcdd_core.method.calibration import apply_calibration
from dcdd_core.method.lcdm import map_logits
from dcdd_core.models import t5
from dcdd_core.models.autoregressive import sampler as autoregressive
from dcdd_core.models.autoregressive.token_loop import LlamaReader, TokenLoop
from dcdd_core.models.fused_linear import FusedLinear
from dcdd_core.models.llamagen import files
from dcdd_core.models.llamagen.captions import Captions, load_captions, save_captions
from dcdd_core.models.llamagen.network import GridRotary
from dcdd_core.models.llamagen.sampler import SAMPLING, LlamaGenSampler
from dcdd_core.models.t5 import TEXT_SLOTS
from dcdd_core.pipelines.host import Host
from dcdd_core.pipelines.sample import sample
from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import Calibration, Codebook, DCDDWarning
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


def asked_of(monkeypatch):
    """The options of every token loop, in order."""
    asked, start = [], TokenLoop.start
    monkeypatch.setattr(
        TokenLoop, "start", lambda self, *args, **given: asked.append(self.options) or start(self, *args, **given)
    )
    return asked


def test_it_samples_as_its_authors_do(folder, sampler, monkeypatch):
    assert (sampler.name, sampler.grid, sampler.codebook.size) == (NAME, (4, 4), 64)
    asked = asked_of(monkeypatch)
    sampler.sample(PROMPTS, seeds=SEEDS, options=SamplingOptions(guidance=sampler.default_guidance))
    sampler.sample(PROMPTS, seeds=SEEDS, options=SamplingOptions(top_k=0, top_p=0.5))
    sampler.sample(PROMPTS, seeds=SEEDS, options=SamplingOptions(top_k=7))
    assert [(options.guidance, options.top_k) for options in asked] == [(7.5, 1000), (5.0, 0), (5.0, 7)]
    assert SamplingOptions(guidance=7.5, temperature=1.0, top_k=1000) == SAMPLING


def test_its_own_top_k_decides_what_is_drawn(sampler, monkeypatch):
    greedy = sampler.sample(PROMPTS, seeds=SEEDS, options=SamplingOptions(temperature=0.0))
    assert not torch.equal(sampler.sample(PROMPTS, seeds=SEEDS).tokens, greedy.tokens)
    monkeypatch.setattr(sampler, "default_top_k", 1)
    assert torch.equal(sampler.sample(PROMPTS, seeds=SEEDS).tokens, greedy.tokens)
    off = sampler.sample(PROMPTS, seeds=SEEDS, options=SamplingOptions(top_k=0))
    assert not torch.equal(off.tokens, greedy.tokens)


def test_a_folder_says_another_guidance(folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"guidance": 3}))
    found = LlamaGenSampler.load(own)
    assert (found.default_guidance, found.default_top_k) == (3, None)


@pytest.mark.parametrize("prompt", ["", "  ", "(***)", "jc6640"])
def test_prompts_of_which_nothing_is_left_are_refused(sampler, prompt):
    with pytest.raises(ValueError, match="blank once it is cleaned"):
        sampler.sample([prompt], seeds=[0])


def test_prompts_that_would_not_be_read_whole_are_refused(sampler):
    assert len(sampler.features("red " * (TEXT_SLOTS - 1))) == TEXT_SLOTS
    with pytest.raises(ValueError, match="has 121 tokens with the end token, and 120 are read: .* begins with 'red'"):
        sampler.features("red " * TEXT_SLOTS)


def on_a_gpu(sampler: LlamaGenSampler, monkeypatch, *, room: bool = True) -> list[str]:
    """Where the text encoder of a sampler goes whose network seems to be on a GPU, and "encode" where it computes; in
    truth all stays on the CPU.

    Args:
        room: whether the encoder fits on the GPU.
    """
    told, encoder = [], sampler.text.encoder
    forward = encoder.forward

    def to(device):
        told.append(str(device))
        if not room and str(device) == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")

    def encode(*args, **given):
        told.append("encode")
        return forward(*args, **given)

    monkeypatch.setattr(LlamaGenSampler, "_device", torch.device("cuda"))
    monkeypatch.setattr(encoder, "to", to)
    monkeypatch.setattr(encoder, "forward", encode)
    return told


def test_the_text_encoder_is_on_the_device_only_while_it_reads(folder, monkeypatch):
    plain = LlamaGenSampler.load(folder).sample(PROMPTS, seeds=SEEDS)
    sampler, passes = LlamaGenSampler.load(folder), []
    told, whole = on_a_gpu(sampler, monkeypatch), ["cuda", "encode", "encode", "cpu"]
    moved = sampler.sample(PROMPTS, seeds=SEEDS, on_progress=lambda now: passes.append(list(told)))
    # It is back before the first token is drawn, and does not come again.
    assert passes and all(so_far == whole for so_far in passes)
    assert torch.equal(moved.logits, plain.logits) and torch.equal(moved.tokens, plain.tokens)
    again = sampler.sample(PROMPTS, seeds=SEEDS)
    assert told == whole and torch.equal(again.logits, plain.logits)
    sampler.sample([*PROMPTS, "a green star"], seeds=[1, 2, 3])
    assert told == [*whole, "cuda", "encode", "cpu"]
    sampler.text.stays = True
    sampler.sample(["a green circle"], seeds=[1])
    assert told == [*whole, "cuda", "encode", "cpu", "encode"]


def test_the_text_encoder_is_no_part_of_what_a_host_moves(folder):
    sampler = LlamaGenSampler.load(folder)
    theirs = {id(weight) for weight in sampler.text.encoder.parameters()}
    assert theirs and not theirs & {id(weight) for weight in sampler.model.parameters()}


def test_features_of_the_last_texts_are_kept(folder, monkeypatch):
    monkeypatch.setattr(t5, "KEPT", 2)
    text = LlamaGenSampler.load(folder).text
    for caption in ("red", "blue", "red", "green"):
        text.features([caption], "cpu")
    assert text.memory(["red", "green"]) == 0 < text.memory(["blue"])


class Counting(Host):
    """Remembers the memory that it was asked for."""

    def __init__(self):
        self.asked: list[int] = []

    def bring(self, memory: int = 0) -> None:
        self.asked.append(memory)


def test_memory_for_the_text_encoder_is_asked_for_before_that_for_logits(folder):
    sampler, host = LlamaGenSampler.load(folder), Counting()
    expected = sampler.sample(PROMPTS, seeds=SEEDS)
    sampler = LlamaGenSampler.load(folder)
    weights = sum(weight.numel() * weight.element_size() for weight in sampler.text.encoder.parameters())
    logits = sampler.working_memory(PROMPTS)
    for asked in ([weights, logits], [logits]):  # what has been read needs no encoder
        host.asked.clear()
        assert torch.equal(sample(sampler, PROMPTS, seeds=SEEDS, host=host).logits, expected.logits)
        assert host.asked == asked
    sampler.text.stays = True
    host.asked.clear()
    sample(sampler, ["a green star"], seeds=[0], host=host)
    assert host.asked == [sampler.working_memory(["a green star"])]
    # An edit that changes nothing reads and takes nothing.
    host.asked.clear()
    sampler.text.stays = False
    keep = torch.zeros(16, dtype=torch.bool)
    sample(sampler, ["never read", " "], seeds=SEEDS, previous=expected, resample=keep, host=host)
    assert host.asked == [0]


def test_without_room_for_the_text_encoder_prompts_are_read_on_the_cpu(folder, monkeypatch):
    expected = LlamaGenSampler.load(folder).sample(PROMPTS, seeds=SEEDS)
    sampler = LlamaGenSampler.load(folder)
    told = on_a_gpu(sampler, monkeypatch, room=False)
    with pytest.warns(DCDDWarning, match="out of memory: the text encoder reads the prompt on the CPU"):
        made = sample(sampler, PROMPTS, seeds=SEEDS)
    assert told == ["cuda", "cpu", "encode", "encode"] and torch.equal(made.logits, expected.logits)


def test_known_captions_need_no_text_encoder(folder, sampler, tmp_path):
    expected = sampler.sample(PROMPTS, seeds=SEEDS)
    lone = shutil.copytree(folder, tmp_path / "lone")
    sampler.save_captions(lone / "captions.safetensors", PROMPTS)
    both = LlamaGenSampler.load(lone)
    assert torch.equal(both.known["a blue square"], sampler.features("a blue square"))
    both.text.encoder = None  # what is known is not encoded
    assert torch.equal(both.sample(PROMPTS, seeds=SEEDS).tokens, expected.tokens)

    shutil.rmtree(lone / "flan-t5-xl")
    alone = LlamaGenSampler.load(lone)
    assert alone.text is None and alone.unknown_words("zebra") == [] and alone.text_memory(["zebra"]) == 0
    assert alone.fingerprint == sampler.fingerprint == both.fingerprint
    run = alone.sample(["  A blue SQUARE", PROMPTS[0]], seeds=SEEDS[::-1])
    assert torch.equal(run.tokens, expected.tokens.flip(0))
    with pytest.raises(
        ValueError,
        match="t2i_tiny has no text encoder, and its 2 known captions do not hold 'a green.* with `dcdd captions`",
    ):
        alone.sample(["a green square"], seeds=[0])
    alone.save_captions(lone / "captions.safetensors", [])
    assert set(LlamaGenSampler.load(lone).known) == set(both.known)


def test_captions_of_another_text_encoder_are_refused(folder, sampler, tmp_path):
    lone = shutil.copytree(folder, tmp_path / "lone")
    sampler.save_captions(lone / "captions.safetensors", PROMPTS)
    # The same encoder in another precision, or rounded, is the same encoder.
    assert LlamaGenSampler.load(lone, dtype=torch.bfloat16).known
    saved = load_captions(lone / "captions.safetensors")
    for encoder, refused in ((f"{saved.encoder} in int8", False), ("0123456789abcdef", True)):
        save_captions(lone / "captions.safetensors", Captions(features=saved.features, encoder=encoder))
        if refused:
            with pytest.raises(ValueError, match="has features of another text encoder than the one in that folder"):
                LlamaGenSampler.load(lone)
        else:
            assert LlamaGenSampler.load(lone).known


def test_the_text_encoder_counts_in_the_fingerprint(folder, sampler, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    weights = other / "flan-t5-xl" / "model.safetensors"
    held = load_file(weights)
    save_file(held | {"shared.weight": held["shared.weight"] + 1}, weights)
    assert LlamaGenSampler.load(other).fingerprint != sampler.fingerprint == LlamaGenSampler.load(folder).fingerprint


def test_a_folder_is_read_once(folder, monkeypatch):
    opened, open_saved = [], files.open_saved
    monkeypatch.setattr(files, "open_saved", lambda file: opened.append(file.name) or open_saved(file))
    LlamaGenSampler.load(folder)
    assert opened == [f"{NAME}.pt"]


def test_int8_is_for_the_layers_and_the_text_encoder(folder, monkeypatch):
    def rounded(module: torch.nn.Module, device: str) -> None:
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.data = torch.zeros_like(layer.weight)

    own = LlamaGenSampler.load(folder)
    for module in (autoregressive, t5):
        monkeypatch.setattr(module, "store_in_int8", rounded)
    changed = LlamaGenSampler.load(folder, int8=True)
    for part, prefix in ((lambda one: one.model, "language.layers."), (lambda one: one.text.encoder, "encoder.block.")):
        before = part(own).state_dict()
        touched = {name for name, weight in part(changed).state_dict().items() if not torch.equal(weight, before[name])}
        assert touched == {
            name
            for name, weight in before.items()
            if name.startswith(prefix) and weight.ndim == 2 and "relative_attention_bias" not in name
        }
    network, text = own.fingerprint.split("-")
    assert changed.fingerprint == f"{network} in int8-{text} in int8"


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
