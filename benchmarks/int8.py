"""8-bit weights: what they do to the logits' statistics, and to a picture's seconds

`python -m benchmarks int8` takes pico's Janus; DCDD_BENCH_JANUS names the folder of a Janus model of your own,
DCDD_BENCH_DEVICE where it computes.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import asdict

import torch

from benchmarks.sampler import PROMPT
from benchmarks.timing import alternating
from dcdd_core.method.statistics import describe_logits
from dcdd_core.models.janus import JanusSampler
from dcdd_core.pipelines.models import PICO_WEIGHTS
from dcdd_core.types import TokenLogits

HEAD = ("what", "as loaded", "int8")
SHOWN = ("top_1", "top_2", "entropy", "tail_entropy", "rank", "head_mass")


def compare(before: JanusSampler, after: JanusSampler, pictures: int = 4) -> list[tuple[str, str, str]]:
    """Statistics of the same pictures' logits, the second model reading the tokens that the first one sampled."""
    prompts, seeds = [PROMPT] * pictures, range(pictures)
    own = before.sample(prompts, seeds=seeds)
    read = reread(after, own, prompts)
    one, two = asdict(describe_logits(own)), asdict(describe_logits(read))
    found = [(name, f"{one[name]:.4g}", f"{two[name]:.4g}") for name in SHOWN]
    p, q = own.logits.log_softmax(-1), read.logits.log_softmax(-1)
    divergence = float((p.exp() * (p - q)).sum(-1).mean())
    seconds = alternating(
        {name: lambda s=s: s.sample([PROMPT], seeds=[0]) for name, s in (("a", before), ("b", after))}
    )
    return [
        *found,
        ("KL to it, nats a token", "0", f"{divergence:.3g}"),
        ("seconds a picture", *(f"{sorted(taken)[len(taken) // 2]:.3g}" for taken in seconds.values())),
    ]


def reread(sampler: JanusSampler, own: TokenLogits, prompts: list[str]) -> TokenLogits:
    """The logits that a sampler gives where it reads tokens drawn by another: each position an edit of its own."""
    logits, steps = own.logits.clone(), own.tokens.shape[1]
    for i in range(steps):
        here = torch.arange(steps) == i
        logits[:, i] = sampler.sample(prompts, seeds=range(len(prompts)), previous=own, resample=here).logits[:, i]
    return TokenLogits(logits, own.tokens, own.grid, codebook=own.codebook)


def rows() -> list[tuple[str, str, str]]:
    if importlib.util.find_spec("torchao") is None:
        return [("all", "not measured (torchao is not installed)", "-")]
    folder = os.environ.get("DCDD_BENCH_JANUS", PICO_WEIGHTS / "janus")
    device = os.environ.get("DCDD_BENCH_DEVICE", "cpu")
    return compare(*(JanusSampler.load(folder, device=device, int8=int8) for int8 in (False, True)))
