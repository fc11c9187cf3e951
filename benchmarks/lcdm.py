"""LCDM: seconds and extra memory for 4 images of 576 tokens over 16384 codes

Compared with the equations as written, softmax, full sort and matrix product over all tokens at once, and with the same
with the 64 largest probabilities in the place of the sort, since k is at most 64.
"""

from __future__ import annotations

import torch

from benchmarks.peak import peak
from benchmarks.targets import Target
from benchmarks.timing import NOT_MEASURED, alternating
from dcdd_core.method.lcdm import map_logits
from dcdd_core.method.statistics import describe_logits
from dcdd_core.types import Codebook, TokenLogits

HEAD = ("what", "seconds", "times ours", "extra memory / logits")
TARGETS = tuple(
    Target(row=(f"{who} ({device})",), column=column, relation=relation, bound=bound, source="chosen")
    for device in ("cpu", "cuda")
    for who, column, relation, bound in (
        ("as written", "times ours", "at least", 3.0),
        ("with the 64 largest in the place of the sort", "times ours", "at least", 1.0),
        ("ours: c and u", "extra memory / logits", "at most", 0.25),
    )
)


def plain(logits: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eqs. 5-8 over logits [B, N, K] as written, not optimised for time or memory."""
    p = logits.softmax(-1)
    ordered = p.sort(-1, descending=True).values
    k = torch.special.entr(p).sum(-1, keepdim=True).exp().round().clamp(8, 64).long()
    mass = ordered.cumsum(-1).gather(-1, k - 1)
    tail = ordered * (torch.arange(p.shape[-1], device=p.device) >= k)
    tail = tail / tail.sum(-1, keepdim=True)
    tail_entropy = torch.special.entr(tail).sum(-1, keepdim=True) / (p.shape[-1] - k).log()
    u = torch.cat([ordered[..., :1], ordered[..., :1] - ordered[..., 1:2], mass, tail_entropy], dim=-1)
    return p @ vectors, u


def largest(logits: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`plain` without its sort: the entropy of the tail is that of all codes without the head's."""
    p = logits.softmax(-1)
    entropy = torch.special.entr(p).sum(-1, keepdim=True)
    top = p.topk(64).values
    k = entropy.exp().round().clamp(8, 64).long()
    head = top * (torch.arange(64, device=p.device) < k)
    mass = head.sum(-1, keepdim=True)
    rest = 1 - mass
    tail_entropy = (entropy - torch.special.entr(head).sum(-1, keepdim=True)) / rest + rest.log()
    u = torch.cat([top[..., :1], top[..., :1] - top[..., 1:2], mass, tail_entropy / (p.shape[-1] - k).log()], dim=-1)
    return p @ vectors, u


def contest(device: str, batch: int, rounds: int) -> list[tuple[str, ...]]:
    draw = torch.Generator().manual_seed(0)
    codebook = Codebook(torch.randn(16384, 8, generator=draw).to(device))
    logits = 3 * torch.randn(batch, 576, 16384, generator=draw).to(device)
    grid = TokenLogits(logits, logits.argmax(-1), (24, 24), codebook=codebook.fingerprint)
    functions = {
        "ours: c and u": lambda: map_logits(grid, codebook),
        "as written": lambda: plain(logits, codebook.vectors),
        "with the 64 largest in the place of the sort": lambda: largest(logits, codebook.vectors),
        "our statistics (Table 1), which need the full sort": lambda: describe_logits(grid, codebook),
    }
    seconds = {name: sorted(taken)[len(taken) // 2] for name, taken in alternating(functions, rounds).items()}
    ours = seconds["ours: c and u"]
    return [
        (
            f"{name} ({device})",
            f"{seconds[name]:.3g}",
            f"{seconds[name] / ours:.2f}",
            f"{peak(function, device == 'cuda') / logits.nbytes:.2f}",
        )
        for name, function in functions.items()
    ]


@torch.no_grad()
def rows(batch: int = 4, rounds: int = 3) -> list[tuple[str, ...]]:
    found = contest("cpu", batch, rounds)
    if not torch.cuda.is_available():
        return [*found, ("all (cuda)", NOT_MEASURED, "-", "-")]
    return [*found, *contest("cuda", 16, rounds)]
