"""The commands of `train.py`: from files to a decoder bundle, or to a cache of encodings."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files import remove_leftovers
from ..method.sampling import keyed_generator
from ..models.card import DecoderCard
from ..models.checkpoints import fingerprint_of
from ..models.decoder import DistributionConditionedDecoder
from ..pipelines.decode import decode
from ..pipelines.image_files import DEFAULT_POLICY, ReadPolicy
from ..pipelines.images import stretched
from ..settings import require_at_least, require_at_most, require_same_settings
from .batches import Batches, DataShard, ReadCounter, Source, stream_files_of
from .cache import CacheCard, EncodingCache
from .cache_writer import write_cache
from .captions import Captions
from .checkpoints import HELD_OUT, HELD_OUT_FRACTION, load_best, load_ema, newest_checkpoint, settings_of
from .config import MOST_BATCH, MOST_SHARD, MOST_WORKERS, DataConfig, OptimizationConfig, RunConfig
from .decoder_task import DecoderTask
from .distillation_task import DistillationTask
from .encoded_batch import EncodedBatch, encode
from .examples import ExampleMaker
from .held_out import FEWEST_SPLIT, HeldOutLoss, Split, count_images, split
from .image_batch import Geometry
from .left_out import RECORD, LeftOut
from .lock import run_lock
from .loss import decoder_loss
from .masked_plan import MaskedPlan
from .plan import Encoders, Plan
from .progress import ProgressBar
from .schedules import warmup_cosine
from .sharding import NO_DEEPSPEED
from .sources import open_images
from .stop import TrainingStopped, stop_at_once
from .trainable import check_optimizer, frozen_weights, trained_weights
from .trainer import Evaluation, Trainer, sample_sheet
from .vlm_conditions import Served, VLMConditions, with_conditions

if TYPE_CHECKING:
    from accelerate import Accelerator

BUNDLE = "decoder.safetensors"
#: The bundle of the weights with the lowest loss on held-out images.
BEST = "best.safetensors"


def make_accelerator(
    folder: Path | None = None, *, cpu: bool = False, precision: str | None = None, tracker: str | None = None
) -> Accelerator:
    """The accelerator for the processes that `accelerate launch` or `torchrun` started, or for this one alone.

    Args:
        folder: where the tracker writes.
        cpu: train on the CPU, even if there is a GPU.
        precision: "bf16" or "no"; None for the launcher's or, without a launcher, "bf16" on a GPU that supports it and
            "no" elsewhere.
        tracker: one of accelerate's, such as "tensorboard".

    Raises:
        ValueError: if accelerate or the tracker is not installed, if the launcher is configured for DeepSpeed, or if
            the precision is another one.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":  # silently ignored on a CPU
        raise ValueError(NO_DEEPSPEED)
    try:
        from accelerate import Accelerator
        from accelerate.tracking import get_available_trackers
        from accelerate.utils import InitProcessGroupKwargs, is_bf16_available
    except ImportError as error:
        raise ValueError("training needs accelerate: install the pack's 'train' extra") from error
    if tracker is not None and tracker not in (known := [str(name) for name in get_available_trackers()]):
        raise ValueError(
            f"the tracker {tracker!r} is not installed (installed: {', '.join(known) or 'none'}): install it, or leave "
            "it out; log.jsonl and the sample sheets are written anyway"
        )
    # Without cpu=True on a machine without GPUs, torchrun's processes would not find each other.
    cpu = cpu or not torch.accelerator.is_available()
    if precision is None and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        precision = "no" if cpu or not is_bf16_available(ignore_tpu=True) else "bf16"
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        log_with=tracker,
        project_dir=folder,
        # Processes wait for one that lists the unreadable images of a large data set or saves to a slow disk. On GPUs
        # torch would give up after 10 minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"the decoder is trained in bf16 or without mixed precision, got {accelerator.mixed_precision}: change "
            "the launcher's configuration, or give --precision"
        )
    return accelerator


def run_training(
    folder: Path,
    plan: Plan,
    optimization: OptimizationConfig,
    data: DataConfig,
    run: RunConfig,
    *,
    accelerator: Accelerator,
    report: Callable[[str], None] = print,
    progress: ProgressBar | None = None,
) -> Path:
    """Trains a decoder, resuming from the folder's newest checkpoint, and writes its bundle into the folder.

    With `Plan.distillation` the decoder is a student, and the loss on held-out images is `DistillationTask.distances`.
    If images are held out, the loss on them is evaluated along with the sample sheets, and the weights with the lowest
    loss become a bundle as well (`BEST`).

    Args:
        progress: see `Trainer`.

    Returns:
        The bundle's path.

    Raises:
        ValueError: also if another training runs in the folder, or it cannot be written to.
        ValueError, FloatingPointError, OSError, TrainingStopped: see `Trainer.train`, `Plan` and the sources of images.
    """
    with run_lock(folder, accelerator), ends_training(accelerator):
        return _run_training(folder, plan, optimization, data, run, accelerator, report, progress)


def _run_training(
    folder: Path,
    plan: Plan,
    optimization: OptimizationConfig,
    data: DataConfig,
    run: RunConfig,
    accelerator: Accelerator,
    report: Callable[[str], None],
    progress: ProgressBar | None,
) -> Path:
    main = accelerator.is_main_process
    say = report if main else say_nothing
    plan.check()
    check_optimizer(optimization.optimizer, plan.trained)
    if main:
        for name in (BUNDLE, BEST):
            remove_leftovers(folder / name)
    newest = newest_checkpoint(folder)
    before = None if newest is None else settings_of(newest)
    _require_same_dropping(before, plan)
    encoders = plan.encoders(process_device(accelerator))
    share = data.vlm_conditions
    card = CacheCard.of(encoders.tokenizer, encoders.codec, encoders.geometry, pixels=data.localised > 0)
    served = Served.of(plan.condition_card(encoders)) if share else None
    source = open_source(data, encoders.geometry, lambda cache: cache.require(replace(card, vlm=served)), accelerator)
    parts = split_for_run(source, run, before, say, shown=main)
    dtype = _frozen_dtype(accelerator.mixed_precision)
    decoder = plan.decoder(encoders, dtype=dtype)
    for line in summary(decoder, optimization, data, parts, source, accelerator):
        say(f"{folder.name}: {line}")
    if plan.condition_dropout:
        say(f"{folder.name}: the condition is left out in a share of {plan.condition_dropout:g} of the examples")
    say(f"{folder.name}: mixed precision {accelerator.mixed_precision}, frozen weights held in {dtype}")
    conditions = None
    if share:
        if isinstance(source, EncodingCache):
            served = source.card.vlm
            if not (known := source.known):
                raise ValueError(
                    f"no image of the cache {data.cache} has a VLM's conditions, since none had a caption: train "
                    "without --vlm-conditions, or write a cache of captioned images"
                )
            say(
                f"{folder.name}: {known:,} of {len(source):,} images have the VLM's conditions, the others keep proxies"
            )
        else:
            conditions = plan.conditions(decoder.card, encoders)
            served = conditions.served
        say(f"{folder.name}: the VLM's own conditions in a share of {share:g} of the examples: {served.words()}")
    accelerator.init_trackers("dcdd", config={name: str(value) for name, value in asdict(optimization).items()})
    shard = DataShard(
        seed=optimization.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        window=data.window,
    )
    batches = Batches(source if parts is None else parts.training, size=data.batch, shard=shard, workers=data.workers)
    examples = ExampleMaker(
        decoder.card,
        encoders.tokenizer,
        encoders.codec,
        encoders.geometry,
        localised=data.localised,
        vlm_share=share,
        conditions=conditions,
    )
    distillation = None
    if plan.distillation is not None:
        teacher = plan.teacher(process_device(accelerator), dtype=dtype, compiled=optimization.compile)
        distillation = DistillationTask(decoder, examples, teacher)
        for line in distillation.summary(encoders.geometry.latent_size):
            say(f"{folder.name}: {line}")
    evaluate, held_out = _evaluation(
        encoders, decoder.card, source, parts, run, data, optimization, accelerator, conditions, distillation
    )
    trainer = Trainer(
        folder,
        distillation or DecoderTask(decoder, examples),
        batches,
        optimization,
        accelerator=accelerator,
        settings={
            "encodings": card.to_dict(),
            **_decoder_settings(plan, decoder),
            "localised": data.localised,
            **({} if served is None else {"vlm_conditions": {"share": share, **served.to_dict()}}),
            "precision": accelerator.mixed_precision,
            **({} if parts is None else {HELD_OUT: parts.fingerprint, HELD_OUT_FRACTION: run.held_out}),
        },
        run=run,
        evaluate=evaluate,
        report=report,
        progress=progress,
    )
    path = folder / BUNDLE

    def write() -> None:
        # The best one first, so that a run whose last bundle is written has both.
        if parts is not None:
            _save_best(folder, plan, encoders, dtype, report)
        # Into a freshly loaded decoder, since the trained one may be sharded over devices.
        plan.save(path, plan.decoder(encoders, dtype=dtype), load_ema(newest_checkpoint(folder)))
        report(f"wrote {path}")

    train_and_write(trainer, write, source, held_out)
    return path


def train_and_write(trainer: Trainer, write: Callable[[], None], source: Source, held_out: ReadCounter) -> None:
    """Trains to the end; then the main process writes the results, and which images were left out.

    Args:
        write: writes the results into the run's folder.
        held_out: counts what this process read of the held-out images.

    Raises:
        ValueError, FloatingPointError, OSError, TrainingStopped: see `Trainer.train`; the main process has reported the
            message of a TrainingStopped.
    """
    folder, accelerator = trainer.folder, trainer.accelerator
    say = trainer.report if accelerator.is_main_process else say_nothing
    try:
        trainer.train()
        # Only now, since resuming in `train` replaces the counter.
        left_out = _left_out(source, [trainer.batches.counter, held_out], accelerator)
        if accelerator.is_main_process:
            words = f"{folder.name}: stopped while its results were written: run the same command again to write them"
            with stop_at_once(words):
                left_out.write(folder)
                write()
            for line in left_out.lines():
                say(f"{folder.name}: {line}")
            if left_out.unreadable or left_out.small or left_out.uncaptioned or left_out.without_caption:
                say(f"{folder.name}: all of them are named in {folder / RECORD}")
    except TrainingStopped as stopped:
        say(str(stopped))
        raise


@contextmanager
def ends_training(accelerator: Accelerator) -> Iterator[None]:
    """Ends the accelerator's work when the block ends or its training is stopped, after the block's objects are gone.

    A `DistributedDataParallel` wrapper must not outlive the process group: as its last owner it would hold the
    interpreter's lock while waiting for gloo's threads, which wait for that lock.
    """
    try:
        yield
    except TrainingStopped as stopped:
        traceback.clear_frames(stopped.__traceback__)
        _end(accelerator)
        raise
    _end(accelerator)


def _end(accelerator: Accelerator) -> None:
    if accelerator.distributed_type != "NO":  # `free_memory` collects garbage, which takes as long as a short training.
        accelerator.free_memory()
    accelerator.end_training()


def _left_out(source: Source, counters: Sequence[ReadCounter], accelerator: Accelerator) -> LeftOut:
    """What all processes left out; they must call this together."""
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        counters = gather_object(list(counters))
    return LeftOut.of(source, *counters)


def _save_best(folder: Path, plan: Plan, encoders: Encoders, dtype: torch.dtype, report: Callable[[str], None]) -> None:
    """Writes the bundle of the weights with the lowest held-out loss, if there are any."""
    best = load_best(folder)
    if best is not None:
        plan.save(folder / BEST, plan.decoder(encoders, dtype=dtype), best.weights)
        report(f"wrote {folder / BEST}, of step {best.step}: the lowest held-out loss, {best.loss:.4g}")


def run_bundle(folder: Path, plan: Plan, *, accelerator: Accelerator, report: Callable[[str], None] = print) -> Path:
    """Writes the bundle of a run's newest checkpoint; the run may be unfinished, or still running.

    Returns:
        The bundle's path, whose name includes the step.

    Raises:
        ValueError: if there is no checkpoint yet, or it was made with another plan or cannot be read.
    """
    newest = newest_checkpoint(folder)
    if newest is None:
        raise ValueError(f"{folder} has no checkpoint yet to make a bundle of (see --save-every)")
    path = (folder / BUNDLE).with_stem(f"{Path(BUNDLE).stem}-{newest.name}")
    if accelerator.is_main_process:
        before = settings_of(newest)
        _require_same_dropping(before, plan)
        encoders, dtype = plan.encoders("cpu"), _frozen_dtype(before.get("precision"))
        decoder = plan.decoder(encoders, dtype=dtype)
        require_settings_of(newest, before, _decoder_settings(plan, decoder) | {"card": decoder.card.to_dict()})
        plan.save(path, decoder, load_ema(newest))
        report(f"wrote {path}")
        _save_best(folder, plan, encoders, dtype, report)
    return path


def require_settings_of(checkpoint: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses a plan other than the one a checkpoint was made with.

    Args:
        before: the checkpoint's settings.
        now: the plan's, a subset of them.

    Raises:
        ValueError: naming each difference.
    """
    remedy = "use those settings, which are the options of the run"
    require_same_settings(f"{checkpoint} was", {name: before.get(name) for name in now}, now, remedy=remedy)


def _require_same_dropping(before: Mapping[str, Any] | None, plan: Plan) -> None:
    """Refuses to resume with another share of conditions left out.

    Args:
        before: the settings of the run's newest checkpoint, if there is one.
    """
    began = plan.condition_dropout if before is None else before.get("card", {}).get("condition_dropout", 0.0)
    if began != plan.condition_dropout:
        raise ValueError(
            f"this run began with --drop-condition {began:g}, got {plan.condition_dropout:g}: give --drop-condition "
            f"{began:g} again, or another --out"
        )


def run_cache(
    folder: Path,
    plan: Plan | MaskedPlan,
    *,
    accelerator: Accelerator,
    images: str | Path,
    column: str | None = None,
    captions: Captions | None = None,
    batch: int = 16,
    shard_size: int = 1024,
    workers: int = 0,
    keep_pixels: bool = False,
    vlm_conditions: bool = False,
    policy: ReadPolicy = DEFAULT_POLICY,
    report: Callable[[str], None] = print,
) -> None:
    """Encodes all images into a cache, each process its own shards; see `write_cache`.

    Args:
        vlm_conditions: also store the VLM's conditions of images that have a caption; needs a decoder's plan.
    """
    require_at_least(0, workers=workers)
    require_at_least(1, batch=batch, shard_size=shard_size)
    require_at_most(MOST_WORKERS, workers=workers)
    require_at_most(MOST_BATCH, batch=batch)
    require_at_most(MOST_SHARD, shard_size=shard_size)
    encoders = plan.encoders(process_device(accelerator))
    conditions = plan.conditions(plan.condition_card(encoders), encoders) if vlm_conditions else None
    if conditions is not None and accelerator.is_main_process:
        report(f"{folder}: the VLM's own conditions: {conditions.served.words()}")
    write_cache(
        folder,
        open_images(images, encoders.geometry, column=column, policy=policy, captions=captions),
        encoders.tokenizer,
        encoders.codec,
        shard_size=shard_size,
        batch_size=batch,
        keep_pixels=keep_pixels,
        conditions=conditions,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=workers,
        report=report,
    )
    accelerator.end_training()


def split_for_run(
    source: Source, run: RunConfig, before: dict[str, Any] | None, say: Callable[[str], None], *, shown: bool
) -> Split | None:
    """The held-out split of a run; None if it has none.

    Args:
        before: the settings of the run's newest checkpoint, if there is one.
        shown: see `split`.
    """
    wanted = bool(run.sample_every and run.held_out)
    if not run.sample_every and run.held_out not in (0, RunConfig.held_out):
        say(f"--held-out {run.held_out:g} does nothing: with --sample-every 0 there are no evaluations to hold out for")
    if before is not None and HELD_OUT not in before:
        if wanted:
            say("this run began without held-out images, and goes on without them")
        return None
    parts = split(source, run.held_out, shown=shown) if wanted else None
    if before is not None and (parts is None or parts.fingerprint != before[HELD_OUT]):
        raise ValueError(_other_images(source, run, before.get(HELD_OUT_FRACTION)))
    if wanted and parts is None:
        say(f"no images are held out, since there are fewer than {FEWEST_SPLIT}: there is no validation loss")
    return parts


def _other_images(source: Source, run: RunConfig, fraction: float | None) -> str:
    """Why a run does not hold out the images that it began with, and what to do about it.

    Args:
        fraction: the one it began with; None if an earlier version did not record it.
    """
    if not run.sample_every:
        return "this run began with held-out images, and --sample-every 0 takes none: give another --sample-every"
    if fraction is not None and fraction != run.held_out:
        return f"this run began with --held-out {fraction:g}, got {run.held_out:g}: give --held-out {fraction:g} again"
    perhaps = f" or --held-out was not {run.held_out:g}" if fraction is None else ""
    return (
        f"this run began with other held-out images: images were added to {source.name}, removed or renamed{perhaps}. "
        "Give the images and the --held-out that it began with, or another --out"
    )


def _evaluation(
    encoders: Encoders,
    card: DecoderCard,
    source: Source,
    parts: Split | None,
    run: RunConfig,
    data: DataConfig,
    optimization: OptimizationConfig,
    accelerator: Accelerator,
    conditions: VLMConditions | None = None,
    distillation: DistillationTask | None = None,
) -> tuple[Callable[[DistributionConditionedDecoder], Evaluation] | None, ReadCounter]:
    """The evaluation (loss on held-out images, sample sheet; None for neither), and the count of held-out images read.

    Args:
        conditions: makes the VLM's; None if the batches have them or the training uses none.
        distillation: a student's, which provides the loss; None for training on images.
    """

    def encoded(batch: Any) -> EncodedBatch:
        found = encode(batch, encoders.tokenizer, encoders.codec)
        return found if conditions is None else with_conditions(found, conditions)

    shown = source if parts is None else parts.held_out
    sheet = SampleSheet(encoders, card, shown, run.samples, optimization, distillation) if run.samples else None
    if parts is None:
        return sheet, ReadCounter()
    loss = HeldOutLoss(
        parts.held_out,
        encoded,
        ExampleMaker(card, encoders.tokenizer, encoders.codec, encoders.geometry),
        optimization,
        batch=data.batch,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        total=lambda sums: accelerator.reduce(sums.to(accelerator.device), "sum"),
        vlm_share=data.vlm_conditions,
        errors=None if distillation is None else distillation.distances,
    )

    def evaluate(decoder: DistributionConditionedDecoder) -> Evaluation:
        numbers = loss.numbers(decoder)
        if decoder.card.condition_dropout:
            numbers["loss_without_condition"] = loss(decoder, dropped=True)
        image = None if sheet is None else sheet(decoder).sheet
        return Evaluation(numbers=numbers, sheet=image, score=numbers["loss"])

    return evaluate, loss.counter


def summary(
    network: torch.nn.Module,
    config: OptimizationConfig,
    data: DataConfig,
    parts: Split | None,
    source: Source,
    accelerator: Accelerator,
) -> Iterator[str]:
    """Lines of text that say what will be trained, on what, and how."""
    world, repeated = accelerator.num_processes, config.accumulation
    yield (
        f"{world} process{'es' if world > 1 else ''} on {accelerator.device.type} x {data.batch} images x {repeated} "
        f"micro-batch{'es' if repeated > 1 else ''} = an effective batch of {world * data.batch * repeated}"
    )
    count = count_images(source)
    held_out = 0 if parts is None else len(parts.held_out.listed)
    images = "a stream of images" if count is None else f"{count - held_out:,} images"
    yield f"{images}, and {held_out} held out that are never trained on"
    if (files := stream_files_of(source)) % world:
        fewer = f"a number of processes that divides {files}" if files > 1 else "one process"
        yield (
            f"{files} file{'s' if files > 1 else ''} of images, which is no multiple of the {world} processes: each of "
            f"them reads all files and uses one image in {world}, so that none is left out. So that each file is read "
            f"only once, give a multiple of {world} files, or {fewer}"
        )
    if not files and data.window != DataConfig.window:
        yield f"--window {data.window} does nothing: only streams have a window, other images are shuffled as a whole"
    trained, frozen = (
        sum(weight.numel() for weight in weights(network).values()) for weights in (trained_weights, frozen_weights)
    )
    yield f"{trained:,} trained parameters, and {frozen:,} frozen ones"
    yield (
        f"{config.steps:,} updates, a warm-up of {config.warmup:,}, then a cosine from a learning rate of "
        f"{config.learning_rate:g}"
    )
    if config.warmup >= config.steps:
        reached = warmup_cosine(config.steps - 1, config.steps, peak=config.learning_rate, warmup=config.warmup)
        yield f"the warm-up is as long as the run: its learning rate ends at {reached:.3g}; see --warmup"


class SampleSheet:
    """Evaluates a decoder on the first images of a source: the loss, always with the same noise, and a sample sheet.

    The loss is called "training_loss", since the images may be trained on; `held_out.HeldOutLoss` is that on others.

    A row of the sheet is one image: decoded by the autoencoder (the best that the decoder can reach), by the VQ
    decoder, and by the diffusion decoder; for a student, its teacher replaces the VQ decoder.

    Args:
        count: how many images.
        distillation: a student's, whose loss is `DistillationTask.distances`; None for training on images.
    """

    def __init__(
        self,
        encoders: Encoders,
        card: DecoderCard,
        source: Source,
        count: int,
        optimization: OptimizationConfig,
        distillation: DistillationTask | None = None,
    ):
        tokenizer, codec, geometry = encoders.tokenizer, encoders.codec, encoders.geometry
        self.codec = codec
        self.count = count
        self.optimization = optimization
        self.distillation = distillation
        first = next(iter(Batches(source, size=count, shard=DataShard(seed=None))))
        encoded = encode(first, tokenizer, codec)
        make = ExampleMaker(card, tokenizer, codec, geometry)
        self.example = make(encoded, keyed_generator(optimization.seed))
        if distillation is None:
            by_vq = tokenizer.decode_tokens(tokenizer.tokens(encoded.features), geometry.grid)
            other = stretched(by_vq, (geometry.resolution, geometry.resolution))
        else:
            steps = card.distilled.teacher_steps
            other = decode(distillation.teacher, codec, self.example.condition, seeds=range(count), steps=steps).pixels
        self.references = (codec.decode(codec.denormalize(encoded.latents)), other)

    def __call__(self, decoder: DistributionConditionedDecoder) -> Evaluation:
        """The loss and the sheet of a decoder."""
        painted = decode(decoder, self.codec, self.example.condition, seeds=range(self.count)).pixels
        generator = keyed_generator(self.optimization.seed)
        if self.distillation is None:
            loss = decoder_loss(decoder, self.example, generator, self.optimization)
        else:
            noise = torch.randn(self.example.latents.shape, generator=generator)
            loss = self.distillation.distances(decoder, self.example, noise).mean()
        sheet = sample_sheet([images.to(painted) for images in (*self.references, painted)])
        return Evaluation(numbers={"training_loss": float(loss)}, sheet=sheet)


def open_source(
    data: DataConfig, geometry: Geometry, require: Callable[[EncodingCache], None], accelerator: Accelerator
) -> Source:
    """The source of the images or encodings to train on.

    Args:
        require: refuses a cache that does not fit.
    """
    if data.cache is None:
        return open_images(data.images, geometry, column=data.column, policy=data.policy, captions=data.captions)
    source = EncodingCache(data.cache)
    require(source)
    if data.verify:
        source.verify(rank=accelerator.process_index, world=accelerator.num_processes)
    return source


def _decoder_settings(plan: Plan, decoder: DistributionConditionedDecoder) -> dict[str, Any]:
    """What a checkpoint depends on, besides the card, in the decoder before training."""
    return {"frozen": fingerprint_of(frozen_weights(decoder)), "trained": plan.trained, "rank": plan.rank}


def _frozen_dtype(precision: str | None) -> torch.dtype:
    """The dtype of frozen weights."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def say_nothing(_: str) -> None:
    """The `report` of processes other than the main one."""


def process_device(accelerator: Accelerator) -> torch.device:
    """The process's device. accelerate numbers the CPU devices of several processes, which safetensors refuses."""
    return torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device
