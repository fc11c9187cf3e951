"""8-bit weights: effect on statistics of the logits, on the velocity, and on speed

`python -m benchmarks int8` measures pico's Janus and decoder. DCDD_BENCH_JANUS is the folder of another Janus model,
DCDD_BENCH_DEVICE the device. The decoder is also measured with float8 layers, by diffusers' layerwise casting.
"""

from __future__ import annotations

import os
import statistics
from dataclasses import asdict
from importlib.util import find_spec

import torch

from benchmarks.sampler import PROMPT
from benchmarks.timing import NO_TORCHAO, alternating
from dcdd_core.method.statistics import describe_logits
from dcdd_core.models.bundle import DecoderOptions, load_decoder
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.models.janus.sampler import JanusSampler
from dcdd_core.pipelines.condition import condition_for
from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import Condition, TokenLogits
from dcdd_pico.embedded import WEIGHTS
from dcdd_pico.models import load_pico

HEAD = ("what", "as loaded", "int8", "float8")
SHOWN = ("top_1", "top_2", "entropy", "tail_entropy", "rank", "head_mass")


def compare(before: JanusSampler, after: JanusSampler, own: TokenLogits) -> list[tuple[str, str, str, str]]:
    """Statistics of both models' logits for the same images; the second reads the tokens that the first sampled."""
    read = reread(after, own, [PROMPT] * len(own.tokens))
    one, two = asdict(describe_logits(own)), asdict(describe_logits(read))
    found = [(f"Janus: {name}", f"{one[name]:.4g}", f"{two[name]:.4g}", "-") for name in SHOWN]
    p, q = own.logits.log_softmax(-1), read.logits.log_softmax(-1)
    divergence = float((p.exp() * (p - q)).sum(-1).mean())
    seconds = alternating(
        {name: lambda s=s: s.sample([PROMPT], seeds=[0]) for name, s in (("a", before), ("b", after))}
    )
    return [
        *found,
        ("Janus: KL divergence from the loaded model, nats per token", "0", f"{divergence:.3g}", "-"),
        ("Janus: seconds per image", *(f"{statistics.median(taken):.3g}" for taken in seconds.values()), "-"),
    ]


def reread(sampler: JanusSampler, own: TokenLogits, prompts: list[str]) -> TokenLogits:
    """The logits that a sampler gives for tokens drawn by another; each position is an edit of its own."""
    logits, steps = own.logits.clone(), own.tokens.shape[1]
    for i in range(steps):
        here = torch.arange(steps) == i
        logits[:, i] = sampler.sample(prompts, seeds=range(len(prompts)), previous=own, resample=here).logits[:, i]
    return TokenLogits(logits, own.tokens, own.grid, codebook=own.codebook)


def cast_by_layer(decoder: DistributionConditionedDecoder) -> DistributionConditionedDecoder:
    """Stores the layers of the blocks in float8; diffusers casts each to the compute dtype when it runs."""
    left = ("norm", "^x_embedder$", "^proj_out$")
    decoder.transformer.enable_layerwise_casting(compute_dtype=decoder.dtype, skip_modules_pattern=left)
    return decoder


@torch.no_grad()
def compare_decoders(
    held: list[DistributionConditionedDecoder], condition: Condition, t: float = 0.5
) -> list[tuple[str, ...]]:
    """Rows for decoders with the same weights: deviation of the velocity at time t from the first one's, and speed."""
    first = held[0]
    height, width = (side // first.card.vae_factor for side in first.card.painted_size(condition.grid))
    size, batch = (height, width), len(condition.code_vectors)
    noise = torch.Generator().manual_seed(0)
    packed = torch.randn(batch, height // 2 * (width // 2), first.transformer.config.in_channels, generator=noise)
    packed, context = packed.to(first.device, first.dtype).split([64, packed.shape[2] - 64], dim=2)
    times = torch.full((batch,), t)
    for decoder in held:
        decoder.prepare([t])
    read = [decoder.condition_tokens(condition, size) for decoder in held]
    steps = {str(k): lambda k=k: held[k](packed, context, read[k], times, size).float() for k in range(len(held))}
    velocities = [step() for step in steps.values()]
    errors = [(velocity - velocities[0]).std() / velocities[0].std() for velocity in velocities]
    return [
        ("decoder: error of the velocity / its standard deviation", *(f"{float(error):.2g}" for error in errors)),
        ("decoder: seconds per step", *(f"{statistics.median(taken):.3g}" for taken in alternating(steps).values())),
    ]


def rows() -> list[tuple[str, ...]]:
    if not find_spec("torchao"):
        return [("all", NO_TORCHAO, "-", "-")]
    folder = os.environ.get("DCDD_BENCH_JANUS", WEIGHTS / "janus")
    device = os.environ.get("DCDD_BENCH_DEVICE", "cpu")
    before, after = (JanusSampler.load(folder, device=device, int8=int8) for int8 in (False, True))
    found = compare(before, after, before.sample([PROMPT] * 4, seeds=range(4)))
    pico = load_pico(device=device)
    card, guidance = pico.decoder.card, pico.decoder.card.calibration.guidance
    grid = pico.sampler.sample([PROMPT] * 4, seeds=range(4), options=SamplingOptions(guidance=guidance))
    like = {"device": device, "dtype": torch.bfloat16}
    plain, rounded, cast = (
        load_decoder(WEIGHTS / "decoder.safetensors", options=DecoderOptions(**like, eight_bit=eight_bit))
        for eight_bit in (False, True, False)
    )
    condition = condition_for(card, grid, pico.tokenizer.codebook)
    return found + compare_decoders([plain, rounded, cast_by_layer(cast)], condition)
