"""Growth: seconds against batch, grid and codebook (random weights); plotted in [growth.png](growth.png)"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from transformers import JanusConfig, JanusForConditionalGeneration

from benchmarks.sampler import PROMPT, as_loaded, pico
from benchmarks.timing import CPU_CLOCK, alternating
from dcdd_core.method.lcdm import map_logits
from dcdd_core.models.janus.sampler import JanusSampler
from dcdd_core.types import Codebook, TokenLogits
from tests.tiny import fill

HEAD = ("what grows", "size", "seconds", "each")
PLOT = Path(__file__).resolve().parents[1] / "docs" / "growth.png"
BATCHES, SIDES, CODES = (1, 2, 4, 8, 16), (16, 24, 32, 48, 64), (1024, 4096, 16384, 65536)


def narrow(side: int) -> JanusSampler:
    """A sampler with two layers of width 64 on a grid of side x side tokens, small enough for 64 x 64 on a CPU."""
    model, words = pico(side)
    config = model.config.to_dict()
    config["text_config"] |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    config["vq_config"] |= {"projection_dim": 64, "image_token_embed_dim": 64}
    config["vision_config"] |= {"projection_dim": 64}
    return as_loaded(fill(JanusForConditionalGeneration(JanusConfig.from_dict(config))), words)


def curve(functions: dict[int, object], rounds: int) -> dict[int, float]:
    seconds = alternating({str(size): function for size, function in functions.items()}, rounds)
    return {size: statistics.median(taken) for size, taken in zip(functions, seconds.values())}


def batches(sizes: tuple[int, ...], rounds: int) -> dict[int, float]:
    sampler = as_loaded(*pico())
    return curve({b: lambda b=b: sampler.sample([PROMPT] * b, seeds=range(b)) for b in sizes}, rounds)


def grids(sides: tuple[int, ...], rounds: int) -> dict[int, float]:
    samplers = {side: narrow(side) for side in sides}
    return curve({s: lambda s=s: samplers[s].sample([PROMPT], seeds=[0]) for s in sides}, rounds)


def codebooks(sizes: tuple[int, ...], rounds: int) -> dict[int, float]:
    draw = torch.Generator().manual_seed(0)

    def mapping(codes: int):
        codebook = Codebook(torch.randn(codes, 8, generator=draw))
        logits = 3 * torch.randn(1, 144, codes, generator=draw)
        grid = TokenLogits(logits, logits.argmax(-1), (12, 12), codebook=codebook.fingerprint)
        return lambda: map_logits(grid, codebook)

    return curve({codes: mapping(codes) for codes in sizes}, rounds)


def draw(panels: list[tuple[str, str, dict[int, float]]], path: Path) -> None:
    """Plots panels of (title, name of the size, size -> seconds)."""
    figure = Figure(figsize=(4 * len(panels), 3.4), layout="constrained")
    for axis, (title, name, seconds) in zip(figure.subplots(1, len(panels)), panels):
        sizes, values = list(seconds), list(seconds.values())
        axis.loglog(sizes, values, "o-", label="measured")
        axis.loglog(sizes, [values[0] * size / sizes[0] for size in sizes], "--", color="0.6", label="proportional")
        axis.legend(frameon=False)
        axis.set(title=title, xlabel=name, ylabel="processor seconds, one thread" if CPU_CLOCK else "seconds")
        axis.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.minorticks_off()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def rows(
    batch: tuple[int, ...] = BATCHES, sides: tuple[int, ...] = SIDES, codes: tuple[int, ...] = CODES, rounds: int = 3
) -> list[tuple[str, str, str, str]]:
    by_batch, by_side, by_codes = batches(batch, rounds), grids(sides, rounds), codebooks(codes, rounds)
    by_tokens = {side**2: seconds for side, seconds in by_side.items()}
    panels = [
        ("pico's shape, 144 tokens", "images per batch", by_batch),
        ("2 layers of width 64", "tokens per image", by_tokens),
        ("LCDM, 144 tokens", "codes", by_codes),
    ]
    draw(panels, PLOT)
    return [
        (f"{title}: {name}", str(size), f"{taken:.3g}", f"{taken / size:.2g}")
        for title, name, seconds in panels
        for size, taken in seconds.items()
    ]
