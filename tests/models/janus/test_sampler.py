"""Janus as a sampler: DeepSeek's loop, batches, edits, randomness, loading. B batch, N = 16 tokens, K = 64 codes."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import JanusForConditionalGeneration, PreTrainedTokenizerFast

from dcdd_core.method.sampling import gumbel_noise_grid
from dcdd_core.models.autoregressive import sampler as autoregressive
from dcdd_core.models.autoregressive.token_loop import LlamaReader, in_float32
from dcdd_core.models.fused_linear import FusedLinear
from dcdd_core.models.janus.sampler import JanusSampler, prompt_ids, unconditional_ids
from dcdd_core.protocols import Progress, SamplingOptions
from dcdd_core.types import Codebook, TokenLogits
from tests.models.janus.make_golden_janus import GOLDEN, GUIDANCE, PROMPTS, deepseek_loop, template_ids
from tests.tiny import save_janus, tiny_janus

SEEDS = (3, 2**40 + 1)
N, K = 16, 64


@pytest.fixture(scope="module")
def sampler() -> JanusSampler:
    return JanusSampler(*tiny_janus(), name="tiny")


@pytest.fixture(scope="module")
def run(sampler: JanusSampler) -> TokenLogits:
    return sampler.sample(PROMPTS, seeds=SEEDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_janus(tmp_path_factory.mktemp("models") / "Janus-Tiny")


def same(first: TokenLogits, second: TokenLogits) -> bool:
    return torch.equal(first.tokens, second.tokens) and torch.equal(first.logits, second.logits)


def close(first: TokenLogits, second: TokenLogits, rows: slice = slice(None)) -> bool:
    """To float rounding, with the very same tokens."""
    logits = second.logits[rows]
    return torch.equal(first.tokens, second.tokens[rows]) and torch.allclose(first.logits, logits, rtol=0, atol=1e-4)


# --- DeepSeek's semantics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("guidance", [GUIDANCE, 2.0, 0.0])
def test_greedy_run_is_deepseeks_loop(sampler: JanusSampler, prompt: str, guidance: float):
    pad = sampler.tokenizer.pad_token_id
    logits, tokens = deepseek_loop(sampler.model, template_ids(prompt), pad, guidance, N)
    ours = sampler.sample([prompt], seeds=[0], options=SamplingOptions(guidance=guidance, temperature=0))
    assert torch.equal(ours.tokens[0], tokens)
    assert (ours.logits[0] - logits).abs().max() < 1e-4


def test_golden_numbers(sampler: JanusSampler):
    golden = json.loads(GOLDEN.read_text())
    prompts = [entry["prompt"] for entry in golden["prompts"]]
    ours = sampler.sample(
        prompts, seeds=[0] * len(prompts), options=SamplingOptions(guidance=golden["guidance"], temperature=0)
    )
    for row, entry in enumerate(golden["prompts"]):
        assert ours.tokens[row].tolist() == entry["tokens"]
        for step, values in entry["logits"].items():
            expected = torch.tensor(values)
            assert torch.allclose(ours.logits[row, int(step), : len(values)], expected, rtol=0, atol=1e-3)


def test_prompt_is_deepseeks_template_with_one_bos(sampler: JanusSampler):
    tokenizer = sampler.tokenizer
    assert prompt_ids(tokenizer, f" {PROMPTS[0]}\n") == template_ids(PROMPTS[0])
    _, adding = tiny_janus()
    bos = adding.bos_token
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, adding.bos_token_id)]
    )
    assert adding("red")["input_ids"][0] == adding.bos_token_id
    assert prompt_ids(adding, PROMPTS[0]) == template_ids(PROMPTS[0])


def test_unconditional_row_keeps_the_ends_and_pads_the_rest(sampler: JanusSampler):
    ids = template_ids(PROMPTS[0])
    pad = sampler.tokenizer.pad_token_id
    assert unconditional_ids(ids, sampler.tokenizer) == [ids[0], *[pad] * (len(ids) - 2), ids[-1]]


def test_deepseeks_own_pad_token_comes_first():
    _, tokenizer = tiny_janus()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<｜▁pad▁｜>"]})
    pad = tokenizer.get_vocab()["<｜▁pad▁｜>"]
    assert pad != tokenizer.pad_token_id
    assert unconditional_ids([0, 9, 9, 5], tokenizer) == [0, pad, pad, 5]


def test_tokenizer_without_what_janus_needs_is_refused():
    _, tokenizer = tiny_janus()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="pad_token"):
        unconditional_ids([0, 9, 5], tokenizer)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="bos_token"):
        prompt_ids(tokenizer, "red")
    _, tokenizer = tiny_janus()
    words = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str().replace("<begin_of_image>", "<image>"))
    without = PreTrainedTokenizerFast(tokenizer_object=words, bos_token=tokenizer.bos_token, unk_token="<unk>")
    with pytest.raises(ValueError, match="<begin_of_image> as one token"):
        prompt_ids(without, "red")


def test_tokenizer_of_a_larger_model_is_refused():
    model, tokenizer = tiny_janus()
    tokenizer.add_tokens(["another"])
    with pytest.raises(ValueError, match="do not belong together"):
        JanusSampler(model, tokenizer)


@pytest.mark.parametrize(
    ("word", "match"),
    [("<|Assistant|>", "two words with one id"), (":", "does not know every word around a prompt")],
)
def test_folder_whose_tokenizer_lacks_words_of_the_template_is_refused(tmp_path: Path, word: str, match: str):
    folder = save_janus(tmp_path / "janus")
    words = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    del words["model"]["vocab"][word]
    (folder / "tokenizer.json").write_text(json.dumps(words), "utf-8")
    with pytest.raises(ValueError, match=f"/janus: the tokenizer (has )?{match}"):
        JanusSampler.load(folder)


def test_guidance_one_is_the_prompt_alone(sampler: JanusSampler):
    alone = sampler.sample(PROMPTS, seeds=SEEDS, options=SamplingOptions(guidance=1))
    nearly = sampler.sample(PROMPTS, seeds=SEEDS, options=SamplingOptions(guidance=1 + 1e-7))
    assert close(alone, nearly)


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_result_says_what_it_is(run: TokenLogits, sampler: JanusSampler):
    assert (run.source, run.guidance, run.temperature, run.model, run.grid) == ("vlm", 5.0, 1.0, "tiny", (4, 4))
    assert run.codebook == sampler.codebook.fingerprint
    assert run.logits.dtype == torch.float32 and run.logits.shape == (2, N, K)


def test_tokens_are_the_gumbel_draw_of_the_logits(run: TokenLogits):
    noise = gumbel_noise_grid(SEEDS, range(N), K)
    assert torch.equal((run.logits + noise).argmax(dim=2), run.tokens)


def test_logits_are_divided_by_the_temperature_and_unfiltered(sampler: JanusSampler):
    plain = sampler.sample(PROMPTS, seeds=SEEDS, options=SamplingOptions(temperature=0))
    halved = sampler.sample(PROMPTS, seeds=SEEDS, options=SamplingOptions(temperature=2.0))
    filtered = sampler.sample(PROMPTS, seeds=SEEDS, options=SamplingOptions(temperature=2.0, top_k=3, top_p=0.9))
    assert torch.allclose(halved.logits[:, 0] * 2, plain.logits[:, 0], rtol=0, atol=1e-5)
    assert torch.equal(filtered.logits[:, 0], halved.logits[:, 0])
    assert bool(torch.isfinite(filtered.logits).all())
    third = filtered.logits.topk(3, dim=2).values[..., -1]
    assert bool((filtered.logits.gather(2, filtered.tokens[..., None])[..., 0] >= third).all())
    assert not torch.equal(filtered.tokens, halved.tokens)


def test_half_precision_model_gives_float32_logits():
    model, tokenizer = tiny_janus()
    full = JanusSampler(model, tokenizer).sample(PROMPTS, seeds=SEEDS)
    half = JanusSampler(model.to(torch.bfloat16), tokenizer).sample(PROMPTS, seeds=SEEDS)
    assert half.logits.dtype == torch.float32
    assert (half.logits - full.logits)[:, 0].abs().max() < 0.5
    # Computed in float32, not cast to it: bfloat16 has no such numbers.
    assert not torch.equal(half.logits, half.logits.bfloat16().float())
    assert model.model.generation_head.vision_head.weight.dtype == torch.bfloat16


def test_head_of_a_half_precision_model_runs_in_float32(sampler: JanusSampler):
    model, tokenizer = tiny_janus()
    inputs = []
    model.model.generation_head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.to(torch.bfloat16)
    JanusSampler(model, tokenizer).sample(["red"], seeds=[0], options=SamplingOptions(guidance=1), parallel=1)
    assert len(inputs) == N and all(x.dtype == torch.float32 for x in inputs)


def test_the_head_is_copied_without_what_a_host_keeps_on_it():
    """ComfyUI hangs native memory on its linear layers, which a copy would free once more."""

    class Native:
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    plain, tokenizer = tiny_janus()
    expected = JanusSampler(plain.to(torch.bfloat16), tokenizer).sample(["red"], seeds=[0])
    model, _ = tiny_janus()
    model.to(torch.bfloat16)
    for part in model.modules():
        if isinstance(part, torch.nn.Linear):
            part._v, part._pin_state = Native(), Native()
    sampler = JanusSampler(model, tokenizer)
    found = sampler.sample(["red"], seeds=[0])
    assert torch.equal(found.logits, expected.logits)
    head, copied = model.model.generation_head, sampler._network().head
    layers = [part for part in copied.modules() if isinstance(part, torch.nn.Linear)]
    assert len(layers) == 2 and all(type(layer) is torch.nn.Linear and not hasattr(layer, "_v") for layer in layers)
    assert {weight.dtype for weight in copied.parameters()} == {torch.float32}
    assert {weight.dtype for weight in head.parameters()} == {torch.bfloat16} and hasattr(head.vision_head, "_v")


def test_the_head_is_copied_as_hosts_build_it():
    """Linear layers without a registered bias, as ComfyUI's may be, a child that is None, and a host's own forward."""

    class Bare(torch.nn.Linear):
        def __init__(self, weight):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = weight.shape[1], weight.shape[0]
            self.bias = None
            self.weight = torch.nn.Parameter(weight, requires_grad=False)

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = Bare(torch.eye(4).bfloat16())
            self.register_module("none", None)

        def forward(self, x):
            return x if self.none is None and x.dtype != torch.float32 else self.first(x)

    head = Head()
    head.forward = functools.partial(Head.forward, head)
    copied = in_float32(head, torch.device("cpu"))
    x = torch.rand(2, 4)
    assert torch.equal(copied(x), x) and copied.none is None and copied.first.bias is None
    assert in_float32(copied, torch.device("cpu")) is copied


def test_eager_attention_gives_the_same(run: TokenLogits):
    model, tokenizer = tiny_janus()
    model.model.language_model.set_attn_implementation("eager")
    assert close(JanusSampler(model, tokenizer).sample(PROMPTS, seeds=SEEDS), run)


# --- randomness and batches -------------------------------------------------------------------------------------------


def test_batch_is_its_singles(sampler: JanusSampler, run: TokenLogits):
    lengths = [len(prompt_ids(sampler.tokenizer, prompt)) for prompt in PROMPTS]
    assert lengths[0] != lengths[1]
    for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS)):
        assert close(sampler.sample([prompt], seeds=[seed]), run, slice(row, row + 1))


def test_order_of_a_batch_does_not_matter(sampler: JanusSampler, run: TokenLogits):
    swapped = sampler.sample(PROMPTS[::-1], seeds=SEEDS[::-1])
    assert torch.equal(swapped.tokens.flip(0), run.tokens)
    assert torch.allclose(swapped.logits.flip(0), run.logits, rtol=0, atol=1e-4)


def test_runs_repeat_and_leave_the_global_generator_alone(sampler: JanusSampler, run: TokenLogits):
    before = torch.get_rng_state()
    again = sampler.sample(PROMPTS, seeds=SEEDS)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(again, run)
    torch.rand(1)
    assert same(sampler.sample(PROMPTS, seeds=SEEDS), run)
    assert not torch.equal(sampler.sample(PROMPTS, seeds=[4, 5]).tokens, run.tokens)


# --- edits ------------------------------------------------------------------------------------------------------------


def test_edit_of_nothing_and_of_everything(sampler: JanusSampler, run: TokenLogits):
    nothing = sampler.sample(PROMPTS, seeds=[8, 9], previous=run, resample=torch.zeros(N, dtype=torch.bool))
    assert same(nothing, run)
    other = sampler.sample(PROMPTS, seeds=[8, 9])
    everything = sampler.sample(PROMPTS, seeds=SEEDS, previous=other, resample=torch.ones(2, N, dtype=torch.bool))
    assert same(everything, run)


@pytest.mark.parametrize("first", [0, 1, 5, N - 1])
def test_edit_with_the_same_settings_is_the_same_run(sampler: JanusSampler, run: TokenLogits, first: int):
    resample = torch.zeros(2, N, dtype=torch.bool)
    resample[0, first::2] = True
    resample[1, first] = True
    assert close(sampler.sample(PROMPTS, seeds=SEEDS, previous=run, resample=resample), run)


def test_edit_keeps_what_it_is_told_to_and_feeds_it_forward(sampler: JanusSampler, run: TokenLogits):
    tokens, logits = run.tokens.clone(), run.logits.clone()
    resample = torch.zeros(N, dtype=torch.bool)
    resample[[4, 6, 9]] = True
    edited = sampler.sample(PROMPTS, seeds=[8, 9], previous=run, resample=resample)
    assert torch.equal(edited.tokens[:, ~resample], run.tokens[:, ~resample])
    assert torch.equal(edited.logits[:, ~resample], run.logits[:, ~resample])
    assert not torch.equal(edited.tokens, run.tokens)
    assert torch.equal(run.tokens, tokens) and torch.equal(run.logits, logits)
    # The last resampled position reads exactly the tokens that stand before it in the result.
    again = sampler.sample(PROMPTS, seeds=[8, 9], previous=edited, resample=torch.arange(N) == 9)
    assert close(again, edited)


def test_edit_that_does_not_fit_is_refused(sampler: JanusSampler, run: TokenLogits):
    everything = torch.ones(N, dtype=torch.bool)

    def edit(match: str, previous: TokenLogits | None = run, resample: object = everything, prompts=PROMPTS):
        with pytest.raises(ValueError, match=match):
            sampler.sample(prompts, seeds=SEEDS[: len(prompts)], previous=previous, resample=resample)

    edit("previous is missing", previous=None)
    edit("resample is missing", resample=None)
    edit(r"bool tensor \[16\] or \[2, 16\]", resample=torch.ones(4, 4, dtype=torch.bool))
    edit("got torch.float32", resample=torch.ones(N))
    edit("got True", resample=True)
    edit("2 x 8", previous=TokenLogits(run.logits, run.tokens, (2, 8)))
    other = Codebook(sampler.codebook.vectors.flip(0)).fingerprint
    edit("another codebook", previous=TokenLogits(run.logits, run.tokens, run.grid, codebook=other))
    more = torch.cat([run.logits, run.logits], dim=2)
    edit("128 codes", previous=TokenLogits(more, run.tokens, run.grid))
    edit("cosine", previous=TokenLogits(run.logits, run.tokens, run.grid, source="proxy"))
    edit("as they were sampled", previous=TokenLogits(run.logits, run.tokens, run.grid, calibrated=True))
    edit("1 prompts cannot edit 2", prompts=PROMPTS[:1])


def test_a_picture_is_edited_by_its_calibrated_proxies(sampler: JanusSampler, run: TokenLogits):
    proxies = TokenLogits(run.logits, run.tokens, run.grid, source="proxy", calibrated=True)
    resample = torch.zeros(N, dtype=torch.bool)
    resample[5:9] = True
    edited = sampler.sample(PROMPTS, seeds=SEEDS, previous=proxies, resample=resample)
    assert torch.equal(edited.logits[:, ~resample], run.logits[:, ~resample])
    torch.testing.assert_close(edited.tokens, run.tokens)  # The same prompts, seeds and context: the same draw.
    assert edited.source == "vlm" and not edited.calibrated


# --- steps ------------------------------------------------------------------------------------------------------------


def test_progress_names_every_position(sampler: JanusSampler, run: TokenLogits):
    seen = []
    sampler.sample(
        PROMPTS,
        seeds=SEEDS,
        parallel=1,
        on_progress=lambda p: seen.append((p.done, p.total, p.tokens.clone(), p.known.clone())),
    )
    assert [(done, total) for done, total, _, _ in seen] == [(i + 1, N) for i in range(N)]
    for done, _, tokens, known in seen:
        assert torch.equal(known, (torch.arange(N) < done).expand(2, N))
        assert torch.equal(tokens[known], run.tokens[known])
    seen.clear()
    resample = (torch.arange(N) == 3) | (torch.arange(N) == 6)
    sampler.sample(
        PROMPTS,
        seeds=SEEDS,
        previous=run,
        resample=resample,
        parallel=1,
        on_progress=lambda p: seen.append((p.done, p.known[0].tolist())),
    )
    assert [done for done, _ in seen] == [4, 5, 6, 7]
    kept = [(~resample | (torch.arange(N) < done)).tolist() for done, _ in seen]
    assert [known for _, known in seen] == kept, "what an edit keeps is known from the start"


def test_progress_may_stop_the_run(sampler: JanusSampler, run: TokenLogits):
    class Stop(Exception):
        pass

    steps = []

    def stop(progress: Progress) -> None:
        steps.append(progress.done)
        if progress.done == 3:
            raise Stop

    with pytest.raises(Stop):
        sampler.sample(PROMPTS, seeds=SEEDS, on_progress=stop)
    assert steps == [1, 2, 3]
    assert same(sampler.sample(PROMPTS, seeds=SEEDS), run)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"temperature": -0.5}, "temperature must be a finite number in 0.001..1,000.0, got -0.5: or 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"guidance": float("inf")}, "guidance must be a finite number in -1,000.0..1,000.0, got inf"),
        ({"guidance": "5"}, "guidance"),
        ({"guidance": -1e300}, "guidance must be .*, got -1e"),
        ({"temperature": 1e-320}, "temperature must be .*, got 1e-320"),
        ({"temperature": 1e300}, "temperature must be .*, got 1e"),
        ({"top_k": -1}, "top_k must be a whole number >= 0, got -1"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_options_out_of_range_are_refused(values: dict, match: str):
    with pytest.raises(ValueError, match=match):
        SamplingOptions(**values)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"prompts": [], "seeds": []}, "empty"),
        ({"prompts": "red", "seeds": [1, 2, 3]}, "list"),
        ({"prompts": ["red", "green"], "seeds": [1]}, "2 prompts came with 1 seeds"),
        ({"prompts": [" \n"], "seeds": [1]}, "blank"),
    ],
)
def test_request_that_makes_no_sense_is_refused(sampler: JanusSampler, arguments: dict, match: str):
    with pytest.raises(ValueError, match=match):
        sampler.sample(**arguments)


def test_nan_names_its_step():
    model, tokenizer = tiny_janus()
    sampler = JanusSampler(model, tokenizer)
    token = int(sampler.sample(["red"], seeds=[0], options=SamplingOptions(temperature=0)).tokens[0, 0])
    with torch.no_grad():
        model.model.generation_embeddings.weight[token] = float("nan")
    with pytest.raises(ValueError, match=r"step 2 of 16 .* float32"):
        sampler.sample(["red"], seeds=[0], options=SamplingOptions(temperature=0))


def test_unknown_words(sampler: JanusSampler):
    assert sampler.unknown_words("a purple circle, on Mars and purple") == ["purple", "Mars"]
    assert sampler.unknown_words(PROMPTS[0]) == []


# --- loading ----------------------------------------------------------------------------------------------------------


def test_folder_loads_and_samples_the_same(folder: Path, run: TokenLogits):
    before = torch.get_rng_state()
    loaded = JanusSampler.load(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert close(loaded.sample(PROMPTS, seeds=SEEDS), run)
    own = tiny_janus()[0].state_dict()
    assert all(torch.equal(weight, own[name]) for name, weight in loaded.model.state_dict().items())
    assert loaded.name == "Janus-Tiny"
    assert not hasattr(loaded.model.model, "vision_model")


def test_folder_loads_in_a_chosen_dtype(folder: Path):
    loaded = JanusSampler.load(folder, dtype=torch.bfloat16)
    assert loaded.model.model.language_model.embed_tokens.weight.dtype == torch.bfloat16
    assert loaded.sample(["red"], seeds=[0]).logits.dtype == torch.float32


def test_on_a_cpu_the_layers_share_threads_and_what_they_read(folder: Path):
    sampler = JanusSampler.load(folder)
    language = sampler.model.model.language_model
    reader = LlamaReader(language, torch.zeros(1, dtype=torch.int64), 4)
    together = [part for parts in reader.layers for part in parts if isinstance(part, FusedLinear)]
    assert len(together) == 4 * len(language.layers)
    assert all(part.parts is not None for part in together)
    assert [len(part.layers) for part in together[:4]] == [3, 1, 2, 1]
    own = tiny_janus()[0].state_dict()
    assert all(torch.equal(weight, own[name]) for name, weight in sampler.model.state_dict().items())


@pytest.mark.parametrize("told", [{"dtype": torch.bfloat16}, {"computes_on": "cuda"}])
def test_elsewhere_each_has_its_own(folder: Path, told: dict):
    weights = JanusSampler.load(folder, **told).model.state_dict().values()
    assert all(weight.is_contiguous() for weight in weights)


@pytest.mark.parametrize("resident", [False, True])
def test_a_host_says_whether_its_layers_must_be_called(folder: Path, resident: bool):
    called = []

    class Own(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            called.append(self)
            return super().forward(x)

    sampler = JanusSampler.load(folder)
    layers = [part for part in sampler.model.model.language_model.modules() if type(part) is torch.nn.Linear]
    for layer in layers:
        layer.__class__ = Own
    sampler.sample(["red"], seeds=[0], weights_resident=resident)
    assert set(called) == (set() if resident else set(layers))


def test_int8_is_for_the_layers_alone(folder: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def rounded(module: torch.nn.Module, device: str) -> None:
        calls.append(device)
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.data.zero_()

    monkeypatch.setattr(autoregressive, "store_in_int8", rounded)
    move = JanusForConditionalGeneration.to
    monkeypatch.setattr(JanusForConditionalGeneration, "to", lambda model, *to: calls.append("all") or move(model, *to))
    changed = JanusSampler.load(folder, int8=True).model.state_dict()
    assert calls == ["cpu", "all"]  # A device that the whole model is moved to before has to hold it.
    own = tiny_janus()[0].state_dict()
    touched = {name for name, weight in changed.items() if not torch.equal(weight, own[name])}
    assert touched == {n for n in own if ".language_model.layers." in n and n.endswith("_proj.weight")}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_int8_reads_the_layers_matrices_in_the_dtype_of_their_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype
):
    """A whole 7B model in float32 is 26 GB, twice its file, and a quarter of that once it is rounded."""
    copy = Path(shutil.copytree(folder, tmp_path / "Janus-Tiny"))
    weights = {name: value.to(stored) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    whole, came = JanusSampler.load(copy), {}
    monkeypatch.setattr(autoregressive, "store_in_int8", lambda module, device: came.update(module.named_parameters()))
    small = JanusSampler.load(copy, int8=True)
    own = {name: whole.model.model.language_model.layers.get_parameter(name) for name in came}
    assert {name: value.dtype for name, value in came.items()} == {
        name: stored if name.endswith("_proj.weight") else torch.float32 for name in own
    }
    assert all(torch.equal(value.float(), own[name]) for name, value in came.items())
    layers = "model.language_model.layers."
    others = {name: value for name, value in small.model.state_dict().items() if not name.startswith(layers)}
    assert all(torch.equal(value, whole.model.state_dict()[name]) for name, value in others.items())
    assert {value.dtype for value in others.values()} == {torch.float32}
    assert small.fingerprint == f"{whole.fingerprint} in int8"
    came.clear()
    JanusSampler.load(copy, int8=True, dtype=torch.bfloat16)
    assert {value.dtype for value in came.values()} == {torch.bfloat16}, "a file of more bits is narrowed as ever"


def test_int8_samples(folder: Path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    sampler = JanusSampler.load(folder, int8=True)
    assert sampler.sample(["red"], seeds=[0]).logits.isfinite().all()
    assert sampler.fingerprint == f"{JanusSampler.load(folder).fingerprint} in int8"


def test_loader_names_missing_and_unexpected_weights(folder: Path, tmp_path: Path):
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    weights["model.stray.weight"] = weights.pop("model.generation_head.proj_out.weight")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"missing: model\.generation_head\.proj_out\.weight; unexpected: model\.stray\.weight"
    ):
        JanusSampler.load(broken)
    weights["model.generation_head.proj_out.weight"] = weights.pop("model.stray.weight")[:5].clone()
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"wrong shape: model\.generation_head\.proj_out\.weight is \[5, 32\], expected \[32, 32\]"
    ):
        JanusSampler.load(broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="expected one .safetensors file or pytorch_model.bin"):
        JanusSampler.load(broken)


def test_loader_refuses_other_folders(folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        JanusSampler.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no config\.json"):
        JanusSampler.load(tmp_path)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="'llama', expected 'janus' or 'multi_modality': choose a folder"):
        JanusSampler.load(other)
    (other / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read as a model's configuration"):
        JanusSampler.load(other)
