"""Rendered scenes: as a memory-mapped array on disk, or endless, rendered while training uses the previous ones.

Shapes: B batch, S image side in pixels.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from dcdd_core.files import whole_file

from .ahead import Ahead
from .scenes import SPLIT_SIZE, Split, render_scene


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


class FreshImages:
    """The scenes of a split in order, each once; after the last block it starts again with the first.

    Args:
        size: S.
        block: number of scenes rendered at a time and held in memory.
        ahead: a separate process renders the next block; False renders each block when it is asked for.
    """

    def __init__(self, split: Split, size: int, *, block: int, ahead: bool = True):
        self.split, self.size, self.block = split, size, block
        self._blocks = Ahead(rendered, self._job, apart=ahead)
        self._held: tuple[int, np.ndarray] = (-1, np.empty(0))

    def batch(self, step: int, size: int) -> np.ndarray:
        """The scenes of an update, [size, S, S, 3] uint8; they depend on the update's number only."""
        found = []
        for position in range(step * size, (step + 1) * size):
            number, place = divmod(position, self.block)
            found.append(self._load(number % (SPLIT_SIZE // self.block))[place])
        return np.stack(found)

    def close(self) -> None:
        """Ends the rendering process."""
        self._blocks.close()

    def _load(self, number: int) -> np.ndarray:
        if self._held[0] != number:
            self._held = (number, self._blocks.result(number))
            self._blocks.ask((number + 1) % (SPLIT_SIZE // self.block))
        return self._held[1]

    def _job(self, number: int) -> tuple[Split, int, int, int]:
        return self.split, number * self.block, self.block, self.size
