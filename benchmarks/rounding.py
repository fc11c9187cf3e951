"""Tokens many at a time in half precision: what rounding changes, on pico with its trained weights

In bfloat16 a product with more rows rounds differently, and after the first token that differs, an image diverges. Up
to that token both samplers saw the same tokens, so their distributions can be compared.
"""

from __future__ import annotations

import statistics

import torch

from dcdd_core.models.janus.sampler import JanusSampler
from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import TokenLogits
from dcdd_pico.embedded import model_paths
from dcdd_pico.scenes import scene_facts

HEAD = ("what", "images", "tokens that differ", "share", "KL up to the first, nats a token")
OPTIONS = SamplingOptions(guidance=3.0)
WINDOW = 12


def divergence(one: TokenLogits, other: TokenLogits) -> float:
    """Mean KL(one || other) of a single image's positions up to the first whose tokens differ, that one included."""
    differ = (one.tokens != other.tokens)[0]
    count = int(differ.float().argmax()) + 1 if bool(differ.any()) else len(differ)
    p, q = (held.logits[0, :count].log_softmax(-1) for held in (one, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def compared(what: str, ones: list[TokenLogits], others: list[TokenLogits]) -> tuple[str, ...]:
    """A row that compares images drawn in two ways."""
    differ = sum(int((a.tokens != b.tokens).sum()) for a, b in zip(ones, others))
    share = differ / sum(held.tokens.numel() for held in ones)
    mean = statistics.mean(divergence(a, b) for a, b in zip(ones, others))
    return what, str(len(ones)), str(differ), f"{share:.3f}", f"{mean:.2g}"


def rows(images: int = 16) -> list[tuple[str, ...]]:
    prompts = [facts.caption() for facts in scene_facts("calibration", images)]

    def drawn(sampler: JanusSampler, window: int) -> list[TokenLogits]:
        return [
            sampler.sample([prompt], seeds=[k], options=OPTIONS, parallel=window) for k, prompt in enumerate(prompts)
        ]

    whole, half = (JanusSampler.load(model_paths()["vlm"], dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    alone, halved = drawn(whole, 1), drawn(half, 1)
    return [
        compared(f"float32, {WINDOW} tokens a pass against one", alone, drawn(whole, WINDOW)),
        compared(f"bfloat16, {WINDOW} tokens a pass against one", halved, drawn(half, WINDOW)),
        compared("bfloat16 against float32, one token a pass", halved, alone),
    ]
