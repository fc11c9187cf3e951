"""`train.py estimate`: memory and time of a decoder's training before anyone waits for it.

G stands for 10^9 bytes, T for 10^12 operations; a multiply-add is two.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..files import write_text
from ..models.backbones.flux_fill.files import fill_config
from .cost import SHARDINGS, Cost, Setup, cost_of
from .optimizers import OPTIMIZERS
from .trainable import TRAINED

_ROOM = 0.92
"""Share of a GPU's memory that a training may be estimated at and still be said to fit: our choice, for what is left
out."""


@dataclass(frozen=True, kw_only=True)
class GPU:
    """A GPU as its maker publishes it: peak in T operations a second (bfloat16, dense, summed in float32), memory in
    GiB."""

    teraflops: float
    memory: float


#: NVIDIA's data sheets of A100, H100, H200, L40S, RTX A6000 (half of what they state with sparsity), DGX B200, AMD's of
#: MI300X; GeForce from NVIDIA's white papers on GA102, Ada and RTX Blackwell.
GPUS = {
    "a100-40gb": GPU(teraflops=312, memory=40),
    "a100-80gb": GPU(teraflops=312, memory=80),
    "h100": GPU(teraflops=989, memory=80),
    "h100-pcie": GPU(teraflops=756, memory=80),
    "h200": GPU(teraflops=989, memory=141),
    "b200": GPU(teraflops=2250, memory=180),
    "mi300x": GPU(teraflops=1307, memory=192),
    "l40s": GPU(teraflops=362, memory=48),
    "a6000": GPU(teraflops=155, memory=48),
    "rtx3090": GPU(teraflops=71, memory=24),
    "rtx4090": GPU(teraflops=165, memory=24),
    "rtx5090": GPU(teraflops=209, memory=32),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training of so many pictures, on GPUs that reach the share `utilisation` of their peak.

    Attributes:
        pictures: seen in all, an epoch's times the epochs.
        seconds: of an update.
    """

    pictures: int
    batch: int
    updates: int
    teraflops: float
    utilisation: float
    seconds: float
    hours: float


def run_of(setup: Setup, cost: Cost, *, pictures: int, teraflops: float, utilisation: float) -> Run:
    """The time that the operations take; waiting for data and other GPUs is in `utilisation` or not at all.

    Raises:
        ValueError: for no pictures, a peak of nothing, or a utilisation outside 0..1.
    """
    if pictures < 1 or not teraflops > 0 or not 0 < utilisation <= 1:
        raise ValueError(
            "an estimate needs pictures, a peak above 0 and a utilisation in (0, 1], got "
            f"{pictures}, {teraflops} and {utilisation}"
        )
    batch = setup.batch * setup.accumulate * setup.gpus
    updates, seconds = math.ceil(pictures / batch), cost.operations / (1e12 * teraflops * utilisation)
    return Run(
        pictures=pictures,
        batch=batch,
        updates=updates,
        teraflops=teraflops,
        utilisation=utilisation,
        seconds=seconds,
        hours=updates * seconds / 3600,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options; those that training has are called as there."""
    default = {item.name: item.default for item in fields(Setup)}
    parser.add_argument(
        "--base", type=Path, help="a diffusers folder whose config.json says the shapes; FLUX.1-Fill's by default"
    )
    parser.add_argument("--train", default=default["train"], choices=TRAINED, help="what is trained, with the adapter")
    parser.add_argument("--rank", type=int, default=default["rank"], help="of --train lora")
    parser.add_argument("--width", type=int, default=default["width"], help="of the adapter")
    parser.add_argument("--resolution", type=int, default=default["resolution"], help="pixels a side to paint")
    parser.add_argument("--grid", type=int, default=default["grid"], help="tokens a side of the VLM's pictures")
    parser.add_argument(
        "--localised", type=float, default=default["localised"], help="share of the pictures with only a box to paint"
    )
    parser.add_argument("--cached", action="store_true", help="the pictures come encoded, from a cache")
    parser.add_argument("--batch", type=int, default=default["batch"], help="pictures of a GPU at a time")
    parser.add_argument("--accumulate", type=int, default=default["accumulate"], help="batches of an update")
    parser.add_argument("--optimizer", default=default["optimizer"], choices=OPTIMIZERS)
    parser.add_argument("--precision", default=default["precision"], choices=("bf16", "no"), help="mixed precision")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations twice, do not keep them")
    parser.add_argument("--no-average", action="store_true", help="without the moving average of the trained weights")
    parser.add_argument("--sharding", default=default["sharding"], choices=SHARDINGS, help="what the GPUs share")
    parser.add_argument("--gpus", type=int, default=default["gpus"])
    parser.add_argument("--gpu", default="a100-80gb", choices=GPUS)
    parser.add_argument("--memory", type=float, metavar="GIB", help="of a GPU, in place of the published one")
    parser.add_argument("--tflops", type=float, help="peak of a GPU, in place of the published one (bfloat16)")
    parser.add_argument(
        "--utilisation", type=float, default=0.35, help="share of the peak that is reached; the default is a guess"
    )
    parser.add_argument("--pictures", type=int, default=1_600_000, help="seen in all; by default as in the paper")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers as JSON too")


def run(chosen: argparse.Namespace) -> None:
    """Prints the estimate for parsed options.

    Raises:
        ValueError: for options that are out of range or do not go together.
        OSError: if the JSON cannot be written, such as on a full disk.
    """
    if chosen.precision == "no" and chosen.tflops is None:
        raise ValueError("the published peaks are of bfloat16: give --tflops for training without mixed precision")
    named = {name: getattr(chosen, name) for name in Setup.__dataclass_fields__ if hasattr(chosen, name)}
    setup = Setup(config=fill_config(chosen.base), average=not chosen.no_average, **named)
    cost, gpu = cost_of(setup), GPUS[chosen.gpu]
    course = run_of(
        setup,
        cost,
        pictures=chosen.pictures,
        teraflops=gpu.teraflops if chosen.tflops is None else chosen.tflops,
        utilisation=chosen.utilisation,
    )
    memory = int((gpu.memory if chosen.memory is None else chosen.memory) * 2**30)
    print(table(setup, cost, course, memory))
    if chosen.json is not None:
        write_text(chosen.json, json.dumps(numbers(setup, cost, course, memory), indent=1) + "\n")
        print(f"wrote {chosen.json}")


def numbers(setup: Setup, cost: Cost, course: Run, memory: int) -> dict[str, Any]:
    """Everything as plain JSON values; bytes and operations are those of one GPU."""
    values = {"setup": asdict(setup), **asdict(cost), "peak": cost.peak, "run": asdict(course)}
    return values | {"gpu_memory": memory, "fits": _fits(cost, memory)}


def table(setup: Setup, cost: Cost, course: Run, memory: int) -> str:
    """The estimate in words and columns."""
    weights = {name: f"{count / 1e9:.2f}" for name, count in cost.weights.items()}
    shared = "" if setup.gpus == 1 else f", {setup.sharding}"
    how = [f"precision {setup.precision}", setup.optimizer, *(["checkpointing"] if setup.checkpointing else [])]
    rows = [(name, count) for name, count in cost.memory.items() if count]
    rows += [
        ("encoding a batch", cost.encoding),
        ("or forward and backward pass", cost.step),
        ("  kept for the backward pass", cost.kept),
        ("  gradients at its end", cost.gradients),
        ("or optimiser's step, with gradients", cost.optimizer_step),
        ("at the worst moment", cost.peak),
    ]
    verdict = "fits" if _fits(cost, memory) else f"does NOT fit: {_advice(setup)}"
    return "\n".join(
        [
            f"{weights['all']} G weights, trained: {weights['trained']} ({setup.train})",
            f"{setup.batch} pictures x {setup.accumulate} x {setup.gpus} GPU{shared}; {setup.resolution} pixels, "
            f"{(setup.resolution // 16) ** 2} latent tokens; {', '.join(how)}",
            "",
            f"{'each GPU':<40}{'GB':>8}",
            *(f"{name:<40}{count / 1e9:>8.2f}" for name, count in rows),
            f"{'there are':<40}{memory / 1e9:>8.2f}  {verdict}",
            "",
            f"{'operations of an update, T':<40}{cost.operations / 1e12:>8.1f}",
            f"{'  of a forward pass':<40}{cost.forward_operations / 1e12:>8.1f}",
            f"{'seconds an update':<40}{course.seconds:>8.2f}  at {course.utilisation:.0%} of {course.teraflops:g} T/s",
            f"{'updates':<40}{course.updates:>8}  of {course.batch} pictures",
            f"{'hours':<40}{course.hours:>8.1f}",
            "",
            "Not in it: the GPU's context and libraries, fragmentation, the sample sheets;",
            "in time also encoding pictures, and waiting for data and GPUs.",
        ]
    )


def _fits(cost: Cost, memory: int) -> bool:
    return cost.peak <= _ROOM * memory


def _advice(setup: Setup) -> str:
    options = {
        "--checkpointing": not setup.checkpointing,
        "a smaller --batch with more --accumulate": setup.batch > 1,
        "--sharding fsdp": setup.gpus > 1 and setup.sharding != "fsdp",
        "--optimizer adamw8bit": setup.optimizer != "adamw8bit",
        "--train lora": setup.train in ("attention", "all"),
    }
    left = [option for option, open_ in options.items() if open_]
    return f"try {', '.join(left)}" if left else "take larger GPUs, or more of them"
