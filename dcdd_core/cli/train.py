"""`dcdd train`: trains a decoder for a VLM, distils it into a student of few steps, or trains a masked sampler of the
VLM's tokens; encodes images; estimates the memory and time of a training."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch

from dcdd_pico.embedded import VLMS, model_paths, own_calibration

from .. import registry
from ..method.distillation import OBJECTIVES
from ..method.flow import DENSITIES, WEIGHTINGS
from ..models.bundle import read_card
from ..models.card import READINGS, VARIANTS
from ..pipelines.image_files import ReadPolicy
from ..pipelines.oom import is_out_of_memory
from .arguments import path, path_text, printable_output

try:
    from ..training import estimate
    from ..training.captions import Captions
    from ..training.config import DataConfig, DistillationConfig, OptimizationConfig
    from ..training.masked_plan import MaskedPlan
    from ..training.plan import Plan
    from ..training.progress import ProgressBar
    from ..training.run import make_accelerator, run_bundle, run_cache, run_training
    from ..training.stop import TrainingStopped
    from ..training.trainable import TRAINED
    from . import train_progressive
    from . import training_options as options
except ImportError as error:
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6):
        raise
    sys.exit(f"train.py: training needs torch 2.6 or newer, this is {torch.__version__} ({error}): update torch")

COMMANDS = ("train", "distill", "cache", "estimate", "progressive")
_RANK = 16
_LESS_MEMORY = f"{options.LESS_MEMORY}, --train lora, or FSDP (configs/accelerate)"


@printable_output()
def main(arguments: Sequence[str] | None = None, *, prog: str = "train.py") -> int:
    """Runs one of `COMMANDS`, "train" if none is named.

    Args:
        arguments: None for the process's own.
        prog: the name in usage texts and messages.

    Returns:
        The exit status: 0, 1 for a failure that is explained, 130 for Ctrl-C, 143 for SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] not in (*COMMANDS, "-h", "--help"):
        words.insert(0, "train")
    args = parser(prog).parse_args(words)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = lambda message, *_: print(f"{prog}: {message}", file=sys.stderr)
            args.run(args)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"{prog}: {getattr(args, 'less_memory', _LESS_MEMORY)}", file=sys.stderr)
        return 1
    except TrainingStopped as stopped:  # Its message has been printed.
        return stopped.status
    except KeyboardInterrupt:
        how = "run the same command again to continue; a training resumes from its newest checkpoint"
        print(f"{prog}: interrupted; {how}", file=sys.stderr)
        return 130
    return 0


def train(args: argparse.Namespace) -> None:
    """Trains a decoder, or resumes; with --bundle-now writes a bundle of the newest checkpoint instead."""
    optimization = options.optimization_config(
        args, density=args.density, shift=args.shift, weighting=args.weighting, compile=args.compile
    )
    plan = _plan(
        args,
        calibration=args.calibration,
        variant=args.variant,
        reads=args.reads,
        trained=args.train,
        rank=args.rank,
        seed=args.seed,
        licence=args.licence,
        drop_condition=args.drop_condition,
        **{name: getattr(args, name) for name in ("base", "bundle", "width") if getattr(args, name) is not None},
    )
    _run(args, plan, optimization)


def distill(args: argparse.Namespace) -> None:
    """Distils a decoder into a student, or resumes; with --bundle-now bundles the newest checkpoint instead."""
    optimization = options.optimization_config(args, compile=args.compile)
    distillation = DistillationConfig(
        steps=args.student_steps, objective=args.objective, teacher_steps=args.teacher_steps, shift=args.shift
    )
    given = {name: getattr(args, name) for name in ("base", "bundle", "licence") if getattr(args, name) is not None}
    plan = _plan(args, trained=args.train, rank=args.rank, seed=args.seed, distillation=distillation, **given)
    if plan.bundle is not None:
        plan = replace(plan, variant=read_card(plan.bundle).variant)
    _run(args, plan, optimization)


def _run(args: argparse.Namespace, plan: Plan, optimization: OptimizationConfig) -> None:
    captions = Captions(column=args.caption_column, required=False) if args.vlm_conditions and args.data else None
    data = options.data_config(args, localised=args.localised, vlm_conditions=args.vlm_conditions, captions=captions)
    run = options.run_config(args)
    accelerator = make_accelerator(args.out, cpu=args.cpu, precision=args.precision, tracker=args.tracker)
    if args.bundle_now:
        run_bundle(args.out, plan, accelerator=accelerator, report=accelerator.print)
    else:
        progress = ProgressBar(args.out.name, args.steps)
        report = accelerator.print
        run_training(args.out, plan, optimization, data, run, accelerator=accelerator, report=report, progress=progress)


def cache(args: argparse.Namespace) -> None:
    """Encodes images once, for any number of trainings.

    Raises:
        ValueError: also for a cache that is neither for decoders nor for masked samplers.
    """
    captioned = args.captions or args.vlm_conditions
    if args.caption_column is not None and not captioned:
        raise ValueError(
            "--caption-column would do nothing without --captions or --vlm-conditions: give one of them, or leave it "
            "out"
        )
    of_decoder = {"--calibration": None, "--bundle": None, "--reads": None}
    options.refuse_idle(
        args, [(not args.vlm_conditions, of_decoder, "without --vlm-conditions a cache belongs to no decoder")]
    )
    tokens_alone = args.captions and args.vae is None and args.vlm not in VLMS
    if tokens_alone and args.keep_pixels:
        raise ValueError("--keep-pixels would do nothing without --vae: pixels are for decoders; leave it out")
    if tokens_alone and args.vlm_conditions:
        raise ValueError("--vlm-conditions are for decoders, whose latents need --vae: give it, or leave them out")
    served = {"calibration": args.calibration, "reads": args.reads}
    if args.bundle is not None:
        served["bundle"] = args.bundle
    run_cache(
        args.out,
        MaskedPlan(vlm=Path(args.vlm), side=args.resolution) if tokens_alone else _plan(args, **served),
        accelerator=make_accelerator(cpu=args.cpu),
        images=args.data,
        column=args.column,
        captions=Captions(column=args.caption_column, required=args.captions) if captioned else None,
        batch=args.batch,
        shard_size=args.shard_size,
        workers=args.workers,
        keep_pixels=args.keep_pixels,
        vlm_conditions=args.vlm_conditions,
        policy=ReadPolicy(min_side=args.min_side, skip_unreadable=args.skip_unreadable),
    )


def _plan(args: argparse.Namespace, **given) -> Plan:
    _refuse_idle(args)
    if args.vlm in VLMS:
        vlm = VLMS[args.vlm]
        pico = model_paths(vlm=vlm)
        if "bundle" not in given and given.get("calibration") is None and given.get("variant") in (None, "lcdm+lc"):
            given["calibration"] = own_calibration(vlm=vlm)
        given = {"vae": pico["vae"], "bundle": pico["decoder"]} | given
        return Plan(vlm=pico["vlm"], resolution=args.resolution, **given)
    if args.vae is None:
        registry.sampler_family(args.vlm)  # A VLM that does not exist is reported first.
        raise ValueError("give --vae, the autoencoder whose latents the decoder paints: only pico has its own")
    return Plan(vlm=Path(args.vlm), vae=args.vae, resolution=args.resolution, **given)


def _refuse_idle(args: argparse.Namespace) -> None:
    """Refuses options that would have no effect given the others.

    Raises:
        ValueError: naming them, and why.
    """
    held = vars(args)
    starts = args.vlm in VLMS or held.get("bundle") is not None
    cases = [
        (args.vlm in VLMS, {"--vae": None}, "pico has its own autoencoder"),
        (starts, {"--width": None}, "the decoder that is started from has its own adapter"),
        (held.get("train") != "lora", {"--rank": _RANK}, "only --train lora has a rank"),
        (held.get("cache") is not None, {**options.IMAGES, "--caption-column": None}, options.CACHED),
        (
            not (args.vlm_conditions or held.get("captions")),
            {"--caption-column": None},
            "without --vlm-conditions no captions are read",
        ),
    ]
    options.refuse_idle(args, cases)


def parser(prog: str) -> argparse.ArgumentParser:
    """The parser of the commands."""
    top = argparse.ArgumentParser(prog=prog, description=__doc__)
    commands = top.add_subparsers(required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    _add_train(commands, prog)
    _add_distill(commands)
    _add_cache(commands)
    command = commands.add_parser(
        "estimate",
        formatter_class=options.Help,
        help="estimate the memory and time of a training",
        description="Estimates the memory and time of a training. No weights are loaded: shapes are enough. That "
        "of a masked sampler is estimated by `train.py progressive --estimate`.",
    )
    command.set_defaults(run=estimate.run)
    estimate.add_arguments(command, path)
    train_progressive.add(commands)
    return top


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--vlm",
        type=path_text,
        required=True,
        help=f"folder of a VLM, or an embedded one ({', '.join(VLMS)}); without --vlm-conditions only its image "
        "tokenizer is read",
    )
    command.add_argument("--vae", type=path, help="FLUX's autoencoder: a diffusers folder, or ae.safetensors")
    options.add_images(command, side="--resolution")
    command.add_argument("--resolution", type=int, help="side of the images in pixels (default: the VLM's own)")
    command.add_argument("--out", type=path, required=True, help="folder to write to; a run there is resumed")
    command.add_argument("--cpu", action="store_true", help="train on the CPU even if there is a GPU")


def _add_train(commands: argparse._SubParsersAction, prog: str) -> None:
    command = commands.add_parser(
        "train",
        prog=prog,
        formatter_class=options.Help,
        help="train a decoder (the default)",
        description="Trains a decoder and writes its bundle, OUT/decoder.safetensors. The same command resumes a run "
        "that was stopped.",
    )
    command.set_defaults(run=train)
    _add_common(command)
    group = command.add_argument_group("starting point")
    group.add_argument("--base", type=path, help="FLUX.1-Fill's transformer: a diffusers folder, or a single file")
    group.add_argument("--bundle", type=path, help="a decoder bundle to start from, instead of a new adapter")
    group.add_argument("--calibration", type=path, help="a file of `dcdd calibrate` (default: that of --bundle)")
    group.add_argument("--width", type=int, help="width of a new adapter (default: 128)")
    group.add_argument("--licence", help="licence of the result (default: that of the starting point)")

    group = command.add_argument_group("data")
    _add_examples(group)
    group.add_argument("--variant", default="lcdm+lc", choices=VARIANTS, help="kind of condition")
    _add_reads(group)
    group.add_argument(
        "--drop-condition",
        type=float,
        metavar="SHARE",
        help="share of the examples whose condition is left out, 0.1 is usual; the decoder can then be guided on the "
        "condition, `dcdd generate --condition-guidance` (default: that of --bundle, or 0)",
    )

    group = command.add_argument_group("optimisation")
    default = {field.name: field.default for field in fields(OptimizationConfig)}
    _add_optimisation(group, ema_decay=0.9999)
    group.add_argument("--density", default=default["density"], choices=DENSITIES, help="of the sampled times")
    group.add_argument(
        "--shift", type=float, default=default["shift"], help="mu of the time shift; positive means more noise"
    )
    group.add_argument("--weighting", default=default["weighting"], choices=WEIGHTINGS, help="of the loss over time")
    _add_logging(command)


def _add_distill(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "distill",
        formatter_class=options.Help,
        help="make a student that paints in a few steps",
        description="Makes a student that paints in 1, 2 or 4 steps what a trained decoder, its teacher, paints in "
        "many, and writes its bundle, OUT/decoder.safetensors. The images give the conditions; what is learned are the "
        "teacher's images. The same command resumes a run that was stopped.",
    )
    command.set_defaults(run=distill)
    _add_common(command)
    group = command.add_argument_group("teacher and student")
    group.add_argument("--bundle", type=path, help="the teacher, a decoder bundle (default: with --vlm pico, pico's)")
    group.add_argument("--base", type=path, help="FLUX.1-Fill's transformer, where the bundle does not hold all of it")
    told = {field.name: field.default for field in fields(DistillationConfig)}
    group.add_argument("--student-steps", type=int, default=told["steps"], help="of the student: 1, 2 or 4")
    group.add_argument("--teacher-steps", type=int, help="of the teacher (default: as its card says)")
    group.add_argument(
        "--objective",
        default=told["objective"],
        choices=OBJECTIVES,
        help="what the student learns, see docs/training.md",
    )
    group.add_argument("--shift", type=float, metavar="MU", help="time shift of the student (default: the teacher's)")
    group.add_argument("--licence", help="licence of the result (default: that of the teacher)")
    _add_examples(command.add_argument_group("data"))
    _add_optimisation(command.add_argument_group("optimisation"), ema_decay=0.999)
    command.set_defaults(steps=5_000, warmup=100)
    _add_logging(command)


def _add_examples(group: argparse._ArgumentGroup) -> None:
    """Adds options for what the examples are made of."""
    data = {field.name: field.default for field in fields(DataConfig)}
    options.add_source(group)
    group.add_argument(
        "--vlm-conditions",
        type=float,
        metavar="SHARE",
        default=data["vlm_conditions"],
        help="the share of the examples whose condition is the VLM's own of image and caption, in the place of "
        "proxies; images without a caption keep proxies",
    )
    options.add_caption_column(group)
    group.add_argument(
        "--localised", type=float, default=data["localised"], help="share of images in which only a box is painted"
    )


def _add_optimisation(group: argparse._ArgumentGroup, *, ema_decay: float) -> None:
    """Adds options for what is trained, and how its weights are updated."""
    group.add_argument("--train", default="attention", choices=TRAINED, help="what is trained, besides the adapter")
    group.add_argument("--rank", type=int, default=_RANK, help="rank of --train lora")
    defaults = {"learning_rate": 1e-4, "weight_decay": OptimizationConfig.weight_decay, "ema_decay": ema_decay}
    options.add_updates(group, **defaults, batch=DataConfig.batch)
    group.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks")


def _add_logging(command: argparse.ArgumentParser) -> None:
    group = options.add_logging(command, best="OUT/best.safetensors")
    group.add_argument(
        "--bundle-now",
        action="store_true",
        help="only write a bundle of the newest checkpoint, OUT/decoder-step-N.safetensors; the run may still be going",
    )


def _add_reads(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--reads",
        choices=READINGS,
        help="what of the VLM's output the decoder is served (default: as --bundle says, or its logits)",
    )


def _add_cache(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "cache",
        formatter_class=options.Help,
        help="encode images once, for any number of trainings",
        description="Encodes all images once, for any number of trainings (--cache). The same command continues an "
        "unfinished cache.",
    )
    command.set_defaults(
        run=cache,
        less_memory="out of memory: run the same command again with a smaller --batch; what was written is kept",
    )
    _add_common(command)
    command.add_argument("--data", type=path_text, required=True, help="images, as for training")
    command.add_argument("--batch", type=int, default=16, help="images encoded at a time")
    command.add_argument("--shard-size", type=int, default=1024, help="images per file")
    command.add_argument(
        "--captions",
        action="store_true",
        help="keep the images' captions, for `train.py progressive`, and leave images without one out; without --vae "
        "it keeps no latents for decoders",
    )
    command.add_argument(
        "--vlm-conditions",
        action="store_true",
        help="also keep the VLM's own conditions of images and captions, for trainings with --vlm-conditions; they "
        "belong to one decoder's calibration",
    )
    command.add_argument("--bundle", type=path, help="the decoder bundle that --vlm-conditions are for")
    command.add_argument("--calibration", type=path, help="of --vlm-conditions (default: that of --bundle)")
    _add_reads(command)
    options.add_caption_column(command)
    command.add_argument(
        "--keep-pixels", action="store_true", help="for training with --localised; takes several times the space"
    )
