"""A run of `train.py`: from files to a decoder bundle, or to a cache of encodings."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from PIL import Image

from ..method.latents import unscale_latents
from ..method.sampling import keyed_generator
from ..models.card import DecoderCard
from ..models.checkpoints import fingerprint_of
from ..models.decoder import DistributionConditionedDecoder
from ..models.vae import KLCodec
from ..pipelines.decode import decode
from .batches import Batches, Share, Source
from .cache import CacheCard, EncodingCache
from .cache_writer import write_cache
from .encoded_batch import encode
from .examples import ExampleMaker
from .image_batch import PictureBatch
from .plan import Encoders, Plan
from .recipe import DecoderTraining, decoder_loss
from .run_state import load_average, newest_checkpoint, settings_of
from .settings import require_at_least, require_same_settings
from .sources import open_pictures
from .trainable import frozen_weights
from .trainer import Evaluation, train_decoder

if TYPE_CHECKING:
    from accelerate import Accelerator

BUNDLE = "decoder.safetensors"


def make_accelerator(
    folder: Path | None = None, *, cpu: bool = False, precision: str | None = None, tracker: str | None = None
) -> Accelerator:
    """The processes that `accelerate launch` or `torchrun` started, or this one alone.

    Args:
        folder: where the tracker writes.
        cpu: leaves the accelerators of this machine alone.
        precision: "bf16" or "no"; None for what the launcher was told, or without one for bf16 on an accelerator that
            has it, and "no" on a CPU.
        tracker: one of accelerate's, such as "tensorboard".

    Raises:
        ValueError: if accelerate or the tracker is not installed, or the launcher was told another precision.
    """
    try:
        from accelerate import Accelerator
        from accelerate.tracking import get_available_trackers
        from accelerate.utils import is_bf16_available
    except ImportError as error:
        raise ValueError("training needs accelerate: install the pack's 'train' extra") from error
    if tracker is not None and tracker not in (known := [str(name) for name in get_available_trackers()]):
        raise ValueError(
            f"the tracker {tracker!r} is not installed (there are: {', '.join(known) or 'none'}): install it, or leave "
            "it out; log.jsonl and the sample sheets are written anyway"
        )
    # Without a device of its own, torchrun's processes would not find each other.
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
            f"the decoder is trained in bf16 or without mixed precision, not {accelerator.mixed_precision}"
        )
    return accelerator


def run_training(
    folder: Path,
    plan: Plan,
    recipe: DecoderTraining,
    *,
    accelerator: Accelerator,
    data: str | Path | None = None,
    column: str | None = None,
    cache: Path | None = None,
    verify: bool = False,
    batch: int = 4,
    window: int = 1000,
    workers: int = 0,
    localised: float = 0.2,
    samples: int = 4,
    sample_every: int = 1000,
    save_every: int = 500,
    log_every: int = 10,
    report: Callable[[str], None] = print,
) -> Path:
    """Trains a decoder, going on from the folder's newest checkpoint, and writes its bundle into the folder.

    Args:
        data, column: pictures as `open_pictures` takes them, or
        cache: a folder of `write_cache`.
        verify: compare all of the cache with its checksums first, which reads all of it.
        batch: pictures of one process at a time.
        window: see `Share`.
        localised: see `ExampleMaker`.
        samples: the first pictures of the data, painted every `sample_every` steps; 0 for none.

    Returns:
        The bundle's path.

    Raises:
        ValueError, FloatingPointError, OSError: as what it is made of; see `train_decoder`.
    """
    if (data is None) == (cache is None):
        raise ValueError("give either pictures or a cache of their encodings to train on")
    if verify and cache is None:
        raise ValueError("pictures have no checksums to verify: leave --verify out, or train on a cache")
    require_at_least(0, samples=samples, workers=workers)
    require_at_least(1, batch=batch, window=window, save_every=save_every, log_every=log_every)
    if samples and sample_every < 1:
        raise ValueError(f"sample_every must be at least 1, got {sample_every}: for no sheets take --samples 0")
    encoders = plan.encoders(_device(accelerator))
    made_by = CacheCard.of(encoders.vq, encoders.vae, encoders.geometry, pixels=localised > 0)
    if cache is None:
        source: Source = open_pictures(data, encoders.geometry, column=column)
    else:
        source = EncodingCache(cache)
        source.require(made_by)
        if verify:
            source.verify(rank=accelerator.process_index, world=accelerator.num_processes)
    frozen = _frozen(accelerator.mixed_precision)
    if accelerator.is_main_process:
        report(f"{folder.name}: mixed precision {accelerator.mixed_precision}, frozen weights held in {frozen}")
    decoder = plan.decoder(encoders, dtype=frozen)
    settings = {
        "encodings": asdict(made_by),
        **_made_of(plan, decoder),
        "localised": localised,
        "precision": accelerator.mixed_precision,
    }
    accelerator.init_trackers("dcdd", config={name: str(value) for name, value in asdict(recipe).items()})
    share = Share(seed=recipe.seed, rank=accelerator.process_index, world=accelerator.num_processes, window=window)
    train_decoder(
        folder,
        decoder,
        Batches(source, size=batch, share=share, workers=workers),
        ExampleMaker(decoder.card, encoders.vq, encoders.vae, encoders.geometry, localised=localised),
        recipe,
        accelerator=accelerator,
        settings=settings,
        evaluate=paint_samples(encoders, decoder.card, source, samples, recipe) if samples else None,
        evaluate_every=sample_every,
        save_every=save_every,
        log_every=log_every,
        report=report,
    )
    path = folder / BUNDLE
    if accelerator.is_main_process:
        # Made anew: what was trained may lie in parts on many devices.
        plan.save(path, plan.decoder(encoders, dtype=frozen), load_average(newest_checkpoint(folder)))
        report(f"wrote {path}")
    accelerator.end_training()
    return path


def run_bundle(folder: Path, plan: Plan, *, accelerator: Accelerator, report: Callable[[str], None] = print) -> Path:
    """Writes the bundle of the newest checkpoint of a run that need not be at its end, and may be under way.

    Returns:
        The bundle's path, which says the step.

    Raises:
        ValueError: if there is no checkpoint yet, it is of another plan, or it cannot be read.
    """
    newest = newest_checkpoint(folder)
    if newest is None:
        raise ValueError(f"{folder} has no checkpoint yet (see --save-every): there is nothing to make a bundle of")
    path = (folder / BUNDLE).with_stem(f"{Path(BUNDLE).stem}-{newest.name}")
    if accelerator.is_main_process:
        made = settings_of(newest)
        decoder = plan.decoder(plan.encoders("cpu"), dtype=_frozen(made.get("precision")))
        now = _made_of(plan, decoder) | {"card": asdict(decoder.card)}
        require_same_settings(newest, {name: made.get(name) for name in now}, now)
        plan.save(path, decoder, load_average(newest))
        report(f"wrote {path}")
    return path


def run_cache(
    folder: Path,
    plan: Plan,
    *,
    accelerator: Accelerator,
    data: str | Path,
    column: str | None = None,
    batch: int = 16,
    shard_size: int = 1024,
    workers: int = 0,
    keep_pixels: bool = False,
    report: Callable[[str], None] = print,
) -> None:
    """Encodes all pictures into a cache, each process its shards; see `write_cache`."""
    require_at_least(0, workers=workers)
    require_at_least(1, batch=batch, shard_size=shard_size)
    encoders = plan.encoders(_device(accelerator))
    write_cache(
        folder,
        open_pictures(data, encoders.geometry, column=column),
        encoders.vq,
        encoders.vae,
        shard_size=shard_size,
        batch_size=batch,
        keep_pixels=keep_pixels,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=workers,
        report=report,
    )
    accelerator.end_training()


def paint_samples(
    encoders: Encoders, card: DecoderCard, source: Source, count: int, recipe: DecoderTraining
) -> Callable[[DistributionConditionedDecoder], Evaluation]:
    """Looks at a decoder by the first pictures of a source: a sheet, and the loss with the same noise each time.

    A row a picture: what the autoencoder makes of it (the best that can be painted), the VQ decode, the decoder.
    """
    vq, vae = encoders.vq, KLCodec(encoders.vae)
    first: PictureBatch = next(iter(Batches(source, size=count, share=Share(seed=None))))
    encoded = encode(first, vq, encoders.vae)
    make = ExampleMaker(card, vq, encoders.vae, encoders.geometry)
    example = make(encoded, keyed_generator(recipe.seed))
    side = (encoders.geometry.resolution,) * 2
    best = vae.decode(unscale_latents(encoded.latents, card.vae_shift, card.vae_scale))
    by_vq = vq.decode_tokens(vq.tokens(encoded.features), encoders.geometry.grid)
    by_vq = torch.nn.functional.interpolate(by_vq, size=side, mode="bicubic", antialias=True)

    def evaluate(decoder: DistributionConditionedDecoder) -> Evaluation:
        painted = decode(decoder, vae, example.condition, seeds=range(count)).pixels
        loss = decoder_loss(decoder, example, keyed_generator(recipe.seed), recipe)
        columns = torch.stack([picture.to(painted) for picture in (best, by_vq, painted)])
        sheet = ((rearrange(columns, "k b c h w -> (b h) (k w) c").clamp(-1, 1) + 1) * 127.5).round().byte()
        return Evaluation(numbers={"loss": float(loss)}, sheet=Image.fromarray(sheet.cpu().numpy()))

    return evaluate


def _made_of(plan: Plan, decoder: DistributionConditionedDecoder) -> dict[str, Any]:
    """What a checkpoint depends on of the decoder before training, besides its card."""
    return {"frozen": fingerprint_of(frozen_weights(decoder)), "trained": plan.trained, "rank": plan.rank}


def _frozen(precision: str | None) -> torch.dtype:
    """What weights that are not trained are held in."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _device(accelerator: Accelerator) -> torch.device:
    """The process's; several on one CPU are numbered by accelerate, which safetensors does not know."""
    return torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device
