"""The benchmarks run, compare equal things, and say what they did not measure; their numbers are not tested."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    __main__,
    decoder,
    flux,
    growth,
    guidance,
    int8,
    lcdm,
    memory,
    noise,
    parallel,
    parallel_llamagen,
    pass_cost,
    products,
    rounding,
    sampler,
    timing,
)
from benchmarks.peak import Peak, peak
from benchmarks.targets import Target, verdicts
from dcdd_core.method.flow import resolution_shift, timesteps
from dcdd_core.method.lcdm import map_logits
from dcdd_core.models.backbones.flux_fill.backbone import FluxFill
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.models.janus.sampler import JanusSampler
from dcdd_core.models.vae import KLCodec
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.pipelines.load import Models
from dcdd_core.types import Codebook, TokenLogits
from tests.tiny import save_janus, tiny_condition, tiny_decoder, tiny_flux_config, tiny_janus, tiny_vae, tiny_vq


@pytest.mark.parametrize("theirs", [lcdm.plain, lcdm.largest])
def test_lcdm_as_written_is_ours(theirs):
    draw = torch.Generator().manual_seed(0)
    codebook, logits = Codebook(torch.randn(300, 8, generator=draw)), 3 * torch.randn(2, 4, 300, generator=draw)
    c, u = theirs(logits, codebook.vectors)
    ours = map_logits(TokenLogits(logits, logits.argmax(-1), (2, 2)), codebook)
    torch.testing.assert_close(ours.code_vectors, c)
    torch.testing.assert_close(ours.uncertainty, u, rtol=1e-4, atol=1e-5)


def test_peak_counts_what_is_held_at_once():
    def held() -> None:
        for _ in range(3):
            torch.zeros(1000)
        kept = torch.zeros(1000), torch.zeros(500)
        del kept

    assert 6000 <= peak(held, False) < 7000
    with torch.device("meta"), Peak() as counted:
        held()
    assert counted.peak == 6000


def test_sampler_contest_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampler, "PROMPT", "a red circle")
    ours = JanusSampler(*tiny_janus())
    ours.model.model.vision_model.config.num_image_tokens = 16
    found = sampler.contest("tiny", ours.model, ours, 2, 1)
    assert [len(row) for row in found] == [len(sampler.HEAD)] * 4
    ids = torch.tensor([sampler.prompt_ids(ours.tokenizer, "a red circle")])
    assert sampler.generate(ours.model, ids, 1)().shape == (1, 16)
    assert sampler.deepseek(ours.model, ids, 1, 16)().shape == (1, 16)


def test_every_contestant_guides_and_draws_as_many_tokens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampler, "PROMPT", "a red circle")
    contestants, rows = {}, []
    monkeypatch.setattr(sampler, "compared", lambda what, functions, rounds: contestants.update(functions) or [])
    ours = JanusSampler(*tiny_janus())
    ours.model.model.vision_model.config.num_image_tokens = 16
    language, head = ours.model.model.language_model, ours.model.model.generation_head
    # Where all of them come through, and what they copy with the model.
    activation = language.layers[-1].mlp.act_fn
    activation.register_forward_pre_hook(lambda _, args: rows.append(args[0].numel() // args[0].shape[-1]))
    head.register_forward_pre_hook(lambda _, args: rows.append(("drawn from", len(args[0]))))
    sampler.contest("tiny", ours.model, ours, 2, 1)
    assert len(contestants) == 4
    together = contestants.pop("ours, with all logits kept")()
    assert torch.equal(together.tokens, contestants["ours, one token a pass"]().tokens)
    for name, run in contestants.items():
        rows.clear()
        run()
        # The prompt is read first: by ours its two different rows, by the others all four.
        assert rows[0] == (2 if name == "ours, one token a pass" else 4) * 9, name
        assert rows[1:] == [("drawn from", 4), *[4, ("drawn from", 4)] * 15], name


def test_many_tokens_a_pass_are_fewer_passes_and_the_same_tokens(monkeypatch: pytest.MonkeyPatch):
    tiny = JanusSampler(*tiny_janus())
    monkeypatch.setattr(parallel, "load_pico", lambda: SimpleNamespace(sampler=tiny))
    facts = [SimpleNamespace(caption=lambda: "a red circle")] * 4
    monkeypatch.setattr(parallel, "scene_facts", lambda split, count: facts[:count])
    monkeypatch.setattr(parallel, "GUIDANCES", (3.0,))
    found = parallel.rows(captions=4, rounds=1)
    assert {len(row) for row in found} == {len(parallel.HEAD)}
    assert len(found) == len(parallel.BATCHES) * (len(parallel.WINDOWS) + 1)
    for row in found:
        cells = dict(zip(parallel.HEAD, row))
        assert cells["tokens that differ"] == "0" and 1 <= float(cells["passes"]) <= 16
        assert float(cells["fewer"]) == pytest.approx(16 / float(cells["passes"]), abs=0.02)
        assert cells["window"] != "1" or (cells["passes"], cells["of one by one"]) == ("16.0", "1.00")
    assert float(dict(zip(parallel.HEAD, found[9]))["passes"]) < 16


def test_llamagen_is_measured_in_the_same_way_at_its_own_guidance(monkeypatch: pytest.MonkeyPatch):
    tiny = JanusSampler(*tiny_janus())
    tiny.default_guidance = 2.5
    loaded = []
    monkeypatch.setattr(parallel_llamagen, "load_pico", lambda vlm: loaded.append(vlm) or SimpleNamespace(sampler=tiny))
    monkeypatch.setattr(
        parallel, "scene_facts", lambda split, count: [SimpleNamespace(caption=lambda: "a red circle")] * count
    )
    found = parallel_llamagen.rows(captions=4, rounds=1)
    assert loaded == ["llamagen"] and {row[0] for row in found} == {"2.5, 1", "2.5, 4"}
    assert [row[1] for row in found[:6]] == ["1", "4", "8", "12", "16", "chosen by rows and device"]
    assert {row[-1] for row in found} == {"0"} and float(found[3][2]) < 16


def test_rounding_is_compared_up_to_the_first_other_token():
    def held(tokens: list[int], logits: list[list[float]]) -> TokenLogits:
        return TokenLogits(torch.tensor([logits]), torch.tensor([tokens]), (1, len(tokens)))

    even, odd = [0.0, 0.0], [0.0, 3**0.5]
    one, other = held([0, 1, 1], [even, even, even]), held([0, 0, 1], [odd, even, odd])
    p, q = 0.5, 1 / (1 + torch.tensor(3**0.5).exp())
    first = p * torch.log(p / q) + p * torch.log(p / (1 - q))
    assert rounding.divergence(one, other) == pytest.approx(float(first / 2), rel=1e-5)
    assert rounding.divergence(one, one) == 0
    row = rounding.compared("a", [one, one], [other, one])
    assert row == ("a", "2", "1", "0.167", f"{float(first / 4):.2g}")


def test_rounding_shows_in_half_precision_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(rounding, "model_paths", lambda: {"vlm": save_janus(tmp_path / "janus")})
    monkeypatch.setattr(rounding, "scene_facts", lambda *_: [SimpleNamespace(caption=lambda: "a red circle")] * 3)
    found = [dict(zip(rounding.HEAD, row)) for row in rounding.rows()]
    divergences = [float(row["KL up to the first, nats a token"]) for row in found]
    assert found[0]["tokens that differ"] == "0" and divergences[0] < 1e-6
    assert min(divergences[1:]) > 1e-6


def test_reread_logits_are_the_models_own():
    ours = JanusSampler(*tiny_janus())
    run = ours.sample(["red"], seeds=[0])
    torch.testing.assert_close(int8.reread(ours, run, ["red"]).logits, run.logits, rtol=0, atol=1e-4)
    model, words = tiny_janus()
    model.model.generation_head.vision_head.weight.data.neg_()
    other = int8.reread(JanusSampler(model, words), run, ["red"])
    assert torch.equal(other.tokens, run.tokens) and not torch.allclose(other.logits, run.logits, atol=0.1)


def test_float8_is_diffusers_and_its_error_shows():
    plain, cast = (tiny_decoder().to(torch.bfloat16) for _ in range(2))
    int8.cast_by_layer(cast)
    assert cast.transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    assert cast.transformer.x_embedder.weight.dtype == torch.bfloat16
    errors, seconds = int8.compare_decoders([plain, cast], tiny_condition())
    assert errors[1] == "0" and 0 < float(errors[2]) < 0.2 and len(seconds) == 3


def test_int8_is_compared_where_torchao_is(monkeypatch):
    first, second = JanusSampler(*tiny_janus()), JanusSampler(*tiny_janus())
    monkeypatch.setattr(int8, "PROMPT", "a red circle")
    found = int8.compare(first, second, first.sample(["a red circle"] * 2, seeds=range(2)))
    assert {len(row) for row in found} == {len(int8.HEAD)} and all(row[1] == row[2] for row in found[:6])
    assert abs(float(found[6][2])) < 1e-5
    monkeypatch.setattr(int8, "find_spec", lambda name: None)
    assert [len(row) for row in int8.rows()] == [len(int8.HEAD)]


def test_decoder_contest_runs():
    small = decoder.Shape(heads=1, steps=1)
    found = decoder.contest(small, rounds=1)
    assert [row[:2] for row in found] == [(str(small), who) for who in ("ours", "diffusers")]
    assert [len(row) for row in found] == [len(decoder.HEAD)] * 2
    assert found[0][3] == found[0][5] == "1.00" and float(found[1][5]) > 1  # ours holds no text stream


def test_the_baseline_is_diffusers_pipeline_with_512_text_tokens_and_our_times():
    config = {**flux.FLUX_FILL_CONFIG, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}
    transformer = flux.random_transformer(config, device="cpu", dtype=torch.float32)
    seen = []

    def watch(module, args, kwargs):
        image, text = (tuple(kwargs[name].shape) for name in ("hidden_states", "encoder_hidden_states"))
        seen.append((image, text, kwargs["timestep"].item()))

    transformer.register_forward_pre_hook(watch, with_kwargs=True)
    assert decoder.by_diffusers(transformer, 3)().shape == (1, 576, 64)
    assert [(image, text) for image, text, _ in seen] == [((1, 576, 384), (1, 512, 4096))] * 3
    assert [t for *_, t in seen] == pytest.approx(timesteps(3, shift=resolution_shift(576))[:-1].tolist(), rel=1e-6)


def test_random_weights_are_the_same_for_both_and_held_in_every_way():
    config = tiny_flux_config()
    transformer = flux.random_transformer(config, device="cpu", dtype=torch.float32)
    ours = flux.random_decoder(flux.card_of(config), dtype=torch.float32)
    theirs = transformer.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.transformer.state_dict().items())
    before = decoder.held(ours)
    ours.prepare([1.0, 0.5])
    # Modulations of a joint block, of a single one, and of the end.
    assert decoder.held(ours) == before + 2 * 4 * 32 * (6 + 3 + 2)
    whole = DistributionConditionedDecoder(FluxFill(transformer), ours.card)
    whole.adapter = ours.adapter
    given = torch.randn(1, 4, config["in_channels"]).split([64, config["in_channels"] - 64], dim=2)
    t = torch.tensor([0.5])
    with torch.no_grad():
        one, two = (model(*given, torch.zeros(1, 4, 32), t, (4, 4)) for model in (ours, whole))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    streamed = flux.random_decoder(flux.card_of(config), dtype=torch.float32, streamed=True)
    assert all(torch.equal(weight, theirs[name]) for name, weight in streamed.transformer.state_dict().items())


def test_the_published_shape_takes_little_more_than_half_of_diffusers():
    found = decoder.counted()
    assert float(found[1][3]) > 1.8
    kept = [line for line in verdicts([(decoder, found)]).splitlines() if "| met |" in line]
    assert len(kept) == 1 and "counted, ours | peak memory, GB / diffusers | at most 0.56 |" in kept[0]


def test_memory_s_rows_are_a_table_of_its_own(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "JANUS_PRO", {"Janus-Pro-1B": memory.JANUS_PRO["Janus-Pro-1B"]})
    monkeypatch.setattr("sys.argv", ["benchmarks", "memory"])
    __main__.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[2] == "| model | weights | GB, computed | GB, measured |"
    assert "| Janus-Pro-1B, sampling | bfloat16 | 3.0 | - |" in printed
    assert "| LlamaGen-XL, sampling, without its text encoder | bfloat16 | 1.6 | - |" in printed
    assert "| flan-t5-xl's encoder, for LlamaGen and BIGFix | bfloat16 | 2.4 | - |" in printed
    assert "| FLUX.1-Fill transformer, for inference | bfloat16 | 12.9 | - |" in printed
    steps = [row for row in memory.step_rows() if "one step" in row[0]]
    computed = {way: float(size) for _, way, size, _ in steps}
    assert 12.9 < computed["bfloat16"] < 13.5 and 6.5 < computed["8-bit"] < 7.2
    assert computed["8-bit, streamed"] < computed["streamed"] < 1
    if not torch.cuda.is_available():
        assert {row[3] for row in steps} == {timing.NOT_MEASURED}


def test_the_cost_of_guidance_is_counted_and_measured():
    codec, tokenizer = KLCodec(tiny_vae().requires_grad_(False).to("meta")), VQTokenizer(tiny_vq().to("meta"))
    flops, whole = guidance.gradient_cost(codec, tokenizer, 64)
    more, tiled = guidance.gradient_cost(codec, tokenizer, 64, tile=8)
    assert flops < more < 3 * flops and tiled < 0.8 * whole  # once more forwards, and where tiles overlap
    # Forwards, and backwards to the input alone: weights are frozen. Attention's way back takes more.
    decoded, read = flops_of(codec.model.decode, (1, 16, 32, 32)), flops_of(tokenizer.features, (1, 3, 16, 16))
    assert 2 * (decoded + read) <= flops < 2.5 * (decoded + read)
    row = guidance.counted(tiny_flux_config(), codec, tokenizer, 64, 8, name="tiny")
    assert len(row) == len(guidance.HEAD) and row[0] == "tiny, 64 px, TFLOP" and row[5] == "8"
    assert guidance.step_flops(tiny_flux_config(), 64, factor=2) > guidance.step_flops(tiny_flux_config(), 32, factor=2)
    models = Models(
        tokenizer=VQTokenizer(tiny_vq()), codec=KLCodec(tiny_vae().requires_grad_(False)), decoder=tiny_decoder()
    )
    row = guidance.measured(models, torch.zeros(1, 3, 16, 16), 4, name="tiny", steps=1, rounds=1)
    assert len(row) == len(guidance.HEAD) and 0 < float(row[7]) < 1


def flops_of(function, shape):
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        function(torch.zeros(shape, device="meta"))
    return counted.get_total_flops()


def test_growth_is_drawn(tmp_path: Path):
    growth.draw([("a", "b", {1: 1.0, 2: 3.0}), ("c", "d", {1: 1.0})], tmp_path / "new" / "growth.png")
    assert (tmp_path / "new" / "growth.png").stat().st_size > 1000


def test_table_and_rounds(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    calls = []
    seconds = timing.alternating({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3 and [len(taken) for taken in seconds.values()] == [2, 2]
    monkeypatch.setattr(lcdm, "rows", lambda: [("x", "1", "2", "3")])
    monkeypatch.setattr("sys.argv", ["benchmarks", "lcdm", "timing"])
    __main__.main()
    printed = capsys.readouterr().out
    assert "### LCDM" in printed and "| x | 1 | 2 | 3 |" in printed and "| not measured |" in printed
    assert printed.count("###") == 2


def test_the_file_holds_what_was_printed_and_what_measured_it(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(noise, "rows", lambda: [("1", "2", "3")])
    monkeypatch.setattr("sys.argv", ["benchmarks", "noise", "--out", str(tmp_path / "new" / "bench.md")])
    __main__.main()
    written = (tmp_path / "new" / "bench.md").read_text("utf-8")
    assert capsys.readouterr().out.strip() in written and "| 1 | 2 | 3 |" in written
    about = written.splitlines()[2]
    assert (
        "`python -m benchmarks noise` on " in about or "`DCDD_BENCH_CLOCK=cpu python -m benchmarks noise` on" in about
    )
    assert f"{torch.get_num_threads()} threads, torch {torch.__version__}" in about and str(tmp_path) not in written


@pytest.mark.parametrize(
    ("cells", "verdict"),
    [
        (("3.1", "0.2", "0.25"), ["3.1 | met", "0.8 | MISSED"]),
        (("2.9", "0.1", "0.25"), ["2.9 | MISSED", "0.4 | met"]),
        ((timing.NOT_MEASURED, "-", "0.25"), ["| not measured", "| not measured"]),
    ],
)
def test_verdicts_follow_the_numbers(cells: tuple[str, ...], verdict: list[str]):
    faster = Target(row=("a", "theirs"), column="times ours", relation="at least", bound=3.0, source="chosen")
    near = Target(
        row=("a", "ours"), column="seconds", baseline=("a", "limit"), relation="at most", bound=0.5, source="b"
    )
    benchmark = SimpleNamespace(HEAD=("what", "who", "seconds", "times ours"), TARGETS=(faster, near))
    rows = [("a", "ours", cells[1], "1.00"), ("a", "theirs", "9", cells[0]), ("a", "limit", cells[2], "-")]
    lines = verdicts([(benchmark, rows), (SimpleNamespace(HEAD=("x",)), [("1",)])]).splitlines()[2:]
    assert len(lines) == 2 and all(words in line for words, line in zip(verdict, lines))
    assert "at most 0.5" in lines[1] and "seconds / limit" in lines[1]
    absent = verdicts([(benchmark, [])]).splitlines()[2:]
    assert [line.count("not measured") for line in absent] == [1, 1]


def test_targets_are_of_columns_that_there_are():
    assert all(
        target.column in module.HEAD
        for module in (decoder, guidance, lcdm, parallel, sampler)
        for target in module.TARGETS
    )


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter: str, key: str, words: str):
    """Random123's kat_vectors."""
    start = [torch.tensor([int(word, 16)]) for word in counter.split()]
    drawn = noise.philox(start, tuple(int(word, 16) for word in key.split()))
    assert " ".join(f"{int(word):08x}" for word in drawn) == words


def test_philox_noise_is_gumbel_and_a_function_of_its_key():
    drawn = noise.philox_noise([3, 4], range(8), 4096)
    assert drawn.shape == (2, 8, 4096) and drawn.dtype == torch.float32 and bool(torch.isfinite(drawn).all())
    # Mean: Euler's constant; variance: pi**2 / 6.
    assert float(drawn.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(drawn.var()) == pytest.approx(1.6449, abs=0.05)
    assert torch.equal(drawn[1:, 5:6], noise.philox_noise([4], [5], 4096))
    assert len(drawn.unique()) > 0.99 * drawn.numel()


def test_noise_is_measured():
    found = [dict(zip(noise.HEAD, row, strict=True)) for row in noise.rows(sizes=((1, 1), (2, 3)), codes=64, rounds=1)]
    assert [row["images, positions"] for row in found] == ["1, 1", "1, 1", "2, 3", "2, 3"]
    assert found[0]["times ours"] == found[2]["times ours"] == "1.00" and all(float(row["ms"]) > 0 for row in found)


def test_the_cost_of_a_pass_is_measured_and_an_image_s_predicted(monkeypatch: pytest.MonkeyPatch):
    tiny = JanusSampler(*tiny_janus())
    monkeypatch.setattr(pass_cost, "PROMPT", "a red circle")
    monkeypatch.setattr(pass_cost, "load_pico", lambda: SimpleNamespace(sampler=tiny))
    facts = [SimpleNamespace(caption=lambda: "a red circle")] * 2
    monkeypatch.setattr(pass_cost, "scene_facts", lambda split, count: facts[:count])
    monkeypatch.setattr(pass_cost, "with_random_weights", lambda name, device, dtype: tiny)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(pass_cost, "bandwidth", lambda: 1e6)
    monkeypatch.setattr(pass_cost, "clock", iter(range(10**6)).__next__)
    found = [dict(zip(pass_cost.HEAD, row, strict=True)) for row in pass_cost.rows((1, 4), captions=2, rounds=1)]
    cpu, gpu = found[:4], found[4:]
    assert [row["window"] for row in found] == ["1", "4"] * 4
    for row in cpu:
        assert row["seconds a pass"] == "1"
        passes = float(row["passes an image, as pico"])
        assert float(row["seconds an image, predicted"]) == pytest.approx(passes, abs=0.5)
        assert passes == 16 if row["window"] == "1" else passes < 16
    head = sum(4 * weight.numel() for weight in tiny.model.model.generation_head.parameters())
    layers = sum(weight.numel() for weight in tiny.model.model.language_model.layers.parameters())
    for row, size in zip(cpu[::2], (4, 2)):
        assert float(row["limit"]) == pytest.approx((size * layers + head) / 1e6, rel=0.01)
    for row in gpu:
        assert row["seconds a pass"] == timing.NOT_MEASURED and row["seconds an image, predicted"] == "-"
    assert gpu[0]["passes an image, as pico"] == "576" and float(gpu[1]["passes an image, as pico"]) < 576
    # 7B's layers are 12.1 GB in bfloat16, and its head 0.34 in float32.
    assert float(gpu[2]["limit"].split()[0]) == pytest.approx(12.48e9 / sampler.H100_BYTES, rel=0.01)


def test_timed_passes_leave_out_the_prompt_s_and_the_recorded_one():
    tiny, seen = JanusSampler(*tiny_janus()), []
    sample = tiny.sample
    tiny.sample = lambda prompts, on_progress, **given: sample(
        ["red"], on_progress=lambda now: (seen.append(now.passes), on_progress(now)), **given
    )
    assert len(pass_cost.seconds_of_passes(tiny, 1, count=3)) == 3 and seen == [1, 2, 3, 4, 5]


def test_random_weights_of_a_published_shape_are_those_that_sampling_reads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(memory.JANUS_PRO, "Janus-Pro-1B", (64, 96, 1, 2))
    monkeypatch.setattr(pass_cost, "PROMPT", "red")
    made = pass_cost.with_random_weights("Janus-Pro-1B", "cpu", torch.bfloat16)
    assert made.grid == (24, 24) and made.codebook.size == 16384
    assert len(pass_cost.seconds_of_passes(made, 4, count=2)) == 2
    assert made.model.model.vision_model.embeddings.patch_embedding.weight.is_meta


def test_products_are_the_same_in_every_way():
    ours, *others = [product() for product in products.products(64, 128, 5).values()]
    assert [tuple(made.shape) for made in ours] == [(5, 192), (5, 64), (5, 256), (5, 64)] * 2
    for made in others:
        torch.testing.assert_close(made, ours, rtol=1e-4, atol=1e-5)
    found = products.rows(["pico"], [2], rounds=1)
    assert found[0][:2] == ("pico, 2", "ours") and {len(row) for row in found} == {len(products.HEAD)}
