"""aMUSEd against diffusers' own pipeline, networks and quantiser, on the same small random weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers import AmusedScheduler, UVit2DModel, VQModel
from einops import rearrange
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from dcdd_core.method import sampling
from dcdd_core.method.progressive import ProgressiveOptions
from dcdd_core.models.masked import amused_tokenizer
from dcdd_core.models.masked.amused import FAMILY
from dcdd_core.models.masked.amused_network import AmusedConfig, AmusedNetwork
from dcdd_core.models.masked.amused_tokenizer import AmusedTokenizer, unit_rows
from dcdd_core.models.masked.words import padded
from dcdd_core.pipelines.progressive import changed_plan
from dcdd_core.protocols import SamplingOptions
from dcdd_core.training.masked_loss import tokens_and_errors
from dcdd_core.types import Codebook
from tests.tiny import fill
from tests.tiny_amused import CODES, MASK, network_config, save_tiny_amused

PROMPTS = ["a red circle on the left", "a blue square"]


@pytest.fixture(scope="module", params=[False, True], ids=["256", "512"])
def folder(request, tmp_path_factory):
    return save_tiny_amused(tmp_path_factory.mktemp("amused") / "model", large=request.param)


@pytest.fixture
def sampler(folder):
    return FAMILY.load_sampler(str(folder))


@pytest.fixture
def tokenizer(folder):
    return FAMILY.load_tokenizer(str(folder))


@pytest.fixture
def codec(folder):
    return VQModel.from_pretrained(folder / "vqvae").eval()


def half_hidden(rows: int = 2) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    found = torch.randint(0, CODES, (rows, 16), generator=draw)
    return found.masked_fill(torch.rand(rows, 16, generator=draw) < 0.5, MASK)


@torch.no_grad()
def logits_of(sampler, texts, tokens):
    """Ours, [R, N, K]; "" is the row without a prompt."""
    rows = [sampler.words.ids(text) if text else sampler.words.unconditional([]) for text in texts]
    network = sampler.model
    return network.logits(network(tokens, network.prefix(*padded(rows))))


@torch.no_grad()
def test_logits_are_those_of_the_networks_called_as_diffusers_does(folder, sampler):
    words = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder").eval()
    network = UVit2DModel.from_pretrained(folder / "transformer").eval()
    texts = [*PROMPTS, "", ""]
    ids = words(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=77).input_ids
    read = text(ids, return_dict=True, output_hidden_states=True)
    tokens = half_hidden().repeat(2, 1)
    expected = network(
        rearrange(tokens, "r (h w) -> r h w", h=4),
        micro_conds=torch.tensor([64.0, 64.0, 0.0, 0.0, 6.0]).expand(4, -1),
        pooled_text_emb=read.text_embeds,
        encoder_hidden_states=read.hidden_states[-2],
    )
    found = logits_of(sampler, texts, tokens)
    assert found.std() > 0.1
    torch.testing.assert_close(found, rearrange(expected, "r k h w -> r (h w) k"), rtol=1e-4, atol=1e-5)


class Recording(AmusedScheduler):
    """Keeps the tokens and guided logits of each of the pipeline's steps, and the tokens after it."""

    def step(self, model_output, timestep, sample, **more):
        done = super().step(model_output, timestep, sample, **more)
        self.seen = [*getattr(self, "seen", []), (sample, model_output, done.prev_sample)]
        return done


def test_each_step_of_diffusers_pipeline_has_the_same_guided_logits(folder, sampler, tokenizer):
    diffusers = pytest.importorskip("diffusers")
    try:
        pipe = diffusers.AmusedPipeline.from_pretrained(folder)
    except (AttributeError, ImportError, RuntimeError) as error:
        pytest.skip(f"this diffusers has no AmusedPipeline: {error}")
    pipe.scheduler = Recording(mask_token_id=MASK)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(PROMPTS, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert len(pipe.scheduler.seen) == sampler.sampling.passes == 12
    for sample, expected, _ in pipe.scheduler.seen:
        tokens = rearrange(sample, "b h w -> b (h w)")
        conditional, unconditional = (logits_of(sampler, texts, tokens) for texts in (PROMPTS, ["", ""]))
        found = sampling.guide(conditional, unconditional, sampler.default_guidance)
        torch.testing.assert_close(found, rearrange(expected, "b k h w -> b (h w) k"), rtol=1e-4, atol=1e-3)
    final = rearrange(pipe.scheduler.seen[-1][2], "b h w -> b (h w)")
    painted = tokenizer.decode_tokens(final, (4, 4))
    torch.testing.assert_close((painted + 1) / 2, image, rtol=1e-4, atol=1e-4)


def test_by_default_it_samples_as_the_pipeline_does(sampler):
    plan = sampler.sampling
    assert (plan.guidance, plan.passes, plan.revision_passes, plan.revise) == (10.0, 12, 0, 0)
    assert (plan.order, plan.schedule, plan.temperature) == ("confidence", "cosine", 1.0)
    assert set(plan.guidances()) == {10.0} == {sampler.default_guidance}


@pytest.mark.parametrize("passes", [1, 2, 6, 12, 40])
def test_in_any_number_of_passes_it_samples_as_diffusers_scheduler(sampler, passes):
    plan = changed_plan(sampler.sampling, SamplingOptions(guidance=10.0), passes=passes)
    scheduler = AmusedScheduler(mask_token_id=MASK)
    scheduler.set_timesteps(passes)
    torch.testing.assert_close(torch.tensor(plan.order_noises()), scheduler.temperatures)
    for count in (256, 1024):
        tokens, shown = torch.full((1, count), MASK), 0
        flat = torch.zeros(1, count, CODES)
        for i, timestep in enumerate(scheduler.timesteps):
            tokens = scheduler.step(flat, timestep, tokens, generator=torch.Generator().manual_seed(0)).prev_sample
            shown = sum(plan.counts(count)[: i + 1])
            assert abs(shown - int((tokens != MASK).sum())) <= 1
        assert shown == count


def test_what_the_draw_sees_is_the_guided_network(sampler):
    run = sampler.sample_stages(PROMPTS, seeds=[3, 4])
    assert len(run.stages) == 12 and not any(stage.changed.any() for stage in run.stages)
    tokens = torch.full((2, 16), MASK)
    for stage in run.stages:
        conditional, unconditional = (logits_of(sampler, texts, tokens) for texts in (PROMPTS, ["", ""]))
        guided = sampling.guide(conditional, unconditional, stage.guidance)
        kept = run.token_logits.logits
        torch.testing.assert_close(kept[stage.revealed], guided[stage.revealed], rtol=1e-4, atol=1e-3)
        tokens = stage.tokens.masked_fill(~stage.known, MASK)


@pytest.mark.parametrize("order", ["importance", "quantisation-error"])
def test_orders_that_it_was_not_trained_to_predict_are_refused(sampler, order):
    with pytest.raises(ValueError, match="which model was not trained to predict: choose confidence, halton, random"):
        sampler.sample(PROMPTS, seeds=[1, 2], options=ProgressiveOptions(order=order))


@pytest.mark.parametrize("order", ["halton", "random", "raster"])
def test_other_plans_can_be_asked_for(sampler, order):
    options = replace(sampler.sampling, order=order, passes=4, revision_passes=1, revise="all")
    run = sampler.sample_stages(PROMPTS, seeds=[1, 2], options=options)
    assert len(run.stages) == 4 and run.stages[-1].redrawn.all()


def test_prompts(sampler):
    ids = sampler.words.ids("red")
    assert len(ids) == 77 == len(sampler.words.unconditional(ids)) and ids[5:] == [0] * 72
    assert sampler.words.unconditional(ids)[2:] == [0] * 75
    sampler.words.ids("x" * 75)
    with pytest.raises(ValueError, match="the prompt 'xxx.*... has 78 text tokens .* reads 77"):
        sampler.sample(["x" * 76], seeds=[1])
    with pytest.raises(ValueError, match="the prompt is blank"):
        sampler.sample(["  "], seeds=[1])


@torch.no_grad()
def test_logits_are_float32_in_half_precision(folder):
    network = FAMILY.load_sampler(str(folder), dtype=torch.bfloat16).model
    hidden = torch.randn(3, 28, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = network.logits(hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, network.float().logits(hidden), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("switches", [{"use_bias": True}, {"ln_elementwise_affine": False}], ids=["bias", "no scale"])
def test_the_last_layer_may_have_biases_and_no_scales(switches):
    config = network_config() | switches
    whole = fill(UVit2DModel(**config), 4)
    hidden = torch.randn(2, 28, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = whole.mlm_layer(hidden)
    network = AmusedNetwork(AmusedConfig(grid=(4, 4), factor=16, mask_token=MASK), whole, nn.Identity())
    found = network.logits(rearrange(hidden, "r c h w -> r (h w) c"))
    torch.testing.assert_close(found, rearrange(expected, "r k h w -> r (h w) k"), rtol=1e-4, atol=1e-5)


def test_eight_bits_in_memory(folder, sampler):
    pytest.importorskip("torchao")
    small = FAMILY.load_sampler(str(folder), int8=True)
    assert small.fingerprint.startswith(sampler.fingerprint[:16]) and "in int8" in small.fingerprint
    assert isinstance(small.model.transformer.transformer_layers[0].attn1.to_q, nn.Linear)
    run, whole = (each.sample(["a red circle"], seeds=[1]) for each in (small, sampler))
    assert run.logits.isfinite().all() and not torch.equal(run.logits, whole.logits)


@pytest.mark.parametrize(("size", "large"), [(16, False), (32, True)], ids=["256", "512"])
def test_an_image_of_the_published_size(tmp_path, size, large):
    folder = save_tiny_amused(tmp_path / "model", size, large=large)
    sampler, tokenizer = FAMILY.load_sampler(str(folder)), FAMILY.load_tokenizer(str(folder))
    run = sampler.sample_stages(PROMPTS[:1], seeds=[7])
    assert run.token_logits.grid == tokenizer.grid == (size, size) and len(run.stages) == 12
    assert run.token_logits.tokens.unique().numel() > 8
    image = tokenizer.decode_tokens(run.token_logits.tokens, run.token_logits.grid)
    assert image.shape == (1, 3, 16 * size, 16 * size) and image.std() > 0.05
    again = torch.zeros(size * size, dtype=torch.bool)
    again[: size * 2] = True
    edited = sampler.sample(PROMPTS[1:], seeds=[8], previous=run.token_logits, resample=again)
    assert torch.equal(edited.tokens[:, ~again], run.token_logits.tokens[:, ~again])


@torch.no_grad()
def test_tokens_decode_as_vqmodel_does(tokenizer, codec):
    tokens = torch.arange(2 * 24).reshape(2, 24)
    expected = codec.decode(tokens.reshape(2, 4, 6), force_not_quantize=True, shape=(2, 4, 6, 8)).sample
    painted = tokenizer.decode_tokens(tokens, (4, 6))
    assert (painted.abs() < 1).float().mean() > 0.3, "not all of it is clamped"
    torch.testing.assert_close(painted, expected.clip(0, 1) * 2 - 1, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_mixtures_are_mixtures_of_its_own_codes(tokenizer, codec):
    shares = torch.rand(1, 16, CODES, generator=torch.Generator().manual_seed(0)).pow(8)
    shares /= shares.sum(-1, keepdim=True)
    codes = rearrange(shares @ codec.quantize.embedding.weight, "b (h w) d -> b d h w", h=4)
    expected = codec.decoder(codec.post_quant_conv(codes)).clip(0, 1) * 2 - 1
    found = tokenizer.decode_vectors(shares @ tokenizer.codebook.vectors, (4, 4))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_token_is_the_nearest_code(tokenizer, codec):
    pixels = torch.rand(4, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = codec.encode((pixels + 1) / 2).latents
    latents = 3 * (latents - latents.mean((0, 2, 3), keepdim=True)) / latents.std()  # Near many codes.
    expected = codec.quantize(latents)[2][2].reshape(4, 24)
    tokenizer.model.encoder, tokenizer.model.quant_conv = Fixed(latents), nn.Identity()
    proxies = tokenizer.encode(pixels)
    assert torch.equal(proxies.tokens, expected) and expected.unique().numel() > 10
    by_angle = rearrange(latents, "b d h w -> b (h w) d") @ Codebook(codec.quantize.embedding.weight).vectors.T
    assert (by_angle.argmax(-1) != expected).any(), "the nearest one is not that of the smallest angle"
    distances = torch.cdist(rearrange(latents, "b d h w -> (b h w) d"), codec.quantize.embedding.weight).square()
    # Up to a constant and a factor of each position.
    found = proxies.logits.reshape(-1, CODES)
    fit = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(found, -distances)]
    assert min(fit) > 0.99999


class Fixed(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, _):
        return self.value


@torch.no_grad()
def test_features_are_vqmodels(tokenizer, codec):
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = rearrange(codec.encode((pixels + 1) / 2).latents, "b d h w -> b (h w) d")
    features = tokenizer.features(pixels)
    torch.testing.assert_close(features[..., :8], expected)
    longest = codec.quantize.embedding.weight.norm(dim=1).max()
    torch.testing.assert_close(features[..., 8:], torch.stack([-longest, torch.tensor(0.0)]).expand(2, 6, 2))


def test_features_have_gradients_and_weights_none(tokenizer):
    pixels = torch.zeros(1, 3, 32, 32, requires_grad=True)
    tokenizer.features(pixels).square().sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in tokenizer.model.parameters())


def test_codes_of_any_length_become_rows_of_unit_length():
    codes = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 50, 40)[:, None]
    codebook, longest = unit_rows(codes)
    assert codebook.dim == 8 and codebook.size == 40
    torch.testing.assert_close(codebook.vectors.norm(dim=1), torch.ones(40))
    torch.testing.assert_close(codebook.vectors[:, :6] * longest * 5**0.5 / 2, codes)
    with pytest.raises(ValueError, match="all codes are zero"):
        unit_rows(torch.zeros(3, 2))


def test_errors_are_squared_distances_to_the_codes(tokenizer):
    codes = tokenizer.codebook.vectors[:, :-2] * tokenizer._longest * 5**0.5 / 2
    f = codes[:40] + 0.1 * torch.randn(40, codes.shape[1], generator=torch.Generator().manual_seed(0))
    f[:3] = codes[:3]
    lifted = torch.cat([f, torch.full((40, 1), -tokenizer._longest), torch.zeros(40, 1)], dim=1)[None]
    tokens, errors = tokens_and_errors(tokenizer, lifted)
    assert torch.equal(tokens[0], torch.cdist(f.double(), codes.double()).argmin(1)) and (tokens[0, :3] < 3).all()
    distances = (f - codes[tokens[0]]).square().sum(1) / (2 * codes.norm(dim=1).max().square())
    torch.testing.assert_close(errors[0], distances.clamp(min=1e-4).log(), rtol=1e-3, atol=1e-3)
    assert (errors[0, :3] == math.log(1e-4)).all() and (errors[0, 3:] > errors[0, 0]).any()


def test_the_codebook_lies_where_the_network_does(tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(AmusedTokenizer, "device", torch.device("cuda:1"))
    monkeypatch.setattr(amused_tokenizer, "unit_rows", lambda codes, device: asked.append(device) or unit_rows(codes))
    AmusedTokenizer(tokenizer.model, torch.eye(3), grid=(4, 4))
    assert asked == [torch.device("cuda:1")]


def test_half_precision_changes_no_codebook(folder, sampler, tokenizer):
    for dtype, computed in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16), (None, torch.float32)):
        other = FAMILY.load_tokenizer(str(folder), dtype=dtype)
        assert torch.equal(other.codebook.vectors, tokenizer.codebook.vectors) and other.dtype == computed
    assert torch.equal(sampler.codebook.vectors, tokenizer.codebook.vectors)
