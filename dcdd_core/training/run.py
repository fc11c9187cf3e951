"""The commands of `train.py`: from files to a decoder bundle, or to a cache of encodings."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from PIL import Image

from ..method.sampling import keyed_generator
from ..models.card import DecoderCard
from ..models.checkpoints import fingerprint_of
from ..models.decoder import DistributionConditionedDecoder
from ..pipelines.decode import decode
from ..settings import require_at_least, require_same_settings
from .batches import Batches, DataShard, Source
from .cache import CacheCard, EncodingCache
from .cache_writer import write_cache
from .checkpoints import load_ema, newest_checkpoint, settings_of
from .config import DataConfig, OptimizationConfig, RunConfig
from .encoded_batch import encode
from .examples import ExampleMaker
from .loss import decoder_loss
from .plan import Encoders, Plan
from .sources import open_images
from .trainable import frozen_weights
from .trainer import Evaluation, Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator

BUNDLE = "decoder.safetensors"


def make_accelerator(
    folder: Path | None = None, *, cpu: bool = False, precision: str | None = None, tracker: str | None = None
) -> Accelerator:
    """The accelerator of the processes that `accelerate launch` or `torchrun` started, or of this one alone.

    Args:
        folder: where the tracker writes.
        cpu: train on the CPU, even if there is a GPU.
        precision: "bf16" or "no"; None for the launcher's, or without a launcher "bf16" on a GPU that supports it and
            "no" elsewhere.
        tracker: one of accelerate's, such as "tensorboard".

    Raises:
        ValueError: if accelerate or the tracker is not installed, or the launcher's precision is another one.
    """
    try:
        from accelerate import Accelerator
        from accelerate.tracking import get_available_trackers
        from accelerate.utils import is_bf16_available
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
) -> Path:
    """Trains a decoder, resuming from the folder's newest checkpoint, and writes its bundle into the folder.

    Returns:
        The bundle's path.

    Raises:
        ValueError, FloatingPointError, OSError: see `Trainer.train`, `Plan` and the sources of images.
    """
    encoders = plan.encoders(_device(accelerator))
    card = CacheCard.of(encoders.tokenizer, encoders.codec, encoders.geometry, pixels=data.localised > 0)
    source = _open(data, encoders, card, accelerator)
    dtype = _frozen_dtype(accelerator.mixed_precision)
    if accelerator.is_main_process:
        report(f"{folder.name}: mixed precision {accelerator.mixed_precision}, frozen weights held in {dtype}")
    decoder = plan.decoder(encoders, dtype=dtype)
    accelerator.init_trackers("dcdd", config={name: str(value) for name, value in asdict(optimization).items()})
    shard = DataShard(
        seed=optimization.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        window=data.window,
    )
    sheet = SampleSheet(encoders, decoder.card, source, run.samples, optimization) if run.samples else None
    Trainer(
        folder,
        decoder,
        Batches(source, size=data.batch, shard=shard, workers=data.workers),
        ExampleMaker(decoder.card, encoders.tokenizer, encoders.codec, encoders.geometry, localised=data.localised),
        optimization,
        accelerator=accelerator,
        settings={
            "encodings": asdict(card),
            **_decoder_settings(plan, decoder),
            "localised": data.localised,
            "precision": accelerator.mixed_precision,
        },
        run=run,
        evaluate=sheet,
        report=report,
    ).train()
    path = folder / BUNDLE
    if accelerator.is_main_process:
        # Into a decoder that is loaded again: the trained one may be sharded over devices.
        plan.save(path, plan.decoder(encoders, dtype=dtype), load_ema(newest_checkpoint(folder)))
        report(f"wrote {path}")
    accelerator.end_training()
    return path


def run_bundle(folder: Path, plan: Plan, *, accelerator: Accelerator, report: Callable[[str], None] = print) -> Path:
    """Writes the bundle of a run's newest checkpoint; the run may be unfinished, or still running.

    Returns:
        The bundle's path, whose name has the step.

    Raises:
        ValueError: if there is no checkpoint yet, it is of another plan, or it cannot be read.
    """
    newest = newest_checkpoint(folder)
    if newest is None:
        raise ValueError(f"{folder} has no checkpoint yet to make a bundle of (see --save-every)")
    path = (folder / BUNDLE).with_stem(f"{Path(BUNDLE).stem}-{newest.name}")
    if accelerator.is_main_process:
        before = settings_of(newest)
        decoder = plan.decoder(plan.encoders("cpu"), dtype=_frozen_dtype(before.get("precision")))
        now = _decoder_settings(plan, decoder) | {"card": asdict(decoder.card)}
        require_same_settings(
            f"{newest} was",
            {name: before.get(name) for name in now},
            now,
            remedy="use those settings, which are the options of the run",
        )
        plan.save(path, decoder, load_ema(newest))
        report(f"wrote {path}")
    return path


def run_cache(
    folder: Path,
    plan: Plan,
    *,
    accelerator: Accelerator,
    images: str | Path,
    column: str | None = None,
    batch: int = 16,
    shard_size: int = 1024,
    workers: int = 0,
    keep_pixels: bool = False,
    report: Callable[[str], None] = print,
) -> None:
    """Encodes all images into a cache, each process its shards; see `write_cache`."""
    require_at_least(0, workers=workers)
    require_at_least(1, batch=batch, shard_size=shard_size)
    encoders = plan.encoders(_device(accelerator))
    write_cache(
        folder,
        open_images(images, encoders.geometry, column=column),
        encoders.tokenizer,
        encoders.codec,
        shard_size=shard_size,
        batch_size=batch,
        keep_pixels=keep_pixels,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=workers,
        report=report,
    )
    accelerator.end_training()


class SampleSheet:
    """Evaluates a decoder on the first images of a source: the loss, always with the same noise, and a sample sheet.

    A row of the sheet is one image: decoded by the autoencoder (the best that the decoder can reach), by the VQ
    decoder, and by the diffusion decoder.
    """

    def __init__(
        self, encoders: Encoders, card: DecoderCard, source: Source, count: int, optimization: OptimizationConfig
    ):
        tokenizer, codec, geometry = encoders.tokenizer, encoders.codec, encoders.geometry
        self.codec = codec
        self.count = count
        self.optimization = optimization
        first = next(iter(Batches(source, size=count, shard=DataShard(seed=None))))
        encoded = encode(first, tokenizer, codec)
        make = ExampleMaker(card, tokenizer, codec, geometry)
        self.example = make(encoded, keyed_generator(optimization.seed))
        by_vq = tokenizer.decode_tokens(tokenizer.tokens(encoded.features), geometry.grid)
        side = (geometry.resolution,) * 2
        self.references = (
            codec.decode(codec.denormalize(encoded.latents)),
            torch.nn.functional.interpolate(by_vq, size=side, mode="bicubic", antialias=True),
        )

    def __call__(self, decoder: DistributionConditionedDecoder) -> Evaluation:
        """The loss and the sheet of a decoder."""
        painted = decode(decoder, self.codec, self.example.condition, seeds=range(self.count)).pixels
        generator = keyed_generator(self.optimization.seed)
        loss = decoder_loss(decoder, self.example, generator, self.optimization)
        columns = torch.stack([images.to(painted) for images in (*self.references, painted)])
        sheet = ((rearrange(columns, "k b c h w -> (b h) (k w) c").clamp(-1, 1) + 1) * 127.5).round().byte()
        return Evaluation(numbers={"loss": float(loss)}, sheet=Image.fromarray(sheet.cpu().numpy()))


def _open(data: DataConfig, encoders: Encoders, card: CacheCard, accelerator: Accelerator) -> Source:
    """The source of the images or encodings to train on."""
    if data.cache is None:
        return open_images(data.images, encoders.geometry, column=data.column)
    source = EncodingCache(data.cache)
    source.require(card)
    if data.verify:
        source.verify(rank=accelerator.process_index, world=accelerator.num_processes)
    return source


def _decoder_settings(plan: Plan, decoder: DistributionConditionedDecoder) -> dict[str, Any]:
    """What a checkpoint depends on of the decoder before training, besides its card."""
    return {"frozen": fingerprint_of(frozen_weights(decoder)), "trained": plan.trained, "rank": plan.rank}


def _frozen_dtype(precision: str | None) -> torch.dtype:
    """The dtype of frozen weights."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _device(accelerator: Accelerator) -> torch.device:
    """The process's device; accelerate numbers those of several processes on a CPU, which safetensors refuses."""
    return torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device
