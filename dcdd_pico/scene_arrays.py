"""Rendered scenes as one memory-mapped array on disk."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from dcdd_core.files import whole_file

from .scenes import Split, render_scene


def scene_images(folder: Path, split: Split, count: int, *, size: int = 96) -> np.ndarray:
    """The first `count` scenes of a split as a read-only memory map [count, size, size, 3] uint8.

    The first call renders them into `folder`, on all cores.
    """
    path = folder / f"scenes-{split}-{count}-{size}.npy"
    if not path.exists():
        chunk = 500
        jobs = [(split, start, min(chunk, count - start), size) for start in range(0, count, chunk)]
        with whole_file(path) as temporary:
            images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=(count, size, size, 3))
            with ProcessPoolExecutor(os.cpu_count()) as pool:
                for (_, start, length, _), block in zip(jobs, pool.map(rendered, *zip(*jobs))):
                    images[start : start + length] = block
            images.flush()
            del images
    return np.load(path, mmap_mode="r")


def rendered(split: Split, first: int, count: int, size: int) -> np.ndarray:
    """Scenes first..first + count - 1 of a split, [count, size, size, 3] uint8."""
    return np.stack([render_scene(split, first + k, size=size).image for k in range(count)])
