"""Trainings of the tiny decoder on images, in this process or in forked ones that may be killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dcdd_core.cli.train import main
from dcdd_core.models.vae import KLCodec
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.training.batches import Batches, DataShard
from dcdd_core.training.config import OptimizationConfig, RunConfig
from dcdd_core.training.decoder_task import DecoderTask
from dcdd_core.training.encoded_batch import geometry_for
from dcdd_core.training.examples import Example, ExampleMaker
from dcdd_core.training.image_batch import Geometry
from dcdd_core.training.log import read_log
from dcdd_core.training.sources import open_images
from dcdd_core.training.trainable import choose_trained
from dcdd_core.training.trainer import Trainer
from tests.tiny import tiny_condition, tiny_decoder, tiny_vae, tiny_vq

CAPTIONS = ("a red circle on the left", "a blue square", "a green circle and a red square")
RECIPE = {"learning_rate": 3e-3, "warmup": 2, "ema_decay": 0.9}


def png_folder(folder: Path, count: int = 7, side: int = 20) -> Path:
    """Images of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        noise = random.Random(i).randbytes(3 * side * side)
        PIL.Image.frombytes("RGB", (side, side), noise).save(folder / f"{i:02}.png")
    return folder


def caption_of(index: int) -> str:
    return CAPTIONS[index % len(CAPTIONS)]


def captioned_folder(folder: Path, count: int = 24) -> Path:
    """Images of noise, each with a caption in a text file."""
    for index, path in enumerate(sorted(png_folder(folder, count=count).glob("*.png"))):
        path.with_suffix(".txt").write_text(caption_of(index) + "\n")
    return folder


@cache
def encoders() -> tuple[VQTokenizer, KLCodec, Geometry]:
    tokenizer, codec = VQTokenizer(tiny_vq(), name="tiny"), KLCodec(tiny_vae())
    return tokenizer, codec, geometry_for(tokenizer, codec, patch=2, resolution=16, token_resolution=16)


def example(batch: int = 2) -> Example:
    """Of noise."""
    return Example(
        latents=torch.randn(batch, 16, 8, 8, generator=torch.Generator().manual_seed(0)),
        condition=tiny_condition(batch),
        masked_latents=torch.zeros(1, 16, 8, 8),
        mask=torch.ones(1, 1, 16, 16),
    )


def accelerator() -> Accelerator:
    """A fresh one on the CPU, whatever the process had before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, mixed_precision="no")


def run(
    folder: Path, images: Path, *, steps: int = 8, decoder=None, what="all", batch: int = 2, on_batch=None, **changes
):
    """Trains `what` of the tiny decoder, or the one given; `on_batch(k)` is called before the k-th batch is used.

    `task` makes another task than a `DecoderTask` of decoder and examples.
    """
    tokenizer, codec, geometry = encoders()
    if decoder is None:
        decoder = tiny_decoder(condition_dropout=changes.pop("condition_dropout", 0.0))
        choose_trained(decoder, what, rank=2)
    every = {"save_every": 3, "log_every": 1}
    every |= {
        name: changes.pop(name) for name in ("save_every", "log_every", "sample_every", "keep") if name in changes
    }
    evaluate, report = changes.pop("evaluate", None), changes.pop("report", lambda _: None)
    task = changes.pop("task", DecoderTask)
    workers = accelerator()
    make, seen = ExampleMaker(decoder.card, tokenizer, codec, geometry, localised=0.3), iter(range(10**6))

    def examples(batch, generator):
        if on_batch is not None:
            on_batch(next(seen))
        return make(batch, generator)

    shard = DataShard(rank=workers.process_index, world=workers.num_processes)
    return Trainer(
        folder,
        task(decoder, examples),
        Batches(open_images(images, geometry), size=batch, shard=shard),
        OptimizationConfig(steps=steps, **RECIPE | changes),
        accelerator=workers,
        settings={},
        run=RunConfig(**every),
        evaluate=evaluate,
        report=report,
    ).train()


def forked(target, *, world: int = 1, clean: bool = False) -> list[int]:
    """Runs `target()` in so many connected processes, ten minutes at most; their exit codes, -9 for a killed one and
    those left behind.

    Args:
        clean: forked from a process that has only imported this module, not from this one, where compiled code may have
            left threads and locks behind; the target must then pickle.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver" if clean else "fork")
    if clean:
        context.set_forkserver_preload([__name__])
    processes = [context.Process(target=_connected, args=(target, rank, world, port)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:  # A launcher ends them all once one has died.
        process.join(600)
        if process.exitcode != 0:
            for other in processes:
                other.kill()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _connected(target, rank: int, world: int, port: int) -> None:
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)  # the other threads were not forked
    target()


def launched(words: list[str]) -> None:
    """`train.py` with these words, in a process of `forked`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(words) == 0


def kill_at(number: int):
    """For `on_batch`: kill -9 at that batch."""
    return partial(_kill, number)


def _kill(number: int, k: int) -> None:
    if k == number:
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def files_of_at_most() -> Iterator[Callable[[int], None]]:
    """Gives what sets a limit to a file's bytes, as a full disk would; afterwards there is none."""
    resource = pytest.importorskip("resource", reason="limits the size of files")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def losses(folder: Path) -> list[tuple[float, ...]]:
    """What the log says of each step, but for the time."""
    return [tuple(value for name, value in line.items() if name != "seconds") for line in read_log(folder)]
