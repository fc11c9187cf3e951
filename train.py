#!/usr/bin/env python
"""Trains a decoder for a VLM on pictures: `python train.py ...`; on many devices `accelerate launch train.py ...`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from dcdd_core.method.flow import DENSITIES, WEIGHTINGS
from dcdd_core.models.card import VARIANTS
from dcdd_core.pipelines.oom import is_out_of_memory
from dcdd_core.training import estimate
from dcdd_core.training.optimizers import OPTIMIZERS
from dcdd_core.training.plan import Plan
from dcdd_core.training.recipe import DecoderTraining
from dcdd_core.training.run import make_accelerator, run_bundle, run_cache, run_training
from dcdd_core.training.trainable import TRAINED
from dcdd_pico.embedded import model_paths

COMMANDS = ("train", "cache", "estimate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for a failure that is explained, 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] not in (*COMMANDS, "-h", "--help"):
        words.insert(0, "train")
    chosen = _parser().parse_args(words)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = lambda message, *_: print(f"train.py: {message}", file=sys.stderr)
            chosen.run(chosen)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            "train.py: out of memory: a run that has begun can go on with --checkpointing; a new one also with a "
            "smaller --batch and more --accumulate, --optimizer adamw8bit, --train lora, or FSDP (configs/accelerate)",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("train.py: stopped; the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    return 0


def train(chosen: argparse.Namespace) -> None:
    """Trains a decoder, or goes on; with --bundle-now writes a bundle of the newest checkpoint instead."""
    recipe = DecoderTraining(
        steps=chosen.steps,
        accumulation=chosen.accumulate,
        learning_rate=chosen.learning_rate,
        warmup=chosen.warmup,
        weight_decay=chosen.weight_decay,
        clip=chosen.clip,
        average_decay=chosen.average_decay,
        density=chosen.density,
        shift=chosen.shift,
        weighting=chosen.weighting,
        seed=chosen.seed,
        optimizer=chosen.optimizer,
        compiled=chosen.compile,
        recomputed=chosen.checkpointing,
    )
    plan = _plan(
        chosen,
        calibration=chosen.calibration,
        variant=chosen.variant,
        trained=chosen.train,
        rank=chosen.rank,
        seed=chosen.seed,
        licence=chosen.licence,
        **{name: getattr(chosen, name) for name in ("base", "bundle", "width") if getattr(chosen, name) is not None},
    )
    accelerator = make_accelerator(chosen.out, cpu=chosen.cpu, precision=chosen.precision, tracker=chosen.tracker)
    if chosen.bundle_now:
        run_bundle(chosen.out, plan, accelerator=accelerator, report=accelerator.print)
        return
    run_training(
        chosen.out,
        plan,
        recipe,
        accelerator=accelerator,
        data=chosen.data,
        column=chosen.column,
        cache=chosen.cache,
        verify=chosen.verify,
        batch=chosen.batch,
        window=chosen.window,
        workers=chosen.workers,
        localised=chosen.localised,
        samples=chosen.samples,
        sample_every=chosen.sample_every,
        save_every=chosen.save_every,
        log_every=chosen.log_every,
        report=accelerator.print,
    )


def cache(chosen: argparse.Namespace) -> None:
    """Encodes the pictures once, for any number of trainings."""
    accelerator = make_accelerator(cpu=chosen.cpu)
    run_cache(
        chosen.out,
        _plan(chosen),
        accelerator=accelerator,
        data=chosen.data,
        column=chosen.column,
        batch=chosen.batch,
        shard_size=chosen.shard_size,
        workers=chosen.workers,
        keep_pixels=chosen.keep_pixels,
    )


def _plan(chosen: argparse.Namespace, **options) -> Plan:
    if chosen.vlm == "pico":
        pico = model_paths()
        options = {"vae": pico["vae"], "bundle": pico["decoder"]} | options
        return Plan(vlm=pico["vlm"], resolution=chosen.resolution, **options)
    if chosen.vae is None:
        raise ValueError("a VLM of your own needs the autoencoder whose latents are painted: give --vae")
    return Plan(vlm=Path(chosen.vlm), vae=chosen.vae, resolution=chosen.resolution, **options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar=f"{{{','.join(COMMANDS)}}}")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--vlm", required=True, help="folder of a Janus model (only its VQ part is read), or 'pico', the embedded one"
    )
    common.add_argument("--vae", type=Path, help="FLUX's autoencoder: a diffusers folder, or ae.safetensors")
    common.add_argument("--column", help="of the pictures in a dataset or in webdataset shards")
    common.add_argument("--resolution", type=int, help="pixels a side to paint; the VLM's own size by default")
    common.add_argument("--workers", type=int, default=0, help="processes that decode pictures, for each device")
    common.add_argument(
        "--out", type=Path, required=True, help="folder to write into; a run goes on with what is there"
    )
    common.add_argument("--cpu", action="store_true", help="leave the GPUs alone")

    add = commands.add_parser(
        "train",
        parents=[common],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        help="train a decoder (also without this word)",
        description="Trains a decoder and writes its bundle, OUT/decoder.safetensors. The same command goes on with a "
        "run that was stopped.",
    )
    add.set_defaults(run=train)
    group = add.add_argument_group("what it starts from")
    group.add_argument("--base", type=Path, help="FLUX.1-Fill's transformer: a diffusers folder, or a single file")
    group.add_argument("--bundle", type=Path, help="a decoder bundle to go on from, instead of a new adapter")
    group.add_argument("--calibration", type=Path, help="file of `dcdd calibrate`; of --bundle by default")
    group.add_argument("--width", type=int, help="of a new adapter (128 by default)")
    group.add_argument("--licence", help="of the result; that of what it starts from by default")
    group = add.add_argument_group("what it learns from")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data", help="a folder of images, parquet files or webdataset shards, a saved dataset, or a pattern of files"
    )
    source.add_argument("--cache", type=Path, help="a folder that `train.py cache` wrote")
    group.add_argument("--verify", action="store_true", help="first compare all of --cache with its checksums")
    group.add_argument("--variant", default="lcdm+lc", choices=VARIANTS, help="of the conditions")
    group.add_argument("--localised", type=float, default=0.2, help="share of the pictures with only a box to paint")
    group.add_argument("--window", type=int, default=1000, help="pictures of a stream that are shuffled at a time")
    group = add.add_argument_group("how it learns")
    recipe = {field.name: field.default for field in fields(DecoderTraining)}
    group.add_argument("--train", default="attention", choices=TRAINED, help="what is trained, besides the adapter")
    group.add_argument("--rank", type=int, default=16, help="of --train lora")
    group.add_argument("--steps", type=int, default=50_000)
    group.add_argument("--batch", type=int, default=4, help="pictures of a device at a time")
    group.add_argument("--accumulate", type=int, default=recipe["accumulation"], help="batches of an update")
    group.add_argument("--learning-rate", type=float, default=1e-4, help="after the warm-up; then a half cosine down")
    group.add_argument("--warmup", type=int, default=500, help="steps")
    group.add_argument("--weight-decay", type=float, default=recipe["weight_decay"])
    group.add_argument("--clip", type=float, default=recipe["clip"], help="greatest length of the gradient")
    group.add_argument("--average-decay", type=float, default=0.9999, help="of the weights' moving average")
    group.add_argument("--density", default=recipe["density"], choices=DENSITIES, help="of the time")
    group.add_argument(
        "--shift", type=float, default=recipe["shift"], help="mu of the times' shift, above 0 towards the noise"
    )
    group.add_argument("--weighting", default=recipe["weighting"], choices=WEIGHTINGS, help="of the loss")
    group.add_argument("--optimizer", default=recipe["optimizer"], choices=OPTIMIZERS)
    group.add_argument(
        "--precision",
        choices=("bf16", "no"),
        help="mixed precision; by default what the launcher says, without one bf16 on a GPU and no on a CPU",
    )
    group.add_argument("--checkpointing", action="store_true", help="compute activations twice instead of keeping them")
    group.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks")
    group.add_argument("--seed", type=int, default=recipe["seed"])
    group = add.add_argument_group("what is seen of it")
    group.add_argument("--tracker", help="of accelerate, such as tensorboard; log.jsonl is written anyway")
    group.add_argument("--samples", type=int, default=4, help="pictures of the sample sheets")
    group.add_argument("--sample-every", type=int, default=1000, help="steps")
    group.add_argument("--save-every", type=int, default=500, help="steps")
    group.add_argument("--log-every", type=int, default=10, help="steps")
    group.add_argument(
        "--bundle-now",
        action="store_true",
        help="only write the bundle of the newest checkpoint, OUT/decoder-step-N.safetensors; the run may be under way",
    )

    add = commands.add_parser(
        "cache",
        parents=[common],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        help="encode all pictures once",
        description="Encodes all pictures once, for any number of trainings (--cache). The same command goes on with "
        "what is there.",
    )
    add.set_defaults(run=cache)
    add.add_argument("--data", required=True, help="as for training")
    add.add_argument("--batch", type=int, default=16, help="pictures encoded at a time")
    add.add_argument("--shard-size", type=int, default=1024, help="pictures of a file")
    add.add_argument(
        "--keep-pixels", action="store_true", help="for training with --localised; several times the space"
    )

    add = commands.add_parser(
        "estimate",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        help="say what a training would take",
        description="Says what memory and time a training would take. Nothing is loaded: it runs on shapes alone.",
    )
    add.set_defaults(run=estimate.run)
    estimate.add_arguments(add)
    return parser


if __name__ == "__main__":
    sys.exit(main())
