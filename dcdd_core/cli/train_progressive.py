"""`dcdd train progressive`: trains a masked sampler for an image tokenizer on captioned images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dcdd_pico.embedded import model_paths

from ..method.masked_modelling import CORRUPTIONS, HIDDEN_SHARES
from ..settings import require_number
from ..training import estimate
from ..training.captions import Captions
from ..training.masked_cost import MaskedSetup, masked_cost
from ..training.masked_plan import HEADS, LAYERS, TEMPLATE, WIDTH, MaskedPlan
from ..training.masked_run import run_masked, run_sampler
from ..training.masked_task import MaskingConfig
from ..training.progress import ProgressBar
from ..training.run import make_accelerator
from . import training_options as options
from .arguments import path, path_text

_MOST_GPUS = 2**16
_GPUS = 1
_PICO = "pico"
_LESS_MEMORY = f"{options.LESS_MEMORY}, or a smaller --width"


def run(args: argparse.Namespace) -> None:
    """Trains a masked sampler, or resumes; with --sampler-now writes the newest checkpoint's sampler instead."""
    optimization = options.optimization_config(args)
    masking = MaskingConfig(
        corruptions=tuple(args.corruptions),
        schedule=args.mask_schedule,
        dropped=args.drop_captions,
        words=args.caption_tokens,
    )
    _refuse_idle(args)
    plan = MaskedPlan(
        vlm=model_paths()["vlm"] if args.vlm == _PICO else Path(args.vlm),
        start=args.start_from,
        text=args.text_tokenizer,
        template=args.template,
        side=args.side,
        width=args.width,
        layers=args.layers,
        heads=args.heads,
        seed=args.seed,
    )
    data = options.data_config(args, captions=Captions(column=args.caption_column))
    settings = options.run_config(args)
    if args.estimate:
        _estimate(args, plan, masking)
        return
    accelerator = make_accelerator(args.out, cpu=args.cpu, precision=args.precision, tracker=args.tracker)
    if args.sampler_now:
        run_sampler(args.out, plan, accelerator=accelerator, report=accelerator.print)
        return
    run_masked(
        args.out,
        plan,
        optimization,
        data,
        masking,
        settings,
        accelerator=accelerator,
        report=accelerator.print,
        progress=ProgressBar(args.out.name, args.steps),
    )


def _estimate(args: argparse.Namespace, plan: MaskedPlan, masking: MaskingConfig) -> None:
    """Prints the memory and time that the training will take.

    Raises:
        ValueError: for numbers out of range, and as the loaders.
    """
    args.precision = args.precision or "bf16"
    estimate.check_gpu(args)
    require_number("gpus", args.gpus, whole=True, least=1, most=_MOST_GPUS)
    plan.check()
    tokenizer = plan.tokenizer("cpu")
    geometry = plan.geometry(tokenizer)
    new = plan.start is None
    setup = MaskedSetup(
        config=plan.config(tokenizer, geometry) if new else plan.sampler(tokenizer, geometry).model.config,
        geometry=geometry,
        words=masking.words,
        drawn=("samples" in masking.corruptions) / max(1, len(masking.corruptions)),
        cached=args.cache is not None,
        batch=args.batch,
        accumulate=args.accumulate,
        optimizer=args.optimizer,
        precision=args.precision,
        checkpointing=args.checkpointing,
        gpus=args.gpus,
    )
    cost = masked_cost(setup, tokenizer)
    images = args.steps * args.batch * args.accumulate * args.gpus
    teraflops, memory = estimate.gpu_of(args)
    duration = estimate.duration_of(setup, cost, images=images, teraflops=teraflops, utilisation=args.utilisation)
    advice = "try --checkpointing, or a smaller --batch with more --accumulate"
    verdict = "fits" if estimate.fits(cost, memory) else f"does NOT fit: {advice}"
    config, count = setup.config, cost.weights["trained"]
    print(f"{count / 1e6:.1f} M weights: width {config.width}, {config.layers} blocks, {config.heads} heads")
    print(
        f"{args.batch} images x {args.accumulate} x {args.gpus} GPU; {geometry.resolution} pixels, {config.tokens} "
        f"tokens of {config.codes} codes, prompts of {masking.words} tokens; precision {args.precision}, "
        f"{args.optimizer}\n"
    )
    print("\n".join(estimate.lines(cost, duration, memory, verdict)))
    print(
        "\nMemory not counted: the GPU's context and libraries, fragmentation, the sample sheets;\n"
        "time not counted: encoding images, drawing wrong tokens on the CPU, and waiting for data and other GPUs."
    )


def _refuse_idle(args: argparse.Namespace) -> None:
    """Refuses options that would have no effect with --cache, or without --estimate.

    Raises:
        ValueError: naming them.
    """
    images = {**options.IMAGES, "--caption-column": None}
    options.refuse_idle(args, [(args.cache is not None, images, options.CACHED)])
    given = options.given(args, {"--gpus": _GPUS, **estimate.GPU_OPTIONS})
    if given and not args.estimate:
        raise ValueError(f"{', '.join(given)} would do nothing without --estimate: give that too, or leave it out")


def add(commands: Any) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "progressive",
        formatter_class=options.Help,
        help="train a masked sampler: captions to image tokens, many at a time",
        description="Trains a masked sampler for an image tokenizer on captioned images, and writes its folder, "
        "OUT/sampler, which `dcdd generate --vlm` reads. The same command resumes a run that was stopped.",
    )
    command.set_defaults(run=run, less_memory=_LESS_MEMORY)
    command.add_argument(
        "--vlm",
        "--janus",
        type=path_text,
        required=True,
        help="folder of a VLM or of an image tokenizer alone (only the tokenizer is read), or 'pico', the embedded one",
    )
    command.add_argument("--out", type=path, required=True, help="folder to write to; a run there is resumed")
    command.add_argument("--cpu", action="store_true", help="train on the CPU even if there is a GPU")

    group = command.add_argument_group("network")
    group.add_argument("--side", type=int, help="side of the images in pixels (default: the VLM's own)")
    group.add_argument("--width", type=int, help=f"of a new network (default: {WIDTH})")
    group.add_argument("--layers", type=int, help=f"blocks of a new network (default: {LAYERS})")
    group.add_argument("--heads", type=int, help=f"attention heads of a new network (default: {HEADS})")
    group.add_argument(
        "--text-tokenizer",
        type=path,
        metavar="FOLDER",
        help="tokenizer.json and tokenizer_config.json of a new network's text (default: those of --vlm)",
    )
    group.add_argument("--template", help=f"around the captions of a new network (default: '{TEMPLATE}')")
    group.add_argument(
        "--start-from",
        type=path,
        metavar="FOLDER",
        help="a masked sampler, or a Janus, whose weights, words and sizes the network starts with",
    )

    group = command.add_argument_group("data")
    options.add_source(group)
    options.add_images(command, side="--side")
    options.add_caption_column(group)
    group.add_argument(
        "--caption-tokens",
        type=int,
        default=MaskingConfig.words,
        help="the longest prompt, in tokens with the template; longer captions are cut",
    )

    group = command.add_argument_group("optimisation")
    group.add_argument(
        "--drop-captions",
        type=float,
        metavar="SHARE",
        default=MaskingConfig.dropped,
        help="the share of captions that are left out, for guidance",
    )
    group.add_argument(
        "--corruptions",
        nargs="*",
        default=CORRUPTIONS,
        choices=CORRUPTIONS,
        help="sources of the corrupted tokens that it learns to correct; an empty list trains no revision",
    )
    group.add_argument(
        "--mask-schedule",
        default=MaskingConfig.schedule,
        choices=HIDDEN_SHARES,
        help="of the share of hidden positions in training",
    )
    options.add_updates(group, learning_rate=3e-4, weight_decay=0.05, ema_decay=0.999, batch=32)

    group = command.add_argument_group("estimate")
    group.add_argument(
        "--estimate", action="store_true", help="only say what this training takes, from the network's shapes"
    )
    group.add_argument("--gpus", type=int, default=_GPUS, help="number of GPUs")
    estimate.add_gpu_arguments(group)

    group = options.add_logging(command, best="OUT/best")
    group.add_argument(
        "--sampler-now",
        action="store_true",
        help="only write the sampler of the newest checkpoint, OUT/sampler-step-N; the run may still be going",
    )
