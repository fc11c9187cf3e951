"""`train.py estimate`: the memory and time that a decoder's training will need, before it is started.

G stands for 10^9, T for 10^12; a multiply-add counts as two FLOPs.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .. import registry
from ..files import write_text
from ..method.distillation import OBJECTIVES
from ..settings import require_number
from .cost import SHARDINGS, Cost, TrainingSetup, cost_of
from .masked_cost import MaskedSetup
from .optimizers import OPTIMIZERS
from .trainable import TRAINED
from .vlm_cost import CACHE_BATCH, PUBLISHED

_USABLE = 0.92
"""A training fits up to this fraction of a GPU's memory [choice]: the rest is for what is not counted."""

_MOST = 1e6
"""GiB, and TFLOP/s, beyond any GPU."""

_MOST_IMAGES = 10**15
"""Seen in total; beyond any training."""


@dataclass(frozen=True, kw_only=True)
class GPU:
    """A GPU's published numbers: peak in TFLOP/s (bfloat16, dense, accumulated in float32), memory in GiB."""

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


#: The options that describe a GPU, with their defaults.
GPU_OPTIONS: Mapping[str, Any] = {"--gpu": "a100-80gb", "--memory": None, "--tflops": None, "--utilisation": 0.35}


@dataclass(frozen=True, kw_only=True)
class Duration:
    """How long a training takes on GPUs that reach the fraction `utilisation` of their peak.

    Attributes:
        images: seen in total: images per epoch times epochs.
        batch: images per update, over all GPUs.
        teraflops: a GPU's peak, in TFLOP/s.
        seconds: per update.
        updates, hours: of the whole training.
    """

    images: int
    batch: int
    updates: int
    teraflops: float
    utilisation: float
    seconds: float
    hours: float


def duration_of(
    setup: TrainingSetup | MaskedSetup, cost: Cost, *, images: int, teraflops: float, utilisation: float
) -> Duration:
    """The time that the FLOPs take; waiting for data and for other GPUs is part of `utilisation` or not counted.

    Raises:
        ValueError: for less than one image, a peak that is not positive, or a utilisation outside (0, 1].
    """
    if images < 1 or not teraflops > 0 or not 0 < utilisation <= 1:
        raise ValueError(
            "an estimate needs at least one image, a peak above 0 and a utilisation in (0, 1], got "
            f"{images}, {teraflops} and {utilisation}"
        )
    batch = setup.batch * setup.accumulate * setup.gpus
    updates, seconds = math.ceil(images / batch), cost.flops / (1e12 * teraflops * utilisation)
    return Duration(
        images=images,
        batch=batch,
        updates=updates,
        teraflops=teraflops,
        utilisation=utilisation,
        seconds=seconds,
        hours=updates * seconds / 3600,
    )


def add_arguments(parser: argparse.ArgumentParser, path: Callable[[str], Path] = Path) -> None:
    """Adds the options; those that training also has have the same names.

    Args:
        path: converts the value of an option that is a path.
    """
    default = {item.name: item.default for item in fields(TrainingSetup)}
    parser.add_argument(
        "--base", type=path, help="a diffusers folder; its config.json has the shapes (default: FLUX.1-Fill's)"
    )
    parser.add_argument(
        "--train", default=default["train"], choices=TRAINED, help="what is trained, besides the adapter"
    )
    parser.add_argument("--rank", type=int, default=default["rank"], help="rank of --train lora")
    parser.add_argument("--width", type=int, default=default["width"], help="width of the adapter")
    parser.add_argument("--resolution", type=int, default=default["resolution"], help="side of the images in pixels")
    parser.add_argument("--grid", type=int, default=default["grid"], help="side of the VLM's token grid")
    parser.add_argument(
        "--localised", type=float, default=default["localised"], help="share of images in which only a box is painted"
    )
    parser.add_argument("--cached", action="store_true", help="the images come encoded, from a cache")
    parser.add_argument(
        "--vlm-conditions",
        type=float,
        metavar="SHARE",
        default=default["vlm_conditions"],
        help="the share of the examples that get the VLM's own conditions, with --cached from the cache",
    )
    parser.add_argument(
        "--vlm-model", default=default["vlm_model"], choices=PUBLISHED, help="the VLM of --vlm-conditions"
    )
    parser.add_argument(
        "--student-steps",
        type=int,
        default=default["student_steps"],
        help="of `train.py distill`; 0 for a training on images",
    )
    parser.add_argument(
        "--teacher-steps", type=int, default=default["teacher_steps"], help="of the teacher of --student-steps"
    )
    parser.add_argument(
        "--objective", default=default["objective"], choices=OBJECTIVES, help="of the student of --student-steps"
    )
    parser.add_argument("--batch", type=int, default=default["batch"], help="images per GPU and micro-batch")
    parser.add_argument("--accumulate", type=int, default=default["accumulate"], help="micro-batches per update")
    parser.add_argument("--optimizer", default=default["optimizer"], choices=OPTIMIZERS, help="optimiser")
    parser.add_argument("--precision", default=default["precision"], choices=("bf16", "no"), help="mixed precision")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--no-average", action="store_true", help="without the EMA of the trained weights")
    parser.add_argument(
        "--sharding", default=default["sharding"], choices=SHARDINGS, help="what is sharded over the GPUs"
    )
    parser.add_argument("--gpus", type=int, default=default["gpus"], help="number of GPUs")
    add_gpu_arguments(parser)
    parser.add_argument(
        "--pictures", type=int, default=1_600_000, help="images seen in total; the default is the paper's"
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="also write the numbers as JSON")


def add_gpu_arguments(parser: argparse._ActionsContainer) -> None:
    """Adds `GPU_OPTIONS`."""
    parser.add_argument("--gpu", default=GPU_OPTIONS["--gpu"], choices=GPUS, help="the GPU, for its memory and peak")
    parser.add_argument("--memory", type=float, metavar="GIB", help="memory of a GPU (default: the published)")
    parser.add_argument(
        "--tflops", type=float, help="peak of a GPU in TFLOP/s (default: the published one, of bfloat16)"
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        default=GPU_OPTIONS["--utilisation"],
        help="fraction of the peak that is reached; the default is a guess",
    )


def run(chosen: argparse.Namespace) -> None:
    """Prints the estimate for the parsed options.

    Raises:
        ValueError: for options that are out of range or exclude each other.
        OSError: if the JSON cannot be written, such as on a full disk.
    """
    check_gpu(chosen)
    if _changed(chosen, "vlm_model") and not chosen.vlm_conditions:
        raise ValueError("--vlm-model would do nothing without --vlm-conditions: give both, or leave it out")
    if _changed(chosen, "rank") and chosen.train != "lora":
        raise ValueError("--rank would do nothing without --train lora: give both, or leave it out")
    given = [f"--{name.replace('_', '-')}" for name in ("teacher_steps", "objective") if _changed(chosen, name)]
    if given and not chosen.student_steps:
        raise ValueError(f"{', '.join(given)} would do nothing without --student-steps: give that too, or leave it out")
    require_number("pictures", chosen.pictures, whole=True, least=1, most=_MOST_IMAGES)
    named = {name: getattr(chosen, name) for name in TrainingSetup.__dataclass_fields__ if hasattr(chosen, name)}
    if chosen.base is not None:
        named["config"] = registry.base_family(chosen.base).config_of(str(chosen.base))
    setup = TrainingSetup(average=not chosen.no_average, **named)
    try:
        cost = cost_of(setup)
    except RuntimeError as error:  # No memory is allocated, but PyTorch cannot count more than 2^63 bytes per tensor.
        said = str(error).splitlines()[0]
        raise ValueError(
            f"these sizes are beyond what can be counted ({said}): give a smaller --grid, --batch or --resolution"
        ) from error
    teraflops, memory = gpu_of(chosen)
    duration = duration_of(setup, cost, images=chosen.pictures, teraflops=teraflops, utilisation=chosen.utilisation)
    print(table(setup, cost, duration, memory))
    if chosen.json is not None:
        write_text(chosen.json, json.dumps(numbers(setup, cost, duration, memory), indent=1) + "\n")
        print(f"wrote {chosen.json}")


def _changed(chosen: argparse.Namespace, name: str) -> bool:
    return getattr(chosen, name) != getattr(TrainingSetup, name)


def check_gpu(chosen: argparse.Namespace) -> None:
    """Refuses numbers of a GPU that are out of range.

    Raises:
        ValueError: also for training without mixed precision, whose peak is not published.
    """
    for name in ("memory", "tflops"):
        require_number(name, getattr(chosen, name), above=0, most=_MOST, optional=True)
    if chosen.precision == "no" and chosen.tflops is None:
        raise ValueError("the published peaks are for bfloat16: give --tflops for training without mixed precision")


def gpu_of(chosen: argparse.Namespace) -> tuple[float, int]:
    """Peak in TFLOP/s and memory in bytes of the chosen GPU."""
    gpu = GPUS[chosen.gpu]
    teraflops = gpu.teraflops if chosen.tflops is None else chosen.tflops
    return teraflops, int((gpu.memory if chosen.memory is None else chosen.memory) * 2**30)


def numbers(setup: TrainingSetup, cost: Cost, duration: Duration, memory: int) -> dict[str, Any]:
    """The estimate as plain JSON values; bytes and FLOPs are those of one GPU."""
    costs = _renamed(asdict(cost))
    costs["memory"] = _renamed(cost.memory)
    values = {"setup": asdict(setup), **costs, "peak": cost.peak, "run": _renamed(asdict(duration))}
    once = caching(setup, duration)
    values |= {} if once is None else {"caching_vlm_conditions": once}
    return values | {"gpu_memory": memory, "fits": fits(cost, memory)}


def table(setup: TrainingSetup, cost: Cost, duration: Duration, memory: int) -> str:
    """The estimate as text."""
    weights = {name: f"{count / 1e9:.2f}" for name, count in cost.weights.items()}
    sharding = "" if setup.gpus == 1 else f", {setup.sharding}"
    how = [f"precision {setup.precision}", setup.optimizer, *(["checkpointing"] if setup.checkpointing else [])]
    verdict = "fits" if fits(cost, memory) else f"does NOT fit: {_advice(setup)}"
    return "\n".join(
        [
            f"{weights['all']} G weights, trained: {weights['trained']} ({setup.train})",
            f"{setup.batch} images x {setup.accumulate} x {setup.gpus} GPU{sharding}; {setup.resolution} pixels, "
            f"{cost.latent_tokens} latent tokens; {', '.join(how)}",
            *_distillation_lines(setup),
            "",
            *lines(cost, duration, memory, verdict),
            *([""] if setup.vlm_conditions else []),
            *_caching_lines(setup, duration),
            "",
            "Memory not counted: the GPU's context and libraries, fragmentation, the sample sheets;",
            "time not counted: encoding images, and waiting for data and other GPUs.",
        ]
    )


def lines(cost: Cost, duration: Duration, memory: int, verdict: str) -> list[str]:
    """The cost of a training, as lines of text."""
    rows = [(name, count) for name, count in cost.memory.items() if count]
    rows += [
        ("encoding a batch", cost.encoding),
        ("or forward and backward pass", cost.step),
        ("  of it, activations", cost.activations),
        ("  of it, gradients at the end", cost.gradients),
        ("or optimiser's step, with gradients", cost.optimizer_step),
        ("peak", cost.peak),
    ]
    return [
        f"{'each GPU':<40}{'GB':>8}",
        *(f"{name:<40}{count / 1e9:>8.2f}" for name, count in rows),
        f"{'available':<40}{memory / 1e9:>8.2f}  {verdict}",
        "",
        f"{'TFLOPs per update':<40}{cost.flops / 1e12:>8.1f}",
        f"{'  of a forward pass':<40}{cost.forward_flops / 1e12:>8.1f}",
        f"{'seconds per update':<40}{duration.seconds:>8.2f}  at {duration.utilisation:.0%} of "
        f"{duration.teraflops:g} TFLOP/s",
        f"{'updates':<40}{duration.updates:>8}  of {duration.batch} images",
        f"{'hours':<40}{duration.hours:>8.1f}",
    ]


def caching(setup: TrainingSetup, duration: Duration) -> dict[str, float] | None:
    """The one-time cost of `train.py cache --vlm-conditions`; None if the training does not use it.

    Bytes of weights and of a batch on each GPU, FLOPs per image, and hours for a million images on all GPUs.
    """
    if not setup.vlm_conditions or not setup.cached:
        return None
    vlm, tokens = PUBLISHED[setup.vlm_model], setup.grid**2
    flops = vlm.flops(tokens)
    hours = 1e6 * flops / (1e12 * duration.teraflops * duration.utilisation) / 3600 / setup.gpus
    memory = {"weights": 2 * vlm.weights, "batch": vlm.working_memory(CACHE_BATCH, tokens)}
    return {**memory, "operations": flops, "hours_per_million": hours}


def _caching_lines(setup: TrainingSetup, duration: Duration) -> list[str]:
    if not setup.vlm_conditions:
        return []
    found = caching(setup, duration)
    if found is None:
        return [
            f"Counted at every step: {setup.vlm_model}'s pass over a share of {setup.vlm_conditions:g} of the images."
        ]
    return [
        f"Before, once: {setup.vlm_model} in `train.py cache --vlm-conditions`, {CACHE_BATCH} images at a time",
        f"{'GB of its weights, in bfloat16':<40}{found['weights'] / 1e9:>8.2f}",
        f"{'GB besides':<40}{found['batch'] / 1e9:>8.2f}",
        f"{'TFLOPs per image':<40}{found['operations'] / 1e12:>8.1f}",
        f"{'hours per million images':<40}{found['hours_per_million']:>8.1f}",
    ]


def _distillation_lines(setup: TrainingSetup) -> list[str]:
    if not setup.student_steps:
        return []
    passes = OBJECTIVES[setup.objective].teacher_passes(setup.schedule)
    return [
        f"a student of {setup.student_steps} steps, objective {setup.objective}; its teacher of {setup.teacher_steps} "
        f"makes {passes} passes over every micro-batch, twice as many if it is guided on the condition"
    ]


#: Names in the JSON file, where they differ from the attributes.
_IN_JSON = {
    "activations": "kept",
    "forward_flops": "forward_operations",
    "flops": "operations",
    "images": "pictures",
    "EMA": "moving average",
}


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {_IN_JSON.get(name, name): value for name, value in values.items()}


def fits(cost: Cost, memory: int) -> bool:
    """Whether a training fits a GPU with this many bytes of memory."""
    return cost.peak <= _USABLE * memory


def _advice(setup: TrainingSetup) -> str:
    options = {
        "--checkpointing": not setup.checkpointing,
        "a smaller --batch with more --accumulate": setup.batch > 1,
        "--sharding fsdp": setup.gpus > 1 and setup.sharding != "fsdp",
        "--optimizer adamw8bit": setup.optimizer != "adamw8bit",
        "--train lora": setup.train in ("attention", "all"),
    }
    left = [option for option, open_ in options.items() if open_]
    return f"try {', '.join(left)}" if left else "use larger GPUs, or more of them"
