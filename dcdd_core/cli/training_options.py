"""Options that the training commands of `dcdd train` share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from ..pipelines.image_files import ReadPolicy
from ..training.captions import COLUMNS, FIELDS
from ..training.config import DataConfig, OptimizationConfig, RunConfig
from ..training.held_out import MOST
from ..training.optimizers import OPTIMIZERS
from .arguments import path, path_text

#: Options of `add_images` that say which images are used, with their defaults.
IMAGES: Mapping[str, Any] = {"--column": None, "--min-side": None, "--skip-unreadable": ReadPolicy.skip_unreadable}
#: Why they would have no effect with --cache.
CACHED = "what a cache holds was chosen when it was written"
#: What to do when a training runs out of memory; each command adds its own ways to start a smaller one.
LESS_MEMORY = (
    "out of memory: resume the run with --checkpointing, or with a smaller --batch and as much more --accumulate; or "
    "start a new one with --optimizer adamw8bit"
)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds an option's default, if it has one, to a help text that does not state it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or isinstance(action.default, bool) or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def add_images(command: argparse.ArgumentParser, *, side: str) -> None:
    """Adds options for which images are used, and how many processes decode them.

    Args:
        side: the option that gives the images' side.
    """
    command.add_argument("--column", help="column of the images, in a dataset or in webdataset shards")
    command.add_argument(
        "--min-side",
        type=int,
        metavar="PIXELS",
        help=f"leave out images whose shorter side is smaller, rather than enlarge them (default: half of {side})",
    )
    command.add_argument(
        "--skip-unreadable",
        type=float,
        metavar="SHARE",
        default=ReadPolicy.skip_unreadable,
        help="the largest share of the images that may be unreadable and left out",
    )
    command.add_argument("--workers", type=int, default=0, help="processes that decode images, per device")


def add_caption_column(group: argparse._ActionsContainer) -> None:
    """Adds the option for where the images' captions are."""
    columns = " or ".join(COLUMNS)
    group.add_argument(
        "--caption-column",
        metavar="NAME",
        help=f"column of the captions, or field of webdataset samples (default: {columns} in a dataset, "
        f"{' or '.join(FIELDS)} in a sample); in a folder, the caption of a.jpg is in a.txt",
    )


def add_source(group: argparse._ArgumentGroup) -> None:
    """Adds options for the images or the cache to train on."""
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data",
        type=path_text,
        help="a folder of images, parquet files or webdataset shards, a saved dataset, or a pattern of shards",
    )
    source.add_argument("--cache", type=path, help="a folder that `train.py cache` wrote")
    group.add_argument("--verify", action="store_true", help="first compare the whole --cache with its checksums")
    group.add_argument(
        "--window", type=int, default=DataConfig.window, help="images of a stream that are shuffled at a time"
    )


def add_updates(
    group: argparse._ArgumentGroup, *, learning_rate: float, weight_decay: float, ema_decay: float, batch: int
) -> None:
    """Adds options for how the weights are updated; the arguments are their defaults."""
    default = {field.name: field.default for field in fields(OptimizationConfig)}
    group.add_argument("--steps", type=int, default=50_000, help="updates of the weights")
    group.add_argument("--batch", type=int, default=batch, help="images per device and micro-batch")
    group.add_argument("--accumulate", type=int, default=default["accumulation"], help="micro-batches per update")
    group.add_argument(
        "--learning-rate", type=float, default=learning_rate, help="the peak, after the warm-up; then a cosine"
    )
    group.add_argument("--warmup", type=int, default=500, help="updates of linear warm-up")
    group.add_argument("--weight-decay", type=float, default=weight_decay, help="of the optimiser")
    group.add_argument(
        "--clip", type=float, default=default["clip"], help="largest gradient norm; inf turns clipping off"
    )
    group.add_argument("--average-decay", type=float, default=ema_decay, help="decay of the weights' EMA")
    group.add_argument("--optimizer", default=default["optimizer"], choices=OPTIMIZERS, help="optimiser")
    group.add_argument(
        "--precision",
        choices=("bf16", "no"),
        help="mixed precision (default: the launcher's, or else bf16 on a GPU and no on a CPU)",
    )
    group.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    group.add_argument("--seed", type=int, default=default["seed"], help="of all random draws")


def add_logging(command: argparse.ArgumentParser, *, best: str) -> argparse._ArgumentGroup:
    """Adds options for what is written, and how often.

    Args:
        best: where the weights with the lowest loss are, for the help text.
    """
    group = command.add_argument_group("logging and checkpoints")
    run = {field.name: field.default for field in fields(RunConfig)}
    group.add_argument("--tracker", help="one of accelerate's, such as tensorboard; log.jsonl is written anyway")
    group.add_argument("--samples", type=int, default=run["samples"], help="images on a sample sheet")
    group.add_argument(
        "--sample-every",
        type=int,
        default=run["sample_every"],
        help="updates between evaluations: the loss on held-out images, and sample sheets",
    )
    group.add_argument(
        "--held-out",
        type=float,
        default=run["held_out"],
        metavar="FRACTION",
        help=f"of the images, at most {MOST}, that are never trained on: eval/loss is the loss on them, and {best} the "
        "weights with the lowest; 0 for none",
    )
    group.add_argument(
        "--save-every",
        type=int,
        help=f"updates between checkpoints (default: {run['save_every']}, or a quarter of a shorter run)",
    )
    group.add_argument("--keep", type=int, default=run["keep"], help="checkpoints that are kept, the newest")
    group.add_argument("--log-every", type=int, default=run["log_every"], help="updates between lines of the log")
    return group


def optimization_config(args: argparse.Namespace, **own: Any) -> OptimizationConfig:
    """The configuration from the options of `add_updates` and a command's own settings.

    Raises:
        ValueError: for numbers out of range.
    """
    return OptimizationConfig(
        steps=args.steps,
        accumulation=args.accumulate,
        learning_rate=args.learning_rate,
        warmup=args.warmup,
        weight_decay=args.weight_decay,
        clip=args.clip,
        ema_decay=args.average_decay,
        seed=args.seed,
        optimizer=args.optimizer,
        activation_checkpointing=args.checkpointing,
        **own,
    )


def data_config(args: argparse.Namespace, **own: Any) -> DataConfig:
    """The configuration from the options of `add_source` and `add_images` and a command's own settings.

    Raises:
        ValueError: for numbers out of range, and for --verify without --cache.
    """
    return DataConfig(
        images=args.data,
        column=args.column,
        cache=args.cache,
        verify=args.verify,
        batch=args.batch,
        window=args.window,
        workers=args.workers,
        min_side=args.min_side,
        skip_unreadable=args.skip_unreadable,
        **own,
    )


def given(args: argparse.Namespace, defaults: Mapping[str, Any]) -> list[str]:
    """The options that differ from these defaults; those that the command lacks count as not given."""
    held = vars(args)
    return [name for name, default in defaults.items() if held.get(name[2:].replace("-", "_"), default) != default]


def refuse_idle(args: argparse.Namespace, cases: Iterable[tuple[bool, Mapping[str, Any], str]]) -> None:
    """Refuses options that would have no effect.

    Args:
        cases: (whether some options would have no effect, these options with their defaults, why).

    Raises:
        ValueError: naming those that are given, and why.
    """
    for idle, defaults, reason in cases:
        if idle and (found := given(args, defaults)):
            raise ValueError(f"{', '.join(found)} would do nothing: {reason}; leave it out")


def run_config(args: argparse.Namespace) -> RunConfig:
    """The configuration from the options of `add_logging`; by default, runs below 2000 updates save four checkpoints.

    Raises:
        ValueError: for numbers out of range.
    """
    every = min(RunConfig.save_every, max(1, args.steps // 4)) if args.save_every is None else args.save_every
    return RunConfig(
        samples=args.samples,
        sample_every=args.sample_every,
        save_every=every,
        log_every=args.log_every,
        keep=args.keep,
        held_out=args.held_out,
    )
