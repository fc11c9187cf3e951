"""Estimated costs against real trainings: equal where nothing is temporary, within 1 % elsewhere."""

import copy
import itertools
import time
from functools import cache, partial

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import janus
from dcdd_core.models.backbones.flux_fill.inference import drop_text
from dcdd_core.models.card import DecoderCard
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.models.vae import FLUX_VAE_CONFIG, KLCodec
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.training.config import OptimizationConfig
from dcdd_core.training.cost import (
    TrainingSetup,
    cost_of,
    encoders,
    encoding_peak,
    meta_decoder,
    optimizer_cost,
    step_dry_run,
)
from dcdd_core.training.encoded_batch import EncodedBatch, geometry_for
from dcdd_core.training.estimate import duration_of
from dcdd_core.training.examples import Example, ExampleMaker
from dcdd_core.training.image_batch import ImageBatch
from dcdd_core.training.loss import decoder_loss
from dcdd_core.training.optimizers import muon
from dcdd_core.training.trainable import choose_trained, decoder_optimizers, muon_matrices, trained_weights
from tests.tiny import tiny_card, tiny_condition, tiny_vq

CONFIG = {
    "patch_size": 1,
    "in_channels": 384,
    "out_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 12, 16],
}
SMALL = {"config": CONFIG, "width": 32, "resolution": 256, "grid": 16, "batch": 2}


@cache
def cost(**choice):
    return cost_of(TrainingSetup(**SMALL | choice))


def profiled(work):
    """The most bytes that PyTorch's allocator held for `work`, by torch.profiler."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def real(setup):
    """A decoder with weights, as it is trained, and an example to train it on."""
    card = DecoderCard(base="", base_config=CONFIG, tokenizer="", codebook="", code_dim=8, width=setup.width)
    decoder = DistributionConditionedDecoder.build(card)
    drop_text(decoder.transformer)
    decoder.to(torch.bfloat16 if setup.precision == "bf16" else torch.float32)
    choose_trained(decoder, setup.train, rank=setup.rank)
    if setup.checkpointing:
        for block in decoder.backbone.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    side = setup.resolution // 8
    example = Example(
        latents=torch.randn(setup.batch, 16, side, side),
        condition=tiny_condition(setup.batch, (setup.grid, setup.grid)),
        masked_latents=torch.randn(1, 16, side, side),
        mask=torch.ones(1, 1, setup.resolution, setup.resolution),
    )
    return decoder, example


@pytest.mark.parametrize(
    "choice",
    [
        {"precision": "no"},
        {"precision": "no", "train": "all", "checkpointing": True},
        {"precision": "bf16", "checkpointing": True},
        {"precision": "bf16", "train": "lora", "rank": 4},
    ],
    ids=lambda choice: "-".join(map(str, choice.values())),
)
def test_two_steps_of_a_training_take_what_was_estimated(choice):
    if choice.get("train") == "lora":
        pytest.importorskip("peft")
    setup = TrainingSetup(**SMALL | choice)
    decoder, example = real(setup)
    trained = trained_weights(decoder)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4, fused=True)

    def forward_and_backward():
        with torch.autocast("cpu", torch.bfloat16, enabled=setup.precision == "bf16"):
            loss = decoder_loss(decoder, example, torch.Generator().manual_seed(1), OptimizationConfig(steps=2))
        loss.backward()

    forward_and_backward()
    optimizer.step()
    optimizer.zero_grad()
    peak = profiled(forward_and_backward)
    gradients = sum(weight.grad.nbytes for weight in trained.values())
    optimizer.step()
    estimated = step_dry_run(meta_decoder(setup), setup, on_gpu=False)
    # A CPU without bfloat16 instructions converts as it multiplies, in other buffers.
    native = setup.precision != "bf16" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert estimated.peak == pytest.approx(peak, rel=0.01 if native else 0.02)
    assert estimated.gradients == gradients
    expected = cost(**choice)
    assert expected.gradients == gradients
    held = {True: 0, False: 0}
    for weight in decoder.parameters():
        held[weight.requires_grad] += weight.nbytes
    assert (expected.memory["trained weights"], expected.memory["frozen weights"]) == (held[True], held[False])
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert expected.memory["optimiser's states"] == sum(moment.nbytes for moment in moments)
    assert expected.memory["communication"] == 0


def test_the_flops_of_a_forward_pass_are_those_of_its_layers():
    setup = TrainingSetup(**SMALL, precision="no")
    decoder, example = real(setup)
    counted = []

    def count(layer, inputs, output):
        inner = layer.weight[0].numel()  # in a convolution, all taps of all channels
        counted.append(2 * output.numel() * inner)

    for part in decoder.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            part.register_forward_hook(count)
    decoder_loss(decoder, example, torch.Generator(), OptimizationConfig(steps=1))
    latents, inner = (256 // 16) ** 2, 4 * 32
    attention = 2 * 2 * 2 * setup.batch * latents**2 * inner  # in each block q k^T and its product with v
    assert step_dry_run(meta_decoder(setup), setup).forward_flops == sum(counted) + attention


@pytest.mark.parametrize(
    "choice", [{}, {"train": "all", "checkpointing": True}], ids=["attention", "all-checkpointing"]
)
def test_the_flops_of_a_step_are_those_that_pytorch_counts_of_the_real_one(choice):
    setup = TrainingSetup(**SMALL | choice, precision="no")
    decoder, example = real(setup)
    # Of attention it counts the plain kernel, whose backward pass keeps the scores that flash attention computes again.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decoder_loss(decoder, example, torch.Generator(), OptimizationConfig(steps=1)).backward()
    latents, inner, blocks = (setup.resolution // 16) ** 2, 4 * 32, len(decoder.backbone.blocks)
    again = blocks * 2 * setup.batch * latents**2 * inner
    assert cost(**choice, precision="no").flops == counter.get_total_flops() + again


@pytest.mark.slow
def test_the_time_of_one_training_predicts_that_of_another():
    """The utilisation of a device, measured on one step, predicts the time of a larger one."""

    def processor_seconds(setup):
        decoder, example = real(setup)
        spent = []
        for _ in range(3):
            start = time.process_time()
            decoder_loss(decoder, example, torch.Generator(), OptimizationConfig(steps=1)).backward()
            spent.append(time.process_time() - start)
        return min(spent)

    small = {"precision": "no", "resolution": 512, "batch": 4}
    large = {"precision": "no", "resolution": 768, "train": "all", "checkpointing": True}
    reached = cost(**small).flops / processor_seconds(TrainingSetup(**SMALL | small))
    setup = TrainingSetup(**SMALL | large)
    foretold = duration_of(setup, cost(**large), images=1, teraflops=reached / 1e12, utilisation=1.0).seconds
    assert processor_seconds(setup) == pytest.approx(foretold, rel=1 / 3)


def test_flux_fill_is_counted_as_published_without_its_text_stream():
    decoder = meta_decoder(TrainingSetup())
    width, blocks, double = 3072, 19 + 38, 19
    published = 11_901_408_320 + (384 - 64) * width  # FLUX.1-dev's, and more input channels
    # Of each joint block its modulation of the text, four projections, two norms, and the MLP; once the embedder.
    text = double * ((6 + 4 + 4 + 4) * width**2 + (6 + 4 + 4 + 1) * width + 2 * 128) + (4096 + 1) * width
    assert sum(weight.numel() for weight in decoder.transformer.parameters()) == published - text
    attention = blocks * (3 * (width**2 + width) + 2 * 128) + double * (width**2 + width)
    trained = [weight for weight in decoder.transformer.parameters() if weight.requires_grad]
    assert sum(weight.numel() for weight in trained) == attention
    assert {weight.dtype for weight in trained} == {torch.float32}


def test_muon_s_states_and_temporaries_are_those_of_its_step():
    shapes = {
        "_blocks.0.a.weight": (768, 512),
        "_blocks.0.norm.linear.weight": (64, 80),
        "_blocks.1.b.weight": (256, 64),
    }
    shapes |= {"x.weight": (70, 70), "_blocks.0.a.bias": (96,)}
    trained = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    matrices = [trained["_blocks.0.a.weight"], trained["_blocks.1.b.weight"]]
    states, beside, flops = optimizer_cost(trained, "muon", ["_blocks.0.a.weight", "_blocks.1.b.weight"])
    others = sum(weight.numel() for weight in trained.values()) - sum(weight.numel() for weight in matrices)
    assert states == 4 * sum(weight.numel() for weight in matrices) + 8 * others
    stepped = muon(matrices, weight_decay=0.01)
    for _ in range(2):  # the first step makes the states
        for weight in matrices:
            weight.grad = torch.randn_like(weight)
        peak = profiled(stepped.step)
    assert beside <= peak <= beside + 0.6e6, "a CPU's product in bfloat16 takes 0.13 to 0.53 MB for itself"
    # Newton and Schulz, five times: A = X X^T, A A and (A A) X, for the smaller side first.
    assert flops == sum(5 * (4 * m * m * n + 2 * m**3) for m, n in ((512, 768), (64, 256)))


def test_a_torch_without_muon_is_named(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=r"muon needs torch 2.9 or newer, this is .*: update torch, or take adamw"):
        muon([], weight_decay=0.01)


def test_muon_s_states_are_those_of_the_training_s_optimisers():
    decoder, _ = real(TrainingSetup(**SMALL, train="all"))
    trained = trained_weights(decoder)
    states, _, _ = optimizer_cost(trained, "muon", muon_matrices(decoder))
    optimizers = decoder_optimizers(decoder, OptimizationConfig(steps=1, optimizer="muon"))
    for weight in trained.values():
        weight.grad = torch.ones_like(weight)
    held = 0
    for optimizer in optimizers:
        optimizer.step()
        kept = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
        held += sum(value.nbytes for value in kept)
    assert len(optimizers) == 2 and states == held


def test_eight_bits_take_a_byte_and_a_scale_of_each_block_where_tensors_are_large():
    trained = {"large": nn.Parameter(torch.empty(1000, 7)), "small": nn.Parameter(torch.empty(4095))}
    assert optimizer_cost(trained, "adamw8bit") == (2 * (7000 + 4 * 28) + 2 * 4 * 4095, 0, 0)


@pytest.mark.parametrize(("sharding", "parts"), [("ddp", 1), ("fsdp", 4)])
def test_fsdp_divides_all_that_adam_holds(sharding, parts):
    """Mixed precision with Adam: 16 bytes a trained weight (arXiv 1910.02054, section 3.1), 2 a frozen one."""
    found = cost(train="all", sharding=sharding, gpus=4, average=False)
    count, frozen = found.weights["trained"], found.weights["all"] - found.weights["trained"]
    beside = ("communication", "tokenizer, in float32", "autoencoder, in float32")
    held = sum(size for name, size in found.memory.items() if name not in beside) + found.gradients
    assert held == pytest.approx((16 * count + 2 * frozen) / parts, abs=8)


def test_ddp_holds_gradients_twice_and_fsdp_gathers_two_blocks():
    ddp, fsdp = cost(gpus=2), cost(gpus=2, sharding="fsdp")
    assert ddp.memory["communication"] == ddp.gradients == 4 * ddp.weights["trained"]
    largest = meta_decoder(TrainingSetup(**SMALL)).transformer.transformer_blocks[0]
    gathered = 2 * 2 * sum(weight.numel() for weight in largest.parameters())
    whole = 4 * sum(weight.numel() for weight in largest.parameters() if weight.requires_grad)
    assert fsdp.memory["communication"] == gathered + whole
    assert fsdp.memory["EMA"] == -(-4 * fsdp.weights["trained"] // 2)
    assert sum(fsdp.memory.values()) < sum(ddp.memory.values())


def test_accumulated_gradients_are_there_while_activations_are():
    once, twice = cost(), cost(accumulate=2)
    assert once.step < twice.step <= once.step + once.gradients
    assert twice.flops == 2 * once.flops and twice.memory == once.memory


@pytest.fixture(scope="module")
def autoencoder():
    return KLCodec(AutoencoderKL.from_config(dict(FLUX_VAE_CONFIG)).eval().requires_grad_(False))


@pytest.mark.parametrize(
    "choice",
    [{"localised": 1.0}, {"localised": 0.0}, {"localised": 1.0, "cached": True}],
    ids=["localised", "whole", "localised-cached"],
)
def test_encoding_a_batch_takes_what_was_estimated(choice, autoencoder):
    setup = TrainingSetup(**SMALL | {"resolution": 64, "grid": 8} | choice)
    vq = VQTokenizer(tiny_vq())
    geometry = geometry_for(vq, autoencoder, patch=2, resolution=64, token_resolution=32)
    make = ExampleMaker(tiny_card(), vq, autoencoder, geometry, localised=setup.localised)

    def encode_and_mask():
        if setup.cached:
            sizes = {"features": (64, 8), "latents": (16, 8, 8), "pixels": (3, 64, 64)}
            batch = EncodedBatch(**{name: torch.randn(2, *size) for name, size in sizes.items()})
        else:
            sizes = {"pixels": 64, "token_pixels": 32}
            pixels = {name: torch.zeros(2, 3, side, side, dtype=torch.uint8) for name, side in sizes.items()}
            batch = ImageBatch(keys=("a", "b"), **pixels)
        make(batch, torch.Generator().manual_seed(0))

    on_meta = copy.deepcopy(vq)
    on_meta.model.to("meta")
    estimated = encoding_peak(setup, on_meta, encoders(setup)[1])
    reordered = 4 * 128 * 128 * 3 * 3  # a CPU's convolution copies its weights into another order
    assert estimated + reordered == pytest.approx(profiled(encode_and_mask), rel=0.01)


def test_images_are_encoded_before_the_step_and_need_not_be():
    found = cost()
    assert found.encoding > found.step  # the small transformer's, beside FLUX's own autoencoder
    assert found.peak == sum(found.memory.values()) + found.encoding
    assert cost(accumulate=2).encoding == found.encoding + found.gradients
    assert max(cost(localised=0.0).encoding, cost(cached=True).encoding) <= found.encoding
    none = cost(localised=0.0, cached=True)
    assert none.encoding == 0 and none.memory == found.memory


def test_the_encoders_are_janus_pro_s_and_flux_s():
    tokenizer, codec = encoders(TrainingSetup())
    published = janus("Janus-Pro-1B").model.vqmodel.state_dict()
    assert {name: weight.shape for name, weight in tokenizer.model.state_dict().items()} == {
        name: weight.shape for name, weight in published.items()
    }
    assert sum(weight.numel() for weight in codec.model.parameters()) == 83_819_683
    memory = cost().memory
    assert memory["autoencoder, in float32"] == 4 * 83_819_683
    assert memory["tokenizer, in float32"] == 4 * sum(weight.numel() for weight in published.values())


def test_the_average_and_the_batch_are_counted():
    assert cost().peak - cost(average=False).peak == 4 * cost().weights["trained"]
    assert cost(batch=4).activations == pytest.approx(2 * cost().activations, rel=0.05)
    assert cost(batch=4).flops == pytest.approx(2 * cost().flops, rel=0.01)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"train": "most"}, "train must be one of attention"),
        ({"sharding": "zero3"}, "sharding must be one of ddp"),
        ({"localised": 1.5}, "localised must be a fraction"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"optimizer": "muon", "sharding": "fsdp"}, "muon needs whole matrices"),
        ({"optimizer": "muon", "train": "adapter"}, "muon would update nothing"),
    ],
)
def test_what_does_not_go_together_is_refused(choice, words):
    with pytest.raises(ValueError, match=words):
        TrainingSetup(**choice)


def test_a_resolution_that_does_not_fit_the_networks_is_refused():
    with pytest.raises(ValueError, match="resolution of 250 .* must be a multiple of 16 pixels"):
        cost(resolution=250)
