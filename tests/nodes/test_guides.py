"""What guidance does in ComfyUI that no graph shows: weights of inference mode, and memory that runs out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch

from dcdd_core.models.bundle import read_card
from dcdd_core.registry import load_codec
from dcdd_core.types import Calibration
from dcdd_pico.embedded import LLAMAGEN, WEIGHTS, model_paths, own_calibration
from dcdd_pico.scenes import render_scene
from tests.comfy.graphs import Graph, output
from tests.nodes.cases import FOLLOWED, GUIDED, IT, PAINT, built, of, sampler
from tests.tiny import tiny_condition


@pytest.fixture(scope="module")
def nodes(double) -> Iterator[dict[str, ModuleType]]:
    """The pack's node modules by name, with the double's modules in their places."""
    with double._modules.installed():
        start = f"{double.pack.__name__}.nodes."
        yield {name.removeprefix(start): module for name, module in sys.modules.items() if name.startswith(start)}


@pytest.mark.parametrize("buffered", [False, True])
def test_gradients_pass_weights_that_were_made_in_inference_mode(buffered, nodes):
    """What ComfyUI's memory manager moves comes out as inference tensors, of which autograd saves nothing."""
    host = nodes["host"]
    with torch.inference_mode():
        network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3), torch.nn.BatchNorm2d(1)).eval().requires_grad_(False)
        managed = host.Managed(network)
    x = torch.ones(1, 1, 3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        network(x).sum().backward()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    if buffered:  # asked for within a node, which runs in inference mode
        with torch.inference_mode():
            host.let_gradients_pass(managed)
    else:
        host.let_gradients_pass(managed)
    network(x).sum().backward()
    torch.testing.assert_close(x.grad, network[0].weight / (1 + network[1].eps) ** 0.5)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    kept = network[0].weight
    host.let_gradients_pass(managed)
    assert network[0].weight is kept, "weights that are fine are not copied again"


def test_a_copy_is_made_once_and_goes_with_its_model(nodes):
    guides = nodes["guides"]
    network = torch.nn.Linear(2, 2)
    count = len(guides._copies)
    copy = guides._copy_of(network, network, torch.device("cpu"))
    assert guides._copy_of(network, network, torch.device("cpu")) is copy and copy.idle is not network
    assert torch.equal(copy.idle.weight, network.weight)
    del network
    assert len(guides._copies) == count


@pytest.mark.parametrize("dtype, kept", [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_a_copy_in_float16_becomes_float32(dtype, kept, nodes):
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3), torch.nn.BatchNorm2d(1)).to(dtype)
    copy = nodes["host"].copied(network).idle
    assert {value.dtype for value in copy.state_dict().values() if value.is_floating_point()} == {kept}
    assert network[0].weight.dtype == dtype


def test_memory_that_runs_out_is_told_and_the_image_is_guided_all_the_same(double, nodes, monkeypatch):
    guides = nodes["guides"]
    decode, sizes = guides._Codec.decode, []

    def scarce(codec: object, latents: torch.Tensor) -> torch.Tensor:
        """Memory for the gradient of 16 latent positions a side."""
        sizes.append(max(latents.shape[2:]))
        if latents.requires_grad and sizes[-1] > 16:
            raise torch.OutOfMemoryError("out of memory")
        return decode(codec, latents)

    info = double.get("/object_info")
    graph = built(
        info,
        "DCDD_DistributionGuidance",
        GUIDED,
        {"k": sampler(IT, steps=3), "plain": sampler(of("pico model"), steps=3)},
    )
    graph.keep(of("k"), "scarce")
    graph.keep(of("plain"), "plain")
    monkeypatch.setattr(guides._Codec, "decode", scarce)
    run = double.run(graph.prompt)
    assert run.status == "success", run.error
    assert any("tiles of" in text for text in run.notices["k"]), run.notices
    guided, plain = (double.saved(name)["samples"] for name in ("scarce", "plain"))
    assert np.abs(guided - plain).mean() > 0.05


def test_guided_sampling_stops_within_a_step(double, nodes, monkeypatch):
    """The stop button between the model's prediction and the gradient."""
    guides = nodes["guides"]
    management = guides.comfy.model_management
    correct, seen = guides.TokenGuide.correct, []

    def stopping(guide: object, clean: torch.Tensor, time: float) -> torch.Tensor:
        seen.append(time)
        management.interrupt_current_processing()
        return correct(guide, clean, time)

    monkeypatch.setattr(guides.TokenGuide, "correct", stopping)
    graph = built(double.get("/object_info"), "DCDD_DistributionGuidance", GUIDED, {"k": sampler(IT, steps=5)})
    graph.add("end", "TEST_Hold", value=of("k"))
    run = double.run(graph.prompt)
    assert (run.status, run.node) == ("interrupted", "k") and len(seen) == 1


# --- what ComfyUI is told ---------------------------------------------------------------------------------------------


class Schedule:
    """sigma = exp(mu) / (exp(mu) + 1 / t - 1) as FLUX's, or that of noise added to data of the given spread."""

    def __init__(self, mu: float):
        self.mu = mu

    def percent_to_sigma(self, percent: float) -> float:
        t = 1 - percent
        return 0.0 if t == 0 else np.exp(self.mu) / (np.exp(self.mu) + 1 / t - 1)


class Exploding:
    """Of noise from 14.6 down to .03, evenly in its logarithm; data of spread .5."""

    sigma_data = 0.5

    def percent_to_sigma(self, percent: float) -> float:
        return 14.6 * (0.03 / 14.6) ** percent


@pytest.mark.parametrize(
    "mu, start, denoise", [(0.0, 0.6, 0.6), (1.15, 0.6, 0.322), (1.15, 1.0, 1.0), (3.0, 0.6, 0.0695)]
)
def test_denoise_reaches_the_start_on_a_flow_s_schedule(mu, start, denoise, nodes):
    guides = nodes["guides"]
    sampling = type("Flow", (Schedule, guides.comfy.model_sampling.CONST), {})(mu)
    assert guides.denoise_from(sampling, start) == pytest.approx(denoise, abs=2e-3)
    assert sampling.percent_to_sigma(1 - guides.denoise_from(sampling, start)) == pytest.approx(start, abs=1e-3)


def test_time_of_added_noise_counts_from_the_data_s_spread(nodes):
    guides, sampling = nodes["guides"], Exploding()
    assert guides.time_in(sampling, 0.5) == pytest.approx(0.5) and guides.time_in(sampling, 2.0) == pytest.approx(0.8)
    sigma = sampling.percent_to_sigma(1 - guides.denoise_from(sampling, 0.6))
    assert sigma / 0.5 / (1 + sigma / 0.5) == pytest.approx(0.6, abs=1e-3)


def test_every_counts_steps_of_the_schedule_and_not_predictions(double, nodes, monkeypatch):
    """A sampler that predicts twice a step, the second time between two: as Heun's or DPM's do."""
    guides, seen = nodes["guides"], []

    class Stop(Exception):
        pass

    def guides_of(self, model, denoised, options):
        raise Stop

    monkeypatch.setattr(guides.SamplerGuidance, "_guides_of", guides_of)
    monkeypatch.setattr(guides.SamplerGuidance, "_check", lambda self, denoised: None)
    sampling = type("Flow", (Schedule, guides.comfy.model_sampling.CONST), {})(0.0)
    guidance = guides.SamplerGuidance(
        tokens=None, vae=None, options=guides.GuidanceOptions(every=2), percent=(0.0, 1.0), mask=None
    )
    sigmas = torch.tensor([0.8, 0.6, 0.4, 0.2, 0.0])
    told = {"transformer_options": {"sample_sigmas": sigmas}}
    model = type("Model", (), {"model_sampling": sampling})
    for sigma in (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1):
        args = {"denoised": torch.zeros(1), "model": model, "sigma": torch.tensor([sigma]), "model_options": told}
        try:
            guidance(args)
        except Stop:
            seen.append(sigma)
    assert seen == [0.8, 0.7, 0.4, 0.3]


def test_a_copy_leaves_comfyui_s_own_state_where_it_is(nodes):
    """Native buffers in it would be freed by both."""
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    state = {"dynamic_pins": object(), "_v": object(), "_pins": {}, "weight_comfy_model_dtype": torch.float16}
    network[0].__dict__.update(state)
    copy = nodes["host"].copied(network)
    assert not set(state) & set(copy.idle[0].__dict__)
    assert all(network[0].__dict__[name] is value for name, value in state.items())
    layer = copy.idle[0]
    layer.comfy_cast_weights = True  # as a partial load leaves it
    nodes["host"].let_gradients_pass(copy)
    assert layer.comfy_cast_weights is False


def test_what_is_loaded_beside_a_model_is_told_once_and_changes_no_conditioning(nodes):
    host = nodes["host"]
    ours = host.Managed(torch.nn.Linear(1, 1))
    given = {"positive": [{"additional_models": ["theirs"]}, {}], "negative": [{}]}
    told = host.with_models(given, ours)
    assert told["positive"][0]["additional_models"] == ["theirs", ours._patcher]
    assert told["positive"][1:] == [{}] and told["negative"] == [{}]
    assert given == {"positive": [{"additional_models": ["theirs"]}, {}], "negative": [{}]}
    assert host.with_models({"positive": []}, ours) == {"positive": []}


@pytest.mark.parametrize(
    "size, tokens, most",
    [
        ((384, 384), (384, 384), 24_000 * 384**2),  # the encoder, in float32
        ((1024, 1024), (96, 96), 2178 * 4 * 1024**2),  # the decode of the whole
        ((256, 256), (96, 96), 6_000 * 4 * 256**2),  # the decoder's way back
    ],
)
def test_memory_of_a_gradient_is_that_of_its_largest_part(size, tokens, most, nodes):
    network = nodes["host"].Managed(torch.nn.Linear(1, 1))
    assert nodes["guides"].gradient_memory(size, network, 8, tokens) == most


@pytest.mark.parametrize("latents, tile", [((48, 64), None), ((65, 8), 32), ((96, 96), 32)])
def test_large_images_are_guided_in_tiles(latents, tile, nodes):
    assert nodes["guides"].tile_of(latents) == tile


def test_sampling_asks_for_the_memory_of_a_gradient_and_loads_the_copies(double, nodes):
    guides, host = nodes["guides"], nodes["host"]
    vae = guides.GuideVAE(vae=None, network=host.Managed(torch.nn.Linear(1, 1)), factor=8)
    tokenizer = host.Managed(torch.nn.Linear(1, 1))
    tokenizer._value = type("Tokenizer", (), {"factor": 8})
    tokens = type("Tokens", (), {"tokenizer": tokenizer, "condition": type("C", (), {"grid": (12, 12)})})
    asked = []

    def prepare(model, shape, conds, model_options=None):
        asked.append((shape, conds, model_options))

    model = type("P", (), {"model": type("M", (), {"memory_required": staticmethod(lambda shape: 10**7 * shape[0])})})
    for strength, more in ((0.4, round(6_000 * 4 * 256**2 / 10**7)), (0.0, 0)):
        guidance = guides.SamplerGuidance(
            tokens=tokens,
            vae=vae,
            options=guides.GuidanceOptions(strength=strength, pull=strength),
            percent=(0.0, 1.0),
            mask=None,
        )
        guidance._fallbacks[0] = guides.Fallback(alternating=True)
        guidance._prepare(prepare, model, [2, 16, 32, 32], {"positive": [{}]}, model_options="theirs")
        assert guidance._fallbacks == {}, "what was given up for want of memory was given up for one sampling"
        shape, conds, options = asked.pop()
        assert shape == [2 + more, 16, 32, 32] and options == "theirs"
        assert conds["positive"][0].get("additional_models", []) == (
            [vae.network._patcher, tokenizer._patcher] if more else []
        )


# --- values that a graph does not show --------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.2, 7.7])
def test_latents_are_sharpened_at_unit_spread(spread, nodes):
    """A VAE does not say how large its latents are: SDXL's have a spread of 7.7."""

    class Network(torch.nn.Linear):
        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            return spread * pixels / pixels.std()

    guides, network = nodes["guides"], nodes["host"].Managed(Network(1, 1))
    core = type("VAE", (), {"process_input": staticmethod(lambda image: image)})
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codec = guides.GuideVAE(vae=core, network=network, factor=8).of_unit_spread(pixels)
    raw = codec.encode(pixels)
    assert float(codec.normalize(raw).std()) == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(codec.denormalize(codec.normalize(raw)), raw)


class Encodes(torch.nn.Linear):
    """A VAE's network that makes the same latents of every image."""

    def __init__(self, latents: torch.Tensor):
        super().__init__(1, 1)
        self.latents = latents

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.latents


@pytest.mark.parametrize("latents", [torch.full((1, 4, 2, 2), 0.5), torch.zeros(1, 4, 2, 2), torch.ones(1, 1, 1, 1)])
def test_latents_without_a_spread_are_sharpened_as_they_are(latents, nodes):
    """Those of an image of one colour, or the only one of an image of a single patch."""
    guides, network = nodes["guides"], nodes["host"].Managed(Encodes(latents))
    core = type("VAE", (), {"process_input": staticmethod(lambda image: image)})
    codec = guides.GuideVAE(vae=core, network=network, factor=8).of_unit_spread(torch.zeros(1, 3, 16, 16))
    assert torch.equal(codec.normalize(latents), latents) and torch.equal(codec.denormalize(latents), latents)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [(1, 4, 2, 2), (1, 1, 1, 1)])
def test_a_vae_that_encodes_to_nan_is_named_before_anything_is_sharpened(value, shape, nodes):
    guides, network = nodes["guides"], nodes["host"].Managed(Encodes(torch.full(shape, value)))
    core = type("VAE", (), {"process_input": staticmethod(lambda image: image)})
    vae = guides.GuideVAE(vae=core, network=network, factor=8)
    with pytest.raises(ValueError, match="the connected VAE encodes an image to NaN or infinity: .* --fp32-vae"):
        vae.of_unit_spread(torch.zeros(1, 3, 16, 16))


def test_scale_is_fitted_to_the_distributions_whatever_codes_are_followed(double, nodes, monkeypatch):
    guidance, guides, scales = nodes["guidance"], nodes["guides"], {}
    followed_tokens = guidance.followed_tokens

    def recording(token_logits, vq_vae, codes, calibration):
        made = followed_tokens(token_logits, vq_vae, codes, calibration)
        scales[codes] = made.scales
        return made

    monkeypatch.setattr(guidance, "followed_tokens", recording)
    for codes in (guides.SOFT, guides.HARD):
        inputs = {**GUIDED, "codes": codes}
        graph = built(double.get("/object_info"), "DCDD_DistributionGuidance", inputs, {})
        graph.add("end", "TEST_Hold", value=IT)
        assert double.run(graph.prompt).status == "success"
    assert scales[guides.SOFT] == scales[guides.HARD] and len(scales[guides.SOFT]) == 2
    assert scales[guides.SOFT][0] != scales[guides.SOFT][1], "one an image"
    assert all(60 < scale < 120 for scale in scales[guides.SOFT]), "pico's calibration says 82"


def test_each_image_is_followed_at_its_own_scale(nodes, monkeypatch):
    guides, host, seen = nodes["guides"], nodes["host"], []
    monkeypatch.setattr(guides, "token_guide", lambda _, codec, condition, **given: seen.append((condition, given)))
    condition = tiny_condition(2)
    followed = guides.FollowedTokens(
        tokenizer=host.Managed(torch.nn.Linear(1, 1)), condition=condition, scales=(10.0, 20.0), soft=torch.zeros(2)
    )
    for k in range(2):
        followed.guide(k, type("Codec", (), {"factor": 4}), (96, 96), guides.GuidanceOptions())
    assert [given["scale"] for _, given in seen] == [10.0, 20.0]
    assert all(torch.equal(own.code_vectors, condition.code_vectors[k : k + 1]) for k, (own, _) in enumerate(seen))


def test_a_sampler_s_latents_are_guided_in_the_model_s_own_scale(double, nodes, monkeypatch):
    guides, seen = nodes["guides"], []
    of_model = guides.GuideVAE.of
    monkeypatch.setattr(guides.GuideVAE, "of", lambda vae, *ways: seen.append(ways) or of_model(vae, *ways))
    graph = built(double.get("/object_info"), "DCDD_DistributionGuidance", GUIDED, {"k": sampler(IT, steps=1)})
    graph.add("end", "TEST_Hold", value=of("k"))
    assert double.run(graph.prompt).status == "success"
    look = double.nodes["DCDD_LoadPicoModel"].run({})[0][0].model.latent_format
    z = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    normalize, denormalize = seen[-1]
    assert torch.equal(normalize(z), look.process_in(z)) and torch.equal(denormalize(z), look.process_out(z))
    assert not torch.equal(normalize(z), z)


def test_denoise_is_asked_of_the_model_that_is_connected(double, nodes, monkeypatch):
    guidance, seen = nodes["guidance"], []
    monkeypatch.setattr(guidance, "denoise_from", lambda sampling, start: seen.append((sampling, start)) or 0.123)
    inputs = {"vae": of("pico model", 1), **FOLLOWED, "start": 0.45, "model": of("pico model")}
    graph = built(double.get("/object_info"), "DCDD_TokenGuideLatent", inputs, {})
    graph.keep(of("it", 1), "denoise")
    assert double.run(graph.prompt).status == "success"
    ((sampling, start),) = seen
    assert start == 0.45 and sampling.percent_to_sigma(0.0) == 1.0 and double.saved("denoise")["value"] == 0.123


@pytest.mark.parametrize(
    "asked, card, connected, served, told",
    [
        (-1.0, None, True, (0.0, None), False),
        (-1.0, (0.3, 1.5), True, (0.3, 1.5), False),
        (-1.0, (0.3, 1.5), False, (0.0, None), True),
        (-1.0, (0.0, 1.5), True, (0.0, None), False),
        (0.2, (0.3, 1.5), True, (0.2, None), False),
        (0.0, (0.3, 1.5), True, (0.0, None), False),
    ],
)
def test_strength_of_a_decoder_is_its_card_s_unless_it_is_asked_for(
    asked, card, connected, served, told, nodes, monkeypatch
):
    decode, notices = nodes["decode"], []
    monkeypatch.setattr(decode.host, "notice", notices.append)
    guidance = card and type("Served", (), {"strength": card[0], "shift": card[1]})
    found = decode._served(
        type("Card", (), {"distribution_guidance": guidance}), asked, object() if connected else None
    )
    assert found == served and bool(notices) == told
    assert not told or "guidance of strength 0.3, which needs vq_vae" in notices[0]


@pytest.mark.parametrize(
    "schedule, shift", [("as measured best for the decoder", 1.5), ("uniform", 0.0)], ids=["measured", "uniform"]
)
def test_guidance_of_the_card_brings_its_shift(schedule, shift, double, nodes, monkeypatch):
    decode, seen = nodes["decode"], []
    paint = decode.decode
    monkeypatch.setattr(decode, "_served", lambda *_: (0.05, 1.5))
    monkeypatch.setattr(decode, "decode", lambda *args, **given: seen.append(given) or paint(*args, **given))
    inputs = {**PAINT, "vq_vae": of("vq"), "schedule": schedule}
    graph = built(double.get("/object_info"), "DCDD_FluxDecoder", inputs, {})
    graph.add("end", "TEST_Hold", value=IT)
    assert double.run(graph.prompt).status == "success"
    assert [(given["shift"], given["guide"].options.strength) for given in seen] == [(shift, 0.05)]


@pytest.mark.parametrize("vlm", ["pico (built in)", "pico llamagen (built in)"])
def test_a_decoder_is_guided_with_the_calibration_of_the_vlm_that_sampled(vlm, double, nodes, monkeypatch):
    """And an image in a batch as if it were alone, also without a calibration."""
    decode, seen = nodes["decode"], []
    paint = decode.decode
    monkeypatch.setattr(decode, "decode", lambda *args, **given: seen.append(given) or paint(*args, **given))
    graph = Graph(double.get("/object_info"))
    janus = graph.add("janus", "DCDD_LoadJanus", model=vlm)
    decoder, vq = graph.add("decoder", "DCDD_LoadDecoder"), output(janus, 1)
    sampled = graph.add("sample", "DCDD_JanusLogitSampler", janus=janus, prompt="a red circle", seed=3, batch_size=3)
    for name, used in (("calibrated", {"decoder": decoder}), ("plain", {})):
        mapped = graph.add(name, "DCDD_LCDMEncoder", token_logits=sampled, vq_vae=vq, **used)
        inputs = {"decoder": decoder, "condition": mapped, "vq_vae": vq, "steps": 1, "strength": 0.1}
        graph.add(f"end {name}", "TEST_Hold", value=graph.add(f"paint {name}", "DCDD_FluxDecoder", **inputs))
    run = double.run(graph.prompt)
    assert run.status == "success", (run.node, run.error)
    by_calibration, fitted = sorted(
        (given["guide"].scale for given in seen), key=lambda scale: isinstance(scale, tuple)
    )
    file = own_calibration(vlm=LLAMAGEN)
    own = Calibration.load(file) if "llamagen" in vlm else read_card(WEIGHTS / "decoder.safetensors").calibration
    assert by_calibration == pytest.approx(own.sharpness) and len(fitted) == 3 and len(set(fitted)) > 1


@pytest.mark.parametrize("factor, size", [(8, 104), (16, 96)])
def test_a_sharpened_image_has_janus_size_or_the_nearest_that_the_vae_makes(factor, size, nodes, monkeypatch):
    guidance, notices = nodes["guidance"], []
    monkeypatch.setattr(guidance.host, "notice", notices.append)
    assert guidance._fitting((104, 104), factor) == (size, size)
    assert bool(notices) == (size != 104) and all("96 x 96" in notice for notice in notices)


def test_a_model_that_is_missing_is_downloaded_again_each_time(nodes, monkeypatch, tmp_path):
    load = nodes["load"]
    monkeypatch.setattr(load, "_offer", lambda model: (None, tmp_path, tmp_path / "model.safetensors"))
    first, second = (load.DownloadModel.fingerprint_inputs("model") for _ in range(2))
    # A dict, as ComfyUI's cache is one, takes an object for equal to itself even if it is NaN.
    assert second not in {first: "path"}
    (tmp_path / "model.safetensors").write_bytes(b"1")
    assert len({load.DownloadModel.fingerprint_inputs("model") for _ in range(2)}) == 1


def test_progress_over_a_split_batch_only_rises(nodes):
    """Five images, painted as 3 and 2 in steps of four."""
    over = nodes["host"].over_batch
    parts = [(first, count) for first, count in ((0, 3), (3, 2))]
    found = [over(done, 4, first=first, count=count, batch=5) for first, count in parts for done in range(1, 5)]
    assert [done for done, _ in found] == [3, 6, 9, 12, 14, 16, 18, 20] and {total for _, total in found} == {20}
    assert over(3, 4, first=0, count=5, batch=5) == (3, 4)


@pytest.mark.parametrize("node", ["sample", "in passes", "paint"])
def test_a_bar_rises_to_its_end_once_over_a_batch_that_memory_splits(node, double, nodes, monkeypatch):
    """Two images, one at a time."""
    networks = {
        "sample": ("models.autoregressive.token_loop", "TokenLoop", "_embed"),
        "in passes": ("models.masked.sampler", "MaskedSampler", "sample_stages"),
        "paint": ("models.decoder", "DistributionConditionedDecoder", "forward"),
    }
    module, kind, name = networks[node]
    owner = getattr(sys.modules[f"{double.pack.__name__}.dcdd_core.{module}"], kind)
    whole = getattr(owner, name)

    def limited(self, *args, **given):
        count = len(given["seeds"]) if "seeds" in given else len(args[0])
        if count > (2 if node == "sample" else 1):  # guidance doubles the rows of the token loop
            raise torch.OutOfMemoryError
        return whole(self, *args, **given)

    monkeypatch.setattr(owner, name, limited)
    graph = Graph(double.get("/object_info"))
    vlm = graph.add(
        "janus", "DCDD_LoadJanus", model="pico progressive (built in)" if node == "in passes" else "pico (built in)"
    )
    if node == "in passes":
        graph.add("it", "DCDD_ProgressiveTokenSampler", janus=vlm, prompt="a red circle", batch_size=2, passes=3)
    elif node == "sample":
        graph.add("it", "DCDD_JanusLogitSampler", janus=vlm, prompt="a red circle", batch_size=2, parallel_tokens=1)
    else:
        decoder = graph.add("decoder", "DCDD_LoadDecoder")
        scenes = graph.add(
            "scenes", "DCDD_VQVAEEncode", vq_vae=output(vlm, 1), image=graph.add("s", "DCDD_PicoScene", batch_size=2)
        )
        mapped = graph.add("map", "DCDD_LCDMEncoder", token_logits=scenes, vq_vae=output(vlm, 1), decoder=decoder)
        graph.add("it", "DCDD_FluxDecoder", decoder=decoder, condition=mapped, steps=3)
    graph.add("end", "TEST_Hold", value=IT)
    run = double.run(graph.prompt)
    assert run.status == "success", (run.node, run.error)
    told = [done / total for done, total in run.progress["it"]]
    assert told == sorted(told) and told[-1] == 1 and told.count(1.0) == 1 and len(told) > 3


def test_samplers_preview_pico_in_its_colours(double, nodes):
    model, vae, _ = double.nodes["DCDD_LoadPicoModel"].run({})[0]
    look = model.model.latent_format
    scene = torch.from_numpy(render_scene("test", 4, size=96).image.copy())[None] / 255
    with torch.inference_mode():
        z = look.process_in(vae.encode(scene))[0]
        drawn = torch.einsum("chw,cd->hwd", z, torch.tensor(look.latent_rgb_factors))
        drawn += torch.tensor(look.latent_rgb_factors_bias)
    small = torch.nn.functional.avg_pool2d(scene.movedim(-1, 1) * 2 - 1, 4)[0].movedim(0, -1)
    assert torch.corrcoef(torch.stack([drawn.flatten(), small.flatten()]))[0, 1] > 0.9
    assert float((drawn - small).abs().mean()) < 0.15


def test_page_locked_weights_are_let_go_of(nodes):
    """Before they are replaced or moved: freed while locked, their memory would be anything."""

    class Patcher:
        def __init__(self):
            self.pinned, self.freed = {"module.a.weight", "module.b.weight"}, []

        def unpin_weight(self, key):
            self.pinned.remove(key)
            self.freed.append(key)

    some, every = Patcher(), Patcher()
    nodes["host"]._unpin(some, {"module.a.weight", "module.c.weight"})
    nodes["host"]._unpin(every)
    assert some.freed == ["module.a.weight"] and not every.pinned
    nodes["host"]._unpin(object())  # an older ComfyUI's


def test_weights_are_let_go_of_before_they_move(nodes, monkeypatch):
    """Those that `bring` moves itself, which are all but the streamed ones, and all that get gradients."""
    host = nodes["host"]
    monkeypatch.setattr(host.comfy.model_management, "load_models_gpu", lambda *_, **__: None)
    managed, freed = host.Managed(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))), []
    linear, norm = ({f"module.{at}.weight", f"module.{at}.bias"} for at in (0, 1))

    def unpin(key):
        where = managed._patcher.model.get_parameter(key).device
        freed.append((key, where))
        managed._patcher.pinned.remove(key)

    managed._patcher.pinned, managed._patcher.unpin_weight = linear | norm, unpin
    managed._patcher.load_device = torch.device("meta")
    host.bring(managed)
    assert {key for key, _ in freed} == norm and managed._patcher.pinned == linear
    assert managed.network[1].weight.is_meta and not managed.network[0].weight.is_meta
    host.let_gradients_pass(managed)
    assert {key for key, _ in freed} == linear | norm and not managed._patcher.pinned
    assert {device.type for _, device in freed} == {"cpu"}, "while they were still where they had been locked"


def test_a_blank_canvas_comes_from_memory_on_the_codec_s_device(nodes, monkeypatch):
    """Where the latents of other images are, with which a batch puts it together."""
    managed = nodes["host"].ManagedCodec(load_codec(model_paths()["vae"]), placement="auto")
    monkeypatch.setattr(managed, "_ready", lambda *_: managed.managed.idle)
    first = managed.encode(torch.zeros(1, 3, 16, 16))
    assert torch.equal(managed.encode(torch.zeros(1, 3, 16, 16)), first)
    managed.managed._patcher.load_device = torch.device("meta")
    assert managed.encode(torch.zeros(1, 3, 16, 16)).is_meta
